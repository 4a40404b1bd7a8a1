"""What must hold for every shape, mask and number: the invariances of the loss mathematics, in fp64.

Numbers are normal from a drawn seed, masks have holes and empty rows. The models' share is test_properties_models.py.
"""

import itertools
import math
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tolerance import assert_close, exact, fp64

from minirlhf.advantage import explained_variance, gae, group_advantages
from minirlhf.loss import (
    centering_penalty,
    direct_score_loss,
    dpo_loss,
    is_clipped,
    pairwise_loss,
    policy_loss,
    ranking_loss,
    value_loss,
)
from minirlhf.masked import keep, masked_mean, masked_sum, masked_var, whiten
from minirlhf.ops import head_stats, kl_estimate, token_logprobs
from minirlhf.reward import shape_rewards

settings.register_profile(
    "bounded", max_examples=int(os.environ.get("EXAMPLES", 25)), phases=(Phase.explicit, Phase.generate), deadline=None,
    derandomize=True, database=None,
)  # fmt: skip
settings.load_profile("bounded")
KINDS = pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
sums = {"rtol": 1e-12, "atol": 1e-12}  # the same numbers in another order


class Case:
    """A mask (B, R) and a stream of normal numbers of its shape."""

    def __init__(self, mask, seed):
        self.mask, self.rng = mask, torch.Generator().manual_seed(seed)
        self.B, self.R = mask.shape
        self.n = int(mask.sum())

    def normal(self, *shape, scale=1.0):
        return torch.randn(*(shape or self.mask.shape), generator=self.rng, dtype=torch.float64) * scale

    def numbers(self):
        """Four (B, R) inputs and one (B,)."""
        return [self.normal() for _ in range(4)] + [self.normal(self.B)]

    def perm(self):
        return torch.randperm(self.B, generator=self.rng)


@st.composite
def cases(draw, least=0, solid=False):
    """Up to 4 rows of up to 6 columns; `least` True entries; `solid`: no holes, no empty row."""
    B, R = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    if solid:
        lengths = draw(st.lists(st.integers(1, R), min_size=B, max_size=B))
        mask = torch.arange(R) < torch.tensor(lengths)[:, None]
    else:
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=B * R, max_size=B * R))).view(B, R)
    for i in range(B * R):
        if int(mask.sum()) < least:
            mask.view(-1)[i] = True
    if int(mask.sum()) < least:
        mask = torch.ones(B, R + least, dtype=torch.bool)
    return Case(mask, draw(st.integers(0, 2**32 - 1)))


seeds = st.integers(0, 2**32 - 1)

# Of a, b, c, d (B, R), scores (B,) and mask: (B, R) results that depend on no other row, or on all through sums.
BY_ROW = {
    "keep": lambda a, b, c, d, s, m: keep(a, m),
    "gae": lambda a, b, c, d, s, m: gae(a, b, m, gamma=0.9, lam=0.8)[0],
    "returns": lambda a, b, c, d, s, m: gae(a, b, m, gamma=0.9, lam=0.8)[1],
    "policy_loss": lambda a, b, c, d, s, m: keep(policy_loss(a, b, c, clip_range=0.2), m),
    "value_loss": lambda a, b, c, d, s, m: keep(value_loss(a, b, c), m),
    "value_loss clipped": lambda a, b, c, d, s, m: keep(value_loss(a, b, c, clip_range=0.2), m),
    "is_clipped": lambda a, b, c, d, s, m: is_clipped(a, b, c, clip_range=0.2) & m,
    **{
        f"shape_rewards {kind}": lambda a, b, c, d, s, m, kind=kind: shape_rewards(s, a, b, m, kl_coef=0.3, kl=kind)
        for kind in ("k1", "k2", "k3", "abs")
    },
}
BY_SUM = {
    "whiten": lambda a, b, c, d, s, m: whiten(a, m),
    "whiten, mean kept": lambda a, b, c, d, s, m: whiten(a, m, center=False),
    "whiten, ddof 1": lambda a, b, c, d, s, m: whiten(a, m, ddof=1),
    "masked_sum": lambda a, b, c, d, s, m: masked_sum(a, m),
    "masked_mean": lambda a, b, c, d, s, m: masked_mean(a, m),
    "masked_var": lambda a, b, c, d, s, m: masked_var(a, m),
    "explained_variance": lambda a, b, c, d, s, m: explained_variance(a, b, m),
    "objective": lambda a, b, c, d, s, m: objective(a, b, c, d, s, m),
}
FUNCTIONS = BY_ROW | BY_SUM


