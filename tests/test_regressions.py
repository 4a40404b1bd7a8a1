"""Faults that other implementations of RLHF have or had, one test each: it fails if we reproduce the fault.

Each docstring names the fault and who has it. Marks as in the literature of this project: TRL-legacy is TRL's classic
PPOTrainer (0.4 to 0.11), TRL-v2 its successor, DSC DeepSpeed-Chat, TT torchtune 0.7, ORL OpenRLHF 0.11, OAI 2019
openai/lm-human-preferences, LMD and SFD the reproductions of OAI 2019 and of "summarize from feedback".
"""

import ast
import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tolerance
import torch
from test_ppo import iterate, weights
from test_rollout import EOS, OPTIONS, PAD, V, roles_of, roll
from tolerance import assert_close, exact, fp32, fp64

from minirlhf import rollout as rollout_module
from minirlhf import stage
from minirlhf.advantage import gae, group_advantages
from minirlhf.config import PPOConfig, RMConfig, SFTConfig, load_config
from minirlhf.data import encode_sft, left_padded
from minirlhf.errors import DataError
from minirlhf.generate import generate
from minirlhf.heads import RewardModel
from minirlhf.lora import LoRAConfig, adapter_parameters, adapter_view, add_adapter, use_adapter
from minirlhf.loss import is_clipped, pairwise_loss, policy_loss, ranking_loss, value_loss
from minirlhf.masked import keep, masked_mean, masked_sum, masked_var, whiten
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.ops import head_stats, kl_estimate, token_logprobs
from minirlhf.ppo import rollout_metrics, score_answers
from minirlhf.reward import score_column, shape_rewards
from minirlhf.rollout import collect, policy_stats, target_stats
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

