"""Low-rank adapters by name on a finished model (Hu et al. 2021, arXiv 2106.09685), one active at a time; PEFT folders.

The model does not know: adapters live in `model.adapters`, and a forward hook on each targeted linear layer applies
what stands in that layer's slot. `use_adapter` fills the slots for a while; `adapter_view` gives a role modules, and so
slots, of its own over the same tensors. What goes wrong: with activation checkpointing the backward pass runs layers
again and reads the slots again, so it belongs inside `use_adapter` as well, or to a view.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minirlhf.errors import CheckpointError, UsageError
from minirlhf.families import FAMILIES
from minirlhf.lora_config import ALL, AdapterFolder, LoRAConfig, match_targets, read_adapter, write_adapter
from minirlhf.safefile import FLOATS, TensorFile, write_tensors

Model = Any  # CausalLM, RewardModel, ValueModel: a module with `config` and `module_names()`
TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every name in a PEFT file
SCORE = "score"  # never low-rank: trained whole


# ---- layers ---------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """The update of one linear layer: W + scale · B A (Hu 2021, eq. 3)."""

    def __init__(
        self,
        A: Tensor,  # (r, n_in), at least fp32
        B: Tensor,  # (n_out, r)
        config: LoRAConfig,
    ) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale, self.dropout = config.scale, config.dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # (..., n_in), W x (..., n_out) → (..., n_out)
        """y + scale · B A dropout(x); the second product and the sum are one `addmm`, rounded once to the type of y."""
        wide = torch.promote_types(x.dtype, self.A.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        exact = y.dtype == wide  # logits stay as they are under autocast
        with torch.autocast(x.device.type, enabled=False) if exact else nullcontext():
            h = F.linear(x.to(wide), self.A.to(wide)).flatten(0, -2)  # (N, r)
            z = torch.addmm(y.to(wide).flatten(0, -2), h, self.B.to(wide).T, alpha=self.scale)  # (N, n_out)
        return z.view(y.shape).to(y.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What PEFT's files call them, after the path of the module."""
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def merged(self, weight: Tensor) -> Tensor:  # (n_out, n_in) → same shape, at least fp32
        """The weight that does both."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight.to(self.A.dtype) + self.scale * (self.B @ self.A)


class Whole(nn.Module):
    """A trained copy that stands in for a module, PEFT's `modules_to_save`: the head of a reward or value model."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).to(at_least_fp32(module.weight)).requires_grad_(True)
        self.module.adapter = None  # type: ignore[assignment]  # the copy of a slot that may have been filled

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # (..., n_in), the module's (..., n_out) → (..., n_out)
        """What the copy answers."""
        return self.module(x)

    def tensors(self) -> dict[str, Tensor]:
        """What PEFT's files call them, after the path of the module."""
        return {"weight": self.module.weight}

    def merged(self, weight: Tensor) -> Tensor:  # (n_out, n_in) → same shape, at least fp32
        """The copy's."""
        return self.module.weight


Layers = dict[str, LowRank | Whole]  # by module path of the model


class Adapter(nn.Module):
    """One adapter: its config, and a layer for each module it changes."""

    def __init__(self, config: LoRAConfig, layers: Layers, base: str | None = None) -> None:
        super().__init__()
        self.config, self.base = config, base  # base: folder or name of the base model, where a PEFT folder stated it
        self.layers = nn.ModuleDict({path.replace(".", "/"): layer for path, layer in layers.items()})

    def by_path(self) -> Layers:
        """The layers, by module path of the model."""
        return {key.replace("/", "."): cast(LowRank | Whole, layer) for key, layer in self.layers.items()}


def at_least_fp32(weight: Tensor) -> torch.dtype:
    """The type of an adapter on this weight; a bf16 base trains fp32 matrices."""
    return torch.promote_types(weight.dtype, torch.float32)


# ---- which adapter is active ----------------------------------------------------------------------------------------


