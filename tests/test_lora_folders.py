"""PEFT folders: what is written, that it is read back in every bit, and that nothing else is read."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import assert_close, exact

from minirlhf.errors import CheckpointError
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.lora import LoRAConfig, adapter_parameters, adapters, add_adapter, load_adapter, save_adapter, use_adapter
from minirlhf.lora_config import read_adapter
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, save_pretrained
from minirlhf.rng import generator

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
Q, DENSE = "base_model.model.model.layers.0.self_attn.q_proj.", "base_model.model.transformer.h.0.mlp.c_proj."


def make(kind=CausalLM, family="gpt2", seed=0):
    sizes = {"vocab_size": 11, "n_layer": 1, "n_head": 2, "d_model": 8, "d_inner": 16, "max_seq_len": 16}
    return kind(ModelConfig(family=family, **sizes), rng=generator(seed, "weights")).eval()


def stirred(model, config, name="a"):
    add_adapter(model, name, config)
    rng = generator(3, "stir")
    with torch.no_grad():
        for p in adapter_parameters(model, name).values():
            p.normal_(generator=rng)
    return model


@pytest.fixture
def folder(tmp_path):
    """A good adapter of a gpt2: r 2 on mlp.c_proj."""
    save_adapter(
        stirred(make(), LoRAConfig(r=2, alpha=4, targets=("mlp.c_proj",))), "a", tmp_path / "good", base="here"
    )
    return tmp_path / "good"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---- written and read -----------------------------------------------------------------------------------------------


def test_files_of_a_language_model(folder):
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "here",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": ["mlp.c_proj"],
        "modules_to_save": None,
        "fan_in_fan_out": True,
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
    assert type(fields["lora_alpha"]) is int
    shapes = {key: tuple(t.shape) for key, t in load_file(folder / "adapter_model.safetensors").items()}
    assert shapes == {DENSE + "lora_A.weight": (2, 16), DENSE + "lora_B.weight": (8, 2)}


def test_files_of_a_reward_model(tmp_path):
    model = stirred(make(RewardModel, "llama"), LoRAConfig(r=2, alpha=0.5, targets=r".*q_proj", rslora=True))
    save_adapter(model, "a", tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_CLS"
    assert fields["modules_to_save"] == ["classifier", "score"]
    assert (fields["fan_in_fan_out"], fields["use_rslora"], fields["lora_alpha"]) == (False, True, 0.5)
    assert (fields["target_modules"], fields["base_model_name_or_path"]) == (".*q_proj", None)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {Q + "lora_A.weight", Q + "lora_B.weight", "base_model.model.score.weight"}
    assert_close(tensors["base_model.model.score.weight"], adapter_parameters(model, "a")[
        "adapters.a.layers.score.module.weight"].detach(), exact)  # fmt: skip


@pytest.mark.parametrize("kind", [CausalLM, RewardModel, ValueModel])
@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_round_trip(kind, family, tmp_path):
    config = LoRAConfig(r=3, alpha=2.5, dropout=0.25, rslora=True)
    model = stirred(make(kind, family), config)
    with use_adapter(model, "a"):
        expected = model(IDS)
    save_adapter(model, "a", tmp_path / "x", base="the/base")
    other = make(kind, family)
    base = other(IDS)
    load_adapter(other, tmp_path / "x", "b")
    assert torch.equal(other(IDS), base)  # loading activates nothing
    with use_adapter(other, "b"):
        assert torch.equal(other(IDS), expected)
    assert other.adapters["b"].config == config
    assert {key for key, p in other.named_parameters() if p.requires_grad} == set(adapter_parameters(other, "b"))
    save_adapter(other, "b", tmp_path / "y")  # the base's name comes along
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    assert read_adapter(tmp_path / "y") == (config, "CAUSAL_LM" if kind is CausalLM else "SEQ_CLS", "the/base",
                                            kind is not CausalLM)  # fmt: skip


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
@pytest.mark.parametrize("targets", [lambda head: ("query_key_value", head), lambda head: f".*(value|{head})"])
def test_both_names_of_the_head_of_gpt_neox(head, targets, tmp_path):
    """transformers 4 calls the module `embed_out`, and 5 `lm_head`, which is written."""
    model = stirred(make(family="gpt_neox"), LoRAConfig(r=2, alpha=4, targets=targets(head)))
    with use_adapter(model, "a"):
        expected = model(IDS)
    save_adapter(model, "a", tmp_path)
    written, file = LoRAConfig(r=2, alpha=4, targets=targets("lm_head")), tmp_path / "adapter_model.safetensors"
    assert read_adapter(tmp_path).config == written
    tensors = load_file(file)
    assert "base_model.model.lm_head.lora_A.weight" in tensors
    theirs = {name.replace("lm_head", head): tensor for name, tensor in tensors.items()}
    save_file(theirs, file)
    edit(tmp_path, target_modules=targets(head))
    again = make(family="gpt_neox")
    load_adapter(again, tmp_path, "b")
    with use_adapter(again, "b"):
        assert torch.equal(again(IDS), expected)
    assert again.adapters["b"].config == written
    both = theirs | {name.replace("lm_head", "embed_out"): tensor for name, tensor in tensors.items()} | tensors
    save_file({name: tensor.clone() for name, tensor in both.items()}, file)
    refused(tmp_path, "lm_head.lora_A.weight' belongs to nothing", make(family="gpt_neox"))


def test_the_head_of_the_base_beside_its_adapter(tmp_path):
    """PEFT writes it where nobody says otherwise; it must be the one there is."""
    model = CausalLM(ModelConfig(family="llama", d_model=8, n_layer=1, n_head=2), rng=generator(0, "weights"))
    add_adapter(model, "a", LoRAConfig(r=2, alpha=2, targets=("lm_head",)))
    save_adapter(model, "a", tmp_path)
    file, below = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    save_file(load_file(file) | {below: model.head.weight.detach().bfloat16().float()}, file)
    with pytest.raises(CheckpointError, match="differs from the base"):
        load_adapter(model, tmp_path, "b")
    save_file(load_file(file) | {below: model.head.weight.detach().clone()}, file)
    load_adapter(model, tmp_path, "b")
    save_file(load_file(file) | {below: torch.ones(3, 8)}, file)
    with pytest.raises(CheckpointError, match="base_layer"):
        load_adapter(model, tmp_path, "c")


def test_the_base_is_saved_without_its_adapters(tmp_path):
    model = make()
    base = model(IDS)
    stirred(model, LoRAConfig(r=2, alpha=4))
    save_pretrained(model, tmp_path)
    assert torch.equal(load_causal_lm(tmp_path)(IDS), base)


def test_language_model_adapter_on_a_value_model(folder):
    value = make(ValueModel)
    load_adapter(value, folder, "a")
    head = adapter_parameters(value, "a")["adapters.a.layers.score.module.weight"]
    assert torch.equal(head, value.score.weight)
    assert head is not value.score.weight
    assert head.requires_grad


def test_reduced_precision_is_read_into_fp32(folder):
    edit_tensors(folder, lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}))
    stored = load_file(folder / "adapter_model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = make().to(dtype)
        load_adapter(model, folder, "a")
        A, B = adapter_parameters(model, "a").values()
        assert A.dtype == B.dtype == torch.float32
        assert_close(A, stored[DENSE + "lora_A.weight"], exact)
        assert_close(B, stored[DENSE + "lora_B.weight"], exact)


def test_settings_that_change_nothing(folder):
    edit(
        folder, peft_version="0.21.2", inference_mode=False, auto_mapping={"base_model_class": "X"}, revision="main",
        megatron_core="megatron.core", qalora_group_size=16, layers_to_transform=None, loftq_config={}, eva_config=None,
        use_qalora=False, task_type=None, fan_in_fan_out=False, init_lora_weights="gaussian", something_new=None,
    )  # fmt: skip
    load_adapter(make(), folder, "a")


def test_defaults_of_old_files(folder):
    edit(folder, **dict.fromkeys(("lora_alpha", "lora_dropout", "use_rslora", "bias", "fan_in_fan_out"), ...))
    model = make()
    load_adapter(model, folder, "a")
    assert model.adapters["a"].config == LoRAConfig(r=2, alpha=8, targets=("mlp.c_proj",))  # PEFT's default alpha


# ---- refused --------------------------------------------------------------------------------------------------------


def refused(folder, message, model=None):
    model = model or make()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(model, folder, "a")
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    assert len(text) < 500
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "'use_dora' True is not supported"),
        ({"rank_pattern": {"c_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"c_proj": 4}}, "alpha_pattern"),
        ({"layers_to_transform": 0}, "'layers_to_transform' 0"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"exclude_modules": ["c_fc"]}, "exclude_modules"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"something_new": 1}, "'something_new' 1 is not supported"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": ...}, "peft_type"),
        ({"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS'"),
        ({"task_type": "SEQ_CLS"}, "score head"),
        ({"modules_to_save": ["score"]}, "score head"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": "score"}, "modules_to_save"),
        ({"target_modules": None}, "target_modules must be"),
        ({"target_modules": []}, "lora.targets must name"),
        ({"target_modules": [1]}, "lora.targets must name"),
        ({"target_modules": ["q_proj"]}, "'q_proj' matches no module of this model; nearest: .*c_proj"),
        ({"target_modules": "("}, "regular expression"),
        ({"target_modules": ["c_proj"]}, r"attn.c_proj.lora_A.weight' is missing"),
        ({"target_modules": ["c_fc"]}, "is missing"),
        ({"r": 3}, r"is \(2, 16\); model and r ask for \(3, 16\)"),
        ({"r": 10**12}, "lora.r"),
        ({"r": "2"}, "lora.r"),
        ({"r": -1}, "lora.r"),
        ({"lora_alpha": "8"}, "lora.alpha"),
        ({"lora_dropout": 1.5}, "lora.dropout"),
        ({"use_rslora": "yes"}, "lora.rslora"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
        ({"fan_in_fan_out": "x"}, "fan_in_fan_out"),
        ({"use_dora": "a\nb"}, "use_dora"),
        ({"a\nb": 1}, "not supported"),
        ({"bias": "a\nb"}, "bias"),
        ({"modules_to_save": "a\nb"}, "modules_to_save"),
        ({"target_modules": "a\nb("}, "regular expression"),
        ({"target_modules": ["a\nb"]}, "matches no module"),
        ({"lora_dropout": "a\nb"}, "lora.dropout"),
    ],
)
def test_config_refused(changes, message, folder):
    edit(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DENSE + "lora_B.weight"), "lora_B.weight' is missing"),
        (lambda t: t.update({DENSE + "lora_magnitude_vector": torch.ones(8)}), "magnitude_vector' belongs to nothing"),
        (lambda t: t.update({"base_model.model.transformer.wte.weight": torch.ones(11, 8)}), "wte.weight' belongs to"),
        (lambda t: t.update({DENSE + "lora_A.weight": torch.ones(16, 2)}), r"is \(16, 2\)"),
        (lambda t: t.update({DENSE + "lora_A.weight": torch.ones(2, 0)}), r"is \(2, 0\)"),
        (lambda t: t.update({DENSE + "lora_A.weight": torch.ones(2, 16, dtype=torch.int64)}), "I64, not floating"),
        (lambda t: t[DENSE + "lora_A.weight"].fill_(float("nan")), "NaN"),
        (lambda t: t[DENSE + "lora_B.weight"].fill_(float("inf")), "infinity"),
    ],
)
def test_tensors_refused(change, message, folder):
    edit_tensors(folder, change)
    refused(folder, message)


def repeated_name(path):
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + n].decode().rstrip()
    key = json.dumps(DENSE + "lora_B.weight")
    twice = (header[:-1] + f",{key}:" + json.dumps(json.loads(header)[DENSE + "lora_B.weight"]) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(twice)) + twice + data[8 + n :])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("adapter_config.json", lambda p: p.unlink(), "cannot be read"),
        ("adapter_config.json", lambda p: p.write_text("{"), "no valid JSON"),
        ("adapter_config.json", lambda p: p.write_text("[]"), "must be a JSON object"),
        ("adapter_config.json", lambda p: p.write_bytes(b"\xff"), "no valid JSON"),
        ("adapter_config.json", lambda p: p.write_text(p.read_text().replace('"r"', '"r": 2, "r"')), "'r' twice"),
        ("adapter_config.json", lambda p: p.write_text('{"r": ' + "[" * 10**5 + "]" * 10**5 + "}"), "no valid JSON"),
        ("adapter_config.json", lambda p: (p.unlink(), os.mkfifo(p)), "no regular file"),
        ("adapter_model.safetensors", lambda p: p.unlink(), "cannot be read"),
        ("adapter_model.safetensors", lambda p: p.rename(p.with_name("adapter_model.bin")), "bin: a pickle"),
        ("adapter_model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1]), "adapter_model.safetensors"),
        ("adapter_model.safetensors", lambda p: p.write_bytes(b""), "no safetensors file"),
        ("adapter_model.safetensors", repeated_name, "twice"),
    ],
)  # fmt: skip
def test_files_refused(name, spoil, message, folder):
    spoil(folder / name)
    refused(folder, message)


def test_reward_adapter_without_its_head(tmp_path):
    save_adapter(stirred(make(RewardModel), LoRAConfig(r=2, alpha=4)), "a", tmp_path)
    refused(tmp_path, "score head", make(CausalLM))
    edit_tensors(tmp_path, lambda t: t.pop("base_model.model.score.weight"))
    refused(tmp_path, "'base_model.model.score.weight' is missing", make(RewardModel))


def test_two_labels(tmp_path):
    save_adapter(stirred(make(RewardModel), LoRAConfig(r=2, alpha=4)), "a", tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 8)}))
    refused(tmp_path, r"score.weight' is \(2, 8\)", make(RewardModel))


def test_another_family(folder):
    refused(folder, "'mlp.c_proj' matches no module", make(family="llama"))


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    model = stirred(make(), LoRAConfig(r=2, alpha=4))
    with pytest.raises(CheckpointError, match="file: the adapter cannot be written"):
        save_adapter(model, "a", tmp_path / "file")
