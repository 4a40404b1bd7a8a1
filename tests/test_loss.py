"""Losses: dtypes, shapes, padding, ties, what is refused. Numbers: test_golden.py."""

import math

import pytest
import torch
from tolerance import assert_close, exact, fp32, fp64

from minirlhf.loss import (
    centering_penalty,
    cispo_loss,
    direct_score_loss,
    dpo_loss,
    dual_clip_loss,
    imitation_loss,
    is_clipped,
    pairwise_loss,
    policy_loss,
    ranking_loss,
    sequence_log_ratio,
    sequence_policy_loss,
    value_loss,
)

RANKS = torch.tensor([[1, 2, 0, 2], [3, 1, 1, 4]])


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computes_in_fp32_at_least(dtype):
    """Half precision gives the fp32 loss of the same numbers, not a rounded one."""
    a, b, c, d = numbers(4, 2, 4, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    functions = [
        lambda a, b, c, d: policy_loss(a, b, c, clip_range=0.2),
        lambda a, b, c, d: value_loss(a, b, c, clip_range=0.2),
        lambda a, b, c, d: pairwise_loss(a[0], b[0], margin=0.5),
        lambda a, b, c, d: dpo_loss(a[0], b[0], c[0], d[0], beta=0.1),
        lambda a, b, c, d: direct_score_loss(a[0], b[0]),
        lambda a, b, c, d: centering_penalty(a, RANKS),
        *(lambda a, b, c, d, kind=kind: ranking_loss(a, RANKS, kind=kind) for kind in ("log", "sigmoid", "softmax")),
    ]
    for function in functions:
        loss = function(a, b, c, d)
        assert loss.dtype == wide
        assert_close(loss, function(*(x.to(wide) for x in (a, b, c, d))), exact)
    assert is_clipped(a, b, c, clip_range=0.2).dtype == torch.bool


def test_is_clipped_of_half_precision_is_that_of_fp32():
    new, old, A = torch.tensor([[0.18359375]]).bfloat16(), torch.zeros(1, 1).bfloat16(), torch.ones(1, 1).bfloat16()
    assert is_clipped(new, old, A, clip_range=0.2) == (math.exp(0.18359375) > 1.2)
    new = new * 0 + 0.181640625
    assert is_clipped(new, old, A, clip_range=0.2) == (math.exp(0.181640625) > 1.2)


def test_an_advantage_of_zero_is_never_clipped():
    assert not is_clipped(torch.tensor([[5.0, -5.0]]), torch.zeros(1, 2), torch.zeros(1, 2), clip_range=0.2).any()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: policy_loss(x, x, x[:1], clip_range=0.2),
        lambda x: policy_loss(x, x[:1], x, clip_range=0.2),
        lambda x: value_loss(x, x[:, :1], x),
        lambda x: pairwise_loss(x, x[:1]),
        lambda x: ranking_loss(x, RANKS[:1]),
        lambda x: ranking_loss(x[0], RANKS[0]),
        lambda x: centering_penalty(x, RANKS[:, :1]),
        lambda x: direct_score_loss(x, x[:1]),
        lambda x: dpo_loss(x[0], x[0], x[0][:, None], x[0][:, None], beta=0.1),  # (4, 4), were it not refused
        lambda x: pairwise_loss(x[0], x[0], margin=x[0][:, None]),
        lambda x: ranking_loss(x, RANKS, margin=x[0]),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(AssertionError, match="Size"):
        call(numbers(2, 4))


@pytest.mark.parametrize("pad", [float("nan"), math.inf, -math.inf, 1e300])
def test_padding_has_no_gradient(pad):
    """0 · NaN is NaN: the upstream gradient of padding is 0, and so must be what comes out."""
    x = numbers(3, 1, 2)
    x[:, :, 1] = pad
    for function in (policy_loss, value_loss):
        leaves = [row.clone().requires_grad_() for row in x]
        loss = function(*leaves, clip_range=0.2)
        torch.where(torch.tensor([[True, False]]), loss, 0.0).sum().backward()
        for leaf in leaves:
            assert torch.isfinite(leaf.grad[0, 0])
            assert leaf.grad[0, 1] == 0


def test_upstream_gradient_is_a_factor():
    x = numbers(3, 2, 4)
    grads = []
    for factor in (1.0, -2.5):
        leaves = [row.clone().requires_grad_() for row in x]
        (factor * policy_loss(*leaves, clip_range=0.2).sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        assert_close(b, -2.5 * a, fp64)


def test_a_loss_needs_no_gradient():
    a, b, c = numbers(3, 2, 2)
    with torch.no_grad():
        assert not policy_loss(a.requires_grad_(), b, c, clip_range=0.2).requires_grad
    assert not value_loss(b, b, c).requires_grad
    expected = policy_loss(a, b, c, clip_range=0.2)
    assert (b.requires_grad, c.requires_grad) == (False, False)  # the inputs stay what they are
    with torch.inference_mode():
        assert_close(policy_loss(a, b, c, clip_range=0.2), expected.detach(), exact)


def test_ranking_loss_refuses_other_kinds():
    with pytest.raises(ValueError, match="kind 'hinge' is none of log, sigmoid, softmax"):
        ranking_loss(numbers(2, 4), RANKS, kind="hinge")


def test_the_default_ranking_loss_is_the_logarithm():
    x = numbers(2, 4)
    assert_close(ranking_loss(x, RANKS), ranking_loss(x, RANKS, kind="log"), exact)
    assert (ranking_loss(x, RANKS, kind="sigmoid") < 0).all()


@pytest.mark.parametrize("kind", ["log", "sigmoid", "softmax"])
@pytest.mark.parametrize("ranks", [[0, 0, 0], [1, 0, 0], [2, 2, 2], [0, 3, 3]])
def test_lists_without_a_pair_have_no_loss_and_no_gradient(kind, ranks):
    x = numbers(1, 3).requires_grad_()
    loss = ranking_loss(x, torch.tensor([ranks]), kind=kind)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert not x.grad.any()
    assert centering_penalty(x, torch.tensor([ranks])).tolist() == [0.0]


@pytest.mark.parametrize("kind", ["log", "sigmoid", "softmax"])
def test_absent_answers_may_hold_anything(kind):
    for junk in (float("nan"), math.inf, -math.inf, 1e300):
        x = torch.tensor([[0.5, junk, -0.5]], dtype=torch.float64, requires_grad=True)
        loss = ranking_loss(x, torch.tensor([[1, 0, 2]]), kind=kind)
        (loss + centering_penalty(x, torch.tensor([[1, 0, 2]]))).sum().backward()
        assert_close(loss, ranking_loss(torch.tensor([[0.5, -0.5]]).double(), torch.tensor([[1, 2]]), kind=kind), fp64)
        assert torch.isfinite(x.grad).all()
        assert x.grad[0, 1] == 0


def test_only_the_order_of_ranks_counts():
    x = numbers(1, 4)
    for kind in ("log", "sigmoid", "softmax"):
        one = ranking_loss(x, torch.tensor([[1, 2, 3, 4]]), kind=kind)
        assert_close(ranking_loss(x, torch.tensor([[2, 5, 7, 90]]), kind=kind), one, exact)


def test_softmax_of_far_scores_stays_finite():
    x = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = ranking_loss(x, torch.tensor([[2, 1, 3]]), kind="softmax")
    loss.sum().backward()
    assert loss == 2e4
    assert_close(x.grad, [[1.0, -1.0, 0.0]], exact)


def test_margin_per_pair():
    chosen, rejected, margin = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])
    assert_close(pairwise_loss(chosen, rejected, margin=margin), [math.log1p(math.exp(-1)), math.log(2)], fp32)
    for one in (1.0, torch.tensor(1.0)):
        assert_close(pairwise_loss(chosen, rejected, margin=one), [math.log(2)] * 2, fp32)
        assert_close(ranking_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 2]]), margin=one), [math.log(2)], fp32)


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    """Below -3|Â| the surrogate goes no further, and has no slope; where Â ≥ 0 nothing changes."""
    new = f64([[math.log(5.0), math.log(2.0), math.log(5.0), math.log(5.0)]]).requires_grad_()
    old, A = torch.zeros(1, 4).double(), f64([[-1.0, -1.0, 1.0, 0.0]])
    loss = dual_clip_loss(new, old, A, clip_range=0.2)
    loss.sum().backward()
    assert_close(loss, [[3.0, 2.0, -1.2, 0.0]], fp64)
    assert_close(new.grad, [[0.0, 2.0, 0.0, 0.0]], fp64)
    assert_close(dual_clip_loss(new, old, A, clip_range=0.2, dual_clip=4.0)[0, 0], 4.0, fp64)


