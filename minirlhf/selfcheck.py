"""Is this model fit for PPO? A dozen seconds of checks on one's own folders, before hours of training on them.

    python -m minirlhf.selfcheck                                     the default folders of the three scripts
    python -m minirlhf.selfcheck --model.path SFT --reward.path RM   or any settings of train_ppo.py

The roles are loaded as `train_ppo.py` loads them, a small rollout is drawn, and each check compares two ways of
computing the same numbers. All is in fp32 but the last. Exit code 5 where a check fails.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf import stage
from minirlhf.config import PPOConfig, load_config
from minirlhf.data import collate, encode_sft, left_padded
from minirlhf.errors import NonFiniteError, UsageError, UserError
from minirlhf.ppo import epoch_plans, ppo_iteration
from minirlhf.records import SFT, Asked
from minirlhf.rng import generator
from minirlhf.rollout import IGNORE, Roles, Rollout, collect, policy_stats, sft_targets, target_stats
from minirlhf.run import complain, prepare_torch
from minirlhf.settings import help_text

ANSWERS = 16
NATS = 1e-3  # what fp32 may differ by, in the log-prob of a token, when batch, padding or cache differ
SHARE = 1e-3  # and in a gradient or a score, of their size


class Check(NamedTuple):
    """One line of the table; a figure beyond its limit, or NaN, fails."""

    name: str
    figure: float
    limit: float
    words: str

    @property
    def passed(self) -> bool:
        """NaN is beyond every limit."""
        return self.figure <= self.limit


@dataclass(frozen=True)
class Bench:
    """What every check looks at."""

    config: Any
    roles: Roles
    loaded: stage.Loaded
    prompts: list[Asked]
    rollout: Rollout
    parts: Sequence[Tensor]  # microbatches in which the rollout was judged

    def logprobs(self, model: Any, rollout: Rollout) -> Tensor:  # (B, R)
        """Of the answers' tokens."""
        with torch.no_grad():
            return policy_stats(model, rollout, temperature=self.config.sample.temperature)["logprobs"]

    def by_parts(self, model: Any) -> Tensor:  # (B, R)
        """The same, in the microbatches of the update."""
        out = torch.zeros_like(self.rollout.old_logprobs)
        for index in self.parts:
            part = self.logprobs(model, self.rollout.rows(index))
            out[index, : part.shape[1]] = part
        return out

    def gap(self, a: Tensor, b: Tensor) -> float:  # (B, R) each
        """Largest difference over real tokens."""
        return float((a - b).abs()[self.rollout.action_mask].max())


