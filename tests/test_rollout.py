"""A rollout's numbers: who says what about which token, and that the first ratio is 1 in every bit."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from safetensors import SafetensorError
from tolerance import assert_close, exact, fp32, fp64

from minirlhf import products
from minirlhf import rollout as rollouts
from minirlhf.config import PPOSection
from minirlhf.data import left_padded
from minirlhf.errors import CheckpointError
from minirlhf.evaluate import exact_kl
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.ppo import epoch_plans
from minirlhf.rng import generator
from minirlhf.rollout import (
    Roles,
    Rollout,
    collect,
    judge,
    left_aligned,
    load_rollout,
    of_responses,
    policy_stats,
    response_positions,
    reward_model_score,
    save_rollout,
    state_values,
    target_stats,
)

EOS, PAD, V = 1, 0, 23
OPTIONS = PPOSection(rollout_size=12, minibatch_size=6, microbatch_size=3, epochs=2)


def wide(model, seed=5):
    """Weights large enough for answers of different lengths and ratios that could differ."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
    return model


def roles_of(family, *, zero_head=True):
    config = ModelConfig(family=family, vocab_size=V, n_layer=2, n_head=2, d_model=16, max_seq_len=32)
    policy = wide(CausalLM(config)).eval()
    reward = wide(RewardModel(config), seed=6).eval()
    value = ValueModel.from_reward_model(reward, zero_head=zero_head).eval()
    return Roles(policy, copy.deepcopy(policy), value, reward_model_score(reward)), reward


