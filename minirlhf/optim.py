"""AdamW's parameter groups, learning-rate schedules and gradient clipping."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Named = Iterable[tuple[str, nn.Parameter]]


def parameter_groups(named: Named, weight_decay: float) -> list[dict]:
    """Decay for matrices, none for vectors (biases, norms); frozen and repeated parameters are left out."""
    unique = {id(p): p for _, p in named if p.requires_grad}.values()
    matrices, vectors = [p for p in unique if p.ndim >= 2], [p for p in unique if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(named: Named, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), lr·m̂/(√v̂ + eps)."""
    return torch.optim.AdamW(parameter_groups(named, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def lr_factor(
    step: int,  # s, from 1
    *,
    kind: str,  # "constant" | "linear" | "cosine"
    warmup: int,  # w
    total: int,  # N
    final: float = 0.0,  # share of the peak at s = N
) -> float:
    """Warm-up s/w, then f = (N-s)/(N-w) or ½(1 + cos π(s-w)/(N-w)), scaled to end at `final`."""
    if step < warmup:
        return step / warmup
    if kind == "constant" or total <= warmup:
        return 1.0
    progress = min(1.0, (step - warmup) / (total - warmup))
    f = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final + (1.0 - final) * f


def keep_mean(optimizer: torch.optim.Optimizer, model: nn.Module, decay: float) -> None:
    """From now on a third moment of the model's trained weights, "ema", θ̄ ← d θ̄ + (1 - d) θ after every step; it begins
    as the weights after the first (Polyak, Juditsky 1992; for PPO's policy Ouyang et al. 2022, d = 0.992). d = 0: none.
    """
    if not decay:
        return

    @torch.no_grad()
    def update(*_: object) -> None:
        for p in model.parameters():
            if p.grad is not None:
                optimizer.state[p].setdefault("ema", p.detach().clone()).lerp_(p, 1 - decay)

    optimizer.register_step_post_hook(update)


@contextmanager
def some_layers(blocks: nn.ModuleList, n: int, rng: torch.Generator) -> Iterator[None]:
    """LISA (Pan et al. 2024, arXiv 2403.17919, algorithm 1): n blocks, drawn without replacement, and all that is in
    no block (embeddings, last norm, head) get gradients; the other blocks get none, so that AdamW passes them over.
    Blocks that are frozen altogether are not drawn."""
    able = [p for p in ([p for p in block.parameters() if p.requires_grad] for block in blocks) if p]
    idle = [p for i in torch.randperm(len(able), generator=rng)[n:].tolist() for p in able[i]]
    for p in idle:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in idle:
            p.requires_grad_(True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_model(model: nn.Module, max_norm: float) -> Tensor:  # () the norm before
    """In one process: scale a model's gradients so that their joint 2-norm is at most max_norm."""
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm)
