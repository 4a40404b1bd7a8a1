"""Tasks in, labels out: who sees which answers in which order, and one appended line for each judgement.

A line of the labels file is complete or torn at the very end; it counts once it is on the disk. An edit is a new line
with the next `rev`, and what a reader of the whole file should believe is what `current` returns.
"""

import fcntl
import hashlib
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.errors import DataError, UsageError
from minirlhf.rows import Bad, objects

MIN_ANSWERS, MAX_ANSWERS = 2, 9
REPEAT_AFTER = 20  # items between a task and its hidden repeat
MAX_MS = 2**53  # milliseconds of a judgement; JavaScript's whole numbers
Line = dict[str, Any]  # of the labels file


class Task(NamedTuple):
    """A prompt and its answers, in the order of the file."""

    key: str  # of its content
    prompt: str
    responses: list[str]


class Item(NamedTuple):
    """A task as one annotator meets it."""

    id: str
    task: Task
    repeat: bool  # shown before, under another id
    shown: list[int]  # place on the page → index of the answer


# ---- tasks ----------------------------------------------------------------------------------------------------------


def read_tasks(path: Path | str) -> list[Task]:
    """JSON lines with `prompt` and 2 to 9 different `responses`. Raises DataError for the first bad line."""
    tasks: list[Task] = []
    seen: Counter[str] = Counter()
    for line, row in objects(path):
        try:
            prompt, responses = _checked(row)
        except Bad as bad:
            raise DataError(f"{path}:{line}: {bad}") from bad
        content = json.dumps([prompt, *responses])
        tasks.append(Task(_digest(content, seen[content]), prompt, responses))
        seen[content] += 1
    if not tasks:
        raise DataError(f"{path}: holds no task")
    return tasks


def _checked(row: Line) -> tuple[str, list[str]]:
    prompt, responses = row.get("prompt"), row.get("responses")
    if not isinstance(prompt, str) or not prompt.strip():
        raise Bad("wrong_type" if prompt else "empty_prompt", "prompt", "a text is needed")
    if not isinstance(responses, list) or not MIN_ANSWERS <= len(responses) <= MAX_ANSWERS:
        raise Bad("wrong_type", "responses", f"a list of {MIN_ANSWERS} to {MAX_ANSWERS} texts is needed")
    for i, text in enumerate(responses):
        if not isinstance(text, str) or not text.strip():
            raise Bad("wrong_type" if text else "empty_response", f"responses[{i}]", "a text is needed")
    if len(set(responses)) < len(responses):
        raise Bad("identical_answers", "responses")
    return prompt, responses


def _digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def plan(
    tasks: Sequence[Task],
    annotator: str,
    *,
    team: Sequence[str] = (),  # all annotators; empty: this one sees everything
    overlap: float = 0.15,  # share of the tasks that everybody in the team sees
    repeats: float = 0.0,  # share of the tasks that come a second time, unannounced
    seed: int = 0,
) -> list[Item]:
    """What one annotator sees, in order. A task's fate depends on its content and the seed, not on the other tasks."""
    items: list[Item] = []
    again: list[tuple[int, Item]] = []  # (place from which on, repeat)
    for task in tasks:
        draw = random.Random(f"{seed}/{task.key}")
        everybody, one = draw.random() < overlap, draw.randrange(max(1, len(team)))
        if team and not everybody and team[one] != annotator:
            continue
        items.append(_item(task, task.key, annotator, seed))
        if draw.random() < repeats:
            again.append((len(items) + REPEAT_AFTER, _item(task, _digest(task.key, "again"), annotator, seed)))
        while again and again[0][0] <= len(items):
            items.append(again.pop(0)[1])
    return items + [item for _, item in again]


def _item(task: Task, identity: str, annotator: str, seed: int) -> Item:
    """Blind: the order on the page is drawn from seed, annotator and item, and says nothing about the answers."""
    shown = list(range(len(task.responses)))
    random.Random(f"{seed}/{annotator}/{identity}").shuffle(shown)
    return Item(identity, task, identity != task.key, shown)


def check_ranks(ranks: Any, count: int) -> list[int]:
    """One int per answer, 1 = best, 0 = none. Raises ValueError."""
    if not isinstance(ranks, list) or len(ranks) != count:
        raise ValueError(f"ranks must be a list of {count} whole numbers")
    if any(type(rank) is not int or not 0 <= rank <= count for rank in ranks):
        raise ValueError(f"ranks must be whole numbers from 0 to {count}")
    return ranks


# ---- labels ---------------------------------------------------------------------------------------------------------


