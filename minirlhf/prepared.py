"""A model made ready for many small steps without gradients: what `generate` asks for one token after the other.

Between the products of a small model, half of a step is spent on finding things: each product brings its weight into
the library's own layout, and nn.Module searches for every attribute and every hook. Here both are done once, before the
first step. The model is not written a second time: its own `forward` functions run, on stand-ins for its modules.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from minirlhf.model import MLP, Attention, Block, CausalLM, Embedding, Head, Linear, Norm, Trunk
from minirlhf.products import Ready, packed

PLAIN = (CausalLM, Trunk, Block, Attention, MLP, Linear, Head, Norm, Embedding)  # whose calls can do without nn.Module
WORTH_PREPARING = 16  # steps from which on a second layout of the weights pays


@contextmanager
def prepared(model: CausalLM, rows: int, steps: int) -> Iterator[CausalLM]:
    """The model for so many steps of so many rows; another kind of model, or of layer in it, stays what it is."""
    found = dict(_faster(model, rows)) if steps >= WORTH_PREPARING else {}
    try:
        for module, ready in found.items():
            module.ready = ready
        yield bare(model)
    finally:
        for module in found:
            module.ready = None


def bare(module: Any, kinds: dict[type, type] | None = None) -> Any:
    """A stand-in with the module's attributes, parameters, children and functions, whose call is `forward` at once.

    A module of another kind, or one whose call does more, such as an adapter's hook, stands for itself. What `forward`
    writes on a stand-in is not kept.
    """
    kinds = kinds or {kind: _kind(kind) for kind in PLAIN}
    if type(module) is nn.ModuleList:
        return [bare(child, kinds) for child in module]
    if type(module) not in kinds or watched(module):
        return module
    stand_in: Any = object.__new__(kinds[type(module)])
    children = {name: bare(child, kinds) for name, child in module._modules.items()}
    found = module._parameters | module._buffers | children | vars(module)  # the last is what Python finds first
    vars(stand_in).update(found)
    return stand_in


def _kind(kind: type) -> type:
    """A class with the functions of a module class that are not nn.Module's."""
    bases = [vars(base) for base in reversed(kind.__mro__) if base not in (object, nn.Module)]
    own = {name: value for base in bases for name, value in base.items() if not name.startswith("__")}
    return type(kind.__name__, (), own | {"__call__": own["forward"]})


def watched(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()
    return bool(hooks or module._compiled_call_impl or "forward" in vars(module))


def _faster(model: CausalLM, rows: int) -> Iterator[tuple[Any, Ready]]:
    """Modules and what does their work in fewer calls; not the layers within one of them."""
    within: set[nn.Module] = set()
    for module in model.modules():
        layers, activation = _layers(module)
        if isinstance(module, Norm):
            ready = _rms(module)
        else:
            ready = _one_call(layers, rows, activation) if layers and module not in within else None
        if ready is not None:
            within.update(layers)
            yield module, ready


def _layers(module: nn.Module) -> tuple[list[Linear], str]:
    """Layers that can be one product, side by side, and the activation of it.

    Where a hook or another kind of layer comes between, there is nothing to put together.
    """
    inner: list[nn.Module] = []
    activation = ""
    if isinstance(module, Linear):
        return [module], ""
    if isinstance(module, Attention) and module.layout == "split":
        inner = [module.q, module.k, module.v]
    elif isinstance(module, MLP) and module.gate is not None:
        inner = [module.gate, module.up]
    elif isinstance(module, MLP):
        inner, activation = [module.up], module.activation
    layers = [x for x in inner if type(x) is Linear and not watched(x)]
    return (layers, activation) if len(layers) == len(inner) else ([], "")


def _one_call(layers: list[Linear], rows: int, activation: str) -> Ready | None:
    """The product of layers side by side; that of the head in fp32."""
    first = layers[0]
    dtype = first.weight.dtype
    if isinstance(first, Head):
        dtype = torch.promote_types(dtype, torch.float32)
    elif torch.is_autocast_enabled(first.weight.device.type):
        dtype = torch.get_autocast_dtype(first.weight.device.type)
    weight: Tensor = first.weight if len(layers) == 1 else torch.cat([x.weight for x in layers])
    bias = None if first.bias is None else torch.cat([x.bias for x in layers])
    ready = packed(weight, bias, dtype, rows, activation)
    if ready is None and isinstance(first, Head) and dtype != weight.dtype:
        return partial(first.logits, weight=weight.to(dtype))
    return ready


def _rms(norm: Norm) -> Ready | None:
    """RMSNorm as √C w x / √(|x|² + Cε): four calls, of which torch makes seven on a CPU."""
    if norm.bias is not None or norm.weight.device.type != "cpu":
        return None
    (C,), wide = norm.size, torch.promote_types(norm.weight.dtype, torch.float32)
    scale, floor = norm.weight.to(wide) * C**0.5, torch.tensor((C * norm.eps) ** 0.5, dtype=wide)
    return lambda x: x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor) * scale
