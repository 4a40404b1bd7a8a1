"""The small parts of a PPO iteration, each by hand: bonus, penalty, means, statistics, messages."""

import copy
import dataclasses
import math

import pytest
import torch
from test_ppo import iterate, weights
from test_rollout import OPTIONS, roles_of, roll
from tolerance import assert_close, exact, fp32, fp64

from minirlhf import ppo
from minirlhf.errors import NonFiniteError
from minirlhf.ppo import (
    TokenSums,
    epoch_plans,
    estimate,
    loss_mean,
    mean_of,
    optimizer_step,
    ppo_iteration,
    rollout_metrics,
    score_moments,
    surrogate,
)

WHOLE = {"minibatch_size": 12, "microbatch_size": 4, "epochs": 1}  # one optimizer step in three parts


def in_fp64():
    roles, _ = roles_of("gpt2")
    for model in roles[:3]:
        model.double()
    return roles, roll(roles)


def step_of(**changes):
    """What one step of SGD at rate 1 takes off the policy's weights."""
    roles, rollout = in_fp64()
    before = [p.detach().clone() for p in roles.policy.parameters()]
    iterate(roles, rollout, lr=1.0, **WHOLE, **changes)
    return [a - b.detach() for a, b in zip(before, roles.policy.parameters(), strict=True)]


