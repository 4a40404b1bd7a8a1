"""What a model says about tokens: log-probs, entropy, log-sum-exp, KL; the formulas, and the one switch to Triton.

What goes wrong: logits rounded to bf16 before the log-sum-exp (6 % of ratio noise), one temperature in sampling and
another in training, and the (N, V) logits themselves, which are larger than everything else together.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BUDGET = 256 * 2**20  # bytes of fp32 logits that `head_stats` holds at once


def token_logprobs(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...) int64
    *,
    temperature: float = 1.0,  # τ
) -> Tensor:  # (...) at least fp32
    """log p_a = z_a - log Σ e^z with z = logits/τ."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return z.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def kl_estimate(
    logprobs: Tensor,  # (...) log π(a), a drawn from π
    ref_logprobs: Tensor,  # (...) log π_ref(a)
    kind: str,  # "k1" | "k2" | "k3" | "abs"
) -> Tensor:  # (...)
    """Estimates of KL(π ‖ π_ref) from one sample (Schulman 2020, "Approximating KL divergence"), x = log π - log π_ref.

    k1 = x · k2 = x²/2 · k3 = e^(-x) - 1 + x · abs = |x|, which is no KL. k1 and k3 are unbiased, k2 and k3 never
    negative. Raises ValueError for another kind.
    """
    wide = torch.promote_types(torch.promote_types(logprobs.dtype, ref_logprobs.dtype), torch.float32)
    x = logprobs.to(wide) - ref_logprobs.to(wide)
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return torch.expm1(-x) + x
    if kind == "abs":
        return x.abs()
    raise ValueError(f"kl_estimate: kind {kind!r} is none of k1, k2, k3, abs")


class HeadStats(NamedTuple):
    """Per row, (N,) each, at least fp32; None: not asked for."""

    logprobs: Tensor | None  # log p_a
    entropy: Tensor | None  # -Σ p log p
    lse: Tensor | None  # log Σ e^z
    kl: Tensor | None  # Σ p (log p - log q), q the reference


def head_stats(  # noqa: PLR0913  (the output layer with everything that belongs to it)
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (V, C)
    targets: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,  # τ
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,  # (N, C'), for "kl"
    ref_weight: Tensor | None = None,  # (V, C'); None: `weight`
    want: tuple[str, ...] = ("logprobs",),  # fields of HeadStats
    ignore_index: int = -100,  # rows with this target give 0 and no gradient
    impl: str = "auto",  # "auto" | "torch" | "triton"
) -> HeadStats:
    """Statistics of softmax(z) per row, without ever holding the (N, V) logits.

    u = W h + b,  z = softcap·tanh(u/softcap)/τ,  log p = z - log Σ e^z. The reference: the same softcap and τ, no bias,
    no gradient. Differentiable in hidden, weight and bias. "auto" is Triton on CUDA where it is installed, else torch.

    Raises ValueError for a wrong `want` or `impl`, RuntimeError where Triton is asked for and cannot run.
    """
    N, C = hidden.shape
    assert weight.shape[1:] == (C,), (hidden.shape, weight.shape)
    assert targets.shape == (N,), (hidden.shape, targets.shape)
    if not want or not set(want) <= set(HeadStats._fields):
        raise ValueError(f"head_stats: want {tuple(want)} must name some of {', '.join(HeadStats._fields)}")
    if "kl" in want and ref_hidden is None:
        raise ValueError("head_stats: kl needs ref_hidden")
    body = _choose(impl, hidden)
    kept = (targets != ignore_index).nonzero()[:, 0]  # (n,) often less than half of the rows
    if "kl" in want and ref_hidden is not None:
        ref_weight = (weight if ref_weight is None else ref_weight).detach()  # (V, C')
        assert ref_hidden.shape == (N, ref_weight.shape[1]), (ref_hidden.shape, ref_weight.shape)
        assert len(ref_weight) == len(weight), (ref_weight.shape, weight.shape)
        ref_hidden = ref_hidden.detach().index_select(0, kept)  # (n, C')
    else:
        ref_hidden, ref_weight = None, None
    with torch.autocast(hidden.device.type, enabled=False):
        stats = body(
            hidden.index_select(0, kept), weight, targets.index_select(0, kept), bias=bias, temperature=temperature,
            softcap=softcap, ref_hidden=ref_hidden, ref_weight=ref_weight, want=tuple(want),
        )  # fmt: skip
        return HeadStats(*(x if x is None else x.new_zeros(N).index_copy(0, kept, x) for x in stats))


