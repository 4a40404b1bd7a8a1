"""Matrix products in fp32 on the CPU by oneDNN, the one of torch's libraries that uses AVX-512 on every processor.

torch itself gives fp32 products to MKL and only bf16 to oneDNN. On AMD processors MKL stays with AVX2, at half the rate
or less. Both sum in fp32 and differ in the order of the sums. `torch.backends.mkldnn.flags(enabled=False)` turns this
off; small products, other dtypes and other devices are torch's own anyway.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Ready = Callable[[Tensor], Tensor]  # x (..., n) → (..., m), a layer prepared for many calls

SMALLEST = 2**20  # multiplications; below, the call costs more than it saves
PACKED = (torch.float32, torch.bfloat16)
ACTIVATIONS: dict[str, tuple[str, list[float], str]] = {
    "": ("none", [], ""), "relu": ("relu", [], ""), "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh"),
}  # fmt: skip

# glibc gives freed memory back to the system and takes it anew page by page, which small models feel. One freed block
# of the largest size that it learns from, never written to, and it keeps up to 64 MiB (man mallopt, M_MMAP_THRESHOLD).
torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def linear(
    x: Tensor,  # (..., n)
    weight: Tensor,  # (m, n)
    bias: Tensor | None = None,  # (m,)
    *,
    smallest: int | None = None,  # multiplications that oneDNN is worth; None: SMALLEST
) -> Tensor:  # (..., m)
    """F.linear: x Wᵀ + b."""
    if not _pays(x, weight, SMALLEST if smallest is None else smallest):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _onednn(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:  # (n, k), (k, m) → (n, m) at least fp32
    """A matrix product without gradients, a rounded to the dtype of b; summed in fp32 at least, never rounded back."""
    if b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return _onednn(a, b.T, None) if _pays(a, b.T, SMALLEST) else torch.mm(a, b)


def packed(
    weight: Tensor,  # (m, n)
    bias: Tensor | None,  # (m,)
    dtype: torch.dtype,
    rows: int,
    activation: str = "",  # of ACTIVATIONS
) -> Ready | None:
    """The activation of x Wᵀ + b in one call, in this dtype, with a copy of the weight in oneDNN's own layout: for many
    products with about so many rows and without gradients.

    Otherwise each product brings the weight into that layout anew. The bits of the result are the same. None: does not
    pay here.
    """
    if weight.device.type != "cpu" or dtype not in PACKED or rows * weight.numel() < SMALLEST or not _enabled():
        return None
    w = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), rows)
    b = None if bias is None else bias.detach().to(dtype)
    call, how = torch.ops.mkldnn._linear_pointwise.default, ACTIVATIONS[activation]
    return lambda x: call(x if x.dtype == dtype else x.to(dtype), w, b, *how)


def _enabled() -> bool:
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def _pays(x: Tensor, weight: Tensor, smallest: int) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) >= smallest
        and _enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:  # as in `packed`
    """What torch.compile makes of F.linear."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *ACTIVATIONS[activation])


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
