"""A model made ready for many small steps without gradients: what `generate` asks for one token after the other.

Between the products of a small model, half of a step is spent on finding things: each product brings its weight into
the library's own layout, and nn.Module searches for every attribute and every hook. Here both are done once, before the
first step. The model is not written a second time: its own `forward` functions run, on stand-ins for its modules. Only
layers and RMSNorm are replaced, by one function each that computes the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from minirlhf.model import MLP, Attention, Block, CausalLM, Embedding, Head, Linear, Norm, Trunk, logits
from minirlhf.products import Ready, after, as_factor, as_logit_factor, packed

KINDS = (CausalLM, Trunk, Block, Attention, MLP, Linear, Head, Norm, Embedding)
PLAIN: dict[type, Callable[..., Any]] = {kind: kind.forward for kind in KINDS}  # whose calls can do without nn.Module
WORTH_PREPARING = 16  # steps from which on a second layout of the weights pays


def prepared(model: CausalLM, rows: int, steps: int) -> CausalLM:
    """The model for so many steps of so many rows; another kind of model, or of layer in it, stays what it is."""
    made: CausalLM = stand_in(model, rows if steps >= WORTH_PREPARING else 0, {kind: _class(kind) for kind in PLAIN})
    return made


def stand_in(module: Any, rows: int, classes: dict[type, type]) -> Any:  # rows: 0 leaves the weights where they are
    """What has the module's attributes, parameters, children and functions, and whose call is `forward` at once.

    A module of another kind, or one whose call does more, such as an adapter's hook, stands for itself. What `forward`
    writes on a stand-in is not kept.
    """
    if type(module) is nn.ModuleList:
        return [stand_in(child, rows, classes) for child in module]
    if not plain(module):
        return module
    layers, act = _layers(module) if rows else ([], None)
    ready = _one_call(layers, rows, act) if layers else _norm(module) if rows and type(module) is Norm else None
    if ready is not None and type(module) in (Linear, Head, Norm):
        return ready
    within = () if ready is None else layers
    children = {name: stand_in(x, 0 if x in within else rows, classes) for name, x in module._modules.items()}
    made: Any = object.__new__(classes[type(module)])
    found = module._parameters | module._buffers | children | vars(module)  # the last is what Python finds first
    vars(made).update(found | ({} if ready is None else {"ready": ready}))
    return made


def _class(kind: type) -> type:
    """A class with the functions of a module class that are not nn.Module's."""
    bases = [vars(base) for base in reversed(kind.__mro__) if base not in (object, nn.Module)]
    own = {name: value for base in bases for name, value in base.items() if not name.startswith("__")}
    return type(kind.__name__, (), own | {"__call__": own["forward"]})


def plain(module: Any, *known: Callable[..., Any]) -> bool:
    """Whether a call of the module is `forward` as its class is written, and nothing more but known hooks.

    What has been put in its place counts as nothing while it is `idle`, as in a sharded model with whole weights.
    """
    forward = PLAIN.get(type(module))
    if forward is None or type(module).forward is not forward:
        return False
    hooks = any(hook not in known for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    replaced = "forward" in vars(module) and not getattr(module.forward, "idle", False)
    return not (hooks or _has_any_global_hook() or module._compiled_call_impl or replaced)


def _layers(module: nn.Module) -> tuple[list[Linear], Ready | None]:
    """Layers that can be one product, side by side, and its activation where that comes next.

    Where a hook or another kind of layer comes between, there is nothing to put together.
    """
    inner: list[nn.Module] = []
    act: Ready | None = None
    if isinstance(module, Linear):
        return [module], None
    if isinstance(module, Attention) and module.layout == "split":
        inner = [module.q, module.k, module.v]
    elif isinstance(module, MLP) and module.gate is not None:
        inner = [module.gate, module.up]
    elif isinstance(module, MLP):
        inner, act = [module.up], module.act
    layers = [x for x in inner if type(x) is Linear and plain(x)]
    alike = len({x.bias is None for x in layers}) == 1
    return (layers, act) if alike and len(layers) == len(inner) else ([], None)


def _one_call(layers: list[Linear], rows: int, act: Ready | None) -> Ready | None:
    """The product of layers side by side, or its activation."""
    first = layers[0]
    if isinstance(first, Head):
        return _logits(first, rows)
    weights = [as_factor(x.weight) for x in layers]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None if first.bias is None else as_factor(torch.cat([x.bias for x in layers]))
    ready = packed(weight, bias, weight.dtype, rows, act)
    if ready is None and weight.dtype != first.weight.dtype:  # rounded once, not at every step
        return after(lambda x: F.linear(x, weight, bias), act)
    return ready


def _logits(head: Head, rows: int) -> Ready | None:
    """The weight as the head multiplies it: a bf16 one is brought to fp32 once, a GPU takes it as it is."""
    weight = as_logit_factor(head.weight)
    wide = weight if weight.is_cuda else weight.to(torch.promote_types(weight.dtype, torch.float32))
    ready = packed(wide, None, wide.dtype, rows)
    return partial(logits, weight=wide) if ready is None and wide is not head.weight else ready


def _norm(norm: Norm) -> Ready | None:
    """The norm in fewer calls, with weights that are as wide as it computes from the beginning."""
    if norm.weight.device.type != "cpu":
        return None
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    weight = norm.weight.to(wide)
    return _rms(weight, norm.eps) if norm.bias is None else _layer(weight, norm.bias.to(wide), norm.eps)


def _layer(weight: Tensor, bias: Tensor, eps: float) -> Ready:
    """LayerNorm, which torch computes in fp32 within one call if x is bf16 and its weights are fp32."""

    def call(x: Tensor) -> Tensor:  # (..., C) → same shape and dtype
        if x.dtype == weight.dtype or (x.dtype == torch.bfloat16 and weight.dtype == torch.float32):
            return torch.layer_norm(x, weight.shape, weight, bias, eps)
        wide = torch.promote_types(x.dtype, weight.dtype)
        return torch.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)

    return call


def _rms(weight: Tensor, eps: float) -> Ready:
    """RMSNorm as √C w x / √(|x|² + Cε): four calls, of which torch makes seven on a CPU."""
    C, wide = len(weight), weight.dtype
    scale, floor = weight * C**0.5, torch.tensor((C * eps) ** 0.5, dtype=wide)

    def call(x: Tensor) -> Tensor:  # (..., C) → same shape and dtype
        y = x if x.dtype == wide else x.to(torch.promote_types(x.dtype, wide))
        y = (y / torch.linalg.vector_norm(y, dim=-1, keepdim=True).hypot_(floor)).mul_(scale)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    return call
