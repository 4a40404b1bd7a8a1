"""Every family against transformers: tiny random models in odd shapes, loaded here and saved back.

Logits are compared at real tokens of left-padded batches; weights are drawn wide enough that logits spread over several
units and every bias and norm differs from its initial value, so that no part may be missing.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.heads import RewardModel
from minirlhf.model import CausalLM
from minirlhf.pretrained import load_causal_lm, load_reward_model, read_config, save_pretrained

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LIMIT = 2e-5  # largest difference of logits and scores in fp32
SAME = 1e-6  # of transformers with itself, on the same weights at other addresses
V, PAD = 67, 0
LLAMA = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 50}
OPT = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 20}
NEOX = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
CASES = {  # name: (model_type, settings)
    "gpt2": ("gpt2", {"vocab_size": V, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 40}),
    "gpt2-inner": (
        "gpt2",
        {"vocab_size": V, "n_embd": 21, "n_layer": 3, "n_head": 1, "n_inner": 10, "activation_function": "relu"}
        | {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "bloom": ("bloom", {"vocab_size": V, "hidden_size": 24, "n_layer": 2, "n_head": 3}),
    "bloom-12-heads": ("bloom", {"vocab_size": V, "hidden_size": 24, "n_layer": 1, "n_head": 12}),
    "opt": ("opt", OPT),
    "opt-no-bias": ("opt", OPT | {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "llama": ("llama", LLAMA),
    "llama-one-kv-head": ("llama", LLAMA | {"num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 1e-3}),
    "llama-bias-tied": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-linear": ("llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 77.0}}),
    "llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 3}),
    "mistral-full": ("mistral", LLAMA | {"sliding_window": None, "hidden_act": "gelu_pytorch_tanh"}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-windows": (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", LLAMA),
    "qwen3-windows": (
        "qwen3",
        LLAMA
        | {"head_dim": 6, "attention_bias": True, "use_sliding_window": True, "sliding_window": 2}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt_neox": ("gpt_neox", NEOX),  # 3 of 12 dimensions rotate, rounded up to 4
    "gpt_neox-serial": (
        "gpt_neox",
        NEOX
        | {
            "use_parallel_residual": False,
            "hidden_act": "gelu_pytorch_tanh",
            "attention_bias": False,
            "num_attention_heads": 3,
        }
        | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5, "rope_theta": 99.0}},
    ),
}


def make(name, auto=transformers.AutoModelForCausalLM, **extra):
    """A random model of transformers; all of its numbers matter to the logits."""
    kind, settings = CASES[name]
    defaults = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    config = transformers.AutoConfig.for_model(kind, **defaults, **settings, **extra)
    rng = torch.Generator().manual_seed(len(name))
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.3 if p.ndim > 1 else 0.2) + (p if p.ndim < 2 else 0))
    return model


def batch(lengths=(1, 4, 9, 6), *, left=True, seed=0):
    """Ids without PAD inside, mask, and padding on one side."""
    rng, T = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(1, V, (len(lengths), T), generator=rng)
    at = torch.arange(T)
    n = torch.tensor(lengths)[:, None]
    mask = at >= T - n if left else at < n
    return ids.where(mask, PAD), mask


def theirs(model, ids, mask):
    extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if model.config.model_type == "gpt2" else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask.long(), **extra).logits


def save(model, path):
    model.save_pretrained(path)
    return path


def difference(a, b, mask):
    assert a.shape == b.shape
    return (a - b)[mask].abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_logits(name, tmp_path):
    oracle = make(name)
    ours = load_causal_lm(save(oracle, tmp_path))
    ids, mask = batch()
    with torch.no_grad():
        mine = ours(ids, mask)
    expected = theirs(oracle, ids, mask)
    assert expected[mask].std() > 0.5
    assert difference(mine, expected, mask) <= LIMIT


@pytest.mark.parametrize("name", CASES)
def test_saved_folder_is_the_same_for_transformers(name, tmp_path):
    oracle = make(name)
    save_pretrained(load_causal_lm(save(oracle, tmp_path / "a")), tmp_path / "b")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids, mask = batch()
    assert difference(theirs(again, ids, mask), theirs(oracle, ids, mask), mask) <= SAME
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    theirs_config, ours_config = oracle.config.to_dict(), again.config.to_dict()
    differing = {k for k in theirs_config if theirs_config[k] != ours_config.get(k)}
    assert differing <= {"_name_or_path", "architectures", "max_window_layers", "n_inner", "dtype"}, {
        k: (theirs_config[k], ours_config.get(k)) for k in differing
    }
    assert again.config.architectures == [type(oracle).__name__]


@pytest.mark.parametrize("name", CASES)
def test_reward_models_on_any_side_and_in_any_batch(name, tmp_path):
    oracle = make(name, transformers.AutoModelForSequenceClassification, num_labels=1)
    ours = load_reward_model(save(oracle, tmp_path / "a"))
    for left in (True, False):
        ids, mask = batch(left=left)
        with torch.no_grad():
            mine = ours(ids, mask)
            alone = torch.cat([ours(ids[i : i + 1, mask[i]]) for i in range(len(ids))])
        expected = theirs(oracle, ids, mask)[:, 0]
        assert (mine - expected).abs().max() <= LIMIT
        assert (alone - expected).abs().max() <= LIMIT
    save_pretrained(ours, tmp_path / "b")
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (theirs(again, ids, mask) - theirs(oracle, ids, mask)).abs().max() <= SAME
    assert again.config.architectures == [type(oracle).__name__]
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys()


def test_new_reward_model_is_loaded_by_transformers(tmp_path):
    model = RewardModel.from_causal_lm(load_causal_lm(save(make("bloom"), tmp_path / "a"))).eval()
    save_pretrained(model, tmp_path / "b")
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    ids, mask = batch()
    with torch.no_grad():
        assert (theirs(oracle, ids, mask)[:, 0] - model(ids, mask)).abs().max() <= LIMIT


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama", "gpt_neox"])
def test_sharded_folders(name, tmp_path):
    oracle = make(name)
    oracle.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids, mask = batch()
    with torch.no_grad():
        assert difference(load_causal_lm(tmp_path)(ids, mask), theirs(oracle, ids, mask), mask) <= LIMIT


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "llama", "gpt_neox"])
def test_trunk_names_without_their_prefix(name, tmp_path):
    """Published GPT-2 files look so; transformers writes a bare trunk under AutoModel's class."""
    oracle = make(name)
    if not oracle.config.tie_word_embeddings:
        oracle.config.tie_word_embeddings = True
        oracle.tie_weights()
    save(oracle.base_model, tmp_path)
    assert not any(
        k.startswith(("transformer.", "model.", "gpt_neox.")) for k in load_file(tmp_path / "model.safetensors")
    )
    ids, mask = batch()
    with torch.no_grad():
        assert difference(load_causal_lm(tmp_path)(ids, mask), theirs(oracle, ids, mask), mask) <= LIMIT


