"""Matrix products in fp32 on the CPU by oneDNN, the one of torch's libraries that uses AVX-512 on every processor.

torch itself gives fp32 products to MKL and only bf16 to oneDNN. On AMD processors MKL stays with AVX2, at half the rate
or less. Both sum in fp32 and differ in the order of the sums. `torch.backends.mkldnn.flags(enabled=False)` turns this
off; small products, other dtypes and other devices are torch's own anyway.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SMALLEST = 2**20  # multiplications; below, the call costs more than it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., n), (m, n), (m,) → (..., m)
    """F.linear: x Wᵀ + b."""
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _onednn(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:  # (n, k), (k, m) → (n, m) at least fp32
    """A matrix product without gradients, a rounded to the dtype of b; summed in fp32 at least, never rounded back."""
    if b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return _onednn(a, b.T, None) if _pays(a, b.T) else torch.mm(a, b)


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) >= SMALLEST
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (..., n), (m, n), (m,) → (..., m)
    """What torch.compile makes of F.linear."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b: dx = g W, dW = gᵀ x, db = Σ g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # (..., m)
        x, weight = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])  # (N, m)
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = product(flat, weight).view(x.shape) if need_x else None
        dw = product(flat.T, x.reshape(-1, x.shape[-1])) if need_weight else None
        return dx, dw, flat.sum(0) if need_bias else None
