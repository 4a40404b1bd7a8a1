"""What a model says about tokens: log-probs, entropy, log-sum-exp, KL; the formulas, and the one switch to Triton.

What goes wrong: logits rounded to bf16 before the log-sum-exp (6 % of ratio noise), one temperature in sampling and
another in training, and the (N, V) logits themselves, which are larger than everything else together.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minirlhf.products import product

ROWS, COLS = 2048, 8192  # of the logits that `head_stats` holds at once, at most
BUDGET = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}  # their bytes in fp32: what caches hold, or what launches cost
LOWEST = -1e30  # for -inf, which would make 0·(-inf) of what is excluded


def token_logprobs(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...) int64
    *,
    temperature: float = 1.0,  # τ
) -> Tensor:  # (...) at least fp32
    """log p_a = z_a - log Σ e^z with z = logits/τ."""
    assert logits.shape[:-1] == targets.shape, (logits.shape, targets.shape)
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
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    wide = torch.promote_types(torch.promote_types(logprobs.dtype, ref_logprobs.dtype), torch.float32)
    x = logprobs.to(wide) - ref_logprobs
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

    Raises ValueError for a wrong `want` or `impl`, IndexError for a target that is no token, RuntimeError where Triton
    is asked for and cannot run.
    """
    N, C = hidden.shape
    assert weight.shape[1:] == (C,), (hidden.shape, weight.shape)
    assert targets.shape == (N,), (hidden.shape, targets.shape)
    if not want or not set(want) <= set(HeadStats._fields):
        raise ValueError(f"head_stats: want {tuple(want)} must name some of {', '.join(HeadStats._fields)}")
    if "kl" in want and ref_hidden is None:
        raise ValueError("head_stats: kl needs ref_hidden")
    body = choose(impl, hidden)
    kept = (targets != ignore_index).nonzero()[:, 0]  # (n,) often less than half of the rows
    targets = targets.index_select(0, kept)
    if len(kept):
        low, high = torch.stack(targets.aminmax()).tolist()
        if low < 0 or high >= len(weight):
            raise IndexError(f"head_stats: targets from {low} to {high}, but tokens go from 0 to {len(weight) - 1}")
    if "kl" in want and ref_hidden is not None:
        ref_weight = (weight if ref_weight is None else ref_weight).detach()  # (V, C')
        assert ref_hidden.shape == (N, ref_weight.shape[1]), (ref_hidden.shape, ref_weight.shape)
        assert len(ref_weight) == len(weight), (ref_weight.shape, weight.shape)
        ref_hidden = ref_hidden.detach().index_select(0, kept)  # (n, C')
    else:
        ref_hidden, ref_weight = None, None
    with torch.autocast(hidden.device.type, enabled=False):
        stats = body(
            hidden.index_select(0, kept), weight, targets, bias=bias, temperature=temperature, softcap=softcap,
            ref_hidden=ref_hidden, ref_weight=ref_weight, want=tuple(want),
        )  # fmt: skip
        return HeadStats(*(x if x is None else x.new_zeros(N).index_copy(0, kept, x) for x in stats))


def choose(impl: str, hidden: Tensor) -> Any:
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
    """A tile of the logits at a time; the backward pass makes each again, unless the weight is frozen."""
    hidden = hidden.to(_product_dtype(hidden, weight))
    if ref_hidden is not None and ref_weight is not None:
        ref_hidden = ref_hidden.to(_product_dtype(ref_hidden, ref_weight))
    plan = _Plan(want, temperature, softcap, torch.is_grad_enabled())
    return _Head.apply(hidden, weight, bias, targets, ref_hidden, ref_weight, plan)


class _Inputs(NamedTuple):
    """The tensors of `_head_stats_torch`."""

    hidden: Tensor  # (N, C)
    weight: Tensor  # (V, C)
    bias: Any  # (V,) or None
    targets: Tensor  # (N,)
    ref_hidden: Any  # (N, C') or None
    ref_weight: Any  # (V, C') or None


