"""All fast paths on, all off: a PPO iteration says the same, within rounding."""

import pytest
import torch
from tolerance import assert_close

from minirlhf import generate, ops
from minirlhf.config import PPOSection
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.optim import adamw
from minirlhf.ppo import epoch_plans, ppo_iteration
from minirlhf.rng import generator
from minirlhf.rollout import Roles, collect, reward_model_score

V, EOS = 160, 1


def iteration():
    """Rollout, metrics and the trained policy's weights of one iteration on prompts of several lengths."""
    config = ModelConfig(vocab_size=V, n_layer=2, n_head=4, d_model=128, max_seq_len=64)
    policy, reward = CausalLM(config, rng=generator(0, "policy")), RewardModel(config, rng=generator(0, "reward"))
    ref, value = CausalLM(config, rng=generator(0, "policy")), ValueModel.from_reward_model(reward)
    lengths = [3, 9, 9, 5, 1, 7, 9, 2]
    mask = torch.tensor([[False] * (9 - n) + [True] * n for n in lengths])
    ids = torch.where(mask, torch.randint(2, V, (8, 9), generator=generator(0, "prompts")), 0)
    options = PPOSection(rollout_size=8, minibatch_size=4, microbatch_size=4, epochs=2)
    plans = epoch_plans(torch.zeros(8), options, 0, 1)
    roles = Roles(policy, ref, value, reward_model_score(reward), reward)
    rollout = collect(
        roles, ids, mask, eos_token_id=EOS, pad_token_id=0, max_new_tokens=20, temperature=1.0,
        rng=[generator(0, "sample", row=r) for r in range(8)], partition=lambda n: [m for b in plans[0] for m in b],
    )  # fmt: skip
    named = [*policy.named_parameters(prefix="policy"), *value.named_parameters(prefix="value")]
    optimizer = adamw(named, lr=1e-4, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-5)
    metrics = ppo_iteration(
        policy, value, optimizer, rollout, rollout.scores, plans, options, kl_coef=0.1, temperature=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    return rollout, metrics, policy.state_dict()


@pytest.fixture(params=[False, True], ids=["onednn", "mkl"])
def fast(request, monkeypatch):
    """Thresholds so low that every product goes to oneDNN, or every weight into MKL's layout."""
    if not torch.backends.mkldnn.is_available() or (request.param and not torch.backends.mkl.is_available()):
        pytest.skip("this torch has no oneDNN or MKL")
    monkeypatch.setattr("minirlhf.products.SMALLEST", 1)
    monkeypatch.setattr("minirlhf.products.BY_MKL", request.param)


def test_turning_all_off_changes_no_more_than_rounding(fast, monkeypatch):
    """Off: torch's own products, no packed weights, modules for stand-ins, a column of the head after the other."""
    rollout, metrics, weights = iteration()
    assert metrics["val/first_ratio_gap"] == 0
    monkeypatch.setattr(generate, "prepared", lambda model, *_: model)
    monkeypatch.setattr(ops, "BUDGET", {"cpu": 4 * 97, "cuda": 4 * 97})
    with torch.backends.mkldnn.flags(enabled=False):
        plain_rollout, plain_metrics, plain_weights = iteration()
    assert torch.equal(rollout.responses, plain_rollout.responses)
    assert torch.equal(rollout.response_mask, plain_rollout.response_mask)
    for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values", "scores"):
        assert_close(getattr(rollout, name), getattr(plain_rollout, name), {"rtol": 1e-5, "atol": 5e-6})
    assert metrics.keys() == plain_metrics.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(plain_metrics[name], rel=1e-3, abs=2e-5), name
    for name, weight in weights.items():
        assert_close(weight, plain_weights[name], {"rtol": 0.0, "atol": 2e-5})
