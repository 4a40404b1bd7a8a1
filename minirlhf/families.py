"""What tells one model family from another, as data: switches, Hugging Face module names, fields of `config.json`.

Not here: code. `model.py` builds every family from the same blocks by these switches; `pretrained.py` renames by these
names. What goes wrong: a default that old files left out is part of the format, so `fields` carries all of them.
Sources: the model and configuration classes of transformers 5.23, compared with in tests/test_oracle_transformers.py.
"""

from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, tuple[tuple[str, ...], Any]]


@dataclass(frozen=True)
class Family:
    """One row of the table; module names are relative to the trunk, `N` stands for the layer's number."""

    lm_class: str  # config.json "architectures" of a language model
    score_class: str  # and of a reward model
    prefix: str  # what stands before trunk names in a saved folder; bare names are read too
    names: dict[str, str]  # our module -> their module
    switches: dict[str, Any]  # ModelConfig fields that the family decides, unless config.json states them
    fields: Fields  # ModelConfig field -> (spellings, the one written first; default)
    fixed: dict[str, Any] = field(default_factory=dict)  # settings served at this value only, also their default
    head: str = "lm_head"  # its name in the files of models
    peft_head: str = "lm_head"  # and the module's in transformers 5, by which PEFT's files go; `head` is that of 4
    layers: str = "layers.N"  # their name of block N
    special: dict[str, int | None] = field(default_factory=dict)  # special token ids when config.json is silent


