"""Does it optimise the right thing? On 15 (or 7) possible answers, against the optimum in closed form (docs/optima.md).

The loop is that of train_ppo.py: `collect` with a real CausalLM and ValueModel, `ppo_iteration` with AdamW, a rate that
falls linearly to 0. Only the reward is a table. All answers are enumerated to measure the total variation
TV = ½ Σ_y |π(y) - π*(y)| exactly; training sees samples alone. Wrong variants go through the same loop and miss.
"""

import copy
import itertools
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import torch

from minirlhf import ppo
from minirlhf.advantage import group_advantages
from minirlhf.config import PPOSection
from minirlhf.heads import ValueModel
from minirlhf.loss import policy_loss
from minirlhf.masked import keep
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.ops import kl_estimate
from minirlhf.optim import adamw, lr_factor, set_lr
from minirlhf.ppo import epoch_plans, ppo_iteration
from minirlhf.reward import shape_rewards
from minirlhf.rng import generator
from minirlhf.rollout import Roles, collect, policy_stats, target_stats

EOS, BETA, CLOSE = 0, 1.0, 0.005
PROMPT = torch.tensor([[1, 2]])


class World:
    """All answers of up to R tokens out of 3, EOS one of them."""

    def __init__(self, R):
        answers = [y for n in range(1, R + 1) for y in itertools.product(range(3), repeat=n)]
        self.R, self.answers = R, [y for y in answers if EOS not in y[:-1] and (y[-1] == EOS or len(y) == R)]
        self.tokens = torch.tensor([[*y, *[EOS] * (R - len(y))] for y in self.answers])  # padding has the id of EOS
        self.mask = torch.tensor([[t < len(y) for t in range(R)] for y in self.answers])
        self.code = {tuple(row): i for i, row in enumerate(self.tokens.tolist())}
        prefixes = sorted({y[:t] for y in self.answers for t in range(len(y))})
        self.states = len(prefixes)
        self.state = torch.tensor(
            [[prefixes.index(y[:t]) if t < len(y) else 0 for t in range(R)] for y in self.answers]
        )

    def table(self, seed):  # → (n,) rewards
        return torch.randn(len(self.answers), generator=generator(seed, "rewards"), dtype=torch.float64)

    def log_probs(self, model):  # → (n, R) log π(a_t), 0 at padding
        prompt = PROMPT.expand(len(self.tokens), -1)
        whole, first = torch.cat([prompt, self.tokens], 1), torch.ones_like(prompt, dtype=torch.bool)
        targets = torch.where(self.mask, self.tokens, -100)
        with torch.no_grad():
            return target_stats(model, whole, torch.cat([first, self.mask], 1), targets)["logprobs"].double()

    def distribution(self, model):  # → (n,) π(y)
        return self.log_probs(model).sum(1).exp()

    def optimum(self, reference, table):
        """π*(y) = π_ref(y) e^(r(y)/β) / Z (Rafailov et al. 2023, eq. 4)."""
        return torch.softmax(self.log_probs(reference).sum(1) + table / BETA, 0)

    def scores(self, rollout, table):  # → (B,)
        answers = torch.nn.functional.pad(rollout.responses, (0, self.R - rollout.responses.shape[1]), value=EOS)
        return table[[self.code[tuple(row)] for row in answers.tolist()]]


WORLD, SMALL = World(3), World(2)
OPTIONS = PPOSection(
    rollout_size=512, minibatch_size=256, microbatch_size=256, epochs=2, gae_lambda=1.0, value_clip_range=0.0,
    value_coef=1.0, score_norm="none",
)  # fmt: skip
GROUPS = {"world": SMALL, "steps": 150}  # 7 answers: a group of 8 sees most of them
TABLES = range(10)


def language_model(seed):
    """A reference whose answers have quite different probabilities."""
    config = ModelConfig(family="gpt2", vocab_size=3, n_layer=1, n_head=2, d_model=32, max_seq_len=8, tied=False)
    model = CausalLM(config, rng=generator(seed, "weights")).eval()
    with torch.no_grad():
        model.head.weight.mul_(3)
    return model


