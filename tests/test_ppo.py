"""One PPO iteration: what it reports, and that microbatches, epochs and stops do what they say."""

import copy
import dataclasses

import pytest
import torch
from test_rollout import OPTIONS, roles_of, roll
from tolerance import assert_close, exact, fp32, fp64

from minirlhf.errors import NonFiniteError
from minirlhf.ppo import epoch_plans, no_texts, ppo_iteration, rollout_metrics, score_answers


def iterate(
    roles,
    rollout,
    *,
    lr=0.0,
    seed=0,
    kl_coef=0.1,
    max_grad_norm=1e9,
    optimizer=None,
    longest=0,
    ptx=no_texts,
    **changes,
):
    """One iteration with SGD, whose steps are the gradients themselves."""
    options = dataclasses.replace(OPTIONS, **changes)
    parameters = [*roles.policy.parameters(), *roles.value_model.parameters()]
    return ppo_iteration(
        roles.policy, roles.value_model, optimizer or torch.optim.SGD(parameters, lr=lr), rollout, rollout.scores,
        epoch_plans(rollout.total_lengths, options, seed, 1), options,
        kl_coef=kl_coef, temperature=0.9, max_grad_norm=max_grad_norm, longest=longest,
        ptx=ptx,
    )  # fmt: skip


def weights(roles):
    return [p.detach().clone() for p in [*roles.policy.parameters(), *roles.value_model.parameters()]]


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_first_iteration_reports_no_kl_and_ratio_one(family):
    roles, _ = roles_of(family)
    rollout = roll(roles)
    metrics = rollout_metrics(rollout) | iterate(roles, rollout)
    assert metrics["objective/kl"] == 0.0
    assert metrics["val/first_ratio_gap"] == 0.0
    assert abs(metrics["val/ratio"] - 1) < 1e-6  # the rate is 0; the second epoch pads other rows together
    assert metrics["policy/approxkl_avg"] < 1e-12
    assert metrics["policy/clipfrac_avg"] == 0.0
    assert metrics["sampler/mismatch_max"] < 1e-4


def test_whitened_advantages_give_a_policy_loss_of_zero_at_ratio_one():
    roles, _ = roles_of("gpt2")
    rollout = roll(roles)
    assert abs(iterate(roles, rollout)["loss/policy_avg"]) < 1e-6  # minus the mean advantage
    assert abs(iterate(roles, rollout, whiten_advantages=False)["loss/policy_avg"]) > 1e-3


@pytest.mark.parametrize("microbatch_size", [1, 2, 6])
def test_microbatches_change_nothing(microbatch_size):
    results = []
    for size in (3, microbatch_size):
        roles, _ = roles_of("gpt2")
        roles.policy.double(), roles.value_model.double(), roles.ref_policy.double()
        rollout = roll(roles)
        iterate(roles, rollout, lr=0.5, microbatch_size=size, epochs=2)
        results.append(weights(roles))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, fp64)


def test_the_gradient_is_that_of_the_formulas_written_out_for_whole_rows():
    """Rewards, GAE, whitening and both losses in plain loops over tokens, one minibatch, one step."""
    roles, _ = roles_of("gpt2")
    for model in roles[:3]:
        model.double()
    rollout = roll(roles)
    ref = torch.where(rollout.response_mask, rollout.old_logprobs - 0.3 * rollout.old_logprobs.abs(), 0.0)
    rollout = dataclasses.replace(rollout, ref_logprobs=ref, values=rollout.response_mask * 0.25)
    before = copy.deepcopy(roles)

    advantages, returns = [], []
    for b in range(len(rollout)):
        n = int(rollout.lengths[b])
        r = [-0.1 * float(rollout.old_logprobs[b, t] - ref[b, t]) for t in range(n)]
        r[-1] += float(rollout.scores[b])
        A, following = [0.0] * n, 0.0
        for t in reversed(range(n)):
            delta = r[t] + (0.25 if t + 1 < n else 0.0) - 0.25
            following = A[t] = delta + 0.95 * following
        advantages.append(A)
        returns.append([a + 0.25 for a in A])
    flat = torch.tensor([a for A in advantages for a in A], dtype=torch.float64)
    mean, std = flat.mean(), (flat.var(correction=0) + 1e-8).sqrt()

    total = 0.0
    for b in range(len(rollout)):
        ids = torch.cat([rollout.prompts[b][rollout.prompt_mask[b]], rollout.responses[b][rollout.response_mask[b]]])
        n, first = int(rollout.lengths[b]), len(ids) - int(rollout.lengths[b])
        logprobs = torch.log_softmax(before.policy(ids[None])[0] / 0.9, -1)
        values = before.value_model(ids[None])[0]
        for t in range(n):
            new = logprobs[first + t - 1, ids[first + t]]
            ratio = torch.exp(new - rollout.old_logprobs[b, t])
            total = total - ratio * (advantages[b][t] - mean) / std / len(flat)
            v = values[first + t - 1]
            clipped = 0.25 + (v - 0.25).clamp(-0.2, 0.2)
            worst = torch.maximum((v - returns[b][t]) ** 2, (clipped - returns[b][t]) ** 2)
            total = total + 0.5 * 0.5 * worst / len(flat)
    total.backward()

    old = weights(roles)
    iterate(roles, rollout, lr=1.0, minibatch_size=12, microbatch_size=4, epochs=1)
    expected = [p.grad for p in [*before.policy.parameters(), *before.value_model.parameters()]]
    for was, now, g in zip(old, weights(roles), expected, strict=True):
        torch.testing.assert_close(was - now, torch.zeros_like(was) if g is None else g, rtol=1e-5, atol=1e-8)


