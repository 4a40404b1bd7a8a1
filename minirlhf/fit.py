"""The loop of a supervised stage: losses in, an optimizer step, a line in the log."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from minirlhf import dist, stage
from minirlhf.engine import Engine, Tensors
from minirlhf.errors import NonFiniteError
from minirlhf.forensics import Guard
from minirlhf.optim import adamw
from minirlhf.run import Run

Losses = Callable[[int], Iterator[tuple[Tensor, int]]]  # step → loss and tokens of each microbatch of this rank


def fit(
    run: Run,
    engine: Engine,
    model: nn.Module,
    losses: Losses,  # each already divided by the count of the whole optimizer step: their gradients add up
    validate: Callable[[], dict[str, float]],
    *,
    eval_every: int,  # steps; 0: ten times in a run
    words: Sequence[str],  # metrics of the terminal's line
    learning: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext(),  # around its backward
) -> dict[str, float]:
    """Take run.steps optimizer steps of AdamW, from the newest checkpoint when the run is resumed; returns what
    `validate` said last."""
    o, steps = run.config.optim, run.config.run.steps
    optimizer = adamw(model.named_parameters(), lr=o.lr, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps)
    found: dict[str, float] = {}
    start, tensors, state = run.restore() or (0, {}, {})
    if tensors:
        engine.load({"model": model}, optimizer, tensors)

    def snapshot() -> tuple[Tensors, dict[str, Any]]:
        return engine.state({"model": model}, optimizer), {"skipped": guard.skipped}

    guard = Guard(run, {"model": model}, snapshot, state.get("skipped", 0))

    for step in run.steps(start, snapshot):
        began, loss, tokens = time.perf_counter(), 0.0, 0
        model.train()
        with learning(step):
            for part, n in losses(step):
                part.backward()
                loss, tokens = loss + float(part.detach()), tokens + n
            norm = float(engine.clip(model, o.max_grad_norm))
        loss, tokens = dist.all_sum(torch.tensor([loss, tokens], dtype=torch.float64)).tolist()
        lr = stage.set_scheduled_lr(optimizer, run.config, step)
        with guard.step(step, engine.whole_in(model, lambda: list(losses(step)))):  # noqa: B023
            if not math.isfinite(norm):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise NonFiniteError(f"the {what} is NaN or infinite; lower optim.lr")
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        metrics = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": tokens / seconds, "time/step_s": seconds}
        examined = step % (eval_every or max(1, steps // 10)) == 0 or step == steps
        if examined:
            model.eval()
            with engine.gathered(model):
                found = validate()
            metrics |= found
        run.log(step, metrics | guard.metrics, words, rare=examined)
    guard.check_weights()
    model.eval()
    return found
