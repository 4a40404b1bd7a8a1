"""Which curves the report draws: score, gold and KL, the distance from the reference, every other metric.

The gold reward of the built-in task is held against the best that any policy reaches at the same KL, and against
best-of-n (Gao, Schulman & Hilton 2022, arXiv 2210.10760).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minirlhf import review_world
from minirlhf.page import figure, spelled
from minirlhf.svg import Curve, Panel, draw, thinned

Points = list[tuple[float, float]]
MAX_OTHER = 40  # figures of metrics that are not listed

# In their order: title, metrics, unit of the y axis. A metric that is not listed gets a figure of its own.
FIGURES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Loss", ("loss", "val/loss"), "nats"),
    ("Ranking accuracy", ("val/accuracy", "val/accuracy_low", "val/accuracy_high"), "share of pairs"),
    ("Response length", ("response/length_mean",), "tokens"),
    ("Empty answers", ("response/empty_frac",), "share"),
    ("Answers with EOS", ("response/eos_frac",), "share"),
    ("Short and repetitive answers", ("response/short_frac", "response/repeat_frac"), "share"),
    ("Distinct answers", ("response/distinct_frac",), "share"),
    ("Entropy", ("objective/entropy",), "nats per answer"),
    ("Reward after the KL penalty", ("objective/rlhf_reward",), "per answer"),
    ("KL coefficient", ("objective/kl_coef",), "reward per nat"),
    ("Clip share", ("policy/clipfrac_avg",), "share of tokens"),
    ("KL of the update", ("policy/approxkl_avg",), "nats per token"),
    ("Ratio", ("val/ratio",), "π / π_old"),
    ("Policy loss", ("loss/policy_avg",), "per token"),
    ("Value loss", ("loss/value_avg",), "per token"),
    ("Explained variance", ("value/explained_var",), "share"),
    ("Gradient norm", ("grad_norm",), ""),
    ("Learning rate", ("lr",), ""),
    ("Speed", ("tokens_per_s",), "tokens per second"),
    ("Memory", ("memory/process_mb", "memory/cuda_mb"), "MB, largest so far"),
)
FLOORS = {"value/explained_var": -1.0}  # lower values would flatten all others
SCORE, GOLD, KL = "objective/scores", "gold/score", "objective/kl"
LEAD = ((SCORE, "score"), (GOLD, "gold"), (KL, "KL, nats"))
GREY = 6
REFERENCES = (
    "Dashed: the largest gold that any policy reaches at this KL from the corpus, exactly. Dotted: the best of n "
    "answers of the corpus by gold itself, n = 1 to 64."
)


class Traces(NamedTuple):
    """The numbers of one run."""

    name: str
    series: dict[str, Points]  # metric → (step, value); a NaN leaves a gap, each has a number somewhere
    built_in: bool  # gold/score is that of the built-in task
    first_gold: float | None  # before any update


def all_figures(runs: Sequence[Traces]) -> tuple[list[str], list[str]]:
    """The two that sum a run up, and one per metric."""
    return [f for f in (lead(runs), over_kl(runs)) if f], over_steps(runs)


def label(runs: Sequence[Traces], i: int) -> str:
    """A run's name in legends; empty where there is only one."""
    return f"{i + 1} {spelled(runs[i].name)[:40]}" if len(runs) > 1 else ""


def curves(runs: Sequence[Traces], metrics: Sequence[str]) -> list[Curve]:
    """One run: a colour per metric. Several: a colour per run, a stroke per metric."""
    found = []
    metrics = [metric for metric in metrics if any(metric in run.series for run in runs)]
    for i, run in enumerate(runs):
        for j, metric in enumerate(metrics):
            if metric in run.series:
                words = f"{label(runs, i)} {spelled(metric) if len(metrics) > 1 else ''}".strip()
                color, style = (i, ("-", "--", ":")[j % 3]) if len(runs) > 1 else (j, "-")
                found.append(Curve(words, run.series[metric], color, style))
    return found


def names(runs: Sequence[Traces], metrics: Sequence[str]) -> str:
    """Those of the metrics that some run has."""
    return ", ".join(spelled(m) for m in metrics if any(m in run.series for run in runs))


# ---- over steps -----------------------------------------------------------------------------------------------------


def over_steps(runs: Sequence[Traces]) -> list[str]:
    """A figure per entry of FIGURES, one of the time of each phase, one per metric that is left."""
    present = list(dict.fromkeys(metric for run in runs for metric in run.series))
    listed = {m for _, metrics, _ in FIGURES for m in metrics} | {m for m, _ in LEAD} | {"episode"}
    times = tuple(m for m in present if m.startswith("time/"))
    others = [m for m in present if m not in listed and m not in times]
    wanted = [*FIGURES, ("Time of a step", times, "seconds"), *((spelled(m), (m,), "") for m in others[:MAX_OTHER])]
    out = []
    for i, (title, metrics, unit) in enumerate(wanted):
        found = curves(runs, metrics)
        if found:
            words, floor = names(runs, metrics), FLOORS.get(metrics[0])
            svg = draw(f"f{i}", [Panel(unit, found, floor)], xlabel="step", label=f"{words} over step")
            out.append(figure(svg, title, words + (f", cut at {floor:g}" if floor is not None else "")))
    if len(others) > MAX_OTHER:
        out.append(f'<p class="dim">{len(others) - MAX_OTHER} more metrics are in metrics.jsonl.</p>')
    return out


