"""What researchers hold against PPO: advantages without a critic, penalties and losses of other papers, in one loop."""

import copy
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import processes
import pytest
import torch
from test_ppo import iterate, weights
from test_rollout import OPTIONS, roles_of, roll
from test_scripts import digests, metrics, script
from tolerance import assert_close, exact, fp64

from minirlhf import stage
from minirlhf.config import PPOConfig, SFTConfig, load_config
from minirlhf.data import encode_sft
from minirlhf.engine import Engine
from minirlhf.errors import UsageError
from minirlhf.formats import read_records
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.optim import adamw, keep_mean
from minirlhf.ppo import epoch_plans, estimate, ppo_iteration
from minirlhf.pretrained import load_causal_lm
from minirlhf.ptx import Corpus, perplexity
from minirlhf.rng import generator
from minirlhf.rollout import load_rollout
from minirlhf.run import Run
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
SCORES = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)


def options(**changes):
    return dataclasses.replace(OPTIONS, **changes)


def at_the_end(scores, mask=MASK):
    """Rewards that are the score at the last token."""
    last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
    return torch.where(last, scores[:, None], 0.0)


def critic_free(advantage, *, rewards=None, states=MASK, K=4, **changes):
    rewards = at_the_end(SCORES) if rewards is None else rewards
    nothing = torch.full_like(rewards, 7.0)  # values that nobody may look at
    return estimate(rewards, nothing, MASK, states, options(advantage=advantage, answers_per_prompt=K, **changes))


# ---- advantages without a critic ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rloo", [-8 / 3, -4 / 3, 0.0, 4.0]),
        ("grpo", [x / ((14 / 3) ** 0.5 + 1e-4) for x in (-2, -1, 0, 3)]),
    ],
)
def test_a_group_gives_every_token_of_an_answer_its_advantage(kind, expected):
    A, returns = critic_free(kind)
    assert_close(A, torch.where(MASK, torch.tensor(expected, dtype=torch.float64)[:, None], 0.0), fp64)
    assert_close(returns, torch.where(MASK, SCORES[:, None], 0.0), exact)


def test_groups_are_of_adjacent_rows_and_do_not_see_each_other():
    A, _ = critic_free("rloo", K=2)
    assert_close(A[:, 0], [-1.0, 1.0, -3.0, 3.0], fp64)


def test_the_penalty_is_part_of_what_siblings_are_compared_by():
    """math.md's row, (-0.04, 0.02, 0.80): 0.78 against a sibling's 0.5."""
    rewards = torch.tensor([[-0.04, 0.02, 0.80], [0.5, 0.0, 0.0]] * 2, dtype=torch.float64)
    A, _ = critic_free("rloo", K=2, rewards=rewards)
    assert_close(A[:2, 0], [0.28, -0.28], fp64)


def test_a_score_after_the_answer_counts():
    states = MASK | torch.nn.functional.pad(MASK, (1, 0))[:, :-1]
    rewards = at_the_end(SCORES, states)
    A, _ = critic_free("rloo", rewards=rewards, states=states)
    assert_close(A[:, 0], [-8 / 3, -4 / 3, 0.0, 4.0], fp64)
    assert not A[~MASK].any()


def test_reinforce_is_reward_to_go_less_its_mean():
    """γ = 0.5: to go (.25, .5, 1), (2), (1.5, 3), (1.5, 3, 6), sum 18.75 over 9 tokens."""
    to_go = torch.tensor([[0.25, 0.5, 1], [2, 0, 0], [1.5, 3, 0], [1.5, 3, 6]], dtype=torch.float64)
    plain = torch.where(MASK, to_go - 18.75 / 9, 0.0)
    A, returns = critic_free("reinforce", gamma=0.5, whiten_advantages=False)
    assert_close(A, plain, fp64)
    assert_close(returns, to_go, fp64)
    A, _ = critic_free("reinforce", gamma=0.5)
    assert_close(A, plain / (plain.square().sum() / 9 + 1e-8).sqrt(), fp64)


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce"])
def test_without_a_value_model_none_is_asked_trained_or_logged(advantage):
    roles, _ = roles_of("gpt2")
    roles = roles._replace(value_model=None)
    rollout = roll(roles)
    assert not rollout.values.any()
    o, before = options(advantage=advantage, answers_per_prompt=4), copy.deepcopy(roles.policy)
    said = ppo_iteration(
        roles.policy, None, torch.optim.SGD(roles.policy.parameters(), lr=0.1), rollout, rollout.scores,
        epoch_plans(rollout.total_lengths, o, 0, 1), o, kl_coef=0.1, temperature=0.9, max_grad_norm=1.0,
    )  # fmt: skip
    assert not [name for name in said if name.startswith("value/") or name == "loss/value_avg"]
    assert said["val/first_ratio_gap"] == 0.0
    assert any((a != b).any() for a, b in zip(before.parameters(), roles.policy.parameters(), strict=True))


