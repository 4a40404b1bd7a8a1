"""Adapters of PEFT here, adapters of ours there: the same outputs, of language models and of classifiers."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from tolerance import assert_close

from minirlhf import stage
from minirlhf.adapt import reward_model, sft_model
from minirlhf.config import LoRASection, ModelSection, RMConfig, SFTConfig
from minirlhf.lora import (
    LoRAConfig,
    adapter_parameters,
    add_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    target_modules,
    use_adapter,
)
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, load_reward_model, save_pretrained
from minirlhf.rng import generator
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

peft = pytest.importorskip("peft")
TWO_LIBRARIES = {"rtol": 1e-5, "atol": 1e-5}  # fp32, products in another order
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 0, 0]])
MASK = IDS != 0  # right padding, with 0
SMALL = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
WIDE = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WIDE |= {"max_position_embeddings": 32}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
KINDS = {
    "gpt2": ("GPT2", SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "bloom": ("Bloom", SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("Llama", WIDE | {"num_key_value_heads": 2}),
    "mistral": ("Mistral", WIDE | {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": ("Qwen2", WIDE | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", WIDE | {"num_key_value_heads": 2, "head_dim": 6}),
    "gpt_neox": ("GPTNeoX", WIDE),
    "opt": ("OPT", {k: v for k, v in WIDE.items() if k != "intermediate_size"} | OPT),
}
TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bloom": ["query_key_value", "dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["o_proj", "up_proj"],
    "qwen2": ["q_proj", "k_proj", "gate_proj"],
    "qwen3": ["q_proj", "o_proj", "gate_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "opt": ["out_proj", "fc1"],
}
TASKS = {"CAUSAL_LM": ("LMHeadModel", "ForCausalLM"), "SEQ_CLS": ("ForSequenceClassification",) * 2}
CASES = [(family, task) for family in KINDS for task in TASKS]


def base(family, task, folder):
    """A random model of transformers in a folder, and the same model read by us."""
    name, sizes = KINDS[family]
    suffix = TASKS[task][family != "gpt2"]
    torch.manual_seed(0)
    theirs = getattr(transformers, name + suffix)(getattr(transformers, name + "Config")(**sizes)).eval()
    theirs.save_pretrained(folder)
    return theirs, (load_causal_lm if task == "CAUSAL_LM" else load_reward_model)(folder)


def their_output(model):
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=MASK.long()).logits
    return logits[:, 0] if logits.shape[-1] == 1 else logits[MASK]  # what padding says is nobody's business


def our_output(model):
    with torch.no_grad():
        out = model(IDS, MASK)
    return out if out.ndim == 1 else out[MASK]


def their_adapter(model, task, targets, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type=task, **options)
        model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
                assert "lora" in name or "score" in name
    return model


@pytest.mark.parametrize(("family", "task"), CASES)
def test_theirs_here(family, task, tmp_path):
    model, ours = base(family, task, tmp_path / "base")
    before = our_output(ours)
    adapted = their_adapter(model, task, TARGETS[family])
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter", "a")
    assert torch.equal(our_output(ours), before)
    expected = their_output(adapted)
    with use_adapter(ours, "a"):
        assert_close(our_output(ours), expected, TWO_LIBRARIES)
    assert (expected - before).abs().max() > 0.01
    merge_adapter(ours, "a")
    assert_close(our_output(ours), their_output(adapted.merge_and_unload()), TWO_LIBRARIES)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_ours_there(family, task, tmp_path):
    model, ours = base(family, task, tmp_path / "base")
    add_adapter(ours, "a", LoRAConfig(r=3, alpha=5, targets=tuple(TARGETS[family])))
    rng = generator(1, "stir")
    with torch.no_grad():
        for p in adapter_parameters(ours, "a").values():
            p.normal_(std=0.2, generator=rng)
    with use_adapter(ours, "a"):
        expected = our_output(ours)
    save_adapter(ours, "a", tmp_path / "adapter", base=str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert_close(their_output(adapted), expected, TWO_LIBRARIES)
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    again = tmp_path / "again"
    adapted.save_pretrained(again)
    load_adapter(ours, again, "b")
    for a, b in zip(adapter_parameters(ours, "a").values(), adapter_parameters(ours, "b").values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("below", [False, "auto"])
@pytest.mark.parametrize("family", KINDS)
def test_the_head_both_ways(family, below, tmp_path):
    """Named `lm_head`, tied to the embedding or not, with or without the base's own: PEFT leaves the embedding alone,
    and so do we."""
    model, ours = base(family, "CAUSAL_LM", tmp_path / "base")
    adapted = their_adapter(model, "CAUSAL_LM", [*TARGETS[family], "lm_head"])
    adapted.save_pretrained(tmp_path / "theirs", save_embedding_layers=below)
    names = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert any("base_layer" in name for name in names) == bool(below)
    expected = their_output(adapted)
    load_adapter(ours, tmp_path / "theirs", "a")
    with use_adapter(ours, "a"):
        assert_close(our_output(ours), expected, TWO_LIBRARIES)
    save_adapter(ours, "a", tmp_path / "ours", base=str(tmp_path / "base"))
    again = getattr(transformers, KINDS[family][0] + TASKS["CAUSAL_LM"][family != "gpt2"])
    again = peft.PeftModel.from_pretrained(again.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    assert_close(their_output(again), expected, TWO_LIBRARIES)


@pytest.mark.parametrize("task", TASKS)
def test_base_is_found_by_name(task, tmp_path):
    """The folder alone is enough for PEFT's auto classes."""
    _, ours = base("llama", task, tmp_path / "base")
    add_adapter(ours, "a", LoRAConfig(r=3, alpha=5))
    save_adapter(ours, "a", tmp_path / "adapter", base=str(tmp_path / "base"))
    auto = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_CLS": "AutoPeftModelForSequenceClassification"}[task]
    adapted = getattr(peft, auto).from_pretrained(tmp_path / "adapter").eval()
    with use_adapter(ours, "a"):
        assert_close(their_output(adapted), our_output(ours), TWO_LIBRARIES)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_rslora(family, tmp_path):
    model, ours = base(family, "CAUSAL_LM", tmp_path / "base")
    adapted = their_adapter(model, "CAUSAL_LM", TARGETS[family], use_rslora=True)
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter", "a")
    with use_adapter(ours, "a"):
        assert_close(our_output(ours), their_output(adapted), TWO_LIBRARIES)


