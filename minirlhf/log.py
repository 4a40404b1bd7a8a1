"""`metrics.jsonl`, `samples.jsonl` and the line on the terminal. One rank writes; every line is complete or absent."""

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from minirlhf import dist
from minirlhf.errors import CheckpointError, NonFiniteError, UsageError, silence
from minirlhf.safefile import write_file


def to_json(path: Path, record: dict[str, Any], indent: int | None = None) -> bytes:
    """Raises NonFiniteError, which names the file, for a number that JSON cannot hold, UsageError for such a text."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False, indent=indent) + "\n").encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"{path.name}: {e.object[e.start - 9 : e.end + 9]!a} is no UTF-8; rename what it names") from e
    except ValueError as e:
        raise NonFiniteError(f"{path.name}: a number in it is NaN or infinite") from e


def append_line(path: Path, record: dict[str, Any]) -> None:
    """One JSON object, one `write`: a crash leaves whole lines, or one torn last line that readers skip."""
    data = to_json(path, record)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(
            f"{path}: cannot be written ({e.strerror or e}); make room, then --run.resume true"
        ) from e


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of such a file; what is no JSON object, as a torn line at the end, is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def cut_after(path: Path, step: int) -> None:
    """Drop lines beyond `step` (they belong to work that is done again) and a torn last line; earlier bytes stay."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            beyond = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            break
        if beyond:
            break
        kept.append(line + b"\n")
    temporary = path.with_name(f".{path.name}.tmp")
    write_file(temporary, kept)
    os.replace(temporary, path)


def memory(device: str) -> dict[str, float]:
    """Megabytes at most so far, of this process and of its GPU: a file of its own, for metrics.jsonl holds nothing that
    differs between equal runs."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    used = {"memory/process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    return used | ({"memory/cuda_mb": torch.cuda.max_memory_allocated(device) / 2**20} if "cuda" in device else {})


def exporter(name: str, folder: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """What sends the lines of metrics.jsonl elsewhere too; nothing is opened before the first one.

    Raises UsageError where `run.log_with` names a package that is not installed.
    """
    if name == "none":
        return lambda line: None
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"run.log_with {name}: the package is missing; pip install 'minirlhf[log]', or {name} alone")
    opened: list[Callable[[dict[str, Any]], None]] = []

    def export(line: dict[str, Any]) -> None:
        if dist.rank() != 0:
            return
        if not opened:
            opened.append(_tensorboard(folder, line["step"]) if name == "tensorboard" else _wandb(folder, config))
        opened[0]({metric: value for metric, value in line.items() if isinstance(value, int | float)})

    return export


def _tensorboard(folder: Path, step: int) -> Callable[[dict[str, Any]], None]:
    """Event files in the run's folder; of an earlier start, what lies at `step` and beyond no longer counts."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(line: dict[str, Any]) -> None:
        for metric, value in line.items():
            writer.add_scalar(metric, value, line["step"])
        writer.flush()

    return write


def _wandb(folder: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A run named as the folder, in the project that the environment or `minirlhf` names."""
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minirlhf"), name=folder.name, dir=str(folder), config=config
        )
    except wandb.Error as e:
        raise UsageError(f"run.log_with wandb: {e}; see `wandb login`, or set WANDB_MODE=offline") from e
    return lambda line: run.log(line, step=line["step"])


def tell(text: str, out: TextIO | None = None) -> None:
    """Text for who watches a run. That nobody does any more, or with a terminal of few letters, does not end it."""
    out = out or sys.stdout
    try:
        out.write(text.encode(out.encoding or "utf-8", "replace").decode(out.encoding or "utf-8"))
        out.flush()
    except BrokenPipeError:
        silence()


class Progress:
    """One line that renews itself on a terminal, plain lines elsewhere; the time left from the steps so far."""

    def __init__(self, name: str, total: int, *, out: TextIO | None = None):
        self.name, self.total = name, total
        self.out = out or sys.stdout
        self.first: tuple[int, float] | None = None  # step and time of the first call: loading does not count
        self.last = 0.0

    def show(self, step: int, metrics: dict[str, Any], words: tuple[str, ...], *, keep: bool = False) -> None:
        """Print the chosen metrics; without a terminal only lines to keep, at most one in two seconds or the last."""
        if dist.rank() != 0:
            return
        live, now = self.out.isatty(), time.monotonic()
        first, began = self.first = self.first or (step, now)
        if not live and not (step == self.total or (keep and now - self.last > 2.0)):
            return
        self.last = now
        left = f"  {_duration((now - began) / (step - first) * (self.total - step))} left" if step > first else ""
        shown = "  ".join(f"{_short(w)} {_number(metrics[w])}" for w in words if w in metrics)
        line = f"{self.name} {step}/{self.total}  {shown}{left}"
        tell(f"\r\x1b[2K{line}" + ("\n" if step == self.total else "") if live else line + "\n", self.out)


def _short(name: str) -> str:
    return name.removeprefix("objective/").removeprefix("response/").removesuffix("_avg").removesuffix("_mean")


def _number(x: Any) -> str:
    if not isinstance(x, float):
        return str(x)
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes}:{seconds:02d}"