# ---- the step is the formula's --------------------------------------------------------------------------------------


def fp64_roles():
    roles, _ = roles_of("gpt2")
    for model in roles[:3]:
        model.double()
    return roles


def token_stats(policy, rollout, b):
    """log π of row b's tokens from a plain forward of that row alone, at temperature 0.9."""
    ids = torch.cat([rollout.prompts[b][rollout.prompt_mask[b]], rollout.responses[b][rollout.response_mask[b]]])
    n = int(rollout.lengths[b])
    logprobs = torch.log_softmax(policy(ids[None])[0] / 0.9, -1)
    return logprobs[torch.arange(len(ids) - n - 1, len(ids) - 1), ids[-n:]]


def step_of(roles, rollout, said=None, **changes):
    """The gradient that one optimizer step of the loop takes: SGD at rate 1 moves by it."""
    size = {"minibatch_size": 12, "microbatch_size": 4, "epochs": 1}
    old = weights(roles)
    metrics = iterate(roles, rollout, lr=1.0, **size | changes)
    if said is not None:
        said |= metrics
    return [was - now for was, now in zip(old, weights(roles), strict=True)][: len(list(roles.policy.parameters()))]


@pytest.mark.parametrize(("kind", "slope"), [("k2", lambda x: x), ("k3", lambda x: 1 - torch.exp(-x))])
def test_the_penalty_in_the_loss_has_the_gradient_of_its_estimator(kind, slope):
    """Σ_t (-A + β k'(x_t)) ∇log π(a_t) / N with k2' = x, k3' = 1 - e^-x; A is the score's alone."""
    roles = fp64_roles()
    rollout = roll(roles)
    ref = torch.where(rollout.response_mask, rollout.old_logprobs + 0.4 * rollout.old_logprobs.sin(), 0.0)
    rollout = dataclasses.replace(rollout, ref_logprobs=ref)
    groups = rollout.scores.double().view(3, 4)
    A = ((groups - groups.mean(1, keepdim=True)) * 4 / 3).flatten()
    total = sum(
        ((-A[b] + 0.3 * slope(new.detach() - ref[b, : len(new)])) * new).sum()
        for b in range(12)
        for new in [token_stats(roles.policy, rollout, b)]
    )
    expected = torch.autograd.grad(total / rollout.lengths.sum(), list(roles.policy.parameters()))
    how = {"advantage": "rloo", "answers_per_prompt": 4, "kl_in": "loss", "kl": kind, "kl_coef": 0.3}
    for g, want in zip(step_of(roles, rollout, **how), expected, strict=True):
        torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-8)


def test_padding_of_the_reference_reaches_no_gradient():
    how = {"advantage": "grpo", "answers_per_prompt": 4, "kl_in": "loss", "kl": "k3", "kl_coef": 0.3}
    ends = []
    for fill in (0.0, 1e6):
        roles = fp64_roles()
        rollout = roll(roles)
        ref = torch.where(rollout.response_mask, rollout.ref_logprobs - 0.1, fill)
        ends.append(step_of(roles, dataclasses.replace(rollout, ref_logprobs=ref), **how))
    for a, b in zip(*ends, strict=True):
        assert_close(a, b, exact)


