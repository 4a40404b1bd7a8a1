"""How good is it? Losses, accuracies with their intervals, the gold of a policy's answers.

Nothing here is seen by training. Gold exists in the built-in task alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf import dist, review_world
from minirlhf.data import Example, RankedList, by_length, left_padded, pad
from minirlhf.heads import RewardModel
from minirlhf.model import CausalLM, logit_factors
from minirlhf.ops import head_stats
from minirlhf.records import Asked
from minirlhf.rng import generator
from minirlhf.rollout import IGNORE, Roles, Rollout, collect, label_logprobs, response_positions
from minirlhf.templates import Template
from minirlhf.tokenizer import Tokenizer

Gold = Callable[[Sequence[str], Sequence[str], Sequence[bool]], list[float]]  # prompts, responses, EOS seen → gold
Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
AT_ONCE = 256  # answers of one forward
EXAM = 1024  # answers by which a policy is judged before and after its training


# ---- language model -------------------------------------------------------------------------------------------------


@torch.no_grad()
def sft_loss(
    model: CausalLM, examples: Sequence[Example], size: int, device: str = "cpu", *, impl: str = "auto"
) -> float:
    """Nats per trained token. Each rank runs its examples."""
    total, count = 0.0, 0
    ordered = dist.mine(sorted(examples, key=lambda e: len(e.ids)))
    for i in range(0, len(ordered), size):
        logprobs, labels = label_logprobs(model, ordered[i : i + size], device, impl=impl)
        total -= float(logprobs.double().sum())
        count += int(labels.sum())
    total, count = dist.all_sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count


def answer_logprobs(
    model: CausalLM, examples: Sequence[Example], size: int, device: str = "cpu", *, impl: str = "auto"
) -> Tensor:  # (N,)
    """Σ log π of each example's trained tokens, in their order; `size` examples of similar length share a forward."""
    groups = by_length(range(len(examples)), size, lambda i: len(examples[i].ids))
    sums = [label_logprobs(model, [examples[i] for i in rows], device, impl=impl)[0].sum(1) for rows in groups]
    place = torch.tensor([i for rows in groups for i in rows], device=device).argsort()
    return torch.cat(sums)[place]


# ---- reward model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_rows(model: RewardModel, sequences: Sequence[Sequence[int]], size: int, device: str) -> Tensor:  # (N,)
    """`score_sequences`, each rank its sequences."""
    own = dist.mine(sequences)
    found = score_sequences(model, own, size, device) if own else torch.zeros(0, device=device)
    return dist.all_rows(found, len(sequences))


def score_sequences(
    model: RewardModel, sequences: Sequence[Sequence[int]], size: int, device: str = "cpu", *, in_step: bool = False
) -> Tensor:  # (N,)
    """One score per token list, in their order; `size` lists of similar length share a forward, so padding is short.

    `in_step`: as many forwards as the rank that needs most; what is run again gets no gradient.
    """
    groups = by_length(range(len(sequences)), size, lambda i: len(sequences[i]))
    forwards = int(dist.all_max(torch.tensor(len(groups)))) if in_step else len(groups)
    groups += groups[-1:] * (forwards - len(groups))
    scores = []
    for rows in groups:
        part = [sequences[i] for i in rows]
        ids, real = pad(part, 0, device=device), pad([[True] * len(s) for s in part], False, device=device)
        scores.append(model(ids, real))
    order = [i for rows in groups for i in rows][: len(sequences)]
    return torch.cat(scores)[torch.tensor(order, device=device).argsort()]


def score_texts(
    model: RewardModel,
    tokenizer: Tokenizer,
    template: Template,
    prompts: Sequence[Asked],
    responses: Sequence[str],
    device: str = "cpu",
) -> list[float]:
    """One score per answer, each rank running its share."""
    return score_rows(model, text_ids(model, tokenizer, template, prompts, responses), 64, device).tolist()


def text_ids(
    model: RewardModel, tokenizer: Tokenizer, template: Template, prompts: Sequence[Asked], responses: Sequence[str]
) -> list[list[int]]:
    """Prompt and finished answer as tokens; of what is longer than the model reads the beginning."""
    both = zip(prompts, responses, strict=True)
    sequences = [template.prompt_ids(tokenizer, p) + template.response_ids(tokenizer, r) for p, r in both]
    return [ids[: model.config.max_seq_len] for ids in sequences]


