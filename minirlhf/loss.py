"""Every loss, one number per token, pair or list, unreduced: the caller sums over what counts and divides once.

What goes wrong: reducing here. The mean of two microbatches' means gives a token more weight where tokens are few.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minirlhf.masked import keep

ClipRange = float | Sequence[float]  # ε on both sides of 1, or (ε_low, ε_high)

# ---- PPO, per token -------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor,  # (B, R) log π_θ(a_t), requires grad
    old_logprobs: Tensor,  # (B, R) of the rollout
    advantages: Tensor,  # (B, R) Â_t
    *,
    clip_range: ClipRange,  # ε, or (ε_low, ε_high)
) -> Tensor:  # (B, R)
    """Clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), negated.

    L_t = -min(ρ_t Â_t, clip(ρ_t, 1 - ε, 1 + ε) Â_t),  ρ_t = exp(log π_θ(a_t) - log π_old(a_t)).
    ε_high > ε_low lets unlikely tokens grow further (Yu et al. 2025, DAPO, arXiv 2503.14476, section 3.1): for a policy
    whose entropy collapses.
    """
    formula = partial(_clipped_surrogate, clip_range=clip_range)
    return _per_token(formula, logprobs, old_logprobs, advantages)


def _clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, A: Tensor, clip_range: ClipRange) -> Tensor:  # (B, R)
    ratio, (low, high) = torch.exp(logprobs - old_logprobs), _bounds(clip_range)
    return -torch.minimum(ratio * A, ratio.clamp(low, high) * A)


def dual_clip_loss(
    logprobs: Tensor,  # (B, R)
    old_logprobs: Tensor,  # (B, R)
    advantages: Tensor,  # (B, R)
    *,
    clip_range: ClipRange,  # ε, or (ε_low, ε_high)
    dual_clip: float = 3.0,  # c > 1
) -> Tensor:  # (B, R)
    """`policy_loss`, but never above c|Â| where Â < 0 (Ye et al. 2020, arXiv 1912.09729, eq. 5), negated: for rollouts
    that are many updates old, where one exploding ρ would rule the step."""

    def formula(logprobs: Tensor, old_logprobs: Tensor, A: Tensor) -> Tensor:
        loss = _clipped_surrogate(logprobs, old_logprobs, A, clip_range)
        return torch.where(A < 0, torch.minimum(loss, -dual_clip * A), loss)

    return _per_token(formula, logprobs, old_logprobs, advantages)


def sequence_policy_loss(
    logprobs: Tensor,  # (B, R)
    old_logprobs: Tensor,  # (B, R)
    advantages: Tensor,  # (B, R), the same at every token of an answer
    mask: Tensor,  # (B, R) bool
    *,
    clip_range: ClipRange,  # ε, or (ε_low, ε_high)
) -> Tensor:  # (B, R), the same at every token of an answer
    """`policy_loss` with one ratio for a whole answer, s = (π_θ(answer)/π_old(answer))^(1/|answer|) (Zheng et al. 2025,
    GSPO, arXiv 2507.18071, eq. 5 and 7), negated: where single tokens' ratios are noise, as under mixtures of experts.
    """
    log_s = sequence_log_ratio(logprobs, old_logprobs, mask)
    return policy_loss(log_s, torch.zeros_like(log_s), keep(_wide(advantages), mask), clip_range=clip_range)


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:  # (B, R) each → (B, R)
    """log s of `sequence_policy_loss`, at every token of an answer."""
    gap = keep(_wide(logprobs), mask) - keep(_wide(old_logprobs), mask)
    log_s = gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    return keep(log_s.expand_as(gap), mask)


def cispo_loss(
    logprobs: Tensor,  # (B, R)
    old_logprobs: Tensor,  # (B, R)
    advantages: Tensor,  # (B, R)
    *,
    clip_range: ClipRange,  # ε, or (ε_low, ε_high)
) -> Tensor:  # (B, R)
    """-sg[clip(ρ, 1 - ε_low, 1 + ε_high)] Â log π_θ (MiniMax 2025, arXiv 2506.13585, eq. 4): the weight is clipped, not
    the gradient, so that rare tokens of a good answer keep learning over many epochs."""
    low, high = _bounds(clip_range)

    def formula(logprobs: Tensor, old_logprobs: Tensor, A: Tensor) -> Tensor:
        ratio = torch.exp(logprobs - old_logprobs).detach()
        return -ratio.clamp(low, high) * A * logprobs

    return _per_token(formula, logprobs, old_logprobs, advantages)


def is_clipped(
    logprobs: Tensor,  # (B, R)
    old_logprobs: Tensor,  # (B, R)
    advantages: Tensor,  # (B, R)
    *,
    clip_range: ClipRange,  # ε, or (ε_low, ε_high)
) -> Tensor:  # (B, R) bool
    """Where the clip changes the loss, clip(ρ)Â < ρÂ, as OpenAI 2019 and TRL count; Â = 0 is never clipped.

    CleanRL counts |ρ - 1| > ε, which includes clips without effect.
    """
    logprobs, old_logprobs, A = (_wide(x) for x in (logprobs, old_logprobs, advantages))
    ratio, (low, high) = torch.exp(logprobs - old_logprobs), _bounds(clip_range)
    return ratio.clamp(low, high) * A < ratio * A


def value_loss(
    values: Tensor,  # (B, R) V_θ(s_t), requires grad
    old_values: Tensor,  # (B, R) V of the rollout
    returns: Tensor,  # (B, R) Â + V of the rollout
    *,
    clip_range: float | None = None,  # ε_v; None: no clipping
) -> Tensor:  # (B, R)
    """Half squared error (Schulman et al. 2017, arXiv 1707.06347, eq. 9, there without the ½), optionally clipped.

    L_t = ½ max((V - R)², (V_old + clip(V - V_old, ±ε_v) - R)²); the clip is from OpenAI baselines, not from the paper,
    and questioned by Engstrom et al. 2020 (arXiv 2005.12729).
    """

    def formula(values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        loss = (values - returns).square()
        if clip_range is not None:
            near = old_values + (values - old_values).clamp(-clip_range, clip_range)
            loss = torch.maximum(loss, (near - returns).square())
        return 0.5 * loss

    return _per_token(formula, values, old_values, returns)


def _bounds(clip_range: ClipRange) -> tuple[float, float]:
    """The least and the largest ratio."""
    low, high = (clip_range, clip_range) if isinstance(clip_range, float | int) else clip_range
    return 1 - low, 1 + high


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_token(formula: Callable[..., Tensor], *inputs: Tensor) -> Tensor:  # (B, R) each → (B, R)
    assert len({x.shape for x in inputs}) == 1, [x.shape for x in inputs]
    wide = [_wide(x) for x in inputs]
    return _PerToken.apply(formula, *wide) if torch.is_grad_enabled() else formula(*wide)


class _PerToken(torch.autograd.Function):
    """An elementwise formula whose gradient is 0 where the upstream gradient is 0.

    A mask can be applied only to the finished loss, and 0 · NaN would carry whatever padding holds into the gradient.
    """

    @staticmethod
    def forward(ctx: Any, formula: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Loss, and its slope with respect to each input."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            loss = formula(*leaves)
            slopes = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        ctx.save_for_backward(*slopes)
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Upstream times slope."""
        return None, *(torch.where(upstream == 0, 0.0, upstream * slope) for slope in ctx.saved_tensors)


