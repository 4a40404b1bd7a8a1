"""Ranked or labelled answers as examples of SFT: which are learnt, with what weight. Learning from people without RL.

The merit m of an answer is its label in [0, 1], or its place in its list: 1 for the best, 0 for the worst. The mean of
its list, in awr, is that of all labels where answers are labelled one by one.

chosen: the best answers alone · rwr: weight e^(m/τ) (Peters, Schaal 2007, reward-weighted regression) · awr: weight
e^((m - mean of the list)/τ), at most 20 (Peng et al. 2019, arXiv 1910.00177, algorithm 1) · conditional: a word before
the prompt says good or bad, and one asks for the good (Lu et al. 2022, arXiv 2205.13636) · unlikelihood: the best are
learnt, the worst unlearnt (Welleck et al. 2019, arXiv 1908.04319). The weights of rwr and awr have mean 1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from minirlhf.errors import DataError
from minirlhf.records import SFT

LARGEST = 20.0  # weight, Peng et al. 2019, section 4


def judged(
    records: Sequence[Any],  # ranked lists, or answers with labels
    objective: str,  # "chosen" | "rwr" | "awr" | "conditional" | "unlikelihood"
    *,
    temperature: float,  # τ
    good: str,  # before the prompt, for "conditional"
    bad: str,
) -> list[SFT]:
    """Every answer that the objective learns from. Raises DataError where nobody has judged."""
    lists = [merits(record) for record in records]
    if not all(lists):
        raise DataError(f"sft.objective {objective}: the data holds neither ranks nor labels; use imitate")
    found: list[SFT] = []
    labels = [record.label for record in records if hasattr(record, "label")]
    label_mean = sum(labels) / max(1, len(labels))
    for record, answers in zip(records, lists, strict=True):
        mean = label_mean if hasattr(record, "label") else sum(m for _, m in answers) / len(answers)
        for response, m in answers:
            if objective == "conditional" and m != 0.5:
                found.append(SFT((good if m > 0.5 else bad) + record.prompt, response, line=record.line))
                continue
            w = {
                "chosen": float(m == 1),
                "rwr": math.exp((m - 1) / temperature),
                "awr": math.exp(min((m - mean) / temperature, math.log(LARGEST))),
                "unlikelihood": float(m == 1) - float(m == 0),
            }.get(objective, 0.0)
            if w:
                found.append(SFT(record.prompt, response, line=record.line, weight=w))
    if found and objective in ("rwr", "awr"):
        scale = len(found) / sum(one.weight for one in found)
        found = [replace(one, weight=one.weight * scale) for one in found]
    return found


def merits(record: Any) -> list[tuple[str, float]]:
    """The judged answers of a record with their merits; none where there is no judgement."""
    if hasattr(record, "label"):
        return [(record.response, float(record.label))]
    present = [(a, r) for a, r in zip(getattr(record, "responses", ()), getattr(record, "ranks", ()), strict=True) if r]
    if not present:
        return []
    best, worst = min(r for _, r in present), max(r for _, r in present)
    return [(answer, (worst - rank) / (worst - best) if worst > best else 0.5) for answer, rank in present]
