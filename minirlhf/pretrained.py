"""Hugging Face model folders ↔ our models: `config.json` and safetensors, single or in shards, read and written.

A folder is material from strangers: everything in it is checked before memory is taken, nothing of it is ever run, and
what does not fit is a CheckpointError that names the file. Tensors are read piece by piece into their final place, so
that loading holds the weights once. Not here: settings (`hf_config.py`), file formats (`safefile.py`), adapters.

Reward models are folders of AutoModelForSequenceClassification with one label. A value model is the same folder, marked
`"minirlhf_head": "value"` in config.json: its `score.weight` is read at every token. What goes wrong elsewhere: a model
without its head gets a random one in silence.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from minirlhf.architecture import ModelConfig
from minirlhf.errors import CheckpointError, UsageError
from minirlhf.families import FAMILIES
from minirlhf.heads import RewardModel, ScalarModel, ValueModel
from minirlhf.hf_config import SPECIAL, parse_config, render_config
from minirlhf.model import CausalLM
from minirlhf.safefile import FLOATS, TensorFile, read_json, read_json_if_there, shown, write_tensors

Model = TypeVar("Model", CausalLM, RewardModel, ValueModel)
Path_ = str | os.PathLike[str]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX, MAX_TOKENIZER = 16 << 20, 100 << 20  # bytes; the first also of the files beside tokenizer.json
LEAST = 6  # tensors in a layer
SHARD = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
BUFFERS = re.compile(r"(.+\.)?((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq)")  # constants of old files
SCORE, VALUE_CLASS = "score.weight", "MiniRLHFValueModel"


class Source(NamedTuple):
    """A tensor of the folder, or from some row on."""

    file: TensorFile
    name: str
    first: int = 0


# ---- reading --------------------------------------------------------------------------------------------------------


def load_causal_lm(path: Path_, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> CausalLM:
    """A language model, in evaluation mode."""
    return _load(CausalLM, Path(path), dtype, device)


def load_reward_model(
    path: Path_, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """A reward model, in evaluation mode, with the scores of its head: what rm.normalize found is in `minirlhf.json`,
    which `stage.load` reads, and so score.py, PPO and `score.reward_of` give normalized ones."""
    return _load(RewardModel, Path(path), dtype, device)


def load_value_model(
    path: Path_, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ValueModel:
    """A value model, in evaluation mode."""
    return _load(ValueModel, Path(path), dtype, device)


def holds_score(path: Path_) -> bool:
    """Whether a folder holds a reward or value model, by the names of its tensors."""
    return SCORE in _stored(Path(path), read_config(path))


def read_config(path: Path_) -> ModelConfig:
    """The architecture of a folder, its token ids checked against its tokenizer.json."""
    return _read_config(Path(path))[1]


def _read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not os.path.lexists(file):
        adapter = ", but an adapter: load its base, then the adapter" * (folder / "adapter_config.json").exists()
        raise CheckpointError(f"{file}: missing, so the folder is no model{adapter}")
    raw = read_json(file)
    config = parse_config(raw, file)
    _check_tokens(folder, raw, config)
    return raw, config


def _load(kind: type[Model], folder: Path, dtype: torch.dtype, device: torch.device | str) -> Model:
    """Checks names, shapes and dtypes against a model without memory; then takes the memory and reads."""
    assert dtype.is_floating_point, dtype
    raw, config = _read_config(folder)
    stored, where = _stored(folder, config), folder / (INDEX if (folder / INDEX).exists() else WEIGHTS)
    _check_kind(kind, raw, stored, where)
    if config.n_layer * LEAST > len(stored):
        raise CheckpointError(f"{where}: {len(stored)} tensors, too few for {config.n_layer} layers (config.json)")
    with torch.device("meta"):
        model = kind(config).to(dtype)
    sources = _sources(_theirs(model), stored, config, where, packed=raw["model_type"] == "baichuan")
    if torch.device(device).type == "meta":
        return model.eval()
    for name, child in model.named_children():
        if not (name == "head" and config.tied):
            child.to_empty(device=device)
    if isinstance(model, CausalLM):
        model.tie()
    for name, tensor in _theirs(model).items():
        file, stored_name, first = sources.pop(name)
        file.read(stored_name, tensor, first)
    for file, stored_name, _ in sources.values():  # a tied head that the files repeat
        if not file.same(stored_name, model.trunk.embed.weight):
            raise CheckpointError(
                f"{file.path}: {stored_name} differs from the embedding, to which config.json ties it"
            )
    return model.eval()


def _stored(folder: Path, config: ModelConfig) -> dict[str, Source]:
    """Every tensor of a folder, under its name without the prefix of the trunk; known constants left out."""
    family = FAMILIES[config.family]
    parts = family.prefix.split(".")[:-1]
    prefixes = [".".join(parts[i:]) + "." for i in range(len(parts))]
    found: dict[str, Source] = {}
    for file in _files(folder):
        for name in file.entries:
            short = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
            short = name if short in (f"{family.head}.weight", SCORE) else short
            if short in found:
                raise CheckpointError(f"{file.path}: {shown(name)} and {shown(found[short].name)} are the same tensor")
            if not BUFFERS.fullmatch(short):
                found[short] = Source(file, name)
    return found


def _files(folder: Path) -> list[TensorFile]:
    """The safetensors files of a folder; an index must list exactly what they hold."""
    single, index = folder / WEIGHTS, folder / INDEX
    if not os.path.lexists(index):
        if os.path.lexists(single):
            return [TensorFile(single)]
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise CheckpointError(f"{folder / pickles[0]}: pickle files are never opened; convert to safetensors")
        raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json(index, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not SHARD.fullmatch(file_name) or len(file_name) > 255:
            raise CheckpointError(f"{index}: {shown(name)} is not mapped to a plain *.safetensors name of this folder")
    names = sorted(set(weight_map.values()))
    if WEIGHTS not in names and os.path.lexists(single):
        raise CheckpointError(f"{index}: does not list {WEIGHTS}, which lies beside it; delete one of the two")
    files = [TensorFile(folder / name) for name in names]
    held = {(name, file.path.name) for file in files for name in file.entries}
    if held != set(weight_map.items()) or len(held) != len(weight_map):
        name, file_name = min(held ^ set(weight_map.items()))
        raise CheckpointError(f"{index}: index and files disagree about {shown(name)} in {file_name}")
    return files


def _check_kind(kind: type, raw: dict[str, Any], stored: dict[str, Source], where: Path) -> None:
    """The folder has the head that is asked for."""
    if kind is CausalLM:
        if SCORE in stored:
            raise CheckpointError(f"{where}: holds {SCORE}: a reward or value model, not a language model")
        return
    if SCORE not in stored:
        raise CheckpointError(f"{where}: has no head {SCORE}: no reward or value model; train_rm.py makes one")
    labels = len(raw["id2label"]) if isinstance(raw.get("id2label"), dict) else raw.get("num_labels", 1)
    if labels != 1:
        raise CheckpointError(f"{where}: {shown(labels)} labels by config.json; a reward model has one")
    if (kind is ValueModel) != (raw.get("minirlhf_head") == "value"):
        is_a, function = ("reward", "load_reward_model") if kind is ValueModel else ("value", "load_value_model")
        raise CheckpointError(f"{where}: by config.json a {is_a} model; load it with {function}")


def _theirs(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor to read or write under the family's name, without copies, in the shape of the family's files."""
    config: ModelConfig = model.config  # type: ignore[assignment]
    found = {}
    for ours, name in model.module_names().items():  # type: ignore[operator]
        module = model.get_submodule(ours)
        if ours == "head" and config.tied:
            continue
        for part, tensor in module.named_parameters(recurse=False):
            # GPT-2's files hold the matrices of the blocks as (in, out)
            flip = config.family == "gpt2" and part == "weight" and ".blocks." in ours and isinstance(module, nn.Linear)
            found[f"{name}.{part}"] = tensor.detach().T if flip else tensor.detach()
    return found