class _Plan(NamedTuple):
    want: tuple[str, ...]
    temperature: float
    softcap: float | None
    grad: bool  # a backward pass may come


class _Head(torch.autograd.Function):
    """With upstream gradients A (logprobs), E (entropy), S (lse), K (kl), per row:

    dz_i = p_i [-A + S - E (log p_i + H) + K (log p_i - log q_i - kl)] + A·1[i = a]
    du = dz (1 - (v/softcap)²)/τ,  dh = du W,  dW = duᵀ h,  db = Σ du

    Frozen weight: dh for A = 1, for E = 1, ... is made in the forward pass, which is then the only one.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        """Statistics; with a frozen weight also the slopes d statistic/d hidden."""
        inputs, plan = _Inputs(*args[:6]), args[6]
        need_hidden, *need_others = (plan.grad and need for need in ctx.needs_input_grad[:3])
        frozen = need_hidden and not any(need_others)
        sums = _Sums(inputs, plan, slopes=frozen)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.frozen = plan, frozen
        if frozen:
            ctx.save_for_backward(*(sums.slope(name) for name in plan.want))
        else:
            ctx.save_for_backward(*inputs, *sums.norms())
        return tuple(sums.statistic(name) if name in plan.want else None for name in HeadStats._fields)

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
        inputs, norms = _Inputs(*ctx.saved_tensors[:6]), _Norms(*ctx.saved_tensors[6:])
        hidden, weight, bias = inputs[:3]
        dtype, (need_hidden, need_weight, need_bias) = norms.m.dtype, ctx.needs_input_grad[:3]
        dh = torch.zeros_like(hidden, dtype=dtype) if need_hidden else None
        dw = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        db = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        for rows, cols in tiles(len(hidden), len(weight), hidden.shape[1], hidden.device.type):
            du = _logit_gradient(rows, cols, inputs, norms, given, ctx.plan)  # (n, v)
            if dh is not None:
                dh[rows] += product(du, weight[cols].to(hidden.dtype))
            if dw is not None:
                dw[cols] += product(du.T, hidden[rows])
            if db is not None:
                db[cols] += du.sum(0)
        return dh, dw, db, *(None,) * 4


class _Norms(NamedTuple):
    """What makes a row's logits again log-probs, (N,) each; see `_Sums`."""

    m: Tensor
    s: Tensor
    x: Tensor | None
    d: Tensor | None
    ref_m: Tensor | None


