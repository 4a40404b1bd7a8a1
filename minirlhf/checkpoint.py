"""Checkpoints that are complete or absent: temporary folder → fsync → manifest → verify → rename → rotate.

A checkpoint is `checkpoints/step_XXXXXXXX/` with one safetensors file per group of tensors (policy, value model,
optimizer ...), `state.json` for numbers and words, and `MANIFEST.json` with size and sha256 of each file. No pickle.
The folder gets its name by rename after everything in it was read back, and older ones go only after that.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minirlhf.errors import CheckpointError

Tensors = dict[str, dict[str, Tensor]]  # group -> name -> tensor
STEP = re.compile(r"step_(\d{8})")


def save(root: Path, step: int, tensors: Tensors, state: dict[str, Any], *, keep: int) -> Path:
    """Write step's checkpoint, verify it, give it its name, then delete all but the `keep` newest."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp_*"):
        shutil.rmtree(leftover)
    target, temporary = root / f"step_{step:08d}", root / f".tmp_step_{step:08d}_{os.getpid()}"
    temporary.mkdir()
    try:
        for group, named in tensors.items():
            save_file({k: v.detach().contiguous().cpu() for k, v in named.items()}, temporary / f"{group}.safetensors")
        _write_json(temporary / "state.json", state)
        files = sorted(p for p in temporary.iterdir())
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
        _write_json(temporary / "MANIFEST.json", {"step": step, "files": manifest})
        for path in [*files, temporary / "MANIFEST.json", temporary]:
            fsync(path)
        verify(temporary)
        if target.exists():  # written by a run that was killed after the rename and resumed from an older one
            shutil.rmtree(target)
        temporary.rename(target)
        fsync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in sorted(_steps(root))[:-keep]:
        shutil.rmtree(root / f"step_{old:08d}")
    return target


def load_newest(root: Path) -> tuple[int, Tensors, dict[str, Any]] | None:
    """The newest checkpoint that verifies, as (step, tensors, state); None where there is none.

    Each damaged one passed over is named on stderr. Raises CheckpointError when all are damaged.
    """
    damaged = []
    for step in sorted(_steps(root), reverse=True):
        folder = root / f"step_{step:08d}"
        try:
            verify(folder)
            groups = {p.stem: _read_tensors(p) for p in sorted(folder.glob("*.safetensors"))}
            return step, groups, json.loads((folder / "state.json").read_text())
        except CheckpointError as e:
            damaged.append(str(e))
            print(f"damaged checkpoint passed over: {e}", file=sys.stderr)  # noqa: T201
    if damaged:
        raise CheckpointError(f"{root}: no checkpoint verifies; start again in another run.dir")
    return None


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and sha256, and nothing else."""
    path = folder / "MANIFEST.json"
    try:
        files = json.loads(path.read_text())["files"]
        named = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path}: unreadable manifest ({type(e).__name__}); this checkpoint is damaged") from e
    present = {p.name for p in folder.iterdir()} - {"MANIFEST.json"}
    if present != set(named) or "state.json" not in named:
        raise CheckpointError(f"{folder}: holds {sorted(present)}, the manifest names {sorted(named)}")
    for name, (size, digest) in named.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or sha256_file(file) != digest:
            raise CheckpointError(f"{file}: size or sha256 differs from the manifest; this checkpoint is damaged")


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name; tied ones once, frozen ones left out."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors of `module_tensors` back; names and shapes must agree."""
    own = module_tensors(module)
    if own.keys() != tensors.keys():
        raise CheckpointError(f"checkpoint and model differ in {sorted(own.keys() ^ tensors.keys())[:5]}")
    with torch.no_grad():
        for name, p in own.items():
            if p.shape != tensors[name].shape:
                raise CheckpointError(f"{name}: checkpoint {tuple(tensors[name].shape)}, model {tuple(p.shape)}")
            p.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Moments and step counts as `name.exp_avg`, `name.exp_avg_sq`, `name.step`."""
    return {
        f"{name}.{k}": v for name, p in named for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    """Put the state of `optimizer_tensors` back."""
    for name, p in named:
        kinds = ("step", "exp_avg", "exp_avg_sq")
        found = {k: tensors[f"{name}.{k}"] for k in kinds if f"{name}.{k}" in tensors}
        if found:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _steps(root: Path) -> list[int]:
    return [int(m[1]) for p in root.glob("step_*") if (m := STEP.fullmatch(p.name))]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (safe_open is no dict)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: {e}") from e
