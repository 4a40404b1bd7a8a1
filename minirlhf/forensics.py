"""When a number is NaN or infinite: the step is skipped, and after three in a row the run ends and shows why.

`forensics/step_XXXXXXXX/report.json` says which tensor, which module's output was the first, the last five lines of the
log and the texts; `state/` beside it holds weights and moments as they were before that step. In PPO the rollout is
kept as well, so that `python -m minirlhf.ledger RUN --step N --replay` does the step again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minirlhf import checkpoint, dist
from minirlhf.errors import NonFiniteError
from minirlhf.rollout import Rollout, save_rollout
from minirlhf.run import Run, Snapshot, write_json
from minirlhf.tokenizer import Tokenizer

IN_A_ROW = 3
RECENT = 5  # lines of the log
TEXTS = 64  # answers


class Guard:
    """Counts the steps that were skipped in a row; the count is part of a checkpoint's state."""

    def __init__(self, run: Run, roles: dict[str, Any], snapshot: Snapshot, skipped: int = 0) -> None:
        self.run, self.snapshot, self.skipped = run, snapshot, skipped
        self.models = {role: model for role, model in roles.items() if isinstance(model, nn.Module)}
        self.seen: tuple[Rollout, Tokenizer, dict[str, Any]] | None = None  # how far the step has come
        self.before: tuple[checkpoint.Tensors, dict[str, Any]] | None = None

    @contextmanager
    def step(self, step: int, again: Callable[[], object]) -> Iterator[None]:
        """Around the numbers of a step: an error of theirs skips it on all ranks, or ends the run.

        `again` runs the models of the step once more, to find the module.
        """
        self.seen = None
        if self.skipped == IN_A_ROW - 1:
            tensors, state = self.snapshot()
            copies = {g: {n: x.detach().clone() for n, x in named.items()} for g, named in tensors.items()}
            self.before = copies, state
        try:
            yield
            self.skipped, self.before = 0, None
        except NonFiniteError as e:
            self.skipped += 1
            for model in self.models.values():
                model.zero_grad(set_to_none=True)
            self.run.say(f"step {step} skipped: {e}")
            if self.skipped == IN_A_ROW:
                where = first_bad_module(self.models, again)
                raise NonFiniteError(
                    f"step {step}: {e}; {where}; {IN_A_ROW} steps in a row: see {self.dump(step, str(e), where)}"
                ) from e

    def check_weights(self) -> None:
        """After the last step: raises NonFiniteError on all ranks where a weight is NaN or infinite."""
        bad = [
            f"{role}.{name}"
            for role, model in self.models.items()
            for name, p in model.named_parameters()
            if not (p.to_local() if hasattr(p, "to_local") else p).detach().isfinite().all()
        ]
        if dist.all_max(torch.tensor(len(bad))):
            name = bad[0] if bad else "a weight of another rank"
            raise NonFiniteError(f"{name} is NaN or infinite after the last step; lower optim.lr, raise optim.eps")

    def saw(self, rollout: Rollout, tokenizer: Tokenizer, state: dict[str, Any]) -> None:
        """What the step works on, and the numbers that its update needs besides."""
        self.seen = rollout, tokenizer, state

    @property
    def metrics(self) -> dict[str, int]:
        """For the log, where there is something to say."""
        return {"skipped": self.skipped} if self.skipped else {}

    def dump(self, step: int, what: str, where: str) -> str:
        """The report of a step and its state before; the report's path."""
        folder = self.run.folder / f"forensics/step_{step:08d}"
        path = folder / "report.json"
        assert self.before is not None
        tensors, state = self.before
        if dist.rank() != 0:
            return str(path)
        folder.mkdir(parents=True, exist_ok=True)
        recent = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in self.run.history[-RECENT:]]
        report: dict[str, Any] = {"step": step, "what": what, "where": where, "recent": recent}
        if self.seen is not None:
            rollout, tokenizer, numbers = self.seen
            place = self.run.folder / f"rollouts/step_{step:08d}.safetensors"
            save_rollout(place, rollout, state | numbers, tensors)
            report["replay"] = f"python -m minirlhf.ledger {self.run.folder} --step {step} --replay"
            report["answers"] = answers_of(rollout, tokenizer)
        else:
            checkpoint.save(folder / "state", step - 1, tensors, state, keep=1)
            report["replay"] = f"{folder}/state is the checkpoint before this step; seed and step give the same data"
        write_json(path, report)
        return str(path)


def answers_of(rollout: Rollout, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The texts, with what is known of each; null where a score is no number."""
    texts = zip(*rollout.texts(tokenizer), rollout.lengths.tolist(), rollout.scores.tolist(), strict=True)
    return [
        {"prompt": prompt, "response": response, "length": n, "score": score if math.isfinite(score) else None}
        for prompt, response, n, score in list(texts)[:TEXTS]
    ]


@torch.no_grad()
def first_bad_module(models: dict[str, nn.Module], run_again: Callable[[], object]) -> str:
    """The first module whose output is not finite when the models run once more; hooks see the innermost first."""
    found: list[str] = []

    def watch(role: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, out: object) -> None:
            if isinstance(out, Tensor) and out.is_floating_point() and not torch.isfinite(out).all():
                found.append(f"{role}.{name}" if name else role)

        return hook

    handles = [
        module.register_forward_hook(watch(role, name))
        for role, model in models.items()
        for name, module in model.named_modules()
    ]
    try:
        run_again()
    except NonFiniteError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return f"first in the output of {found[0]}" if found else "every module's output is finite"
