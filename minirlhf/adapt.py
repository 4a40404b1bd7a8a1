"""What a stage trains: every weight of its model, or an adapter on a frozen base (Hu et al. 2021, arXiv 2106.09685).

An adapter folder stands for a model: the base that it names, under its adapter. A stage that starts from one trains a
copy of that adapter, so that all stages share one base and write adapters alone. Every role is a view: modules of its
own over the same tensors. What goes wrong: another base under the same name gives other answers in silence; therefore
`minirlhf.json` holds a fingerprint of the base.
"""

import copy
import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minirlhf.config import LoRASection
from minirlhf.errors import CheckpointError, UsageError
from minirlhf.heads import RewardModel, ScalarModel, SharedValueModel, ValueModel
from minirlhf.lora import (
    adapter_view,
    adapters,
    add_adapter,
    copy_adapter,
    fill,
    get_adapter,
    load_adapter,
    merge_adapter,
    respelled,
    save_adapter,
    target_modules,
)
from minirlhf.lora_config import ALL, FILE, LoRAConfig, read_adapter
from minirlhf.model import Attention, Block, CausalLM
from minirlhf.pretrained import holds_score, load_causal_lm, load_reward_model, load_value_model, save_pretrained
from minirlhf.rng import generator
from minirlhf.safefile import read_json_if_there, shown

META, VALUE = "minirlhf.json", "value_model"  # the file beside the weights, the critic's folder beside the policy
LOADED, TRAINED = "loaded", "trained"  # the adapter of a folder, and the one that a stage trains
PLAIN = re.compile(r"[\w.-]+")  # a module's name, not a regular expression
SAMPLE = 1024  # numbers of each tensor in a fingerprint
KINDS: dict[Callable[..., Any], type[ScalarModel]] = {load_reward_model: RewardModel, load_value_model: ValueModel}


# ---- folders --------------------------------------------------------------------------------------------------------


def base_folder(folder: Path) -> Path | None:
    """The base of an adapter folder, named from the working directory or from the adapter; None: a model by itself."""
    file = folder / FILE
    if not os.path.lexists(file):
        return None
    name = read_adapter(folder).base
    if not name:
        raise CheckpointError(f"{file}: names no base; put the folder of its model into base_model_name_or_path")
    for place in (name, os.path.join(folder, name)):
        if os.path.isdir(place):
            if os.path.lexists(os.path.join(place, FILE)):
                raise CheckpointError(f"{file}: its base {shown(name)} is an adapter itself; merge that one first")
            return Path(os.path.abspath(place))
    raise CheckpointError(
        f"{file}: its base {shown(name)} is no folder here; download the model and name its folder in "
        f"base_model_name_or_path"
    )


def open_model(
    folder: Path,
    loader: Callable[..., Any],  # load_causal_lm | load_reward_model | load_value_model
    device: str,
    *,
    beside: CausalLM | None = None,  # a view from `adapted`; an adapter on the same base takes that base's tensors
) -> Any:
    """The model of a folder; of an adapter folder the view of its base under the adapter LOADED."""
    model = _open(folder, loader, device, beside)
    if isinstance(model, RewardModel):
        model.gain, model.bias = _normalization(folder)
    return model


def _normalization(folder: Path) -> tuple[float, float]:
    """What `RewardModel.normalize` found."""
    meta = read_meta(folder) or read_meta(base_folder(folder) or folder)
    gain, bias = meta.get("score_gain", 1.0), meta.get("score_bias", 0.0)
    numbers = all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in (gain, bias))
    if not numbers or gain <= 0:
        raise CheckpointError(
            f"{folder / META}: score_gain {gain!r} and score_bias {bias!r} are no normalization; delete both to read "
            f"raw scores"
        )
    return float(gain), float(bias)