HERE = Path(__file__).parent
WORDS = Tokenizer.from_words(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrst"])
NAN = float("nan")


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def real(*flags):
    return torch.tensor([flags]).bool()


LOGPROBS, REF, VALUES = row(-1, -0.5, -2), row(-1.2, -0.4, -1.5), row(0.1, 0.2, 0.3)
SCORE, ALL = torch.tensor([0.7], dtype=torch.float64), real(1, 1, 1)


def padded(x, n, value=0.0):
    """n more columns."""
    return torch.cat([x, torch.full((len(x), n), value).to(x)], 1)


def longer(rollout, n, token=PAD):
    """The rollout with n more columns of padding."""
    wider = dict.fromkeys(("sampler_logprobs", "old_logprobs", "ref_logprobs", "values"), 0.0)
    wider |= {"responses": token, "response_mask": False}
    return dataclasses.replace(rollout, **{name: padded(getattr(rollout, name), n, v) for name, v in wider.items()})


def doubled(roles):
    for model in roles[:3]:
        model.double()
    return roles


# ---- whitening ------------------------------------------------------------------------------------------------------


def test_whitening_removes_the_mean_when_asked_to_center():
    """torchtune 0.7 `whiten`: the flag is inverted, the mean is added back when centring is asked for."""
    x, m = row(1, 2, 3, 4), real(1, 1, 1, 1)
    assert_close(whiten(x, m).mean(), 0.0, fp64)
    assert_close(whiten(x, m, center=False).mean(), 2.5, fp64)


def test_no_tolerance_hides_an_error():
    """torchtune's PPO tests: `rtol=1e6`, and expected values computed by the function under test; one says +0.8 where
    the right value is -0.3679. Here tolerances have names and are small, every number of a test file that is one is
    named there, and the golden numbers come from a script without this package."""
    for name in ("exact", "fp64", "fp32", "bf16"):
        assert getattr(tolerance, name)["rtol"] <= 0.02
        assert getattr(tolerance, name)["atol"] <= 0.02
    for path in sorted(HERE.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("rtol", "rel") and isinstance(node.value, ast.Constant):
                assert node.value.value < 0.5, f"{path.name}:{node.value.lineno}"
    tree = ast.walk(ast.parse((HERE / "golden/make.py").read_text()))
    sources = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for n in sources for alias in n.names} | {getattr(n, "module", "") for n in sources}
    assert not any(m.startswith("minirlhf") for m in modules)


@pytest.mark.parametrize("pads", [0, 1, 5])
def test_whitened_rewards_stay_out_of_the_padding(pads):
    """TRL-legacy `whiten_rewards`: whitened rewards are nonzero at pads and flow back, so that returns depend on the
    number of pads: (.679, 1.105, 1.412), (.426, .839, 1.132), (-.464, -.099, .145) with 0, 1 and 5."""
    m, n = padded(ALL, pads, False), pads
    rewards = shape_rewards(SCORE, padded(LOGPROBS, n), padded(REF, n), m, kl_coef=0.2)
    rewards = whiten(rewards, m, center=False, ddof=1)
    returns = gae(rewards, padded(VALUES, n), m, gamma=1.0, lam=0.95)[1]
    assert returns[0, :3].tolist() == pytest.approx([0.679, 1.105, 1.412], abs=5e-4)
    assert not rewards[:, 3:].any()
    assert not returns[:, 3:].any()


def test_padding_changes_no_gradient_with_every_option_on():
    """The same fault through the whole step: rewards and advantages whitened, value clipping, entropy bonus."""
    options = {"whiten_rewards": True, "entropy_coef": 0.01, "clip_range": 0.1, "epochs": 1, "minibatch_size": 12}
    moved = []
    for n in (0, 1, 50):
        roles = doubled(roles_of("gpt2")[0])
        iterate(roles, longer(roll(roles), n), lr=0.1, **options)
        moved.append(weights(roles))
    for other in moved[1:]:
        for a, b in zip(moved[0], other, strict=True):
            assert_close(a, b, fp64)


def test_one_definition_of_the_variance():
    """trlx: unbiased variance on one rank, biased on several, so that adding a rank changes the advantages."""
    x, m = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double(), torch.ones(4, 6).bool()
    halves = [(x[:2], m[:2]), (x[2:], m[2:])]
    total = iter([m[2:].sum(), x[2:].sum(), (x[2:] - x.mean()).sum(), (x[2:] - x.mean()).square().sum()])
    first = whiten(*halves[0], all_sum=lambda s: s + next(total))
    assert_close(first, whiten(x, m)[:2], fp64)


def test_one_real_token():
    """TRL-legacy: one real token in the batch whitens to NaN (ddof 1). Here ddof 0 gives 0, ddof 1 is refused."""
    x, m = row(3.0, NAN), real(1, 0)
    assert whiten(x, m).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="too few for ddof 1"):
        whiten(x, m, ddof=1)
    assert group_advantages(torch.full((2, 3), 0.1), kind="grpo").eq(0).all()


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_statistics_do_not_see_the_padding():
    """TRL-v2 logs: entropy, approximate KL and ratio over pads, and -Σ log π includes the sentinel 1.0 that stands on
    pads: 3.5 becomes 1.5 with two pads, the "negative entropy" of its issues."""
    roles, _ = roles_of("gpt2")
    rollout = roll(roles)
    found = []
    for r in (rollout, longer(rollout, 50)):
        found.append(rollout_metrics(r) | iterate(copy.deepcopy(roles), r, lr=0.1))
    plain, wide = found
    assert plain.keys() == wide.keys()
    for name in plain:
        assert plain[name] == pytest.approx(wide[name], rel=1e-5, abs=1e-7), name
    junk = dataclasses.replace(rollout, **{
        name: torch.where(rollout.response_mask, getattr(rollout, name), 1.0)
        for name in ("old_logprobs", "ref_logprobs", "values", "sampler_logprobs")
    })  # fmt: skip
    assert rollout_metrics(junk) == rollout_metrics(rollout)
    assert rollout_metrics(rollout)["objective/entropy"] == pytest.approx(
        -sum(float(rollout.old_logprobs[b, : rollout.lengths[b]].double().sum()) for b in range(12)) / 12
    )


