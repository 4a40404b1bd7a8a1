"""Is a reward model fit to be maximised? What it says of degenerate answers, and pairs that teach it better.

PPO finds whatever a reward model likes by mistake: nothing, one word, one sentence again and again. Its accuracy on
ordinary pairs does not show that; this table does, before anything is trained on it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minirlhf.errors import AlarmError
from minirlhf.records import Asked, Ranking
from minirlhf.rng import generator
from minirlhf.run import Run, write_json

PROBED = 64  # ordinary answers, against which the opinion of degenerate ones is held
TextScore = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]  # prompts (`Asked`), responses → scores
DEGENERATE = (
    "empty",
    "one full stop",
    "one word",
    "each answer five times",
    "echo of the prompt",
)  # red when they are preferred


def variants(prompts: Sequence[Asked], answers: Sequence[str], seed: int) -> dict[str, list[str | None]]:
    """Answers to each prompt that nobody wants, by what is wrong with them; None where there is no such answer."""
    n = len(prompts)
    rng = generator(seed, "probe")
    words = " ".join(answers).split()
    drawn = torch.randint(max(1, len(words)), (n, 8), generator=rng).tolist()
    mixed = [" ".join(words[i] for i in row) if words else "" for row in drawn]
    longest = max(answers, key=len)
    stop = "。" if "。" in longest else "."
    joint = " " if " " in longest else ""
    others = [next((a for p, a in zip(prompts, answers, strict=True) if p != prompt), None) for prompt in prompts]
    shortest: dict[Asked, str] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer and len(answer) < len(shortest.get(prompt, answer + " ")):
            shortest[prompt] = answer
    return {
        "empty": [""] * n,
        "one full stop": [stop] * n,
        "one word": [(a.split() or [a])[0][: max(1, len(a) // 2)] for a in answers],
        "each answer five times": [joint.join([a] * 5) for a in answers],
        "echo of the prompt": [p if isinstance(p, str) else p[-1][1] for p in prompts],
        "shortest answer five times": [joint.join([shortest.get(p, "")] * 5) for p in prompts],
        "another prompt's answer": list(others),
        "random words": list(mixed),
        "cut in half": [a[: len(a) // 2].rstrip() for a in answers],
        "all answers in a row": [joint.join(answers)] * n,
    }


def probe(
    score: TextScore,
    prompts: Sequence[Asked],
    answers: Sequence[str],  # ordinary ones, one to each prompt
    seed: int,
) -> list[dict[str, Any]]:
    """The mean score of degenerate answers against the median of ordinary ones: above it is red.

    The other rows are only amber: small models often do not learn relevance, and what is cut or said again may be good.
    """
    n = len(prompts)
    ordinary = sorted(score(prompts, answers))
    median = ordinary[n // 2]
    table = [{"name": "ordinary answers (median)", "example": answers[0], "score": median, "share_below": 0.5,
              "verdict": "reference"}]  # fmt: skip
    for name, texts in variants(prompts, answers, seed).items():
        rows = [(p, t) for p, t in zip(prompts, texts, strict=True) if t is not None and (t or name == "empty")]
        if not rows:
            continue
        scores = score([p for p, _ in rows], [t for _, t in rows])
        mean = sum(scores) / len(scores)
        verdict = "green" if mean <= median else "red" if name in DEGENERATE else "amber"
        below = sum(s < mean for s in ordinary) / n
        table.append({"name": name, "example": rows[0][1], "score": mean, "share_below": below, "verdict": verdict})
    return table


def write_probe(
    run: Run,
    score: TextScore,
    prompts: Sequence[Asked],
    answers: Sequence[str],
    *,
    stop: bool = False,  # end the run where a line is red
) -> None:
    """The probe on the first of these, as probe.json in the run's folder; a red line is also said aloud."""
    table = probe(score, prompts[:PROBED], answers[:PROBED], run.config.run.seed)
    write_json(run.folder / "probe.json", {"probe": table})
    for row in table:
        if row["verdict"] == "red":
            words = (f"probe: the reward model prefers {row['name']} ({row['score']:.2f}) to an ordinary answer "
                     f"({table[0]['score']:.2f}); train it with --rm.hard_negatives 0.25")  # fmt: skip
            if stop:
                raise AlarmError(words)
            run.say(words)


def hard_negatives(
    records: Sequence[Any],  # prompt, responses, ranks, perhaps grades
    share: float,  # of their number
    seed: int,
) -> list[Ranking]:
    """So many records once more, each with its best answer before a degenerate one; the kinds take turns. Among grades
    the degenerate answer's is 0, or the lowest of its list where that is below."""
    order = torch.randperm(len(records), generator=generator(seed, "hard_negatives")).tolist()
    chosen = []
    for i in order[: round(share * len(records))]:
        record = records[i]
        placed = zip(record.ranks, record.responses, range(len(record.ranks)), strict=True)
        _, best, k = min(place for place in placed if place[0])
        grades = getattr(record, "grades", ())
        chosen.append((record.prompt, best, [grades[k], min(0.0, *grades)] if grades else []))
    if not chosen:
        return []
    bad = variants([prompt for prompt, *_ in chosen], [best for _, best, _ in chosen], seed)
    pairs = []
    for k, (prompt, best, grades) in enumerate(chosen):
        worst = bad[DEGENERATE[k % len(DEGENERATE)]][k]
        if best.strip() and worst is not None and worst != best:
            pairs.append(Ranking(prompt, [best, worst], [1, 2], grades=grades))
    return pairs