def total_variation(p, q):
    return float((p - q).abs().sum() / 2)


def train(seed, *, world=WORLD, steps=200, lr=3e-3, kl_coef=BETA, **changes):
    """The script's loop → reference, policy."""
    options, table = replace(OPTIONS, **changes), world.table(seed).float()
    policy = language_model(seed)
    reference = copy.deepcopy(policy).requires_grad_(False)

    value_model = ValueModel.from_trunk(policy.trunk).eval() if options.advantage == "gae" else None
    roles = Roles(policy, reference, value_model, lambda rollout: world.scores(rollout, table))
    named = [*policy.named_parameters("policy"), *(value_model.named_parameters("value_model") if value_model else ())]
    optimizer = adamw(named, lr=lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    prompts = PROMPT.repeat(options.rollout_size, 1)
    for step in range(1, steps + 1):
        plan = partial(epoch_plans, options=options, seed=seed, iteration=step)
        rollout = collect(
            roles, prompts, torch.ones_like(prompts, dtype=torch.bool), eos_token_id=EOS, pad_token_id=EOS,
            max_new_tokens=world.R, temperature=1.0, rng=generator(seed, "sample", step),
            partition=lambda n, plan=plan: list(chain(*plan(n)[0])),
        )  # fmt: skip
        set_lr(optimizer, lr * lr_factor(step, kind="linear", warmup=5, total=steps))
        ppo_iteration(
            policy, value_model, optimizer, rollout, rollout.scores, plan(rollout.total_lengths), options,
            kl_coef=kl_coef, temperature=1.0, max_grad_norm=100.0,
        )  # fmt: skip
    return reference, policy


def distance(seed, *, world=WORLD, **how):
    """TV to the closed form, before and after."""
    reference, policy = train(seed, world=world, **how)
    target = world.optimum(reference, world.table(seed))
    before, after = (total_variation(world.distribution(model), target) for model in (reference, policy))
    print(f"table {seed}: TV {before:.4f} → {after:.4f}")  # pytest -s
    return before, after


# ---- PPO ------------------------------------------------------------------------------------------------------------


def test_the_answers_are_all_there_are():
    model, table = language_model(0), WORLD.table(0)
    assert len(WORLD.answers) == len(WORLD.code) == 15
    log_ref = WORLD.log_probs(model).sum(1)
    assert float(log_ref.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    target, log_Z = WORLD.optimum(model, table), torch.logsumexp(log_ref + table / BETA, 0)
    objective = lambda p: float((p * (table - BETA * (p.log() - log_ref))).sum())  # noqa: E731
    assert objective(target) == pytest.approx(BETA * float(log_Z), abs=1e-6)
    assert objective(target) > objective(log_ref.exp())


def test_ppo_reaches_the_optimum():
    """One table; the other nine with -m slow."""
    before, after = distance(2)
    assert before > 0.2
    assert after <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("seed", TABLES)
def test_ppo_reaches_the_optimum_of_every_table(seed):
    before, after = distance(seed)
    assert before > 10 * CLOSE
    assert after <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"gae_lambda": 0.95}, {"whiten_advantages": False}])
def test_settings_that_keep_the_fixed_point(changes):
    """λ and whitening change the way there, not the end."""
    assert distance(2, **changes)[1] <= CLOSE


# ---- wrong variants: the same loop, one thing broken ----------------------------------------------------------------


def ratio_times_k3():
    """Replacements for `policy_stats` and `policy_loss`: β ρ k3 per token as a loss."""
    seen = {}

    def stats(model, part, **how):
        seen["ref"] = part.ref_logprobs
        return policy_stats(model, part, **how)

    def loss(logprobs, old, A, **how):
        penalty = torch.exp(logprobs - old) * kl_estimate(logprobs, seen["ref"], "k3")
        return policy_loss(logprobs, old, A, **how) + BETA * penalty

    return {"policy_stats": stats, "policy_loss": loss}


def last_token_only(scores, logprobs, ref_logprobs, mask, **how):
    last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
    return shape_rewards(scores, keep(logprobs, last), keep(ref_logprobs, last), mask, **how)


