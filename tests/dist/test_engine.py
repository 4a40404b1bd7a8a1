"""The three engines under PPO's own functions: the same weights and metrics at any number of ranks."""

import copy
from functools import cache
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from torch import nn

from minirlhf import dist
from minirlhf.config import PPOSection
from minirlhf.engine import Engine
from minirlhf.heads import RewardModel, SharedValueModel, ValueModel
from minirlhf.lora import LoRAConfig, adapter_view, add_adapter
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.optim import adamw
from minirlhf.ppo import epoch_plans, ppo_iteration, rollout_metrics, score_answers
from minirlhf.rng import generator
from minirlhf.rollout import Roles, collect, reward_model_score

# 10 rows are 5 each for two ranks, but 4, 3 and 3 for three: minibatches and microbatches are of unequal size.
OPTIONS = PPOSection(rollout_size=20, minibatch_size=10, microbatch_size=3, epochs=2, kl_coef=0.1)
SAMPLING = {"max_new_tokens": 6, "eos_token_id": 1, "pad_token_id": 0, "temperature": 0.8, "suppress_tokens": (0,)}
ITERATIONS = 3  # of 4 optimizer steps
V, P = 19, 5


def build(lora):
    """Policy, reference, value and reward model; with LoRA the first three on one base; or a head on the policy."""
    rng = torch.Generator().manual_seed(5)
    config = ModelConfig("gpt2", V, 2, 2, 12, 16, d_inner=25)
    base, reward = CausalLM(config, rng=rng), RewardModel(config, rng=rng)
    for p in chain(base.parameters(), reward.parameters()):
        nn.init.normal_(p, std=0.2, generator=rng)
    if lora == "shared":
        return base, copy.deepcopy(base).requires_grad_(False), SharedValueModel(base), reward.requires_grad_(False)
    if not lora:
        value = ValueModel.from_reward_model(reward)
        return base, copy.deepcopy(base).requires_grad_(False), value, reward.requires_grad_(False)
    what = LoRAConfig(r=2, alpha=4, targets="all-linear")
    add_adapter(base, "policy", what, rng=rng)
    critic = ValueModel(base.trunk, rng=rng)
    add_adapter(critic, "value", what, rng=rng)
    views = adapter_view(base, "policy"), adapter_view(base, None), adapter_view(critic, "value")
    return *views, reward.requires_grad_(False)


def ppo(kind, dtype, *, lora=False, low="fp32", checkpoint=False, steps=ITERATIONS, resume=None):
    """Some iterations; state and metrics as rank 0 has them."""
    models = [m.to(dtype).eval() for m in build(lora)]
    run = SimpleNamespace(engine=kind, device="cpu", dtype=low, checkpoint_activations=checkpoint)
    engine = Engine(run, models)
    policy, ref, value, reward = models
    roles = Roles(policy, ref, value, reward_model_score(reward), reward, engine.gathered)
    trained = {"policy": policy, "value_model": value}
    named = [x for model in trained.values() for x in model.named_parameters()]
    optimizer = adamw(named, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5)
    first, metrics = 1, []
    if resume:
        first, tensors = resume
        engine.load(trained, optimizer, {g: {k: torch.from_numpy(x) for k, x in t.items()} for g, t in tensors.items()})
    for step in range(first, first + steps):
        prompts = torch.randint(2, V, (OPTIONS.rollout_size, P), generator=generator(0, "prompts", step))
        mask = torch.arange(P) >= torch.randint(P, (len(prompts), 1), generator=generator(0, "lengths", step))

        def plan(lengths, step=step):
            return epoch_plans(lengths, OPTIONS, 0, step)

        rngs = [generator(0, "sample", step, row) for row in range(len(prompts))]
        rollout = collect(roles, prompts, mask, partition=lambda n: list(chain(*plan(n)[0])), rng=rngs, **SAMPLING)
        scores = score_answers(rollout.scores, rollout.has_eos, OPTIONS, 0.0, 1.0)
        found = ppo_iteration(
            policy, value, optimizer, rollout, scores, plan(rollout.total_lengths), OPTIONS, kl_coef=0.1, temperature=0.8,
            max_grad_norm=0.5, clip=engine.clip, precision=engine.precision,
        )  # fmt: skip
        metrics.append(rollout_metrics(rollout) | found)
    state = engine.state(trained, optimizer)
    whole = [engine.whole(m) for m in (policy, value)]
    if dist.rank() == 0:
        for role, model in zip(trained, whole, strict=True):
            for name, p in model.named_parameters():
                assert name not in state[role] or torch.equal(p, state[role][name])
                assert p.shape == dict(build(lora)[0 if role == "policy" else 2].named_parameters())[name].shape
    return {g: {k: x.detach().clone().numpy() for k, x in t.items()} for g, t in state.items()}, metrics


