"""The failure lab's page: of each scenario story, claims, table (mean and range over seeds), figures, commands."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from minirlhf import review_world, stage, svg
from minirlhf.config import SampleSection
from minirlhf.data import decode, left_padded
from minirlhf.evaluate import score_texts
from minirlhf.figures import GOLD, KL, SCORE, Points, fit, rl_curve
from minirlhf.generate import generate
from minirlhf.page import figure, number, section, shown, table
from minirlhf.pretrained import load_causal_lm, load_reward_model
from minirlhf.report import RunFiles, read_run
from minirlhf.rng import generator

LENGTH = "response/length_mean"
N = 256  # answers to a prompt for best-of-n
SMOOTH = 5  # iterations that a peak and an end are means of
Value = Callable[[RunFiles], float]


class Claim(NamedTuple):
    """What the lab is to show, what it showed, and whether it did."""

    words: str
    measured: str
    held: bool


# ---- numbers of one run ---------------------------------------------------------------------------------------------


def series(run: RunFiles, metric: str) -> list[float]:
    """A metric at every iteration."""
    return [float(line[metric]) for line in run.metrics]


def end(key: str, moment: str = "after") -> Value:
    """A number of evaluation.json, over 1,024 answers."""
    return lambda run: float(run.evaluation[moment][key])


def gain(run: RunFiles) -> float:
    """How far the score rose, in deviations of the SFT model's scores."""
    before, after = run.evaluation["before"], run.evaluation["after"]
    return (after["score"] - before["score"]) / max(before["score_std"], 1e-8)


def halved(run: RunFiles) -> float:
    """The first iteration whose answers are at most half as long as at first; infinite: none."""
    lengths = series(run, LENGTH)
    return next((float(i) for i, x in enumerate(lengths, 1) if x <= lengths[0] / 2), math.inf)


def mean_of(metric: str) -> Value:
    """The mean of a metric over the run."""
    return lambda run: fmean(series(run, metric))


def smooth(values: Sequence[float]) -> list[float]:
    """Running means of SMOOTH neighbours."""
    size = min(SMOOTH, len(values))
    return [fmean(values[i : i + size]) for i in range(len(values) - size + 1)]


class Turn(NamedTuple):
    """Gold at its peak and at the end of a run, and what the proxy did in between (SFT deviations)."""

    peak: float
    kl: float  # nats, at the peak
    last: float
    fall: float  # share of the peak
    proxy: float


def turn(run: RunFiles) -> Turn:
    """Where gold turned."""
    golds, scores, kls = (smooth(series(run, metric)) for metric in (GOLD, SCORE, KL))
    top = max(range(len(golds)), key=golds.__getitem__)
    fall = (golds[top] - golds[-1]) / abs(golds[top]) if golds[top] else 0.0
    scale = max(run.evaluation["before"]["score_std"], 1e-8)
    return Turn(golds[top], kls[top], golds[-1], fall, (scores[-1] - scores[top]) / scale)


# ---- best of n ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def best_of_n(folder: Path, reward_models: Sequence[str], seed: int) -> dict[str, list[tuple[float, float, float]]]:
    """Of each reward model: (√KL, proxy in SFT deviations, gold) of the best of n = 1, 2, 4 … of the SFT's answers."""
    loaded = stage.load(folder / "sft/final", load_causal_lm, key="sft", made_by="train_sft.py")
    prompts = review_world.prompts()
    encoded = [loaded.template.prompt_ids(loaded.tokenizer, prompt) for prompt in prompts]
    sampling = stage.sampling(SampleSection(), loaded)
    ids, mask = left_padded(encoded, sampling["pad_token_id"])
    rngs = [generator(seed, "best of n", 0, i) for i in range(len(prompts) * N)]
    made = generate(loaded.model, ids, mask, num_return_sequences=N, rng=rngs, **sampling)
    answers = decode(made.tokens, made.mask, loaded.tokenizer)
    asked = [prompt for prompt in prompts for _ in range(N)]
    golds = review_world.gold_of_texts(asked, answers)
    out = {}
    for name in reward_models:
        model = load_reward_model(folder / name / "final")
        scores = np.array(score_texts(model, loaded.tokenizer, loaded.template, asked, answers))
        scores = (scores - scores.mean()) / scores.std()
        rows = [slice(i, i + N) for i in range(0, len(answers), N)]
        out[name] = [
            (
                math.sqrt(review_world.best_of_n_kl(n)),
                fmean(review_world.best_of_n_estimate(scores[r], scores[r], n) for r in rows),
                fmean(review_world.best_of_n_estimate(scores[r], golds[r], n) for r in rows),
            )
            for n in (1, 2, 4, 8, 16, 32, 64)
        ]
    return out