def objective(logprobs, values, old, ref, scores, mask, *, n=None, all_sum=lambda x: x):
    """Rewards, advantages, whitening, both losses, divided once: what `ppo_iteration` does between its models."""
    m, (old, ref) = mask, (old.detach(), ref.detach())
    rewards = shape_rewards(scores.detach(), old, ref, m, kl_coef=0.1)
    advantages, returns = gae(rewards, 0.5 * ref, m, gamma=0.99, lam=0.9)
    advantages = whiten(advantages, m, all_sum=all_sum)
    loss = policy_loss(logprobs, old, advantages, clip_range=0.2) + 0.5 * value_loss(
        values, 0.5 * ref, returns, clip_range=0.3
    )
    return masked_sum(loss, m) / (m.sum() if n is None else n)


def with_gradient(function, inputs, mask):
    """Result, and the gradients of a fixed weighting of it with respect to the float inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = function(*leaves, mask)
    if not result.requires_grad:
        return result, [torch.zeros_like(x) for x in leaves]
    weight = torch.arange(1.0, result.numel() + 1, dtype=result.dtype).view_as(result)
    found = torch.autograd.grad((result * weight).sum(), leaves, materialize_grads=True)
    return result.detach(), list(found)


# ---- 1, 2: padding, order of rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@given(case=cases(least=2), pad=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
def test_01_what_stands_in_the_padding_is_irrelevant(name, case, pad):
    """Bitwise, in results and in gradients, which are 0 at padding."""
    inputs, m = case.numbers(), case.mask
    dirty = [torch.where(m, x, pad) for x in inputs[:4]] + [torch.where(m.any(1), inputs[4], pad)]
    clean = [keep(x, m) for x in inputs[:4]] + [inputs[4]]
    a, da = with_gradient(FUNCTIONS[name], clean, m)
    b, db = with_gradient(FUNCTIONS[name], dirty, m)
    assert_close(b, a, exact | {"equal_nan": True})
    if a.shape == m.shape:
        assert not b[~m].any()
    for x, y in zip(da, db, strict=True):
        assert_close(y, x, exact | {"equal_nan": True})
    assert not any(g[~m].any() for g in db[:4])


@pytest.mark.parametrize("name", FUNCTIONS)
@given(case=cases(least=2), more=st.sampled_from([1, 3, 50]))
def test_01_more_padding_changes_nothing(name, case, more):
    inputs, m = case.numbers(), case.mask
    longer = [torch.cat([x, case.normal(case.B, more)], 1) for x in inputs[:4]] + [inputs[4]]
    a = FUNCTIONS[name](*inputs, m)
    b = FUNCTIONS[name](*longer, torch.cat([m, torch.zeros(case.B, more, dtype=torch.bool)], 1))
    if a.shape == m.shape:
        assert not b[:, case.R :].any()
        b = b[:, : case.R]
    if name in BY_ROW:
        assert torch.equal(a, b)
    else:
        assert_close(b, a, sums | {"equal_nan": True})


@pytest.mark.parametrize("name", FUNCTIONS)
@given(case=cases(least=2))
def test_02_rows_in_another_order(name, case):
    inputs, m, perm = case.numbers(), case.mask, case.perm()
    a, b = FUNCTIONS[name](*inputs, m), FUNCTIONS[name](*(x[perm] for x in inputs), m[perm])
    a = a[perm] if a.shape == m.shape else a
    assert_close(b, a, exact if name in BY_ROW else sums | {"equal_nan": True})


# ---- 3: microbatches and ranks --------------------------------------------------------------------------------------


def on_ranks(parts, job):
    """job(part, all_sum) for each part at once, one thread each → results."""
    boxes, results = [None] * len(parts), [None] * len(parts)
    barrier = threading.Barrier(len(parts))

    def run(rank):
        def all_sum(x):
            boxes[rank] = x
            barrier.wait()
            total = sum(boxes)
            barrier.wait()
            return total

        results[rank] = job(parts[rank], all_sum)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@given(seed=seeds)
@settings(max_examples=10)
def test_03_microbatches_and_ranks_give_the_same_gradient(ranks, seed):
    """12 rows, one of them empty, as 1×12 … 4×3; statistics and the divisor are those of the whole step."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (12,), generator=rng)
    case = Case(torch.arange(5) < lengths[:, None], seed)
    case.mask[0] = True
    inputs = case.numbers()
    whole = with_gradient(lambda *x: objective(*x), inputs, case.mask)

    def job(rows, all_sum):
        part = [x[rows] for x in inputs]
        f = lambda *x: objective(*x, n=all_sum(x[-1].sum()), all_sum=lambda y: all_sum(y.detach()))  # noqa: E731
        return with_gradient(f, part, case.mask[rows])

    parts = on_ranks(list(torch.arange(12).chunk(ranks)), job)
    assert_close(sum(loss for loss, _ in parts), whole[0], sums)
    for i in range(5):
        assert_close(torch.cat([g[i] for _, g in parts]), whole[1][i], sums)


