"""The loop of a supervised stage: losses in, an optimizer step, a line in the log."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from minirlhf.checkpoint import load_module, load_optimizer, module_tensors, optimizer_tensors
from minirlhf.errors import NonFiniteError
from minirlhf.optim import adamw, clip_grad_norm, lr_factor, set_lr
from minirlhf.run import Run

Losses = Callable[[int], Iterator[tuple[Tensor, int]]]  # step → the loss of each microbatch and its count of tokens


def fit(
    run: Run,
    model: nn.Module,
    losses: Losses,  # each already divided by the count of the whole optimizer step: their gradients add up
    validate: Callable[[], dict[str, float]],
    *,
    eval_every: int,  # steps; 0: ten times in a run
    words: Sequence[str],  # metrics of the terminal's line
) -> dict[str, float]:
    """Take run.steps optimizer steps of AdamW, from the newest checkpoint when the run is resumed; returns what
    `validate` said last."""
    o, steps = run.config.optim, run.config.run.steps
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = adamw(named, lr=o.lr, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps)
    found: dict[str, float] = {}
    start, tensors, _ = run.restore() or (0, {}, {})
    if tensors:
        load_module(model, tensors["model"])
        load_optimizer(optimizer, named, tensors["optimizer"])

    def snapshot() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return {"model": module_tensors(model), "optimizer": optimizer_tensors(optimizer, named)}, {}

    for step in run.steps(start, snapshot):
        began, loss, tokens = time.perf_counter(), 0.0, 0
        model.train()
        for part, n in losses(step):
            part.backward()
            loss, tokens = loss + float(part.detach()), tokens + n
        norm = float(clip_grad_norm([p for _, p in named], o.max_grad_norm))
        if norm - norm != 0:
            raise NonFiniteError(f"step {step}: the gradient is NaN or infinite; lower optim.lr")
        lr = o.lr * lr_factor(step, kind=o.schedule, warmup=o.warmup_steps, total=steps, final=o.final_lr)
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        metrics = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": tokens / seconds, "time/step_s": seconds}
        if step % (eval_every or max(1, steps // 10)) == 0 or step == steps:
            model.eval()
            found = validate()
            metrics |= found
        run.log(step, metrics, words)
    model.eval()
    return found