def bon_fit(points: Points) -> tuple[float, float]:
    """α, β of R_bon(d) = d (α - β d), R = gold - gold at d = 0 (Gao et al. 2022, arXiv 2210.10760, eq. 1)."""
    d, gold = np.array(points).T
    used = d > 0
    rows = np.stack([d[used], -(d[used] ** 2)], 1)
    alpha, beta = np.linalg.lstsq(rows, gold[used] - gold[~used][0], rcond=None)[0]
    return float(alpha), float(beta)


# ---- pieces of the page ---------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Mean and range; what never happened is left out of the mean and counted."""
    found = [x for x in values if math.isfinite(x)]
    if not found:
        return "never"
    some = f" in {len(found)} of {len(values)}" if len(found) < len(values) else ""
    low, high = number(min(found), 3), number(max(found), 3)
    return f"{number(fmean(found), 3)}{some}" + (f' <span class="dim">({low} … {high})</span>' if low != high else "")


def compare(rows: Mapping[str, Sequence[RunFiles]], columns: Mapping[str, Value], label: str) -> str:
    """A row per job, in the colour of its curves, a column per number."""
    cells = [
        [named(words, color), *(spread([value(run) for run in runs]) for value in columns.values())]
        for color, (words, runs) in enumerate(rows.items())
    ]
    return table(["", *map(shown, columns)], cells, label=label, numeric=range(1, len(columns) + 1))


def named(words: str, color: int) -> str:
    """Words behind a mark in the colour of their curves."""
    return f'<span style="color: {svg.COLORS[color]}">■</span> {shown(words)}'


def courses(name: str, rows: dict[str, Sequence[RunFiles]], metrics: dict[str, str], title: str) -> str:
    """A panel per metric, a colour per job, a line per seed."""
    if not svg.available():
        return ""
    panels: list[svg.Panel] = []
    for metric, ylabel in metrics.items():
        curves = []
        for color, runs in enumerate(rows.values()):
            curves += [svg.Curve("", list(enumerate(series(run, metric), 1)), color) for run in runs]
        panels.append(svg.Panel(ylabel, curves))
    drawn = svg.draw(name, panels, xlabel="iteration", label=f"{', '.join(metrics)} over iterations")
    return f'<div class="grid wide">{figure(drawn, title, ", ".join(metrics) + "; a line per seed")}</div>'


def over_distance(rows: dict[str, Sequence[RunFiles]], best: Mapping[str, Sequence[Any]]) -> tuple[str, str]:
    """Proxy and gold over √KL, and the laws fitted to gold: PPO joined, its law dashed, best-of-n dotted."""
    proxy, gold, laws = [], [], []
    for color, (words, runs) in enumerate(rows.items()):
        kls = np.mean([smooth(series(run, KL)) for run in runs], 0).clip(min=0)
        scores = np.mean([smooth(in_deviations(run)) for run in runs], 0)
        golds = np.mean([smooth(series(run, GOLD)) for run in runs], 0)
        first = fmean(run.evaluation["before"]["gold"] for run in runs)
        d = np.sqrt(kls)
        proxy.append(svg.Curve("", list(zip(d, scores, strict=True)), color))
        gold.append(svg.Curve("", list(zip(d, golds, strict=True)), color))
        law = fit(list(zip(d, golds, strict=True)), first)
        if law:
            gold.append(svg.Curve("", rl_curve(*law, first, d.max()), color, "--"))
        bon = np.mean(best[words], 0)  # (7, 3)
        proxy.append(svg.Curve("", [(x, y) for x, y, _ in bon], color, ":"))
        gold.append(svg.Curve("", [(x, y) for x, _, y in bon], color, ":"))
        laws.append([named(words, color), *map(number, law or (None, None)), *map(number, bon_fit(bon[:, [0, 2]]))])
    fits = table(["", "PPO: α", "β", "best of n: α", "β"], laws, label="fits of Gao et al. 2022", numeric=range(1, 5))
    if not svg.available():
        return "", fits
    drawn = svg.draw(
        "overopt", [svg.Panel("proxy", proxy), svg.Panel("gold", gold, -1.0)], xlabel="√KL, KL in nats per answer",
        label="proxy and gold over the square root of KL",
    )  # fmt: skip
    words = (
        "Proxy in deviations of the SFT model's scores; means over seeds. Joined: PPO without a KL penalty. Dashed: "
        "R = d (α − β ln d), fitted. Dotted: best of n, n = 1 to 64."
    )
    whole = figure(drawn, "Proxy and gold over the distance from the SFT model", words)
    return f'<div class="grid wide">{whole}</div>', fits


