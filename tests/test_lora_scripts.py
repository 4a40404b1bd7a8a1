"""The three scripts with adapters on one base, as a user runs them."""

import json

import pytest
import torch
from processes import run
from safetensors.torch import load_file
from test_scripts import TINY, digests, killed, metrics, script

from minirlhf import review_world
from minirlhf.lora import load_adapter, use_adapter
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, save_pretrained
from minirlhf.rng import generator
from minirlhf.tokenizer import Tokenizer

slow = pytest.mark.slow
QV = ["--lora.targets", "q_proj,v_proj"]  # the later stages copy them
FIRST = {
    "sft": ["--model.path", "base", "--lora.r", "8", *QV],
    "rm": ["--lora.r", "8"],
    "ppo": ["--lora.r", "8"],
}


def argv(name, *more):
    return [*TINY[name], *FIRST[name], *more]


def base(path, seed=0):
    """A random model of the LLaMA kind that knows the words of the built-in task."""
    tokenizer = Tokenizer.from_words(review_world.words("en"))
    sizes = {"d_model": 128, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "max_seq_len": 64, "tied": False}
    config = ModelConfig(family="llama", vocab_size=tokenizer.vocab_size, **sizes)
    save_pretrained(CausalLM(config, rng=generator(seed, "weights")), path, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("lora")
    base(cwd / "base")
    before = digests(cwd / "base")
    for name in ("sft", "rm", "ppo"):
        script(name, *argv(name), cwd=cwd)
    assert digests(cwd / "base") == before
    return cwd


def tool(cwd, *argv, text="", code=0):
    found, out, err = run("-m", *argv, cwd=cwd, text=text)
    assert found == code, err
    return out


def test_every_stage_writes_adapters_alone(pipeline):
    held = set(load_file(pipeline / "base/model.safetensors"))
    size = (pipeline / "base/model.safetensors").stat().st_size
    for name in ("sft", "rm", "ppo"):
        folder = pipeline / "runs" / name
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) < size
        for path in files:
            if path.suffix == ".safetensors":
                tensors = load_file(path)
                assert sum(t.numel() * t.element_size() for t in tensors.values()) < size
                names = {k.removeprefix("base_model.model.") for k in tensors}
                assert names.isdisjoint(held), path
        for part in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "minirlhf.json"):
            assert (folder / "final" / part).exists()
        said = json.loads((folder / "final/adapter_config.json").read_text())
        assert (said["r"], said["base_model_name_or_path"]) == (8, str((pipeline / "base").resolve()))
        assert said["task_type"] == ("SEQ_CLS" if name == "rm" else "CAUSAL_LM")
    assert (pipeline / "runs/ppo/final/value_model/adapter_model.safetensors").exists()


def test_every_stage_learns_something(pipeline):
    held = {name: load_file(pipeline / f"runs/{name}/final/adapter_model.safetensors") for name in ("sft", "rm", "ppo")}
    for key, t in held["sft"].items():
        assert t.any()
        assert not torch.equal(t, held["rm"][key])
        assert not torch.equal(t, held["ppo"][key])
    assert metrics(pipeline / "runs/sft")[-1]["val/loss"] < metrics(pipeline / "runs/sft")[0]["loss"]


def test_kl_begins_at_zero_against_the_adapter_of_sft(pipeline):
    lines = metrics(pipeline / "runs/ppo")
    assert lines[0]["objective/kl"] == 0
    assert all(line["val/first_ratio_gap"] == 0 for line in lines)
    assert lines[1]["objective/kl"] != 0


def test_the_folder_is_the_model_that_was_trained(pipeline):
    """Adapters by hand on the base give what the scripts' own loading gives."""
    model, ids = load_causal_lm(pipeline / "base"), torch.tensor([[3, 4, 5]])
    plain = model(ids)
    for name in ("sft", "ppo"):
        load_adapter(model, pipeline / f"runs/{name}/final", name)
        with use_adapter(model, name):
            assert (model(ids) - plain).abs().max() > 1e-3


@slow  # by default tests/test_kill.py kills PPO with adapters
@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_a_killed_run_resumes_bit_for_bit(pipeline, name, tmp_path):
    argv_ = argv(name, "--run.save_every", "1", "--run.dir", tmp_path / "cut")
    killed(name, *argv_, cwd=pipeline)
    script(name, *argv_, "--run.resume", "true", cwd=pipeline)
    assert digests(tmp_path / "cut/final") == digests(pipeline / f"runs/{name}/final")
    assert metrics(tmp_path / "cut") == metrics(pipeline / f"runs/{name}")


