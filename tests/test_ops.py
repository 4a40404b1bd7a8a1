"""Token statistics against the naive twin below, which any reader can check against the formulas."""

import itertools
import math
import os

import pytest
import torch
from tolerance import assert_close, bf16, exact, fp32, fp64
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf import ops
from minirlhf.ops import HeadStats, head_stats, kl_estimate, token_logprobs

ALL = ("logprobs", "entropy", "lse", "kl")
NAN = float("nan")


def naive_head_stats(
    hidden, weight, targets, bias=None, temperature=1.0, softcap=None, ref_hidden=None, ref_weight=None
):
    """The definition, in the dtype of its inputs, with the (N, V) logits in the open; every target must be real."""

    def log_softmax(hidden, weight, bias=None):
        u = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        v = u if softcap is None else softcap * torch.tanh(u / softcap)
        z = v / temperature
        lse = torch.logsumexp(z, 1)
        return z - lse[:, None], lse

    logp, lse = log_softmax(hidden, weight, bias)
    p = logp.exp()
    kl = None
    if ref_hidden is not None:
        logq, _ = log_softmax(ref_hidden.detach(), (weight if ref_weight is None else ref_weight).detach())
        kl = (p * (logp - logq)).sum(1)
    return HeadStats(logp[torch.arange(len(targets)), targets], -(p * logp).sum(1), lse, kl)


