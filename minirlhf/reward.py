"""From one score per answer to one reward per token; the controller of β; reward functions written by the user.

What goes wrong: the sign of the KL penalty, and the token that receives the score.
"""

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf.errors import NonFiniteError, UsageError
from minirlhf.masked import keep
from minirlhf.ops import kl_estimate

LARGEST = torch.finfo(torch.float32).max  # score
RewardFn = Callable[[Sequence[Any], Sequence[str]], list[float]]  # prompts (`Asked`), responses → scores


def shape_rewards(
    scores: Tensor,  # (B,) of whole answers
    logprobs: Tensor,  # (B, R) log π(a_t) of the rollout
    ref_logprobs: Tensor,  # (B, R)
    mask: Tensor,  # (B, R) bool
    *,
    kl_coef: float,  # β
    kl: str = "k1",  # any kind of `kl_estimate`
    score_at: str = "last",  # "last" | "next" | "column", see `score_column`
) -> Tensor:  # (B, R)
    """r_t = -β KL_t + [t = score's column] · score (Ziegler et al. 2019, arXiv 1909.08593, eq. 2).

    With k1 and reward-to-go this has the gradient of E[score] - β KL(π ‖ ref) over sequences; k2, k3 and abs in the
    reward do not. A row without any True gets no reward, whatever its score holds.
    """
    B, R = mask.shape
    assert scores.shape == (B,), (scores.shape, mask.shape)
    logprobs, ref_logprobs = keep(logprobs, mask), keep(ref_logprobs, mask)  # before exp
    penalty = -kl_coef * kl_estimate(logprobs, ref_logprobs, kl)  # (B, R) 0 where both are
    column = torch.arange(R, device=mask.device) == score_column(mask, score_at)[:, None]
    return penalty + keep(scores[:, None].expand(B, R), column & mask.any(1, keepdim=True))


def score_column(mask: Tensor, score_at: str) -> Tensor:  # (B, R) bool → (B,) int64
    """The column that receives the score.

    last: the last real token (TRL-legacy, OpenRLHF) · next: one later, if there is one (TRL v2, torchtune) · column:
    always the last one (OpenAI 2019). The last two may be padding: a GAE that shall see the score needs a mask with it.
    """
    if score_at not in ("last", "next", "column"):
        raise ValueError(f"score_at {score_at!r} is none of last, next, column")
    B, R = mask.shape
    if score_at == "column":
        return torch.full((B,), R - 1, device=mask.device)
    last = torch.where(mask, torch.arange(R, device=mask.device), 0).amax(1)  # (B,)
    return last if score_at == "last" else (last + 1).clamp(max=R - 1)


class FixedKL:
    """β stays what it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, n: int) -> None:
        """Nothing to do."""


class AdaptiveKL:
    """β ← β (1 + K_β clip(KL/target - 1, ±0.2)) (Ziegler et al. 2019, arXiv 1909.08593, section 2.2), with K_β = n/h as
    in their code; the paper has 0.1."""

    def __init__(
        self,
        coef: float,  # β to begin with
        *,
        target: float,  # nats per answer
        horizon: float,  # h, answers
    ) -> None:
        if target <= 0 or horizon <= 0:
            raise UsageError(f"adaptive KL: target {target} and horizon {horizon} must be positive")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(
        self,
        kl: float,  # mean over answers of Σ_t k1_t
        n: int,  # answers of the rollout, over all ranks
    ) -> None:
        """Raises UsageError where the horizon is so short that β would not stay positive."""
        kl = float(kl)
        if not math.isfinite(kl):
            raise NonFiniteError(f"adaptive KL: the KL of the rollout is {kl}")
        factor = 1.0 + max(-0.2, min(0.2, kl / self.target - 1.0)) * n / self.horizon
        if factor <= 0:
            raise UsageError(
                f"adaptive KL: horizon {self.horizon} is too short for {n} answers; take more than {n / 5:g}"
            )
        self.coef *= factor


def load_reward_fn(name: str, *, key: str = "reward.fn") -> RewardFn:
    """The function that `module:function` names, found on the path or in the current folder; every call is checked.
    `human` asks a person. `key` is the setting that errors speak of.

    Raises UsageError.
    """
    name = "minirlhf.human:reward" if name == "human" else name
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"{key} {name!r} is not module:function")
    try:
        with _current_folder():
            module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"{key} {name!r}: importing {module_name} failed: {_said(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"{key} {name!r}: {module_name} has no function {function_name}")

    def checked(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        try:
            scores = [float(score) for score in function(prompts, responses)]
        except Exception as error:
            raise UsageError(f"{key} {name!r} failed: {_said(error)}") from error
        if len(scores) != len(responses):
            raise UsageError(f"{key} {name!r} returned {len(scores)} scores for {len(responses)} responses")
        if not all(abs(score) <= LARGEST for score in scores):
            bad = next(i for i, score in enumerate(scores) if not abs(score) <= LARGEST)
            raise UsageError(f"{key} {name!r} returned {scores[bad]} for response {bad}: {responses[bad]!r}")
        return scores

    return checked


@contextlib.contextmanager
def _current_folder():
    """The current folder on the import path, for as long as the block runs."""
    before = list(sys.path)
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path[:] = before


def _said(error: Exception) -> str:
    """One line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