def shifted(logprobs, old, A, **how):
    return policy_loss(logprobs, old, A.roll(1, 1), **how)


IN_LOSS = {"kl_in": "loss", "whiten_advantages": False}
WRONG = {
    "k2 in the reward": ({"kl": "k2"}, {}),
    "k3 in the reward": ({"kl": "k3"}, {}),
    "k2 as a loss per token": (IN_LOSS | {"kl": "k2"}, {}),
    "k3 as a loss per token": (IN_LOSS | {"kl": "k3"}, {}),
    "ratio times k3 as a loss per token": ({"kl_coef": 0.0, "whiten_advantages": False}, ratio_times_k3()),
    "k1 as a loss: no penalty at all": (IN_LOSS | {"kl": "k1"}, {}),
    "sign of the KL flipped": ({"kl_coef": -BETA}, {}),
    "KL of the last token only": ({}, {"shape_rewards": last_token_only}),
    "advantages one token late": ({}, {"policy_loss": shifted}),
}


def broken(monkeypatch, name, seed, **how):
    changes, patches = WRONG[name]
    for function, replacement in patches.items():
        monkeypatch.setattr(ppo, function, replacement)
    return distance(seed, **changes, **how)[1]


def test_a_wrong_variant_misses_it(monkeypatch):
    assert broken(monkeypatch, "k3 in the reward", 2, steps=40) > 10 * CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_variants_miss_it(monkeypatch, name):
    assert broken(monkeypatch, name, 2) > 4 * CLOSE


# ---- group baselines ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", TABLES)
@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_group_advantages_of_score_less_penalty_have_the_same_optimum(advantage, seed):
    """docs/optima.md, sections 2 and 3: where all totals are equal, and nowhere else, every advantage is 0."""
    assert distance(seed, **GROUPS, advantage=advantage, answers_per_prompt=8)[1] <= CLOSE


def by_state(x):  # (7,) of answers → (states, 3) sums over the answers that take token a in state s
    out = torch.zeros(SMALL.states * 3, dtype=torch.float64)
    place = 3 * SMALL.state + SMALL.tokens
    return out.index_add(0, place[SMALL.mask], x[:, None].expand(-1, SMALL.R)[SMALL.mask]).view(-1, 3)


def siblings(table, K):
    """The GRPO advantage of answer y in every group of K - 1 siblings, and those groups: (7, n), (n, K - 1)."""
    groups = torch.cartesian_prod(*[torch.arange(len(table))] * (K - 1)).view(-1, K - 1)
    with_y = torch.cat([table[:, None, None].expand(-1, len(groups), 1), table[groups].expand(len(table), -1, -1)], 2)
    return group_advantages(with_y.flatten(0, 1), kind="grpo")[:, 0].view(len(table), -1), groups


def grpo_fixed_point(reference, table, K):
    """π with π(a|s) (Q(s,a) - V(s)) = β (π(a|s) - π_ref(a|s)) in every state, Q and V of the expected advantages.

    → π (7,), and the largest difference of the two sides.
    """
    ref, state, tokens, mask = torch.zeros(SMALL.states, 3).double(), SMALL.state, SMALL.tokens, SMALL.mask
    ref[state[mask], tokens[mask]] = SMALL.log_probs(reference).exp()[mask]
    ref /= ref.sum(1, keepdim=True)  # the model is fp32
    z, (A, groups) = ref.log(), siblings(table, K)
    for _ in range(20_000):
        pi = z.softmax(1)
        p = torch.where(mask, pi[state, tokens], 1.0).prod(1)  # (7,)
        expected = A @ p[groups].prod(1)  # (7,)
        visits, gains = by_state(p), by_state(p * expected)
        Q, V = gains / visits, (gains.sum(1) / visits.sum(1))[:, None]
        difference = pi * (Q - V) - BETA * (pi - ref)
        if difference.abs().max() < 1e-10:
            break
        z = z + difference
    return p, float(difference.abs().max())


