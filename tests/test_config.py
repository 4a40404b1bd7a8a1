"""Settings: every mistake is refused before anything loads, with the nearest right name."""

import json
import tomllib

import pytest

from minirlhf.config import DPOConfig, PPOConfig, RMConfig, SFTConfig, load_config
from minirlhf.errors import UsageError
from minirlhf.settings import help_text, to_dict

CONFIGS = (SFTConfig, RMConfig, PPOConfig)


def test_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[run]\nsteps = 7\nseed = 3\n[optim]\nbetas = [0.8, 0.9]\n[ppo]\nprompts = ["a", "b, c"]\n')
    config = load_config(PPOConfig, [str(path), "--run.steps", "9", "--ppo.whiten_rewards", "true"])
    assert (config.run.steps, config.run.seed, config.optim.betas) == (9, 3, (0.8, 0.9))
    assert config.ppo.prompts == ("a", "b, c")
    assert config.ppo.whiten_rewards is True


def test_lists_on_the_command_line_are_separated_by_commas():
    config = load_config(PPOConfig, ["--ppo.prompts", "刚收到货，感觉,这部电影很", "--optim.betas", "0.5,0.6"])
    assert config.ppo.prompts == ("刚收到货，感觉", "这部电影很")
    assert config.optim.betas == (0.5, 0.6)


def test_equals_sign_is_accepted():
    assert load_config(SFTConfig, ["--run.steps=30"]).run.steps == 30


@pytest.mark.parametrize("cls", CONFIGS)
def test_resolved_config_is_a_valid_config(cls, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(load_config(cls, ["--run.seed", "5"])), allow_nan=False))
    assert load_config(cls, [str(path)]) == load_config(cls, ["--run.seed", "5"])


@pytest.mark.parametrize("cls", CONFIGS)
def test_help_names_every_key_with_its_default(cls):
    text = help_text(cls, "train_x.py")
    for section, keys in to_dict(cls()).items():
        for name in keys:
            assert f"--{section}.{name} " in text
    assert "--run.steps " + str(cls().run.steps) in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--run.step", "3"], ["run.step", "run.steps"]),
        (["--ppo.klcoef", "3"], ["ppo.klcoef", "ppo.kl_coef"]),
        (["--nonsense", "3"], ["nonsense"]),
        (["--run.steps"], ["run.steps", "value"]),
        (["--run.steps", "many"], ["run.steps", "many"]),
        (["--run.steps", "1.5"], ["run.steps", "1.5"]),
        (["--run.steps", "0"], ["run.steps", "1"]),
        (["--run.steps", "-4"], ["run.steps"]),
        (["--optim.lr", "nan"], ["optim.lr"]),
        (["--optim.lr", "-0.1"], ["optim.lr"]),
        (["--ppo.clip_range", "1e39"], ["ppo.clip_range", "1e39"]),
        (["--ppo.kl_coef", "inf"], ["ppo.kl_coef inf"]),
        (["--run.threads", "9" * 30], ["run.threads"]),
        (["--run.resume", "yes"], ["run.resume", "yes"]),
        (["--run.dtype", "fp16"], ["run.dtype", "fp32", "bf16"]),
        (["--run.seed", "1", "--run.seed", "2"], ["run.seed", "twice"]),
        (["--optim.betas", "0.9"], ["optim.betas"]),
        (["stray"], ["stray"]),
        (["--run.seed", "1", "stray"], ["stray"]),
        (["--ppo.rollout_size", "60"], ["ppo.rollout_size", "60"]),
        (["--ppo.minibatch_size", "24"], ["minibatch_size"]),
        (["--sample.min_new_tokens", "99"], ["min_new_tokens"]),
        (["--optim.warmup_steps", "500"], ["optim.warmup_steps", "500"]),
        (["--reward.path", "x", "--reward.fn", "m:f"], ["reward.path", "reward.fn"]),
        (["--model.path", ""], ["model.path"]),
        (["--ppo.gae_lambda", "1.2"], ["ppo.gae_lambda"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, words):
    with pytest.raises(UsageError) as e:
        load_config(PPOConfig, argv)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.toml", "[run\n"),
        ("c.json", "{"),
        ("c.json", "[1]"),
        ("c.json", "[" * 100_000),
        ("c.json", '{"run": 3}'),
        ("c.json", '{"run": {"steps": "x"}}'),
        ("c.json", '{"run": {"steps": true}}'),
        ("c.json", '{"run": {"steps": 3.5}}'),
        ("c.json", '{"run": {"seed": null}}'),
        ("c.json", '{"optim": {"lr": 1' + 400 * "0" + "}}"),
        ("c.json", '{"ppo": {"prompts": "one, two", "nope": 1}}'),
        ("c.yaml", "run:\n"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError):
        load_config(PPOConfig, [str(path)])


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"absent\.toml"):
        load_config(SFTConfig, ["absent.toml"])


def test_presets_are_valid():
    from importlib.resources import files

    presets = [p for p in files("minirlhf").joinpath("presets").iterdir() if p.name.endswith(".toml")]
    assert len(presets) >= 3
    for preset in presets:
        cls = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}[preset.name.split(".")[0].split("_")[-1]]
        assert tomllib.loads(preset.read_text(encoding="utf-8"))
        load_config(cls, [str(preset)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ppo.kl_target", "6", "--ppo.kl_coef", "0"], r"ppo\.kl_coef 0 stays 0"),
        (["--ppo.kl_target", "6", "--ppo.kl_horizon", "51.2", "--ppo.rollout_size", "256"], r"ppo\.kl_horizon 51.2"),
        (["--optim.max_grad_norm", "0"], r"optim\.max_grad_norm 0"),
    ],
)
def test_what_would_train_nothing_is_refused(argv, words):
    with pytest.raises(UsageError, match=words):
        load_config(PPOConfig, argv)
    with pytest.raises(UsageError, match=r"dpo\.beta"):
        load_config(DPOConfig, ["--dpo.beta", "0"])