def test_a2c_is_ppo_without_a_clip_and_with_one_step():
    """clip_range inf, one epoch, one minibatch: the plain policy gradient, and PPO's first step bit for bit."""
    roles = fp64_roles()
    rollout = roll(roles)
    plain = {"whiten_advantages": False, "kl_coef": 0.0, "gae_lambda": 1.0}
    total = sum(
        ((rollout.values[b, : len(new)] - rollout.scores[b]) * new).sum()  # -(score to go - V) log π
        for b in range(12)
        for new in [token_stats(roles.policy, rollout, b)]
    )
    expected = torch.autograd.grad(total / rollout.lengths.sum(), list(roles.policy.parameters()))
    a2c = step_of(copy.deepcopy(roles), rollout, clip_range=float("inf"), **plain)
    ppo = step_of(copy.deepcopy(roles), rollout, clip_range=0.2, **plain)
    for g, first, want in zip(a2c, ppo, expected, strict=True):
        assert_close(g, first, exact)
        torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-8)


def slope_by_hand(name, rho, s, A):
    """∂loss/∂log π of a token with ratio ρ in an answer with ratio s, ε_low 0.2, ε_high 0.3, c 1.5; and clipped?"""
    if name == "cispo":
        return -min(max(rho, 0.8), 1.3) * A, not 0.8 <= rho <= 1.3
    r = s if name == "gspo" else rho
    clipped = (A > 0 and r > 1.3) or (A < 0 and r < 0.8) or (name == "dual_clip" and A < 0 and rho > 1.5)
    return (0.0 if clipped else -r * A), clipped


@pytest.mark.parametrize(
    ("loss", "mean"),
    [("clip", "answer"), ("clip", "budget"), ("dual_clip", "step"), ("gspo", "answer"), ("cispo", "step"),
     ("gspo", "budget")],
)  # fmt: skip
def test_one_step_of_each_policy_loss_under_each_mean(loss, mean):
    """The loop against a sum over tokens: slope of each by hand, times its share by hand, times ∇log π(a_t)."""
    roles = fp64_roles()
    rollout = roll(roles)
    noise = torch.randn(rollout.responses.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old = torch.where(rollout.response_mask, rollout.old_logprobs + 0.4 * noise, 0.0)
    old[1::2] += torch.where(rollout.response_mask, 0.3, 0.0)[1::2]  # whole answers that became less likely
    rollout = dataclasses.replace(rollout, old_logprobs=old, ref_logprobs=old)
    groups = rollout.scores.double().view(3, 4)
    advantages = ((groups - groups.mean(1, keepdim=True)) * 4 / 3).flatten().tolist()
    N, total, clips = int(rollout.lengths.sum()), 0.0, 0
    for b, A in enumerate(advantages):
        new, n = token_stats(roles.policy, rollout, b), int(rollout.lengths[b])
        gaps = (new.detach() - old[b, :n]).tolist()
        s = math.exp(math.fsum(gaps) / n)
        share = {"step": 1 / N, "answer": 1 / (12 * n), "budget": 1 / (12 * 9)}[mean]
        for t, gap in enumerate(gaps):
            slope, clipped = slope_by_hand(loss, math.exp(gap), s, A)
            total, clips = total + share * slope * new[t], clips + clipped
    expected = torch.autograd.grad(total, list(roles.policy.parameters()))
    how = {"advantage": "rloo", "answers_per_prompt": 4, "policy_loss": loss, "loss_mean": mean, "longest": 9,
           "clip_range": 0.2, "clip_range_high": 0.3, "dual_clip": 1.5}  # fmt: skip
    said = {}
    for g, want in zip(step_of(roles, rollout, said=said, **how), expected, strict=True):
        torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-8)
    assert 0 < clips < N
    assert said["policy/clipfrac_avg"] == pytest.approx(clips / N)


def test_a_group_of_rows_far_from_one_another_is_the_same_step_in_other_microbatches():
    ends = []
    for size in (2, 12):
        roles = fp64_roles()
        how = {"advantage": "grpo", "answers_per_prompt": 4, "policy_loss": "gspo", "loss_mean": "answer"}
        ends.append(step_of(roles, roll(roles), microbatch_size=size, **how))
    for a, b in zip(*ends, strict=True):
        assert_close(a, b, fp64)