LAYER_NORM = {"norm": "layer", "norm_eps": 1e-5, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
LLAMA_SWITCHES = {"norm": "rms", "norm_eps": 1e-6, "position": "rotary", "activation": "silu", "gated": True}
LLAMA_NAMES = {
    "embed": "embed_tokens",
    "final_norm": "norm",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NEOX_NAMES = {  # shared by bloom and gpt_neox
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def llama_fields(inner: int, kv_heads: int | None, max_len: int, vocab: int = 32000) -> Fields:
    """The spellings shared by llama, mistral, qwen2 and qwen3, with the defaults in which they differ."""
    return {
        "vocab_size": (("vocab_size",), vocab),
        "d_model": (("hidden_size",), 4096),
        "n_layer": (("num_hidden_layers",), 32),
        "n_head": (("num_attention_heads",), 32),
        "n_kv_head": (("num_key_value_heads",), kv_heads),
        "head_dim": (("head_dim",), None),
        "d_inner": (("intermediate_size",), inner),
        "max_seq_len": (("max_position_embeddings",), max_len),
        "activation": (("hidden_act",), "silu"),
        "norm_eps": (("rms_norm_eps",), 1e-6),
        "tied": (("tie_word_embeddings",), False),
        "attn_dropout": (("attention_dropout",), 0.0),
    }


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        lm_class="GPT2LMHeadModel",
        score_class="GPT2ForSequenceClassification",
        prefix="transformer.",
        layers="h.N",
        names={
            "embed": "wte",
            "pos_embed": "wpe",
            "final_norm": "ln_f",
            "norm1": "ln_1",
            "norm2": "ln_2",
            "attn.qkv": "attn.c_attn",
            "attn.out": "attn.c_proj",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        switches={**LAYER_NORM, "position": "learned", "activation": "gelu_tanh", "tied": True, "qkv": "blocks"},
        fields={
            "vocab_size": (("vocab_size",), 50257),
            "d_model": (("n_embd", "hidden_size"), 768),
            "n_layer": (("n_layer", "num_hidden_layers"), 12),
            "n_head": (("n_head", "num_attention_heads"), 12),
            "d_inner": (("n_inner",), None),
            "max_seq_len": (("n_positions", "max_position_embeddings", "n_ctx"), 1024),
            "activation": (("activation_function",), "gelu_new"),
            "norm_eps": (("layer_norm_epsilon",), 1e-5),
            "tied": (("tie_word_embeddings",), True),
            "dropout": (("resid_pdrop",), 0.1),
            "embed_dropout": (("embd_pdrop",), 0.1),
            "attn_dropout": (("attn_pdrop",), 0.1),
        },
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        special={"bos_token_id": 50256, "eos_token_id": 50256},
    ),
    "bloom": Family(
        lm_class="BloomForCausalLM",
        score_class="BloomForSequenceClassification",
        prefix="transformer.",
        layers="h.N",
        names={
            **NEOX_NAMES,
            "embed": "word_embeddings",
            "embed_norm": "word_embeddings_layernorm",
            "final_norm": "ln_f",
            "attn.qkv": "self_attention.query_key_value",
            "attn.out": "self_attention.dense",
        },
        switches={
            **LAYER_NORM,
            "position": "alibi",
            "activation": "gelu_tanh",
            "embed_norm": True,
            "tied": True,
            "qkv": "heads",
            "embed_dropout": 0.0,
        },
        fields={
            "vocab_size": (("vocab_size",), 250880),
            "d_model": (("hidden_size", "n_embed", "n_embd"), 64),
            "n_layer": (("n_layer", "num_hidden_layers"), 2),
            "n_head": (("n_head", "num_attention_heads"), 8),
            "max_seq_len": (("seq_length",), 2048),
            "norm_eps": (("layer_norm_epsilon",), 1e-5),
            "tied": (("tie_word_embeddings",), True),
            "dropout": (("hidden_dropout",), 0.0),
            "attn_dropout": (("attention_dropout",), 0.0),
        },
        fixed={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},  # the second drops biases
        special={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": Family(
        lm_class="OPTForCausalLM",
        score_class="OPTForSequenceClassification",
        prefix="model.decoder.",
        names={
            "embed": "embed_tokens",
            "pos_embed": "embed_positions",
            "final_norm": "final_layer_norm",
            "norm1": "self_attn_layer_norm",
            "norm2": "final_layer_norm",
            "attn.q": "self_attn.q_proj",
            "attn.k": "self_attn.k_proj",
            "attn.v": "self_attn.v_proj",
            "attn.out": "self_attn.out_proj",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
        },
        switches={
            **LAYER_NORM,
            "position": "learned",
            "position_offset": 2,
            "activation": "relu",
            "tied": True,
            "embed_dropout": 0.0,
        },
        fields={
            "vocab_size": (("vocab_size",), 50272),
            "d_model": (("hidden_size",), 768),
            "n_layer": (("num_hidden_layers",), 12),
            "n_head": (("num_attention_heads",), 12),
            "d_inner": (("ffn_dim",), 3072),
            "max_seq_len": (("max_position_embeddings",), 2048),
            "activation": (("activation_function",), "relu"),
            "tied": (("tie_word_embeddings",), True),
            "qkv_bias": (("enable_bias",), True),
            "out_bias": (("enable_bias",), True),
            "mlp_bias": (("enable_bias",), True),
            "dropout": (("dropout",), 0.1),
            "attn_dropout": (("attention_dropout",), 0.0),
        },
        fixed={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "layerdrop": 0.0,
        },
        special={"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
    ),
    "llama": Family(
        lm_class="LlamaForCausalLM",
        score_class="LlamaForSequenceClassification",
        prefix="model.",
        names=LLAMA_NAMES,
        switches=LLAMA_SWITCHES,
        fields={
            **llama_fields(11008, None, 2048),
            "qkv_bias": (("attention_bias",), False),
            "out_bias": (("attention_bias",), False),
            "mlp_bias": (("mlp_bias",), False),
        },
        special={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": Family(
        lm_class="MistralForCausalLM",
        score_class="MistralForSequenceClassification",
        prefix="model.",
        names=LLAMA_NAMES,
        switches=LLAMA_SWITCHES,
        fields={**llama_fields(14336, 8, 131072), "sliding_window": (("sliding_window",), 4096)},
        special={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen2": Family(
        lm_class="Qwen2ForCausalLM",
        score_class="Qwen2ForSequenceClassification",
        prefix="model.",
        names=LLAMA_NAMES,
        switches={**LLAMA_SWITCHES, "qkv_bias": True},
        fields=llama_fields(22016, 32, 32768, 151936),
        fixed={"use_mrope": False},
    ),
    "qwen3": Family(
        lm_class="Qwen3ForCausalLM",
        score_class="Qwen3ForSequenceClassification",
        prefix="model.",
        names={**LLAMA_NAMES, "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"},
        switches={**LLAMA_SWITCHES, "qk_norm": True},
        fields={
            **llama_fields(22016, 32, 32768, 151936),
            "head_dim": (("head_dim",), 128),
            "qkv_bias": (("attention_bias",), False),
            "out_bias": (("attention_bias",), False),
        },
    ),
    "gpt_neox": Family(
        lm_class="GPTNeoXForCausalLM",
        score_class="GPTNeoXForSequenceClassification",
        prefix="gpt_neox.",
        head="embed_out",
        names={
            **NEOX_NAMES,
            "embed": "embed_in",
            "final_norm": "final_layer_norm",
            "attn.qkv": "attention.query_key_value",
            "attn.out": "attention.dense",
        },
        switches={
            **LAYER_NORM,
            "position": "rotary",
            "rope_fraction": 0.25,
            "activation": "gelu",
            "parallel_residual": True,
            "qkv": "heads",
        },
        fields={
            "vocab_size": (("vocab_size",), 50432),
            "d_model": (("hidden_size",), 6144),
            "n_layer": (("num_hidden_layers",), 44),
            "n_head": (("num_attention_heads",), 64),
            "d_inner": (("intermediate_size",), 24576),
            "max_seq_len": (("max_position_embeddings",), 2048),
            "activation": (("hidden_act",), "gelu"),
            "norm_eps": (("layer_norm_eps",), 1e-5),
            "tied": (("tie_word_embeddings",), False),
            "parallel_residual": (("use_parallel_residual",), True),
            "qkv_bias": (("attention_bias",), True),
            "out_bias": (("attention_bias",), True),
            "dropout": (("hidden_dropout",), 0.0),
            "embed_dropout": (("hidden_dropout",), 0.0),
            "attn_dropout": (("attention_dropout",), 0.0),
        },
        special={"bos_token_id": 0, "eos_token_id": 2},
    ),
}
SWITCHES = {  # what a family that is silent gets
    "norm": "rms",
    "norm_eps": 1e-5,
    "position": "rotary",
    "position_offset": 0,
    "rope_fraction": 1.0,
    "activation": "silu",
    "gated": False,
    "parallel_residual": False,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "embed_norm": False,
    "tied": False,
    "qkv": "split",
}
SPELLINGS = {  # config.json spelling -> ours; writing takes the family's default if it fits, or the first that does
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
