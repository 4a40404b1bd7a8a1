"""One PPO iteration: a rollout in, a better policy out (Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022).

Read `ppo_iteration` from top to bottom: rewards, advantages, epochs × minibatches × microbatches, losses, step. Each
loss is a sum over real tokens divided once, by the count of the optimizer step, so that microbatches change nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from minirlhf import dist
from minirlhf.advantage import explained_variance, gae, group_advantages
from minirlhf.config import PPOSection
from minirlhf.data import cut
from minirlhf.errors import NonFiniteError
from minirlhf.heads import ValueModel
from minirlhf.loss import (
    cispo_loss,
    dual_clip_loss,
    is_clipped,
    policy_loss,
    sequence_log_ratio,
    sequence_policy_loss,
    value_loss,
)
from minirlhf.masked import keep, masked_mean, masked_sum, whiten
from minirlhf.model import CausalLM
from minirlhf.ops import kl_estimate
from minirlhf.optim import clip_model
from minirlhf.reward import shape_rewards
from minirlhf.rng import generator
from minirlhf.rollout import Rollout, policy_stats, state_values

Plan = list[list[Tensor]]  # one epoch: minibatches, each cut into microbatches of row indices, for W ranks in turn
Clip = Callable[[nn.Module, float], Tensor]  # model, largest norm → norm before
Watch = Callable[..., None]  # rows (b,); log-probs, values (None: no critic), advantages, returns (b, R) each

# Optimizer step of the iteration, from 0 → of each microbatch of texts of this rank: nats (b, T), labels (b, T) bool,
# and labels of the whole step.
Texts = Callable[[int], Iterable[tuple[Tensor, Tensor, int]]]


def no_texts(step: int) -> Iterable[tuple[Tensor, Tensor, int]]:
    """PPO without ptx."""
    return ()


def ppo_iteration(  # noqa: PLR0913  (what one iteration depends on, and nothing else)
    policy: CausalLM,
    value_model: ValueModel | None,  # None: no critic
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    scores: Tensor,  # (B,) as they enter the rewards, see `score_answers`
    plans: Sequence[Plan],  # one per epoch
    options: PPOSection,
    *,
    kl_coef: float,  # β of this iteration
    temperature: float,  # τ of the sampler
    max_grad_norm: float,
    longest: int = 0,  # tokens that an answer may have, for ppo.loss_mean budget
    impl: str = "auto",
    clip: Clip = clip_model,
    precision: Callable[[], AbstractContextManager] = nullcontext,  # of the forwards; a backward pass follows them
    ptx: Texts = no_texts,
    watch: Watch | None = None,  # the ledger's eye on every microbatch
) -> dict[str, float]:
    """Improve policy and value model on one rollout; returns the metrics of the iteration."""
    o = options
    assert rollout.score_at == o.score_at, (rollout.score_at, o.score_at)
    actions, states = rollout.action_mask, rollout.value_mask  # (B, R) each, equal unless the score lands elsewhere
    in_reward, in_loss = (kl_coef, 0.0) if o.kl_in == "reward" else (0.0, kl_coef)  # β
    rewards = shape_rewards(
        scores, rollout.old_logprobs, rollout.ref_logprobs, actions, kl_coef=in_reward, kl=o.kl, score_at=o.score_at
    )  # (B, R)
    advantages, returns = estimate(rewards, rollout.values, actions, states, o)  # (B, R) each
    require_finite(
        scores=scores, old_logprobs=rollout.old_logprobs, ref_logprobs=rollout.ref_logprobs, values=rollout.values,
        rewards=rewards, advantages=advantages, returns=returns,
    )  # fmt: skip
    fitted = states if o.value_at_end else actions  # (B, R) where the value is trained

    want = ("logprobs", "entropy") if o.entropy_coef else ("logprobs",)
    steps: list[TokenSums] = []
    for minibatches in plans:
        for microbatches in minibatches:
            steps.append(TokenSums())
            rows = torch.cat(microbatches)
            mean = partial(loss_mean, kind=o.loss_mean, parts=len(microbatches), longest=longest)
            if o.whiten_over == "minibatch":
                advantages[rows], returns[rows] = estimate(
                    rewards[rows], rollout.values[rows], actions[rows], states[rows], o
                )
            for index in dist.mine(microbatches):
                part = rollout.rows(index)
                R = part.responses.shape[1]
                m, f, A, old = actions[index, :R], fitted[index, :R], advantages[index, :R], part.old_logprobs
                with precision():
                    stats = policy_stats(policy, part, temperature=temperature, want=want, impl=impl)
                    values = state_values(value_model, part) if value_model else None
                logprobs = stats["logprobs"]
                pg, clipped = surrogate(logprobs, old, A, m, o)  # (b, R) each
                bonus = o.entropy_coef * stats["entropy"] if o.entropy_coef else 0.0
                loss = mean(pg - bonus, m, actions[rows])
                if in_loss:
                    penalty = kl_estimate(logprobs, part.ref_logprobs, o.kl)  # (b, R)
                    loss = loss + in_loss * mean(penalty, m, actions[rows])
                    steps[-1].add(m, penalty=penalty)
                if values is not None:
                    vf = value_loss(values, part.values, returns[index, :R], clip_range=o.value_clip_range or None)
                    loss = loss + o.value_coef * mean(vf, f, fitted[rows])
                    steps[-1].add(f, value=vf)
                loss.backward()
                ratio = (logprobs - old).exp()
                steps[-1].add(
                    m, policy=pg, clipped=clipped, ratio=ratio, gap=(ratio - 1).abs(),
                    kl=kl_estimate(old, logprobs, "k3"),
                )  # fmt: skip
                if watch:
                    watch(index, logprobs.detach(), None if values is None else values.detach(), A, returns[index, :R])
            for nats, labels, n in ptx(len(steps) - 1):
                (o.ptx_coef * masked_sum(nats, labels) / n).backward()
                steps[-1].add(labels, ptx=nats)
            models = (policy, value_model) if value_model else (policy,)
            optimizer_step(optimizer, models, max_grad_norm, clip, steps[-1])
        if o.stop_kl and mean_of(steps[-len(minibatches) :], "kl") > o.stop_kl:
            break

    critic = {"value/explained_var": float(explained_variance(rollout.values, returns, actions))} if value_model else {}
    return {
        **{metric: mean_of(steps, name) for metric, name in UPDATE_METRICS.items() if name in steps[0].sums},
        "val/first_ratio_gap": mean_of(steps[:1], "gap"),  # 0, or sampling and training disagree
        "policy/epochs": len(steps) // len(plans[0]),
        **critic,
        "objective/rlhf_reward": float(masked_sum(rewards, states)) / len(rollout),
    }


def estimate(
    rewards: Tensor,  # (B, R)
    values: Tensor,  # (B, R) of the rollout
    actions: Tensor,  # (B, R) bool
    states: Tensor,  # (B, R) bool, the actions' and perhaps the one after the last
    options: PPOSection,
) -> tuple[Tensor, Tensor]:  # advantages, returns: (B, R) each
    """How much better than expected each token was, with what is whitened before and after; returns are of before.

    gae: than the value model expects · reinforce: reward to go less its mean over the tokens (Williams 1992) · rloo,
    grpo: the whole answer's reward, score - β Σ k1, against those of its siblings, which are the rows next to it; the
    same at every token, and left on its own scale.
    """
    o = options
    ddof = o.whiten_ddof if int(actions.sum()) > 1 else 0  # one token has no variance, whatever it is divided by
    if o.whiten_rewards:
        rewards = whiten(rewards, states, center=False, ddof=ddof)
    if o.advantage in ("rloo", "grpo"):
        totals = keep(rewards, states).sum(1)  # (B,)
        groups = group_advantages(totals.view(-1, o.answers_per_prompt), kind=o.advantage)  # (B / K, K)
        advantages, returns = (keep(x.view(-1, 1).expand_as(rewards), actions) for x in (groups, totals))
        return advantages, returns
    if o.advantage == "gae":
        advantages, returns = gae(rewards, values, states, gamma=o.gamma, lam=o.gae_lambda)
    else:
        returns, _ = gae(rewards, torch.zeros_like(values), states, gamma=o.gamma, lam=1.0)
        advantages = keep(returns - masked_mean(returns, actions), actions)
    return (whiten(advantages, actions, ddof=ddof) if o.whiten_advantages else advantages), returns


def surrogate(
    logprobs: Tensor,  # (b, R)
    old: Tensor,  # (b, R)
    A: Tensor,  # (b, R)
    mask: Tensor,  # (b, R) bool
    options: PPOSection,
) -> tuple[Tensor, Tensor]:  # (b, R), (b, R) bool
    """The loss that `ppo.policy_loss` names, and where its clip makes a difference."""
    o = options
    near = {"clip_range": (o.clip_range, o.clip_range_high or o.clip_range)}
    if o.policy_loss == "gspo":
        log_s = sequence_log_ratio(logprobs, old, mask)
        clipped = is_clipped(log_s, torch.zeros_like(log_s), A, **near)
        return sequence_policy_loss(logprobs, old, A, mask, **near), clipped
    if o.policy_loss == "cispo":  # its weight is clipped whatever the sign of the advantage
        above, below = (is_clipped(logprobs, old, sign * torch.ones_like(A), **near) for sign in (1, -1))
        return cispo_loss(logprobs, old, A, **near), above | below
    clipped = is_clipped(logprobs, old, A, **near)
    if o.policy_loss == "dual_clip":
        beyond = (A < 0) & ((logprobs - old).exp() > o.dual_clip)
        return dual_clip_loss(logprobs, old, A, dual_clip=o.dual_clip, **near), clipped | beyond
    return policy_loss(logprobs, old, A, **near), clipped


def loss_mean(
    x: Tensor,  # (b, R) of a microbatch
    mask: Tensor,  # (b, R) bool
    whole: Tensor,  # (n, R) bool, of the whole optimizer step
    *,
    kind: str,  # ppo.loss_mean
    parts: int,  # microbatches of the step, over all ranks
    longest: int,  # tokens that an answer may have
) -> Tensor:  # ()
    """A microbatch's share of the optimizer step's mean: a sum divided by a count of the whole step.

    step: by its tokens, which all weigh the same · answer: each answer's mean, by the answers, so that a token weighs
    more in a short one (GRPO, Shao et al. 2024, arXiv 2402.03300, eq. 3) · budget: by answers × `longest`, which no
    answer's length can change (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783, section 3.2) · microbatch: the mean of the
    microbatches' means, where tokens weigh more in a microbatch that has few.
    """
    if kind == "answer":
        x = x / mask.sum(1, keepdim=True).clamp(min=1)
    if kind in ("answer", "budget"):
        n = whole.any(1).sum() * (longest if kind == "budget" else 1)
    else:
        n = mask.sum().clamp(min=1) * parts if kind == "microbatch" else whole.sum()
    return masked_sum(x, mask) / n


UPDATE_METRICS = {
    "loss/policy_avg": "policy",
    "loss/value_avg": "value",
    "loss/kl_avg": "penalty",
    "ptx/loss": "ptx",
    "policy/approxkl_avg": "kl",
    "policy/clipfrac_avg": "clipped",
    "val/ratio": "ratio",
}


class TokenSums:
    """Sums over real tokens of per-token statistics, and their count; no host sync until a mean is asked for."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, mask: Tensor, **stats: Tensor) -> None:  # (b, R) each
        """Add the True entries."""
        n = mask.sum()
        for name, x in stats.items():
            total = masked_sum(x.detach(), mask)
            self.counts[name] = self.counts[name] + n if name in self.counts else n
            self.sums[name] = self.sums[name] + total if name in self.sums else total