# ---- 4, 5: the policy loss ------------------------------------------------------------------------------------------


@given(case=cases(least=1))
def test_04_at_ratio_one_the_gradient_is_reinforce(case):
    """old = new: ρ = 1, nothing is clipped, d loss/d log π = -Â·mask/N."""
    old, A, m = case.normal(scale=5), case.normal(), case.mask
    new = old.clone().requires_grad_()
    assert torch.exp(new - old).eq(1).all()
    assert not is_clipped(new, old, A, clip_range=0.2).any()
    loss = policy_loss(new, old, A, clip_range=0.2)
    assert torch.equal(loss.detach(), -A)
    (masked_sum(loss, m) / case.n).backward()
    assert_close(new.grad, -keep(A, m) / case.n, sums)


@given(case=cases(), eps=st.sampled_from([0.05, 0.2, 0.5]))
def test_05_clipped_quadrants_have_no_gradient(case, eps):
    """Â > 0 with ρ > 1 + ε, Â < 0 with ρ < 1 - ε; everywhere else the slope is -ρÂ."""
    old, A = case.normal(), case.normal()
    new = (old + case.normal()).requires_grad_()
    policy_loss(new, old, A, clip_range=eps).sum().backward()
    ratio = torch.exp(new - old).detach()
    clipped = ((A > 0) & (ratio > 1 + eps)) | ((A < 0) & (ratio < 1 - eps))
    assert_close(new.grad, torch.where(clipped, 0.0, -ratio * A), sums)
    assert torch.equal(is_clipped(new, old, A, clip_range=eps), clipped)


@given(case=cases(), eps=st.sampled_from([0.05, 0.5]))
def test_05_a_clipped_value_has_a_slope_only_where_it_is_the_worse_one(case, eps):
    old, R = case.normal(), case.normal()
    v = (old + case.normal()).requires_grad_()
    loss = value_loss(v, old, R, clip_range=eps)
    loss.sum().backward()
    near = torch.minimum(torch.maximum(v.detach(), old - eps), old + eps)
    plain, clipped = (v.detach() - R) ** 2, (near - R) ** 2
    assert_close(loss.detach(), torch.maximum(plain, clipped) / 2, sums)
    assert (loss >= value_loss(v, old, R)).all()
    assert_close(v.grad, torch.where((plain >= clipped) | (near == v), v.detach() - R, 0.0), sums)


# ---- 6, 7: GAE ------------------------------------------------------------------------------------------------------