# ---- imitation, per token -------------------------------------------------------------------------------------------


def imitation_loss(
    logprobs: Tensor,  # (B, R) log π(a_t)
    weights: Tensor,  # (B, R) w; below 0: to be unlearnt
) -> Tensor:  # (B, R)
    """-w log π(a_t) where w ≥ 0; -|w| log(1 - π(a_t)) where w < 0 (Welleck et al. 2019, arXiv 1908.04319, eq. 4)."""

    def formula(logprobs: Tensor, w: Tensor) -> Tensor:
        below = logprobs + (logprobs.clamp(max=-1e-6) - logprobs).detach()  # π < 1, and the slope where it is cut
        unlikely = torch.log(-torch.expm1(below))  # log(1 - π)
        return torch.where(w < 0, w * unlikely, -w * logprobs)

    return _per_token(formula, logprobs, weights)


# ---- reward model, per pair or list ---------------------------------------------------------------------------------


def pairwise_loss(
    chosen: Tensor,  # (B,) r_w
    rejected: Tensor,  # (B,) r_l
    *,
    margin: Tensor | float = 0.0,  # (B,) or one for all
) -> Tensor:  # (B,)
    """-log σ(r_w - r_l - margin) (Bradley, Terry 1952; Stiennon et al. 2020, arXiv 2009.01325, section 3.4; the margin:
    Touvron et al. 2023, arXiv 2307.09288, eq. 2). Bai et al. 2022 write the same as log(1 + e^(r_l - r_w)).
    """
    assert chosen.shape == rejected.shape, (chosen.shape, rejected.shape)
    assert not isinstance(margin, Tensor) or margin.shape in ((), chosen.shape), (margin.shape, chosen.shape)
    return -F.logsigmoid(_wide(chosen) - _wide(rejected) - margin)