OLD = {  # new setting -> its spelling in older files
    "gpt2": {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    "bloom": {"hidden_size": "n_embed", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"},
    "llama": {},
    "llama3": {},
    "llama-linear": {},
    "gpt_neox-serial": {},
}


@pytest.mark.parametrize("name", OLD)
def test_old_spellings_of_the_config(name, tmp_path):
    oracle = make(name)
    file = save(oracle, tmp_path) / "config.json"
    raw = json.loads(file.read_text())
    for new, old in OLD[name].items():
        raw[old] = raw.pop(new)
    raw["torch_dtype"] = raw.pop("dtype")
    rope = raw.pop("rope_parameters", None)
    if rope:
        theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
        raw |= {"rotary_emb_base": theta, "rotary_pct": part} if part else {"rope_theta": theta}
        kind = rope.pop("rope_type")
        raw["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    file.write_text(json.dumps(raw))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = batch()
    assert difference(theirs(again, ids, mask), theirs(oracle, ids, mask), mask) <= SAME  # the spelling is theirs
    with torch.no_grad():
        assert difference(load_causal_lm(tmp_path)(ids, mask), theirs(oracle, ids, mask), mask) <= LIMIT


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_defaults_of_an_empty_config(kind, tmp_path):
    """Absent settings mean the defaults of the class: parameter counts by torch's meta device on both sides."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    config = read_config(tmp_path)
    theirs = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"):
        ours, oracle = CausalLM(config), transformers.AutoModelForCausalLM.from_config(theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in oracle.parameters())
    special = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert special == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert config.max_seq_len == getattr(theirs, "max_position_embeddings", 2048)


def test_bf16_folders(tmp_path):
    oracle = make("llama").to(torch.bfloat16)
    ours = load_causal_lm(save(oracle, tmp_path))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ids, mask = batch()
    with torch.no_grad():
        wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert difference(ours(ids, mask), theirs(wide, ids, mask), mask) <= LIMIT
    half = load_causal_lm(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_pretrained(half, tmp_path / "again")
    a, b = (load_file(p / "model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(a[k], b[k]) and b[k].dtype == torch.bfloat16 for k in a)


def test_baichuan_is_llama_with_packed_rows(tmp_path):
    """No class of transformers: W_pack is q, k and v, one block of rows after the other."""
    from safetensors.torch import save_file

    settings = CASES["llama"][1] | {"num_key_value_heads": 4}
    CASES["baichuan"] = ("llama", settings)
    oracle = make("baichuan")
    del CASES["baichuan"]
    save(oracle, tmp_path)
    tensors, raw = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    for i in range(3):
        at = f"model.layers.{i}.self_attn."
        tensors[at + "W_pack.weight"] = torch.cat([tensors.pop(f"{at}{x}_proj.weight") for x in "qkv"])
        tensors[at + "rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    keep = (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
    )
    raw = {k: raw[k] for k in (*keep, "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")}
    raw |= {"model_type": "baichuan", "hidden_act": "silu", "auto_map": {"AutoModel": "evil.py"}, "use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = load_causal_lm(tmp_path)
    ids, mask = batch()
    with torch.no_grad():
        assert difference(ours(ids, mask), theirs(oracle, ids, mask), mask) <= LIMIT
    save_pretrained(ours, tmp_path / "llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(again).__name__ == "LlamaForCausalLM"
    assert difference(theirs(again, ids, mask), theirs(oracle, ids, mask), mask) <= SAME