def test_entropy_is_never_negative_and_survives_a_large_offset():
    """lse - Σ p z, as several trainers compute it in fp32, is off by 1.7e-4 at a common offset of 1e3."""
    z = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    weight = torch.eye(4)
    for offset in (0.0, 1e3):
        assert_close(head_stats(z + offset, weight, torch.tensor([1]), want=("entropy",)).entropy, [1.0144027755], fp32)


# ---- ratios ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_first_ratio_is_one(family):
    """DeepSpeed-Chat: old log-probs are recomputed under train(), dropout makes ρ ≠ 1 before anything was learnt, and
    its guide sets one epoch because the two diverge. Here every number of a rollout comes from eval mode."""
    roles, _ = roles_of(family)
    rollout = roll(roles)
    assert iterate(roles, rollout)["val/first_ratio_gap"] == 0.0


def test_dropout_of_the_model_does_not_reach_ppo(tmp_path):
    """The same fault, where it would enter: a folder whose config asks for dropout, loaded as PPO loads it."""
    size = {"vocab_size": V, "n_layer": 1, "n_head": 2, "d_model": 8, "max_seq_len": 32}
    policy = CausalLM(ModelConfig(family="gpt2", **size, dropout=0.5, embed_dropout=0.5))
    ids = torch.tensor([[3, 4, 5, 6]])
    policy.train()
    ask = lambda model: target_stats(model, ids, torch.ones(1, 4).bool(), ids[:, 1:])["logprobs"]  # noqa: E731
    assert not torch.equal(ask(policy), ask(policy))  # the fault needs dropout that acts
    stage.save(tmp_path / "m", stage.Loaded(policy, WORDS, get_template("plain")))
    config = load_config(PPOConfig, ["--model.path", str(tmp_path / "m"), "--reward.fn", "operator:add"])
    roles = stage.ppo_roles(config)[0]
    assert roles.policy.config.dropout == 0.5
    assert torch.equal(ask(roles.policy), ask(roles.policy))
    assert torch.equal(ask(roles.policy), ask(roles.ref_policy))


def test_a_log_ratio_is_not_clamped():
    """OpenRLHF clamps log ratios to ±20 and its KL to ±10, silently; an overflow is the honest answer."""
    new, old, A = row(30.0, -30.0, 800.0), row(0.0, 0.0, 0.0), row(-1.0, -1.0, -1.0)
    loss = policy_loss(new, old, A, clip_range=0.2)
    assert_close(loss[0, :2], [math.exp(30), 0.8], fp64)
    assert loss[0, 2] == math.inf
    assert kl_estimate(row(30.0), row(0.0), "k1") == 30
    assert shape_rewards(SCORE * 0, row(-15.0), row(-40.0), real(1), kl_coef=1.0) == -25


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_in_the_loss_are_the_tokens_sampled():
    """trlx decodes a response and encodes it again before scoring: another segmentation is another sequence. Here no
    text lies between sampler and loss; what is trained is what was drawn, token by token."""
    roles, _ = roles_of("gpt2")
    drawn, seen = [], []
    original, forward = rollout_module.generate, roles.policy.hidden

    def spy(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_module, "generate", spy)
        rollout = roll(roles)
        patch.setattr(roles.policy, "hidden", lambda ids, mask: seen.append((ids, mask)) or forward(ids, mask))
        iterate(roles, rollout, epochs=1, microbatch_size=6)
    assert torch.equal(rollout.responses, drawn[0].tokens)
    assert torch.equal(rollout.response_mask, drawn[0].mask)
    wanted = sorted(tuple(i[m].tolist()) for i, m in zip(rollout.input_ids, rollout.attention_mask, strict=True))
    assert sorted(tuple(i[m].tolist()) for ids, mask in seen for i, m in zip(ids, mask, strict=True)) == wanted


