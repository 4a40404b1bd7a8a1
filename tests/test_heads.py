"""Reward and value models: read at the right token, whatever the padding, and new heads as the papers draw them."""

import math

import pytest
import torch
from tolerance import assert_close, exact, fp32, fp64

from minirlhf.families import FAMILIES
from minirlhf.heads import RewardModel, SharedValueModel, ValueModel, last_true
from minirlhf.model import Cache, CausalLM, ModelConfig

V = 17
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def lm(family="gpt2"):
    config = ModelConfig(family, vocab_size=V, n_layer=2, n_head=2, d_model=8, max_seq_len=16, eos_token_id=3)
    model = CausalLM(config, rng=torch.Generator().manual_seed(1)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.ndim > 1 else 1)
    return model


def reward(family="gpt2"):
    return RewardModel.from_causal_lm(lm(family), rng=torch.Generator().manual_seed(2)).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def test_last_true_on_any_side():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    ids = torch.zeros(6, 4, dtype=torch.int64)
    assert last_true(ids, mask.bool()).tolist() == [3, 1, 2, 0, 3, 3]
    assert last_true(ids, mask).tolist() == [3, 1, 2, 0, 3, 3]
    assert last_true(ids, None).tolist() == [3] * 6


def test_everything_is_made_where_the_weights_and_tokens_are():
    """The meta device stands for a GPU."""
    ids, policy = tokens(2, 5).to("meta"), lm().to("meta")
    assert last_true(ids, None).device.type == "meta"
    assert last_true(ids, torch.ones(2, 5, device="meta")).device.type == "meta"
    for model in (RewardModel(policy.trunk), ValueModel(policy.trunk), SharedValueModel(policy)):
        assert model.score.weight.device.type == "meta"


@FAMILY
@torch.no_grad()
def test_scores_are_the_head_at_the_last_real_token(family):
    model = reward(family)
    rows = [tokens(n, seed=n) for n in (1, 4, 9)]
    expected = torch.stack([model.score.weight[0] @ model.trunk(row[None])[0, -1] for row in rows])
    assert expected.std() > 0.1
    for left in (True, False):
        for pad in (0, 3, 16):  # also the id of EOS, which may end a row
            ids, mask = torch.full((3, 9), pad), torch.zeros(3, 9, dtype=torch.bool)
            for i, row in enumerate(rows):
                at = slice(9 - len(row), 9) if left else slice(0, len(row))
                ids[i, at], mask[i, at] = row, True
            assert_close(model(ids, mask), expected, fp64)
            for i in range(3):
                assert_close(model(ids[i : i + 1], mask[i : i + 1])[0], expected[i], fp64)
    assert_close(model(rows[2][None])[0], expected[2], fp64)


def test_rows_that_end_in_the_padding_id():
    """A real EOS counts although padding has the same id: only the mask says where a row ends."""
    model = reward()
    ids, mask = torch.tensor([[5, 7, 3, 3]]), torch.tensor([[True, True, True, False]])
    with torch.no_grad():
        assert_close(model(ids, mask), model(ids[:, :3]), fp64)
        assert (model(ids, mask) - model(ids[:, :2])).abs() > 1e-3


@FAMILY
@torch.no_grad()
def test_values_at_every_token(family):
    model = ValueModel.from_reward_model(reward(family))
    ids = tokens(2, 7)
    mask = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
    values = model(ids, mask)
    assert values.shape == (2, 7)
    hidden = model.trunk(ids, mask)
    assert_close(values, (hidden * model.score.weight[0]).sum(-1), fp64)
    for t in range(1, 8):  # the value before a token does not see it
        assert_close(model(ids[1:, :t])[0, -1], values[1, t - 1], fp64)
    cache, parts = Cache(model.config, 2, 7, torch.float64), []
    for t in range(7):
        parts.append(model(ids[:, t : t + 1], mask[:, : t + 1], cache=cache))
    assert_close(torch.cat(parts, 1)[mask], values[mask], fp64)


def test_value_model_of_a_reward_model():
    """The same trunk and head, or a zero head; copies, so that training one leaves the other."""
    score = reward()
    value = ValueModel.from_reward_model(score)
    ids = tokens(3, 5)
    with torch.no_grad():
        assert_close(value(ids)[:, -1], score(ids), fp64)  # a product of other shapes
        zero = ValueModel.from_reward_model(score, zero_head=True)
        assert zero(ids).abs().max() == 0
        assert_close(zero.trunk(ids), score.trunk(ids), exact)
        before = score(ids).clone()
        for p in value.parameters():
            p.add_(1)
        assert_close(score(ids), before, exact)
    value(ids).sum().backward()
    assert all(p.grad is None for p in score.parameters())


def test_zero_head_still_learns():
    value = ValueModel.from_trunk(lm().trunk)
    value(tokens(2, 5)).sum().backward()
    assert value.score.weight.grad.abs().max() > 0


