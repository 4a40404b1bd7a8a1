"""The self-check passes a sound model, and fails each sabotaged one at the check that is meant for it."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from processes import run

from minirlhf import stage
from minirlhf.config import PPOConfig, load_config
from minirlhf.selfcheck import CHECKS, prepare


@pytest.fixture(scope="module")
def folders(stages):
    """runs/sft/final and runs/rm/final of tiny runs."""
    return stages / "runs"


def parts(folders):
    """Config, roles and policy, fresh from their folders."""
    argv = ["--model.path", str(folders / "sft/final"), "--reward.path", str(folders / "rm/final")]
    config = load_config(PPOConfig, argv)
    return (config, *stage.ppo_roles(config)[:2])


def failing(config, roles, loaded):
    """Names of the checks that fail."""
    bench = prepare(config, roles, loaded)
    return {check.__name__ for check in CHECKS if not check(bench).passed}


def test_a_sound_model_passes_everything(folders):
    assert failing(*parts(folders)) == set()


def with_hidden(policy, change):
    """The policy with another `hidden`: change(original, input_ids, attention_mask, cache)."""
    original = policy.hidden
    policy.hidden = lambda ids, mask=None, *, cache=None: change(original, ids, mask, cache)


def dropout_left_on(config, roles, loaded):
    def change(original, ids, mask, cache):
        hidden = original(ids, mask, cache=cache)
        return torch.nn.functional.dropout(hidden, 0.1) if cache is None else hidden

    with_hidden(roles.policy, change)
    return config, roles, loaded


def reference_is_another_model(config, roles, loaded):
    with torch.no_grad():
        roles.ref_policy.head.weight.mul_(1.001)
    return config, roles, loaded


def policy_is_no_longer_the_folder(config, roles, loaded):
    """Both policy and reference moved: KL is 0, and yet the reference is not what was fine-tuned."""
    with torch.no_grad():
        for model in roles[:2]:
            model.trunk.embed.weight.mul_(1.01)
    return config, roles, loaded


def cache_drifts(config, roles, loaded):
    with_hidden(roles.policy, lambda original, ids, mask, cache: original(ids, mask, cache=cache)
                * (1.02 if cache is not None and ids.shape[1] == 1 else 1.0))  # fmt: skip
    return config, roles, loaded


def padding_is_read(config, roles, loaded):
    with_hidden(roles.policy, lambda original, ids, mask, cache: original(
        ids, None if mask is None else torch.ones_like(mask), cache=cache))  # fmt: skip
    return config, roles, loaded


def rows_are_mixed(config, roles, loaded):
    def change(original, ids, mask, cache):
        hidden = original(ids, mask, cache=cache)
        return hidden + 0.1 * hidden.mean(0, keepdim=True)

    with_hidden(roles.policy, change)
    return config, roles, loaded


def gradient_counts_microbatches(config, roles, loaded):
    """A hook that adds to every backward: its share grows with the number of microbatches."""
    weight = roles.policy.trunk.embed.weight
    weight.register_hook(lambda g: g + 0.01 * g.abs().max())
    return config, roles, loaded


def score_reads_the_last_column(config, roles, loaded):
    score = roles.score
    spoiled = lambda r: score(r) + 0.1 * r.responses.shape[1]  # noqa: E731
    return config, roles._replace(score=spoiled), loaded


def eos_label_is_cut(config, roles, loaded):
    def encode(tokenizer, prompt, response):
        ids, trained = loaded.template.encode(tokenizer, prompt, response)
        return ids, [*trained[:-1], False]

    members = {k: getattr(loaded.template, k) for k in dir(loaded.template) if not k.startswith("__")}
    return config, roles, loaded._replace(template=SimpleNamespace(**(members | {"encode": encode})))


def bf16_goes_another_way(config, roles, loaded):
    with_hidden(roles.policy, lambda original, ids, mask, cache: original(ids, mask, cache=cache)
                * (2.0 if torch.is_autocast_enabled("cpu") else 1.0))  # fmt: skip
    return config, roles, loaded


@pytest.mark.parametrize(
    ("sabotage", "check"),
    [
        (dropout_left_on, "ratio"),
        (reference_is_another_model, "first_kl"),
        (policy_is_no_longer_the_folder, "reference"),
        (cache_drifts, "cache"),
        (padding_is_read, "padding_side"),
        (rows_are_mixed, "batch_size"),
        (gradient_counts_microbatches, "microbatch"),
        (score_reads_the_last_column, "score_padding"),
        (eos_label_is_cut, "eos"),
        (bf16_goes_another_way, "bf16"),
    ],
)
def test_a_sabotaged_model_fails_its_check(folders, sabotage, check):
    found = failing(*sabotage(*parts(folders)))
    assert check in found
    if check in ("first_kl", "cache", "microbatch", "score_padding", "eos", "bf16"):
        assert found <= {check, "reference"}


def test_every_check_has_its_sabotage():
    marks = test_a_sabotaged_model_fails_its_check.pytestmark[0].args[1]
    assert {check for _, check in marks} == {check.__name__ for check in CHECKS}


def selfcheck(cwd, *argv):
    code, out, err = run("-m", "minirlhf.selfcheck", *argv, cwd=cwd)
    assert "Traceback" not in err
    return code, out, err


def test_the_command_prints_a_table_and_ends_with_0(folders):
    code, out, _ = selfcheck(folders.parent)
    lines = out.splitlines()
    assert code == 0, out
    assert len(lines) == len(CHECKS) + 2
    assert lines[-1] == f"{len(CHECKS)} of {len(CHECKS)} passed"
    assert all("  pass  " in line for line in lines[1:-1])


def test_the_command_ends_with_5_where_a_check_fails(folders):
    code, out, _ = selfcheck(folders.parent, "--ppo.clip_range", "0.000001")  # narrower than the noise of bf16
    assert code == 5, out
    assert out.count("  FAIL  ") == 1
    assert out.splitlines()[-1] == f"{len(CHECKS) - 1} of {len(CHECKS)} passed; failed: log-prob noise in bf16"


def test_mistakes_end_in_one_line_and_their_code(folders):
    for argv, code, word in [
        (["--model.path", "nowhere"], 4, "nowhere"),
        (["--reward.path", "nowhere"], 4, "nowhere"),
        (["--model.pth", "x"], 2, "model.path"),
        (["--ppo.clip_range", "-1"], 2, "clip_range"),
        (["--reward.fn", "human"], 2, "human"),
    ]:
        got, out, err = selfcheck(folders.parent, *argv)
        assert (got, out) == (code, "")
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
        assert word in err


def test_the_small_rollout_takes_any_number_of_prompts(folders):
    config, roles, loaded = parts(folders)
    config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, prompts=("a", "b c", "the film")))
    bench = prepare(config, copy.copy(roles), loaded)
    assert len(bench.rollout) == len(bench.prompts) == 16
    assert set(bench.prompts) == {"a", "b c", "the film"}