@slow
def test_full_sft_then_adapters(tmp_path):
    """Every weight in SFT, adapters on its folder afterwards; then PPO goes on from PPO."""
    script("sft", *TINY["sft"], cwd=tmp_path)
    script("rm", *TINY["rm"], "--lora.r", "4", cwd=tmp_path)
    script("ppo", *TINY["ppo"], "--lora.r", "2", "--lora.targets", "c_attn", cwd=tmp_path)
    assert metrics(tmp_path / "runs/ppo")[0]["objective/kl"] == 0
    again = ["--model.path", "runs/ppo/final", "--run.dir", "again"]
    script("ppo", *TINY["ppo"], *again, "--ppo.critic", "shared", cwd=tmp_path)  # lora.r left out: the folder says it
    assert metrics(tmp_path / "again")[0]["objective/kl"] == 0
    said = json.loads((tmp_path / "again/final/adapter_config.json").read_text())
    assert (said["r"], said["target_modules"]) == (2, ["c_attn"])
    script("ppo", *TINY["ppo"], "--run.dir", "full", "--ppo.critic", "shared", cwd=tmp_path)  # a reward adapter alone
    assert (tmp_path / "full/final/model.safetensors").exists()


def test_chat_and_score_open_adapter_folders(pipeline):
    answer = tool(pipeline, "minirlhf.chat", "runs/sft/final", "runs/ppo/final", text="the food\nquit\n")
    assert answer.strip()
    (pipeline / "answers.jsonl").write_text('{"prompt": "the food", "response": "was good"}\n')
    line = json.loads(tool(pipeline, "minirlhf.score", "runs/rm/final", "answers.jsonl").splitlines()[0])
    assert isinstance(line["score"], float)


def test_mistakes_end_in_one_line_and_their_code(pipeline, tmp_path):
    here = ["--run.dir", tmp_path / "x"]
    assert "base" in script("sft", "--lora.r", "8", *here, cwd=pipeline, code=2)
    assert "with r 8" in script("ppo", *TINY["ppo"], "--lora.r", "4", *here, cwd=pipeline, code=2)
    names = ["--model.path", "base", "--lora.r", "8", "--lora.targets", "c_attn", "--data.size", "8"]
    assert "'c_attn' matches no module" in script("sft", *names, *here, cwd=pipeline, code=2)
    assert "ppo.critic" in script("ppo", *TINY["ppo"], "--model.path", "base", "--ppo.critic", "lora", *here,
                                  cwd=pipeline, code=2)  # fmt: skip
    assert not (tmp_path / "x/metrics.jsonl").exists()


def table(text):
    """role → its numbers."""
    rows = {line[:20].strip(): line[20:].split("(")[0].split() for line in text.splitlines()[1:]}
    return {role: [int(x.replace(",", "")) for x in row] for role, row in rows.items()}


def test_dry_run_says_what_a_run_takes_and_writes_nothing(pipeline, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in pipeline.rglob("*")}

    def tensor_bytes(path):
        return sum(t.numel() * t.element_size() for t in load_file(pipeline / path).values())

    base_, adapter = tensor_bytes("base/model.safetensors"), tensor_bytes("runs/sft/final/adapter_model.safetensors")
    scored = tensor_bytes("runs/rm/final/adapter_model.safetensors")  # with its head
    count = 4 * len(load_file(pipeline / "runs/sft/final/adapter_model.safetensors"))
    for name in ("sft", "rm", "ppo"):
        found = table(script(name, *argv(name, "--run.dry_run", "true", "--run.dir", tmp_path / "x"), cwd=pipeline))
        if name == "sft":
            assert found["model"] == [base_ + adapter, adapter, 2 * adapter + count]
    head = scored - adapter
    assert found["policy"] == [base_ + adapter, adapter, 2 * adapter + count]
    assert found["reference"] == [adapter, 0, 0]
    assert found["value model"] == [scored + head, scored, 2 * scored + count + 4]
    assert found["reward model"] == [scored + head, 0, 0]
    assert found["total"] == [sum(found[role][i] for role in ("policy", "reference", "value model", "reward model"))
                              for i in range(3)]  # fmt: skip
    kept = 2 * 2 * 16 * 2 * 32 * 4  # bytes of a token: keys and values, layers, answers, heads, width, fp32
    assert found["rollout cache"][0] % kept == 0
    assert found["all of these"][0] == sum(found["total"]) + found["rollout cache"][0] + found["largest activation"][0]
    assert {path: path.stat().st_mtime_ns for path in pipeline.rglob("*")} == before
    assert not (tmp_path / "x").exists()
    assert "no such folder" in script("rm", "--run.dry_run", "true", cwd=tmp_path, code=4)
    assert table(script("sft", "--run.dry_run", "true", cwd=tmp_path))["model"][1] > 0
    assert not list(tmp_path.iterdir())