def test_new_head_is_drawn_as_published():
    """normal(0, 1/√(C+1)) (arXiv 2009.01325), from the generator alone; the trunk is copied."""
    model = CausalLM(ModelConfig("gpt2", d_model=4096, n_layer=1, d_inner=8), rng=torch.Generator().manual_seed(0))
    first = RewardModel.from_causal_lm(model, rng=torch.Generator().manual_seed(5))
    second = RewardModel.from_causal_lm(model, rng=torch.Generator().manual_seed(5))
    assert torch.equal(first.score.weight, second.score.weight)
    assert first.score.weight.std().item() == pytest.approx(4097**-0.5, rel=0.05)
    assert abs(first.score.weight.mean().item()) < 4 * 4097**-0.5 / 64
    assert first.trunk.embed.weight.data_ptr() != model.trunk.embed.weight.data_ptr()
    assert torch.equal(first.trunk.embed.weight, model.trunk.embed.weight)


def test_the_deviation_of_a_new_head_by_hand():
    """C = 8: a standard normal number of the same generator, divided by √9."""
    model = RewardModel.from_causal_lm(lm(), rng=torch.Generator().manual_seed(5))
    normal = torch.empty(1, 8).normal_(generator=torch.Generator().manual_seed(5))
    assert_close(model.score.weight.detach(), normal / 3, fp32)


def test_from_a_config_alone():
    a, b = (RewardModel(lm("llama").config, rng=torch.Generator().manual_seed(0)) for _ in range(2))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert a(tokens(2, 3)).shape == (2,)
    assert ValueModel(lm("llama").config)(tokens(2, 3)).shape == (2, 3)


def test_scores_and_values_are_fp32_at_least():
    model = reward().to(torch.bfloat16)
    ids = tokens(2, 4)
    scores = model(ids)
    assert scores.dtype == torch.float32
    hidden = model.trunk(ids)[:, -1].float()
    assert_close(scores, hidden @ model.score.weight[0].float(), {"rtol": 1e-5, "atol": 1e-5})
    assert ValueModel.from_reward_model(model)(ids).dtype == torch.float32
    assert reward()(ids).dtype == torch.float64


@FAMILY
def test_every_module_has_a_name_in_the_files(family):
    model = reward(family)
    named = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert named == set(model.module_names())
    assert model.module_names()["score"] == "score"


# ---- normalized scores ----------------------------------------------------------------------------------------------


def test_gain_and_bias_by_hand():
    """Scores 0, 1, 1: mean 2/3, deviation √2/3, in fp64. Then 5, 5, 11 on the new scale: mean 7, deviation √8."""
    model = reward()
    assert (model.gain, model.bias) == (1.0, 0.0)
    model.normalize(torch.tensor([0.0, 1.0, 1.0]))
    gain, bias = 3 / math.sqrt(2), -math.sqrt(2)
    assert (model.gain, model.bias) == pytest.approx((gain, bias), rel=1e-12)
    model.normalize(torch.tensor([5.0, 5.0, 11.0]))
    assert (model.gain, model.bias) == pytest.approx((gain / math.sqrt(8), (bias - 7) / math.sqrt(8)), rel=1e-12)


def test_scores_around_zero_are_normalized():
    model = reward()
    model.normalize(torch.tensor([-1.0, 3.0, -3.0, 1.0]))
    assert (model.gain, model.bias) == pytest.approx((1 / math.sqrt(5), 0.0), rel=1e-12)


@pytest.mark.parametrize("mean", [0.0, 2.0, -2.0])
def test_equal_scores_are_moved_alone(mean):
    model = reward()
    model.normalize(torch.full((4,), mean))
    assert (model.gain, model.bias) == (1.0, -mean)


@pytest.mark.parametrize("mean", [1.0, -1.0, 1e-9])
def test_scores_are_equal_within_a_millionth_of_their_mean(mean):
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for off, gain in ((0.9e-6, 1.0), (1.5e-6, 1 / 1.5e-6 / abs(mean))):
        model = reward()
        model.normalize(mean * (1 + off * signs))
        assert model.gain == pytest.approx(gain, rel=1e-6)


# ---- a value head on the policy's own trunk -------------------------------------------------------------------------


def test_a_shared_value_model_has_a_head_alone():
    policy = lm()
    model = SharedValueModel(policy)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {"score.weight": (1, 8)}
    assert model.policy is policy
    assert model.trunk is policy.trunk
    assert model.config is policy.config
    ids = tokens(2, 5)
    with torch.no_grad():
        model.score.weight.fill_(0.5)
        assert_close(model(ids), policy.hidden(ids).sum(-1) / 2, fp64)


def test_first_values_on_a_shared_trunk_are_zero():
    """What torch.empty gives is NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        model = SharedValueModel(lm())
    finally:
        torch.use_deterministic_algorithms(False)
    assert model(tokens(2, 5)).abs().max() == 0


def test_a_value_model_draws_nothing_from_torch():
    trunk, before = lm().trunk, torch.get_rng_state()
    ValueModel.from_trunk(trunk)
    assert torch.equal(torch.get_rng_state(), before)