def apply_slot(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """The forward hook: with nothing in the slot the output stays what it is."""
    slot = cast(tuple[LowRank | Whole] | None, module.adapter)
    return None if slot is None else slot[0](args[0], output)


def slots(model: Model) -> dict[str, Any]:
    """Path → module, of all modules with a slot."""
    return {path: module for path, module in model.named_modules() if "adapter" in vars(module)}


def fill(model: Model, layers: Layers) -> None:
    """These layers into their slots, nothing into the others; in a tuple, lest they become submodules."""
    for path, module in slots(model).items():
        module.adapter = (layers[path],) if path in layers else None


def use_adapter(model: Model, name: str | None) -> AbstractContextManager[None]:
    """Run the model under one adapter, or under None: the base, bit for bit. Nests; what was active before returns."""
    return _filled(model, {} if name is None else get_adapter(model, name).by_path())


@contextmanager
def _filled(model: Model, layers: Layers) -> Iterator[None]:
    before = [(module, module.adapter) for module in slots(model).values()]
    fill(model, layers)
    try:
        yield
    finally:
        for module, slot in before:
            module.adapter = slot


def adapter_view(model: Model, name: str | None) -> Model:
    """The model once more, always under this adapter, or under None: new modules on the same tensors.

    Roles that share a base each get a view. They run, train and recompute in any order and in any mode, since none sees
    the slots of another. A view has this adapter alone, and nothing else in it requires a gradient.
    """
    if name is not None:
        get_adapter(model, name)
    view = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for other in set(adapters(model)) - {name}:
        del view.adapters[other]
    fill(view, {} if name is None else get_adapter(view, name).by_path())
    return view


# ---- the adapters of a model ----------------------------------------------------------------------------------------


def add_adapter(model: Model, name: str, config: LoRAConfig, *, rng: torch.Generator | None = None) -> None:
    """A new adapter that changes nothing yet: A uniform in ± 1/√n_in, as PEFT draws it, and B = 0. Freezes the base.

    The adapter of a reward or value model has its own copy of the score head.
    """
    layers, config = _own_score(model), respelled(model, config)
    for path in target_modules(model, config.targets):
        weight = model.get_submodule(path).weight  # (n_out, n_in)
        layer = _blank(weight, config, weight.device if rng is None else rng.device)
        nn.init.uniform_(layer.A, -1 / sqrt(weight.shape[1]), 1 / sqrt(weight.shape[1]), generator=rng)
        layers[path] = layer.to(weight.device)
    _attach(model, name, Adapter(config, layers))


def copy_adapter(model: Model, source: str, target: str, *, to: Model | None = None) -> None:
    """An adapter's double, with tensors of its own: the reference of a policy that goes on training.

    `to`: another model of the same architecture, a language model's adapter for a value model, say. It keeps its own
    score head where the adapter has none, and a language model's head stays behind. Raises UsageError where nothing
    else is left.
    """
    adapter, to = get_adapter(model, source), model if to is None else to
    layers, config = _own_score(to) | copy.deepcopy(adapter.by_path()), adapter.config
    if "head" in layers and not hasattr(to, "head"):
        del layers["head"]
        names = target_modules(to, ALL)
        kept = tuple(names[path] for path in layers if path in names)
        if not kept:
            raise UsageError(f"adapter {source!r} changes the head alone, which this model has not; add lora.targets")
        config = replace(config, targets=kept)
    _attach(to, target, Adapter(config, layers, adapter.base))


def remove_adapter(model: Model, name: str) -> None:
    """Forget an adapter that is not in use. The base stays frozen."""
    layers = set(get_adapter(model, name).by_path().values())
    if any(module.adapter is not None and module.adapter[0] in layers for module in slots(model).values()):
        raise UsageError(f"adapter {name!r} is in use; leave use_adapter first, or turn to the model behind the view")
    del model.adapters[name]


class MergeError(NamedTuple):
    """How far a merged model is from base and adapter."""

    weights: float  # largest rounding error of a weight
    outputs: float | None  # largest difference of an output on the probe


@torch.no_grad()
def merge_adapter(model: Model, name: str, *, probe: Tensor | None = None) -> MergeError:  # probe: (B, T) token ids
    """Put an adapter into the weights for good, and forget it: W ← W + scale · B A, in fp32 and then cast.

    Every view on these tensors changes too. A bf16 weight loses much of a small update (of relative size 1e-3: 80 %);
    the error returned shows it.
    """
    layers = get_adapter(model, name).by_path()
    if "head" in layers and model.config.tied:
        raise UsageError(f"adapter {name!r} changes the head, which is the embedding too; it cannot be merged")
    with use_adapter(model, name):
        before = model(probe) if probe is not None else None
    remove_adapter(model, name)
    error = 0.0
    for path, layer in layers.items():
        weight = model.get_submodule(path).weight
        exact = layer.merged(weight)
        weight.copy_(exact)
        error = max(error, float((weight - exact).abs().max()))
    with use_adapter(model, None):
        return MergeError(error, None if before is None else float((model(probe) - before).abs().max()))


def adapters(model: Model) -> nn.ModuleDict:
    """Name → Adapter."""
    return getattr(model, "adapters", nn.ModuleDict())


def get_adapter(model: Model, name: str) -> Adapter:
    """Raises UsageError for a name that the model does not have."""
    if name not in adapters(model):
        raise UsageError(f"adapter {name!r} is unknown; this model has: {', '.join(adapters(model)) or 'none'}")
    return cast(Adapter, adapters(model)[name])


def adapter_parameters(model: Model, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, under their names in `model.named_parameters()`."""
    return {f"adapters.{name}.{key}": p for key, p in get_adapter(model, name).named_parameters()}


def freeze_base(model: Model) -> None:
    """No gradient for anything but adapters."""
    own = {id(p) for p in adapters(model).parameters()}
    for p in model.parameters():
        if id(p) not in own:
            p.requires_grad_(False)


def target_modules(model: Model, targets: tuple[str, ...] | str) -> dict[str, str]:
    """Our path → Hugging Face path of each targeted linear layer; UsageError where an entry matches none."""
    ours = {theirs: path for path, theirs in peft_names(model).items()}
    linear = [theirs for theirs, path in ours.items() if isinstance(model.get_submodule(path), nn.Linear)]
    able = [theirs for theirs in linear if ours[theirs] != SCORE]
    heads = [theirs for theirs in able if ours[theirs] == "head"]
    return {ours[theirs]: theirs for theirs in match_targets(targets, ours, able, heads)}


def peft_names(model: Model) -> dict[str, str]:
    """Our path of every module with weights → its path in a PEFT folder."""
    names = model.module_names()
    return names | {"head": FAMILIES[model.config.family].peft_head} if "head" in names else names


def respelled(model: Model, config: LoRAConfig) -> LoRAConfig:
    """The targets with the head under its name of today, where they have that of transformers 4."""
    family, targets = FAMILIES[model.config.family], config.targets
    if isinstance(targets, str):
        return replace(config, targets=targets.replace(family.head, family.peft_head))
    return replace(config, targets=tuple(entry.replace(family.head, family.peft_head) for entry in targets))


def _blank(weight: Tensor, config: LoRAConfig, device: torch.device | str) -> LowRank:  # weight (n_out, n_in)
    n_out, n_in = weight.shape
    A = torch.empty(config.r, n_in, dtype=at_least_fp32(weight), device=device)
    return LowRank(A, A.new_zeros(n_out, config.r), config)


def _own_score(model: Model) -> Layers:
    return {"score": Whole(model.score)} if hasattr(model, "score") else {}


def _attach(model: Model, name: str, adapter: Adapter) -> None:
    if name in adapters(model):
        raise UsageError(f"adapter {name!r} exists already; remove it first, or choose another name")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise UsageError(f"adapter name {name!r} cannot be used; choose a plain word such as 'policy'")
    if not hasattr(model, "adapters"):
        model.adapters = nn.ModuleDict()
    model.adapters[name] = adapter.train(model.training).requires_grad_(True)
    for path in adapter.by_path():
        module = model.get_submodule(path)
        if "adapter" not in vars(module):
            module.adapter = None
            module.register_forward_hook(apply_slot)
    freeze_base(model)


# ---- PEFT folders ---------------------------------------------------------------------------------------------------


def stored(adapter: Adapter, names: dict[str, str]) -> dict[str, Tensor]:  # names: our path → theirs
    """What the tensor file of a PEFT folder calls them → tensors."""
    found = ((names[where], layer) for where, layer in adapter.by_path().items())
    return {f"{PREFIX}{theirs}.{key}": t for theirs, layer in found for key, t in layer.tensors().items()}


def save_adapter(model: Model, name: str, path: str | Path, *, base: str | None = None) -> None:
    """A PEFT folder; `base` is the base model's folder, without it the one of the folder this adapter came from."""
    adapter, folder, scored = get_adapter(model, name), Path(path), hasattr(model, "score")
    task, base = "SEQ_CLS" if scored else "CAUSAL_LM", adapter.base if base is None else base
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS, stored(adapter, peft_names(model)))
        said = AdapterFolder(adapter.config, task, base, scored)
        write_adapter(folder, said, transposed=model.config.family == "gpt2")
    except OSError as e:
        raise CheckpointError(f"{folder}: the adapter cannot be written ({e})") from e


def load_adapter(model: Model, path: str | Path, name: str) -> None:
    """Read a PEFT folder as a new adapter, which stays inactive. Freezes the base.

    A folder without a score head leaves a reward or value model its own. Raises CheckpointError, and leaves the model
    as it was, where the folder cannot be served exactly.
    """
    said, folder, layers = read_adapter(path), Path(path), _own_score(model)
    if said.has_score and not layers:
        raise CheckpointError(f"{folder}: holds the score head of a reward model (SEQ_CLS), and this model has none")
    config = respelled(model, said.config)
    try:
        targets = target_modules(model, config.targets)
    except UsageError as e:
        raise CheckpointError(f"{folder}: {e}") from e
    layers |= {where: _blank(model.get_submodule(where).weight, config, "meta") for where in targets}
    adapter = Adapter(config, layers, said.base)
    left_out = set() if said.has_score else {f"{PREFIX}score.weight"}
    file = _tensor_file(folder)
    old = f"{PREFIX}{FAMILIES[model.config.family].head}.lora_A.weight" in file.entries
    names = model.module_names() if old else peft_names(model)
    shapes = {key: tuple(t.shape) for key, t in stored(adapter, names).items() if key not in left_out}
    copied = {}  # PEFT writes what is below an adapter of the head too
    if "head" in targets and (key := f"{PREFIX}{names['head']}.base_layer.weight") in file.entries:
        copied[key] = model.head.weight
    _check_entries(file, shapes | {key: tuple(t.shape) for key, t in copied.items()})
    for key, weight in copied.items():
        if not weight.is_meta and not file.same(key, weight):
            raise CheckpointError(f"{file.path}: tensor {key!r} differs from the base, so its base is another model")
    for where in targets:
        layers[where].to_empty(device=model.get_submodule(where).weight.device)
    tensors = stored(adapter, names)
    for key in shapes:
        if not tensors[key].is_meta:
            file.read(key, tensors[key].data)
    _attach(model, name, adapter)


def _tensor_file(folder: Path) -> TensorFile:
    if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
        raise CheckpointError(f"{folder / PICKLE}: a pickle, which is never opened; convert it to {TENSORS}")
    return TensorFile(folder / TENSORS)


def _check_entries(file: TensorFile, shapes: dict[str, tuple[int, ...]]) -> None:
    """The file holds these names in these shapes and no others."""
    for key in sorted(shapes.keys() ^ file.entries.keys()):
        what = "is missing" if key in shapes else "belongs to nothing that adapter_config.json and the model name"
        raise CheckpointError(f"{file.path}: tensor {key!r} {what}")
    for key, entry in file.entries.items():
        if entry.shape != shapes[key]:
            raise CheckpointError(f"{file.path}: tensor {key!r} is {entry.shape}; model and r ask for {shapes[key]}")
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{file.path}: tensor {key!r} is {entry.dtype}, not floating")
