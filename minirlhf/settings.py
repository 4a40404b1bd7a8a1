"""How a setting is declared, read from TOML/JSON and `--section.key value`, checked and shown; which there are says
`config.py`.

A config is a frozen dataclass of sections, which are frozen dataclasses of fields made by `key()`. Nothing is ever
written back into one.
"""

import difflib
import json
import math
import tomllib
import types
from dataclasses import field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from minirlhf.errors import UsageError

Choices = tuple[str, ...]
LARGEST = 3.4e38  # that fp32 holds
ACCEPTED: dict[type, Any] = {str: str, int: (str, int), float: (str, int, float)}  # what makes a value of a type


def key(default: Any, text: str, *, low: float | None = None, high: float | None = None, choices: Choices = ()) -> Any:
    """A setting: default, help line with its unit, inclusive range or the allowed words."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


def to_dict(config: object) -> dict[str, Any]:
    """Plain JSON values; infinity, which JSON lacks, as the word inf. Itself a valid CONFIG."""
    out: dict[str, Any] = {}
    for f in fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if is_dataclass(value):
            out[f.name] = to_dict(value)
        else:
            out[f.name] = str(value) if isinstance(value, float) and math.isinf(value) else value
    return out


def help_text(cls: type, script: str) -> str:
    """Every key with its default, range or choices, and one line."""
    lines = [f"usage: python {script} [CONFIG.toml|json] [--section.key value ...]"]
    for section in fields(cls):
        lines += ["", f"[{section.name}]  {type(section.default).__doc__}"]
        for f in fields(section.default):  # type: ignore[arg-type]
            flag = f"  --{section.name}.{f.name} {show(getattr(section.default, f.name)) or '(empty)'}"
            limits = " | ".join(filter(None, f.metadata["choices"])) or _range(f.metadata)
            lines.append(f"{flag.ljust(40)} {f.metadata['help']}" + (f" [{limits}]" if limits else ""))
    return "\n".join(lines)


def show(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _range(meta: Any) -> str:
    low, high = meta["low"], meta["high"]
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f">= {low}" if low is not None else ""


def read_file(path: Path) -> dict[str, Any]:
    """A config file as section → key → value."""
    readers = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise UsageError(f"{path}: a config is a .toml or .json file; settings are written --section.key value")
    try:
        data = readers[path.suffix](path.read_bytes().decode("utf-8-sig"))
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: not valid {path.suffix[1:].upper()}: {e}") from e
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a config is a table of sections")
    return data


def flatten(data: dict[str, Any]) -> dict[str, Any]:
    """Section → key → value as `section.key` → value."""
    flat: dict[str, Any] = {}
    for section, content in data.items():
        if not isinstance(content, dict):
            raise UsageError(f"{section}: a section with keys is expected, not {content!r}")
        flat |= {f"{section}.{name}": value for name, value in content.items()}
    return flat


def parse_flags(argv: list[str]) -> dict[str, Any]:
    """`--section.key value` and `--section.key=value` as `section.key` → string."""
    flat: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UsageError(f"{flag!r}: settings are written --section.key value; a config file comes first")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise UsageError(f"--{name} needs a value")
            value = rest.pop(0)
        if name in flat:
            raise UsageError(f"--{name} is given twice")
        flat[name] = value
    return flat


def apply(config: Any, flat: dict[str, Any]) -> Any:
    """The config with these values, each of its key's type and within its range."""
    known = {f"{s.name}.{f.name}": f for s in fields(config) for f in fields(getattr(config, s.name))}
    for name, raw in flat.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            near = near or [k for k in known if k.split(".")[1] == name.split(".")[-1]][:1]
            raise UsageError(f"{name}: no such key" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
        section, attribute = name.split(".")
        old = getattr(config, section)
        annotation = get_type_hints(type(old))[attribute]
        value = _parse(name, raw, annotation)
        _check_range(name, value, known[name].metadata)
        config = replace(config, **{section: replace(old, **{attribute: value})})
    return config


def _parse(name: str, raw: Any, annotation: Any) -> Any:
    """A value of the annotated type from a string of the command line or a value of a config file."""
    if get_origin(annotation) is tuple:
        return _parse_tuple(name, raw, get_args(annotation))
    wrong = UsageError(f"{name}: {raw!r} is not {'a' if annotation is not int else 'an'} {annotation.__name__}")
    if annotation is bool:
        if raw in ("true", "false"):
            return raw == "true"
        if not isinstance(raw, bool):
            raise UsageError(f"{name}: {raw!r} is neither true nor false")
        return raw
    if isinstance(raw, bool) or not isinstance(raw, ACCEPTED[annotation]):
        raise wrong
    try:
        value = annotation(raw)
    except (ValueError, OverflowError):
        raise wrong from None
    if isinstance(value, float) and math.isnan(value):
        raise wrong
    if isinstance(value, float) and LARGEST < abs(value) < math.inf:
        raise UsageError(f"{name}: {raw!r} is beyond fp32")
    return value


def _parse_tuple(name: str, raw: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.startswith("[") else [part for part in raw.split(",") if part]
        except ValueError:
            raw = [raw]  # a regular expression may begin with a bracket
    if not isinstance(raw, list | tuple):
        raise UsageError(f"{name}: {raw!r} is not a list")
    if types.EllipsisType not in map(type, args) and len(raw) != len(args):
        raise UsageError(f"{name}: {len(args)} values are expected, not {len(raw)}")
    return tuple(_parse(name, item, args[0]) for item in raw)


def _check_range(name: str, value: Any, meta: Any) -> None:
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), meta["choices"], n=1)
        raise UsageError(
            f"{name}: {value!r} is not one of {', '.join(filter(None, meta['choices']))}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    for item in value if isinstance(value, tuple) else (value,):
        low, high = meta["low"], meta["high"]
        if (low is not None and item < low) or (high is not None and item > high):
            raise UsageError(f"{name}: {item} is out of range ({_range(meta)})")
