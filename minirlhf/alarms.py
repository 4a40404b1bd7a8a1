"""Reward hacking, collapse and mismatch, seen early: what the newest line of metrics.jsonl raises, and the cure.

An alarm is a function of the lines so far and of nothing else, so that a resumed run raises the same ones. It is raised
when its condition has just held for a few lines in a row, and again only after QUIET lines without it. How the limits
were found: docs/reliability.md.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from minirlhf.masked import keep
from minirlhf.rollout import Rollout

QUIET = 20  # lines
Line = dict[str, Any]


def signals(rollout: Rollout) -> dict[str, float]:
    """What the alarms ask of a rollout and nobody else does."""
    lengths, scores = rollout.lengths, rollout.scores.double()  # (B,)
    kl = keep((rollout.old_logprobs - rollout.ref_logprobs).double(), rollout.action_mask).sum(1)  # (B,) nats an answer
    rows = [row[real].tolist() for row, real in zip(rollout.responses, rollout.response_mask, strict=True)]
    asked = [row[real].tolist() for row, real in zip(rollout.prompts, rollout.prompt_mask, strict=True)]
    return {
        "objective/kl_se": float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else math.inf,
        "objective/score_length_corr": correlation(scores, lengths.double()),
        "response/short_frac": float((lengths <= 2).double().mean()),
        "response/distinct_frac": len({(*p, -1, *r) for p, r in zip(asked, rows, strict=True)}) / len(rows),
        "response/repeat_frac": repeated(rows),
    }


def correlation(x: Tensor, y: Tensor) -> float:  # (B,), (B,)
    """Pearson's r; 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0


def repeated(rows: Sequence[Sequence[int]], n: int = 4) -> float:
    """The share of n-grams that their row held before."""
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    total = sum(map(len, grams))
    return 1 - sum(len(set(row)) for row in grams) / total if total else 0.0


class Limits(NamedTuple):
    """What a run knows besides its log."""

    kl_target: float = 0.0  # nats per answer; 0: none
    score_max: float = math.inf  # the highest score of the reward model's validation, and one deviation more


class Rule(NamedTuple):
    """One alarm: bad(line, first line, limits), for so many lines in a row."""

    name: str
    metric: str
    lines: int
    bad: Callable[[Line, Line, Limits], bool]
    cure: str


HACKED = "look at probe.json and the samples; train the reward model with rm.hard_negatives, or raise ppo.kl_coef"
STUCK = "lower optim.lr or ppo.epochs, or raise ppo.kl_coef"
MISMATCH = "sampling and scoring disagree: set top_k 0, top_p 1, min_new_tokens 0, or look for dropout or other weights"


def above(metric: str, floor: float, factor: float = 2.0) -> Callable[[Line, Line, Limits], bool]:
    """More than a share of all, and than `factor` times the first line's."""
    return lambda now, first, _: now[metric] > max(floor, factor * first[metric])


RULES = (
    Rule("length", "response/length_mean", 3,
         lambda now, first, _: not 0.58 <= now["response/length_mean"] / first["response/length_mean"] <= 2.0, HACKED),
    Rule("empty answers", "response/empty_frac", 3, above("response/empty_frac", 0.02), HACKED),
    Rule("length", "response/short_frac", 3, above("response/short_frac", 0.05, 1.6), HACKED),  # two tokens at most
    Rule("unfinished answers", "response/eos_frac", 3,
         lambda now, first, _: 1 - now["response/eos_frac"] > max(0.2, 2 * (1 - first["response/eos_frac"])),
         "raise sample.max_new_tokens, or set ppo.missing_eos replace"),
    Rule("sameness", "response/distinct_frac", 3,
         lambda now, first, _: now["response/distinct_frac"] < first["response/distinct_frac"] / 2, STUCK),
    Rule("repetition", "response/repeat_frac", 3, above("response/repeat_frac", 0.2), HACKED),
    Rule("KL", "objective/kl", 5,
         lambda now, _, limits: limits.kl_target > 0 and now["objective/kl"] > 2 * limits.kl_target, STUCK),
    Rule("negative KL", "objective/kl", 1,
         lambda now, *_: now["objective/kl"] < -3 * now["objective/kl_se"], MISMATCH),
    Rule("ratio", "val/first_ratio_gap", 1, lambda now, *_: now["val/first_ratio_gap"] > 1e-5, MISMATCH),
    Rule("entropy", "objective/entropy", 1, lambda now, first, _: per_token(now) < 0.1 * per_token(first), STUCK),
    Rule("value", "value/explained_var", 20, lambda now, *_: now["value/explained_var"] < 0,
         "the value model learns nothing: raise optim.lr or ppo.value_coef, or set ppo.value_init reward_model"),
    Rule("score and length", "objective/score_length_corr", 3,
         lambda now, *_: abs(now["objective/score_length_corr"]) > 0.9, HACKED),
    Rule("score range", "objective/scores", 3,
         lambda now, _, limits: now["objective/scores"] > limits.score_max, HACKED),
)  # fmt: skip


def per_token(line: Line) -> float:
    """Entropy in nats per token."""
    return line["objective/entropy"] / line["response/length_mean"]


def held(rule: Rule, history: Sequence[Line], limits: Limits) -> bool:
    """Whether the condition holds in each of the rule's last lines; a line that lacks its metrics is sound."""
    if len(history) < rule.lines:
        return False
    try:
        return all(rule.bad(line, history[0], limits) for line in history[-rule.lines :])
    except (KeyError, TypeError, ZeroDivisionError):  # not logged, or null
        return False


def alarms(history: Sequence[Line], limits: Limits) -> list[str]:
    """What the newest line raises and no recent one did, in a line each with its cure."""
    now, first = history[-1], history[0]
    earlier = range(1, len(history))[-QUIET:]  # lengths of the history
    return [
        f"{rule.name}: {rule.metric} is {now[rule.metric]:.3g}"
        + ("" if first.get(rule.metric) is None else f", at step {first['step']} it was {first[rule.metric]:.3g}")
        + (f", {rule.lines} lines in a row" if rule.lines > 1 else "")
        + f"; {rule.cure}"
        for rule in RULES
        if held(rule, history, limits) and not any(held(rule, history[:n], limits) for n in earlier)
    ]