def in_deviations(run: RunFiles) -> list[float]:
    """Scores as deviations from the SFT model's."""
    before = run.evaluation["before"]
    return [(score - before["score"]) / max(before["score_std"], 1e-8) for score in series(run, SCORE)]


# ---- scenarios ------------------------------------------------------------------------------------------------------

Rows = dict[str, Sequence[RunFiles]]


Seeds = dict[int, Path]  # the folder of each seed's jobs


class Scenario(NamedTuple):
    """A failure: its story, the jobs that are shown, and what makes tables, figures and verdicts of them."""

    title: str
    story: str
    jobs: dict[str, str]  # job → its words in tables and figures
    show: Callable[[Seeds, Rows], tuple[list[str], list[Claim]]]


OUTCOME: dict[str, Value] = {
    "gold": end("gold"),
    "score, SFT deviations": gain,
    "KL, nats": end("kl"),
    "tokens": end("length"),
}
COURSE = {GOLD: "gold", LENGTH: "tokens", KL: "KL, nats"}


def share_of_good(run: RunFiles) -> float:
    """Gold as a share of what the good reward model's policy of the same seed reached."""
    return end("gold")(run) / end("gold")(read_run(run.folder.parent / "ppo-good"))


def show_weak(seeds: Seeds, rows: Rows) -> tuple[list[str], list[Claim]]:
    """Lengths, gold, and how much of the good reward model's gold each cure reaches."""
    good, weak, hard = (rows[WEAK_JOBS[job]] for job in ("ppo-good", "ppo-weak", "ppo-weak-hard"))
    columns = OUTCOME | {"of the good one's gold": share_of_good, "half as long at iteration": halved}
    steps = [halved(run) for run in weak]
    share = fmean(map(end("gold"), hard)) / fmean(map(end("gold"), good))
    claims = [
        Claim("the weak reward model halves the length within 30 iterations, in every seed",
              f"at iteration {', '.join(number(x) for x in steps)}", all(x <= 30 for x in steps)),
        Claim("hard negatives bring back 70 % of the good reward model's gold", f"{share:.0%}", share >= 0.7),
    ]  # fmt: skip
    return [
        compare(rows, columns, "the weak reward model and its cures"),
        courses("weak", rows, COURSE, "Gold, length and KL"),
    ], claims


def show_overopt(seeds: Seeds, rows: Rows) -> tuple[list[str], list[Claim]]:
    """The turn of gold, by size of the preference data, best-of-n beside it."""
    sampled = [best_of_n(folder, list(OVEROPT_RM), seed) for seed, folder in seeds.items()]
    best = {words: [by_model[model] for by_model in sampled] for model, words in OVEROPT_RM.items()}
    columns: dict[str, Value] = {
        "best gold": lambda run: turn(run).peak,
        "at KL": lambda run: turn(run).kl,
        "last gold": lambda run: turn(run).last,
        "gold lost, % of best": lambda run: 100 * turn(run).fall,
        "proxy since then": lambda run: turn(run).proxy,
    }
    peaks = [[shown(words), *(spread([row[k][2] for row in best[words]]) for k in (0, 3, 6))] for words in rows]
    drawn, fits = over_distance(rows, best)
    turns = {words: [turn(run) for run in runs] for words, runs in rows.items()}
    turned = {words: sum(t.fall >= 0.15 and t.proxy >= 0 for t in found) for words, found in turns.items()}
    least = max(2, math.ceil(2 * len(seeds) / 3)) if len(seeds) > 1 else 1
    claim = Claim(
        f"gold falls 15 % or more from its peak, the proxy does not, in {least} of {len(seeds)} seeds",
        "; ".join(f"{words}: {n}" for words, n in turned.items()), max(turned.values()) >= least,
    )  # fmt: skip
    sizes = table(["best of n by proxy: gold", "n = 1", "8", "64"], peaks, label="best of n", numeric=[1, 2, 3])
    return [compare(rows, columns, "over-optimisation"), drawn, sizes, fits], [claim]


def show_simple(name: str, columns: dict[str, Value], courses_of: dict[str, str]) -> Any:
    """A table and its curves."""

    def show(seeds: Seeds, rows: Rows) -> tuple[list[str], list[Claim]]:
        return [compare(rows, OUTCOME | columns, name), courses(name, rows, courses_of, "Course")], []

    return show


