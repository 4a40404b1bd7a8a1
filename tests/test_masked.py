"""Sum, mean, variance, whitening: what padding holds must not matter, nor how rows are spread over ranks."""

import math

import pytest
import torch
from tolerance import assert_close, exact, fp32, fp64

from minirlhf.masked import keep, masked_mean, masked_sum, masked_var, whiten

NAN, INF = float("nan"), float("inf")
MASK = torch.tensor([[True, True, False], [True, False, False]])


def x(pad=0.0, dtype=torch.float64):
    return torch.tensor([[1.0, 4.0, pad], [7.0, pad, pad]], dtype=dtype)


@pytest.mark.parametrize("pad", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize(
    "function",
    [
        keep,
        masked_sum,
        masked_mean,
        masked_var,
        whiten,
        lambda x, m: whiten(x, m, center=False),
        lambda x, m: whiten(x, m, ddof=1),
    ],
)
def test_padding_changes_neither_result_nor_gradient(function, pad):
    a, b = x().requires_grad_(), x(pad).requires_grad_()
    weights = torch.tensor([[1.0, -2.0, 3.0], [0.5, 7.0, 1.0]], dtype=torch.float64)
    for leaf in (a, b):
        (function(leaf, MASK) * weights).sum().backward()
    assert torch.equal(function(a, MASK), function(b, MASK))
    assert torch.equal(a.grad, b.grad)
    assert b.grad[~MASK].eq(0).all()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_computes_in_fp32_at_least(dtype):
    values = torch.tensor([[1, 4, 0], [7, 0, 0]]).to(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for function in (keep, masked_sum, masked_mean, masked_var, whiten):
        assert function(values, MASK).dtype == wanted


def test_sum_of_bf16_does_not_stall():
    assert masked_sum(torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000, dtype=torch.bool)) == 1000


def test_mean_over_one_count_is_the_mean_of_everything():
    parts = [(x()[:1], MASK[:1]), (x()[1:], MASK[1:])]
    assert_close(sum(masked_mean(a, m, count=3) for a, m in parts), 4.0, fp64)
    assert sum(masked_mean(a, m) for a, m in parts) / 2 == 4.75  # the mean of means is another number


def test_masked_microbatch_gives_zero_not_nan():
    a = x(NAN).requires_grad_()
    loss = masked_mean(a, torch.zeros_like(MASK), count=torch.tensor(3))
    loss.backward()
    assert loss == 0
    assert a.grad.eq(0).all()


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_mean_of_nothing_is_an_error(count):
    with pytest.raises(ValueError, match="count of True entries is 0"):
        masked_mean(x(), torch.zeros_like(MASK), count=count)


@pytest.mark.parametrize(("n", "ddof"), [(0, 0), (0, 1), (1, 1)])
def test_variance_of_too_few_is_an_error(n, ddof):
    mask = torch.arange(4) < n
    with pytest.raises(ValueError, match=f"{n} True entries are too few for ddof {ddof}"):
        masked_var(torch.ones(4), mask, ddof=ddof)
    if ddof:
        with pytest.raises(ValueError, match=f"{n} True entries are too few for ddof {ddof}"):
            whiten(torch.ones(4), mask, ddof=ddof)


def test_fewest_entries_that_do():
    assert masked_var(torch.ones(4), torch.arange(4) < 1) == 0
    assert masked_var(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), ddof=1) == 2
    assert whiten(torch.ones(4), torch.arange(4) < 1).eq(0).all()
    assert whiten(torch.full((4,), NAN), torch.zeros(4, dtype=torch.bool)).eq(0).all()
    root = math.sqrt(0.5)
    assert_close(whiten(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), ddof=1), [-root, root], fp32)


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -3.3e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [True, False])
def test_equal_entries_whiten_to_exactly_zero(value, dtype, center):
    values = torch.full((3, 7), value, dtype=dtype)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    white = whiten(values, mask, center=center)
    assert_close(white[mask], torch.full((11,), 0.0 if center else value, dtype=dtype), exact)
    assert masked_var(values, mask) == 0


def test_large_offset_costs_no_digits():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0]) + 2**20
    mask = torch.ones(4, dtype=torch.bool)
    assert_close(whiten(values, mask), whiten(values - 2**20, mask), fp32)
    assert_close(masked_var(values, mask), 1.25, fp32)


def test_eps_is_under_the_root():
    values, mask = torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    assert_close(whiten(values, mask, eps=3.0), [-0.5, 0.5], fp64)  # 1/√(1 + 3)


def test_two_ranks_whiten_as_one():
    """`all_sum` adds what the other rank holds: here both ranks run in turn, the second with the sums of the first."""
    other = torch.tensor([[0.5, 9.0]], dtype=torch.float64)
    everything, everywhere = (
        torch.cat([x().flatten(), other.flatten()]),
        torch.cat([MASK.flatten(), torch.tensor([True] * 2)]),
    )
    mean = everything[everywhere].mean()
    sums = iter([torch.tensor(2), other.sum(), (other - mean).sum(), (other - mean).square().sum()])
    assert_close(
        whiten(x(), MASK, all_sum=lambda s: s + next(sums)),
        whiten(everything, everywhere)[:6].view(2, 3),
        fp64,
    )


def test_masks_are_bool_and_of_the_shape():
    with pytest.raises(AssertionError, match="int64"):
        masked_sum(x(), MASK.long())
    with pytest.raises(AssertionError, match="Size"):
        masked_sum(x(), MASK[:1])


def test_nothing_at_all_whitens_without_nan_in_the_gradient():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    white = whiten(x, torch.zeros(1, 2, dtype=torch.bool))
    assert white.tolist() == [[0.0, 0.0]]
    white.sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0]]