def gae_by_definition(r, v, gamma, lam):
    """Â_t = Σ_l (γλ)^l δ_{t+l}, one row without padding (Schulman 2016, eq. 16)."""
    n = len(r)
    delta = [r[t] + (gamma * v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
    return [sum((gamma * lam) ** (j - t) * delta[j] for j in range(t, n)) for t in range(n)]


@given(case=cases(), gamma=st.sampled_from([1.0, 0.9, 0.0]), lam=st.sampled_from([1.0, 0.95, 0.5, 0.0]))
def test_06_gae_is_the_definitions_sum_and_the_matrix_product(case, gamma, lam):
    r, v, m = case.normal(), case.normal(), case.mask
    A, returns = gae(r, v, m, gamma=gamma, lam=lam)
    for b in range(case.B):
        row = gae_by_definition(r[b][m[b]].tolist(), v[b][m[b]].tolist(), gamma, lam)
        assert_close(A[b][m[b]], torch.tensor(row, dtype=torch.float64), sums)
        n = len(row)
        delta = np.array(gae_by_definition(r[b][m[b]].tolist(), v[b][m[b]].tolist(), gamma, 0.0))
        M = np.array([[(gamma * lam) ** (j - i) if j >= i else 0.0 for i in range(n)] for j in range(n)]).reshape(n, n)
        assert_close(A[b][m[b]], torch.from_numpy(delta @ M), sums)
    assert_close(returns, keep(A + v, m), exact)


@given(case=cases(solid=True), gamma=st.sampled_from([1.0, 0.9]))
def test_06_lambda_one_is_reward_to_go_and_lambda_zero_is_delta(case, gamma):
    r, v, m = keep(case.normal(), case.mask), keep(case.normal(), case.mask), case.mask
    to_go = torch.zeros_like(r)
    for t in range(case.R):
        to_go[:, t] = sum(gamma ** (k - t) * r[:, k] for k in range(t, case.R))
    assert_close(gae(r, v, m, gamma=gamma, lam=1.0)[0], keep(to_go - v, m), sums)
    following = torch.cat([v[:, 1:], torch.zeros(case.B, 1, dtype=v.dtype)], 1)
    assert_close(gae(r, v, m, gamma=gamma, lam=0.0)[0], keep(r + gamma * following - v, m), sums)


@given(case=cases(solid=True), c=st.floats(-5, 5), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.95, 0.3]))
def test_07_gae_is_linear_and_passes_the_last_reward_back(case, c, gamma, lam):
    m = case.mask
    r, v, r2, v2 = (case.normal() for _ in range(4))
    f = lambda r, v: gae(r, v, m, gamma=gamma, lam=lam)[0]  # noqa: E731
    assert_close(f(r + c * r2, v + c * v2), f(r, v) + c * f(r2, v2), fp64)
    n = m.sum(1, keepdim=True)
    after = n - 1 - torch.arange(case.R, dtype=torch.float64)  # (B, R) tokens that follow
    assert_close(f(r + c * (after == 0).double(), v) - f(r, v), keep(c * (gamma * lam) ** after, m), fp64)


# ---- 8, 9: whitening ------------------------------------------------------------------------------------------------


@given(case=cases(least=3), a=st.floats(0.1, 10), b=st.floats(-10, 10), ddof=st.sampled_from([0, 1]))
def test_08_whitened_numbers(case, a, b, ddof):
    """Mean 0, variance 1, order kept, a·x + b gives the same; ddof 1 is ddof 0 times √((n-1)/n)."""
    x, m = case.normal(), case.mask
    white = whiten(x, m, ddof=ddof, eps=0.0)
    n = case.n
    assert_close(white[m].mean(), 0.0, sums)
    assert_close(white[m].var(correction=ddof), 1.0, fp64)
    assert torch.equal(white[m].argsort(), x[m].argsort())
    assert_close(whiten(a * x + b, m, ddof=ddof, eps=0.0), white, fp64)
    assert_close(whiten(x, m, ddof=1, eps=0.0), whiten(x, m, eps=0.0) * math.sqrt((n - 1) / n), sums)
    kept = whiten(x, m, center=False, ddof=ddof, eps=0.0)
    assert_close(kept, keep(white + masked_mean(x, m), m), fp64)
    assert_close(kept[m].mean(), x[m].mean(), fp64)


