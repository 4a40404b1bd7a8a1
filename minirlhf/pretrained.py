"""Hugging Face model folders ↔ our models."""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minirlhf.errors import CheckpointError
from minirlhf.families import FAMILIES
from minirlhf.heads import RewardModel, ScalarModel, ValueModel
from minirlhf.hf_config import SPECIAL, parse_config, render_config
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.safefile import TensorFile, read_json, write_tensors

Model = TypeVar("Model", CausalLM, RewardModel, ValueModel)


def load_causal_lm(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CausalLM:
    """A language model, in evaluation mode."""
    return _load(CausalLM, Path(path), dtype, device)


def load_reward_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """A reward model: a folder of AutoModelForSequenceClassification with one label; in evaluation mode."""
    return _load(RewardModel, Path(path), dtype, device)


def load_value_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ValueModel:
    """A value model, in evaluation mode."""
    return _load(ValueModel, Path(path), dtype, device)


def read_config(path: str | Path) -> ModelConfig:
    """The architecture a folder's config.json describes."""
    file = Path(path) / "config.json"
    return parse_config(read_json(file), file)


def _load(kind: type[Model], folder: Path, dtype: torch.dtype, device: torch.device | str) -> Model:
    config = read_config(folder)
    files = [TensorFile(p) for p in sorted(folder.glob("*.safetensors"))]
    stored = {name: file for file in files for name in file.entries}
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device=device)
    if isinstance(model, CausalLM):
        model.tie()
    prefix = FAMILIES[config.family].prefix
    with torch.no_grad():
        for name, tensor in theirs(model).items():
            key = name if name in stored else name.removeprefix(prefix)
            if key not in stored:
                raise CheckpointError(f"{folder}: no tensor {name!r}")
            stored[key].read(key, tensor)
    return model.eval()


def theirs(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under the name and in the shape of the family's files; transposed views, not copies."""
    config: ModelConfig = model.config  # type: ignore[assignment]
    found = {}
    for ours, name in model.module_names().items():  # type: ignore[operator]
        module = model.get_submodule(ours)
        if ours == "head" and config.tied:
            continue
        for part, tensor in module.named_parameters(recurse=False):
            flip = config.family == "gpt2" and isinstance(module, nn.Linear) and ours.startswith("trunk.blocks.")
            found[f"{name}.{part}"] = tensor.data.T if flip and part == "weight" else tensor.data
    return found


def save_pretrained(model: CausalLM | ScalarModel, path: str | Path, *, tokenizer: Any = None) -> None:
    """A folder that transformers loads as it is."""
    folder, config = Path(path), model.config
    family = FAMILIES[config.family]
    folder.mkdir(parents=True, exist_ok=True)
    raw = render_config(config)
    if isinstance(model, CausalLM):
        raw["architectures"] = [family.lm_class]
    else:
        value = isinstance(model, ValueModel)
        raw["architectures"] = ["MiniRLHFValueModel" if value else family.score_class]
        raw["minirlhf_head"] = "value" if value else "reward"
        raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if tokenizer is not None:
        tokenizer.save(folder)
        ids = {key: getattr(tokenizer, key.replace("_token", ""), None) for key in SPECIAL}
        raw |= {key: value for key, value in ids.items() if value is not None}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    write_tensors(folder / "model.safetensors", theirs(model))
    raw["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