def mean_of(parts: Sequence[TokenSums], name: str) -> float:
    """Sum over everything divided by the count of everything, over all ranks."""
    total = torch.stack([p.sums[name].double() for p in parts]).sum()
    count = torch.stack([p.counts[name] for p in parts]).sum()
    return float(dist.all_sum(total) / dist.all_sum(count))


def optimizer_step(
    optimizer: torch.optim.Optimizer, models: Sequence[nn.Module], max_grad_norm: float, clip: Clip, sums: TokenSums
) -> None:
    """Clip each model's gradient by itself, so that the value loss cannot shrink the policy's step; then step.

    Norms are those of all ranks, so that a number that is none raises NonFiniteError everywhere.
    """
    norms = [clip(model, max_grad_norm) for model in models]
    if not torch.isfinite(torch.stack(norms)).all():
        losses = {name: x for name, x in sums.sums.items() if name in ("policy", "value")}
        bad = [f"loss of the {name}" for name, x in losses.items() if not x.isfinite()]
        wrong = [type(model).__name__ for model, x in zip(models, norms, strict=True) if not x.isfinite()]
        bad = bad or [f"gradient of the {name}" for name in wrong]
        raise NonFiniteError(f"{' and '.join(bad)}: NaN or infinite; lower optim.lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def require_finite(**tensors: Tensor) -> None:
    """Raise NonFiniteError with the name of the first tensor that holds NaN or infinity, and the place in it."""
    for name, x in tensors.items():
        bad = ~torch.isfinite(x)
        if bad.any():
            place = bad.nonzero()[0].tolist()
            at = f"answer {place[0]}" + (f", token {place[1]}" if len(place) > 1 else "")
            raise NonFiniteError(f"{name.replace('_', ' ')} of {at}: {float(x[tuple(place)])}")


def epoch_plans(lengths: Tensor, options: PPOSection, seed: int, iteration: int) -> list[Plan]:  # lengths (B,)
    """A permutation per epoch, cut into minibatches, each cut into microbatches of similar length."""
    plans = []
    for epoch in range(options.epochs):
        order = torch.randperm(len(lengths), generator=generator(seed, "minibatches", iteration, epoch))
        minibatches = [m[lengths[m].argsort(stable=True)] for m in order.split(options.minibatch_size)]
        plans.append([[m[i] for i in cut(len(m), options.microbatch_size)] for m in minibatches])
    return plans


def score_moments(scores: Tensor, kind: str) -> dict[str, float]:  # (B,) of the first rollout
    """μ₀ and σ₀ of `score_answers`: "first" standardises, "mean" only centres, "none" leaves scores as they are.

    Scores that are all alike have no deviation: they are only centred, for a tiny σ₀ would make later ones enormous.
    """
    x = scores.double()
    mean, deviation = float(x.mean()), float(x.std(correction=0))
    scaled = kind == "first" and deviation > 1e-6 * abs(mean)
    return {"shift": mean if kind != "none" else 0.0, "scale": deviation if scaled else 1.0}


def score_answers(
    scores: Tensor,  # (B,) as the reward model gave them
    has_eos: Tensor,  # (B,) bool
    options: PPOSection,
    shift: float,  # μ₀
    scale: float,  # σ₀
) -> Tensor:  # (B,)
    """(score - μ₀)/σ₀, cut to ± score_clip, then the missing-EOS penalty (OpenAI 2019 replaces, TRL subtracts)."""
    x = (scores - shift) / scale
    if options.score_clip:
        x = x.clamp(-options.score_clip, options.score_clip)
    if options.missing_eos == "replace":
        x = torch.where(has_eos, x, -options.missing_eos_penalty)
    elif options.missing_eos == "subtract":
        x = torch.where(has_eos, x, x - options.missing_eos_penalty)
    return x


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What the rollout alone says, before any update; per episode unless the name says per token."""
    mask, lengths = rollout.action_mask, rollout.lengths.double()
    old, ref = rollout.old_logprobs.double(), rollout.ref_logprobs
    mismatch = torch.where(mask, (old - rollout.sampler_logprobs).abs(), 0.0)
    return {
        "objective/kl": float(masked_sum(kl_estimate(old, ref, "k1"), mask)) / len(rollout),
        "objective/entropy": -float(masked_sum(old, mask)) / len(rollout),
        "objective/scores": float(rollout.scores.double().mean()),
        "objective/scores_std": float(rollout.scores.double().std(correction=0)),
        "response/length_mean": float(lengths.mean()),
        "response/empty_frac": float((rollout.has_eos & (lengths == 1)).double().mean()),
        "response/eos_frac": float(rollout.has_eos.double().mean()),
        "sampler/mismatch_max": float(mismatch.max()),
        "sampler/mismatch_mean": float(masked_mean(mismatch, mask)),
    }
