"""`config.json` of a Hugging Face folder ↔ ModelConfig, by the tables of `families.py`.

Not here: tensors and folders (`pretrained.py`). What goes wrong: a setting that is read over in silence gives a model
that runs and is another one. Therefore every setting is served exactly, listed here as harmless, or refused by name.
"""

from dataclasses import fields
from typing import Any, get_type_hints

from minirlhf.architecture import DROPOUTS, ModelConfig
from minirlhf.errors import CheckpointError, UsageError
from minirlhf.families import FAMILIES, SPELLINGS, Family
from minirlhf.safefile import shown

MAX_SIZE = 1 << 26  # of any one dimension
MAX_LAYERS = 1 << 14  # with 6 tensors at least in each, as many as the header of a file may name
LAYER_TYPES = ("full_attention", "sliding_attention")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
NULLABLE = ("n_kv_head", "head_dim", "d_inner", "sliding_window", "attn_dropout")  # null: the derived value, or none

TYPES = get_type_hints(ModelConfig)
# Settings that change no logit: bookkeeping, initial weights, numerics, other heads, generation.
HARMLESS = """
architectures auto_map model_type transformers_version torch_dtype dtype use_cache initializer_range init_std
name_or_path minirlhf_head gradient_checkpointing use_bfloat16 torchscript output_attentions output_hidden_states
output_past return_dict pretraining_tp reorder_and_upcast_attn masked_softmax_fusion
bias_dropout_fusion attention_softmax_in_fp32 skip_bias_add skip_bias_add_qkv offset_alibi is_decoder id2label label2id
num_labels problem_type finetuning_task task_specific_params classifier_dropout classifier_bias prefix tokenizer_class
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout summary_last_dropout
predict_special_tokens unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id max_length
min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens attn_implementation
unsloth_version unsloth_fixed is_llama_config max_sequence_length activation_dropout transformers.js_config
custom_pipelines
"""
NEUTRAL = {  # settings of no family, served at this value only
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "add_cross_attention": False,
    "rope_interleaved": False,
}
WINDOWED = ("qwen2", "qwen3")
EVEN = ("llama", "gpt_neox")  # transformers 5 refuses these where n_head does not divide d_model, whatever head_dim is
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
ROPE_KEYS = {  # rope type -> its settings
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE_COPIES = ("rope_theta", "partial_rotary_factor")  # which transformers 4 wrote into gpt_neox folders beside its own
ROPE_NUMBERS = ("rope_theta", "partial_rotary_factor", *ROPE_KEYS["llama3"])


def parse_config(
    raw: dict[str, Any],
    where: object,  # the file, for messages
) -> ModelConfig:
    """The architecture that a config.json describes. Raises CheckpointError."""
    try:
        return _parse(raw)
    except UsageError as e:  # of ModelConfig and of every function below
        raise CheckpointError(f"{where}: {e}") from e


def _parse(raw: dict[str, Any]) -> ModelConfig:
    family_name = _family_name(raw)
    family = FAMILIES[family_name]
    _check_settings(raw, family_name)
    found: dict[str, Any] = {"family": family_name}
    for field, (spellings, default) in family.fields.items():
        name, value = _one_of(raw, spellings, default)
        found[field] = _typed(field, name, value)
    if "activation" in found:
        if found["activation"] not in SPELLINGS:
            raise UsageError(f"activation {shown(found['activation'])} is not supported; one of {', '.join(SPELLINGS)}")
        found["activation"] = SPELLINGS[found["activation"]]
    found |= _special_ids(raw, family, found["vocab_size"])
    if family_name in WINDOWED:
        found |= _windows(raw, found["n_layer"])
    if family.switches["position"] == "rotary":
        found |= _rope(raw, family_name, found["max_seq_len"])
    return ModelConfig(**found)


def _family_name(raw: dict[str, Any]) -> str:
    name = raw.get("model_type")
    if name == "baichuan":  # 7B is a llama with one matrix for q, k and v
        if "model_max_length" in raw or "z_loss_weight" in raw:
            raise UsageError(
                "only Baichuan-7B is supported; the 13B model (ALiBi) and Baichuan 2 (normed head) are not"
            )
        return "llama"
    if not isinstance(name, str) or name not in FAMILIES:
        raise UsageError(f"model_type {shown(name)} is not supported; one of {', '.join([*FAMILIES, 'baichuan'])}")
    return name


def _check_settings(raw: dict[str, Any], family_name: str) -> None:
    """Every setting is known, and those that only one value serves have it."""
    family = FAMILIES[family_name]
    if raw.get("quantization_config") is not None:
        raise UsageError("quantization_config: quantised weights are not supported; save the model in bf16 or fp32")
    fixed = NEUTRAL | family.fixed
    if family_name == "opt":
        fixed["word_embed_proj_dim"] = raw.get("hidden_size", family.fields["d_model"][1])
    for name, value in fixed.items():
        if raw.get(name) is not None and raw[name] != value:
            raise UsageError(f"{name} {shown(raw[name])} is not supported, only {shown(value)}")
    known = {*HARMLESS.split(), *SPECIAL, *fixed, *(s for spellings, _ in family.fields.values() for s in spellings)}
    if family.switches["position"] == "rotary":
        known |= {"rope_parameters", "rope_scaling"}
        known |= {"rotary_emb_base", "rotary_pct", *ROPE_COPIES} if family_name == "gpt_neox" else {"rope_theta"}
    known |= set(WINDOW_KEYS) if family_name in WINDOWED else set()
    for name, value in raw.items():
        if name not in known and value is not None and not name.startswith("_"):
            raise UsageError(
                f"setting {shown(name)} is unknown for {family_name}; delete it if it does not change the model"
            )


def _one_of(raw: dict[str, Any], spellings: tuple[str, ...], default: object) -> tuple[str, Any]:
    """A setting under any of its names: the name found and the value."""
    found = [(name, raw[name]) for name in spellings if name in raw]
    if not found:
        return spellings[0], default
    for name, value in found[1:]:
        if value != found[0][1]:
            raise UsageError(
                f"{found[0][0]} {shown(found[0][1])} and {name} {shown(value)} say the same thing differently"
            )
    return found[0]


def _typed(field: str, name: str, value: object) -> Any:
    """The value in the type that the field of ModelConfig has."""
    if value is None and field in NULLABLE:
        return None
    kind = TYPES[field] if TYPES[field] in (float, bool, str) else int
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise UsageError(f"{name} must be of type {kind.__name__}, not {shown(value)}")
    if kind is float:
        return _number(name, value)
    most = MAX_LAYERS if field == "n_layer" else MAX_SIZE
    if kind is int and not 1 <= value <= most:  # type: ignore[operator]
        raise UsageError(f"{name} must be between 1 and {most}, not {shown(value)}")
    return value


def _number(name: str, value: Any) -> float:
    """A finite number that is not negative."""
    if type(value) not in (int, float) or not 0 <= value < 1e30:
        raise UsageError(f"{name} must be a number from 0 up, not {shown(value)}")
    return float(value)


def _special_ids(raw: dict[str, Any], family: Family, vocab_size: int) -> dict[str, Any]:
    """Ids of BOS, EOS (one or several) and padding, inside the embedding."""
    found: dict[str, Any] = {}
    for key in SPECIAL:
        value = raw.get(key, family.special.get(key))
        if value == family.special.get(key) and type(value) is int and value >= vocab_size:
            value = None  # the class default, written beside a smaller vocabulary
        ids = value if key == "eos_token_id" and isinstance(value, list) else [] if value is None else [value]
        for i in ids:
            if type(i) is not int or not 0 <= i < vocab_size:
                raise UsageError(f"{key} {shown(i)} is no row of an embedding of {vocab_size} tokens")
        found[key] = tuple(ids) if isinstance(value, list) else value
    return found


def _windows(raw: dict[str, Any], n_layer: int) -> dict[str, Any]:
    """Sliding windows of qwen2 and qwen3: only where switched on, in the layers listed or from max_window_layers on."""
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    first, kinds = raw.get("max_window_layers", 28), raw.get("layer_types")
    if type(first) is not int:
        raise UsageError(f"max_window_layers must be of type int, not {shown(first)}")
    if kinds is None:
        layers = tuple(range(max(first, 0), n_layer)) if window is not None else ()
    else:
        if not isinstance(kinds, list) or len(kinds) != n_layer or not all(map(LAYER_TYPES.__contains__, kinds)):
            raise UsageError(
                f"layer_types must name full_attention or sliding_attention for each of the {n_layer} layers"
            )
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if not layers:
        return {}
    window = _typed("sliding_window", "sliding_window", window)
    if window is None:
        raise UsageError("layer_types has sliding_attention, but there is no sliding_window in use")
    return {"sliding_window": window, "sliding_layers": None if len(layers) == n_layer else layers}


def _rope(raw: dict[str, Any], family_name: str, max_seq_len: int) -> dict[str, Any]:
    """Rotary settings as fields of ModelConfig."""
    settings = _rope_settings(raw, family_name)
    kind = settings.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise UsageError(f"rope_type {shown(kind)} is not supported; one of {', '.join(ROPE_KEYS)}")
    usual = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25 if family_name == "gpt_neox" else 1.0}
    usual["original_max_position_embeddings"] = max_seq_len
    known = ("rope_theta", "partial_rotary_factor", *ROPE_KEYS[kind])
    for name in settings:
        if name not in known:
            raise UsageError(f"rope setting {shown(name)} is unknown for rope_type {kind}")
    found = {name: _number(f"rope setting {name}", settings.get(name, usual.get(name))) for name in known}
    for name in ROPE_COPIES if family_name == "gpt_neox" else ():
        if raw.get(name) not in (None, found[name]):
            raise UsageError(f"rope setting {name} is both {found[name]} and {shown(raw[name])}")
    theta, fraction, factor, low, high, n = (found.get(name, 1.0) for name in ROPE_NUMBERS)
    if family_name != "gpt_neox" and fraction != 1:
        raise UsageError(f"partial_rotary_factor {fraction} is not supported for {family_name}")
    if min(theta, factor, low, n) <= 0 or fraction > 1 or (kind == "llama3" and low >= high):
        raise UsageError(f"the rope settings are out of range: {shown(found)}")
    llama3 = (low, high, int(n)) if kind == "llama3" else None
    return {"rope_theta": theta, "rope_fraction": fraction, "rope_factor": factor, "rope_llama3": llama3}