def test_two_answers_of_a_group_only_say_which_is_better():
    """K = 2: the advantage is ±1/√2, its expectation the chance to win less the chance to lose, over √2."""
    table, p = SMALL.table(0), SMALL.distribution(language_model(0))
    A, groups = siblings(table, 2)
    wins = (torch.sign(table[:, None] - table) * p).sum(1)
    torch.testing.assert_close(A @ p[groups[:, 0]], wins / 2**0.5, rtol=1e-2, atol=1e-4)  # σ + 1e-4 is not quite σ


def test_grpo_as_published_has_another_optimum():
    reference, table = language_model(0), SMALL.table(0)
    for K in (2, 4):
        target, missed = grpo_fixed_point(reference, table, K)
        assert missed < 1e-9
        assert float(target.sum()) == pytest.approx(1.0, abs=1e-9)
        assert total_variation(target, SMALL.optimum(reference, table)) > 10 * CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("seed", TABLES)
def test_grpo_as_published_reaches_its_own_optimum(seed):
    """Scores alone in the group, β k3 per token as a loss (Shao et al. 2024, eq. 3, 4): section 4 of docs/optima.md."""
    how = {"advantage": "grpo", "answers_per_prompt": 4, "kl_in": "loss", "kl": "k3"}
    many = {"steps": 400, "rollout_size": 4096, "minibatch_size": 2048, "microbatch_size": 2048}  # its noise is larger
    reference, policy = train(seed, world=SMALL, **many, **how)
    target, missed = grpo_fixed_point(reference, SMALL.table(seed), 4)
    assert missed < 1e-9
    after = total_variation(SMALL.distribution(policy), target)
    apart = total_variation(target, SMALL.optimum(reference, SMALL.table(seed)))
    print(f"table {seed}: TV {after:.4f}, {apart:.4f} from π*")
    assert after <= CLOSE


# ---- REINFORCE ------------------------------------------------------------------------------------------------------


def test_the_first_step_of_ppo_is_reinforce():
    """With SGD at rate 1 the step is the gradient: Σ A_t ∇log π(a_t) / N of plain logits, A_t reward to go less V."""
    options = replace(
        OPTIONS, rollout_size=64, minibatch_size=64, microbatch_size=16, epochs=1, whiten_advantages=False
    )
    policy, table = language_model(3).double(), WORLD.table(3)
    reference = copy.deepcopy(language_model(4)).double()
    roles = Roles(
        policy, reference, ValueModel.from_trunk(policy.trunk).double().eval(), lambda r: WORLD.scores(r, table)
    )
    torch.nn.init.normal_(roles.value_model.score.weight, generator=generator(0, "head"))

    prompts = PROMPT.repeat(64, 1)
    plan = lambda n: epoch_plans(n, options, 0, 1)  # noqa: E731
    rollout = collect(
        roles, prompts, torch.ones_like(prompts, dtype=torch.bool), eos_token_id=EOS,
        pad_token_id=EOS, max_new_tokens=WORLD.R, temperature=1.0, rng=generator(0, "sample"),
        partition=lambda n: list(chain(*plan(n)[0])),
    )  # fmt: skip
    total, count = 0.0, 0
    for b in range(64):
        n = int(rollout.lengths[b])
        ids = torch.cat([PROMPT[0], rollout.responses[b, :n]])[None]
        logp, logq = (m(ids)[0, 1:-1].log_softmax(1)[range(n), ids[0, 2:]] for m in (policy, reference))
        V = roles.value_model(ids)[0, 1:-1].detach()
        to_go = WORLD.scores(rollout, table)[b] - BETA * (logp - logq).detach().flip(0).cumsum(0).flip(0)
        total, count = total - ((to_go - V) * logp).sum(), count + n
    expected = torch.autograd.grad(total / count, list(policy.parameters()))
    before = [p.detach().clone() for p in policy.parameters()]
    ppo_iteration(
        policy, roles.value_model, torch.optim.SGD(policy.parameters(), lr=1.0), rollout, rollout.scores,
        plan(rollout.total_lengths), options, kl_coef=BETA, temperature=1.0, max_grad_norm=1e9,
    )  # fmt: skip
    for was, now, g in zip(before, policy.parameters(), expected, strict=True):
        torch.testing.assert_close(was - now.detach(), g, rtol=1e-6, atol=1e-9)
