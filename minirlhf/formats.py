"""Data files → records: which format a file has, and which of its rows cannot be used.

A row that cannot be used as it is, is refused with its file and line, or left out and counted; it is never repaired and
never skipped in silence. The formats themselves are in `readers`, the files' encodings in `rows`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf import readers
from minirlhf.errors import DataError, UsageError
from minirlhf.readers import Notes, Row
from minirlhf.records import SFT, Prompt, Ranking, Record, Scored
from minirlhf.rows import Bad, Source, array_rows, json_rows, text_rows

__all__ = ["FORMATS", "SFT", "Dropped", "Prompt", "Ranking", "Record", "Scored", "Summary", "read_records"]

Reader = Callable[[Row, Notes], Iterator[Record]]


class Format(NamedTuple):
    """A reader and the keys by which its rows are known."""

    read: Reader
    keys: tuple[frozenset[str], ...]  # each set is one way to be this format


def _format(read: Reader, *keys: str) -> Format:
    return Format(read, tuple(frozenset(k.split()) for k in keys))


FORMATS: dict[str, Format] = {
    "hh": _format(readers.preference, "chosen rejected"),
    "pair": _format(
        readers.preference,
        "prompt chosen rejected",
        "prompt response chosen rejected",
        "prompt chosen rejected messages",
    ),
    "ranking": _format(readers.native_ranking, "prompt responses ranks"),
    "ultrafeedback": _format(readers.ultrafeedback_raw, "instruction completions"),
    "summarize": _format(readers.summarize, "info summaries choice"),
    "lm-human-preferences": _format(readers.lm_human_preferences, "query sample0 sample1 sample2 sample3 best"),
    "webgpt": _format(readers.webgpt, "question answer_0 answer_1 score_0 score_1"),
    "stack-exchange": _format(readers.stack_exchange, "question response_j response_k"),
    "scored": _format(readers.scored, "text label", "prompt response label", "prompt completion label"),
    "alpaca": _format(readers.instruction, "instruction output"),
    "dolly": _format(readers.instruction, "instruction response"),
    "sft": _format(readers.prompt_response, "prompt response"),
    "completion": _format(readers.completion, "prompt completion"),
    "sharegpt": _format(readers.sharegpt, "conversations"),
    "messages": _format(readers.messages, "messages"),
    "seed_tasks": _format(readers.seed_tasks, "instruction instances"),
    "hc3": _format(readers.hc3, "question human_answers chatgpt_answers"),
    "qa": _format(readers.qa, "q a"),
    "prompts": _format(readers.prompts, "prompt"),
    "text": _format(readers.texts, "text"),
    "tsv": _format(readers.ranked_columns),
}
LINES = {"tsv": "columns", "prompts": "prompt", "text": "text"}  # formats of plain lines → the key a line gets
PAYLOAD = frozenset().union(*(keys for f in FORMATS.values() for keys in f.keys)) - {"prompt", "text"}
LOOK = 64  # first rows that decide which format a file has
SHOWN = 5  # bad rows that an error names
MAX_DROPPED = 100_000  # bad rows of a file that is worth reading on


class Dropped(NamedTuple):
    """A row that was left out."""

    line: int
    reason: str
    what: str  # field, reason and remark


@dataclass
class Summary:
    """What reading a file left out, and why."""

    path: str
    format: str = ""
    read: int = 0  # rows
    kept: int = 0  # rows that gave records
    dropped: list[Dropped] = field(default_factory=list)
    notes: Notes = field(default_factory=Counter)  # parts of kept rows that were left out

    @property
    def reasons(self) -> dict[str, int]:
        """Dropped rows by reason."""
        return dict(sorted(Counter(row.reason for row in self.dropped).items()))

    def __str__(self) -> str:
        left_out = [f"{name} {n}" for name, n in (*self.reasons.items(), *sorted(self.notes.items()))]
        return f"{self.path}: {self.format}, read {self.read}, kept {self.kept}, dropped {', '.join(left_out) or 0}"


def read_records(
    path: Path | str,
    *,
    format: str = "auto",  # noqa: A002  the contract's name
    on_bad_row: str = "error",  # or "drop"
) -> tuple[list[Any], Summary]:
    """All records of a file, and a summary of what was dropped and why.

    Raises DataError `PATH:LINE: what` for the first bad row, with the lines of more, unless these are dropped; and for
    a file that cannot be read as a whole.
    """
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"{path}: data.format {format} is unknown; choose auto, {', '.join(FORMATS)}")
    if on_bad_row not in ("error", "drop"):
        raise UsageError(f"{path}: data.on_bad_row {on_bad_row} is unknown; choose error or drop")
    summary = Summary(str(path))
    records: list[Record] = []
    most = SHOWN if on_bad_row == "error" else MAX_DROPPED
    with Source(path) as source:
        summary.format, rows = _rows(source, format)
        for line, row in rows:
            summary.read += 1
            try:
                made, notes = _records(FORMATS[summary.format].read, row, line)
            except Bad as bad:
                summary.dropped.append(Dropped(line, bad.reason, str(bad)))
                if len(summary.dropped) >= most:
                    break
                continue
            summary.kept += bool(made)
            summary.notes += notes
            records += made
    if not summary.read:
        raise DataError(f"{path}: holds no row")
    if len(summary.dropped) >= MAX_DROPPED:
        raise DataError(f"{path}: {MAX_DROPPED} bad rows, the last {summary.dropped[-1].what}; see data.format")
    if summary.dropped and on_bad_row == "error":
        raise DataError(_refusal(summary))
    return records, summary


def _records(read: Reader, row: Row | Bad, line: int) -> tuple[list[Record], Notes]:
    """What a row holds; a row of several records is taken whole or not at all."""
    if isinstance(row, Bad):
        raise row
    notes: Notes = Counter()
    made = list(read(row, notes))
    if not made and not notes["no_preference"]:
        raise Bad("empty_response", remark="no answer")
    for record in made:
        record.line = line
    return made, notes


def _refusal(summary: Summary) -> str:
    first, *more = summary.dropped
    also = f"; also line {', '.join(str(row.line) for row in more)}" if more else ""
    return f"{summary.path}:{first.line}: {first.what}{also}; data.on_bad_row drop leaves bad rows out"


# ---- which format ---------------------------------------------------------------------------------------------------


def _rows(source: Source, name: str) -> tuple[str, Iterator[tuple[int, Any]]]:
    """The format's name, and (line, object or Bad) of every row."""
    lines = source.lines()
    first = next(lines, None)
    if first is None:
        return name, iter(())
    start = first.lstrip()[:1]
    json = start in (b"[", b"{")
    if name == "auto" and (not json or str(source.path).removesuffix(".gz").endswith(".tsv")):
        name = "tsv" if b"\t" in first else "prompts"
        json = False
    if name == "tsv" or (name in LINES and not json):
        return name, _plain(text_rows(source, chain([first], lines)), LINES[name])
    rows = array_rows(source, first) if start == b"[" else json_rows(source, chain([first], lines))
    head = list(islice(rows, LOOK))
    if name == "auto" and head:
        name = _detect(source.path, head)
    return name, chain(head, rows)


