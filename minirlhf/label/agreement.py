"""How far annotators agree, with each other and with themselves. Every statistic is a function of plain numbers."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

from minirlhf.errors import DataError


def cohen_kappa(
    table: Sequence[Sequence[float]],  # (C, C) how often one rater said row and the other column
) -> float | None:
    """κ = (p_o - p_e) / (1 - p_e) (Cohen 1960); None where chance alone agrees always."""
    n = sum(map(sum, table))
    p_o = sum(row[i] for i, row in enumerate(table)) / n
    p_e = sum(sum(row) * sum(column) for row, column in zip(table, zip(*table, strict=True), strict=True)) / n**2
    return (p_o - p_e) / (1 - p_e) if p_e < 1 else None


def midranks(ranks: Sequence[float]) -> list[float]:
    """1 … n, equal values sharing the mean of their places."""
    return [1 + sum(b < a for b in ranks) + (sum(b == a for b in ranks) - 1) / 2 for a in ranks]


def kendall_w(
    rankings: Sequence[Sequence[float]],  # (m raters, n things)
) -> float | None:
    """W = 12 S / (m² (n³ - n) - m Σ T), S the squared deviations of the rank sums, T = Σ (t³ - t) over the ties of a
    rater (Kendall & Gibbons 1990, section 6.8); None where everything is tied."""
    rows = [midranks(ranks) for ranks in rankings]
    m, n = len(rows), len(rows[0])
    sums = [sum(column) for column in zip(*rows, strict=True)]
    S = sum((s - m * (n + 1) / 2) ** 2 for s in sums)
    T = sum(t**3 - t for row in rows for t in Counter(row).values())  # of all raters
    below = m * m * (n**3 - n) - m * T
    return 12 * S / below if below else None


def krippendorff_alpha(
    units: Sequence[Sequence[float]],  # the values that each thing got, of however many raters
) -> float | None:
    """Ordinal α = 1 - D_o / D_e (Krippendorff 2011, "Computing Krippendorff's alpha-reliability"), D_o the mean of the
    distance δ²(c, k) = (Σ_{g=c…k} n_g - (n_c + n_k)/2)² over pairs of values of one thing, D_e over pairs of any two of
    the n values; None where there is nothing to disagree on."""
    pairable = [values for values in units if len(values) > 1]
    count = Counter(value for values in pairable for value in values)
    order = sorted(count)
    n = sum(count.values())

    def distance(c: float, k: float) -> float:
        between = sum(count[g] for g in order if min(c, k) <= g <= max(c, k))
        return 0.0 if c == k else (between - (count[c] + count[k]) / 2) ** 2

    within = sum(2 * distance(c, k) / (len(values) - 1) for values in pairable for c, k in combinations(values, 2))
    between = sum(count[c] * count[k] * distance(c, k) for c in order for k in order)
    if not between:
        return None
    D_o, D_e = within / n, between / (n * (n - 1))
    return 1 - D_o / D_e


# ---- of labels ------------------------------------------------------------------------------------------------------


def choices(ranks: Sequence[int]) -> list[int | None]:
    """Of every pair of answers: -1 the first is better, 1 the second, 0 a tie, None not both ranked."""
    return [(a > b) - (a < b) if a and b else None for a, b in combinations(ranks, 2)]


def agreement(
    lines: Sequence[dict[str, Any]],  # the current line of every task and annotator
) -> dict[str, Any]:
    """Shares and coefficients over the tasks that several annotators ranked; null where there is nothing to compare.

    pairwise: of the pairs that neither rater tied, the share on which two raters agree (InstructGPT's labelers: about
    73 %) · kappa: Cohen's of better, tie, worse, mean over pairs of raters · kendall_w, the mean over tasks · alpha:
    ordinal · retest: as pairwise, of hidden repeats.
    """
    ranked: dict[str, dict[str, list[int]]] = defaultdict(dict)  # task → annotator → ranks
    repeats: list[tuple[list[int], list[int]]] = []
    firsts = {(line["task"], line["annotator"]): line["ranks"] for line in lines}
    for line in lines:
        if "repeat_of" in line:
            first = firsts.get((line["repeat_of"], line["annotator"]))
            repeats += [(first, line["ranks"])] if first else []
        elif any(line["ranks"]):
            ranked[line["task"]][line["annotator"]] = line["ranks"]
    of_tasks = ((f"task {task}", by.values()) for task, by in ranked.items())
    for what, rankings in (*of_tasks, *(("a task and its repeat", pair) for pair in repeats)):
        if len({*map(len, rankings)}) > 1:
            raise DataError(f"{what}: ranked as {' and '.join(map(str, rankings))}, of unequal lengths")
    shared = [by for by in ranked.values() if len(by) > 1]
    pairs = [(by[a], by[b], (a, b)) for by in shared for a, b in combinations(sorted(by), 2)]
    complete = [list(by.values()) for by in shared if all(all(ranks) for ranks in by.values())]
    units = [[by[r][i] for r in by if by[r][i]] for by in shared for i in range(len(next(iter(by.values()))))]
    times = [line["ms"] / 1000 for line in lines if line["ms"] and any(line["ranks"])]
    return {
        "labels": len(lines),
        "skipped": sum(not any(line["ranks"]) for line in lines),
        "annotators": dict(Counter(line["annotator"] for line in lines)),
        "shared_tasks": len(shared),
        "pairwise": same_order([pair[:2] for pair in pairs]),
        "kappa": mean([cohen_kappa(table) for table in tables(pairs)]),
        "kendall_w": mean([kendall_w(rankings) for rankings in complete]),
        "alpha": krippendorff_alpha(units),
        "retest": same_order(repeats),
        "median_seconds": statistics.median(times) if times else None,
    }


def same_order(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float | None:
    """Of the pairs of answers that both rankings order, the share ordered alike."""
    both = [(x, y) for a, b in pairs for x, y in zip(choices(a), choices(b), strict=True) if x and y]
    return sum(x == y for x, y in both) / len(both) if both else None


def tables(pairs: Sequence[tuple[Sequence[int], Sequence[int], Hashable]]) -> list[list[list[int]]]:
    """One 3 × 3 table of choices per pair of raters."""
    found: dict[Hashable, list[list[int]]] = {}
    for a, b, raters in pairs:
        table = found.setdefault(raters, [[0] * 3 for _ in range(3)])
        for x, y in zip(choices(a), choices(b), strict=True):
            if x is not None and y is not None:
                table[x + 1][y + 1] += 1
    return [table for table in found.values() if any(map(any, table))]


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that exist."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