# ---- PPO-ptx --------------------------------------------------------------------------------------------------------


def test_ptx_adds_its_gradient_once_per_optimizer_step():
    """-γ mean log π over the labels of a minibatch of texts, whatever the microbatches: math.md's 27.8 · 1.5 = 41.7."""
    roles = fp64_roles()
    rollout = roll(roles)
    texts = [torch.tensor([[3, 4, 5, 6]]), torch.tensor([[7, 8]])]
    nats = lambda ids: -roles.policy(ids)[0, :-1].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]  # noqa: E731

    def shares(k):
        assert k == 0
        for ids in texts:
            yield nats(ids)[None], torch.ones(1, ids.shape[1] - 1, dtype=torch.bool), 4

    L = sum(nats(ids).sum() for ids in texts) / 4
    expected = torch.autograd.grad(27.8 * L, list(roles.policy.parameters()))
    said: dict[str, float] = {}
    alone = step_of(copy.deepcopy(roles), rollout)
    both = step_of(roles, rollout, said=said, ptx=shares, ptx_coef=27.8)
    assert said["ptx/loss"] == pytest.approx(float(L.detach()), rel=1e-9)
    for g, without, want in zip(both, alone, expected, strict=True):
        torch.testing.assert_close(g - without, want, rtol=1e-8, atol=1e-10)