@given(case=cases(solid=True, least=2), a=st.floats(0.1, 10), b=st.floats(-10, 10))
def test_09_scaling_all_scores_leaves_whitened_advantages(case, a, b):
    """Values 0, λ = γ = 1, β = 0: every token of an answer has its score as advantage."""
    zero, m, scores = torch.zeros_like(case.normal()), case.mask, case.normal(case.B)

    def advantages(scores):
        rewards = shape_rewards(scores, zero, zero, m, kl_coef=0.0)
        return gae(rewards, zero, m, gamma=1.0, lam=1.0)[0]

    assert_close(advantages(scores), keep(scores[:, None].expand_as(zero), m), exact)
    if case.B > 1:
        assert_close(whiten(advantages(a * scores + b), m, eps=0.0), whiten(advantages(scores), m, eps=0.0), fp64)


# ---- 10: reward-model losses ----------------------------------------------------------------------------------------


@st.composite
def lists(draw):
    """Scores (G, K), ranks with ties and absent answers."""
    G, K = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    ranks = draw(st.lists(st.integers(0, K), min_size=G * K, max_size=G * K))
    rng = torch.Generator().manual_seed(draw(seeds))
    scores = torch.randn(G, K, generator=rng, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    return scores, torch.tensor(ranks).view(G, K), torch.randperm(K, generator=rng)


@pytest.mark.parametrize("kind", ["log", "sigmoid", "softmax"])
@given(case=lists(), shift=st.floats(-30, 30))
def test_10_ranking_losses(kind, case, shift):
    """Invariant to a shift and to the order of the answers; gradients sum to 0; absent answers and lists have none."""
    scores, ranks, perm = case
    f = lambda s, r: ranking_loss(s, r, kind=kind)  # noqa: E731
    s = scores.clone().requires_grad_()
    loss = f(s, ranks)
    loss.sum().backward()
    assert_close(f(scores + shift, ranks), loss.detach(), fp64)
    assert_close(f(scores[:, perm], ranks[:, perm]), loss.detach(), sums)
    assert_close(s.grad.sum(1), torch.zeros(len(s), dtype=s.dtype), sums)
    assert not s.grad[ranks == 0].any()
    junk = torch.where(ranks == 0, torch.nan, scores)
    assert_close(f(junk, ranks), loss.detach(), exact)
    without = [len({r for r in row if r}) < 2 for row in ranks.tolist()]
    assert not loss[without].any()
    assert not s.grad[without].any()
    assert (loss[~torch.tensor(without)] > (-1 if kind == "sigmoid" else 0)).all() or scores.abs().max() > 10


@given(case=lists())
def test_10_a_list_is_the_mean_over_its_strict_pairs(case):
    scores, ranks, _ = case
    for row, order, log, sigmoid, center in zip(
        scores, ranks.tolist(), ranking_loss(scores, ranks), ranking_loss(scores, ranks, kind="sigmoid"),
        centering_penalty(scores, ranks), strict=True,
    ):  # fmt: skip
        K = range(len(order))
        pairs = [(i, j) for i in K for j in K if 0 < order[i] < order[j]]
        gaps = [float(row[i] - row[j]) for i, j in pairs]
        mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
        assert_close(log, mean([max(-g, 0.0) + math.log1p(math.exp(-abs(g))) for g in gaps]), fp64)
        assert_close(sigmoid, -mean([1 / (1 + math.exp(-g)) for g in gaps]), fp64)
        assert_close(center, mean([float(row[i] + row[j]) ** 2 for i, j in pairs]), fp64)


@given(seed=seeds, shift=st.floats(-50, 50), margin=st.floats(-2, 2))
def test_10_pairs(seed, shift, margin):
    """Shift invariant; K = 2 is a pair; gradients cancel; DPO is a pair of implicit rewards."""
    w, x, rw, rx = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    both = torch.stack([w, x], 1)
    assert_close(pairwise_loss(w + shift, x + shift, margin=margin), pairwise_loss(w, x, margin=margin), fp64)
    assert_close(ranking_loss(both, torch.tensor([[1, 2]] * 5)), pairwise_loss(w, x), sums)
    assert_close(ranking_loss(both, torch.tensor([[7, 3]] * 5)), pairwise_loss(x, w), sums)
    assert_close(pairwise_loss(w, x) - pairwise_loss(x, w), x - w, fp64)
    assert_close(dpo_loss(w, x, rw, rx, beta=0.3), pairwise_loss(0.3 * (w - rw), 0.3 * (x - rx)), sums)
    leaf = both.clone().requires_grad_()
    pairwise_loss(leaf[:, 0], leaf[:, 1]).sum().backward()
    assert_close(leaf.grad.sum(1), torch.zeros(5, dtype=w.dtype), sums)


@pytest.mark.parametrize("kind", ["mean", "rloo", "grpo"])
@given(seed=seeds, G=st.integers(1, 4), K=st.integers(2, 6), a=st.floats(0.5, 10), b=st.floats(-10, 10))
def test_10_group_advantages(kind, seed, G, K, a, b):
    """Sum 0 in each group; a shift changes nothing; a scale passes through, but for grpo, which divides it out."""
    rng = torch.Generator().manual_seed(seed)
    s = torch.randn(G, K, generator=rng, dtype=torch.float64)
    perm, A = torch.randperm(K, generator=rng), group_advantages(s, kind=kind)
    assert_close(A.sum(1), torch.zeros(G, dtype=s.dtype), fp64)
    assert_close(group_advantages(s + b, kind=kind), A, fp64)
    assert_close(group_advantages(s[:, perm], kind=kind), A[:, perm], sums)
    assert not group_advantages(torch.full((G, K), b, dtype=s.dtype), kind=kind).any()
    std = s.std(1, keepdim=True)
    scaled = A * a if kind != "grpo" else (s - s.mean(1, keepdim=True)) / (std + 1e-4 / a)
    assert_close(group_advantages(s * a, kind=kind), scaled, fp64)
    if kind == "rloo":
        others = torch.tensor([[np.delete(row, i).mean() for i in range(K)] for row in s.numpy()])
        assert_close(A, s - others, fp64)


# ---- 11, 12, 13: KL and rewards -------------------------------------------------------------------------------------


@given(seed=seeds)
def test_11_estimators_by_enumeration(seed):
    """k3 ≥ 0 and 0 only at x = 0; E k1 = E k3 = KL."""
    p, q = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        assert_close((p.exp() * kl_estimate(p, q, kind)).sum(), kl, sums)
    assert (kl_estimate(p, q, "k3") > 0).all()
    assert (kl_estimate(p, q, "k2") >= 0).all()
    assert not kl_estimate(p, p, "k3").any()
    assert_close(kl_estimate(p, q, "abs"), (p - q).abs(), exact)


# Expected gradients with respect to the logits, π = (.5, .3, .2), ref = (.25, .25, .5), worked out apart.
KL_GRADIENT, OTHER_KL = (0.2375676348, -0.0107071062, -0.2268605286), (0.25, 0.05, -0.30)
IN_REWARD = {
    "k1": KL_GRADIENT,
    "k2": (0.0156, -0.0577, 0.0421),
    "k3": (-0.0124, -0.0607, 0.0731),
    "abs": (0.0543, -0.1207, 0.0664),
}
AS_LOSS = {"k1": (0.0, 0.0, 0.0), "k2": KL_GRADIENT, "k3": OTHER_KL, "abs": (0.20, 0.12, -0.32)}
RATIO_TIMES = {"k1": KL_GRADIENT, "k2": (0.2532, -0.0684, -0.1847), "k3": KL_GRADIENT}
VALUE = {"k1": (0.2180, 0.371), "k2": (0.2091, 0.020), "k3": (0.2180, 0.039), "abs": (0.5845, 0.076)}


@KINDS
def test_11_what_each_use_of_an_estimator_optimises(kind):
    """Every action once, weighted with its probability: what sampling has as its expectation."""
    z = torch.log(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)).requires_grad_()
    ref, actions = torch.log(torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)), torch.arange(3)
    logprobs = token_logprobs(z.expand(3, 3), actions)
    old, p = logprobs.detach(), logprobs.detach().exp()
    estimate = kl_estimate(logprobs, ref, kind)
    mean = (p * estimate).sum()
    assert (mean.item(), (p * (estimate - mean) ** 2).sum().item()) == pytest.approx(VALUE[kind], abs=5e-4)

    def gradient(loss):
        return torch.autograd.grad((p * loss).sum(), z, retain_graph=True)[0].tolist()

    nothing, real = torch.zeros(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.bool)
    rewards = shape_rewards(nothing, old[:, None], ref[:, None], real, kl_coef=1.0, kl=kind)[:, 0]
    assert gradient(policy_loss(logprobs, old, rewards, clip_range=0.2)) == pytest.approx(IN_REWARD[kind], abs=5e-5)
    assert gradient(estimate) == pytest.approx(AS_LOSS[kind], abs=5e-5)
    if kind in RATIO_TIMES:
        assert gradient(torch.exp(logprobs - old) * estimate) == pytest.approx(RATIO_TIMES[kind], abs=5e-5)