class _Sums:
    """Sums over the vocabulary, tile after tile, the maximum so far taken out; with z' the reference's logits:

    m = max z   s = Σ e^(z-m)   x = Σ e^(z-m) (z-m)   d = Σ e^(z-m) g,  g = (z-m) - (z'-m')   a = z of the target

    the online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867) with two more sums. A maximum that rises, m by δ
    and m' by δ', turns them into e^(-δ) s, e^(-δ) (x - δ s) and e^(-δ) (d - (δ - δ') s). The same sums over W_i in
    place of 1, `vectors`, give the slopes d statistic/d hidden without a second look at the logits.
    """

    def __init__(self, inputs: _Inputs, plan: _Plan, *, slopes: bool) -> None:
        """Run through all tiles."""
        hidden, weight = inputs.hidden, inputs.weight
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        names = ["d"] * ("kl" in plan.want) + ["x"] * ("entropy" in plan.want) + ["s"]
        self.inputs, self.plan = inputs, plan
        self.m = hidden.new_full((len(hidden),), LOWEST, dtype=dtype)
        self.ref_m, self.ref_s, self.a = self.m.clone(), torch.zeros_like(self.m), torch.zeros_like(self.m)
        self.sums = {name: torch.zeros_like(self.m) for name in names}
        self.vectors = {name: torch.zeros_like(hidden, dtype=dtype) for name in names if slopes}
        for rows, cols in tiles(len(hidden), len(weight), hidden.shape[1], hidden.device.type):
            self._add(rows, cols)

    def _add(self, rows: slice, cols: slice) -> None:
        """One tile (n, v)."""
        targets, kl = self.inputs.targets[rows], "d" in self.sums
        z, bend = _logits(rows, cols, self.inputs, self.plan)  # (n, v)
        where, inside = _columns(targets, cols)  # (n, 1) each
        self.a[rows] += torch.where(inside, z.gather(1, where), 0.0)[:, 0]
        if self.inputs.bias is not None:
            z.clamp_(min=LOWEST)
        fall = _take_out(z, self.m[rows])  # (n,)
        terms: dict[str, tuple[Any, Tensor]] = {"x": (z, fall)}
        if kl:
            r = _ref_logits(rows, cols, self.inputs, self.plan)  # (n, v)
            ref_fall = _take_out(r, self.ref_m[rows])
            terms["d"] = (z - r, fall - ref_fall)
            self.ref_s[rows] = self.ref_s[rows] * ref_fall.exp() + r.exp_().sum(1)
        e, decay = z.exp() if "x" in self.sums else z.exp_(), fall.exp()
        for name, total in self.sums.items():  # s last: the others need what it was
            f, shift = terms.get(name, (None, None))
            part = e if f is None else f.mul_(e)  # (n, v)
            _move(total[rows], self.sums["s"][rows], shift, decay).add_(part.sum(1))
            if name in self.vectors:
                vector, w = self.vectors[name][rows], self.inputs.weight[cols]
                _move(vector.T, self.vectors["s"][rows].T, shift, decay)
                # Not rounded to 16 bits, on CUDA either: of a likely token nearly all of this is subtracted again.
                vector += product(part if bend is None else part * bend, w.to(part.dtype))

    def norms(self) -> _Norms:
        """For the backward pass."""
        kl = "d" in self.sums
        return _Norms(self.m, self.sums["s"], self.sums.get("x"), self.sums.get("d"), self.ref_m if kl else None)

    def statistic(self, name: str) -> Tensor:  # (N,)
        """log p_a, H, lse or kl."""
        log_s = self.sums["s"].log()
        if name == "logprobs":
            return (self.a - self.m) - log_s
        if name == "lse":
            return self.m + log_s
        if name == "entropy":
            return log_s - self.sums["x"] / self.sums["s"]
        return self.sums["d"] / self.sums["s"] - log_s + self.ref_s.log()

    def slope(self, name: str) -> Tensor:  # (N, C)
        """Its derivative: with means under p, Wₐ - E[W], E[W], E[z] E[W] - E[z W] or E[g W] - E[g] E[W]; over τ."""
        scale = 1 / (self.sums["s"] * self.plan.temperature)  # (N,)
        mean = scale[:, None] * self.vectors["s"]  # (N, C)
        if name == "lse":
            return mean
        if name == "logprobs":
            own = self.inputs.weight[self.inputs.targets].to(mean.dtype) / self.plan.temperature
            if self.plan.softcap is not None:
                own *= (1.0 - (self.a * self.plan.temperature / self.plan.softcap).square())[:, None]
            return own.sub_(mean)
        key, sign = ("x", -1) if name == "entropy" else ("d", 1)
        return (sign * scale)[:, None] * self.vectors[key] - (sign * self.sums[key] / self.sums["s"])[:, None] * mean


def _move(total: Tensor, s: Tensor, shift: Tensor | None, decay: Tensor) -> Tensor:  # (..., n), (..., n), (n,), (n,)
    """A sum under the risen maximum, in place."""
    if shift is not None:
        total += shift * s
    return total.mul_(decay)


def _take_out(z: Tensor, m: Tensor) -> Tensor:  # (n, v), (n,) → (n,)
    """z ← z - m under the new maximum m, both in place; how far it was below: -δ."""
    top = torch.maximum(m, z.amax(1))
    z -= top[:, None]
    fall = m - top
    m.copy_(top)
    return fall


