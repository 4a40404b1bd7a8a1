"""One answer of a saved rollout, token by token, and what its columns add up to; the update of that rollout again.

    python -m minirlhf.ledger runs/ppo --step 3 --episode 5
    python -m minirlhf.ledger runs/ppo --step 3 --replay                         every number again, bit for bit
    python -m minirlhf.ledger runs/ppo --step 3 --replay --ppo.clip_range 0.1    what another setting would have done

A run keeps rollouts where `ppo.save_rollouts` says so, each with the weights its update began from. Ratio, clipped and
the losses are means over the passes of the update. The models of the run's configuration must still be in place.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirlhf import stage
from minirlhf.checkpoint import read_tensors
from minirlhf.config import PPOConfig, load_config
from minirlhf.engine import Engine
from minirlhf.errors import CheckpointError, NonFiniteError, UsageError, tool
from minirlhf.log import read_lines
from minirlhf.loss import value_loss
from minirlhf.ops import kl_estimate
from minirlhf.page import spelled
from minirlhf.ppo import epoch_plans, ppo_iteration, rollout_metrics, score_answers, score_moments, surrogate
from minirlhf.ptx import Corpus
from minirlhf.reward import shape_rewards
from minirlhf.rollout import Rollout, load_rollout
from minirlhf.run import prepare_torch

COLUMNS = ("logprob", "ref", "kl", "reward", "value", "delta", "advantage", "return", "ratio", "clipped")
SUMS = (  # metric of metrics.jsonl, its column, sign, what the sum is divided by
    ("response/length_mean", "answer", 1, "episodes"),
    ("objective/entropy", "logprob", -1, "episodes"),
    ("objective/kl", "kl", 1, "episodes"),
    ("objective/rlhf_reward", "reward", 1, "episodes"),
    ("val/ratio", "ratio", 1, "tokens"),
    ("policy/clipfrac_avg", "clipped", 1, "tokens"),
    ("policy/approxkl_avg", "new_kl", 1, "tokens"),
    ("loss/policy_avg", "policy_loss", 1, "tokens"),
    ("loss/value_avg", "value_loss", 1, "states"),
)


@dataclass(frozen=True)
class Replay:
    """An update done again."""

    rollout: Rollout
    columns: dict[str, Tensor]  # name → (B, R) fp64, 0 where it does not apply
    scores: Tensor  # (B,) as they entered the rewards
    metrics: dict[str, float]
    weights: dict[str, dict[str, Tensor]]  # after it, as `save_rollout` takes them
    tokenizer: Any


class Columns:
    """What the update says of every token, summed over its passes."""

    def __init__(self, rollout: Rollout, options: Any) -> None:
        self.rollout, self.options = rollout, options
        self.fitted = rollout.value_mask if options.value_at_end else rollout.action_mask
        self.sums: dict[str, Tensor] = {}
        self.passes = torch.zeros(len(rollout), 1, dtype=torch.float64)

    def __call__(self, index: Tensor, logprobs: Tensor, values: Tensor | None, A: Tensor, returns: Tensor) -> None:
        """A microbatch: (b,) and (b, R) each; values are None without a critic."""
        o, part, R = self.options, self.rollout.rows(index), logprobs.shape[1]
        old, actions = part.old_logprobs, self.rollout.action_mask
        near = o.value_clip_range or None
        loss, clipped = surrogate(logprobs, old, A, actions[index, :R], o)
        self.passes[index] += 1
        critic: list[tuple[str, Tensor, Tensor]] = []
        if values is not None:
            critic = [("value_loss", value_loss(values, part.values, returns, clip_range=near), self.fitted)]
        for name, x, mask in (
            *critic,
            ("advantage", A, actions),
            ("return", returns, self.rollout.value_mask),
            ("ratio", (logprobs - old).exp(), actions),
            ("clipped", clipped, actions),
            ("new_kl", kl_estimate(old, logprobs, "k3"), actions),
            ("policy_loss", loss, actions),
        ):
            total = self.sums.setdefault(name, torch.zeros(actions.shape, dtype=torch.float64))
            total[index, :R] += torch.where(mask[index, :R], x.double(), 0.0)

    def means(self) -> dict[str, Tensor]:  # (B, R) each
        """Over the passes."""
        return {name: x / self.passes for name, x in self.sums.items()} | {"fitted": self.fitted.double()}


def replay(config: Any, path: Path, changed: Sequence[str]) -> Replay:
    """The update of a saved rollout, from the weights it began from; `changed` names settings that the run had not."""
    c, o, p = config, config.optim, config.ppo
    rollout, state, tensors = load_rollout(path)
    if rollout.score_at != p.score_at:
        raise UsageError(
            f"ppo.score_at {p.score_at}: {path} was drawn with {rollout.score_at}, which cannot be changed"
        )
    step = state["step"]
    roles, loaded, _ = stage.ppo_roles(c)
    engine = Engine(c.run, [roles.policy, roles.value_model])
    trained, optimizer = stage.ppo_optimizer(roles, c)
    if missing := trained.keys() - tensors.keys():
        raise UsageError(f"ppo.advantage {p.advantage}: {path} was drawn without a {' and '.join(missing)}")
    stage.set_scheduled_lr(optimizer, c, step)
    engine.load(trained, optimizer, tensors)

    if "ppo.score_norm" in changed:
        state |= score_moments(rollout.scores, p.score_norm)
    beta = p.kl_coef if "ppo.kl_coef" in changed else state["kl_coef"]
    scores = score_answers(rollout.scores, rollout.has_eos, p, state["shift"], state["scale"])
    columns = Columns(rollout, p)
    corpus = Corpus(c, stage.unheard(), loaded, engine)
    metrics = rollout_metrics(rollout) | ppo_iteration(
        roles.policy, roles.value_model, optimizer, rollout, scores,
        epoch_plans(rollout.total_lengths, p, c.run.seed, step), p, kl_coef=beta, temperature=c.sample.temperature,
        max_grad_norm=o.max_grad_norm, longest=c.sample.max_new_tokens, impl=c.run.impl, clip=engine.clip,
        precision=engine.precision, ptx=corpus.beside(step), watch=columns,
    )  # fmt: skip
    both = columns.means() | rollout_columns(rollout, scores, beta, p)
    return Replay(rollout, both, scores, metrics, engine.state(trained, optimizer), loaded.tokenizer)


def rollout_columns(rollout: Rollout, scores: Tensor, beta: float, options: Any) -> dict[str, Tensor]:  # (B, R) each
    """What is known before the update. δ_t = r_t + γ V_{t+1} - V_t is of the rewards as they are, before whitening."""
    actions, states = rollout.action_mask, rollout.value_mask
    old, ref, values = (x.double() for x in (rollout.old_logprobs, rollout.ref_logprobs, rollout.values))
    rewards = shape_rewards(
        scores.double(), old, ref, actions, kl_coef=beta if options.kl_in == "reward" else 0.0, kl=options.kl,
        score_at=options.score_at,
    )  # (B, R)  # fmt: skip
    values = torch.where(states, values, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = torch.where(states, rewards + options.gamma * after - values, 0.0)
    kept = {
        "mask": actions,
        "answer": rollout.response_mask,
        "logprob": old,
        "ref": ref,
        "kl": kl_estimate(old, ref, "k1"),
    }
    found = {name: torch.where(actions, x.double(), 0.0) for name, x in kept.items()}
    return found | {"reward": rewards, "value": values, "delta": delta}


# ---- what is printed ------------------------------------------------------------------------------------------------


def episode_table(r: Replay, episode: int) -> str:
    """A line per token, padding left out, and the sums."""
    prompts, responses = r.rollout.texts(r.tokenizer)
    raw, used = float(r.rollout.scores[episode]), float(r.scores[episode])
    lines = [f"prompt    {spelled(prompts[episode])}", f"response  {spelled(responses[episode])}",
             f"score     {raw:.6f}, as it enters the rewards {used:.6f}", "",
             f"{'t':>3} {'token':<14}{'mask':>5}" + "".join(f"{name:>11}" for name in COLUMNS)]  # fmt: skip
    own = {name: x[episode].tolist() for name, x in r.columns.items()}
    states = r.rollout.value_mask[episode].tolist()
    for t in range(sum(states)):
        token = token_text(r.tokenizer, int(r.rollout.responses[episode, t]))
        mask = int(own["mask"][t])
        cells = "".join(f"{own[name][t]:>11.5f}" if mask else f"{_state(own, name, t):>11}" for name in COLUMNS)
        lines.append(f"{t:>3} {token[:13]:<14}{mask:>5}{cells}")
    total = "".join(f"{math.fsum(own[name]):>11.5f}" for name in COLUMNS)
    return "\n".join([*lines, f"{'':>3} {'sum':<14}{int(sum(own['mask'])):>5}{total}"])


def token_text(tokenizer: Any, token: int) -> str:
    """Its text; of a special token, its name."""
    return spelled(tokenizer.decode([token]) or tokenizer.id_to_token(token) or "")


def _state(own: dict[str, list[float]], name: str, t: int) -> str:
    """The state after an answer has a value, no action."""
    return f"{own[name][t]:.5f}" if name in ("reward", "value", "delta", "return") else ""


def sums(r: Replay, logged: dict[str, Any]) -> list[tuple[str, str, float, int, float, float | None]]:
    """Metric, column, Σ over every episode, its divisor, the quotient, what was logged."""
    o = r.rollout
    divisors = {"episodes": len(o), "tokens": int(o.action_mask.sum()), "states": int(r.columns["fitted"].sum())}
    rows = []
    for metric, column, sign, per in SUMS:
        if column not in r.columns:  # no critic
            continue
        total = sign * math.fsum(r.columns[column].flatten().tolist())
        rows.append((metric, column, total, divisors[per], total / divisors[per], logged.get(metric)))
    total = math.fsum(o.scores.double().tolist())
    return [*rows, ("objective/scores", "score", total, len(o), total / len(o), logged.get("objective/scores"))]


def sums_table(r: Replay, logged: dict[str, Any]) -> str:
    """How the columns of all episodes give the scalars of the log."""
    lines = [f"{'metric':<24}{'column':<13}{'sum of all':>16}{'/':>8}{'=':>14}{'logged':>14}"]
    for metric, column, total, n, mean, log in sums(r, logged):
        said = "not logged" if log is None else f"{log:.8f}"
        lines.append(f"{metric:<24}{column:<13}{total:>16.8f}{n:>8}{mean:>14.8f}{said:>14}")
    return "\n".join(lines)


def replay_table(r: Replay, logged: dict[str, Any]) -> str:
    """Every metric of the update beside what the run logged."""
    lines = [f"{'metric':<28}{'logged':>20}{'replayed':>20}"]
    for name, value in r.metrics.items():
        if name in logged:
            log = logged[name] if logged[name] is not None else math.nan
            lines.append(f"{name:<28}{log:>20.12g}{value:>20.12g}" + ("" if equal(log, value) else "   differs"))
    return "\n".join(lines)


def equal(logged: float | None, value: float) -> bool:
    """The log writes null for what is no number."""
    return logged == value or (not math.isfinite(value) and (logged is None or not math.isfinite(logged)))


def differences(run: Path, step: int, r: Replay, logged: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What was compared with the run's own, and what of it differs in any bit."""
    compared = [f"metric {name}" for name in r.metrics if name in logged]
    wrong = [f"metric {name}" for name, value in r.metrics.items() if name in logged and not equal(logged[name], value)]
    after, following = None, run / f"rollouts/step_{step + 1:08d}.safetensors"
    folder = run / f"checkpoints/step_{step:08d}"
    if folder.is_dir():
        after, source = {group: read_tensors(folder / f"{group}.safetensors") for group in r.weights}, folder
    elif following.is_file():
        after, source = load_rollout(following)[2], following
    if after is not None:
        for group, named in r.weights.items():
            for name, x in named.items():
                compared.append(f"{source.name}: {group}.{name}")
                if name not in after[group] or not torch.equal(after[group][name].cpu(), x.detach().cpu()):
                    wrong.append(compared[-1])
    return compared, wrong


