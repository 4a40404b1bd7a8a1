"""What must hold of the models under the loss: adapters, padding, caches, sampler, critic, repeated runs, pruning."""

import copy
import dataclasses
import os

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_rollout import EOS, OPTIONS, PAD, V, roles_of, roll
from tolerance import assert_close, exact, fp32, fp64

from minirlhf.data import left_padded
from minirlhf.families import FAMILIES
from minirlhf.generate import generate
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.lora import LoRAConfig, adapter_parameters, add_adapter, merge_adapter, use_adapter
from minirlhf.model import Cache, CausalLM, ModelConfig
from minirlhf.ops import token_logprobs
from minirlhf.ppo import epoch_plans, ppo_iteration
from minirlhf.rng import generator
from minirlhf.rollout import policy_stats, target_stats

settings.register_profile(
    "bounded", max_examples=int(os.environ.get("EXAMPLES", 10)), phases=(Phase.explicit, Phase.generate), deadline=None,
    derandomize=True, database=None,
)  # fmt: skip
settings.load_profile("bounded")
FAMILY = pytest.mark.parametrize("family", FAMILIES)
seeds = st.integers(0, 2**32 - 1)


def model_of(family, seed=0, vocab=V):
    """Weights large enough for tokens to differ."""
    config = ModelConfig(family=family, vocab_size=vocab, n_layer=2, n_head=2, d_model=16, max_seq_len=48)
    model = CausalLM(config, rng=generator(seed, "weights")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1)
    return model


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# ---- 15: LoRA -------------------------------------------------------------------------------------------------------


@FAMILY
@given(seed=seeds, r=st.integers(1, 4), rslora=st.booleans())
@settings(max_examples=3)
@torch.no_grad()
def test_15_adapters(family, seed, r, rslora):
    """B = 0 is the base and an adapter that is off is the base, bitwise; merged = unmerged in fp32."""
    model, ids = model_of(family), tokens(2, 7, seed=seed)
    base = model(ids)
    add_adapter(model, "x", LoRAConfig(r=r, alpha=2.0 * r, rslora=rslora))
    with use_adapter(model, "x"):
        assert_close(model(ids), base, exact)
    rng = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model, "x").values():
        p.copy_(torch.randn(p.shape, generator=rng) * 0.1)
    with use_adapter(model, "x"):
        adapted = model(ids)
        with use_adapter(model, None):
            assert_close(model(ids), base, exact)
    assert_close(model(ids), base, exact)
    assert (adapted - base).abs().max() > 1e-3
    merge_adapter(model, "x")
    assert (model(ids) - adapted).abs().max() < 1e-6 * adapted.abs().max() * 32  # 2 layers of sums in another order


# ---- 16: padding, batch, cache --------------------------------------------------------------------------------------


@FAMILY
@given(seed=seeds, lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), more=st.integers(0, 5))
@settings(max_examples=5)
@torch.no_grad()
def test_16_log_probs_of_a_row_depend_on_that_row_alone(family, seed, lengths, more):
    """Left padding of any width and content, any company, whole or token by token with a cache."""
    model, R = model_of(family).double(), 4
    P = max(lengths) + more
    ids = tokens(len(lengths), P + R, seed=seed)  # what stands in the padding is random as well
    mask = torch.arange(P + R) >= P - torch.tensor(lengths)[:, None]
    batch = target_stats(model, ids, mask, ids[:, -R:])["logprobs"]
    cache, steps = Cache(model.config, len(ids), P + R, torch.float64), []
    for t in range(P + R - 1):
        steps.append(model.head(model.hidden(ids[:, t : t + 1], mask[:, : t + 1], cache=cache))[:, 0])
    cached = token_logprobs(torch.stack(steps[P - 1 :], 1), ids[:, P:])
    assert_close(cached, batch, fp64)
    for b, n in enumerate(lengths):
        row = ids[b : b + 1, P - n :]
        alone = token_logprobs(model(row)[:, n - 1 : -1], row[:, n:])
        assert_close(batch[b : b + 1], alone, fp64)


# ---- 17: the sampler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_17_tokens_follow_the_softmax(temperature):
    """χ² of 20,000 first tokens against softmax(logits/τ); 22 degrees of freedom exceed 54 once in 5,000 seeds."""
    model, prompt = model_of("gpt2"), torch.tensor([[3, 7]])
    p = torch.softmax(model(prompt)[0, -1].double() / temperature, -1)
    made = generate(
        model, prompt, max_new_tokens=1, eos_token_id=None, pad_token_id=PAD, temperature=temperature,
        num_return_sequences=20_000, rng=generator(0, "chi"),
    )  # fmt: skip
    expected, observed = p * 20_000, torch.bincount(made.tokens[:, 0], minlength=V)
    rare = expected < 5  # as the test asks: pooled
    pooled = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed.double(), expected)]
    keep = pooled[1] > 0
    chi2 = ((pooled[0] - pooled[1]) ** 2 / pooled[1])[keep].sum().item()
    assert chi2 < 54