def lead(runs: Sequence[Traces]) -> str:
    """Score, gold and KL; dashed, the gold that is possible at the KL of the step."""
    panels, possible = [], False
    for metric, ylabel in LEAD:
        found = curves(runs, (metric,))
        for i, run in enumerate(runs):
            if metric == GOLD and run.built_in and GOLD in run.series and KL in run.series:
                kls = thinned(run.series[KL], 200)
                line = [(step, review_world.frontier(kl) if kl == kl else kl) for step, kl in kls]
                found.append(Curve("", line, i if len(runs) > 1 else GREY, "--"))
                possible = True
        panels += [Panel(ylabel, found)] if found else []
    if not panels:
        return ""
    words = names(runs, [metric for metric, _ in LEAD])
    svg = draw("lead", panels, xlabel="step", label=f"{words} over step")
    dashed = ". Dashed: the largest gold that is possible at the KL of the step" if possible else ""
    return figure(svg, "Score, gold and KL", words + dashed + "".join(map(peak, runs)) + ".")


def peak(run: Traces) -> str:
    """Where gold was best, and where it ended."""
    found = [(gold, step) for step, gold in run.series.get(GOLD, ()) if gold == gold]
    if not found:
        return ""
    best, step = max(found)
    return f". {spelled(run.name)}: best gold {best:.2f} at step {step}, last {found[-1][0]:.2f}"


# ---- over the distance from the reference ---------------------------------------------------------------------------


def over_kl(runs: Sequence[Traces]) -> str:
    """Score and gold over d = √KL."""
    panels, caption = [], ""
    for metric, ylabel in LEAD[:2]:
        found = []
        for i, run in enumerate(runs):
            dots = against_distance(run, metric)
            found += [Curve(label(runs, i), dots, i, "o")] if dots else []
            law = fit(dots, run.first_gold) if metric == GOLD else None
            if law:
                d_max = max(d for d, _ in dots)
                found.append(Curve("", rl_curve(*law, run.first_gold or 0.0, d_max), i))
                caption += f" {spelled(run.name)}: fit R = d (α − β ln d), α {law[0]:.2f}, β {law[1]:.2f}{turn(*law)}."
        if metric == GOLD and found and any(run.built_in for run in runs):
            found += reference_curves(max(d for curve in found for d, _ in curve.points))
            caption = f" {REFERENCES}{caption}"
        panels += [Panel(ylabel, found)] if found else []
    if not panels:
        return ""
    words = names(runs, (SCORE, GOLD))
    svg = draw("kl", panels, xlabel="√KL, KL in nats per answer", label=f"{words} over the square root of {KL}")
    return figure(svg, "Distance from the reference", f"{words} over √ {KL}.{caption}")


def against_distance(run: Traces, metric: str) -> Points:
    """(√KL, value) of the steps that have both."""
    kl = dict(run.series.get(KL, ()))
    both = [(kl[step], y) for step, y in run.series.get(metric, ()) if step in kl and y == y]
    return [(math.sqrt(max(0.0, nats)), y) for nats, y in both if nats == nats]


def fit(dots: Points, first_gold: float | None) -> tuple[float, float] | None:
    """α, β of R_RL(d) = d (α - β ln d), R = gold - gold at d = 0 (Gao et al. 2022, eq. 2), by least squares; None for
    fewer than five points with d > 0."""
    used = [dot for dot in dots if dot[0] > 0]
    if first_gold is None or len(used) < 5:
        return None
    d, gold = np.array(used).T
    (alpha, beta), _, rank, _ = np.linalg.lstsq(np.stack([d, -d * np.log(d)], 1), gold - first_gold, rcond=1e-6)
    return (float(alpha), float(beta)) if rank == 2 else None


def rl_curve(alpha: float, beta: float, first_gold: float, d_max: float) -> Points:
    """The fitted law from 0 to d_max."""
    ds = [d_max * k / 100 for k in range(1, 101)]
    return [(0.0, first_gold), *((d, first_gold + d * (alpha - beta * math.log(d))) for d in ds)]


def turn(alpha: float, beta: float) -> str:
    """Where the law turns down: d = exp(α/β - 1)."""
    exponent = alpha / beta - 1 if beta > 0 else math.inf
    return f", which turns at d = {math.exp(exponent):.2f}" if exponent < 5 else ""


def reference_curves(d_max: float) -> list[Curve]:
    """What is possible in the built-in task: the exact frontier, and best-of-n."""
    frontier = [(d_max * k / 100, review_world.frontier((d_max * k / 100) ** 2)) for k in range(101)]
    best = [(math.sqrt(review_world.best_of_n_kl(n)), review_world.best_of_n_gold(n)) for n in range(1, 65)]
    return [Curve("", frontier, GREY, "--"), Curve("", best, GREY, ":")]