def prepare(config: Any, roles: Roles, loaded: stage.Loaded) -> Bench:
    """Draw and judge a small rollout, its prompts from short to long."""
    c = config
    asked, prompts = stage.ppo_prompts(c, stage.unheard(), loaded)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    order *= -(-ANSWERS // len(order))
    rows = [order[i * len(order) // ANSWERS] for i in range(ANSWERS)]
    sampling = stage.sampling(c.sample, loaded)
    ids, mask = left_padded([prompts[r] for r in rows], sampling["pad_token_id"], c.run.device)
    options = replace(c.ppo, rollout_size=ANSWERS, minibatch_size=ANSWERS, microbatch_size=ANSWERS // 4, epochs=1,
                      score_at="last", loss_mean="step",
                      advantage="gae" if roles.value_model else "reinforce")  # fmt: skip
    parts: list[Tensor] = []

    def partition(lengths: Tensor) -> list[Tensor]:
        parts.extend(epoch_plans(lengths, options, c.run.seed, 1)[0][0])
        return parts

    rngs = [generator(c.run.seed, "selfcheck", 0, row) for row in range(ANSWERS)]
    rollout = collect(roles, ids, mask, partition=partition, rng=rngs, **sampling)
    return Bench(replace(c, ppo=options), roles, loaded, [asked[r] for r in rows], rollout, parts)


# ---- checks ---------------------------------------------------------------------------------------------------------


def ratio(b: Bench) -> Check:
    """The update's first forward repeats the rollout's: bit for bit."""
    new = b.by_parts(b.roles.policy)
    gap = b.gap((new - b.rollout.old_logprobs).exp(), torch.ones_like(new))
    return Check("ratio 1 at step 0", gap, 0.0, "max |ρ - 1| over the update's microbatches")


def first_kl(b: Bench) -> Check:
    """Policy and reference begin as one."""
    return Check(
        "KL 0 at step 0", b.gap(b.rollout.old_logprobs, b.rollout.ref_logprobs), 0.0, "max |log π - log π_ref|"
    )


def reference(b: Bench) -> Check:
    """The frozen reference against the folder, read again."""
    path = b.config.model.path
    fresh = stage.load_policy(b.config).model
    gap = b.gap(b.by_parts(fresh), b.rollout.ref_logprobs)
    return Check("reference equal to SFT", gap, 0.0, f"max |Δ log-prob| to {path}")


def cache(b: Bench) -> Check:
    """Token by token with a cache, as sampled, against one forward of the whole."""
    gap = b.gap(b.rollout.sampler_logprobs, b.rollout.old_logprobs)
    return Check("cached decoding = full forward", gap, NATS, "max |Δ log-prob|")


def padding_side(b: Bench) -> Check:
    """Three columns more of padding on the left, filled with EOS, and two on the right."""
    rollout, tau = padded(b, 3, 2), b.config.sample.temperature
    targets = torch.where(rollout.action_mask, rollout.responses, IGNORE)  # (B, R + 2)
    with torch.no_grad():  # `policy_stats` would take the padding away
        more = target_stats(b.roles.policy, rollout.input_ids, rollout.attention_mask, targets, temperature=tau)
    gap = b.gap(more["logprobs"][:, :-2], b.rollout.old_logprobs)
    return Check("padding on the left changes nothing", gap, NATS, "max |Δ log-prob|")


def batch_size(b: Bench) -> Check:
    """Each answer alone against all together."""
    whole = b.logprobs(b.roles.policy, b.rollout)
    alone = torch.zeros_like(whole)
    for row in range(len(whole)):
        one = b.logprobs(b.roles.policy, b.rollout.rows(torch.tensor([row])))
        alone[row, : one.shape[1]] = one[0]
    return Check("batch size changes nothing", b.gap(alone, whole), NATS, "max |Δ log-prob|, each alone against all")


def microbatch(b: Bench) -> Check:
    """The gradient of one optimizer step, whole and answer by answer."""
    whole, single = gradient(b, ANSWERS), gradient(b, 1)
    share = float((whole - single).norm() / whole.norm())
    return Check("microbatches change nothing", share, SHARE, "|Δ gradient| / |gradient|, 1 answer against all")


def score_padding(b: Bench) -> Check:
    """The same answers scored alone, and with padding on both sides."""
    with torch.no_grad():
        more = b.roles.score(padded(b, 3, 2)).double()
        alone = torch.cat([b.roles.score(b.rollout.rows(torch.tensor([row]))) for row in range(len(b.rollout))])
    gap = (more - alone.to(more)).abs().max() / alone.double().abs().max().clamp(min=1e-6)
    return Check("score independent of padding", float(gap), SHARE, "max |Δ score| / max |score|")


def eos(b: Bench) -> Check:
    """The label that ends an answer, in the batches of SFT."""
    loaded = b.loaded
    stop = loaded.template.stop_token_id(loaded.tokenizer)
    answers = b.rollout.texts(loaded.tokenizer)[1]
    both = zip(b.prompts, answers, strict=True)
    records = [SFT(asked, said) if isinstance(asked, str) else SFT("", said, asked) for asked, said in both]
    examples, _ = encode_sft(records, loaded.tokenizer, loaded.template, sys.maxsize)
    batch = collate(examples)
    labels = sft_targets(batch.input_ids, batch.trained)  # (B, T - 1)
    last = labels[torch.arange(len(labels)), batch.attention_mask.sum(1) - 2]  # (B,) label of the last real token
    missing = int((last != stop).sum())
    ended = float(b.rollout.has_eos.double().mean())
    return Check("EOS learnable under the template", missing, 0, f"SFT rows without it as label; it ended {ended:.0%}")


def bf16(b: Bench) -> Check:
    """Matrix products in bf16 against fp32; noise as large as the clip range would drown what PPO measures."""
    with torch.autocast(b.config.run.device.split(":")[0], torch.bfloat16):
        noisy = b.by_parts(b.roles.policy)
    noise = (noisy - b.rollout.old_logprobs)[b.rollout.action_mask].double()
    rms, worst = float(noise.square().mean().sqrt()), float(noise.abs().max())
    words = f"rms Δ log-prob, limit ppo.clip_range; largest {worst:.2g}"
    return Check("log-prob noise in bf16", rms, b.config.ppo.clip_range, words)


CHECKS: tuple[Callable[[Bench], Check], ...] = (
    ratio, first_kl, reference, cache, padding_side, batch_size, microbatch, score_padding, eos, bf16,
)  # fmt: skip


# ---- tools ----------------------------------------------------------------------------------------------------------


def padded(b: Bench, left: int, right: int) -> Rollout:
    """The same answers in wider tensors; EOS stands in the padding, so that only masks can tell."""
    stop = b.loaded.template.stop_token_id(b.loaded.tokenizer)
    wide: dict[str, Any] = {}
    for name, x in b.rollout.tensors().items():
        if x.ndim == 2:
            sides = (left, 0) if name in ("prompts", "prompt_mask") else (0, right)
            wide[name] = F.pad(x, sides, value=stop if name in ("prompts", "responses") else 0)
    return replace(b.rollout, **wide)


class Recorder:
    """In the place of an optimizer: a step keeps the gradients."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.parameters = list({id(p): p for m in models for p in m.parameters() if p.requires_grad}.values())
        self.seen: list[Tensor] = []

    def step(self) -> None:
        """Instead of moving."""
        self.seen = [p.grad.flatten().double() for p in self.parameters if p.grad is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As optimizers do."""
        for p in self.parameters:
            p.grad = None


def gradient(b: Bench, size: int) -> Tensor:
    """Of one optimizer step of PPO over all answers, in microbatches of `size`."""
    recorder: Any = Recorder([m for m in (b.roles.policy, b.roles.value_model) if m])
    plans = [[list(torch.arange(ANSWERS).split(size))]]
    ppo_iteration(
        b.roles.policy, b.roles.value_model, recorder, b.rollout, torch.linspace(-1, 1, ANSWERS), plans, b.config.ppo,
        kl_coef=b.config.ppo.kl_coef, temperature=b.config.sample.temperature, max_grad_norm=math.inf,
    )  # fmt: skip
    return torch.cat(recorder.seen)


def table(checks: Sequence[Check]) -> str:
    """A line per check."""
    lines = [f"{'check':<38}{'figure':>10}{'limit':>10}  verdict  what"]
    for c in checks:
        verdict = "pass" if c.passed else "FAIL"
        lines.append(f"{c.name:<38}{c.figure:>10.3g}{c.limit:>10.3g}  {verdict:<7}  {c.words}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line on stderr and its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(PPOConfig, "-m minirlhf.selfcheck"))  # noqa: T201
        return 0
    config: Any = None
    try:
        config = load_config(PPOConfig, argv)
        prepare_torch(config)
        if config.reward.fn == "human":
            raise UsageError("reward.fn human: a self-check asks nobody; leave it out, or give a reward.path")
        roles, loaded, _ = stage.ppo_roles(config)
        bench = prepare(config, roles, loaded)
        checks = [check(bench) for check in CHECKS]
    except (UserError, NonFiniteError) as e:
        return complain(e, e.exit_code, config)
    except OSError as e:
        return complain(e, 4, config)
    print(table(checks))  # noqa: T201
    failed = [c.name for c in checks if not c.passed]
    print(f"{len(checks) - len(failed)} of {len(checks)} passed" + (f"; failed: {', '.join(failed)}" if failed else ""))  # noqa: T201
    return NonFiniteError.exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