def test_eos_counts_when_padding_has_its_id():
    """DeepSpeed-Chat and trlx find the end with `tokens != pad`: with pad = EOS the EOS leaves the loss, and the score
    lands one and two columns late."""
    roles, _ = roles_of("gpt2")
    prompts, prompt_mask = left_padded([[3], [4, 5]] * 6, EOS)
    rollout = collect(
        roles, prompts, prompt_mask, eos_token_id=EOS, pad_token_id=EOS, max_new_tokens=9, temperature=0.9,
        rng=torch.Generator().manual_seed(0), partition=lambda n: [torch.arange(len(n))],
    )  # fmt: skip
    ended = rollout.has_eos.nonzero()[:, 0]
    assert len(ended) > 0
    for b in ended:
        n = int(rollout.lengths[b])
        assert rollout.responses[b, n - 1] == EOS
        assert rollout.old_logprobs[b, n - 1] < 0  # the EOS is in the loss
        old = rollout.old_logprobs
        rewards = shape_rewards(rollout.scores, old, old, rollout.response_mask, kl_coef=1.0)
        assert rewards[b, n - 1] == rollout.scores[b]
        assert rewards[b].count_nonzero() == 1


def test_the_score_lands_on_the_last_real_token():
    """DeepSpeed-Chat puts it one past the last token that is not the pad id, trlx two past, TRL-v2 one past. With V =
    .1 … .5 and a slot of .6 after them, score 1, λ = .95, that gives another advantage for every token."""
    m, v = real(1, 1, 1, 1, 1, 0, 0), row(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.0)
    rewards = shape_rewards(torch.ones(1).double(), v * 0, v * 0, m, kl_coef=0.0)
    assert rewards[0].tolist() == [0, 0, 0, 0, 1, 0, 0]
    A, _ = gae(rewards, v, m, gamma=1.0, lam=0.95)
    assert_close(A[0, :5], [0.778240625, 0.7139375, 0.64625, 0.575, 0.5], fp64)


def test_a_row_without_tokens_gets_no_score():
    """TRL-legacy raises IndexError, TRL-v2 puts the score of such a row on column 0."""
    m = torch.tensor([[True, True], [False, False]])
    rewards = shape_rewards(torch.tensor([1.0, 9.0]), torch.zeros(2, 2), torch.zeros(2, 2), m, kl_coef=0.1)
    assert rewards.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert score_column(m, "last").tolist() == [1, 0]


def test_an_answer_whose_eos_is_its_last_column_has_ended():
    """torchtune infers EOS from the presence of a pad and punishes a full row that ends in EOS."""
    roles, _ = roles_of("gpt2")
    rollout = roll(roles)
    ended = ((rollout.responses == EOS) & rollout.response_mask).any(1)
    assert torch.equal(rollout.has_eos, ended)
    options = dataclasses.replace(OPTIONS, missing_eos="replace", missing_eos_penalty=7.0)
    scores = score_answers(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), options, 0.0, 1.0)
    assert scores.tolist() == [2.0, -7.0]
    prompt, rng = torch.tensor([[3, 4]]), torch.Generator().manual_seed(0)
    made = generate(roles.policy, prompt, max_new_tokens=1, eos_token_id=range(V), pad_token_id=PAD, rng=rng)
    assert made.mask.all()


def test_a_response_is_sliced_by_position_not_from_the_end():
    """Tutorials take `logits[-gen_len:]`: when an answer stops early, that reaches back into the prompt. Every row's
    log-probs are those of its own tokens, also where the batch is wider."""
    roles, _ = roles_of("gpt2")
    rollout = roll(roles)
    short = int(rollout.lengths.argmin())
    n = int(rollout.lengths[short])
    assert n < rollout.responses.shape[1]
    both = torch.cat([rollout.prompts[short][rollout.prompt_mask[short]], rollout.responses[short, :n]])
    logits = roles.policy(both[None])[0]
    expected = torch.log_softmax(logits[-n - 1 : -1] / 0.9, -1).gather(1, both[-n:, None])[:, 0]
    assert_close(policy_stats(roles.policy, rollout, temperature=0.9)["logprobs"][short, :n], expected, fp32)


