"""Folders that no stage can serve: each script says so in one line and ends with exit code 4, before it writes."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minirlhf import review_world, stage
from minirlhf.adapt import reward_model, sft_model
from minirlhf.config import LoRASection, ModelSection, PPOConfig, RMConfig, SFTConfig
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, read_config, save_pretrained
from minirlhf.rng import generator
from minirlhf.run import run_script
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CONFIGS = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}
WORDS, PLAIN = Tokenizer.from_words(review_world.words("en")), get_template("plain")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """base, and on it sft and rm as adapters; rm_full by itself."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    model = CausalLM(ModelConfig(family="llama", vocab_size=WORDS.vocab_size, d_model=16, n_layer=1, n_head=2),
                     rng=generator(0, "weights"))  # fmt: skip
    save_pretrained(model, "base", tokenizer=WORDS)
    on = {"model": ModelSection(path="base"), "lora": LoRASection(r=2)}
    stage.save(Path("sft"), stage.Loaded(sft_model(load_causal_lm("base"), SFTConfig(**on)), WORDS, PLAIN))
    stage.save(Path("rm"), stage.Loaded(reward_model(load_causal_lm("base"), RMConfig(**on)), WORDS, PLAIN))
    stage.save(Path("rm_full"), stage.Loaded(reward_model(load_causal_lm("base"), RMConfig()), WORDS, PLAIN))
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def main_of(name):
    spec = importlib.util.spec_from_file_location(f"train_{name}", ROOT / f"train_{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def refused(capsys, name, **paths):
    argv = [x for key, path in paths.items() for x in (f"--{key}.path", path)]
    code = run_script(main_of(name), CONFIGS[name], name, [*argv, "--run.dir", "out", "--data.size", "8"])
    said = capsys.readouterr().err
    assert code == 4, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert not any(path.suffix == ".jsonl" or path.name == "final" for path in Path("out").rglob("*"))
    return lines[0]


def edit(path, **changes):
    file = Path(path)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def widened(tokenizer):
    """The same words, and one token more than the embedding has rows."""
    data = json.loads((tokenizer / "tokenizer.json").read_text())
    data["model"]["vocab"]["surplus"] = len(data["model"]["vocab"])
    (tokenizer / "tokenizer.json").write_text(json.dumps(data))


SPOILED = {  # what is done to a full folder, and what the line says
    "unknown family": (lambda f: edit(f / "config.json", model_type="mamba"), "mamba"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "quantization_config"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "tokens": (widened, "tokenizer.json"),
    "a template that is no name": (lambda f: (f / "minirlhf.json").write_text('{"template": 5}'), "minirlhf.json"),
    "words of ours that are no table": (lambda f: (f / "minirlhf.json").write_text("[]"), "minirlhf.json"),
}
OF_ITS_OWN = ("tokens", "template", "words")  # what an adapter folder does not take from its base


@pytest.mark.parametrize("what", SPOILED)
def test_a_model_folder(here, capsys, what):
    spoil, word = SPOILED[what]
    spoil(here / "base")
    for name in ("sft", "rm", "ppo"):
        assert word in refused(capsys, name, model="base")
        if not any(word in what for word in OF_ITS_OWN):
            assert word in refused(capsys, name, model="sft")
    spoil(here / "rm_full")
    save_pretrained(load_causal_lm_again(), "good", tokenizer=WORDS)
    assert word in refused(capsys, "ppo", model="good", reward="rm_full")


def load_causal_lm_again():
    config = ModelConfig(family="llama", vocab_size=WORDS.vocab_size, d_model=16, n_layer=1, n_head=2)
    return CausalLM(config, rng=generator(0, "weights"))


ADAPTERS = {
    "DoRA": (lambda f: edit(f / "adapter_config.json", use_dora=True), "use_dora"),
    "pickled": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickle"),
    "another method": (lambda f: edit(f / "adapter_config.json", peft_type="IA3"), "IA3"),
    "no base": (lambda f: edit(f / "adapter_config.json", base_model_name_or_path="gone"), "base_model_name_or_path"),
    "tokens": (widened, "tokenizer.json"),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_folder(here, capsys, what):
    spoil, word = ADAPTERS[what]
    spoil(here / "sft")
    for name in ("sft", "rm", "ppo"):
        assert word in refused(capsys, name, model="sft")
    spoil(here / "rm")
    assert word in refused(capsys, "ppo", model="base", reward="rm")


def test_a_missing_head(here, capsys):
    assert "score" in refused(capsys, "ppo", model="base", reward="base")
    assert "score" in refused(capsys, "ppo", model="base", reward="sft")
    tensors = load_file("rm/adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "score" not in k}, "rm/adapter_model.safetensors")
    assert "score" in refused(capsys, "ppo", model="base", reward="rm")


def test_bloom_560m_as_published(tmp_path):
    """Its config.json has the old spellings; the parameters are counted without memory (24 layers, 559,214,592)."""
    fields = {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880,
              "hidden_dropout": 0.0, "attention_dropout": 0.0, "layer_norm_epsilon": 1e-5, "bos_token_id": 1,
              "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.02, "seq_length": 2048,
              "apply_residual_connection_post_layernorm": False, "masked_softmax_fusion": True, "pretraining_tp": 1,
              "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "use_cache": True, "unk_token_id": 0,
              "architectures": ["BloomForCausalLM"], "n_inner": None, "offset_alibi": 100, "skip_bias_add": True,
              "skip_bias_add_qkv": False, "slow_but_exact": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        model = CausalLM(read_config(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == 559_214_592