def ranking_loss(
    scores: Tensor,  # (B, K) r
    ranks: Tensor,  # (B, K) int, 1 = best, equal = tied, 0 = absent
    *,
    kind: str = "log",  # "log" | "sigmoid" | "softmax"
    margin: Tensor | float = 0.0,  # (B, K, K), [b, i, j] for i ranked above j, or one for all pairs; not for softmax
) -> Tensor:  # (B,)
    """Loss of lists of K answers; a list without a strict pair gives 0 and no gradient.

    log: -mean of log σ(r_i - r_j - margin) over the pairs with i above j (Ouyang et al. 2022, arXiv 2203.02155, eq. 1,
    whose C(K,2) is the number of pairs without ties; the margin as in `pairwise_loss`) · sigmoid: -mean of the same σ,
    a variant in circulation, never above 0 · softmax: -log of the best answer's share among the present (Ziegler et al.
    2019, arXiv 1909.08593, eq. 1); the mean over tied best.
    """
    if kind not in ("log", "sigmoid", "softmax"):
        raise ValueError(f"ranking_loss: kind {kind!r} is none of log, sigmoid, softmax")
    pairs, n = _strict_pairs(scores, ranks)  # (B, K, K), (B,)
    assert not isinstance(margin, Tensor) or margin.ndim in (0, 3), (margin.shape, pairs.shape)
    present = ranks > 0  # (B, K)
    r = torch.where(present, _wide(scores), 0.0)
    if kind == "softmax":
        lowest = torch.finfo(r.dtype).min
        share = torch.where(present, r, lowest).log_softmax(1)  # (B, K)
        order = torch.where(present, ranks, ranks.amax(1, keepdim=True) + 1)
        best = present & (order == order.amin(1, keepdim=True))  # (B, K)
        loss = -torch.where(best, share, 0.0).sum(1) / best.sum(1).clamp(min=1)
        return torch.where(n > 0, loss, 0.0)
    gap = r[:, :, None] - r[:, None, :] - margin  # (B, K, K) r_i - r_j - margin
    loss = F.logsigmoid(gap) if kind == "log" else torch.sigmoid(gap)
    return -torch.where(pairs, loss, 0.0).sum((1, 2)) / n.clamp(min=1)


def centering_penalty(
    scores: Tensor,  # (B, K)
    ranks: Tensor,  # (B, K) as in `ranking_loss`
) -> Tensor:  # (B,)
    """(r_w + r_l)², which draws scores to mean 0 (Eisenstein et al. 2023, arXiv 2312.09244); the mean over the strict
    pairs of a list, 0 without one."""
    pairs, n = _strict_pairs(scores, ranks)
    r = _wide(scores)
    total = torch.where(pairs, r[:, :, None] + r[:, None, :], 0.0)  # (B, K, K)
    return total.square().sum((1, 2)) / n.clamp(min=1)


def _strict_pairs(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:  # (B, K) each → (B, K, K) bool, (B,)
    """[b, i, j]: answers i and j are both present and i is ranked above j; and how many such pairs a list has."""
    assert scores.shape == ranks.shape, (scores.shape, ranks.shape)
    assert scores.ndim == 2, scores.shape
    i, j = ranks[:, :, None], ranks[:, None, :]
    pairs = (i > 0) & (i < j)
    return pairs, pairs.sum((1, 2))


def direct_score_loss(scores: Tensor, labels: Tensor) -> Tensor:  # any shape, the same in [0, 1] → the same
    """(σ(s) - label)², for answers that were graded one by one (OpenAI 2019's scalar rating, there without σ)."""
    assert scores.shape == labels.shape, (scores.shape, labels.shape)
    return (torch.sigmoid(_wide(scores)) - labels).square()


def dpo_loss(
    policy_chosen: Tensor,  # (B,) Σ_t log π(a_t) of the better answer
    policy_rejected: Tensor,  # (B,) of the worse
    ref_chosen: Tensor,  # (B,)
    ref_rejected: Tensor,  # (B,)
    *,
    beta: float,  # β
) -> Tensor:  # (B,)
    """-log σ(β [(π_w - ref_w) - (π_l - ref_l)]) of log-probs summed over the answer (Rafailov et al. 2023, arXiv
    2305.18290, eq. 7)."""
    sizes = [x.shape for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    assert len(set(sizes)) == 1, sizes
    chosen = beta * (_wide(policy_chosen) - _wide(ref_chosen))
    rejected = beta * (_wide(policy_rejected) - _wide(ref_rejected))
    return pairwise_loss(chosen, rejected)