def _choose(impl: str, hidden: Tensor) -> Any:
    """The body of `head_stats`. Both take its arguments, less `impl` and without ignored rows, and give 4 results."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"head_stats: impl {impl!r} is none of auto, torch, triton")
    installed = importlib.util.find_spec("triton") is not None
    if impl == "torch" or (impl == "auto" and not (hidden.is_cuda and installed and hidden.dtype != torch.float64)):
        return _head_stats_torch
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("impl='triton' needs tensors on a CUDA device, or TRITON_INTERPRET=1; else use impl='torch'")
    if not installed:
        raise RuntimeError("impl='triton' needs the package triton: pip install triton; else use impl='torch'")
    try:
        return importlib.import_module("minirlhf.kernels.head").head_stats_triton
    except ModuleNotFoundError as error:
        raise RuntimeError(f"impl='triton' cannot load the kernels: {error}; else use impl='torch'") from error


# ---- the torch tier -------------------------------------------------------------------------------------------------


def _head_stats_torch(  # noqa: PLR0913  (as `head_stats`)
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (V, C)
    targets: Tensor,  # (N,)
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    want: tuple[str, ...],
) -> tuple[Tensor | None, ...]:  # the fields of HeadStats, (N,) each
    """A chunk of rows at a time; the backward pass makes each chunk's logits again, unless the weight is frozen."""
    hidden, weight = _factors(hidden, weight)
    if ref_hidden is not None and ref_weight is not None:
        ref_hidden, ref_weight = _factors(ref_hidden, ref_weight)
    plan = _Plan(want, temperature, softcap, torch.is_grad_enabled())
    return _Head.apply(hidden, weight, bias, targets, ref_hidden, ref_weight, plan)


class _Plan(NamedTuple):
    want: tuple[str, ...]
    temperature: float
    softcap: float | None
    grad: bool  # a backward pass may come


class _Chunk(NamedTuple):
    """What n rows hold while they are worked on."""

    targets: Tensor  # (n,)
    logp: Tensor  # (n, V)
    bend: Tensor | None  # (n, V) dv/du = 1 - (v/softcap)²; None without softcap
    gap: Any  # (n, V) log p - log q; None unless kl is wanted
    stats: dict[str, Tensor]  # (n,) each


class _Head(torch.autograd.Function):
    """With upstream gradients A (logprobs), E (entropy), S (lse), K (kl), per row:

    dz_i = p_i [-A + S - E (log p_i + H) + K (log p_i - log q_i - kl)] + A·1[i = a]
    du = dz (1 - (v/softcap)²)/τ,  dh = du W,  dW = duᵀ h,  db = Σ du

    Frozen weight: dh for A = 1, for E = 1, ... is made in the forward pass, which is then the only one.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        """Statistics; with a frozen weight also the slopes d statistic/d hidden."""
        *inputs, plan = args
        hidden, weight = inputs[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, *need_others = (plan.grad and need for need in ctx.needs_input_grad[:3])
        ctx.frozen = need_hidden and not any(need_others)
        out = {name: hidden.new_empty(len(hidden), dtype=dtype) for name in plan.want}
        slopes = {name: hidden.new_empty(hidden.shape, dtype=dtype) for name in plan.want if ctx.frozen}
        for rows in _row_chunks(len(hidden), len(weight)):
            chunk = _chunk(rows, inputs, plan)
            for name in plan.want:
                out[name][rows] = chunk.stats[name]
            for name, slope in slopes.items():
                slope[rows] = _product(_logit_gradient(chunk, {name: torch.ones_like(out[name][rows])}, plan), weight)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(*(slopes.values() if ctx.frozen else inputs))
        return tuple(out.get(name) for name in HeadStats._fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, at least fp32; autograd rounds them to the dtype of the inputs."""
        given = {name: g for name, g in zip(HeadStats._fields, upstream, strict=True) if g is not None}
        if not given:
            return (None,) * 7
        if ctx.frozen:
            slopes = dict(zip(ctx.plan.want, ctx.saved_tensors, strict=True))
            return sum(g[:, None] * slopes[name] for name, g in given.items()), *(None,) * 6
        inputs = ctx.saved_tensors
        hidden, weight, bias = inputs[:3]
        dtype, (need_hidden, need_weight, need_bias) = next(iter(given.values())).dtype, ctx.needs_input_grad[:3]
        dh = torch.empty_like(hidden, dtype=dtype) if need_hidden else None
        dw = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        db = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        for rows in _row_chunks(len(hidden), len(weight)):
            chunk = _chunk(rows, inputs, ctx.plan)
            du = _logit_gradient(chunk, {name: g[rows] for name, g in given.items()}, ctx.plan)  # (n, V)
            if dh is not None:
                dh[rows] = _product(du, weight)
            if dw is not None:
                dw += _product(du.T, hidden[rows])
            if db is not None:
                db += du.sum(0)
        return dh, dw, db, *(None,) * 4


