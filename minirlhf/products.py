"""Matrix products in fp32 on the CPU, by the faster of the two libraries that come with torch.

torch itself gives fp32 products to MKL and only bf16 to oneDNN. On AMD processors MKL stays with AVX2, at half the rate
of oneDNN's AVX-512 or less, so that oneDNN takes them here; on Intel processors MKL is the faster one and keeps them.
Both sum in fp32 and differ in the order of the sums. `torch.backends.mkldnn.flags(enabled=False)` leaves all to MKL;
small products, other dtypes and other devices are torch's own anyway.
"""

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Ready = Callable[[Tensor], Tensor]  # x (..., n) → (..., m), a layer prepared for many calls

SMALLEST = 2**20  # multiplications; below, the call costs more than it saves
LOGITS_BY_FP32 = ("cpu",)  # devices on which a bf16 run multiplies them in fp32; an H100 is 15 times slower at that
PACKED = (torch.float32, torch.bfloat16)


def gelu_tanh(x: Tensor) -> Tensor:  # same shape
    """GELU with a tanh in the place of the error function (Hendrycks, Gimpel 2016, arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


BARE: tuple[str, list[float], str] = ("none", [], "")
FUSED: list[tuple[Ready, tuple[str, list[float], str]]] = [  # what oneDNN can do within a product, in its words
    (F.relu, ("relu", [], "")),
    (F.silu, ("swish", [], "")),
    (F.gelu, ("gelu", [], "none")),
    (gelu_tanh, ("gelu", [], "tanh")),
]


def intel(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether it is Intel's processor, for which MKL is made."""
    words = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in words


BY_MKL = intel()

# glibc gives freed memory back to the system and takes it anew page by page, which small models feel. One freed block
# of the largest size that it learns from, never written to, and it keeps up to 64 MiB (man mallopt, M_MMAP_THRESHOLD).
torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def linear(
    x: Tensor,  # (..., n)
    weight: Tensor,  # (m, n)
    bias: Tensor | None = None,  # (m,)
    *,
    alike: bool = False,  # an output does not depend on how many others there are: by oneDNN at any size
) -> Tensor:  # (..., m)
    """F.linear: x Wᵀ + b."""
    if not _pays(x, weight, alike=alike) or (bias is not None and bias.shape != weight.shape[:1]):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _onednn(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:  # (n, k), (k, m) → (n, m) at least fp32
    """A matrix product without gradients, a rounded to the dtype of b; summed in fp32 at least, never rounded back."""
    if b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return _onednn(a, b.T, None) if _pays(a, b.T) else torch.mm(a, b)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast off, where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def factor_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """In which dtype products take numbers of this one: autocast, where it is on, rounds fp32."""
    on = dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else dtype


def as_factor(x: Tensor) -> Tensor:
    """The x that products take."""
    return x.to(factor_dtype(x.dtype, x.device.type))


def as_logit_factor(x: Tensor) -> Tensor:
    """The x that products take whose results are logits: as it is on a CPU, rounded where fp32 is far slower."""
    return x if x.device.type in LOGITS_BY_FP32 else as_factor(x)


def packed(
    weight: Tensor,  # (m, n)
    bias: Tensor | None,  # (m,)
    dtype: torch.dtype,
    rows: int,
    act: Ready | None = None,
) -> Ready | None:
    """x Wᵀ + b, or `act` of it, in this dtype, with a copy of the weight in the library's own layout: for many
    products with about so many rows and without gradients.

    Otherwise each product brings the weight into that layout anew. None: does not pay here.
    """
    if weight.device.type != "cpu" or dtype not in PACKED or rows * weight.numel() < SMALLEST or not _enabled():
        return None
    weight = weight.detach().to(dtype).contiguous()
    bias = None if bias is None else bias.detach().to(dtype).contiguous()
    if BY_MKL and dtype == torch.float32:  # for exactly so many rows; with others MKL takes the weight as it is
        by_mkl, w = torch.ops.mkl._mkl_linear.default, torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return after(lambda x: by_mkl(x if x.dtype == dtype else x.to(dtype), w, weight, bias, rows), act)
    call, w = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    how = next((words for known, words in FUSED if known is act), None)
    ready = lambda x: call(x if x.dtype == dtype else x.to(dtype), w, bias, *(how or BARE))  # noqa: E731
    return ready if how else after(ready, act)


def after(layer: Ready, act: Ready | None) -> Ready:
    """The activation of a layer's result."""
    return layer if act is None else lambda x: act(layer(x))


def _enabled() -> bool:
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def _pays(x: Tensor, weight: Tensor, *, alike: bool = False) -> bool:
    size = x.numel() * weight.shape[0]
    return (
        (size > 0 if alike else size >= SMALLEST and not BY_MKL)
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1:] == weight.shape[1:]  # else torch says more clearly what does not fit
        and x.device.type == "cpu"
        and _enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # as in `linear`
    """What torch.compile makes of F.linear; it takes no notice of a bias's strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None if bias is None else bias.contiguous(), *BARE)


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