def test_one_ratio_of_a_whole_answer():
    """The mean log-ratio over real tokens, at each of them; an answer of one token has its own, an empty one none."""
    gap = f64([[0.3, -0.1, 9.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]]).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    log_s = sequence_log_ratio(gap, torch.zeros(3, 3).double(), mask)
    assert_close(log_s, [[0.1, 0.1, 0], [0.5, 0, 0], [0, 0, 0]], fp64)
    loss = sequence_policy_loss(gap, torch.zeros(3, 3).double(), torch.full((3, 3), 2.0).double(), mask, clip_range=0.2)
    assert_close(loss, [[-2 * math.exp(0.1)] * 2 + [0], [-2.4, 0, 0], [0, 0, 0]], fp64)
    loss.sum().backward()
    assert_close(gap.grad, [[-2 * math.exp(0.1)] * 2 + [0], [0, 0, 0], [0, 0, 0]], fp64)


def test_the_weight_of_cispo_is_clipped_and_has_no_gradient():
    new = f64([[math.log(2.0), math.log(0.5), 0.0]]).requires_grad_()
    loss = cispo_loss(new, torch.zeros(1, 3).double(), f64([[3.0, -1.0, 2.0]]), clip_range=(0.2, 0.4))
    loss.sum().backward()
    assert_close(loss, [[-1.4 * 3 * math.log(2), -0.8 * math.log(2), 0.0]], fp64)
    assert_close(new.grad, [[-4.2, 0.8, -2.0]], fp64)


def test_unlearning_a_certain_token_costs_a_number():
    """log(1 - π) and its slope at π = 1 are those at π = e^(-1e-6); a little below, the cut is not felt."""
    logprobs = f64([[0.0, -1e-5, -0.5]]).requires_grad_()
    loss = imitation_loss(logprobs, f64([[-2.0, -1.0, -1.0]]))
    loss.sum().backward()
    assert_close(
        loss, [[-2 * math.log(-math.expm1(-1e-6)), -math.log(-math.expm1(-1e-5)), -math.log(1 - math.exp(-0.5))]], fp64
    )
    assert_close(logprobs.grad, [[2 / math.expm1(1e-6), 1 / math.expm1(1e-5), 1 / math.expm1(0.5)]], fp64)


def test_value_loss_without_clipping_ignores_old_values():
    v, old, R = numbers(3, 2, 3)
    assert_close(value_loss(v, old, R), (v - R) ** 2 / 2, fp64)
    assert_close(value_loss(v, old * 100, R), value_loss(v, old, R), exact)
