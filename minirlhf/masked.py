"""Sum, mean, variance and whitening over the True entries of a mask.

Not here: any choice of what counts. What goes wrong: multiplying by a mask, where one NaN in the padding makes the sum
NaN, and exp of padding, whose gradient is NaN even when the result is thrown away; `torch.where` on x prevents both.
"""

from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]  # a sum over ranks, such as `dist.all_sum`


def _alone(x: Tensor) -> Tensor:
    """The sum over ranks of one process."""
    return x


def keep(
    x: Tensor,  # any shape
    mask: Tensor,  # of x, bool
) -> Tensor:  # of x, at least fp32
    """x where the mask is True, 0 elsewhere: no value and no gradient passes a False."""
    assert x.shape == mask.shape, (x.shape, mask.shape)
    assert mask.dtype == torch.bool, mask.dtype
    return torch.where(mask, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:  # (...), (...) bool → ()
    """Σ x over the True entries; 0 where there is none."""
    return keep(x, mask).sum()


def masked_mean(
    x: Tensor,  # (...)
    mask: Tensor,  # (...) bool
    *,
    count: Tensor | float | None = None,  # the divisor: True entries of the whole optimizer step; None: of this mask
) -> Tensor:  # ()
    """Σ x / count, over the True entries. A mean of microbatch means is wrong; a sum of sums over one count is right.

    Raises ValueError where the count is 0: a mean of nothing is neither 0 nor NaN.
    """
    n = mask.sum() if count is None else count
    if n == 0:
        raise ValueError("masked_mean: nothing to average, the count of True entries is 0")
    return masked_sum(x, mask) / n


def masked_var(x: Tensor, mask: Tensor, *, ddof: int = 0) -> Tensor:  # (...), (...) bool → ()
    """Σ (x - μ)² / (n - ddof) over the n True entries. Raises ValueError unless n > ddof."""
    _, centered, n = _centered(x, mask, _alone)
    if n <= ddof:
        raise ValueError(f"masked_var: {int(n)} True entries are too few for ddof {ddof}")
    return centered.square().sum() / (n - ddof)


def whiten(
    x: Tensor,  # (...)
    mask: Tensor,  # (...) bool
    *,
    center: bool = True,
    ddof: int = 0,
    eps: float = 1e-8,
    all_sum: AllSum = _alone,  # statistics over the True entries of all ranks
) -> Tensor:  # (...) 0 where the mask is False
    """(x - μ)/√(var + eps), and + μ again unless `center` (OpenAI lm-human-preferences 2019, there over padding too).

    TRL divides by n - 1 (ddof 1); torchtune has the meaning of `center` inverted. Raises ValueError unless n > ddof,
    except that without any True entry and with ddof 0 there is nothing to do.
    """
    mean, centered, n = _centered(x, mask, all_sum)
    if n <= ddof and ddof > 0:
        raise ValueError(f"whiten: {int(n)} True entries are too few for ddof {ddof}")
    var = all_sum(centered.square().sum()) / (n - ddof).clamp(min=1)  # ()
    white = centered * torch.rsqrt(var + eps)
    return white if center else keep(white + mean, mask)


def _centered(x: Tensor, mask: Tensor, all_sum: AllSum) -> tuple[Tensor, Tensor, Tensor]:
    """→ μ (), x - μ (...) with 0 at False, and n (). The second pass takes the rounding of the first out of μ, so that
    equal entries give exact zeros."""
    x, n = keep(x, mask), all_sum(mask.sum())
    mean = all_sum(x.sum()) / n  # of nothing NaN, which `keep` lets reach nobody
    mean = mean + all_sum(keep(x - mean, mask).sum()) / n
    return mean, keep(x - mean, mask), n