def several(cases):
    return {case: ppo(case[0], getattr(torch, case[1]), lora=case[2], checkpoint=case[3]) for case in cases}


KINDS = [(False, False), (True, False), ("shared", False), (False, True)]  # LoRA or critic, checkpointed activations
CASES = [("mini", "float64", *kind) for kind in KINDS]
CASES += [(engine, "float64", *kind) for engine in ("none", "torch") for kind in KINDS[:3]]


@cache
def on_world(world):
    return on_ranks(world, several, CASES)[0]


@cache
def truth(dtype, lora):
    """One process and no engine."""
    return ppo("none", getattr(torch, dtype), lora=lora)


def assert_close(found, expected, weights, numbers):
    """State and metrics."""
    (state, metrics), (true_state, true_metrics) = found, expected
    assert state.keys() == true_state.keys()
    for group, named in true_state.items():
        assert state[group].keys() == named.keys()
        assert max(abs(state[group][k] - x).max() for k, x in named.items()) <= weights
    for ours, theirs in zip(metrics, true_metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=numbers, abs=numbers)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[2]}{'-checkpointed' * c[3]}")
@pytest.mark.parametrize("world", [2, *(pytest.param(w, marks=pytest.mark.slow) for w in (3, 4))])
def test_ppo_on_any_number_of_ranks(world, case):
    assert_close(on_world(world)[case], truth("float64", case[2]), 1e-12, 1e-9)


@pytest.mark.parametrize("lora", [False, True, "shared"])
@pytest.mark.parametrize("low", ["fp32", "bf16"])
def test_one_sharded_rank_is_no_engine_bit_for_bit(lora, low):
    expected = ppo("none", torch.float32, lora=lora, low=low)
    for checkpoint in (False, True):
        state, metrics = ppo("mini", torch.float32, lora=lora, low=low, checkpoint=checkpoint)
        assert metrics == expected[1]
        assert all((state[g][k] == x).all() for g, named in expected[0].items() for k, x in named.items())


def low_precision(kind):
    return ppo(kind, torch.float32, low="bf16")[1]


@pytest.mark.parametrize(("kind", "world"), [("none", 1), ("mini", 1), ("mini", 2), ("torch", 2)])
def test_bf16_starts_each_update_at_a_ratio_of_exactly_1_and_moves_from_there(kind, world):
    for metrics in on_ranks(world, low_precision, kind):
        for m in metrics:
            assert m["val/first_ratio_gap"] == 0
            assert m["policy/approxkl_avg"] > 0  # the weights of a step are not those that were cast before it
            assert 0 < m["sampler/mismatch_mean"] < 2e-2


def test_low_precision_is_close_to_fp32():
    full, low = (ppo("none", torch.float32, low=low, steps=1)[1][0] for low in ("fp32", "bf16"))
    assert low["objective/scores"] != full["objective/scores"]
    for name in ("objective/scores", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg"):
        assert low[name] == pytest.approx(full[name], rel=0.2, abs=0.02)


def stopped(kind, lora):
    return ppo(kind, torch.float64, lora=lora, steps=1)[0]


def gone_on(kind, lora, tensors):
    return ppo(kind, torch.float64, lora=lora, steps=ITERATIONS - 1, resume=(2, tensors))


@pytest.mark.parametrize(
    ("kind", "other", "lora"), [("mini", "torch", False), ("torch", "mini", False), ("mini", "none", True)]
)
def test_what_two_ranks_have_saved_goes_on_elsewhere(kind, other, lora):
    tensors = on_ranks(2, stopped, kind, lora)[0]
    state, metrics = truth("float64", lora)
    for world, engine in ((1, other if other != "torch" else "none"), (3, other)):
        assert_close(on_ranks(world, gone_on, engine, lora, tensors)[0], (state, metrics[1:]), 1e-12, 1e-9)


def norms(kind):
    """One rank's gradient is NaN in one number."""
    policy, *_ = build(False)
    engine = Engine(SimpleNamespace(engine=kind, device="cpu", dtype="fp32", checkpoint_activations=False), [policy])
    ids = torch.randint(2, V, (2, 6), generator=generator(0, "ids", row=dist.rank()))
    weight = torch.ones(2, 6)
    weight[0, 0] = float("nan") if dist.rank() == 1 else 1.0
    (policy(ids)[..., 3] * weight).sum().backward()
    return float(engine.clip(policy, 1.0))


@pytest.mark.parametrize("kind", ["none", "mini", "torch"])
def test_every_rank_sees_the_nan_of_one(kind):
    assert all(x != x for x in on_ranks(2, norms, kind))