def _sources(
    wanted: dict[str, Tensor], stored: dict[str, Source], config: ModelConfig, where: Path, *, packed: bool
) -> dict[str, Source]:
    """Where each tensor comes from, after checking that names, shapes and dtypes are those config.json promises."""
    family = FAMILIES[config.family]
    if config.tied and f"{family.head}.weight" in stored:
        wanted = wanted | {f"{family.head}.weight": wanted[f"{family.prefix}{family.names['embed']}.weight"]}
    places = {name: _place(name.removeprefix(family.prefix), tensor, packed) for name, tensor in wanted.items()}
    missing = [name for name, place in places.items() if place[0] not in stored]
    if missing:
        raise CheckpointError(f"{where}: lacks {shown(missing[0])}{_more(missing)}, which config.json calls for")
    surplus = [stored[short].name for short in sorted(stored.keys() - {place[0] for place in places.values()})]
    if surplus:
        raise CheckpointError(f"{where}: {shown(surplus[0])}{_more(surplus)} is not in the model of config.json")
    found = {}
    for name, (short, first, rows) in places.items():
        file, stored_name, _ = stored[short]
        entry, shape = file.entries[stored_name], (rows, *wanted[name].shape[1:])
        if entry.shape != shape:
            raise CheckpointError(f"{file.path}: {shown(stored_name)} has shape {entry.shape}, by config.json {shape}")
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{file.path}: {shown(stored_name)} is {entry.dtype}, not one of {', '.join(FLOATS)}")
        found[name] = Source(file, stored_name, first)
    return found


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _place(name: str, tensor: Tensor, packed: bool) -> tuple[str, int, int]:
    """Name in the files, first row, and the rows that must be there; Baichuan packs q, k and v as blocks of rows."""
    match = re.fullmatch(r"(.*)\.([qkv])_proj\.weight", name) if packed else None
    if match is None:
        return name, 0, len(tensor)
    return f"{match[1]}.W_pack.weight", "qkv".index(match[2]) * len(tensor), 3 * len(tensor)