def tree_policies(seed):
    """Tables of three symbols and three steps: logits (policy, ref) of the 13 states, and the 27 sequences."""
    rng = torch.Generator().manual_seed(seed)
    z, ref = torch.randn(2, 13, 3, generator=rng, dtype=torch.float64)
    y = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, 3)
    states = torch.stack([torch.zeros(27, dtype=torch.int64), 1 + y[:, 0], 4 + 3 * y[:, 0] + y[:, 1]], 1)  # (27, 3)
    return z.requires_grad_(), ref, y, states


@given(seed=seeds)
@settings(max_examples=10)
def test_11_on_sequences_only_k1_in_the_reward_with_reward_to_go_is_the_kl(seed):
    z, ref, y, states = tree_policies(seed)
    logprobs, ref_logprobs = token_logprobs(z[states], y), token_logprobs(ref[states], y)  # (27, 3)
    old, mask = logprobs.detach(), torch.ones(27, 3, dtype=torch.bool)
    p = old.sum(1).exp()

    def gradient(x):
        return torch.autograd.grad(x, z, retain_graph=True)[0]

    truth = gradient((logprobs.sum(1).exp() * (logprobs - ref_logprobs).sum(1)).sum())

    def by_reward(kind, lam=1.0):
        rewards = shape_rewards(torch.zeros(27).double(), old, ref_logprobs, mask, kl_coef=1.0, kl=kind)
        A, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=lam)
        return gradient((p[:, None] * policy_loss(logprobs, old, A, clip_range=0.2)).sum())

    assert_close(by_reward("k1"), truth, fp64)
    for wrong in (by_reward("k2"), by_reward("k3"), by_reward("abs"), by_reward("k1", lam=0.0)):
        assert (wrong - truth).norm() > 0.02 * truth.norm()
    ratio = torch.exp(logprobs - old)
    per_token = [
        kl_estimate(logprobs, ref_logprobs, "k2"),
        *(ratio * kl_estimate(logprobs, ref_logprobs, k) for k in ("k1", "k3")),
    ]
    first, *others = (gradient((p[:, None] * x).sum()) for x in per_token)
    for other in others:
        assert_close(other, first, fp64)
    assert (first - truth).norm() > 0.02 * truth.norm()
    whole, whole_ref = logprobs.sum(1), ref_logprobs.sum(1)
    for x in (
        kl_estimate(whole, whole_ref, "k2"),
        *(torch.exp(whole - whole.detach()) * kl_estimate(whole, whole_ref, k) for k in ("k1", "k3")),
    ):
        assert_close(gradient((p * x).sum()), truth, fp64)