# ---- command line ---------------------------------------------------------------------------------------------------


def find(run: Path, step: int) -> Path:
    """The file of a step's rollout."""
    path = run / f"rollouts/step_{step:08d}.safetensors"
    if not path.is_file():
        kept = [str(int(p.stem.removeprefix("step_"))) for p in sorted((run / "rollouts").glob("step_*.safetensors"))]
        have = f"it has steps {', '.join(kept)}" if kept else "train with --ppo.save_rollouts N"
        raise CheckpointError(f"{run}: holds no rollout of step {step}; {have}")
    return path


def show(args: argparse.Namespace, settings: list[str]) -> int:
    """Replay, print, compare."""
    run = Path(args.run)
    path = find(run, args.step)
    if settings and not args.replay:
        raise UsageError(f"{settings[0]}: settings can be changed with --replay alone")
    config = load_config(PPOConfig, [str(run / "config.json"), *settings])
    changed = [word[2:].partition("=")[0] for word in settings if word.startswith("--")]
    prepare_torch(config)
    r = replay(config, path, changed)
    logged = next((line for line in read_lines(run / "metrics.jsonl") if line["step"] == args.step), {})
    if not args.replay:
        if not 0 <= args.episode < len(r.rollout):
            raise UsageError(f"--episode {args.episode}: the rollout has episodes 0 to {len(r.rollout) - 1}")
        print(f"{episode_table(r, args.episode)}\n\n{sums_table(r, logged)}")  # noqa: T201
        return 0
    print(replay_table(r, logged))  # noqa: T201
    if changed:
        print(f"with {' '.join(settings)}")  # noqa: T201
        return 0
    compared, wrong = differences(run, args.step, r, logged)
    print(f"{len(compared) - len(wrong)} of {len(compared)} numbers and tensors equal in every bit")  # noqa: T201
    for name in wrong[:10]:
        print(f"differs: {name}")  # noqa: T201
    return NonFiniteError.exit_code if wrong else 0


@tool()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line on stderr and its exit code."""
    more = "further --section.key value: settings of train_ppo.py, with --replay"
    parser = argparse.ArgumentParser(prog="python -m minirlhf.ledger", allow_abbrev=False, epilog=more)
    parser.add_argument("run", metavar="RUN", help="folder of a run of train_ppo.py")
    parser.add_argument("--step", type=int, required=True, help="iteration whose rollout was saved")
    parser.add_argument("--episode", type=int, default=0, help="row of the rollout (default 0)")
    parser.add_argument("--replay", action="store_true", help="compare the update, done again, with the run's own")
    args, settings = parser.parse_known_args(argv)
    return show(args, settings)


if __name__ == "__main__":
    sys.exit(main())