@pytest.mark.parametrize("prompt_length", [1, 3])
def test_the_first_response_token_is_learnt(prompt_length):
    """OpenRLHF #973 and others lose the first response token by shifting labels twice."""
    record = SimpleNamespace(prompt=" ".join("abc"[:prompt_length]), response=" s t")
    (example,), _ = encode_sft([record], WORDS, get_template("plain"), 32)
    learnt = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
    assert learnt == [WORDS.encode("s")[0], WORDS.encode("t")[0], EOS]


def test_nothing_to_learn_is_an_error():
    """nanochat #582, TRL #6668: all labels masked, loss 0.0, and the run goes on."""
    with pytest.raises(ValueError, match="nothing to average"):
        masked_mean(row(1, 2), real(0, 0))
    with pytest.raises(DataError, match="no record keeps a trained token"):
        encode_sft([SimpleNamespace(prompt="a b c d", response=" s")], WORDS, get_template("plain"), 2)


# ---- divisors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("microbatches", "size"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_microbatches_are_summed_over_one_count(microbatches, size):
    """TRL, DeepSpeed-Chat, trlx, LMD and SFD take the mean of microbatch means: tokens of short answers weigh more."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.randint(1, 7, (8, 1), generator=rng)
    x = torch.randn(8, 6, generator=rng, dtype=torch.float64).requires_grad_()
    for part in torch.arange(8).split(size):
        masked_mean(x[part].square(), mask[part], count=mask.sum()).backward()
    expected = 2 * torch.where(mask, x.detach(), 0.0) / mask.sum()
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-14)
    assert len(torch.arange(8).split(size)) == microbatches


@pytest.mark.parametrize("size", [1, 2, 4, 6, 12])
def test_microbatches_of_ppo_change_no_weight(size):
    """The same fault, through the script's own update."""
    moved = []
    for microbatch_size in (12, size):
        roles = doubled(roles_of("gpt2")[0])
        iterate(roles, roll(roles), lr=0.3, microbatch_size=microbatch_size, minibatch_size=12, epochs=1)
        moved.append(weights(roles))
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_sft_divides_by_the_tokens_of_the_step():
    """Most trainers until 2024: token losses (1, 2, 3) and (6) average to 3, the mean of means is 4."""
    parts = [(row(1, 2, 3), real(1, 1, 1)), (row(6, 0, 0), real(1, 0, 0))]
    assert sum(masked_mean(x, m, count=4) for x, m in parts) == 3


def test_one_optimizer_step_per_minibatch():
    """Tutorials step and whiten once per sample: whitening one sample leaves no baseline, and Adam sees noise."""
    roles, _ = roles_of("gpt2")
    rollout, steps = roll(roles), []
    parameters = [*roles.policy.parameters(), *roles.value_model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    iterate(roles, rollout, optimizer=optimizer, epochs=3, minibatch_size=6, microbatch_size=1)
    assert len(steps) == 3 * 2
    assert abs(iterate(roles, rollout, epochs=1, minibatch_size=12, microbatch_size=1)["loss/policy_avg"]) < 1e-6


def test_settings_are_frozen_and_not_shared():
    """Tutorials mutate class-level defaults: the second run starts with the first one's numbers."""
    for config in (SFTConfig, RMConfig, PPOConfig):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config().run = None
        with pytest.raises(dataclasses.FrozenInstanceError):
            config().run.steps = 3
    assert dataclasses.replace(OPTIONS, epochs=9).epochs == 9
    assert OPTIONS.epochs != 9


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["log", "sigmoid", "softmax"])
def test_the_ranking_loss_reaches_every_parameter(kind):
    """Tutorials wrap the loss into a new tensor: it is detached, and the reward model never learns."""
    config = ModelConfig(family="gpt2", vocab_size=V, n_layer=2, n_head=2, d_model=8, max_seq_len=16)
    model = RewardModel(config, rng=torch.Generator().manual_seed(0))
    ids = torch.randint(V, (4, 16), generator=torch.Generator().manual_seed(1))
    ranking_loss(model(ids)[None], torch.tensor([[2, 1, 4, 3]]), kind=kind).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("frozen", [True, False])