def show_template(seeds: Seeds, rows: Rows) -> tuple[list[str], list[Claim]]:
    """What the scripts say to it, and what happens to folders that cannot say it."""
    said = [json.loads((folder / "ppo-refused.json").read_text())["said"] for folder in seeds.values()]
    first: dict[str, Value] = {"score before": end("score", "before")}
    claim = Claim("another template is refused", said[0], all("data.template" in line for line in said))
    return [compare(rows, first | OUTCOME, "template"), courses("template", rows, COURSE, "Course")], [claim]


WEAK_JOBS = {
    "ppo-good": "good reward model",
    "ppo-weak": "weak reward model",
    "ppo-weak-eos": "no EOS as first token",
    "ppo-weak-kl": "KL penalty 0.5",
    "ppo-weak-three": "lowest of three models",
    "ppo-weak-hard": "hard negatives",
}
OVEROPT_JOBS = {"ppo-512": "512 pairs", "ppo-2048": "2,048 pairs", "ppo-8192": "8,192 pairs"}
OVEROPT_RM = {"rm-512": "512 pairs", "rm-2048": "2,048 pairs", "rm-good": "8,192 pairs"}
SCENARIOS: dict[str, Scenario] = {
    "weak": Scenario(
        "A reward model that likes short answers",
        "The labeler takes a little off for every word, and never sees very short answers: what the reward model says "
        "of those is a guess. It guesses that they are the best of all, and PPO finds that out within a few "
        "iterations. Each cure alone: no EOS as the first token; five times the KL penalty, which holds the policy "
        "where it was; three reward models, of which the lowest counts; hard negatives, the answers that the reward "
        "model has never seen.",
        WEAK_JOBS,
        show_weak,
    ),
    "overopt": Scenario(
        "Over-optimisation",
        "Without a KL penalty the policy climbs the reward model as far as it goes. Gold rises with it, turns, and "
        "falls while the reward model's praise still grows (Gao, Schulman & Hilton 2022, arXiv 2210.10760). More "
        "preference data moves the turn out. Best of n, which cannot go as far, is the reference.",
        OVEROPT_JOBS,
        show_overopt,
    ),
    "lr": Scenario(
        "Too high a learning rate",
        "Ten times the rate: ratios leave the clip range at once, the KL jumps, and what is found first is kept.",
        {"ppo-good": "learning rate 5e-4", "ppo-lr": "learning rate 5e-3"},
        show_simple(
            "lr",
            {"clip share": mean_of("policy/clipfrac_avg"), "KL of an update": mean_of("policy/approxkl_avg")},
            COURSE,
        ),
    ),
    "dropout": Scenario(
        "Dropout left on",
        "The policy samples under one mask and learns under another. At 0.1 the answers do not show it: the first "
        "ratio of an iteration, which is not 1, and a KL that is not 0 before anything is learned are the only signs.",
        {"ppo-dropout-off": "dropout off", "ppo-dropout-on": "dropout on"},
        show_simple("dropout", {"first ratio's gap": mean_of("val/first_ratio_gap")}, COURSE),
    ),
    "template": Scenario(
        "Another template than in training",
        "The scripts note the template in a model's folder and refuse another one. A reward function is not asked: "
        "here it puts the words of another template around the prompt before the reward model reads it. Nothing "
        "fails, the scores rise, and the policy is lost.",
        {"ppo-template-same": "the same template", "ppo-template-other": "another template"},
        show_template,
    ),
}


def scenario_section(scenario: Scenario, seeds: Seeds, commands: Sequence[str]) -> tuple[str, list[Claim]]:
    """One scenario of the page."""
    rows: dict[str, Sequence[RunFiles]]
    rows = {words: [read_run(folder / job) for folder in seeds.values()] for job, words in scenario.jobs.items()}
    parts, claims = scenario.show(seeds, rows)
    listed = "".join(f"<li><code>{shown(line)}</code></li>" for line in commands)
    ran = f"<details><summary>Commands, of the first seed</summary><ol>{listed}</ol></details>"
    return section(scenario.title, f"<p>{shown(scenario.story)}</p>", verdicts(claims), *parts, ran), claims


def verdicts(claims: Sequence[Claim]) -> str:
    """What was to be shown, and whether it was."""
    word = {True: '<span class="green">yes</span>', False: '<span class="red">no</span>'}
    rows = [[shown(c.words), shown(c.measured), word[c.held]] for c in claims]
    return table(["to be shown", "measured", "held"], rows, label="claims") if claims else ""
