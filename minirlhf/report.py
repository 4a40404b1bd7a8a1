"""A run's folder → one page, report.html: what was learned, what went wrong, what the model says.

    python -m minirlhf.report RUN [RUN ...] [--out FILE]

Several runs are drawn into the same figures; the page then lies in the first run's folder. The page is one file,
without scripts and without network. It needs metrics.jsonl and uses what else is there.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf import svg
from minirlhf.checkpoint import sha256_file
from minirlhf.errors import DataError, tool
from minirlhf.figures import GOLD, KL, SCORE, Traces, all_figures
from minirlhf.log import read_lines
from minirlhf.page import box, number, page, section, shown, table

Record = dict[str, Any]
SHOWN_STEPS = (0, 10, 16, 100)  # of the samples, where there are many; and the last one
MAX_PROMPTS = 16
EXAMPLE = 160  # characters of a probe's example
TILES = (  # metric, key of evaluation.json, words
    (GOLD, "gold", "gold reward"),
    (SCORE, "score", "score"),
    (KL, "kl", "KL, nats"),
    ("response/length_mean", "length", "tokens per answer"),
    ("val/accuracy", "", "ranking accuracy"),
    ("val/loss", "", "validation loss"),
    ("loss", "", "training loss"),
)
DRAWN = 1e40  # of larger numbers no figure can be made, and fp32 holds none
LAST_STEP = 2**53  # the figures' numbers are floats
EMPTY = '<span class="empty">(empty)</span>'
NO_FIGURES = "figures need matplotlib: pip install 'minirlhf[report]'"


class RunFiles(NamedTuple):
    """What a run left; what is absent is empty."""

    folder: Path
    metrics: list[Record]  # one per step, ascending
    samples: list[Record]
    alarms: list[tuple[Any, str]]  # step, words
    probe: list[Record]
    config: Record
    environment: Record
    evaluation: Record

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name


# ---- reading --------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder; torn and damaged lines are skipped, a folder without metrics is refused."""
    path = folder / "metrics.jsonl"
    lines = {r["step"]: r for r in _lines(path) if _has_step(r)}
    if not lines:
        raise DataError(f"{path}: no metrics; give the folder of a run that has taken a step")
    memory = {r["step"]: r for r in _lines(folder / "memory.jsonl") if _has_step(r)}
    metrics = [memory.get(step, {}) | lines[step] for step in sorted(lines)]
    names = ("config", "environment", "evaluation", "probe")
    config, environment, evaluation, probe = (_object(folder / f"{name}.json") for name in names)
    rows = probe.get("probe")
    alarms = [(line.get("step", "?"), str(line.get("alarm"))) for line in _lines(folder / "alarms.jsonl")]
    return RunFiles(
        folder, metrics, _lines(folder / "samples.jsonl"), alarms,
        [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else [],
        config, environment, evaluation,
    )  # fmt: skip


def _lines(path: Path) -> list[Record]:
    try:
        return read_lines(path)
    except RecursionError as e:
        raise DataError(f"{path}: a line is nested too deeply; it was not written by a run") from e


def _has_step(record: Record) -> bool:
    step = record.get("step")
    return type(step) is int and abs(step) <= LAST_STEP


def _object(path: Path) -> Record:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def traces(run: RunFiles) -> Traces:
    """The numbers of metrics.jsonl, by metric."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in run.metrics:
        for name, value in record.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                series.setdefault(name, []).append((record["step"], _finite(value)))
    series = {name: points for name, points in series.items() if any(y == y for _, y in points)}
    before = _value(run.evaluation.get("before"), "gold")
    first = next((y for _, y in series.get(GOLD, ()) if y == y), None)
    data, ppo = run.config.get("data"), run.config.get("ppo")
    built_in = _value(data, "path") == "" and not _value(ppo, "prompts")
    return Traces(run.name, series, built_in, before if isinstance(before, float) else first)


def _finite(x: float | None) -> float:
    return float(x) if x is not None and abs(x) <= DRAWN else math.nan


def _value(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, dict) else None


# ---- sections -------------------------------------------------------------------------------------------------------


def heading(runs: Sequence[RunFiles]) -> str:
    """Names, progress, seconds, and the hash of what came out."""
    parts = [f"<h1>{shown(' · '.join(run.name for run in runs))}</h1>"]
    for run in runs:
        last, steps = run.metrics[-1]["step"], _value(run.config.get("run"), "steps")
        weights = sorted((run.folder / "final").glob("*.safetensors"))
        state = "finished" if weights else "not finished"
        seconds = sum(_seconds(record) for record in run.metrics) / len(run.metrics) * last
        hashes = "".join(f"; final/{shown(path.name)} sha256 {sha256_file(path)[:16]}" for path in weights)
        parts.append(
            f'<p class="dim">{shown(run.name)}: {state}, step {number(last)}'
            f"{f' of {number(steps)}' if steps else ''}; about {seconds:,.0f} s of training{hashes}</p>"
        )
    return "\n".join(parts)


def _seconds(record: Record) -> float:
    times = [_finite(v) for k, v in record.items() if k.startswith("time/") and isinstance(v, int | float)]
    return sum(t for t in times if t == t)


def summary(runs: Sequence[RunFiles], found: Sequence[Traces]) -> str:
    """The first and the last value of what matters; of the evaluation where there is one."""
    values = [
        [ends(run, trace, metric, key) for metric, key, _ in TILES] for run, trace in zip(runs, found, strict=True)
    ]
    used = [i for i in range(len(TILES)) if any(row[i] for row in values)]
    if not used:
        return ""
    if len(runs) == 1:
        return '<div class="tiles">{}</div>'.format(
            "".join(f'<div class="tile">{TILES[i][2]}<b>{values[0][i]}</b></div>' for i in used)
        )
    rows = [[shown(run.name), *(row[i] or "–" for i in used)] for run, row in zip(runs, values, strict=True)]
    return table(["run", *(TILES[i][2] for i in used)], rows, label="first and last values")


def ends(run: RunFiles, trace: Traces, metric: str, key: str) -> str:
    """`first → last`, or nothing."""
    pair = [_value(run.evaluation.get(moment), key) for moment in ("before", "after")]
    if not all(isinstance(x, int | float) for x in pair):
        logged = [y for _, y in trace.series.get(metric, ()) if y == y]
        pair = [logged[0], logged[-1]] if logged else []
    return "&nbsp;→&nbsp;".join(number(x, 3) for x in pair)


def alarms(runs: Sequence[RunFiles], found: Sequence[Traces]) -> str:
    """What was raised, equal words once with their steps; supervised runs watch for none."""
    parts = []
    for run, trace in zip(runs, found, strict=True):
        if not run.alarms and KL not in trace.series:
            continue
        steps: dict[str, list[str]] = {}
        for step, words in run.alarms:
            steps.setdefault(words, []).append(shown(step))
        items = [
            f'<li><span class="red">{shown(words)}</span> '
            f'<span class="dim">step {at[0]}{f" to {at[-1]}, {len(at)} times" if len(at) > 1 else ""}</span></li>'
            for words, at in steps.items()
        ]
        name = f"<h3>{shown(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(name + (f'<ul class="alarms">{"".join(items)}</ul>' if items else '<p class="green">None.</p>'))
    return section("Alarms", *parts)


def samples(run: RunFiles) -> str:
    """The same prompts side by side, one column per step."""
    answers: dict[str, dict[int, Record]] = {}
    for record in run.samples:
        if isinstance(record.get("prompt"), str) and _has_step(record):
            answers.setdefault(record["prompt"], {}).setdefault(record["step"], record)
    steps = sorted({step for by_step in answers.values() for step in by_step})
    if not steps:
        return ""
    if len(steps) > 6:
        steps = [step for step in steps if step in SHOWN_STEPS or step == steps[-1]]
    rows = ["<thead><tr>" + "".join(f"<th>step {number(step)}</th>" for step in steps) + "</tr></thead>"]
    for prompt in list(answers)[:MAX_PROMPTS]:
        cells = "".join(f'<td class="said">{answer(answers[prompt].get(step))}</td>' for step in steps)
        asked = shown(prompt) or '<span class="empty">(no prompt)</span>'
        rows.append(f'<tbody><tr class="asked"><th colspan="{len(steps)}">{asked}</th></tr><tr>{cells}</tr></tbody>')
    more = len(answers) - MAX_PROMPTS
    rest = f'<p class="dim">{more:,} more prompts are in samples.jsonl.</p>' if more > 0 else ""
    side_by_side = box("".join(rows), "answers to the same prompts at several steps", len(steps))
    return section(f"Answers of {run.name}", side_by_side, rest)


def answer(record: Record | None) -> str:
    """The text, and below it what is known of it."""
    if record is None:
        return "–"
    text = shown(record.get("response") or "") or EMPTY
    known = (("score", "score {:.2f}"), ("gold", "gold {:.2f}"), ("kl", "KL {:.2f}"), ("length", "{:.0f} tokens"))
    numbers = [words.format(_finite(record[k])) for k, words in known if isinstance(record.get(k), int | float)]
    cut = ["no EOS"] if record.get("eos") is False else []
    together = " · ".join(words.replace(" ", "\u00a0") for words in numbers + cut)
    return f'{text}<span class="numbers">{together}</span>'


def probe(run: RunFiles) -> str:
    """What the reward model says of degenerate answers."""
    keys = list(dict.fromkeys(key for row in run.probe for key in row))
    if not keys:
        return ""
    rows = [[cell(key, row.get(key)) for key in keys] for row in run.probe]
    numeric = [i for i, key in enumerate(keys) if any(isinstance(row.get(key), int | float) for row in run.probe)]
    words = "Degenerate answers against ordinary ones: red is preferred to the median of the ordinary answers."
    head = [shown(key.replace("_", " ")) for key in keys]
    found = table(head, rows, label="reward-model probe", numeric=numeric)
    return section(f"Probe of the reward model: {run.name}", f"<p>{words}</p>", found)


def cell(key: str, value: Any) -> str:
    """One entry of the probe."""
    if key == "verdict" and value in ("red", "amber", "green"):
        return f'<span class="{value}">{value}</span>'
    if key == "share_below" and isinstance(value, float) and 0 <= value <= 1:
        return f"{100 * value:.0f} %"
    if key == "example":
        text = str(value)
        return f'<div class="short">{shown(text[:EXAMPLE]) or EMPTY}{"…" if len(text) > EXAMPLE else ""}</div>'
    return number(value)


def evaluation(runs: Sequence[RunFiles]) -> str:
    """evaluation.json: a column per moment, a row per quantity."""
    columns: dict[str, Record] = {}
    for run in runs:
        flat = {k: v for k, v in run.evaluation.items() if not isinstance(v, dict)}
        tables = ([("", flat)] if flat else []) + [(k, v) for k, v in run.evaluation.items() if isinstance(v, dict)]
        columns |= {f"{run.name if len(runs) > 1 else ''} {moment}".strip() or "value": v for moment, v in tables}
    if not columns:
        return ""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [[shown(key.replace("_", " ")), *(number(c.get(key)) for c in columns.values())] for key in keys]
    numeric = range(1, len(columns) + 1)
    return section("Evaluation", table(["", *map(shown, columns)], rows, label="evaluation", numeric=numeric))


def times(runs: Sequence[RunFiles], found: Sequence[Traces]) -> str:
    """Seconds of each phase and its share of the time, and speed."""
    rows = []
    for run, trace in zip(runs, found, strict=True):
        series = {name: [y for _, y in points if y == y] for name, points in trace.series.items()}
        whole = sum(sum(values) for name, values in series.items() if name.startswith("time/"))
        for name, values in series.items():
            if name.startswith("time/") or name == "tokens_per_s":
                named = [shown(run.name)] if len(runs) > 1 else []
                share = f"{100 * sum(values) / whole:.0f} %" if name.startswith("time/") and whole > 0 else ""
                rows.append([*named, shown(name), *(number(f(values)) for f in (statistics.median, min, max)), share])
    if not rows:
        return ""
    head = [*(["run"] if len(runs) > 1 else []), "per step", "median", "least", "most", "share"]
    return section("Time", table(head, rows, label="time and speed", numeric=range(len(head) - 4, len(head))))


def settings(runs: Sequence[RunFiles]) -> str:
    """Configuration and versions, by section; of several runs the settings that differ come first."""
    sections = [{**run.config, "environment": run.environment} for run in runs]
    flat = [{(s, k): v for s, keys in c.items() if isinstance(keys, dict) for k, v in keys.items()} for c in sections]
    every = list(dict.fromkeys(key for f in flat for key in f))
    if not every:
        return ""
    parts = []
    if len(runs) > 1:
        differ = [key for key in every if any(f.get(key) != flat[0].get(key) for f in flat)]
        rows = [[shown(".".join(key)), *(setting(f.get(key)) for f in flat)] for key in differ]
        parts.append(table(["differs", *(shown(run.name) for run in runs)], rows, label="settings that differ"))
        parts.append(f"<h3>All of {shown(runs[0].name)}</h3>")
    blocks = []
    for name in dict.fromkeys(s for s, _ in flat[0]):
        rows = [[shown(k), setting(v)] for (s, k), v in flat[0].items() if s == name]
        blocks.append(f"<section><h3>{shown(name)}</h3>{table(['', ''], rows, label=f'settings of {name}')}</section>")
    return section("Settings and versions", *parts, f'<div class="settings">{"".join(blocks)}</div>')


def setting(value: Any) -> str:
    """A value as a config file writes it."""
    return shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) or EMPTY


# ---- the page -------------------------------------------------------------------------------------------------------


def write_report(folder: Path | str, *others: Path | str, out: Path | str | None = None) -> Path:
    """Read the runs, write one page, complete or not at all; the page's path."""
    runs = [read_run(Path(f)) for f in (folder, *others)]
    path = Path(out) if out else runs[0].folder / "report.html"
    found = [traces(run) for run in runs]
    if svg.available():
        first, rest = all_figures(found)
        drawn = section("Course", f'<div class="grid wide">{"".join(first)}</div>' if first else "")
        curves = section("Curves", f'<div class="grid">{"".join(rest)}</div>' if rest else "")
    else:
        print(NO_FIGURES, file=sys.stderr)  # noqa: T201
        drawn, curves = f'<p class="amber">{NO_FIGURES}</p>', ""
    body = [
        heading(runs), summary(runs, found), alarms(runs, found), drawn,
        *map(samples, runs), curves, *map(probe, runs), evaluation(runs), times(runs, found), settings(runs),
    ]  # fmt: skip
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page(" · ".join(run.name for run in runs), filter(None, body)), encoding="utf-8")
    os.replace(temporary, path)
    return path


@tool()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.report", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", default="", help="file to write; default: report.html of the first run")
    args = parser.parse_args(argv)
    print(write_report(*args.runs, out=args.out or None))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
