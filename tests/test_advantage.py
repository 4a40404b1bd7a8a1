"""GAE, group baselines, explained variance: dtypes, shapes, what is refused. Numbers: test_golden.py."""

import pytest
import torch
from tolerance import assert_close, exact, fp32, fp64

from minirlhf.advantage import explained_variance, gae, group_advantages

MASK = torch.tensor([[True, False, True], [False, False, False]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {y.dtype for y in gae(x, x, MASK, gamma=0.9, lam=0.9)} == {wide}
    assert {group_advantages(x, kind=kind).dtype for kind in ("mean", "rloo", "grpo")} == {wide}
    assert explained_variance(x, x, MASK).dtype == wide


def test_bf16_is_computed_in_fp32():
    x = torch.tensor([[1.0, 1.0078125, 257.0]]).bfloat16()
    assert_close(group_advantages(x, kind="mean"), x.float() - x.float().mean(), fp32)
    A, _ = gae(x, x * 0, torch.ones(1, 3).bool(), gamma=1.0, lam=1.0)
    assert_close(A, x.float().flip(1).cumsum(1).flip(1), fp32)


def test_returns_are_advantages_plus_values_before_anything_else():
    r, v = torch.tensor([[1.0, 5.0, 2.0], [7.0, 7.0, 7.0]]), torch.tensor([[0.5, 9.0, 0.25], [3.0, 3.0, 3.0]])
    A, returns = gae(r, v, MASK, gamma=0.5, lam=0.5)
    assert_close(A, [[1.0 + 0.125 - 0.5 + 0.25 * 1.75, 0, 1.75], [0, 0, 0]], exact)
    assert_close(returns, [[A[0, 0] + 0.5, 0, 2.0], [0, 0, 0]], exact)


def test_shapes():
    x = torch.ones(2, 3)
    with pytest.raises(AssertionError, match="Size"):
        gae(x[0], x[0], MASK[0], gamma=1.0, lam=1.0)
    with pytest.raises(AssertionError, match="Size"):
        gae(x, x, MASK[:1], gamma=1.0, lam=1.0)
    with pytest.raises(AssertionError, match="Size"):
        group_advantages(x[0], kind="mean")


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@pytest.mark.parametrize("K", [0, 1])
def test_comparing_needs_two(kind, K):
    with pytest.raises(ValueError, match=f"'{kind}' compares answers and needs at least 2 per prompt, not {K}"):
        group_advantages(torch.ones(3, K), kind=kind)


def test_fewest_answers_that_do():
    assert group_advantages(torch.tensor([[3.0]]), kind="mean").tolist() == [[0.0]]
    assert group_advantages(torch.tensor([[3.0, 5.0]]), kind="rloo").tolist() == [[-2.0, 2.0]]
    assert_close(group_advantages(torch.tensor([[3.0, 5.0]]), kind="grpo"), [[-0.70705679, 0.70705679]], fp32)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind 'ppo' is none of mean, rloo, grpo"):
        group_advantages(torch.ones(2, 2), kind="ppo")


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -3.3e-5])
@pytest.mark.parametrize("kind", ["mean", "rloo", "grpo"])
def test_equal_scores_are_exactly_zero(value, kind):
    assert not group_advantages(torch.full((2, 7), value), kind=kind).any()


def test_groups_are_independent():
    a, b = torch.tensor([[1.0, 2.0, 4.0]]).double(), torch.tensor([[100.0, -3.0, 8.0]]).double()
    for kind in ("mean", "rloo", "grpo"):
        both = group_advantages(torch.cat([a, b]), kind=kind)
        assert_close(both, torch.cat([group_advantages(a, kind=kind), group_advantages(b, kind=kind)]), fp64)


def test_explained_variance():
    m, R = torch.ones(1, 3).bool(), torch.tensor([[1.5, 2.0, 4.0]]).double()
    assert explained_variance(R, R, m) == 1
    assert_close(explained_variance(R * 0 + 3, R, m), 0.0, fp64)
    assert explained_variance(-R, R, m) < 0
    assert explained_variance(R * 0, R * 0 + 1, m).isnan()
    assert explained_variance(R, R * 0, m) == -torch.inf