class Rankings:
    """The labels file and one annotator's place in it; several processes may append to the same file."""

    def __init__(self, path: Path | str, annotator: str, items: Sequence[Item]) -> None:
        self.path, self.annotator = Path(path), annotator
        self.items = {item.id: item for item in items}
        self._lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            lines = read_labels(path)
            self._mend()
            os.fsync(self._fd)
            folder = os.open(self.path.parent, os.O_RDONLY)  # a new file's name is on the disk when its folder is
            os.fsync(folder)
            os.close(folder)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        except OSError as e:
            raise UsageError(f"--out {path}: {e.strerror or e}; choose a file that can be written") from e
        self.latest = {line["task"]: line for line in current(lines) if line["annotator"] == annotator}

    @property
    def done(self) -> int:
        """Items that have a label or were skipped."""
        return sum(item in self.latest for item in self.items)

    def next(self) -> Item | None:
        """The first item without a label."""
        return next((item for name, item in self.items.items() if name not in self.latest), None)

    def before(self, item: Item | None) -> str | None:
        """The id of the labelled item that comes before this one; of the last one at the end."""
        order = list(self.items)
        earlier = order[: order.index(item.id)] if item else order
        return next((one for one in reversed(earlier) if one in self.latest), None)

    def save(self, item: Item, ranks: list[int], *, ms: int = 0, flags: Sequence[str] = ()) -> int:
        """Keep a judgement; its revision. On return it is on the disk. The same judgement again is no new line."""
        with self._lock:
            last = self.latest.get(item.id)
            if last and last["ranks"] == ranks and last["flags"] == list(flags):
                return last["rev"]
            line: Line = {
                "schema": 1,
                "task": item.id,
                "prompt": item.task.prompt,
                "responses": item.task.responses,
                "ranks": ranks,
                "shown": item.shown,
                "annotator": self.annotator,
                "ms": ms,
                "flags": list(flags),
                "rev": last["rev"] + 1 if last else 1,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            } | ({"repeat_of": item.task.key} if item.repeat else {})
            self._append((json.dumps(line, ensure_ascii=False) + "\n").encode())
            self.latest[item.id] = line
            return line["rev"]

    def _append(self, data: bytes) -> None:
        """Whole or not at all, and on the disk."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            self._mend()
            size = os.fstat(self._fd).st_size
            try:
                rest = data
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, size)
                raise
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _mend(self) -> None:
        """What a killed process left of a line, never acknowledged, goes; a whole line without its end stays."""
        size = os.fstat(self._fd).st_size
        if not size or os.pread(self._fd, 1, size - 1) == b"\n":
            return
        data = os.pread(self._fd, size, 0)
        tail = data[data.rfind(b"\n") + 1 :]
        if _parsed(tail) is not None:
            os.write(self._fd, b"\n")
        else:
            print(f"{self.path}: left out a torn last line of {len(tail)} bytes", file=sys.stderr)  # noqa: T201
            os.ftruncate(self._fd, size - len(tail))


def read_labels(path: Path | str) -> list[Line]:
    """Every line of a labels file; a torn last one is left out. Raises DataError for a file that is something else."""
    try:
        parts = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}") from e
    lines = []
    for number, part in enumerate(parts, 1):
        line = _parsed(part)
        torn = number == len(parts) and part[:1] in (b"{", b"")
        if line is not None:
            lines.append(line)
        elif not torn:
            raise DataError(f"{path}:{number}: no line of the labeling page; give another file, or mend this one")
    return lines


def _parsed(part: bytes) -> Line | None:
    """A line of `Rankings.save`, or None."""
    try:
        line = json.loads(part)
        count = len(line["responses"])
        check_ranks(line["ranks"], count)
        words = [line["task"], line["annotator"], line["prompt"], line.get("repeat_of", ""), *line["responses"]]
        "".join(words).encode()  # half of a surrogate pair cannot be written again
        sound = isinstance(line["responses"], list) and type(line["rev"]) is int and type(line["ms"]) is int
        sound = sound and 0 <= line["ms"] < MAX_MS and isinstance(line["flags"], list) and line["schema"] == 1
        return line if sound else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def current(lines: Sequence[Line]) -> list[Line]:
    """Of every task and annotator the highest revision, in the order of their first lines."""
    latest: dict[tuple[str, str], Line] = {}
    for line in lines:
        key = line["task"], line["annotator"]
        if key not in latest or line["rev"] >= latest[key]["rev"]:
            latest[key] = line
    return list(latest.values())


# ---- export ---------------------------------------------------------------------------------------------------------


def export(lines: Sequence[Line], kind: str) -> list[str]:
    """What `train_rm.py` reads, one line each, of the current judgements without skips and hidden repeats.

    ranked: lists with their ranks · pairs: better and worse, with the gap of their ranks, ties left out · tsv: the
    texts alone, best first, for lists of one length without ties.
    """
    out = []
    for line in current(lines):
        ranked = sorted((rank, i) for i, rank in enumerate(line["ranks"]) if rank)
        if "repeat_of" in line or len({rank for rank, _ in ranked}) < 2:
            continue
        texts, prompt = line["responses"], line["prompt"]
        if kind == "ranked":
            out.append(_json({"prompt": prompt, "responses": texts, "ranks": line["ranks"]}))
        elif kind == "pairs":
            out += [
                _json({"prompt": prompt, "chosen": texts[i], "rejected": texts[j], "margin": worse - better})
                for better, i in ranked
                for worse, j in ranked
                if better < worse
            ]
        else:
            out.append(_columns([texts[i] for _, i in ranked], [rank for rank, _ in ranked], line["task"]))
            columns, first = (row.count("\t") + 1 for row in (out[-1], out[0]))
            if columns != first:
                raise DataError(
                    f"task {line['task']}: {columns} ranked answers, the first has {first}, and a TSV has lists of one "
                    f"length; export pairs or ranked"
                )
    return out


def _json(row: Line) -> str:
    return json.dumps(row, ensure_ascii=False)


def _columns(texts: Sequence[str], ranks: Sequence[int], task: str) -> str:
    if len(set(ranks)) < len(ranks):
        raise DataError(f"task {task}: a tie has no place in a TSV of ranked texts; export pairs or ranked")
    if any(c in text for text in texts for c in "\t\n\r"):
        raise DataError(f"task {task}: an answer holds a tab or a line end, which TSV cannot; export pairs or ranked")
    return "\t".join(texts)