def _plain(rows: Iterable[tuple[int, str | Bad]], key: str) -> Iterator[tuple[int, Any]]:
    """Lines as the objects that readers take; of columns, how many most of the first rows have comes along."""
    rows = iter(rows)
    head = list(islice(rows, LOOK))
    widths = Counter(row.count("\t") + 1 for _, row in head if isinstance(row, str))
    width = widths.most_common(1)[0][0] if widths else 0
    for line, row in chain(head, rows):
        if isinstance(row, Bad):
            yield line, row
        else:
            yield line, {key: row.split("\t"), "width": width} if key == "columns" else {key: row}


def _detect(path: Path | str, head: list[tuple[int, Any]]) -> str:
    """The format that most of the first rows have; of equals, the one that asks for more keys."""
    votes: Counter[str] = Counter()
    for line, row in head:
        names = _matches(row) if isinstance(row, dict) else []
        if len(names) > 1:
            raise DataError(f"{path}:{line}: keys of the formats {' and '.join(names)}; say data.format, which it is")
        votes.update(names)
    if votes:
        return max(votes, key=lambda name: (votes[name], max(map(len, FORMATS[name].keys))))
    line, row = head[0]
    if isinstance(row, Bad):
        raise DataError(f"{path}:{line}: {row}")
    keys = ascii(", ".join(row))[1:101]
    raise DataError(f"{path}:{line}: missing_key (the keys {keys} are those of no format; see data.format)")


def _matches(row: Row) -> list[str]:
    """Formats whose keys the row has, without those that ask for less than another one of them."""
    found = [(name, keys) for name, f in FORMATS.items() for keys in f.keys if keys <= row.keys()]
    strong = [(name, keys) for name, keys in found if name not in ("prompts", "text")]
    if not strong and row.keys() & PAYLOAD:
        return []  # a preference without its other half is no prompt
    found = strong or found
    return sorted({name for name, keys in found if not any(keys < other for _, other in found)})
