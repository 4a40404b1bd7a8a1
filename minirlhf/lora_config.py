"""What an adapter is: rank, strength, targets; and PEFT's `adapter_config.json` ↔ LoRAConfig.

Not here: tensors and models (`lora.py`). What goes wrong: a setting that is read over in silence gives an adapter that
runs and is another one. Therefore every setting is served exactly, listed here as harmless, or refused by name.
"""

import difflib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.errors import CheckpointError, UsageError
from minirlhf.safefile import read_json, shown

FILE = "adapter_config.json"
MAX_RANK = 2**16
LARGEST = 1e30  # number; fp32 holds it
ALL = "all-linear"
SCALARS = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora")
PLACES = ("target_modules", "modules_to_save", "bias", "fan_in_fan_out", "init_lora_weights")
HARMLESS = ("inference_mode", "peft_version", "auto_mapping", "revision", "megatron_core", "qalora_group_size")
KNOWN = frozenset(SCALARS + PLACES + HARMLESS)


@dataclass(frozen=True)
class LoRAConfig:
    """Rank, strength and place of an adapter."""

    r: int  # rank
    alpha: float  # the update is scaled by alpha / r
    dropout: float = 0.0  # on the input of A, in training mode
    targets: tuple[str, ...] | str = ALL  # Hugging Face names; a str is one regular expression
    rslora: bool = False  # scale by alpha / √r

    def __post_init__(self) -> None:
        if type(self.r) is not int or not 1 <= self.r <= MAX_RANK:
            raise UsageError(f"lora.r must be a whole number from 1 to {MAX_RANK}, not {shown(self.r)}")
        if not _is_number(self.alpha):
            raise UsageError(f"lora.alpha must be a number up to {LARGEST:.0e}, not {shown(self.alpha)}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise UsageError(f"lora.dropout must be in [0, 1), not {shown(self.dropout)}")
        if type(self.rslora) is not bool:
            raise UsageError(f"lora.rslora must be true or false, not {shown(self.rslora)}")
        entries = (self.targets,) if isinstance(self.targets, str) else self.targets
        named = isinstance(entries, tuple | list) and all(isinstance(entry, str) and entry for entry in entries)
        if not named or not entries:
            raise UsageError(f"lora.targets must name modules, or be {ALL!r}, not {shown(self.targets)}")
        if any(entry.lower() == ALL for entry in entries):
            object.__setattr__(self, "targets", ALL)  # PEFT knows the word by itself only, not in a list
        elif not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(entries))

    @property
    def scale(self) -> float:
        """α/r (Hu et al. 2021, arXiv 2106.09685, section 4.1), or α/√r (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (sqrt(self.r) if self.rslora else self.r)


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -LARGEST <= x <= LARGEST


def match_targets(
    targets: tuple[str, ...] | str,
    names: Collection[str],  # Hugging Face paths of all modules with weights
    linear: Collection[str],  # of those that can have an adapter
    heads: Collection[str] = (),  # of these, those that must be named
) -> list[str]:  # the targeted ones of `linear`
    """PEFT's rules. An entry of a list matches the path that it is, or that ends in "." + entry.

    A string is a regular expression for whole paths; "all-linear" stands for every linear layer but the head.
    """
    if targets == ALL:
        return [path for path in linear if path not in heads]
    found: set[str] = set()
    for entry in (targets,) if isinstance(targets, str) else targets:
        hits = [path for path in names if _matches(entry, path, whole=isinstance(targets, str))]
        if not hits:
            known = sorted({path.rpartition(".")[2] for path in linear})
            near = difflib.get_close_matches(entry.rpartition(".")[2], known) or known
            raise UsageError(
                f"lora.targets: {shown(entry)} matches no module of this model; nearest: {', '.join(near)}"
            )
        for path in hits:
            if path not in linear:
                raise UsageError(f"lora.targets: {shown(entry)} matches {path}, which can have no low-rank adapter")
        found.update(hits)
    return [path for path in linear if path in found]


def _matches(entry: str, path: str, *, whole: bool) -> bool:
    if not whole:
        return path == entry or path.endswith("." + entry)
    try:
        return re.fullmatch(entry, path) is not None
    except (re.error, RecursionError, OverflowError) as e:
        raise UsageError(f"lora.targets: {shown(entry)} is no regular expression ({e})") from e


class AdapterFolder(NamedTuple):
    """What `adapter_config.json` says."""

    config: LoRAConfig
    task: str | None  # "CAUSAL_LM" | "SEQ_CLS"
    base: str | None  # folder or name of the base model
    has_score: bool  # a score head is saved with it


def read_adapter(path: str | Path) -> AdapterFolder:
    """The config of a PEFT folder; CheckpointError where a setting cannot be served exactly."""
    file = Path(path) / FILE
    raw = read_json(file)

    def check(right: bool, what: str) -> None:
        if not right:
            raise CheckpointError(f"{file}: {what}")

    for key, value in raw.items():
        empty = value is None or value is False or value in ("", [], {})
        check(key in KNOWN or empty, f"{shown(key)} {shown(value)} is not supported; only plain LoRA is")
    for key, default, right in (
        ("peft_type", None, ("LORA",)),
        ("task_type", None, (None, "CAUSAL_LM", "SEQ_CLS")),
        ("bias", "none", ("none",)),
        ("fan_in_fan_out", False, (True, False)),  # how the base's file is written; A and B are the same either way
        ("init_lora_weights", True, (None, True, False, "gaussian")),  # some of the others change the base
    ):
        check(raw.get(key, default) in right, f"{key} {shown(raw.get(key))} is not supported, only {right}")
    whole = raw.get("modules_to_save") or []
    scored = isinstance(whole, list) and all(name in ("classifier", "score") for name in whole)
    check(scored, f"modules_to_save {shown(whole)} is not supported; only the score head is")
    base, targets = raw.get("base_model_name_or_path"), raw.get("target_modules")
    check(base is None or isinstance(base, str), "base_model_name_or_path must be text")
    check(isinstance(targets, str | list), f"target_modules must be a list or text, not {shown(targets)}")
    numbers: dict[str, Any] = {"r": raw.get("r", 8), "alpha": raw.get("lora_alpha", 8)}
    numbers |= {"dropout": raw.get("lora_dropout", 0.0), "rslora": raw.get("use_rslora", False)}
    try:
        config = LoRAConfig(**numbers, targets=targets or ())
    except UsageError as e:
        raise CheckpointError(f"{file}: {e}") from e
    return AdapterFolder(config, raw.get("task_type"), base, raw.get("task_type") == "SEQ_CLS" or bool(whole))


def write_adapter(path: Path, adapter: AdapterFolder, *, transposed: bool) -> None:
    """`adapter_config.json`; `transposed`: the base's files hold matrices as (n_in, n_out)."""
    c = adapter.config
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": adapter.task,
        "base_model_name_or_path": adapter.base,
        "r": c.r,
        "lora_alpha": int(c.alpha) if c.alpha == int(c.alpha) else c.alpha,
        "lora_dropout": c.dropout,
        "use_rslora": c.rslora,
        "target_modules": c.targets if isinstance(c.targets, str) else list(c.targets),
        "modules_to_save": ["classifier", "score"] if adapter.has_score else None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
    (path / FILE).write_text(json.dumps(fields, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