def test_the_entropy_bonus_is_its_gradient():
    """The step with a bonus of 0.3, less the one without: -0.3 times the gradient of the mean entropy."""
    roles, rollout = in_fp64()
    total, count = 0.0, 0
    for b in range(len(rollout)):
        ids = torch.cat([rollout.prompts[b][rollout.prompt_mask[b]], rollout.responses[b][rollout.response_mask[b]]])
        first = len(ids) - int(rollout.lengths[b])
        logp = torch.log_softmax(roles.policy(ids[None])[0] / 0.9, -1)[first - 1 : len(ids) - 1]
        total, count = total - (logp.exp() * logp).sum(), count + len(logp)
    (total / count).backward()
    both = zip(step_of(entropy_coef=0.3), step_of(entropy_coef=0.0), roles.policy.parameters(), strict=True)
    for found, without, p in both:
        torch.testing.assert_close(found - without, -0.3 * p.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kl", ["k2", "k3", "abs"])
def test_the_reward_holds_the_estimator_that_was_asked_for(kl):
    roles, rollout = in_fp64()
    ref = torch.where(rollout.response_mask, rollout.old_logprobs * 1.2, 0.0)
    rollout = dataclasses.replace(rollout, ref_logprobs=ref)
    expected = 0.0
    for b in range(len(rollout)):
        expected += float(rollout.scores[b])
        for t in range(int(rollout.lengths[b])):
            x = float(rollout.old_logprobs[b, t]) * -0.2
            expected -= 0.1 * {"k2": x * x / 2, "k3": math.exp(-x) - 1 + x, "abs": abs(x)}[kl]
    found = iterate(roles, rollout, kl=kl)["objective/rlhf_reward"]
    assert found == pytest.approx(expected / len(rollout), rel=1e-6)


def test_the_penalty_in_the_loss_is_logged_and_blind_to_padding():
    """Mean k3 over real tokens; what stands under the padding reaches neither the loss nor the gradient."""
    roles, rollout = in_fp64()
    ref = torch.where(rollout.response_mask, rollout.old_logprobs * 1.2, 1e4)  # e^10000 would be infinite
    rollout = dataclasses.replace(rollout, ref_logprobs=ref)
    xs = (rollout.old_logprobs * 0.2)[rollout.response_mask]  # log π_ref - log π
    found = iterate(roles, rollout, lr=1e-9, kl_in="loss", kl="k3", **WHOLE)
    assert found["loss/kl_avg"] == pytest.approx(float((xs.exp() - 1 - xs).mean()), rel=1e-6)
    assert all(p.isfinite().all() for p in weights(roles))


def test_the_first_gap_is_the_mean_distance_of_the_ratio_from_1():
    roles, rollout = in_fp64()
    sign = torch.where(torch.arange(rollout.old_logprobs.shape[1]) % 2 == 0, 1.0, -1.0)
    off = torch.where(rollout.response_mask, rollout.old_logprobs + 0.1 * sign, 0.0)
    gaps = torch.where(sign > 0, 1 - math.exp(-0.1), math.exp(0.1) - 1).expand_as(off)[rollout.response_mask]
    found = iterate(roles, dataclasses.replace(rollout, old_logprobs=off), **WHOLE)["val/first_ratio_gap"]
    assert found == pytest.approx(float(gaps.double().mean()), rel=1e-5)


def test_the_kl_that_ends_the_epochs_is_that_of_the_last_one():
    def run(**changes):
        roles, rollout = in_fp64()
        return iterate(roles, rollout, lr=0.3, minibatch_size=6, microbatch_size=3, **changes)

    first = run(epochs=1)["policy/approxkl_avg"]
    both = run(epochs=2)["policy/approxkl_avg"]
    second = 2 * both - first
    assert both < second
    assert run(epochs=4, stop_kl=(both + second) / 2)["policy/epochs"] == 2


def test_the_ledger_s_eye_sees_every_microbatch_without_its_graph():
    roles, rollout = in_fp64()
    options, seen = dataclasses.replace(OPTIONS, **WHOLE), []
    parameters = [*roles.policy.parameters(), *roles.value_model.parameters()]
    how = {"kl_coef": 0.1, "temperature": 0.9, "max_grad_norm": 1.0, "longest": 0}
    plans = epoch_plans(rollout.total_lengths, options, 0, 1)
    for critic in (roles.value_model, None):
        ppo_iteration(
            roles.policy, critic, torch.optim.SGD(parameters, lr=0.0), rollout, rollout.scores, plans, options,
            watch=lambda *args: seen.append(args), **how,
        )  # fmt: skip
    assert len(seen) == 2 * len(plans[0][0]) > 2
    assert torch.cat([rows for rows, *_ in seen[: len(seen) // 2]]).sort()[0].tolist() == list(range(len(rollout)))
    for i, (rows, logprobs, values, A, returns) in enumerate(seen):
        R = int(rollout.lengths[rows].max())
        assert A.shape == returns.shape == logprobs.shape == (len(rows), R)
        assert not logprobs.requires_grad
        mask = rollout.response_mask[rows, :R]
        assert_close(logprobs[mask], rollout.old_logprobs[rows, :R][mask], fp32)
        if i < len(seen) // 2:
            assert not values.requires_grad
            assert_close(values[mask], rollout.values[rows, :R][mask], fp32)
        else:
            assert values is None
    assert not any(p.grad is not None for p in parameters)  # they are freed, not zeroed


def test_an_unknown_kernel_is_asked_for_by_name():
    roles, rollout = in_fp64()
    options = dataclasses.replace(OPTIONS, **WHOLE)
    plans = epoch_plans(rollout.total_lengths, options, 0, 1)
    with pytest.raises(ValueError, match="nothing"):
        ppo_iteration(
            roles.policy, None, torch.optim.SGD(roles.policy.parameters(), lr=0.0), rollout, rollout.scores, plans,
            options, kl_coef=0.1, temperature=0.9, max_grad_norm=1.0, longest=0, impl="nothing",
        )  # fmt: skip


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_rewards_by_hand(ddof):
    """(r - μ)/σ + μ; with γ = λ = 1 and no values, the advantage of a last token is its reward."""
    rewards = torch.tensor([[1.0, 2.0, 0.0], [4.0, 5.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    o = dataclasses.replace(OPTIONS, whiten_rewards=True, whiten_ddof=ddof, whiten_advantages=False, gae_lambda=1.0)
    variance = sum((x - 4.2) ** 2 for x in (1.0, 2.0, 4.0, 5.0, 9.0)) / (5 - ddof)
    advantages, _ = estimate(rewards, torch.zeros_like(rewards), mask, mask, o)
    expected = [(x - 4.2) / math.sqrt(variance + 1e-8) + 4.2 for x in (2.0, 9.0)]
    assert_close(advantages[[0, 1], [1, 2]], expected, fp64)


@pytest.mark.parametrize("ddof", [0, 1])
def test_one_token_has_no_variance(ddof):
    """Whitened it is 0, a reward itself."""
    reward, mask = torch.tensor([[3.0, 5.0]], dtype=torch.float64), torch.tensor([[True, False]])
    o = dataclasses.replace(OPTIONS, whiten_ddof=ddof, whiten_rewards=True)
    advantages, returns = estimate(reward, torch.zeros_like(reward), mask, mask, o)
    assert_close(advantages, [[0.0, 0.0]], exact)
    assert_close(returns, [[3.0, 0.0]], exact)


def test_two_tokens_have_a_variance():
    """4 and 1 less 2.5 over σ = 3/√2: there is a number of both minus one to divide by."""
    rewards, mask = torch.tensor([[4.0, 0.0], [1.0, 0.0]], dtype=torch.float64), torch.tensor([[True, False]] * 2)
    o = dataclasses.replace(OPTIONS, whiten_ddof=1, whiten_advantages=True)
    advantages, _ = estimate(rewards, torch.zeros_like(rewards), mask, mask, o)
    assert_close(advantages[:, 0], [1.5 / math.sqrt(4.5 + 1e-8), -1.5 / math.sqrt(4.5 + 1e-8)], fp64)


def test_one_token_and_the_state_after_it_have_a_variance():
    """With the score after the answer: rewards 1 and 5 of mean 3 and variance 4."""
    rewards, states = torch.tensor([[1.0, 5.0]], dtype=torch.float64), torch.tensor([[True, True]])
    o = dataclasses.replace(OPTIONS, whiten_ddof=0, whiten_rewards=True, whiten_advantages=False, gae_lambda=1.0)
    _, returns = estimate(rewards, torch.zeros_like(rewards), torch.tensor([[True, False]]), states, o)
    white = 2 / math.sqrt(4 + 1e-8)
    assert_close(returns, [[6.0, 3 + white]], fp64)


def test_the_group_s_total_is_of_real_tokens():
    rewards = torch.tensor([[1.0, 2.0, math.nan], [4.0, 5.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    o = dataclasses.replace(OPTIONS, advantage="rloo", answers_per_prompt=2)
    advantages, returns = estimate(rewards, torch.zeros_like(rewards), mask, mask, o)
    assert_close(advantages, [[-15.0, -15.0, 0.0], [15.0, 15.0, 15.0]], exact)
    assert_close(returns, [[3.0, 3.0, 0.0], [18.0, 18.0, 18.0]], exact)


def test_where_dual_clip_makes_a_difference():
    """Ratio 5 and A < 0, over a bound of 3; not at A = 0, not with A > 0 below a wider clip, not at ratio 2."""
    o = dataclasses.replace(OPTIONS, policy_loss="dual_clip", dual_clip=3.0, clip_range=0.2, clip_range_high=9.0)
    old, A = torch.zeros(1, 4), torch.tensor([[-1.0, 0.0, 0.5, -1.0]])
    logprobs = torch.tensor([[5.0, 5.0, 5.0, 2.0]]).log()
    assert surrogate(logprobs, old, A, torch.ones(1, 4, dtype=torch.bool), o)[1].tolist() == [
        [True, False, False, False]
    ]


@pytest.mark.parametrize(("kind", "expected"), [("answer", 4.0), ("microbatch", 3.0), ("step", 3.0), ("budget", 0.75)])
def test_means_where_an_answer_has_one_token_or_none(kind, expected):
    """Rows 6 (one token) and 2, 1 … their means are 6 and 1.5; a row of nothing has no part in it and no NaN."""
    x = torch.tensor([[6.0, 0.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    found = loss_mean(x, mask, mask, kind=kind, parts=1, longest=6)
    assert float(found.detach()) == pytest.approx({"answer": 7.5 / 2, "budget": 9 / 12}.get(kind, expected))
    found.backward()
    assert x.grad.isfinite().all()
    one = loss_mean(x[:1], mask[:1], mask, kind="microbatch", parts=1, longest=6)
    assert float(one.detach()) == 6.0
    none = loss_mean(x[2:], mask[2:], mask, kind="microbatch", parts=1, longest=6)
    assert float(none.detach()) == 0.0


def test_sums_are_added_in_fp64_and_hold_no_graph():
    parts = []
    for total in (2.0**24, 1.0, 1.0, 1.0):
        parts.append(TokenSums())
        parts[-1].add(torch.ones(1, 1, dtype=torch.bool), x=torch.full((1, 1), total, requires_grad=True))
    assert not parts[0].sums["x"].requires_grad
    assert mean_of(parts, "x") == (2.0**24 + 3) / 4
    assert score_moments(torch.tensor([2.0**24, 1.0, 1.0, 1.0]), "mean")["shift"] == (2.0**24 + 3) / 4


@pytest.mark.parametrize("scores", [[2.0, 2.0, 2.0], [0.0, 0.0], [5.0], [1e8, 1e8 + 8, 1e8], [-1e8, -1e8 - 8]])
def test_scores_that_are_all_alike_are_only_centred(scores):
    found = score_moments(torch.tensor(scores), "first")
    assert found == {"shift": pytest.approx(sum(scores) / len(scores)), "scale": 1.0}


def test_small_scores_are_scaled_as_large_ones():
    near = score_moments(torch.tensor([1.0, 1.000003], dtype=torch.float64), "first")
    assert near["scale"] == pytest.approx(1.5e-6)
    assert score_moments(torch.tensor([1e-9, 3e-9]), "first") == {
        "shift": pytest.approx(2e-9), "scale": pytest.approx(1e-9)
    }  # fmt: skip


@pytest.mark.parametrize("bad", [0, 1])
def test_the_message_names_the_model_whose_gradient_is_none(bad):
    roles, _ = roles_of("gpt2")
    models = (roles.policy, roles.value_model)
    before = copy.deepcopy(weights(roles))
    parameters = [p for model in models for p in model.parameters()]
    for p in parameters:
        p.grad = torch.ones_like(p)
    norms = {id(model): torch.tensor(math.inf if i == bad else 1.0) for i, model in enumerate(models)}
    sums = TokenSums()
    sums.add(torch.ones(1, 1, dtype=torch.bool), policy=torch.ones(1, 1), value=torch.ones(1, 1), kl=torch.ones(1, 1))
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    with pytest.raises(NonFiniteError) as e:
        optimizer_step(optimizer, models, 1.0, lambda model, _: norms[id(model)], sums)
    assert str(e.value) == f"gradient of the {type(models[bad]).__name__}: NaN or infinite; lower optim.lr"
    for a, b in zip(before, weights(roles), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", ["policy", "value"])
def test_the_message_names_the_loss_that_is_none(bad):
    """Of the step in question: the one before it was sound."""
    roles, _ = roles_of("gpt2")
    sums = TokenSums()
    losses = {name: torch.full((1, 1), math.nan if name == bad else 1.0) for name in ("policy", "value")}
    sums.add(torch.ones(1, 1, dtype=torch.bool), kl=torch.full((1, 1), math.nan), **losses)
    optimizer = torch.optim.SGD(roles.policy.parameters(), lr=1.0)
    with pytest.raises(NonFiniteError, match=f"^loss of the {bad}: NaN or infinite"):
        optimizer_step(optimizer, [roles.policy], 1.0, lambda *_: torch.tensor(math.nan), sums)


def test_the_second_step_is_judged_by_its_own_sums():
    roles, rollout = in_fp64()
    with pytest.raises(NonFiniteError, match=r"^loss of the value and loss of the policy: NaN"):
        iterate(roles, rollout, lr=math.inf, minibatch_size=6, microbatch_size=6, epochs=1)


def test_the_rollout_s_metrics_by_hand():
    """Two answers, of 1 and 3 tokens; sums that fp32 would round, and padding that must not count."""
    big = 2.0**24
    mask = torch.tensor([[True, False, False], [True, True, True]])
    roles, _ = roles_of("gpt2")
    rollout = roll(roles).rows(torch.tensor([0, 1]))
    given = {
        "responses": torch.ones(2, 3, dtype=torch.int64), "response_mask": mask,
        "has_eos": torch.tensor([True, True]), "scores": torch.tensor([big + 2, 1.0]),
        "old_logprobs": torch.tensor([[-big, 7.0, 7.0], [-1.0, -2.0, -4.0]]),
        "ref_logprobs": torch.tensor([[-1.0, 9.0, 9.0], [-1.0, -1.0, -1.0]]),
        "sampler_logprobs": torch.tensor([[-big, 99.0, 99.0], [-1.5, -1.75, -4.0]]),
        "values": torch.zeros(2, 3),
    }  # fmt: skip
    rollout = dataclasses.replace(rollout, **given)
    assert rollout_metrics(rollout.rows(torch.tensor([0, 1, 1])))["response/empty_frac"] == 1 / 3
    assert rollout_metrics(rollout) == {
        "objective/kl": (1 - big + 0 - 1 - 3) / 2,
        "objective/entropy": (big + 7) / 2,
        "objective/scores": (big + 3) / 2,
        "objective/scores_std": (big + 1) / 2,
        "response/length_mean": 2.0,
        "response/empty_frac": 0.5,
        "response/eos_frac": 1.0,
        "sampler/mismatch_max": 0.5,
        "sampler/mismatch_mean": 0.75 / 4,
    }


def test_returns_that_are_none_are_named(monkeypatch):
    """Where the advantages hide it: a mistake of an estimator of one's own."""
    roles, rollout = in_fp64()
    monkeypatch.setattr(ppo, "estimate", lambda rewards, *_: (torch.zeros_like(rewards), rewards * math.nan))
    with pytest.raises(NonFiniteError, match=r"^returns of answer 0, token 0"):
        iterate(roles, rollout)