# ---- token ids ------------------------------------------------------------------------------------------------------


def _check_tokens(folder: Path, raw: dict[str, Any], config: ModelConfig) -> None:
    """tokenizer.json fits the embedding and holds every special token under each id that the folder states."""
    file = folder / "tokenizer.json"
    if not os.path.lexists(file):
        return
    ids = _vocabulary(file)
    held, largest = set(ids.values()), max(ids.values())
    if largest >= config.vocab_size:
        raise CheckpointError(f"{file}: token id {largest}, but the embedding has {config.vocab_size} rows")
    for name, spelling, stated in _stated_tokens(folder, raw):
        if spelling is not None and spelling not in ids:
            raise CheckpointError(f"{file}: does not hold {name} {shown(spelling)}, which the folder states")
        if spelling is not None and stated and ids[spelling] not in stated:
            raise CheckpointError(f"{file}: holds {name} {shown(spelling)} under {ids[spelling]}, not {shown(stated)}")
        for i in stated:
            if type(i) is not int or i not in held:
                raise CheckpointError(f"{file}: holds no token {shown(i)}, which the folder states as {name}")


def _stated_tokens(folder: Path, raw: dict[str, Any]) -> Iterator[tuple[str, str | None, list[Any]]]:
    """What a folder says of special tokens: name, spelling or None, ids that one file states, maybe none."""
    generation, tokens, special = (
        read_json_if_there(folder / name, MAX_INDEX)
        for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    )
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        for spelling in (_spelling(data.get(name)) for data in (tokens, special)):
            for ids in (data.get(f"{name}_id") for data in (raw, generation)):
                yield name, spelling, ids if isinstance(ids, list) else [] if ids is None else [ids]
    added = tokens.get("added_tokens_decoder")
    for key, token in added.items() if isinstance(added, dict) else ():
        yield "added token", _spelling(token), [int(key)] if key.isdecimal() and len(key) < 10 else [key]


def _vocabulary(file: Path) -> dict[str, int]:
    """Token → id of a tokenizer.json, added tokens included."""
    data = read_json(file, MAX_TOKENIZER)
    model, added = data.get("model"), data.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(vocab, list):  # Unigram: pairs of token and score
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        ids = dict(vocab or {}) | {entry["content"]: entry["id"] for entry in added}
    except (TypeError, KeyError, ValueError) as e:
        raise CheckpointError(f"{file}: has no readable vocabulary") from e
    if not ids or not all(type(token) is str and type(i) is int and i >= 0 for token, i in ids.items()):
        raise CheckpointError(f"{file}: has no readable vocabulary")
    return ids


def _spelling(token: object) -> str | None:
    """The text of a token, given plainly or as an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


# ---- writing --------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: CausalLM | ScalarModel,
    path: Path_,
    *,
    tokenizer: Any = None,
    stop_token_id: int | None = None,  # the token that ends an answer, where it is not the tokenizer's EOS
) -> None:
    """A folder that transformers loads as it is; with a tokenizer, its files and its ids of special tokens too.

    Of EOS it then says all that end an answer: those of a list that was loaded, the tokenizer's and the stop token.
    """
    folder, config = Path(path), model.config
    raw = render_config(config) | {"dtype": _dtype_name(model), "torch_dtype": _dtype_name(model)}
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise UsageError(f"{tokenizer.vocab_size} tokens, but the model's embedding has {config.vocab_size} rows")
        listed = config.eos_token_id if isinstance(config.eos_token_id, tuple) else ()
        raw |= {key: getattr(tokenizer, key.replace("_token", "")) for key in SPECIAL}
        ends = list(dict.fromkeys(i for i in (*listed, raw["eos_token_id"], stop_token_id) if i is not None))
        raw["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    if isinstance(model, CausalLM):
        raw["architectures"] = [FAMILIES[config.family].lm_class]
    else:
        value = isinstance(model, ValueModel)
        raw["architectures"] = [VALUE_CLASS if value else FAMILIES[config.family].score_class]
        raw |= {
            "minirlhf_head": "value" if value else "reward",
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # of another model's shards
        write_tensors(folder / WEIGHTS, _theirs(model))
        if tokenizer is not None:
            tokenizer.save(folder)
        if isinstance(model, CausalLM):
            _write_json(folder / "generation_config.json", {key: raw[key] for key in SPECIAL if raw[key] is not None})
        _write_json(folder / "config.json", raw)
    except OSError as e:
        raise CheckpointError(f"{e.filename or folder}: cannot be written ({e.strerror or e})") from e


def _dtype_name(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")
