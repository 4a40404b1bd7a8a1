"""Checkpoints that are complete or absent: temporary folder → fsync → manifest → verify → rename → rotate.

A checkpoint is `checkpoints/step_XXXXXXXX/` with one safetensors file per group of tensors (policy, value model,
optimizer ...), `state.json` for numbers and words, and `MANIFEST.json` with size and sha256 of each file and of itself.
The folder gets its name by rename after everything in it was read back, and older ones go only after that. No pickle.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minirlhf.engine import Tensors
from minirlhf.errors import CheckpointError
from minirlhf.safefile import read_json, write_file, write_tensors

STEP = re.compile(r"(step|best)_(\d{8})")
MANIFEST = "MANIFEST.json"


def save(
    root: Path,
    step: int,
    tensors: Tensors,
    state: dict[str, Any],
    *,
    keep: int,
    merits: dict[int, float] | None = None,  # step -> how good, higher is better
) -> Path:
    """Write step's checkpoint, verify it, give it its name; then all but the `keep` newest and the best go.

    Whatever fails, the newest complete checkpoint stays; CheckpointError says why and names it.
    """
    target, temporary = root / f"step_{step:08d}", root / f".tmp_step_{step:08d}_{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".tmp_*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        for group, named in tensors.items():
            write_tensors(temporary / f"{group}.safetensors", named)
        write_file(temporary / "state.json", [_json(state)])
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(temporary.iterdir())}
        write_file(temporary / MANIFEST, [manifest(step, files)])
        fsync(temporary)
        verify(temporary, step)
        if target.exists():  # damaged, or this run would have gone on from it
            _discard(target)
        temporary.rename(target)
        fsync(root)
        _rotate(root, step, keep, merits or {})
    except OSError as e:
        newest = max(_steps(root), default=None)
        rest = "there is none yet" if newest is None else f"the newest complete one is step_{newest:08d}"
        raise CheckpointError(
            f"{target}: cannot be written ({e.strerror or e}); {rest}; make room, then --run.resume true"
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _rotate(root: Path, step: int, keep: int, merits: dict[int, float]) -> None:
    """All but the `keep` newest go, and those of a future that is being computed again; the best is renamed best_*."""
    steps = sorted(_steps(root))
    gone = [s for s in steps if s > step] + [s for s in steps if s <= step][:-keep]
    best = max([*steps, *_steps(root, "best")], key=lambda s: (merits.get(s, -math.inf), s))
    for old in gone:
        if old == best and best in merits:
            for earlier in _steps(root, "best"):
                _discard(root / f"best_{earlier:08d}")
            (root / f"step_{old:08d}").rename(root / f"best_{old:08d}")
        else:
            _discard(root / f"step_{old:08d}")


def _discard(folder: Path) -> None:
    """Delete; what carries a checkpoint's name is complete until it carries it no more."""
    nameless = folder.rename(folder.with_name(f".tmp_old_{folder.name}"))
    shutil.rmtree(nameless)


def load_newest(root: Path) -> tuple[int, Tensors, dict[str, Any]] | None:
    """The newest checkpoint that verifies, as (step, tensors, state); None where there is none.

    Each damaged one passed over is named on stderr. Raises CheckpointError when all are damaged.
    """
    damaged = False
    for step in sorted(_steps(root), reverse=True):
        folder = root / f"step_{step:08d}"
        try:
            verify(folder, step)
            groups = {p.stem: read_tensors(p) for p in sorted(folder.glob("*.safetensors"))}
            return step, groups, read_json(folder / "state.json")
        except (CheckpointError, OSError) as e:
            damaged = True
            print(f"damaged checkpoint passed over: {e}", file=sys.stderr)  # noqa: T201
    if damaged:
        raise CheckpointError(f"{root}: no checkpoint verifies; start again in another run.dir")
    return None


def manifest(step: int, files: dict[str, Any]) -> bytes:
    """MANIFEST.json: size and sha256 of every file, and the sha256 of all that, so that no byte can change unseen."""
    content = {"step": step, "files": files}
    return _json(content | {"sha256": hashlib.sha256(_json(content)).hexdigest()})


def verify(folder: Path, step: int) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and sha256, and nothing else."""
    path = folder / MANIFEST
    try:
        stored = read_json(path)
        named = {name: (entry["bytes"], entry["sha256"]) for name, entry in stored["files"].items()}
        whole = path.read_bytes() == manifest(step, stored["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path}: unreadable manifest ({type(e).__name__}); this checkpoint is damaged") from e
    if not whole:
        raise CheckpointError(f"{path}: differs from its own sha256, or from step {step}; this checkpoint is damaged")
    present = {p.name for p in folder.iterdir()} - {MANIFEST}
    if present != set(named) or "state.json" not in named:
        raise CheckpointError(f"{folder}: holds {sorted(present)}, the manifest names {sorted(named)}")
    for name, (size, digest) in named.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or sha256_file(file) != digest:
            raise CheckpointError(f"{file}: size or sha256 differs from the manifest; this checkpoint is damaged")


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file or folder to disk; an OSError names it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        os.close(fd)


def _steps(root: Path, kind: str = "step") -> list[int]:
    return [int(m[2]) for p in root.glob(f"{kind}_*") if (m := STEP.fullmatch(p.name))]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or CheckpointError."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (safe_open is no dict)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: {e}") from e