def case(N=9, C=5, V=11, *, seed=0, dtype=torch.float64, scale=1.0):
    """hidden, weight, targets, bias, ref_hidden, ref_weight."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).to(dtype)

    targets = torch.randint(V, (N,), generator=rng)
    return normal(N, C), normal(V, C), targets, normal(V), normal(N, 3), normal(V, 3)


# ---- token_logprobs, kl_estimate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 1, 4)])
def test_token_logprobs_keeps_the_leading_shape(shape):
    logits = torch.randn(*shape, 7, dtype=torch.float64)
    targets = torch.randint(7, shape)
    p = torch.softmax(logits / 0.6, -1)
    assert_close(token_logprobs(logits, targets, temperature=0.6), p.gather(-1, targets[..., None])[..., 0].log(), fp64)


def test_token_logprobs_of_bf16_logits_are_fp32():
    logits = torch.randn(4, 9).bfloat16()
    targets = torch.arange(4)
    assert token_logprobs(logits, targets).dtype == torch.float32
    assert_close(token_logprobs(logits, targets), token_logprobs(logits.double(), targets).float(), fp32)


@pytest.mark.parametrize("offset", [1e3, 1e5, -1e5])
def test_common_offset_costs_no_digits(offset):
    logits = torch.tensor([[0.0, 1.0, 2.0, 4.0]])  # exact beside the offset
    expected = token_logprobs(logits, torch.tensor([1]))
    assert_close(token_logprobs(logits + offset, torch.tensor([1])), expected, exact)
    hidden, one = torch.tensor([[0.0, 1.0, 2.0, 4.0]]) + offset, torch.eye(4)
    plain = head_stats(hidden - offset, one, torch.tensor([1]), want=("logprobs", "entropy"))
    shifted = head_stats(hidden, one, torch.tensor([1]), want=("logprobs", "entropy"))
    assert_close(shifted.logprobs, plain.logprobs, exact)
    assert_close(shifted.entropy, plain.entropy, exact)


def test_token_logprobs_leaves_its_input_alone():
    logits = torch.randn(3, 5)
    before = logits.clone()
    token_logprobs(logits, torch.arange(3), temperature=0.5)
    assert torch.equal(logits, before)


def test_k3_is_never_negative_and_precise_near_zero():
    x = torch.cat([torch.linspace(-2, 2, 4001), torch.logspace(-12, 0, 500), -torch.logspace(-12, 0, 500)])
    k3 = kl_estimate(x, torch.zeros_like(x), "k3")
    assert (k3 >= 0).all()
    assert kl_estimate(torch.zeros(1), torch.zeros(1), "k3") == 0
    assert_close(kl_estimate(torch.tensor([1e-3]), torch.zeros(1), "k3"), [4.998333749e-7], {"rtol": 3e-4, "atol": 0.0})


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_kl_estimate_dtypes(kind):
    a = torch.tensor([-1.0, -2.0])
    assert kl_estimate(a.bfloat16(), a.bfloat16(), kind).dtype == torch.float32
    assert kl_estimate(a.double(), a, kind).dtype == torch.float64
    assert kl_estimate(a, a.double(), kind).dtype == torch.float64


def test_kl_estimate_refuses_other_kinds():
    with pytest.raises(ValueError, match="'k4' is none of k1, k2, k3, abs"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError, match="Size"):
        kl_estimate(torch.zeros(3), torch.zeros(3, 1), "k1")
    for fewer in (torch.zeros(2, 4).long(), torch.zeros(1, 5).long()):  # `gather` would take the first of the logits
        with pytest.raises(AssertionError, match="Size"):
            token_logprobs(torch.zeros(2, 5, 7), fewer)


# ---- head_stats -----------------------------------------------------------------------------------------------------

SWITCHES = list(itertools.product([1.0, 0.7], [None, 2.5], [False, True], [True, False]))


@pytest.mark.parametrize(("temperature", "softcap", "with_bias", "own_ref_weight"), SWITCHES)
def test_head_stats_equals_its_naive_twin(temperature, softcap, with_bias, own_ref_weight):
    hidden, weight, targets, bias, ref_hidden, ref_weight = case()
    options = {"temperature": temperature, "softcap": softcap, "bias": bias if with_bias else None}
    options |= (
        {"ref_hidden": ref_hidden, "ref_weight": ref_weight} if own_ref_weight else {"ref_hidden": hidden.flip(0)}
    )
    actual = head_stats(hidden, weight, targets, **options, want=ALL)
    expected = naive_head_stats(hidden, weight, targets, **options)
    for name, a, e in zip(ALL, actual, expected, strict=True):
        assert_close(a, e, fp64), name


@pytest.mark.parametrize("want", [(n,) for n in ALL] + [("entropy", "logprobs"), ALL, ALL[::-1]])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_gradients_are_exact(want, frozen, softcap):
    """gradcheck of every output, with the recomputing backward pass and, weight frozen, with the one-pass one."""
    hidden, weight, targets, bias, ref_hidden, ref_weight = case(7, 4, 6)
    targets[2] = -100
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_(), bias.requires_grad_()])

    def function(*leaves):
        h, w, b = leaves if len(leaves) == 3 else (leaves[0], weight, bias)
        return tuple(
            x for x in head_stats(h, w, targets, bias=b, temperature=0.7, softcap=softcap, ref_hidden=ref_hidden,
                                  ref_weight=ref_weight, want=want) if x is not None
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("trained", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_gradients_of_whatever_is_trained(trained):
    tensors = case()
    grads = []
    for function in (head_stats, naive_head_stats):
        leaves = [
            t.clone().requires_grad_(bool(on))
            for t, on in zip((tensors[0], tensors[1], tensors[3]), trained, strict=True)
        ]
        options = {"want": ALL} if function is head_stats else {}
        stats = function(leaves[0], leaves[1], tensors[2], bias=leaves[2], temperature=1.3,
                         ref_hidden=tensors[4], ref_weight=tensors[5], **options)  # fmt: skip
        sum((i + 1) * s.sum() for i, s in enumerate(stats)).backward()
        grads.append([leaf.grad for leaf in leaves])
    for actual, expected, on in zip(*grads, trained, strict=True):
        assert (actual is None) == (not on)
        if on:
            assert_close(actual, expected, fp64)


@pytest.mark.parametrize("frozen", [False, True])
def test_ignored_rows_give_zero_and_no_gradient(frozen):
    hidden, weight, targets, _, ref_hidden, ref_weight = case()
    ignored = torch.tensor([0, 3, 4, 8])
    kept = torch.tensor([i for i in range(9) if i not in ignored])
    targets[ignored] = -7
    hidden[ignored], ref_hidden[ignored] = NAN, NAN
    h, w = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    stats = head_stats(h, w, targets, ref_hidden=ref_hidden, ref_weight=ref_weight, want=ALL, ignore_index=-7)
    expected = naive_head_stats(hidden[kept].detach(), weight.detach(), targets[kept], ref_hidden=ref_hidden[kept],
                                ref_weight=ref_weight)  # fmt: skip
    for a, e in zip(stats, expected, strict=True):
        assert a[ignored].eq(0).all()
        assert_close(a[kept], e, fp64)
    sum(s.sum() for s in stats).backward()
    assert h.grad[ignored].eq(0).all()
    assert torch.isfinite(h.grad).all()
    assert frozen or torch.isfinite(w.grad).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_all_rows_ignored(frozen):
    hidden, weight = torch.full((3, 2), NAN, requires_grad=True), torch.ones(4, 2, requires_grad=not frozen)
    stats = head_stats(hidden, weight, torch.full((3,), -100), want=("logprobs", "lse"))
    (stats.logprobs + stats.lse).sum().backward()
    assert stats.logprobs.tolist() == [0, 0, 0]
    assert hidden.grad.eq(0).all()
    assert frozen or weight.grad.eq(0).all()


def test_only_what_is_wanted():
    hidden, weight, targets, *_ = case()
    stats = head_stats(hidden, weight, targets)
    assert [name for name, x in zip(ALL, stats, strict=True) if x is not None] == ["logprobs"]
    stats = head_stats(hidden, weight, targets, want=["lse", "entropy"])
    assert [name for name, x in zip(ALL, stats, strict=True) if x is not None] == ["entropy", "lse"]


def test_the_reference_gets_no_gradient():
    hidden, weight, targets, _, ref_hidden, ref_weight = case()
    ref_hidden.requires_grad_()
    ref_weight.requires_grad_()
    hidden.requires_grad_()
    head_stats(hidden, weight, targets, ref_hidden=ref_hidden, ref_weight=ref_weight, want=("kl",)).kl.sum().backward()
    assert ref_hidden.grad is None
    assert ref_weight.grad is None
    w = weight.requires_grad_()  # also where it is the policy's own weight: only the policy's side has a gradient
    grads = []
    for function, options in ((head_stats, {"want": ("kl",)}), (naive_head_stats, {})):
        kl = function(hidden, w, targets, ref_hidden=hidden.detach().flip(0), **options).kl
        grads.append(torch.autograd.grad(kl.sum(), [hidden, w]))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, fp64)


def test_kl_to_itself_is_zero():
    hidden, weight, targets, *_ = case()
    kl = head_stats(hidden, weight, targets, ref_hidden=hidden, want=("kl",), temperature=0.3, softcap=4.0).kl
    assert kl.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_of_low_precision_are_fp32(dtype):
    hidden, weight, targets, bias, ref_hidden, ref_weight = case(40, 16, 50, dtype=dtype)
    h, w, b = (x.requires_grad_() for x in (hidden, weight, bias))
    stats = head_stats(h, w, targets, bias=b, ref_hidden=ref_hidden, ref_weight=ref_weight, want=ALL)
    truth = naive_head_stats(*(x.detach().double() for x in (h, w)), targets, b.detach().double(),
                             ref_hidden=ref_hidden.double(), ref_weight=ref_weight.double())  # fmt: skip
    for a, e in zip(stats, truth, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e.float(), {"rtol": 2e-5, "atol": 5e-6})
    stats.logprobs.sum().backward()
    assert h.grad.dtype == w.grad.dtype == b.grad.dtype == dtype
    hd, wd, bd = (x.detach().double().requires_grad_() for x in (h, w, b))
    naive_head_stats(hd, wd, targets, bd).logprobs.sum().backward()
    for a, e in zip((h, w, b), (hd, wd, bd), strict=True):
        assert_close(a.grad.double(), e.grad, fp32 if dtype == torch.float32 else bf16)


def test_weight_gradient_is_rounded_once(monkeypatch):
    """bf16 weight, 32 tiles of rows, summed in fp32: the error is one rounding, 2⁻⁸ of each entry at most."""
    monkeypatch.setattr(ops, "BUDGET", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(ops, "ROWS", 128)
    hidden, weight, targets, *_ = case(4096, 8, 6, dtype=torch.bfloat16)
    w = weight.requires_grad_()
    head_stats(hidden, w, targets).logprobs.sum().backward()
    wd = weight.detach().double().requires_grad_()
    naive_head_stats(hidden.double(), wd, targets).logprobs.sum().backward()
    assert_close(w.grad.double(), wd.grad, {"rtol": 2**-8, "atol": 1e-3})


def test_mixed_precision_factors():
    hidden, weight, targets, *_ = case()
    for h, w in ((hidden.bfloat16(), weight.float()), (hidden.float(), weight.bfloat16()), (hidden.float(), weight)):
        stats = head_stats(h, w, targets)
        assert stats.logprobs.dtype == (torch.float64 if w.dtype == torch.float64 else torch.float32)
        assert_close(stats.logprobs.double(), naive_head_stats(h.double(), w.double(), targets).logprobs, fp32)


def test_autocast_does_not_round_logits():
    hidden, weight, targets, *_ = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head_stats(hidden, weight, targets).logprobs
    assert_close(inside, head_stats(hidden, weight, targets).logprobs, exact)


class Largest(TorchDispatchMode):
    """The numel of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("N", "V"), [(64, 50), (5, 300), (2, 7)])