def _open(folder: Path, loader: Callable[..., Any], device: str, beside: CausalLM | None) -> Any:
    base = base_folder(folder)
    if base is None:
        return loader(folder, device=device)
    meta = read_meta(folder)
    if loader is load_causal_lm:
        model = loader(base, device=device)
    else:
        model = _under_a_head(folder, base, loader, device, meta, beside)
    if not _is_meta(model) and meta.get("base_sha256") not in (None, fingerprint(model)):
        raise CheckpointError(f"{folder}: its base {base} is not the model that it was trained on; bring that one back")
    load_adapter(model, folder, LOADED)
    get_adapter(model, LOADED).base = str(base)
    return adapter_view(model, LOADED).eval()


def _under_a_head(
    folder: Path, base: Path, loader: Callable[..., Any], device: str, meta: dict[str, Any], beside: CausalLM | None
) -> ScalarModel:
    """The base of a reward or value adapter, with a head that the adapter's own will replace."""
    kind = KINDS[loader]
    if (kind is ValueModel) != (meta.get("head") == "value"):
        is_a, wanted = ("reward", "value") if kind is ValueModel else ("value", "reward")
        raise CheckpointError(f"{folder}: adapter of a {is_a} model, and a {wanted} model is needed")
    if holds_score(base):
        return loader(base, device=device)
    if not read_adapter(folder).has_score:
        raise CheckpointError(f"{folder}: adapter of a language model, without the score head of a reward model")
    if beside is not None and os.path.samefile(str(get_adapter(beside, TRAINED).base), base):
        return kind(beside.trunk, rng=generator(0, "head"))
    return kind(load_causal_lm(base, device=device).trunk, rng=generator(0, "head"))