def roll(roles, *, seed=0, step=1, temperature=0.9, **how):
    prompts = [[3 + i % 5] * (1 + i % 4) + [4] for i in range(12)]
    ids, mask = left_padded(prompts, PAD)
    rngs = [generator(seed, "sample", step, row) for row in range(len(prompts))]
    return collect(
        roles, ids, mask, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=9, temperature=temperature, rng=rngs,
        partition=lambda n: [rows for minibatch in epoch_plans(n, OPTIONS, seed, step)[0] for rows in minibatch],
        **how,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_before_any_update_kl_is_zero_and_every_first_ratio_is_one(family):
    roles, _ = roles_of(family)
    rollout = roll(roles)
    assert_close(rollout.old_logprobs - rollout.ref_logprobs, torch.zeros_like(rollout.old_logprobs), exact)
    for minibatch in epoch_plans(rollout.total_lengths, OPTIONS, 0, 1)[0]:
        for index in minibatch:
            part = rollout.rows(index)
            new = policy_stats(roles.policy, part, temperature=0.9)["logprobs"]
            assert torch.equal(torch.exp(new - part.old_logprobs)[part.response_mask].unique(), torch.ones(1))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_logprobs_are_those_of_a_full_forward_of_each_row_alone(family):
    roles, reward = roles_of(family)
    rollout = roll(roles)
    assert len(rollout.lengths.unique()) > 2
    for b in range(len(rollout)):
        prompt = rollout.prompts[b][rollout.prompt_mask[b]]
        answer = rollout.responses[b][rollout.response_mask[b]]
        both = torch.cat([prompt, answer])[None]
        logits = roles.policy(both)[0, len(prompt) - 1 : -1]  # (R_b, V)
        expected = torch.log_softmax(logits.double() / 0.9, -1)[torch.arange(len(answer)), answer]
        n = len(answer)
        assert_close(rollout.old_logprobs[b, :n], expected, fp32)
        assert_close(rollout.sampler_logprobs[b, :n], expected, fp32)
        assert not rollout.old_logprobs[b, n:].any()
        assert_close(rollout.scores[b], reward(both)[0], fp32)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_value_after_the_last_token_is_the_reward_models_score(family):
    roles, reward = roles_of(family, zero_head=False)
    rollout = roll(roles)
    values = roles.value_model(rollout.input_ids, rollout.attention_mask)  # (B, T)
    last = rollout.attention_mask.long().cumsum(1).argmax(1)
    assert_close(values[torch.arange(len(rollout)), last], reward(rollout.input_ids, rollout.attention_mask), fp32)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_log_probs_and_kl_under_autocast(on_gpu, monkeypatch):
    """Against the log-softmax in fp64 of W h, for a GPU with W and h in bf16; the sampler's are near."""
    monkeypatch.setattr(products, "LOGITS_BY_FP32", ("meta" if on_gpu else "cpu",))
    roles, _ = roles_of("gpt2")
    wide(roles.ref_policy, seed=7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rollout = roll(roles, temperature=1.0)
        ids, mask, R = rollout.input_ids, rollout.attention_mask, rollout.responses.shape[1]
        asked = target_stats(roles.policy, ids, mask, rollout.responses)["logprobs"]
        kl = exact_kl(roles, rollout, 1.0)
        hidden = [response_positions(model.hidden(ids, mask), R) for model in roles[:2]]  # (B, R, C) each
    expected, other = (
        [
            (h.to(dtype).double() @ model.head.weight.to(dtype).double().T).log_softmax(-1)
            for h, model in zip(hidden, roles[:2], strict=True)
        ]
        for dtype in ((torch.bfloat16, torch.float32) if on_gpu else (torch.float32, torch.bfloat16))
    )
    log_p, log_q = expected
    here = rollout.response_mask
    assert_close(asked, log_p.gather(-1, rollout.responses[..., None])[..., 0], fp32)
    assert_close(kl, torch.where(here, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0).sum(1), fp32)
    assert bool(((log_p - other[0]).abs() > 1e-4).any())
    assert float((rollout.sampler_logprobs - rollout.old_logprobs)[rollout.action_mask].abs().max()) < 0.05


def test_exams_multiply_as_they_are_told():
    roles, _ = roles_of("gpt2")
    with pytest.raises(ValueError, match="impl 'nonsense'"):
        exact_kl(roles, roll(roles), 1.0, "nonsense")


def test_a_rank_without_rows_answers_on_the_same_device(monkeypatch):
    roles, _ = roles_of("gpt2")
    rollout = roll(roles)
    elsewhere = replace(rollout, **{f.name: getattr(rollout, f.name).to("meta") for f in fields(rollout)[:-1]})
    monkeypatch.setattr("minirlhf.dist.mine", lambda rows: rows[:0])
    monkeypatch.setattr("minirlhf.dist.all_rows", lambda own, n: own)
    found = exact_kl(roles, elsewhere, 1.0)
    assert (found.device.type, found.shape) == ("meta", (0,))


def test_sequences_by_hand():
    """Two prompts of 1 and 3 tokens, answers of 2 and 1: no padding before them, and none that all rows have."""
    ids = torch.tensor([[PAD, PAD, 5, 6, 7, PAD], [3, 4, 5, EOS, PAD, PAD]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    blank = torch.zeros(2, 3)
    rollout = Rollout(
        ids[:, :3], mask[:, :3], ids[:, 3:], mask[:, 3:], blank, blank, blank, blank, blank[:, 0], mask[:, 0]
    )
    aligned, real, first = rollout.sequences()
    assert aligned[real].tolist() == [5, 6, 7, 3, 4, 5, EOS]
    assert real.tolist() == [[True, True, True, False], [True] * 4]
    assert first.tolist() == [[1], [3]]
    assert of_responses(torch.arange(8).view(2, 4), first, mask[:, 3:]).tolist() == [[0, 1, 0], [6, 0, 0]]
    assert of_responses(torch.arange(8).view(2, 4), first, mask[:, :0]).shape == (2, 0)
    assert rollout.total_lengths.tolist() == [3, 4]
    real[1, 1] = False  # a hole in a prompt stays one
    assert [x.tolist() for x in left_aligned(aligned, real)] == [aligned.tolist(), real.tolist(), [[0], [0]]]
    both = [torch.tensor(x) for x in ([[PAD, 5]], [[False, True]])]
    assert [x.tolist() for x in left_aligned(*both)] == [[[5, 5]], [[True, False]], [[1]]]  # S is at least 2


@pytest.mark.parametrize("score_at", ["last", "next", "column"])
def test_prompts_of_all_lengths_count_as_each_alone(score_at):
    """Every token that counts, in fp64, wherever the score lands."""
    roles, _ = roles_of("gpt2", zero_head=False)
    policy, value = roles.policy.double(), roles.value_model.double()
    rollout = replace(roll(roles), score_at=score_at)
    logprobs = policy_stats(policy, rollout, temperature=1.0)["logprobs"]
    values = state_values(value, rollout)
    for b in range(len(rollout)):
        n, actions, states = (int(m[b].sum()) for m in (rollout.prompt_mask, rollout.action_mask, rollout.value_mask))
        row = torch.cat([rollout.prompts[b][-n:], rollout.responses[b]])[None]
        alone = torch.log_softmax(policy(row)[0, n - 1 : -1], -1).gather(1, row[0, n:, None])[:, 0]  # (R,)
        assert_close(logprobs[b, :actions], alone[:actions], fp64)
        assert_close(values[b, :states], value(row)[0, n - 1 :][:states], fp64)
        assert not logprobs[b, actions:].any()
        assert not values[b, states:].any()


@pytest.mark.parametrize("score_at", ["last", "column"])
def test_the_head_sees_the_answers_alone(score_at, monkeypatch):
    """As many positions as there are actions, and their tokens."""
    roles, _ = roles_of("gpt2")
    rollout = replace(roll(roles), score_at=score_at)
    seen, body = [], rollouts.head_stats
    monkeypatch.setattr(rollouts, "head_stats", lambda h, w, a, **how: (seen.append(a), body(h, w, a, **how))[1])
    policy_stats(roles.policy, rollout, temperature=1.0)
    assert torch.equal(seen[0][seen[0] != rollouts.IGNORE], rollout.responses[rollout.action_mask])


def test_value_t_belongs_to_the_state_before_answer_token_t():
    roles, _ = roles_of("gpt2", zero_head=False)
    rollout = roll(roles)
    for b in range(len(rollout)):
        prompt = rollout.prompts[b][rollout.prompt_mask[b]]
        answer = rollout.responses[b][rollout.response_mask[b]]
        for t in range(len(answer)):
            state = torch.cat([prompt, answer[:t]])[None]
            assert_close(rollout.values[b, t], roles.value_model(state)[0, -1], fp32)
    assert not state_values(roles.value_model, rollout)[~rollout.response_mask].any()


def test_response_positions_by_hand():
    x = torch.tensor([[10, 11, 12, 13, 14]])  # prompt of 2, answer of 3: a_0 is drawn after position 1
    assert response_positions(x, 3).tolist() == [[11, 12, 13]]


def test_the_temperature_is_1_unless_said():
    roles, _ = roles_of("gpt2")
    ids, mask = left_padded([[3, 4], [5]], PAD)
    how = {"eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 4, "partition": lambda n: [torch.arange(2)]}
    one, other = (
        collect(roles, ids, mask, rng=[generator(0, "sample", 1, row) for row in range(2)], **how, **said)
        for said in ({}, {"temperature": 1.0})
    )
    for name, x in one.tensors().items():
        assert torch.equal(x, other.tensors()[name])


def test_mask_ends_with_eos_and_flags_say_who_was_cut():
    rollout = roll(roles_of("gpt2")[0])
    assert 0 < rollout.has_eos.sum() < len(rollout)
    for tokens, mask, ended in zip(rollout.responses, rollout.response_mask, rollout.has_eos, strict=True):
        real = tokens[mask].tolist()
        assert (real[-1] == EOS) == bool(ended)
        assert EOS not in real[:-1]
        assert set(tokens[~mask].tolist()) <= {PAD}


def test_answers_do_not_depend_on_neighbours_or_partition():
    roles, _ = roles_of("gpt2")
    whole = roll(roles)
    again = judge(whole, [torch.arange(len(whole))], roles, temperature=0.9)
    assert_close(again.old_logprobs, whole.old_logprobs, fp32)
    assert_close(again.values, whole.values, fp32)
    assert_close(again.scores, whole.scores, fp32)


def test_rows_cut_common_padding_and_keep_everything_else():
    rollout = roll(roles_of("gpt2")[0])
    index = torch.tensor([4, 0])
    part = rollout.rows(index)
    R = int(rollout.response_mask[index].sum(1).max())
    P = int(rollout.prompt_mask[index].sum(1).max())
    assert part.responses.shape == (2, R)
    assert part.prompts.shape == (2, P)
    assert torch.equal(part.responses, rollout.responses[index, :R])
    assert torch.equal(part.prompts, rollout.prompts[index, -P:])
    assert part.prompt_mask[:, 0].any()


def columns(rollout):
    return {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name != "score_at"}


def test_a_saved_rollout_comes_back_in_every_bit(tmp_path):
    roles, _ = roles_of("gpt2")
    rollout = replace(roll(roles), score_at="next")
    weights = {"policy": dict(roles.policy.named_parameters()), "optimizer": {"policy.x.step": torch.tensor(3.0)}}
    save_rollout(tmp_path / "rollouts/a.safetensors", rollout, {"step": 3, "kl_coef": 0.1}, weights)
    again, state, loaded = load_rollout(tmp_path / "rollouts/a.safetensors")
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["a.safetensors"]
    assert (state, again.score_at, set(loaded)) == ({"step": 3, "kl_coef": 0.1}, "next", set(weights))
    for want, got in ((columns(rollout), columns(again)), *((weights[g], loaded[g]) for g in weights)):
        assert want.keys() == got.keys()
        assert all(torch.equal(want[k], got[k]) and want[k].dtype == got[k].dtype for k in want)


def test_a_rollout_that_finds_no_room_is_said_with_its_file(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"a part")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(rollouts, "save_file", full)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be written .*No space left"):
        save_rollout(tmp_path / "rollouts/a.safetensors", roll(roles_of("gpt2")[0]), {}, {})
    assert list((tmp_path / "rollouts").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_that_is_no_rollout_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_rollout(path)
    with pytest.raises(CheckpointError, match="absent"):
        load_rollout(tmp_path / "absent.safetensors")


def test_a_score_after_the_answer_gives_one_more_state_a_value():
    roles, _ = roles_of("gpt2", zero_head=False)
    last, after = roll(roles), roll(roles, score_at="next")
    R = last.responses.shape[1]
    assert_close(after.old_logprobs, last.old_logprobs, fp32)
    for b in range(len(after)):
        n = int(after.lengths[b])
        assert after.value_mask[b].tolist() == [t <= n for t in range(R)]
        assert after.action_mask[b].tolist() == [t < n for t in range(R)]
        assert_close(after.values[b, :n], last.values[b, :n], fp32)
        if n < R:
            both = torch.cat([after.prompts[b][after.prompt_mask[b]], after.responses[b, :n]])[None]
            assert_close(after.values[b, n], roles.value_model(both)[0, -1], fp32)
            assert not after.values[b, n + 1 :].any()


def test_a_score_in_the_last_column_makes_actions_of_the_tokens_after_eos():
    roles, _ = roles_of("gpt2")
    short, full = roll(roles), roll(roles, score_at="column")
    assert full.responses.shape[1] == 9
    assert full.action_mask.all()
    assert full.value_mask.all()
    assert torch.equal(full.lengths, short.lengths)  # the answer ends where it ended
    assert torch.equal(full.has_eos, short.has_eos)
    assert_close(full.scores, short.scores, fp32)  # and the reward model reads no further
    assert full.old_logprobs.count_nonzero() == full.old_logprobs.numel()
    for b in range(len(full)):
        both = torch.cat([full.prompts[b][full.prompt_mask[b]], full.responses[b]])[None]
        expected = torch.log_softmax(roles.policy(both)[0, -10:-1].double() / 0.9, -1)
        assert_close(full.old_logprobs[b], expected[torch.arange(9), full.responses[b]], fp32)