@pytest.mark.parametrize("targets", ["all-linear", r".*(q_proj|c_attn|query_key_value)", r".*\.1\..*(proj|dense)"])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_same_modules(family, task, targets, tmp_path):
    model, ours = base(family, task, tmp_path / "base")
    adapted = their_adapter(model, task, targets)
    theirs = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert set(target_modules(ours, targets).values()) == theirs


@pytest.mark.parametrize("task", TASKS)
def test_the_folder_of_a_stage(task, tmp_path):
    """What the scripts leave, opened by the auto classes from the folder alone, tokenizer included."""
    tokenizer = Tokenizer.train_chars(["abcdefg hij"])
    model = CausalLM(ModelConfig(family="llama", vocab_size=31, n_head=4, d_model=32, max_seq_len=32, pad_token_id=0))
    save_pretrained(model, tmp_path / "base", tokenizer=tokenizer)
    section = {"model": ModelSection(path=str(tmp_path / "base")), "lora": LoRASection(r=3)}
    make, config = (sft_model, SFTConfig) if task == "CAUSAL_LM" else (reward_model, RMConfig)
    ours = make(load_causal_lm(tmp_path / "base"), config(**section)).eval()
    rng = generator(1, "stir")
    with torch.no_grad():
        for p in adapter_parameters(ours, "trained").values():
            p.normal_(std=0.2, generator=rng)
    stage.save(tmp_path / "final", stage.Loaded(ours, tokenizer, get_template("plain")))
    auto = "AutoPeftModelForCausalLM" if task == "CAUSAL_LM" else "AutoPeftModelForSequenceClassification"
    extra = {} if task == "CAUSAL_LM" else {"num_labels": 1}
    theirs = getattr(peft, auto).from_pretrained(tmp_path / "final", **extra).eval()
    assert_close(their_output(theirs), our_output(ours), TWO_LIBRARIES)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "final")("abc").input_ids == tokenizer.encode("abc")
