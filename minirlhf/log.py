"""`metrics.jsonl`, `samples.jsonl` and the line on the terminal. One rank writes; every line is complete or absent."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from minirlhf import dist
from minirlhf.errors import CheckpointError
from minirlhf.safefile import write_file


def append_line(path: Path, record: dict[str, Any]) -> None:
    """One JSON object, one `write`: a crash leaves whole lines, or one torn last line that readers skip."""
    data = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
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
    """The complete lines of such a file; a torn one at the end is left out."""
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
        self.out.write(f"\r\x1b[2K{line}" + ("\n" if step == self.total else "") if live else line + "\n")
        self.out.flush()


def _short(name: str) -> str:
    return name.removeprefix("objective/").removeprefix("response/").removesuffix("_avg").removesuffix("_mean")


def _number(x: Any) -> str:
    if not isinstance(x, float):
        return str(x)
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes}:{seconds:02d}"