def test_every_optimizer_step_has_texts_of_its_own(tmp_path):
    """Two iterations of four steps take the stream's minibatches 0 to 7, all different, and none of the held-out."""
    lines = [json.dumps({"text": f"{chr(97 + i % 26)} {i}"}) for i in range(100)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    config = load_config(PPOConfig, [
        "--ppo.ptx_path", str(tmp_path / "texts.jsonl"), "--ppo.ptx_coef", "1", "--ppo.rollout_size", "8",
        "--ppo.minibatch_size", "4", "--ppo.microbatch_size", "2", "--ppo.epochs", "2",
    ])  # fmt: skip
    tokenizer = Tokenizer.train_chars(["abcdefghijklmnopqrstuvwxyz 0123456789"])
    sizes = ModelConfig(family="gpt2", vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, d_model=16, max_seq_len=16)
    policy = CausalLM(sizes)
    loaded = stage.Loaded(policy, tokenizer, get_template("plain"))
    corpus = Corpus(config, SimpleNamespace(dropped=[], say=print), loaded, Engine(config.run, [policy]))
    assert (len(corpus.train), len(corpus.held_out)) == (90, 10)
    with pytest.raises(UsageError, match=r"^ppo\.ptx_path .*texts\.jsonl: line 1 of the data: data\.template chatml"):
        Corpus(config, SimpleNamespace(dropped=[], say=print), loaded._replace(template=get_template("chatml")), None)
    seen = [corpus.beside(iteration)(k) for iteration in (1, 2) for k in range(4)]
    found = [[(float(x.detach().sum()), n) for x, _, n in step] for step in seen]
    assert all(len(step) == 2 for step in found)
    assert len({x for step in found for x, _ in step}) == 16
    held_out = [[*e.ids] for e in corpus.held_out]
    assert not [e for e in corpus.train if e.ids in held_out]
    total = count = 0.0
    for ids in held_out:
        logits = policy(torch.tensor([ids]))[0, :-1].log_softmax(-1).detach()
        total, count = total - float(logits[range(len(ids) - 1), ids[1:]].sum()), count + len(ids) - 1
    assert corpus.perplexity(1)["base/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert corpus.perplexity(3) == {}


def test_perplexity_beyond_all_numbers():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("advantage=rloo", ["answers_per_prompt", "2"]),
        ("advantage=grpo answers_per_prompt=1", ["answers_per_prompt"]),
        ("answers_per_prompt=3", ["rollout_size", "256"]),
        ("advantage=rloo answers_per_prompt=4 whiten_over=minibatch", ["whiten_over"]),
        ("advantage=reinforce critic=shared", ["ppo.critic", "no value model"]),
        ("advantage=grpo answers_per_prompt=2 value_init=policy", ["ppo.value_init"]),
        ("kl_in=loss", ["k1", "no penalty at all", "k2 or k3"]),
        ("kl_in=loss kl=abs", ["abs", "no KL"]),
        ("clip_range=nan", ["clip_range"]),
        ("policy_loss=gspo", ["gspo", "rloo or grpo"]),
        ("ptx_coef=1 prompts=a,b", ["ptx_path"]),
        ("dual_clip=0.5", ["dual_clip"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(settings, words):
    with pytest.raises(UsageError) as e:
        load_config(PPOConfig, [f"--ppo.{setting}" for setting in settings.split()])
    assert all(word in str(e.value) for word in words), e.value


def test_infinity_is_a_clip_range():
    assert load_config(PPOConfig, ["--ppo.clip_range", "inf"]).ppo.clip_range == float("inf")


# ---- the mean of the weights, the best checkpoint -------------------------------------------------------------------


def test_the_mean_of_the_weights_by_hand():
    """SGD at rate 1 on a gradient of -1: weights 1, 2, 3 after the steps; d = 0.75: 1, 1.25, 1.6875."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    keep_mean(optimizer, model, 0.75)
    found = []
    for _ in range(3):
        model.weight.grad = -torch.ones(1, 1, dtype=torch.float64)
        optimizer.step()
        found.append(float(optimizer.state[model.weight]["ema"]))
    assert found == [1.0, 1.25, 1.6875]
    assert float(model.weight.detach()) == 3.0


def test_no_mean_is_kept_of_a_model_that_nobody_asked_about():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    optimizer = adamw([*a.named_parameters("a"), *b.named_parameters("b")], lr=1e-3, weight_decay=0.0, betas=(0.9, 0.9), eps=1e-8)  # fmt: skip  # noqa: E501
    keep_mean(optimizer, a, 0.9)
    keep_mean(optimizer, b, 0.0)
    (a(torch.ones(1, 1)) + b(torch.ones(1, 1))).sum().backward()
    optimizer.step()
    assert all("ema" in optimizer.state[p] for p in a.parameters())
    assert not any("ema" in optimizer.state[p] for p in b.parameters())


@pytest.mark.parametrize(("best_by", "kept"), [("max:gold/score", 2), ("min:gold/score", 1), ("", 3)])
def test_the_best_checkpoint_is_that_of_the_metric_asked_for(tmp_path, best_by, kept):
    argv = ["--run.steps", "5", "--run.keep", "1", "--run.save_every", "1", "--run.dir", str(tmp_path / "run")]
    run = Run(load_config(PPOConfig, [*argv, "--run.best_by", best_by]), "ppo")
    assert run.restore() is None
    weights = {"policy": {"w": torch.zeros(1)}}
    for step in run.steps(0, lambda: (weights, {})):
        run.log(step, {"gold/score": [1, 5, 4, 3, 2][step - 1], "objective/rlhf_reward": [1, 2, 9, 3, 4][step - 1]}, ())
    folders = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert folders == {f"best_{kept:08d}", "step_00000005"}


def test_best_by_without_a_direction_is_refused():
    with pytest.raises(UsageError, match="max:gold/score"):
        load_config(PPOConfig, ["--run.best_by", "gold/score"])


def test_a_metric_function_is_refused_beside_a_person():
    with pytest.raises(UsageError, match="metric_fn"):
        load_config(PPOConfig, ["--ppo.metric_fn", "a:b", "--reward.fn", "human"])


def test_held_out_prompts_are_the_last_of_the_file_and_no_others(tmp_path):
    lines = [json.dumps({"prompt": f"number {i}", "completion": "yes"}) for i in range(10)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    argv = ["--data.path", str(tmp_path / "data.jsonl"), "--data.holdout", "3", "--sample.max_new_tokens", "4"]
    tokenizer = Tokenizer.train_chars(["number 0123456789 yes"])
    sizes = ModelConfig(family="gpt2", vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, d_model=16, max_seq_len=32)
    loaded = stage.Loaded(CausalLM(sizes), tokenizer, get_template("plain"))
    how = load_config(PPOConfig, argv), SimpleNamespace(dropped=[], say=print), loaded
    assert stage.ppo_prompts(*how)[0] == [f"number {i}" for i in range(7)]
    assert stage.ppo_prompts(*how, held_out=True)[0] == [f"number {i}" for i in range(7, 10)]
    longer = load_config(PPOConfig, [*argv, "--data.max_length", "33"])
    with pytest.raises(UsageError, match=r"data\.max_length 33 exceeds the model's 32 positions"):
        stage.ppo_prompts(longer, *how[1:])


@pytest.mark.parametrize("template", ["hh", "alpaca", "wenda"])
def test_ppo_asks_as_sft_was_asked(tmp_path, template):
    """Conversations, and instructions with an input: the prompt of PPO is what stood before the answer in SFT."""
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "so")]
    rows = {
        "talk.jsonl": {"messages": [{"role": role, "content": text} for role, text in turns]},
        "input.jsonl": {"instruction": "sum", "input": "1 2", "output": "3"},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        argv = ["--data.path", str(tmp_path / name), "--data.template", template]
        small = ["--model.d_model", "8", "--model.n_head", "1", "--model.n_layer", "1", "--model.max_seq_len", "512"]
        records = read_records(str(tmp_path / name))[0]
        loaded = stage.load_or_make(load_config(SFTConfig, argv + small), records)
        example = encode_sft(records, loaded.tokenizer, loaded.template, 512)[0][0]
        answer = loaded.template.response_ids(loaded.tokenizer, records[0].response)
        run = SimpleNamespace(dropped=[], say=print)
        (asked,) = stage.ppo_prompts(load_config(PPOConfig, argv), run, loaded)[1]
        assert asked + answer == example.ids
        assert loaded.tokenizer.unk_id not in example.ids  # a new tokenizer knows the template's own words


def test_a_metric_that_is_never_logged_is_named(tmp_path, capsys):
    argv = ["--run.steps", "1", "--run.dir", str(tmp_path / "run"), "--run.best_by", "max:gold/scroe"]
    run = Run(load_config(PPOConfig, argv), "ppo")
    run.restore()
    run.finish(lambda folder: folder.mkdir())
    assert "gold/scroe" in capsys.readouterr().out


# ---- the script -----------------------------------------------------------------------------------------------------

GROUPS = ["--ppo.rollout_size", "8", "--ppo.minibatch_size", "4", "--ppo.microbatch_size", "4", "--reward.fn",
          "taste:brief", "--ppo.advantage", "rloo", "--ppo.answers_per_prompt", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stages):
    """SFT, and a reward of texts."""
    cwd = tmp_path_factory.mktemp("objectives")
    shutil.copytree(stages, cwd, dirs_exist_ok=True)
    (cwd / "taste.py").write_text("def brief(prompts, responses):\n    return [-float(len(r)) for r in responses]\n")
    return cwd


def test_functions_of_texts_get_the_prompts_without_their_template(tmp_path):
    """A reward model among them would put a second template around the first."""
    rows = [{"instruction": "sum", "output": "3"}, {"instruction": "add", "input": "1 2", "output": "3"}]
    rows += [{"instruction": "sum 2", "output": "3"}]  # held out
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = get_template("alpaca")
    tokenizer = Tokenizer.train_chars(["sum add 12", *template.around("")])
    sizes = ModelConfig(family="gpt2", vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, d_model=8, max_seq_len=512)
    (tmp_path / "m").mkdir()
    stage.save(tmp_path / "m", stage.Loaded(CausalLM(sizes, rng=generator(0, "weights")), tokenizer, template))
    (tmp_path / "own.py").write_text(
        "ASKED = {'sum', 'sum 2', (('user', 'add'), ('input', '1 2'))}\n\n\ndef judge(prompts, responses):\n"
        "    assert set(prompts) <= ASKED, prompts\n    return [float(len(r)) for r in responses]\n"
    )
    argv = [
        "--model.path",
        "m",
        "--data.path",
        "data.jsonl",
        "--data.holdout",
        "1",
        "--ppo.rollout_size",
        "8",
        "--ppo.minibatch_size",
        "8",
        "--ppo.microbatch_size",
        "8",
        "--reward.fn",
        "own:judge",
        "--run.steps",
        "1",
    ]
    script("ppo", *argv, "--ppo.metric_fn", "own:judge", "--run.dir", "x", cwd=tmp_path)


def run_and_resume(folder, name, *argv):
    """A run of 4 steps, and the same from its second checkpoint on, as if it had been killed there → both folders."""
    argv = [*argv, "--run.steps", "4", "--run.save_every", "1", "--run.keep", "9"]
    script("ppo", *argv, "--run.dir", name, cwd=folder)
    whole, cut = folder / name, folder / f"{name}-cut"
    shutil.copytree(whole, cut)
    for gone in ("final", "checkpoints/step_00000003", "checkpoints/step_00000004"):
        shutil.rmtree(cut / gone)
    script("ppo", *argv, "--run.dir", cut, "--run.resume", "true", cwd=folder)
    return whole, cut


def test_groups_go_through_the_script_and_resume_bit_for_bit(folder):
    (folder / "own.py").write_text("def letters(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    measured = ["--ppo.metric_fn", "own:letters", "--ppo.eval_every", "2", "--run.best_by", "min:eval/metric"]
    whole, cut = run_and_resume(folder, "groups", *GROUPS, *measured, "--ppo.save_rollouts", "1", "--ppo.ema", "0.9")
    assert [line.get("eval/metric", 0) > 0 for line in metrics(whole)] == [False, True, False, True]
    mean, last = (load_causal_lm(whole / name).state_dict() for name in ("final/ema", "final"))
    assert any((mean[name] != last[name]).any() for name in last)
    assert digests(whole / "final/ema") == digests(cut / "final/ema")
    assert digests(whole / "final") == digests(cut / "final")
    assert metrics(whole) == metrics(cut)
    assert not (whole / "final/value_model").exists()
    assert not [k for line in metrics(whole) for k in line if k.startswith("value/") or k == "loss/value_avg"]
    assert not (whole / "checkpoints/step_00000004/value_model.safetensors").exists()
    rollout, _, weights = load_rollout(whole / "rollouts/step_00000002.safetensors")
    assert "value_model" not in weights
    prompts = [row[real].tolist() for row, real in zip(rollout.prompts, rollout.prompt_mask, strict=True)]
    assert prompts[:4] == prompts[:1] * 4
    assert prompts[4:] == prompts[4:5] * 4
    assert prompts[0] != prompts[4]
    assert len({tuple(row) for row in rollout.responses[:4].tolist()}) > 1
    replay(whole, 2, folder)


def replay(run, step, folder):
    """The ledger does the update again: exit code 0 where every number and tensor is equal."""
    code, out, err = processes.run("-m", "minirlhf.ledger", run, "--step", step, "--replay", cwd=folder)
    assert code == 0, out + err


def test_ptx_goes_through_the_script_and_nothing_changes_where_it_is_off(folder):
    argv = [*GROUPS, "--ppo.save_rollouts", "1"]
    whole, cut = run_and_resume(folder, "ptx", *argv, "--ppo.ptx_coef", "27.8", "--data.size", "300")
    assert digests(whole / "final") == digests(cut / "final")
    assert metrics(whole) == metrics(cut)
    assert all("ptx/loss" in line and "base/perplexity" in line for line in metrics(whole))
    replay(whole, 3, folder)

    (folder / "texts.txt").write_text("the food was good\n" * 30)
    script("ppo", *argv, "--run.steps", "4", "--run.dir", "off", "--ppo.ptx_path", "texts.txt", cwd=folder)
    script("ppo", *argv, "--run.steps", "4", "--run.dir", "none", cwd=folder)
    assert digests(folder / "off/final") == digests(folder / "none/final") != digests(whole / "final")
    same = [{k: v for k, v in line.items() if k != "base/perplexity"} for line in metrics(folder / "off")]
    assert same == [{k: v for k, v in line.items() if k != "base/perplexity"} for line in metrics(folder / "none")]
    assert not [line for line in metrics(folder / "off") if "ptx/loss" in line]
    assert metrics(whole)[-1]["base/perplexity"] < metrics(folder / "none")[-1]["base/perplexity"]
    assert "base/perplexity" in metrics(folder / "runs/sft")[-1]
