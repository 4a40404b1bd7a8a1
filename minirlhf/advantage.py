"""Advantages: how much better than expected was this token (GAE), or this answer among its siblings (group baselines).

Not here: whitening (`masked.whiten`) and rewards (`reward.shape_rewards`).
"""

import torch
from torch import Tensor

from minirlhf.masked import keep, masked_var


def gae(
    rewards: Tensor,  # (B, R) received after a_t
    values: Tensor,  # (B, R) V(s_t), before a_t
    mask: Tensor,  # (B, R) bool
    *,
    gamma: float,  # γ
    lam: float,  # λ
) -> tuple[Tensor, Tensor]:  # advantages, returns: (B, R) each, 0 where the mask is False
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ V_{t+1} - V_t,  Â_t = δ_t + γλ Â_{t+1},  returns = Â + V;  V = Â = 0 after the last token.
    t + 1 is the next True position: holes in the mask are skipped, not taken for states of value 0.
    """
    assert mask.ndim == 2, mask.shape
    rewards, values = keep(rewards, mask), keep(values, mask)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        columns.append(advantage)
    advantages = keep(torch.stack(columns[::-1], 1), mask)  # (B, R)
    return advantages, advantages + values


def group_advantages(
    scores: Tensor,  # (G, K) of K answers to each of G prompts
    *,
    kind: str,  # "mean" | "rloo" | "grpo"
) -> Tensor:  # (G, K)
    """A score against those of its siblings; all equal: exactly 0.

    mean: s - μ · rloo: s_i - mean of the others = (s - μ) K/(K-1) (Kool et al. 2019; Ahmadian et al. 2024, arXiv
    2402.14740) · grpo: (s - μ)/(σ + 1e-4), σ with ddof 1 (Shao et al. 2024, arXiv 2402.03300; TRL's eps).
    Raises ValueError for an unknown kind, and for fewer than 2 answers where the kind needs them.
    """
    assert scores.ndim == 2, scores.shape
    if kind not in ("mean", "rloo", "grpo"):
        raise ValueError(f"group_advantages: kind {kind!r} is none of mean, rloo, grpo")
    K = scores.shape[1]
    if kind != "mean" and K < 2:
        raise ValueError(f"group_advantages: {kind!r} compares answers and needs at least 2 per prompt, not {K}")
    s = scores.to(torch.promote_types(scores.dtype, torch.float32))
    centered = s - s.mean(1, keepdim=True)  # (G, K)
    centered = centered - centered.mean(1, keepdim=True)  # the rounding of the first mean taken out
    if kind == "rloo":
        return centered * (K / (K - 1))
    if kind == "grpo":
        return centered / (centered.std(1, correction=1, keepdim=True) + 1e-4)
    return centered


def explained_variance(
    values: Tensor,  # (B, R)
    returns: Tensor,  # (B, R)
    mask: Tensor,  # (B, R) bool
) -> Tensor:  # ()
    """1 - Var(R - V)/Var(R): 1 is a perfect critic, 0 one that knows the mean at best; no number where all returns
    agree: NaN, or -inf where the values do not."""
    values, returns = keep(values, mask), keep(returns, mask)
    return 1.0 - masked_var(returns - values, mask) / masked_var(returns, mask)