def _rope_settings(raw: dict[str, Any], family_name: str) -> dict[str, Any]:
    """The new spelling (`rope_parameters`) and the old ones as one, which must agree where they repeat each other."""
    flat = {"rope_theta": raw.get("rope_theta")}
    if family_name == "gpt_neox":
        flat = {"rope_theta": raw.get("rotary_emb_base"), "partial_rotary_factor": raw.get("rotary_pct")}
    settings: dict[str, Any] = {}
    for part in (raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}, flat):
        if not isinstance(part, dict):
            raise UsageError(f"rope settings must be an object, not {shown(part)}")
        for name, value in part.items():
            name = "rope_type" if name == "type" else name
            if value is not None and settings.setdefault(name, value) != value:
                raise UsageError(f"rope setting {name} is both {shown(settings[name])} and {shown(value)}")
    return settings


def render_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json must say to describe this architecture; UsageError where the family's format cannot."""
    family = FAMILIES[config.family]
    if config.family in EVEN and config.d_model % config.n_head:
        raise UsageError(
            f"model.d_model {config.d_model} is not a multiple of model.n_head {config.n_head}, which transformers "
            f"asks of {config.family} folders, with a head_dim ({config.head_dim}) too"
        )
    raw: dict[str, Any] = {"model_type": config.family} | family.fixed
    for field, (spellings, usual) in family.fields.items():
        value = getattr(config, field)
        if field == "activation":
            value = next(theirs for theirs in (usual, *SPELLINGS) if SPELLINGS[theirs] == value)
        raw[spellings[0]] = value
    if config.family == "opt":
        raw["word_embed_proj_dim"] = config.d_model
    for key in SPECIAL:
        value = getattr(config, key)
        raw[key] = list(value) if isinstance(value, tuple) else value
    if config.family in WINDOWED:
        layers = range(config.n_layer)
        sliding = [i for i in layers if config.window(i) is not None]
        raw["use_sliding_window"], raw["sliding_window"] = bool(sliding), config.sliding_window
        raw["max_window_layers"] = min(sliding, default=config.n_layer)
        raw["layer_types"] = ["sliding_attention" if i in sliding else "full_attention" for i in layers]
    if family.switches["position"] == "rotary":
        raw |= _render_rope(config)
    again = parse_config(raw, "this model")
    for field in (f.name for f in fields(ModelConfig)):
        if getattr(again, field) != getattr(config, field) and field not in DROPOUTS:  # a run sets its own
            said, read = getattr(config, field), getattr(again, field)
            raise UsageError(f"model.{field} {said!r}: the format of {config.family} folders can only say {read!r}")
    return raw


def _render_rope(config: ModelConfig) -> dict[str, Any]:
    """Rotary settings in both spellings: transformers 5 prefers the new one, 4 and other readers know the old one."""
    scaling: dict[str, Any] = {}
    if config.rope_llama3 is not None:
        low, high, n = config.rope_llama3
        scaling = {"rope_type": "llama3", "factor": config.rope_factor, "low_freq_factor": low}
        scaling |= {"high_freq_factor": high, "original_max_position_embeddings": n}
    elif config.rope_factor != 1:
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    new = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    if config.family != "gpt_neox":
        return {"rope_parameters": new, "rope_theta": config.rope_theta, "rope_scaling": scaling or None}
    new["partial_rotary_factor"] = config.rope_fraction
    old = {"rotary_emb_base": config.rope_theta, "rotary_pct": config.rope_fraction, "rope_scaling": scaling or None}
    return {"rope_parameters": new} | old