def _row_chunks(N: int, V: int) -> Iterator[slice]:
    """Rows within the budget, but no fewer than 256, which would starve the product; and never all rows in one."""
    size = max(1, min(max(BUDGET // (4 * V), 256), -(-N // 4)))
    return (slice(start, start + size) for start in range(0, N, size))


def _chunk(rows: slice, inputs: Sequence[Any], plan: _Plan) -> _Chunk:
    """Log-probs and statistics of some rows."""
    hidden, weight, bias, targets, ref_hidden, ref_weight = inputs
    logp, lse, bend = _log_softmax(hidden[rows], weight, bias, plan)
    stats, gap = {"lse": lse, "logprobs": logp.gather(1, targets[rows][:, None])[:, 0]}, None
    if "entropy" in plan.want:
        stats["entropy"] = -(logp.exp() * logp).sum(1)
    if "kl" in plan.want:
        gap = logp - _log_softmax(ref_hidden[rows], ref_weight, None, plan)[0]  # (n, V)
        stats["kl"] = (logp.exp() * gap).sum(1)
    return _Chunk(targets[rows], logp, bend, gap, stats)


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor, Any]:
    """(n, C), (V, C) → log p (n, V), lse (n,), bend. The maximum goes out first: a common offset costs no digits."""
    z, bend = _product(hidden, weight.T), None
    if bias is not None:
        z += bias
    if plan.softcap is not None:
        z = torch.tanh(z / plan.softcap)
        bend = 1.0 - z.square()
        z *= plan.softcap
    z /= plan.temperature
    top = z.amax(1, keepdim=True)
    z -= top
    rest = z.exp().sum(1, keepdim=True).log()
    return z.sub_(rest), (top + rest)[:, 0], bend


def _logit_gradient(chunk: _Chunk, given: dict[str, Tensor], plan: _Plan) -> Tensor:  # (n, V) du
    """The formula in the docstring of `_Head`; `given` are upstream gradients (n,)."""
    A, E, S, K = (given[name][:, None] if name in given else None for name in HeadStats._fields)
    factor: Any = 0.0
    if A is not None:
        factor = factor - A
    if S is not None:
        factor = factor + S
    if E is not None:
        factor = factor - E * (chunk.logp + chunk.stats["entropy"][:, None])
    if K is not None:
        factor = factor + K * (chunk.gap - chunk.stats["kl"][:, None])
    du = chunk.logp.exp().mul_(factor)
    if A is not None:
        du.scatter_add_(1, chunk.targets[:, None], A)
    if chunk.bend is not None:
        du *= chunk.bend
    return du.div_(plan.temperature)


def _factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the product: at least fp32, except on CUDA, which sums products of bf16 in fp32 itself."""
    if a.is_cuda and a.dtype == b.dtype:
        return a, b
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide), b.to(wide)


def _product(a: Tensor, b: Tensor) -> Tensor:  # (n, k), (k, m) → (n, m) at least fp32
    """A matrix product, a rounded to the dtype of b; summed in fp32 at least, and never rounded back."""
    if b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.mm(a, b)