def ranking_accuracy(model: RewardModel, lists: Sequence[RankedList], size: int, device: str = "cpu") -> dict[str, Any]:
    """How often the order of scores is the order of ranks; equal scores count as wrong."""
    flat = score_rows(model, [s for one in lists for s in one.sequences], size, device).tolist()
    pairs = right = ends = ends_right = exact = whole = 0
    for one in lists:
        scores, flat = flat[: len(one.ranks)], flat[len(one.ranks) :]
        ranked = [(r, s) for r, s in zip(one.ranks, scores, strict=True) if r > 0]
        correct = [a > b for i, a in ranked for j, b in ranked if i < j]
        pairs, right = pairs + len(correct), right + sum(correct)
        if correct:
            best, worst = min(ranked)[0], max(ranked)[0]
            outer = [a > b for i, a in ranked if i == best for j, b in ranked if j == worst]
            ends, ends_right = ends + len(outer), ends_right + sum(outer)
            whole, exact = whole + 1, exact + all(correct)
    low, high = wilson(right, pairs)
    return {
        "accuracy": right / max(1, pairs),
        "accuracy_low": low,
        "accuracy_high": high,
        "best_worst_accuracy": ends_right / max(1, ends),
        "exact_order": exact / max(1, whole),
        "pairs": pairs,
    }


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a share k of n (Wilson 1927): (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    if n == 0:
        return 0.0, 1.0
    p, z = k / n, Z95
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


# ---- policy ---------------------------------------------------------------------------------------------------------


def examine(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    sampling: dict[str, Any],  # as `generate` takes it
    gold: Gold | None,
    *,
    seed: int,
    device: str = "cpu",
    impl: str = "auto",
) -> list[dict[str, Any]]:
    """One answer of the policy to each prompt: texts, score, KL to the reference in nats, length, gold if known."""
    records = []
    for first in range(0, len(prompts), AT_ONCE):
        part = prompts[first : first + AT_ONCE]
        ids, mask = left_padded(part, sampling["pad_token_id"], device)
        rngs = [generator(seed, "examine", 0, first + i) for i in range(len(part))]
        rows = [r for r in torch.arange(len(part)).tensor_split(dist.world_size()) if len(r)]
        rollout = collect(roles, ids, mask, partition=lambda _: rows, rng=rngs, impl=impl, **sampling)  # noqa: B023
        kl = exact_kl(roles, rollout, sampling.get("temperature", 1.0), impl).tolist()
        texts = rollout.texts(tokenizer)
        golds = gold(*texts, rollout.has_eos.tolist()) if gold else [None] * len(part)
        for i, (prompt, response) in enumerate(zip(*texts, strict=True)):
            record = {"prompt": prompt, "response": response, "score": float(rollout.scores[i]), "kl": kl[i],
                      "length": int(rollout.lengths[i]), "eos": bool(rollout.has_eos[i])}  # fmt: skip
            records.append(record | ({"gold": golds[i]} if gold else {}))
    return records


def summary(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over answers, the deviation of the scores, and the share of distinct answers."""
    n = len(records)
    known = [name for name in ("score", "kl", "length", "eos", "gold") if name in records[0]]
    mean: dict[str, float] = {name: sum(r[name] for r in records) / n for name in known}
    deviation = math.sqrt(sum((r["score"] - mean["score"]) ** 2 for r in records) / n)
    distinct = len({(r["prompt"], r["response"]) for r in records}) / n
    return {"answers": n, **mean, "score_std": deviation, "distinct_frac": distinct}


def frontier_share(before: float, after: float, kl: float) -> float:
    """The gain in mean gold as a share of what the built-in task's exact frontier gains at this KL, in nats."""
    return (after - before) / (review_world.frontier(kl) - review_world.frontier(0.0)) if kl > 0 else 0.0


@torch.no_grad()
def exact_kl(roles: Roles, rollout: Rollout, temperature: float, impl: str = "auto") -> Tensor:  # (B,)
    """Nats per answer: Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)) over the whole vocabulary, along the answer drawn."""
    own = dist.mine(torch.arange(len(rollout)))
    with roles.gathered(roles.policy, roles.ref_policy):
        found = _exact_kl(roles, rollout.rows(own), temperature, impl) if len(own) else rollout.scores[:0]
    return dist.all_rows(found, len(rollout))


def _exact_kl(roles: Roles, rollout: Rollout, temperature: float, impl: str) -> Tensor:  # (B,)
    both = rollout.input_ids, rollout.attention_mask
    R = rollout.responses.shape[1]
    states = (response_positions(model.hidden(*both), R).flatten(0, 1) for model in roles[:2])  # (B·R, C) each
    own, ref = (logit_factors(model.head, x) for model, x in zip(roles[:2], states, strict=True))
    targets = torch.where(rollout.response_mask, rollout.responses, IGNORE)  # (B, R)
    kl = head_stats(
        *own, targets.flatten(), temperature=temperature, impl=impl, want=("kl",), ref_hidden=ref[0], ref_weight=ref[1]
    ).kl
    assert kl is not None
    return kl.view_as(targets).sum(1)