def test_epochs_end_at_the_kl_target():
    roles, _ = roles_of("gpt2")
    assert iterate(roles, roll(roles), lr=0.5, epochs=5, stop_kl=1e-9)["policy/epochs"] == 1
    roles, _ = roles_of("gpt2")
    assert iterate(roles, roll(roles), lr=0.5, epochs=5, stop_kl=1e9)["policy/epochs"] == 5


def test_one_step_raises_what_was_better_than_expected():
    roles, _ = roles_of("gpt2")
    rollout = roll(roles)
    favourite = rollout.responses[:, 0]
    score = (favourite == favourite[0]).float() * 10
    rollout = dataclasses.replace(rollout, scores=score)
    first = lambda: torch.log_softmax(roles.policy(rollout.prompts, rollout.prompt_mask)[:, -1], -1)[0, favourite[0]]  # noqa: E731
    before = first().item()
    iterate(roles, rollout, lr=0.1, epochs=1, kl_coef=0.0)
    assert first().item() > before


def test_each_model_is_clipped_by_itself():
    roles, _ = roles_of("gpt2")
    old = weights(roles)
    rollout = roll(roles)
    rollout = dataclasses.replace(rollout, scores=rollout.scores * 1e4)  # a huge value loss
    iterate(roles, rollout, lr=1.0, epochs=1, minibatch_size=12, microbatch_size=12, max_grad_norm=0.5)
    n = len(list(roles.policy.parameters()))
    moved = [now - was for was, now in zip(old, weights(roles), strict=True)]
    for part in (moved[:n], moved[n:]):
        assert_close(torch.cat([m.flatten() for m in part]).norm(), 0.5, {"rtol": 1e-4, "atol": 0.0})


@pytest.mark.parametrize("where", ["old_logprobs", "ref_logprobs", "values", "scores"])
def test_a_number_that_is_none_stops_before_the_weights_change(where):
    """And is named, with its place: the first in the order in which one follows from the other."""
    roles, _ = roles_of("gpt2")
    rollout = roll(roles)
    broken = getattr(rollout, where).clone()
    broken[2] = float("nan")
    old = weights(roles)
    place = "answer 2: nan" if where == "scores" else "answer 2, token 0: nan"
    with pytest.raises(NonFiniteError, match=f"^{where.replace('_', ' ')} of {place}$"):
        iterate(roles, dataclasses.replace(rollout, **{where: broken}), lr=0.1)
    for a, b in zip(old, weights(roles), strict=True):
        assert_close(a, b, exact)


@pytest.mark.parametrize(
    ("name", "changes", "scores", "values", "ref"),
    [
        ("rewards", {"kl_coef": 1e38}, 0.0, 0.0, -1e38),
        ("advantages", {"whiten_advantages": False}, 3e38, -3e38, 0.0),
    ],
)
def test_what_overflows_on_the_way_is_named(name, changes, scores, values, ref):
    roles, _ = roles_of("gpt2")
    rollout = roll(roles)
    mask = rollout.response_mask
    huge = {"scores": rollout.scores * 0 + scores, "values": mask * values, "ref_logprobs": mask * ref}
    with pytest.raises(NonFiniteError, match=f"^{name} of answer 0"):
        iterate(roles, dataclasses.replace(rollout, **huge), **changes)


def test_a_rollout_read_for_another_column_is_refused():
    roles, _ = roles_of("gpt2")
    with pytest.raises(AssertionError, match="'last', 'next'"):
        iterate(roles, roll(roles), score_at="next")


def test_plans_visit_every_episode_once_per_epoch():
    lengths = torch.arange(12) % 5
    plans = epoch_plans(lengths, OPTIONS, 0, 3)
    assert len(plans) == OPTIONS.epochs
    for minibatches in plans:
        assert [sum(len(rows) for rows in m) for m in minibatches] == [6, 6]
        assert sorted(i for m in minibatches for rows in m for i in rows.tolist()) == list(range(12))
        for m in minibatches:
            ordered = [int(lengths[i]) for rows in m for i in rows]
            assert ordered == sorted(ordered)
    assert any(a.tolist() != b.tolist() for a, b in zip(plans[0][0], plans[1][0], strict=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 2.0, -3.0]),
        ({"score_clip": 1.5}, [0.5, 1.5, -1.5]),
        ({"missing_eos": "replace", "missing_eos_penalty": 4.0}, [0.5, -4.0, -3.0]),
        ({"missing_eos": "subtract", "missing_eos_penalty": 4.0}, [0.5, -2.0, -3.0]),
        ({"missing_eos": "subtract", "missing_eos_penalty": 4.0, "score_clip": 1.0}, [0.5, -3.0, -1.0]),
    ],
)
def test_scores_by_hand(changes, expected):
    options = dataclasses.replace(OPTIONS, **changes)
    raw, has_eos = torch.tensor([2.0, 5.0, -5.0]), torch.tensor([True, False, True])
    assert_close(score_answers(raw, has_eos, options, shift=1.0, scale=2.0), expected, fp32)