def test_the_chunked_entropy_has_a_gradient(frozen):
    """TRL 1.10: the chunked entropy requires grad, and its gradient is exactly 0 (the true maximum is 1.06)."""
    rng = torch.Generator().manual_seed(3)
    h, W = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((700, 4), (9, 4)))
    h.requires_grad_()
    W.requires_grad_(not frozen)
    head_stats(h, W, torch.zeros(700, dtype=torch.int64), want=("entropy",)).entropy.sum().backward()
    p = torch.softmax(h @ W.T, -1)
    H = -(p * p.log()).sum(-1, keepdim=True)
    assert_close(h.grad, (-(p * (p.log() + H)) @ W).detach(), fp64)
    assert h.grad.abs().max() > 0.1


def test_no_function_writes_into_its_inputs():
    """OpenRLHF divides the logits by the temperature in place after the entropy was taken from them."""
    rng = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 3, 5, generator=rng, dtype=torch.float64)
    m, ranks, ids = torch.rand(3, 5, generator=rng) > 0.4, torch.tensor([[1, 2, 0, 2, 3]] * 3), torch.tensor([1, 0, 2])
    s, names = a[:, 0].clone(), ("logprobs", "entropy", "lse", "kl")
    calls = [
        lambda: [f(a, m) for f in (keep, whiten, masked_sum, masked_mean, masked_var)] + [whiten(a, m, center=False)],
        lambda: token_logprobs(a, ids, temperature=0.5),
        lambda: head_stats(a, b, ids, bias=s, temperature=0.5, softcap=2.0, ref_hidden=c, ref_weight=d, want=names),
        lambda: gae(a, b, m, gamma=0.9, lam=0.9),
        lambda: [group_advantages(a, kind=k) for k in ("mean", "rloo", "grpo")],
        lambda: [shape_rewards(s, a, b, m, kl_coef=0.2, kl=k) for k in ("k1", "k2", "k3", "abs")],
        lambda: [f(a, b, c, clip_range=0.2) for f in (policy_loss, is_clipped, value_loss)],
        lambda: [ranking_loss(a, ranks, kind=k) for k in ("log", "sigmoid", "softmax")],
    ]
    inputs = (a, b, c, d, m, s, ranks, ids)
    before = [x.clone() for x in inputs]
    for call in calls:
        call()
        for x, y in zip(inputs, before, strict=True):
            assert torch.equal(x, y)


def test_one_temperature_everywhere():
    """TRL-legacy, DeepSpeed-Chat and trlx ignore the sampling temperature in log-probs, ORL in the entropy: ρ ≠ 1."""
    roles, _ = roles_of("gpt2")
    rollout = roll(roles, temperature=0.5)
    assert_close(rollout.old_logprobs, rollout.sampler_logprobs, fp32)
    stats = [policy_stats(roles.policy, rollout, temperature=t, want=("entropy",))["entropy"].sum() for t in (0.5, 1.0)]
    assert stats[0] < stats[1]


def test_exp_of_padding_has_no_gradient():
    """`exp(x)·mask`, and `where(mask, exp(x), 0)`, have NaN gradients where padding holds 90 or NaN (fp32)."""
    for pad in (NAN, math.inf, 200.0):
        new = torch.tensor([[0.1, pad]], requires_grad=True)
        loss = policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), clip_range=0.2)
        masked_sum(loss, real(1, 0)).backward()
        assert torch.isfinite(new.grad).all()
        assert new.grad[0, 1] == 0


# ---- signs ----------------------------------------------------------------------------------------------------------


def test_a_better_token_becomes_likelier():
    """OAI 2019, told in the paper: a refactoring flipped the sign of reward and KL penalty together, and the model
    wrote fluent text that was as bad as possible."""
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for a, A in ((2, 1.0), (1, -1.0)):
        z.grad = None
        new = token_logprobs(z[None], torch.tensor([a]))
        policy_loss(new, new.detach(), torch.tensor([A]).double(), clip_range=0.2).sum().backward()
        after = torch.log_softmax((z - 0.1 * z.grad).detach(), 0)[a]
        assert (after > math.log(0.25)) == (A > 0)