@KINDS
@given(case=cases(solid=True))
def test_12_without_penalty_only_the_score_is_left(kind, case):
    scores, m = case.normal(case.B), case.mask
    rewards = shape_rewards(scores, case.normal(), case.normal(), m, kl_coef=0.0, kl=kind)
    last = torch.arange(case.R) == m.sum(1, keepdim=True) - 1
    assert torch.equal(rewards, torch.where(last, scores[:, None], 0.0))


@KINDS
@given(case=cases(), beta=st.floats(-1, 1))
def test_13_rewards_sum_to_the_score_less_the_penalty(kind, case, beta):
    scores, logprobs, ref, m = case.normal(case.B), case.normal(), case.normal(), case.mask
    rewards = shape_rewards(scores, logprobs, ref, m, kl_coef=beta, kl=kind)
    penalty = keep(kl_estimate(logprobs, ref, kind), m).sum(1)
    assert_close(rewards.sum(1), torch.where(m.any(1), scores, 0.0) - beta * penalty, fp64)


# ---- 14: gradients --------------------------------------------------------------------------------------------------

LOSSES = {
    "policy_loss": (lambda a, b, c: policy_loss(a, b, c, clip_range=0.2), [(2, 3)] * 3),
    "value_loss": (lambda a, b, c: value_loss(a, b, c), [(2, 3)] * 3),
    "value_loss clipped": (lambda a, b, c: value_loss(a, b, c, clip_range=0.2), [(2, 3)] * 3),
    "pairwise_loss": (lambda a, b: pairwise_loss(a, b, margin=0.3), [(4,)] * 2),
    "dpo_loss": (lambda a, b, c, d: dpo_loss(a, b, c, d, beta=0.3), [(4,)] * 4),
    "direct_score_loss": (direct_score_loss, [(4,)] * 2),
    "centering_penalty": (lambda s: centering_penalty(s, torch.tensor([[1, 2, 0, 2], [3, 1, 2, 4]])), [(2, 4)]),
    "token_logprobs": (lambda z: token_logprobs(z, torch.tensor([1, 0, 3]), temperature=0.7), [(3, 4)]),
    "gae": (lambda r, v: gae(r, v, torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), gamma=0.9, lam=0.8), [(2, 3)] * 2),
    "whiten": (lambda x: whiten(x, torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()), [(2, 3)]),
}
RANKS = torch.tensor([[1, 2, 0, 2], [3, 1, 1, 4]])
for k in ("log", "sigmoid", "softmax"):
    LOSSES[f"ranking_loss {k}"] = (lambda s, kind=k: ranking_loss(s, RANKS, kind=kind), [(2, 4)])
