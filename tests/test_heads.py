"""Reward and value models: read at the right token, whatever the padding, and new heads as the papers draw them."""

import pytest
import torch
from tolerance import assert_close, exact, fp64

from minirlhf.families import FAMILIES
from minirlhf.heads import RewardModel, ValueModel, last_true
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
