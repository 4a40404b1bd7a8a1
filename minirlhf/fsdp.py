"""Fully sharded data parallelism by hand, put on a finished model (ZeRO-3, Rajbhandari et al. 2019, arXiv 1910.02054).

Each of W ranks holds 1/W of weights, gradients and moments. `engine.Replicated` is the plain version, the same from
outside. A *unit* is one block of the transformer; what is in no block is the root unit. A *group* is the parameters of
a unit that train alike and compute in one dtype, laid end to end and cut into W equal shards. A block is gathered right
before it runs and let go right after, in the forward pass and again in the backward pass; the root stays whole from
forward to the end of backward, since its embedding is often the head as well. While a unit runs, its parameters are
views of the gathered buffer, set as attributes of the modules they come from: the model does not know.

What goes wrong: autograd keeps the weights it multiplied with. Tensors that a block saves are therefore replaced by
their place in the buffer, found there again when the backward pass has gathered the block once more. And ranks must run
the same forwards and backwards in the same order, or they wait for each other until the timeout.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from minirlhf import dist

Pick = Callable[[nn.Parameter], Tensor | None]  # a parameter as the optimizer sees it → itself, or its moment
DONE: Any = SimpleNamespace(wait=lambda: None)  # of a collective with oneself
Places = dict[nn.Parameter, list[tuple[nn.Module, str]]]  # where a model keeps each parameter; several when tied


@dataclass
class Traffic:
    """What one rank received over the wire so far, and how much of all models is gathered."""

    gathers: int = 0  # calls
    gathered_bytes: int = 0
    reductions: int = 0  # calls
    reduced_bytes: int = 0
    live: int = 0  # gathered elements now
    peak: int = 0


class Group:
    """Parameters end to end, padded to W·n elements, of which a rank holds n.

    `parts` are what `model.parameters()` becomes: the stretch of each parameter that lies in this rank's shard, often
    empty. A part keeps the rank of the whole, (1, k) of a matrix and (k,) of a vector: "matrices decay" holds for both.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype, device: Any, traffic: Traffic) -> None:
        self.dtype, self.traffic, self.W = dtype, traffic, dist.world_size()
        self.trains, self.shapes = parameters[0].requires_grad, [p.shape for p in parameters]
        *starts, total = accumulate((p.numel() for p in parameters), initial=0)
        self.n = -(-total // self.W)
        self.sizes = [p.numel() for p in parameters] + [self.W * self.n - total]
        low = dist.rank() * self.n  # this rank's first element
        self.bounds = [min(max(x - low, 0), self.n) for x in (*starts, total)]  # of the parameters in the shard
        self.firsts = [max(low - x, 0) for x in starts]  # the element of each parameter where its part begins
        flat = torch.cat([p.detach().flatten() for p in parameters] + [parameters[0].new_zeros(self.sizes[-1])])
        self.shard = flat[low : low + self.n].to(device, copy=True)  # (n,)
        cut = zip(parameters, self.split(self.shard), strict=True)
        self.parts = [nn.Parameter(x[None] if p.ndim >= 2 else x, requires_grad=self.trains) for p, x in cut]
        self.grad = torch.empty(0)  # (n,) the storage of the parts' gradients
        self.fresh: Tensor | None = None  # (n,) of this backward pass alone, for autograd adds in this order

    def split(self, shard: Tensor) -> list[Tensor]:  # (n,) → (k,) of each parameter
        """The parts of a shard."""
        return [shard[a:b] for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    def views(self, flat: Tensor) -> list[Tensor]:  # (W·n,) → each parameter
        """Made by one `split`, whose backward is one `cat`."""
        return [x.view(shape) for x, shape in zip(flat.split(self.sizes), self.shapes, strict=False)]

    def gather(self, shard: Tensor) -> tuple[Tensor, Any]:  # (n,) of every rank → (W·n,)
        """Start an all-gather."""
        if self.W == 1:
            return shard.detach(), DONE
        flat = shard.new_empty(self.W * self.n)
        self.traffic.gathers += 1
        self.traffic.gathered_bytes += (self.W - 1) * shard.nbytes
        return flat, td.all_gather_single(flat, shard, async_op=True)

    def reduce(self, grad: Tensor) -> tuple[Tensor, Any]:  # (W·n,) → (n,) of the sum over ranks
        """Start a reduce-scatter, in the dtype of the master weights."""
        grad = grad.to(self.shard.dtype)
        if self.W == 1:
            return grad, DONE
        mine = grad.new_empty(self.n)
        self.traffic.reductions += 1
        self.traffic.reduced_bytes += (self.W - 1) * mine.nbytes
        return mine, td.reduce_scatter_single(mine, grad, async_op=True)

    def accumulate(self) -> None:
        """What a backward pass found becomes the parts' gradients, or is added to that of earlier microbatches."""
        fresh, self.fresh = self.fresh, None
        if fresh is not None and self.parts[0].grad is not None:
            self.grad.add_(fresh)
        elif fresh is not None:
            self.grad = fresh
            for part, x in zip(self.parts, self.split(fresh), strict=True):
                part.grad = x.view_as(part)


class Unit:
    """One block, or the root: its groups, and how it gets hold of them."""

    def __init__(self, owner: "Sharded", index: int, groups: list[Group], places: list[list[Any]]) -> None:
        self.owner, self.index, self.groups = owner, index, groups
        self.places = places  # per group, per parameter: [(module, attribute), ...]
        self.elements = sum(g.W * g.n for g in groups)
        self.anchor = torch.zeros((), requires_grad=True)  # what makes autograd visit `Gather`
        self.buffers: list[Tensor] | None = None  # per group; None: not gathered
        self.works: list[Any] = []
        self.in_graph = False  # the backward pass will come by
        self.forward: Callable[..., Any]
        self.idle = False  # inside `gathered`

    def fetch(self) -> None:
        """Start gathering, unless that is done."""
        if self.buffers is None:
            started = [group.gather(group.shard.to(group.dtype)) for group in self.groups]
            self.buffers, self.works = map(list, zip(*started, strict=True))
            traffic = self.owner.traffic
            traffic.live += self.elements
            traffic.peak = max(traffic.peak, traffic.live)

    def take(self) -> list[Tensor]:
        """The gathered buffers."""
        self.fetch()
        while self.works:
            self.works.pop().wait()
        assert self.buffers is not None
        return self.buffers

    def place(self) -> None:
        """Views of the buffers cover the parts in the modules; those that train hang on one `Gather`."""
        flats = self.take()
        if any(g.trains for g in self.groups):
            flats = Gather.apply(self, self.anchor)
        for group, flat, places in zip(self.groups, flats, self.places, strict=True):
            for view, where in zip(group.views(flat), places, strict=True):
                for module, attribute in where:
                    vars(module)[attribute] = view  # found before `module._parameters`

    def uncover(self) -> None:
        """The parts show again; using them as weights is an error of shapes."""
        for module, attribute in (place for group in self.places for where in group for place in where):
            vars(module).pop(attribute, None)

    def free(self) -> None:
        """Let the buffers go, also ones fetched in vain."""
        if self.buffers is not None:
            self.take()
            self.buffers = None
            self.owner.traffic.live -= self.elements

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's `forward` has become."""
        if self.owner.is_whole():
            return self.forward(*args, **kwargs)
        if self.owner.checkpoint:  # saves nothing of what happens inside, so needs no places
            return checkpoint(self.run, *args, use_reentrant=False, **kwargs)
        with saved_tensors_hooks(self.pack, self.unpack):
            return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Gather, start gathering the next block, run, let go."""
        again = torch._C._current_graph_task_id() >= 0  # activation checkpointing runs it in the backward pass
        if again:
            self.owner.backward_reaches(self)
        else:
            self.take()
            for following in self.owner.blocks[self.index + 1 : self.index + 2]:
                following.fetch()
        self.place()
        try:
            out = self.forward(*args, **kwargs)
            self.in_graph = isinstance(out, Tensor) and out.requires_grad
            return out
        finally:
            self.uncover()
            if not again:  # else the end of its backward does
                self.free()

    def pack(self, x: Tensor) -> Any:
        """A saved tensor → its place, if it lies in a buffer."""
        for i, flat in enumerate(self.buffers or ()):
            if x.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
                return i, x.size(), x.stride(), x.storage_offset()
        return x

    def unpack(self, saved: Any) -> Tensor:
        """A place → the tensor, in a buffer gathered again."""
        if isinstance(saved, Tensor):
            return saved
        self.owner.backward_reaches(self)
        return self.take()[saved[0]].as_strided(*saved[1:])


class Gather(torch.autograd.Function):
    """Forward: a unit's gathered groups. Backward: their gradients, once and complete, to the wire.

    Its node is older than all that uses the weights, so autograd comes to it when the unit's backward is over.
    """

    @staticmethod
    def forward(ctx: Any, unit: Unit, anchor: Tensor) -> tuple[Tensor, ...]:  # (W·n,) each
        """The buffers; a parameter that is not used will get zeros."""
        ctx.unit, flats = unit, tuple(unit.take())
        ctx.mark_non_differentiable(*(flat for group, flat in zip(unit.groups, flats, strict=True) if not group.trains))
        return flats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:  # (W·n,) each
        """The parts get their gradients when the reduction has arrived."""
        ctx.unit.owner.reduce(ctx.unit, grads)
        return None, None


class Sharded:
    """A model whose weights are whole only where and while they are used."""

    def __init__(self, model: Any, traffic: Traffic, checkpoint: bool) -> None:
        self.model, self.traffic, self.checkpoint = model, traffic, checkpoint
        self.root: Unit
        self.blocks: list[Unit] = []
        self._whole = self._armed = False  # inside `gathered()`; `finish` will run at the end of this backward pass
        self._current: Unit | None = None  # the block that the backward pass is in
        self._reducing: list[tuple[Group, Tensor, Tensor, Any]] = []  # group, gradient, its shard, work

    def run_trunk(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the trunk's `forward` has become: the root is gathered, and stays for the head and the backward pass."""
        if not self.is_whole():
            if self.root.buffers is None:
                self.root.place()
            self.blocks[0].fetch()
        return forward(*args, **kwargs)

    def is_whole(self) -> bool:
        """Inside `gathered`. Nothing tells when a forward without gradients is over, so it must be there."""
        assert self._whole != torch.is_grad_enabled(), "no_grad belongs inside `gathered`, gradients outside"
        return self._whole

    def backward_reaches(self, unit: Unit) -> None:
        """The first sign of a block in the backward pass: gather it again, start gathering the block before it."""
        if self._current is unit and unit.buffers is not None:
            return
        if self._current is not None:
            self._current.free()  # one with frozen groups only has no `Gather.backward`
        self._current = unit
        self.arm()
        unit.take()
        if unit.index > 0 and self.blocks[unit.index - 1].in_graph:
            self.blocks[unit.index - 1].fetch()

    def reduce(self, unit: Unit, grads: Sequence[Tensor]) -> None:
        """A unit's backward is over: let it go, add its gradients over ranks. One unit at a time is under way."""
        self.arm()
        unit.free()
        self.settle()
        for group, grad in zip(unit.groups, grads, strict=True):
            if group.trains:
                self._reducing.append((group, grad, *group.reduce(grad)))

    def settle(self) -> None:
        """Wait for the reductions under way."""
        for group, _, mine, work in self._reducing:
            work.wait()
            group.fresh = mine if group.fresh is None else group.fresh + mine
        self._reducing.clear()

    def arm(self) -> None:
        """Have `finish` called at the end of this backward pass."""
        if not self._armed:
            self._armed = True
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def finish(self) -> None:
        """Nothing stays gathered, nothing under way: what comes next must see new weights."""
        self._armed, self._current = False, None
        self.settle()
        for unit in (self.root, *self.blocks):
            unit.free()
            unit.uncover()
            for group in unit.groups:
                group.accumulate()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole weights for a while, without gradients: gather once, then decode without collectives."""
        if self._whole:
            yield
            return
        self.finish()
        self._whole = True
        replaced = [module.forward for module in (self.model.trunk, *self.model.trunk.blocks)]
        for forward in replaced:
            forward.idle = True  # `generate`, which has no gradients, may go without
        try:
            with torch.no_grad():
                for unit in (self.root, *self.blocks):
                    unit.place()
                yield
        finally:
            for forward in replaced:
                forward.idle = False
            self._whole = False
            self.finish()

    def clip(self, max_norm: float) -> Tensor:  # () the norm before
        """Scale gradients to a joint 2-norm over ranks of at most max_norm; at W = 1 torch's, in every bit.

        Padding is in no part and a tied parameter in one. A norm that is not finite is so on every rank.
        """
        trained = with_gradients(self.model)
        mine = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        norm = dist.all_sum(mine.double() ** 2).sqrt().to(mine.dtype)  # √x² = x for an fp32 x in fp64
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
        return norm

    def full(self, pick: Pick) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of all that `pick` chooses, a group at a time. Every rank must go through all."""
        names = {p: name for name, p in self.model.named_parameters()}
        for group in (group for unit in (self.root, *self.blocks) for group in unit.groups):
            picked = [pick(part) for part in group.parts]
            if any(x is not None for x in picked):
                shard = torch.zeros_like(group.shard)  # (n,)
                for mine, x in zip(group.split(shard), picked, strict=True):
                    mine.copy_(x.detach().flatten() if x is not None else mine)
                flat, work = group.gather(shard)
                work.wait()
                found = zip(group.parts, picked, group.views(flat), strict=True)
                yield from ((names[part], whole) for part, x, whole in found if x is not None)

    def put(self, pick: Pick, tensors: Mapping[str, Tensor]) -> None:
        """The way back: this rank's part of whole tensors, by name, into what `pick` chooses."""
        groups = (group for unit in (self.root, *self.blocks) for group in unit.groups)
        firsts = dict(pair for g in groups for pair in zip(g.parts, g.firsts, strict=True))
        for name, p in self.model.named_parameters():
            if name in tensors and (x := pick(p)) is not None:
                x.view(-1).copy_(tensors[name].reshape(-1)[firsts[p] : firsts[p] + x.numel()])


def shard(
    models: Sequence[Any], *, device: Any = None, dtype: torch.dtype | None = None, checkpoint: bool = False
) -> list[Sharded]:
    """Shard models in place; those that share parameters (a base under several adapters) in one call.

    `device` is where the shards live. `dtype` is what linear layers of blocks are gathered in, to run under autocast of
    the same; all else is gathered as it is: norms, embedding, heads, adapters. `checkpoint` keeps no activations.
    """
    traffic = Traffic()
    groups: dict[nn.Parameter, Group] = {}  # by first parameter
    parts: dict[nn.Parameter, nn.Parameter] = {}
    places = [places_of(model) for model in models]
    holders = {p: tuple(i for i, where in enumerate(places) if p in where) for where in places for p in where}
    sharded = [Sharded(model, traffic, checkpoint) for model in models]
    for s, where in zip(sharded, places, strict=True):
        for index, parameters in by_unit(s.model, where).items():
            kinds: dict[Any, list[nn.Parameter]] = {}
            for p in parameters:
                low = dtype is not None and index >= 0 and isinstance(where[p][0][0], nn.Linear)
                kinds.setdefault((p.requires_grad, dtype if low else p.dtype, p.dtype, holders[p]), []).append(p)
            for kind, members in kinds.items():
                if members[0] not in groups:
                    groups[members[0]] = group = Group(members, kind[1], device, traffic)
                    parts |= zip(members, group.parts, strict=True)
            own = [groups[members[0]] for members in kinds.values()]
            unit = Unit(s, index, own, [[where[p] for p in members] for members in kinds.values()])
            s.blocks += [unit] if index >= 0 else []
            s.root = unit if index < 0 else s.root
    for s, where in zip(sharded, places, strict=True):
        for p, module, attribute in ((p, *place) for p, found in where.items() for place in found):
            module._parameters[attribute] = parts[p]
        trunk = s.model.trunk
        for unit, block in zip(s.blocks, trunk.blocks, strict=True):
            unit.forward, block.forward = block.forward, unit
        trunk.forward = partial(s.run_trunk, trunk.forward)
    return sharded


def with_gradients(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn; what no forward used gets a gradient of zeros, as it may have one on other ranks."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return trained


def places_of(model: nn.Module) -> Places:
    """Parameter → the (module, attribute) pairs that hold it, in the order of `model.parameters()`."""
    places: Places = {}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                places.setdefault(p, []).append((module, attribute))
    return places


def by_unit(model: Any, places: Places) -> dict[int, list[nn.Parameter]]:
    """Block number → its parameters; -1: the root, which has what lies in no block or in several."""
    block_of = {module: i for i, block in enumerate(model.trunk.blocks) for module in block.modules()}
    units: dict[int, list[nn.Parameter]] = {i: [] for i in range(-1, len(model.trunk.blocks))}
    for p, where in places.items():
        found = {block_of.get(module, -1) for module, _ in where}
        units[found.pop() if len(found) == 1 else -1].append(p)
    return units