for k in ("k1", "k2", "k3", "abs"):
    LOSSES[f"kl_estimate {k}"] = (lambda a, b, kind=k: kl_estimate(a, b, kind), [(5,)] * 2)
for k in ("mean", "rloo", "grpo"):
    LOSSES[f"group_advantages {k}"] = (lambda s, kind=k: group_advantages(s, kind=kind), [(2, 3)])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_14_gradcheck(name, seed):
    function, shapes = LOSSES[name]
    rng = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("softcap", [None, 3.0])
@given(seed=seeds, N=st.integers(1, 4), n_vocab=st.integers(2, 6))
@settings(max_examples=5)
def test_14_gradcheck_of_head_stats(softcap, seed, N, n_vocab):
    rng = torch.Generator().manual_seed(seed)
    h, W, b, other, ref = (
        torch.randn(*s, generator=rng, dtype=torch.float64).requires_grad_()
        for s in [(N, 3), (n_vocab, 3), (n_vocab,), (N, 2), (n_vocab, 2)]
    )
    targets = torch.randint(n_vocab, (N,), generator=rng)
    targets[0] = -100

    def f(h, W, b):
        options = {"bias": b, "temperature": 0.7, "softcap": softcap, "ref_hidden": other, "ref_weight": ref}
        return tuple(head_stats(h, W, targets, **options, want=("logprobs", "entropy", "lse", "kl")))

    assert torch.autograd.gradcheck(f, (h, W, b))
