"""The output layer's statistics on a GPU: log-prob, entropy, log-sum-exp, KL per row; the (N, V) logits are never held.

The readable form is `_head_stats_torch` in `minirlhf/ops.py`; this is the same function with another body.

Forward: one kernel multiplies, caps and reduces. A program takes a block of rows and a fixed span of the vocabulary
and leaves seven numbers per row; PyTorch merges the spans. With z the logits, z' the reference's, per span:

    m = max z   s = Σ e^(z-m)   x = Σ e^(z-m) (z-m)   a = z of the target
    m', s' of z'                d = Σ e^(z-m) [(z-m) - (z'-m')]

    lse = m + log s   H = log s - x/s   KL = d/s - log s + log s'

the online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867) with two more sums. 38 bytes of traffic per logit
become none. Backward: a tile of the vocabulary at a time. Its logits are multiplied again by the library, one kernel
turns them into their gradient in one read and one write, two more products give the tile's share of dh and its dW.

Deterministic: no atomics, sums in a fixed order, tiles that depend on shapes alone. What goes wrong: bf16 in Triton's
interpreter (silently), hence fp32 there; TRITON_INTERPRET set after triton was imported; offsets beyond 2³¹.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

SPAN = 4096  # columns of the vocabulary per program of the forward kernel; fixes the order of the sums
BUDGET = 128 * 2**20  # bytes of fp32 logits that the backward pass holds at once
GRADIENT_COLS = 1024  # columns per program of the gradient kernel
LOWEST = tl.constexpr(-1e30)  # finite: LOWEST - LOWEST is a number, and a span that is all -inf does no harm


class Tile(NamedTuple):
    """What one program of the forward kernel works on at a time."""

    rows: int
    cols: int
    width: int  # of hidden, per step of the product
    warps: int
    stages: int


def forward_tile(dtype: torch.dtype, capability: int, *, plain: bool, kl: bool) -> Tile:
    """The largest that keeps its sums in registers, which the compiler can tell without a GPU; none was timed.

    plain: no bias, softcap, reference. capability: 90 is Hopper; what suits Ampere (80) runs everywhere else.
    """
    if dtype == torch.float64:
        return Tile(32, 32, 16, 4, 2)
    if dtype == torch.float32:
        return Tile(64 if kl else 128, 64, 32, 8, 2)
    if kl:
        return Tile(128, 64, 64, 8, 3)
    if capability == 90:
        return Tile(128, 256 if plain else 128, 64, 8, 3)
    return Tile(128, 128, 32, 8, 3)


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _product(a, b, rows, cols, C, WIDTH: tl.constexpr, acc):
    """acc + A[rows] B[cols]ᵀ, summed in acc's type. Rows and columns are in range, C need not fill its last step."""
    k = tl.arange(0, WIDTH)
    a_tile = a + rows.to(tl.int64)[:, None] * C + k[None, :]
    b_tile = b + cols.to(tl.int64)[None, :] * C + k[:, None]
    for start in range(0, C, WIDTH):
        inside = k < C - start
        x = tl.load(a_tile + start, mask=inside[None, :], other=0.0)
        y = tl.load(b_tile + start, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _cap(u, SOFTCAP: tl.constexpr):
    """softcap·tanh(u/softcap); there is no tanh that both the compiler and the interpreter know."""
    if SOFTCAP is not None:
        x = u / SOFTCAP
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
        if u.dtype == tl.float32:  # near 0 that loses digits, and the series does not
            y = x * x
            series = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
            tanh = tl.where(y < 0.09, series, tanh)
        u = SOFTCAP * tanh
    return u


@triton.jit
def forward_kernel(
    hidden,  # (N, C)
    weight,  # (V, C)
    bias,  # (V,) or None
    targets,  # (N,)
    ref_hidden,  # (N, ref_C) or None
    ref_weight,  # (V, ref_C) or None
    partials,  # (7 or 4, spans, N)
    N,
    V,
    C,
    ref_C,
    TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """m, s, x, a and with a reference m', s', d of one block of rows over one span of the vocabulary."""
    dtype: tl.constexpr = partials.dtype.element_ty
    span = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(row, N - 1)  # what lies beyond is computed twice and not stored
    target = tl.load(targets + rows)
    m = tl.full([ROWS], LOWEST, dtype)
    s = tl.full([ROWS], 0.0, dtype)
    x = tl.full([ROWS], 0.0, dtype)
    a = tl.full([ROWS], 0.0, dtype)
    ref_m, ref_s, d = m, s, x
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), COLS):
        col = start + tl.arange(0, COLS)
        cols = tl.minimum(col, V - 1)
        z = _product(hidden, weight, rows, cols, C, WIDTH, tl.full([ROWS, COLS], 0.0, dtype))
        if bias is not None:
            z += tl.load(bias + cols).to(dtype)[None, :]
        z = _cap(z, SOFTCAP) / TEMPERATURE
        a += tl.sum(tl.where(col[None, :] == target[:, None], z, 0.0), 1)
        z = tl.where(col[None, :] < V, z, LOWEST)
        top = tl.maximum(m, tl.max(z, 1))
        z -= top[:, None]
        e = tl.exp(z)
        if bias is not None:
            z = tl.where(e > 0.0, z, 0.0)  # a bias of -inf: 0·(-inf) is no number
        fall = m - top
        decay = tl.exp(fall)
        if ref_hidden is not None:
            r = _product(ref_hidden, ref_weight, rows, cols, ref_C, WIDTH, tl.full([ROWS, COLS], 0.0, dtype))
            r = tl.where(col[None, :] < V, _cap(r, SOFTCAP) / TEMPERATURE, LOWEST)
            ref_top = tl.maximum(ref_m, tl.max(r, 1))
            r -= ref_top[:, None]
            ref_fall = ref_m - ref_top
            d = decay * (d + (fall - ref_fall) * s) + tl.sum(e * (z - r), 1)
            ref_s = ref_s * tl.exp(ref_fall) + tl.sum(tl.exp(r), 1)
            ref_m = ref_top
        x = decay * (x + fall * s) + tl.sum(e * z, 1)
        s = s * decay + tl.sum(e, 1)
        m = top
    out = partials + span.to(tl.int64) * N + row
    field = tl.num_programs(0).to(tl.int64) * N
    tl.store(out, m, mask=row < N)
    tl.store(out + field, s, mask=row < N)
    tl.store(out + 2 * field, x, mask=row < N)
    tl.store(out + 3 * field, a, mask=row < N)
    if ref_hidden is not None:
        tl.store(out + 4 * field, ref_m, mask=row < N)
        tl.store(out + 5 * field, ref_s, mask=row < N)
        tl.store(out + 6 * field, d, mask=row < N)


