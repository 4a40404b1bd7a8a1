"""One interface over three ways to train on W ranks, `--run.engine none | mini | torch`, put on the models of a script.

`none`: plain data parallelism, every rank holds everything. `mini`: `fsdp.py`, made to be read. `torch`: PyTorch's own
`fully_shard` (Zhao et al. 2023, arXiv 2304.11277), made for production. Losses are sums over a rank's rows divided by
the count of all rows, so gradients add up over ranks. Parameters, moments and reductions are fp32.

What goes wrong: an optimizer made before the engine holds tensors that nobody trains; the engine comes first.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from minirlhf import dist
from minirlhf.errors import CheckpointError
from minirlhf.fsdp import Pick, shard, with_gradients

Tensors = dict[str, dict[str, Tensor]]  # group → name → whole tensor
MOMENTS = ("exp_avg", "exp_avg_sq", "ema")  # of AdamW, and the mean of the weights where one is kept


class Replicated:
    """Where memory is no matter, this is all: the same weights everywhere, gradients added."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def clip(self, max_norm: float) -> Tensor:  # () the norm before
        """Add gradients over ranks, 2·4·P·(W-1)/W bytes each, then scale them to a joint 2-norm of at most max_norm."""
        trained = with_gradients(self.model)
        for p in trained:
            p.grad = dist.all_sum(p.grad)  # type: ignore[arg-type]
        return nn.utils.clip_grad_norm_(trained, max_norm)

    def gathered(self) -> nullcontext:
        """The weights are whole at any time."""
        return nullcontext()

    def full(self, pick: Pick) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of all that `pick` chooses."""
        return ((name, x) for name, p in self.model.named_parameters() if (x := pick(p)) is not None)

    def put(self, pick: Pick, tensors: Mapping[str, Tensor]) -> None:
        """The way back: whole tensors, by name, into what `pick` chooses."""
        for name, p in self.model.named_parameters():
            if name in tensors and (x := pick(p)) is not None:
                x.copy_(tensors[name])


class TorchSharded(Replicated):
    """PyTorch's `fully_shard` on every block and on the model; what a block gathers in bf16 is a part by itself."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype | None) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        super().__init__(model)
        self._whole = False  # inside `gathered()`
        dist.start(device, alone=True)
        mesh = init_device_mesh(device.split(":")[0], (dist.world_size(),))
        low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.trunk.blocks if owns_trunk(model) else ():
            if dtype is not None:
                fully_shard([m for m in block.modules() if isinstance(m, nn.Linear)], mesh=mesh, mp_policy=low)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if hasattr(model, "hidden"):
            register_fsdp_forward_method(model, "hidden")
        for part in self._parts():
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)  # add, not average

    def _parts(self) -> list[Any]:
        from torch.distributed.fsdp import FSDPModule

        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]

    def clip(self, max_norm: float) -> Tensor:  # () the norm before
        """The reduction has happened in the backward pass."""
        norm: Any = nn.utils.clip_grad_norm_(with_gradients(self.model), max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @contextmanager
    def gathered(self) -> Iterator[None]:  # type: ignore[override]
        """Whole weights for a while, without gradients."""
        if self._whole:
            yield
            return
        self._whole = True
        for part in self._parts():
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            with torch.no_grad():
                yield
        finally:
            self._whole = False
            for part in self._parts():
                part.set_reshard_after_forward(part is not self.model, recurse=False)
                part.reshard()

    def full(self, pick: Pick) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of all that `pick` chooses, one at a time. Every rank must go through all."""
        found: Iterator[tuple[str, Any]] = super().full(pick)
        return ((name, x.detach().full_tensor()) for name, x in found)

    def put(self, pick: Pick, tensors: Mapping[str, Tensor]) -> None:
        """The way back: this rank's part of whole tensors."""
        from torch.distributed.tensor import distribute_tensor

        for name, p in self.model.named_parameters():
            x: Any = pick(p) if name in tensors else None
            if x is not None:
                whole = tensors[name].to(x.device)
                x.copy_(distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None))