def tiles(N: int, V: int, C: int, device: str) -> Iterator[tuple[slice, slice]]:  # rows, columns
    """A tile's logits and its part of the weight, each within the budget; a quarter of the columns at most or, where
    all of them fit, of the rows, so that no tile is the whole. Else rows stay together, since every tile reads its part
    of the weight. Depends on shapes alone."""
    budget = BUDGET["cpu" if device == "cpu" else "cuda"] // 4  # numbers
    columns = min(COLS, budget // C)
    n, v = (N, -(-V // 4)) if columns < V else (-(-N // 4), V)
    n = max(1, min(ROWS, n))
    v = max(1, min(v, columns, budget // n))
    for start in range(0, V, v):
        for row in range(0, N, n):
            yield slice(row, min(row + n, N)), slice(start, min(start + v, V))


def _columns(targets: Tensor, cols: slice) -> tuple[Tensor, Tensor]:  # (n,) → (n, 1), (n, 1)
    """Where in the tile a target stands, and whether it does."""
    where = targets[:, None] - cols.start
    return where.clamp(0, cols.stop - cols.start - 1), (where >= 0) & (where < cols.stop - cols.start)


def _logits(rows: slice, cols: slice, inputs: _Inputs, plan: _Plan) -> tuple[Tensor, Tensor | None]:  # (n, v)
    """z, and with a softcap dv/du = 1 - (v/softcap)²."""
    hidden, weight, bias = inputs[:3]
    z = product(hidden[rows], weight[cols].to(hidden.dtype).T)
    if bias is not None:
        z += bias[cols]
    return _capped(z, plan)


def _ref_logits(rows: slice, cols: slice, inputs: _Inputs, plan: _Plan) -> Tensor:  # (n, v)
    hidden, weight = inputs.ref_hidden, inputs.ref_weight
    return _capped(product(hidden[rows], weight[cols].to(hidden.dtype).T), plan)[0]


def _capped(u: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None]:  # (n, v), in place
    """v/τ with v = softcap·tanh(u/softcap), and dv/du."""
    bend = None
    if plan.softcap is not None:
        u = u.div_(plan.softcap).tanh_()
        bend = 1.0 - u.square()
        u *= plan.softcap
    return (u if plan.temperature == 1 else u.div_(plan.temperature)), bend


def _logit_gradient(
    rows: slice, cols: slice, inputs: _Inputs, norms: _Norms, given: dict[str, Tensor], plan: _Plan
) -> Tensor:  # (n, v) du
    """The formula in the docstring of `_Head`, where log p + H = (z - m) - x/s and log p - log q - kl = g - d/s."""
    A, E, S, K = (given[name][rows, None] if name in given else None for name in HeadStats._fields)  # (n, 1) each
    columns: Iterator[Any] = (None if t is None else t[rows, None] for t in norms)
    m, s, x, d, ref_m = columns  # (n, 1) each
    z, bend = _logits(rows, cols, inputs, plan)
    if inputs.bias is not None:
        z.clamp_(min=LOWEST)
    z -= m
    factor: Any = 0.0
    if A is not None:
        factor = factor - A
    if S is not None:
        factor = factor + S
    if E is not None:
        factor = factor - E * (z - x / s)
    if K is not None:
        factor = factor + K * (z - (_ref_logits(rows, cols, inputs, plan) - ref_m) - d / s)
    du = z.exp_().mul_(factor / (s * plan.temperature))
    if A is not None:
        where, inside = _columns(inputs.targets[rows], cols)
        du.scatter_add_(1, where, torch.where(inside, A / plan.temperature, 0.0))
    return du if bend is None else du.mul_(bend)


def _product_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """At least fp32, except on CUDA, which sums products of bf16 in fp32 itself."""
    if a.is_cuda and a.dtype == b.dtype:
        return a.dtype
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
