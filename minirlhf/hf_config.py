"""Hugging Face `config.json` ↔ ModelConfig, by the tables of `families.py`."""

from pathlib import Path
from typing import Any

from minirlhf.errors import CheckpointError, UsageError
from minirlhf.families import ACTIVATIONS, FAMILIES
from minirlhf.model import ModelConfig

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def parse_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """The architecture that a config.json describes."""
    name = raw.get("model_type")
    kind = "llama" if name == "baichuan" else name
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {name!r} is not supported; one of {', '.join([*FAMILIES, 'baichuan'])}"
        )
    family = FAMILIES[kind]
    found: dict[str, Any] = {"family": kind}
    for field, (spellings, default) in family.fields.items():
        found[field] = next((raw[s] for s in spellings if raw.get(s) is not None), default)
    if "activation" in found:
        found["activation"] = ACTIVATIONS[found["activation"]]
    for key in SPECIAL:
        value = raw.get(key, family.special.get(key))
        found[key] = tuple(value) if isinstance(value, list) else value
    try:
        return ModelConfig(**found)
    except UsageError as e:
        raise CheckpointError(f"{path}: {e}") from e


def render_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json must say to describe this architecture."""
    family = FAMILIES[config.family]
    raw: dict[str, Any] = {"model_type": config.family}
    for field, (spellings, _) in family.fields.items():
        value = getattr(config, field)
        if field == "activation":
            value = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == value)
        raw[spellings[0]] = value
    for key in SPECIAL:
        value = getattr(config, key)
        raw[key] = list(value) if isinstance(value, tuple) else value
    return raw | family.fixed