class Engine:
    """The models of a script, all under one engine."""

    def __init__(self, run: Any, models: Sequence[Any]) -> None:  # run: the section `run` of a configuration
        models = [m for m in models if m is not None]
        own = [m for m in models if owns_trunk(m)]
        self.device, self.low = run.device, run.dtype == "bf16"
        dtype = torch.bfloat16 if self.low else None
        self.skeletons = {m: skeleton(m) for m in models} if run.engine != "none" else {}
        self.shapes = {m: {name: p.shape for name, p in m.named_parameters() if p.requires_grad} for m in models}
        self.of: dict[Any, Any] = {m: Replicated(m) for m in models}
        if run.engine == "mini":
            kept = run.checkpoint_activations
            self.of |= zip(own, shard(own, device=run.device, dtype=dtype, checkpoint=kept), strict=True)
        else:
            for m in own:
                m.trunk.checkpoint = run.checkpoint_activations
            if run.engine == "torch":
                self.of = {m: TorchSharded(m, run.device, dtype) for m in models}
        for m in models:
            if type(self.of[m]) is Replicated:
                m.to(run.device)

    def precision(self) -> torch.autocast:
        """bf16 for matrix products when asked for; weights, norms and losses stay fp32."""
        kind = self.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=self.low, cache_enabled=False)  # steps change weights

    @contextmanager
    def gathered(self, *models: Any) -> Iterator[None]:
        """These models whole, for forwards without gradients, as many as each rank likes."""
        with ExitStack() as stack:
            stack.enter_context(self.precision())
            stack.enter_context(torch.no_grad())
            for model in models:
                for one in (model, getattr(model, "policy", None)):
                    if one in self.of:
                        stack.enter_context(self.of[one].gathered())
            yield

    def whole_in(self, model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs while a model is gathered."""

        def run(*args: Any) -> Any:
            with self.gathered(model):
                return function(*args)

        return run

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:  # () the norm before
        """Add a model's gradients over ranks and scale them to a 2-norm of at most max_norm."""
        return self.of[model].clip(max_norm)

    def state(self, trained: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Tensors:
        """Whole weights and moments on rank 0, gathered a block at a time; elsewhere the names of groups alone."""
        out: Tensors = {role: {} for role in (*trained, "optimizer")}
        for role, model in trained.items():
            out[role] |= self.picked(model, trainable)
            for kind in MOMENTS:
                found = self.picked(model, moment(optimizer, kind))
                out["optimizer"] |= {f"{role}.{name}.{kind}": x for name, x in found.items()}
            steps = {name: optimizer.state.get(p, {}).get("step") for name, p in model.named_parameters()}
            out["optimizer"] |= {f"{role}.{name}.step": x for name, x in steps.items() if x is not None}
        return out

    @torch.no_grad()
    def load(self, trained: Mapping[str, Any], optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
        """Put the tensors of `state` back, whatever the number of ranks was."""
        moments = tensors["optimizer"]
        for role, model in trained.items():
            here, there = self.shapes[model], {name: x.shape for name, x in tensors[role].items()}
            if here != there:
                differ = sorted({name for name, _ in here.items() ^ there.items()})
                raise CheckpointError(
                    f"checkpoint and {role} differ in {', '.join(differ[:5])}; is it another model now?"
                )
            self.of[model].put(trainable, tensors[role])
            for name, p in model.named_parameters():
                if f"{role}.{name}.step" in moments:
                    blank = {kind: torch.zeros_like(p) for kind in MOMENTS if f"{role}.{name}.{kind}" in moments}
                    optimizer.state[p] = {"step": moments[f"{role}.{name}.step"].to(p.device, copy=True), **blank}
            for kind in MOMENTS:
                found = {name: moments[key] for name in here if (key := f"{role}.{name}.{kind}") in moments}
                self.of[model].put(moment(optimizer, kind), found)

    def whole(self, model: Any) -> Any:
        """The model with all its weights, to be saved by rank 0; gathered a block at a time into its memory."""
        if model not in self.skeletons:
            return model
        found = self.picked(model, lambda p: p)
        bare = self.skeletons[model]
        filled = {id(p): nn.Parameter(found[name], p.requires_grad) for name, p in bare.named_parameters() if found}
        double = copy.deepcopy(bare, filled)
        if not owns_trunk(model):
            double._policy = (self.whole(model.policy),)
        return double

    def picked(self, model: Any, pick: Pick) -> dict[str, Tensor]:
        """Name → whole tensor on rank 0 of all that `pick` chooses; elsewhere nothing."""
        found = {}
        for name, x in self.of[model].full(pick):
            if dist.rank() == 0:
                found[name] = x.detach().cpu()
        return found


def owns_trunk(model: nn.Module) -> bool:
    """Not so a shared critic, which reads the trunk of the policy."""
    return "trunk" in model._modules


def trainable(p: nn.Parameter) -> Tensor | None:
    """A parameter that is trained."""
    return p if p.requires_grad else None


def moment(optimizer: torch.optim.Optimizer, kind: str) -> Pick:
    """What AdamW keeps of a parameter."""
    return lambda p: optimizer.state.get(p, {}).get(kind)


def skeleton(model: Any) -> Any:
    """A double without numbers."""
    parameters = chain(model.parameters(), () if owns_trunk(model) else model.policy.parameters())
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in parameters})