def write_model(
    folder: Path,
    model: CausalLM | ScalarModel,
    tokenizer: Any = None,
    stop_token_id: int | None = None,  # as `save_pretrained` takes it
) -> dict[str, Any]:
    """A Hugging Face folder, or of a view the PEFT folder of its adapter; returns what `minirlhf.json` should say."""
    if isinstance(model, SharedValueModel) and adapters(model.policy):
        model = _own_adapter(model)
    names = list(adapters(model))
    if not names:
        save_pretrained(model, folder, tokenizer=tokenizer, stop_token_id=stop_token_id)
        return {}
    save_adapter(model, names[0], folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    return {"base_sha256": fingerprint(model)} | ({"head": "value"} if isinstance(model, ValueModel) else {})


def read_meta(folder: Path) -> dict[str, Any]:
    """What a stage wrote beside the weights; empty where there is nothing."""
    return read_json_if_there(folder / META)


def loading_device(run: Any) -> str:
    """Where a model is read to: a sharded one never lies on the run's device whole."""
    return str(run.device) if run.engine == "none" else "cpu"


def fingerprint(model: CausalLM | ScalarModel) -> str:
    """sha256 over numbers taken evenly from every tensor of the trunk, as the base holds them."""
    digest = hashlib.sha256()
    for name, p in model.trunk.named_parameters():
        flat = p.detach().flatten()  # (n,)
        some = flat[:: max(1, len(flat) // SAMPLE)].float().cpu()
        digest.update(f"{name} {tuple(p.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _is_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


# ---- what is trained ------------------------------------------------------------------------------------------------


def uses_lora(model: CausalLM, config: Any) -> bool:
    """Whether a stage that starts from this model trains an adapter: it is asked to, or the model is one already.
    Raises UsageError for settings of an adapter where there is none."""
    if config.lora.r or LOADED in adapters(model):
        return True
    for name in ("alpha", "dropout", "rslora"):
        if (said := getattr(config.lora, name)) != getattr(LoRASection(), name):
            raise UsageError(f"lora.{name} {said}: every weight is trained, without an adapter; give lora.r, or leave "
                             f"lora.{name} out")  # fmt: skip
    return False


def adapted(model: CausalLM, config: Any, owner: Any) -> Any:
    """The view of `owner`, which is the model or stands on its trunk, under the new adapter TRAINED.

    It starts as a copy of the model's adapter; where there is none, as one that changes nothing.
    """
    lora = config.lora
    if LOADED in adapters(model):
        _check_same(lora, model, config.model.path)
        copy_adapter(model, LOADED, TRAINED, to=owner)
    else:
        add_adapter(owner, TRAINED, _new(lora, owner), rng=generator(config.run.seed, "lora"))
        get_adapter(owner, TRAINED).base = os.path.abspath(config.model.path)
    adapter = get_adapter(owner, TRAINED)
    adapter.config = replace(adapter.config, dropout=lora.dropout)
    for path, layer in adapter.by_path().items():
        layer.dropout = 0.0 if path == "head" else lora.dropout  # log-probs are of its weight, which is never called
    return adapter_view(owner, TRAINED)


def _new(lora: LoRASection, owner: Any) -> LoRAConfig:
    """The adapter that the settings describe; a single target that is no plain name is a regular expression.

    "auto" takes the head in where it has less than a tenth of the trunk's weights: in narrow models words of one class
    have nearly equal output embeddings, and no change below the head can choose between them.
    """
    targets: Any = lora.targets
    if targets == ("auto",):
        targets, head = ALL, getattr(owner, "head", None)
        if head is not None and 10 * head.weight.numel() < sum(p.numel() for p in owner.trunk.parameters()):
            targets = (*target_modules(owner, ALL).values(), owner.module_names()["head"])
    elif len(targets) == 1 and not PLAIN.fullmatch(targets[0]):
        targets = targets[0]
    return LoRAConfig(lora.r, lora.alpha, lora.dropout, targets, lora.rslora)


def _check_same(lora: LoRASection, model: CausalLM, path: str) -> None:
    """What is said of the adapter is what it is; what is left at its default asks nothing."""
    its = get_adapter(model, LOADED).config
    asked = respelled(model, _new(lora if lora.r else replace(lora, r=its.r), None))
    for name in ("r", "alpha", "targets", "rslora"):
        said = getattr(lora, name)
        if said != getattr(LoRASection(), name) and getattr(asked, name) != getattr(its, name):
            raise UsageError(
                f"lora.{name} {said}: {path} is an adapter with {name} {getattr(its, name)}, which this stage goes on "
                f"training; leave lora.{name} out"
            )


def sft_model(model: CausalLM, config: Any) -> CausalLM:
    """The model that SFT trains, under its dropout."""
    set_dropout(model, config.model.dropout)
    return freeze(adapted(model, config, model) if uses_lora(model, config) else model, config.model.freeze)


def freeze(model: Any, pattern: str) -> Any:
    """The model; parameters in whose name the regular expression is found learn no more. Raises UsageError where it is
    no expression, finds nothing that learns, or leaves nothing."""
    if not pattern:
        return model
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    try:
        found = {name for name in names if re.search(pattern, name)}
    except re.error as e:
        raise UsageError(f"model.freeze {pattern!r}: {e}") from e
    if not found or len(found) == len(names):
        raise UsageError(
            f"model.freeze {pattern!r} is found in {len(found)} of {len(names)} trained parameters, such as {names[0]} "
            f"and {names[-1]}; it must be in some and not in all"
        )
    for name, p in model.named_parameters():
        if name in found:
            p.requires_grad_(False)
    return model


def reward_model(policy: CausalLM, config: Any) -> RewardModel:
    """The policy's trunk under a new head, under the dropout of the reward model."""
    rng = generator(config.run.seed, "head")
    if not uses_lora(policy, config):
        model = RewardModel.from_causal_lm(policy, rng=rng)
    else:
        model = adapted(policy, config, RewardModel(policy.trunk, rng=rng))
    set_dropout(model, config.model.dropout)
    return freeze(model, config.model.freeze)


def set_dropout(model: CausalLM | ScalarModel, p: float) -> None:
    """Dropout p in every place of the model that has one, whatever its folder says."""
    model.config = model.trunk.config = replace(model.config, dropout=p, embed_dropout=p, attn_dropout=p)
    for module in model.trunk.modules():
        if isinstance(module, Attention | Block):
            module.dropout = p


# ---- the critic -----------------------------------------------------------------------------------------------------


def value_model(policy: CausalLM, reward: RewardModel | None, config: Any) -> ValueModel:
    """The critic of PPO: of its own (`separate`), a head on the policy's trunk (`shared`), or an adapter (`lora`)."""
    lora, start = bool(adapters(policy)), config.ppo.value_init
    kind = {"auto": "lora" if lora else "separate"}.get(config.ppo.critic, config.ppo.critic)
    if kind == "lora" and not lora:
        raise UsageError("ppo.critic lora: the policy has no frozen base; set lora.r, or choose separate or shared")
    if start == "kept":
        return _kept(policy, kind, config)
    if kind == "shared":
        shared = SharedValueModel(policy)
        if lora:
            _own_adapter(shared)  # what could not be saved at the end is refused now
        return shared
    near = reward is not None and (kind == "separate" or shares_base(reward, policy))
    start = {"auto": "reward_trunk" if near else "policy"}.get(start, start)
    if start != "policy" and not near:
        raise UsageError(
            f"ppo.value_init {start}: the reward model is no adapter on the policy's base; choose policy, or "
            f"--ppo.critic separate"
        )
    source: Any = policy if start == "policy" else reward
    if kind == "separate":
        return _separate(source, zero_head=start != "reward_model")
    return _on_base(source, policy, zero_head=start != "reward_model")


def _kept(policy: CausalLM, kind: str, config: Any) -> ValueModel:
    """The value model that PPO left beside the policy, trained on."""
    folder = Path(config.model.path) / VALUE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; only train_ppo.py leaves one, choose another ppo.value_init")
    beside = policy if TRAINED in adapters(policy) else None
    found = open_model(folder, load_value_model, loading_device(config.run), beside=beside)
    if kind == "separate":
        return _separate(found, zero_head=False)
    if kind == "lora":
        if not shares_base(found, policy):
            raise CheckpointError(f"{folder}: no adapter on the policy's base; choose --ppo.critic separate")
        return _on_base(found, policy, zero_head=False)
    shared = SharedValueModel(policy)
    shared.score.load_state_dict((_score(found, LOADED) if adapters(found) else found.score).state_dict())
    return shared


def _on_base(source: Any, policy: CausalLM, *, zero_head: bool) -> ValueModel:
    """A copy of the source's adapter, on the trunk of the policy."""
    value = ValueModel(policy.trunk, rng=generator(0, "head"))
    copy_adapter(source, next(iter(adapters(source))), TRAINED, to=value)
    if zero_head:
        nn.init.zeros_(_score(value, TRAINED).weight)
    return adapter_view(value, TRAINED)


def shares_base(model: ScalarModel, policy: CausalLM) -> bool:
    """Whether two models hold the same tensors."""
    return model.trunk.embed.weight is policy.trunk.embed.weight


def _separate(source: Any, *, zero_head: bool) -> ValueModel:
    """A value model with weights of its own; what an adapter added is in them."""
    source = copy.deepcopy(source)
    fill(source, {})
    for name in [] if _is_meta(source) else list(adapters(source)):
        if "head" in (layers := get_adapter(source, name).layers):  # a value model has none
            del layers["head"]
        merge_adapter(source, name)
    value = ValueModel(source.trunk, rng=generator(0, "head"))
    if zero_head:
        nn.init.zeros_(value.score.weight)
    else:
        value.score.load_state_dict(source.score.state_dict())
    return value.requires_grad_(True)


def _own_adapter(model: SharedValueModel) -> ValueModel:
    """The policy's adapter with the head on top, as an adapter of its own."""
    value = _on_base(model.policy, model.policy, zero_head=False)
    with torch.no_grad():
        _score(value, TRAINED).weight.copy_(model.score.weight)
    return value


def _score(model: ValueModel, name: str) -> nn.Linear:
    """The head that an adapter of the value model holds."""
    return get_adapter(model, name).by_path()["score"].module  # type: ignore[return-value]