@FAMILY
@given(seed=seeds, temperature=st.sampled_from([0.7, 1.0]))
@settings(max_examples=3)
@torch.no_grad()
def test_17_the_samplers_log_prob_is_the_recomputed_one(family, seed, temperature):
    model = model_of(family)
    prompts, mask = left_padded([[3], [5, 6, 7], [9, 2]], PAD)
    made = generate(
        model, prompts, mask, max_new_tokens=6, eos_token_id=EOS, pad_token_id=PAD, temperature=temperature,
        rng=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    whole, real = torch.cat([prompts, made.tokens], 1), torch.cat([mask, made.mask], 1)
    targets = torch.where(made.mask, made.tokens, -100)
    again = target_stats(model, whole, real, targets, temperature=temperature)["logprobs"]
    assert_close(made.logprobs, again, fp32)


# ---- 18: the critic -------------------------------------------------------------------------------------------------


@FAMILY
@given(seed=seeds, lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4), left=st.booleans())
@settings(max_examples=4)
@torch.no_grad()
def test_18_a_critic_made_of_the_reward_model_says_the_score_at_the_last_token(family, seed, lengths, left):
    reward = RewardModel.from_causal_lm(model_of(family), rng=generator(seed % 1000, "head")).double()
    value = ValueModel.from_reward_model(reward)
    T, n = max(lengths), torch.tensor(lengths)[:, None]
    mask = torch.arange(T) >= T - n if left else torch.arange(T) < n
    ids = tokens(len(lengths), T, seed=seed)
    last = torch.full((len(lengths),), T - 1) if left else n[:, 0] - 1
    assert_close(value(ids, mask)[torch.arange(len(lengths)), last], reward(ids, mask), fp64)


# ---- 19: again, and resumed -----------------------------------------------------------------------------------------


def train(steps, roles=None, optimizer_state=None, first=1):
    """`steps` iterations of rollout and update; → roles, optimizer, metrics."""
    roles = roles or roles_of("gpt2")[0]
    optimizer = torch.optim.AdamW([*roles.policy.parameters(), *roles.value_model.parameters()], lr=1e-3)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    metrics = []
    for step in range(first, first + steps):
        rollout = roll(roles, step=step)
        how = {"kl_coef": 0.1, "temperature": 0.9, "max_grad_norm": 1.0}
        plans = epoch_plans(rollout.total_lengths, OPTIONS, 0, step)
        metrics.append(
            ppo_iteration(roles.policy, roles.value_model, optimizer, rollout, rollout.scores, plans, OPTIONS, **how)
        )
    return roles, optimizer, metrics


def test_19_twice_and_resumed_are_the_same_bits():
    """No hidden state: weights and optimizer are all that a step boundary has to hold."""
    roles, _, metrics = train(4)
    again, _, same = train(4)
    half, optimizer, first = train(2)
    resumed, _, second = train(2, copy.deepcopy(half), copy.deepcopy(optimizer.state_dict()), first=3)
    assert metrics == same == first + second
    for other in (again, resumed):
        for a, b in zip(roles.policy.parameters(), other.policy.parameters(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(roles.value_model.parameters(), other.value_model.parameters(), strict=True):
            assert torch.equal(a, b)


# ---- 20: a smaller vocabulary ---------------------------------------------------------------------------------------


@FAMILY
@given(seed=seeds)
@settings(max_examples=3)
@torch.no_grad()
def test_20_pruning_the_vocabulary_keeps_the_logits_of_what_is_kept(family, seed):
    """Hidden states are the same bits; the logits are, as far as the matrix product sums a row the same way."""
    model = model_of(family, vocab=64)
    kept = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:32].sort().values
    small = CausalLM(dataclasses.replace(model.config, vocab_size=32)).eval()
    state = {
        name: p[kept] if p.shape[:1] == (64,) and ("embed.weight" in name or "head" in name) else p
        for name, p in model.state_dict().items()
    }
    small.load_state_dict(state)
    ids = tokens(2, 9, seed=seed) % 32
    assert torch.equal(small.hidden(ids), model.hidden(kept[ids]))
    assert torch.equal(small(ids), model(kept[ids])[..., kept])


def test_20_policy_stats_of_a_rollout_do_not_depend_on_who_asks():
    """The same function behind old, new and reference log-probs: the same bits for the same rows."""
    roles, _ = roles_of("llama")
    rollout = roll(roles)
    part = rollout.rows(torch.arange(4))
    a, b = (policy_stats(m, part, temperature=0.9)["logprobs"] for m in (roles.policy, roles.ref_policy))
    assert torch.equal(a, b)