@triton.jit
def gradient_kernel(
    logits,  # (N, n) without bias, softcap and τ
    ref_logits,  # (N, n) or None
    bias,  # (n,) or None
    targets,  # (N,) counted from this tile's first column
    rows,  # (8, N) m, log s, m', log s', α, β, γ, δ
    out,  # (N, stride)
    N,
    n,
    stride,
    TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COLS: tl.constexpr,
):
    """Part of one row: du = dz (1 - (v/softcap)²)/τ, dz = p (α + β log p + γ log q) + δ·1[i = a]."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = col < n
    u = tl.load(logits + row * n + col, mask=inside, other=0.0)
    if bias is not None:
        u += tl.load(bias + col, mask=inside, other=0.0).to(u.dtype)
    v = _cap(u, SOFTCAP)
    logp = (v / TEMPERATURE - tl.load(rows + row)) - tl.load(rows + N + row)
    p = tl.exp(logp)
    factor = tl.load(rows + 4 * N + row) + tl.load(rows + 5 * N + row) * logp
    if ref_logits is not None:
        r = _cap(tl.load(ref_logits + row * n + col, mask=inside, other=0.0), SOFTCAP) / TEMPERATURE
        logq = (r - tl.load(rows + 2 * N + row)) - tl.load(rows + 3 * N + row)
        factor += tl.load(rows + 6 * N + row) * logq
    g = tl.where(p > 0.0, p * factor, 0.0)
    g += tl.where(col == tl.load(targets + row), tl.load(rows + 7 * N + row), 0.0)
    if SOFTCAP is not None:
        g *= 1.0 - (v / SOFTCAP) * (v / SOFTCAP)
    tl.store(out + row * stride + col, (g / TEMPERATURE).to(out.dtype.element_ty), mask=inside)


# ---- forward and backward -------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What is no tensor."""

    want: tuple[str, ...]
    temperature: float
    softcap: float | None