def test_never_holds_the_logits(N, V, frozen):
    hidden, weight, targets, _, ref_hidden, ref_weight = case(N, 2, V)
    with Largest() as seen:
        stats = head_stats(hidden.requires_grad_(), weight.requires_grad_(not frozen), targets, want=ALL,
                           ref_hidden=ref_hidden, ref_weight=ref_weight, temperature=0.9, softcap=5.0)  # fmt: skip
        sum(s.sum() for s in stats).backward()
    assert seen.numel <= max(-(-N // 4) * V, 3 * V, 3 * N)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_weight_needs_no_second_look(monkeypatch, frozen):
    hidden, weight, targets, *_ = case()
    seen = []
    body = ops._logits
    monkeypatch.setattr(ops, "_logits", lambda rows, *a: (seen.append(rows), body(rows, *a))[1])
    stats = head_stats(hidden.requires_grad_(), weight.requires_grad_(not frozen), targets)
    forward = len(seen)
    stats.logprobs.sum().backward()
    assert forward == 3  # 9 rows in tiles of ⌈9/4⌉
    assert len(seen) - forward == (0 if frozen else forward)


@pytest.mark.parametrize("needed", ["grad mode off", "nothing trained"])
def test_without_a_gradient_no_slope_is_made(monkeypatch, needed):
    hidden, weight, targets, *_ = case()
    monkeypatch.setattr(ops, "_logit_gradient", lambda *a: pytest.fail("a gradient that nobody asked for"))
    with torch.set_grad_enabled(needed != "grad mode off"):
        head_stats(hidden.requires_grad_(needed == "grad mode off"), weight, targets)


@pytest.mark.parametrize("wrong", [-1, 10, 12345, -(2**40)])
@pytest.mark.parametrize("frozen", [False, True])
def test_targets_that_are_no_tokens_are_refused(wrong, frozen):
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(10, 4, requires_grad=not frozen)
    with pytest.raises(IndexError, match=f"{wrong}.*0 to 9"):
        head_stats(hidden, weight, torch.tensor([0, wrong, -100]))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize(("N", "V"), [(1, 5), (2, 5), (100, 7), (1000, 500), (3000, 30_000), (9, 300_000), (50_000, 9)])
@pytest.mark.parametrize("C", [1, 64, 5000])
def test_tiles_cover_every_logit_once(N, V, C, device):
    rows, columns = set(), {}
    for row, col in ops.tiles(N, V, C, device):
        rows.add((row.start, row.stop))
        columns.setdefault((row.start, row.stop), []).append((col.start, col.stop))
        n, v = row.stop - row.start, col.stop - col.start
        assert n <= max(1, -(-N // 4)) or v <= -(-V // 4)
        assert 4 * max(n, C) * v <= ops.BUDGET["cpu" if device == "cpu" else "cuda"]
    covered = sorted(rows)
    assert [a for a, _ in covered] == [0, *(b for _, b in covered[:-1])]
    assert covered[-1][1] == N
    for cols in columns.values():
        assert [a for a, _ in cols] == [0, *(b for _, b in cols[:-1])]
        assert cols[-1][1] == V


@pytest.mark.parametrize(("N", "V", "C", "n", "v"), [
    (100, 8192, 256, 25, 8192),  # all columns fit
    (100, 8193, 64, 100, 2049), (100, 8000, 768, 100, 2000), (100, 40_000, 64, 100, 8192),
    (100, 50_257, 768, 100, 2730), (2049, 50_257, 768, 2048, 1024), (3, 5, 3_000_000, 3, 1),
])  # fmt: skip
def test_rows_stay_together_unless_all_columns_fit(N, V, C, n, v):
    assert next(iter(ops.tiles(N, V, C, "cpu"))) == (slice(0, n), slice(0, v))


def test_no_rows_no_tiles():
    assert list(ops.tiles(0, 5, 8, "cpu")) == []


@pytest.mark.parametrize("budget", [1, 4 * 3 * 4, 4 * 11 * 300, 2**28])
@pytest.mark.parametrize("rows", [1, 3, 2048])
@pytest.mark.parametrize("frozen", [False, True])
def test_tiling_changes_nothing(monkeypatch, budget, rows, frozen):
    """Columns of a row in several tiles are where the running maximum moves."""
    monkeypatch.setattr(ops, "BUDGET", {"cpu": budget, "cuda": budget})
    monkeypatch.setattr(ops, "ROWS", rows)
    hidden, weight, targets, bias, ref_hidden, ref_weight = case(13, 5, 11, scale=2.0)
    grads = []
    for function, options in ((head_stats, {"want": ALL}), (naive_head_stats, {})):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        stats = function(h, w, targets, bias=bias, temperature=0.7, softcap=3.0, ref_hidden=ref_hidden,
                         ref_weight=ref_weight, **options)  # fmt: skip
        sum((i + 1) * s.sum() for i, s in enumerate(stats)).backward()
        grads.append([*(s.detach() for s in stats), h.grad, *([] if frozen else [w.grad])])
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, fp64)


@pytest.mark.parametrize("frozen", [False, True])
def test_excluded_tokens(monkeypatch, frozen):
    """A bias of -inf takes tokens out, here whole tiles of them; as the target, one has log-prob -inf."""
    monkeypatch.setattr(ops, "BUDGET", {"cpu": 4 * 3 * 3})
    hidden, weight, targets, bias, ref_hidden, ref_weight = case(9, 5, 11)
    bias[:4] = -torch.inf
    targets = targets.clamp(min=4)
    h, w = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    stats = head_stats(h, w, targets, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, want=ALL)
    expected = naive_head_stats(hidden.detach(), weight[4:].detach(), targets - 4, bias[4:])
    for a, e in zip(stats[:3], expected[:3], strict=True):
        assert_close(a, e, fp64)
    sum(s.sum() for s in stats).backward()
    assert torch.isfinite(stats.kl).all()
    assert torch.isfinite(h.grad).all()
    assert frozen or w.grad[:4].eq(0).all()
    assert frozen or torch.isfinite(w.grad).all()
    assert head_stats(hidden, weight, torch.zeros_like(targets), bias=bias).logprobs.eq(-torch.inf).all()


def test_twice_the_same_bits_and_inputs_untouched():
    inputs = case(300, 16, 40, dtype=torch.float32)
    hidden, weight, targets, bias, ref_hidden, ref_weight = inputs
    before = [x.clone() for x in inputs]
    runs = []
    for _ in range(2):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = head_stats(h, w, targets, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, temperature=0.7,
                           softcap=3.0, want=ALL)  # fmt: skip
        sum(s.sum() for s in stats).backward()
        runs.append([*(s.detach() for s in stats), h.grad, w.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_shared_weight_adds_both_gradients():
    """Tied embedding: the weight is reached through the head and through the hidden states."""
    _, weight, targets, *_ = case(6, 5, 11)
    grads = []
    for function in (head_stats, naive_head_stats):
        w = weight.clone().requires_grad_()
        function(torch.tanh(w[:6]), w, targets).logprobs.sum().backward()
        grads.append(w.grad)
    assert_close(grads[0], grads[1], fp64)


def test_uniform_logits():
    stats = head_stats(
        torch.zeros(2, 3), torch.randn(8, 3), torch.tensor([0, 5]), want=ALL, ref_hidden=torch.zeros(2, 3)
    )
    assert_close(stats.entropy, [math.log(8)] * 2, fp32)
    assert_close(stats.logprobs, [-math.log(8)] * 2, fp32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"want": ()}, "must name some of logprobs, entropy, lse, kl"),
        ({"want": ("logprobs", "perplexity")}, "perplexity"),
        ({"want": ("kl",)}, "needs ref_hidden"),
        ({"impl": "cuda"}, "'cuda' is none of auto, torch, triton"),
    ],
)
def test_wrong_arguments(options, message):
    hidden, weight, targets, *_ = case()
    with pytest.raises(ValueError, match=message):
        head_stats(hidden, weight, targets, **options)


@pytest.mark.parametrize("bad", ["weight", "targets", "ref_hidden", "ref_weight"])
def test_wrong_shapes(bad):
    hidden, weight, targets, _, ref_hidden, ref_weight = case()
    inputs = {"weight": weight, "targets": targets, "ref_hidden": ref_hidden, "ref_weight": ref_weight}
    inputs[bad] = {"weight": weight[:, 1:], "ref_weight": ref_weight[1:]}.get(bad, inputs[bad][1:])
    with pytest.raises(AssertionError, match="Size"):
        head_stats(hidden, want=("kl",), **inputs)


# ---- the switch -----------------------------------------------------------------------------------------------------


def test_auto_is_torch_without_cuda():
    hidden, weight, targets, *_ = case(dtype=torch.float32)
    assert torch.equal(
        head_stats(hidden, weight, targets).logprobs, head_stats(hidden, weight, targets, impl="torch").logprobs
    )
    assert ops.choose("auto", hidden) is ops.choose("torch", hidden) is ops._head_stats_torch


def test_triton_without_cuda_or_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, targets, *_ = case()
    with pytest.raises(RuntimeError, match="CUDA") as caught:
        head_stats(hidden, weight, targets, impl="triton")
    assert "TRITON_INTERPRET=1" in str(caught.value)


def test_triton_not_installed(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    hidden, weight, targets, *_ = case()
    with pytest.raises(RuntimeError, match="the package triton"):
        head_stats(hidden, weight, targets, impl="triton")


def test_kernels_that_do_not_load(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(ops.importlib, "import_module", absent)
    hidden, weight, targets, *_ = case()
    with pytest.raises(RuntimeError, match=r"minirlhf\.kernels\.head"):
        head_stats(hidden, weight, targets, impl="triton")


class OnCuda:
    """What `choose` reads of a tensor."""

    def __init__(self, dtype):
        self.is_cuda, self.dtype = True, dtype


@pytest.mark.parametrize(
    ("impl", "dtype", "installed", "chosen"),
    [
        ("auto", torch.bfloat16, True, "triton"),
        ("auto", torch.bfloat16, False, "torch"),
        ("auto", torch.float64, True, "torch"),
        ("torch", torch.bfloat16, True, "torch"),
        ("triton", torch.float32, True, "triton"),
        ("triton", torch.float64, True, "triton"),
    ],
)
def test_the_choice_on_cuda(monkeypatch, impl, dtype, installed, chosen):
    class Kernels:
        head_stats_triton = "triton"

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(ops.importlib, "import_module", lambda name: Kernels)
    expected = "triton" if chosen == "triton" else ops._head_stats_torch
    assert ops.choose(impl, OnCuda(dtype)) == expected


def test_the_gradient_of_a_bf16_bias_is_summed_in_fp32():
    """Rows 256, 1, 1, 1, a tile each: 259, rounded once, is 260; in bf16 256 + 1 stays 256."""
    hidden = torch.zeros(4, 2, requires_grad=True)
    bias = torch.tensor([0.0, 60.0], dtype=torch.bfloat16, requires_grad=True)  # p of the target is 0 in fp32
    found = head_stats(hidden, torch.zeros(2, 2, requires_grad=True), torch.zeros(4, dtype=torch.int64), bias=bias)
    found.logprobs.backward(torch.tensor([256.0, 1.0, 1.0, 1.0]))
    assert bias.grad.tolist() == [260.0, -260.0]


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_slopes_of_a_frozen_bf16_weight_are_fp32(temperature):
    """hidden in fp32: every number but the weight's own rounding is fp32, in the forward pass's slopes as elsewhere."""
    hidden, weight, targets, *_ = case(9, 5, 11, dtype=torch.float32)
    weight = weight.bfloat16()
    a, b = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found = head_stats(a, weight, targets, temperature=temperature, want=("logprobs", "entropy", "lse"))
    (found.logprobs + 2 * found.entropy - 3 * found.lse).sum().backward()
    naive = naive_head_stats(b, weight.double(), targets, temperature=temperature)
    (naive.logprobs + 2 * naive.entropy - 3 * naive.lse).sum().backward()
    assert_close(a.grad.double(), b.grad, fp32)