def test_the_penalty_lowers_the_kl():
    """The other half of the same fault: KL must cost reward."""
    rewards = shape_rewards(SCORE, LOGPROBS, REF, ALL, kl_coef=0.2)
    assert_close(rewards, [[-0.04, 0.02, 0.80]], fp64)
    roles = doubled(roles_of("gpt2")[0])
    rollout = roll(roles)
    likelier = 1.0 * (rollout.responses == rollout.responses[0, 0])  # than under the reference, by a nat
    other = dataclasses.replace(rollout, ref_logprobs=rollout.old_logprobs - likelier, scores=rollout.scores * 0)
    first = lambda: policy_stats(roles.policy, rollout, temperature=0.9)["logprobs"][0, 0].item()  # noqa: E731
    before = first()
    iterate(roles, other, lr=0.05, kl_coef=1.0, epochs=1)
    assert first() < before  # pulled back


def test_a_huge_gap_costs_what_it_is():
    """log(1 + e^(r_l - r_w)) written literally (Bai 2022) is inf in fp32 from a gap of 89 on."""
    loss = pairwise_loss(torch.tensor([0.0]), torch.tensor([1000.0]))
    assert loss == 1000
    assert torch.isinf(torch.log(1 + torch.exp(torch.tensor(1000.0))))


def test_a_pair_is_scored_at_the_last_real_token_alone():
    """DeepSpeed-Chat and trlx average -log σ over every position from the first difference to the longer end, pads of
    the shorter answer included. Here what comes after the last real token is not read."""
    config = ModelConfig(family="gpt2", vocab_size=V, n_layer=1, n_head=2, d_model=8, max_seq_len=16)
    model = RewardModel(config, rng=torch.Generator().manual_seed(0)).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, 9, PAD, PAD, PAD]])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    scores = model(ids, mask)
    assert_close(scores[1:], model(ids[1:, :3]), fp32)
    assert_close(model(torch.where(mask, ids, 11), mask), scores, exact)


def test_every_list_weighs_the_same():
    """Pooling all pairs of a batch gives a list of 9 answers 36 of 43 pairs (84 %); InstructGPT divides by C(K, 2)."""
    scores, ranks = row(1, 0, 0), torch.tensor([[1, 2, 0]])
    ties = row(0, 0, 0), torch.tensor([[1, 2, 3]])
    losses = torch.cat([ranking_loss(scores, ranks), ranking_loss(*ties)])
    assert_close(losses.mean(), 0.5032044340, fp64)


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_the_reference_of_an_adapter_is_the_sft_model():
    """TRL #536, #495, #4723, #6591: the reference is "adapter off", which is the base, while the policy started from an
    SFT adapter: KL is not 0 at step 0. Here the reference is a view under the loaded adapter."""
    config = ModelConfig(family="gpt2", vocab_size=V, n_layer=2, n_head=2, d_model=16, max_seq_len=32)
    sft = CausalLM(config, rng=torch.Generator().manual_seed(0)).eval()
    add_adapter(sft, "sft", LoRAConfig(r=2, alpha=4.0))
    with torch.no_grad():
        for p in adapter_parameters(sft, "sft").values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad(), use_adapter(sft, "sft"):
        expected = sft(ids)
    reference = adapter_view(sft, "sft")
    with torch.no_grad():
        assert torch.equal(reference(ids), expected)
        assert not torch.equal(sft(ids), expected)  # adapter off: another model


def test_padding_side_does_not_move_positions():
    """Positions counted from column 0 make left-padded rows another model (several trainers, learned positions)."""
    for family in ("gpt2", "opt"):
        config = ModelConfig(family=family, vocab_size=V, n_layer=1, n_head=2, d_model=8, max_seq_len=16)
        model = CausalLM(config, rng=torch.Generator().manual_seed(0)).eval()
        ids = torch.tensor([[PAD, PAD, 3, 4, 5], [3, 4, 5, PAD, PAD]])
        mask = ids != PAD
        with torch.no_grad():
            logits = model(ids, mask)
        assert_close(logits[0, 2:], logits[1, :3], fp32)