class _Head(torch.autograd.Function):
    """With upstream gradients A (logprobs), E (entropy), S (lse), K (kl), per row:

    dz_i = p_i [-A + S - E (log p_i + H) + K (log p_i - log q_i - kl)] + A·1[i = a]
    du = dz (1 - (v/softcap)²)/τ,  dh = du W,  dW = duᵀ h,  db = Σ du
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, C)
        weight: Tensor,  # (V, C)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        ref_hidden: Tensor | None,  # (N, C')
        ref_weight: Tensor | None,  # (V, C')
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        """Statistics; kept for the backward pass are the inputs and six numbers per row."""
        ctx.set_materialize_grads(False)
        (N, C), V, kl = hidden.shape, len(weight), ref_hidden is not None
        wide = torch.promote_types(weight.dtype, torch.float32)
        partials = hidden.new_empty(7 if kl else 4, triton.cdiv(V, SPAN), N, dtype=wide)
        if N:
            plain = not kl and bias is None and options.softcap is None
            tile = forward_tile(weight.dtype, _capability(hidden), plain=plain, kl=kl)
            with torch.cuda.device_of(hidden):
                forward_kernel[partials.shape[1], triton.cdiv(N, tile.rows)](
                    hidden, weight, bias, targets, ref_hidden, ref_weight, partials, N, V, C,
                    ref_hidden.shape[1] if kl else 0, TEMPERATURE=options.temperature, SOFTCAP=options.softcap,
                    SPAN=SPAN, ROWS=tile.rows, COLS=tile.cols, WIDTH=tile.width, num_warps=tile.warps,
                    num_stages=tile.stages, enable_fp_fusion=True,
                )  # fmt: skip
        stats, norms = merge(partials)
        kept = (norms, stats["entropy"], stats.get("kl"))
        ctx.save_for_backward(hidden, weight, bias, targets, ref_hidden, ref_weight, *kept)
        ctx.options = options
        return tuple(stats[name] if name in options.want else None for name in ("logprobs", "entropy", "lse", "kl"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """A tile of the vocabulary at a time: its logits again, their gradient, and two products."""
        none = (None,) * 4
        if all(g is None for g in upstream):
            return None, None, None, *none
        *inputs, norms, entropy, kl = ctx.saved_tensors
        hidden, weight, bias = inputs[:3]
        rows = _row_numbers(upstream, norms, entropy, kl)  # (8, N)
        if upstream[3] is None:
            inputs[4:] = None, None
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dh = torch.zeros_like(hidden, dtype=rows.dtype) if need_hidden else None  # summed over tiles, rounded once
        dw = torch.empty_like(weight) if need_weight else None
        db = torch.empty_like(bias) if need_bias else None
        for tile in _vocabulary_tiles(len(hidden), len(weight)):
            du = _logit_gradient(tile, inputs, rows, ctx.options)  # (N, n)
            if dh is not None:
                dh += product(du, weight[tile])
            if dw is not None:
                dw[tile] = product(du.T, hidden)
            if db is not None:
                db[tile] = du.sum(0, dtype=rows.dtype)
        return None if dh is None else dh.to(hidden.dtype), dw, db, *none


def merge(partials: Tensor) -> tuple[dict[str, Tensor], Tensor]:  # (7 or 4, spans, N) → (N,) each, (4 or 2, N)
    """One softmax out of the spans' (formulas: top of this file); and m, log s, m', log s' of the whole."""
    m, s, x, a = partials[:4]
    top = m.amax(0)
    fall = m - top
    decay = fall.exp()
    total = (decay * s).sum(0)
    log_s = total.log()
    stats = {"logprobs": (a.sum(0) - top) - log_s, "lse": top + log_s}
    stats["entropy"] = log_s - (decay * (x + fall * s)).sum(0) / total
    if len(partials) == 4:
        return stats, torch.stack((top, log_s))
    ref_m, ref_s, d = partials[4:]
    ref_top = ref_m.amax(0)
    ref_fall = ref_m - ref_top
    ref_log_s = (ref_fall.exp() * ref_s).sum(0).log()
    stats["kl"] = (decay * (d + (fall - ref_fall) * s)).sum(0) / total - log_s + ref_log_s
    return stats, torch.stack((top, log_s, ref_top, ref_log_s))


def _row_numbers(
    upstream: tuple[Tensor | None, ...],  # A, E, S, K, (N,) each
    norms: Tensor,  # (4 or 2, N)
    entropy: Tensor,  # (N,)
    kl: Tensor | None,  # (N,)
) -> Tensor:  # (8, N)
    """m, log s, m', log s' and the coefficients of dz = p (α + β log p + γ log q) + δ·1[i = a]."""
    zero = torch.zeros_like(entropy)
    A, E, S, K = (zero if g is None else g for g in upstream)
    alpha = S - A - E * entropy - (zero if kl is None else K * kl)
    return torch.stack((*norms, *[zero] * (4 - len(norms)), alpha, K - E, -K, A))


def _logit_gradient(
    tile: slice,  # of the vocabulary
    inputs: list[Tensor | None],  # of _Head.forward; without the reference where kl has no gradient
    rows: Tensor,  # (8, N)
    options: Options,
) -> Tensor:  # (N, n) du in the type of the products to come
    hidden, weight, bias, targets, ref_hidden, ref_weight = inputs
    logits = product(hidden, weight[tile].T)  # (N, n)
    ref_logits = None if ref_hidden is None else product(ref_hidden, ref_weight[tile].T)
    N, n = logits.shape
    out = logits
    if weight.dtype != logits.dtype:
        out = logits.new_empty(N, triton.cdiv(n, 64) * 64, dtype=weight.dtype)[:, :n]  # rows aligned for tensor cores
    if N:
        gradient_kernel[N, triton.cdiv(n, GRADIENT_COLS)](
            logits, ref_logits, None if bias is None else bias[tile], targets - tile.start, rows, out, N, n,
            out.stride(0), TEMPERATURE=options.temperature, SOFTCAP=options.softcap, COLS=GRADIENT_COLS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _vocabulary_tiles(N: int, V: int) -> list[slice]:
    """Within the budget, 4 bytes a logit; multiples of 512, and never less, which would starve the products."""
    size = max(512, BUDGET // (4 * max(N, 1)) // 512 * 512)
    return [slice(start, min(start + size, V)) for start in range(0, V, size)]


def product(a: Tensor, b: Tensor) -> Tensor:  # (n, k), (k, m) → (n, m) at least fp32
    """A matrix product summed in fp32 and not rounded back."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _capability(like: Tensor) -> int:
    """90 for Hopper, 80 for Ampere; the interpreter has none."""
    if not like.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(like.device)
    return 10 * major + minor


def head_stats_triton(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (V, C)
    targets: Tensor,  # (N,) int64, all within V
    *,
    bias: Tensor | None,  # (V,)
    temperature: float,
    softcap: float | None,
    ref_hidden: Tensor | None,  # (N, C')
    ref_weight: Tensor | None,  # (V, C')
    want: tuple[str, ...],
) -> tuple[Tensor | None, ...]:  # logprobs, entropy, lse, kl: (N,) each, None where not wanted
    """`_head_stats_torch` in tiles. 16-bit weights are multiplied as such and summed in fp32; the interpreter widens.

    Raises RuntimeError for tensors on the CPU when the kernels were made for a GPU.
    """
    if not hidden.is_cuda and any(isinstance(f, triton.JITFunction) for f in (forward_kernel, tl.sum)):
        raise RuntimeError("impl='triton' needs tensors on a CUDA device, or TRITON_INTERPRET=1 before Python starts")
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if hidden.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        dtype = weight.dtype
    hidden, weight, ref_hidden, ref_weight = (
        x if x is None else x.to(dtype).contiguous() for x in (hidden, weight, ref_hidden, ref_weight)
    )
    bias, targets = None if bias is None else bias.contiguous(), targets.contiguous()
    return _Head.apply(hidden, weight, bias, targets, ref_hidden, ref_weight, Options(want, temperature, softcap))
