"""What a stage will take of memory, told before it takes any: `--run.dry_run true`.

The models are those of the stage, made by the same code on torch's device "meta", which has shapes and no memory. So
nothing is read but headers, and nothing is written. Figures are of one process without sharding. Not counted: what all
activations of a backward pass take together, which `run.checkpoint_activations` and the microbatch decide.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from minirlhf import review_world, stage
from minirlhf.adapt import reward_model, sft_model
from minirlhf.architecture import ModelConfig
from minirlhf.data import encode_lists, encode_pairs, encode_sft
from minirlhf.ops import tiles

FP32 = 4  # bytes of master weights, gradients, moments, key/value cache, statistics


# ---- formulas -------------------------------------------------------------------------------------------------------


def held_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the storages behind tensors, each once; those in `seen` are held by another already."""
    fresh = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors) if s._cdata not in seen}
    seen.update(fresh)
    return sum(fresh.values())


def gradient_bytes(trained: Sequence[nn.Parameter]) -> int:
    """A gradient has the shape and type of its parameter."""
    return sum(p.numel() * p.element_size() for p in trained)


def optimizer_bytes(trained: Sequence[nn.Parameter]) -> int:
    """AdamW's two moments, and a step count for every tensor."""
    return sum(2 * p.numel() * p.element_size() + FP32 for p in trained)


def cache_bytes(config: ModelConfig, rows: int, tokens: int, size: int = FP32) -> int:
    """Keys and values: 2 · L · B · H_kv · T · D numbers."""
    return 2 * config.n_layer * rows * config.n_kv_head * tokens * config.head_dim * size


def activation_bytes(
    config: ModelConfig,
    rows: int,  # b sequences of one forward
    tokens: int,  # T tokens of the longest
    size: int = FP32,  # bytes of a number
    *,
    masked: bool = True,  # padding on the left, or several texts in a row
) -> dict[str, int]:
    """The large tensors of a forward, by name; every other one is smaller than one of these."""
    c, N = config, rows * tokens
    attention = max(c.n_head * c.head_dim, c.n_kv_head * c.head_dim) * (3 if c.qkv != "split" else 1)
    found = {"hidden state": N * c.d_model * size, "attention": N * attention * size, "MLP": N * c.d_inner * size}
    square = rows * tokens * tokens
    if c.position == "alibi":
        return found | {"ALiBi bias": square * c.n_head * FP32}
    windowed = c.sliding_window is not None and c.sliding_window < tokens
    return found | ({"mask": square * size} if masked or windowed else {})


def head_bytes(config: ModelConfig, positions: int, device: str = "cpu") -> int:
    """The logits that `head_stats` holds at once: of n positions against v tokens."""
    rows, cols = next(tiles(positions, config.vocab_size, config.d_model, device))
    return (rows.stop - rows.start) * (cols.stop - cols.start) * FP32


# ---- the stages -----------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What decides the activations of a stage."""

    models: dict[str, Any]  # by role; the first to hold a tensor is the one it is counted for
    rows: int  # sequences of one forward of the update
    tokens: int  # of the longest
    targets: int = 0  # of each row, tokens whose log-prob is asked for
    answers: int = 0  # drawn at once
    prompts: tuple[int, int] = (0, 0)  # distinct ones among them, and tokens of the longest
    packed: bool = False  # several texts in a row of the update


def sft_sizes(config: Any, run: Any) -> Sizes:
    """One model; its longest sequence is that of the data, or a packed row."""
    c = config
    records, _ = stage.sft_records(c, run)
    loaded = stage.load_or_make(c, records)
    model = sft_model(loaded.model, c)
    room = stage.max_length(c, loaded)
    examples, _ = encode_sft(records, loaded.tokenizer, loaded.template, room)
    longest = room if c.sft.pack else max(len(example.ids) for example in examples)
    return Sizes({"model": model}, c.sft.microbatch_size, longest, targets=longest - 1, packed=c.sft.pack)


def rm_sizes(config: Any, run: Any) -> Sizes:
    """The model that the reward model starts from stays beside it."""
    c = config
    loaded = stage.load_policy(c)
    models = {"reward model": reward_model(loaded.model, c), "model.path": loaded.model}
    if not c.data.path:
        return _judged(c, loaded, models, c.rm.microbatch_size)
    records, _ = stage.ranked_records(c, run, loaded, loss=c.rm.loss)
    longest = stage.max_length(c, loaded)
    lists, _ = encode_lists(records, loaded.tokenizer, loaded.template, longest)
    sizes = Sizes(models, c.rm.microbatch_size, max(len(s) for one in lists for s in one.sequences))
    if not c.rm.normalize:
        return sizes
    new = c.sample.max_new_tokens
    asked = (len(loaded.template.prompt_ids(loaded.tokenizer, record.prompt)) for record in records)
    prompt = max((n for n in asked if n + new <= longest), default=0)
    return sizes._replace(tokens=max(sizes.tokens, prompt + new), answers=stage.OWN, prompts=(stage.OWN, prompt))


def ppo_sizes(config: Any, run: Any) -> Sizes:
    """Four roles; the longest prompt with the longest answer."""
    c = config
    roles, loaded, _ = stage.ppo_roles(c)
    _, prompts = stage.ppo_prompts(c, run, loaded)
    models = {"policy": roles.policy, "reference": roles.ref_policy, "value model": roles.value_model,
              "reward model": roles.reward_model}  # fmt: skip
    models = {role: model for role, model in models.items() if model is not None}
    longest, new = max(map(len, prompts)), c.sample.max_new_tokens
    distinct = min(len({tuple(ids) for ids in prompts}), c.ppo.rollout_size // c.ppo.answers_per_prompt)
    return Sizes(models, c.ppo.microbatch_size, longest + new, new, c.ppo.rollout_size, (distinct, longest))


TRAINED = ("model", "policy", "value model", "reward model")  # the roles; PPO's reward model has no gradients


def dpo_sizes(config: Any, run: Any) -> Sizes:
    """One model, which is also its own reference before the first step."""
    c = config
    loaded = stage.load_policy(c)
    model = sft_model(loaded.model, c)
    if not c.data.path:
        return _judged(c, loaded, {"model": model}, 2 * c.dpo.microbatch_size)
    records, _ = stage.ranked_records(c, run, loaded)
    pairs, _ = encode_pairs(records, loaded.tokenizer, loaded.template, stage.max_length(c, loaded))
    longest = max(len(e.ids) for pair in pairs for e in pair)
    return Sizes({"model": model}, 2 * c.dpo.microbatch_size, longest, longest - 1)


def _judged(config: Any, loaded: stage.Loaded, models: dict[str, Any], rows: int) -> Sizes:
    """In the built-in task the answers are yet to be drawn, from all of its prompts at once."""
    _, prompts, _ = stage.with_room(config, loaded, review_world.prompts(config.data.language))
    longest, new = max(map(len, prompts)), config.sample.max_new_tokens
    return Sizes(models, rows, longest + new, 0, 2 * stage.JUDGED, (len(prompts), longest))


STAGES = {"sft": sft_sizes, "rm": rm_sizes, "ppo": ppo_sizes, "dpo": dpo_sizes}


# ---- the answer -----------------------------------------------------------------------------------------------------


def dry_run(config: Any, name: str) -> str:
    """The table of one script."""
    device = config.run.device.split(":")[0]
    sizes = STAGES[name](replace(config, run=replace(config.run, device="meta", engine="none")), stage.unheard())
    table = role_bytes(sizes.models)
    architecture = next(iter(sizes.models.values())).config
    size = 2 if config.run.dtype == "bf16" else FP32
    cache = cache_bytes(architecture, sizes.answers, sizes.tokens, FP32 if device == "cpu" else size)
    where, largest = largest_activation(architecture, sizes, size, device)
    total = [sum(column) for column in zip(*table.values(), strict=True)]
    rows = {role: [f"{n:,}" for n in row] for role, row in (table | {"total": total}).items()}
    rows |= {"rollout cache": [f"{cache:,}"], "largest activation": [f"{largest:,}", f"({where})"]}
    rows |= {"all of these": [f"{sum(total) + cache + largest:,}"]}
    head = ["weights", "gradients", "optimizer"]
    lines = [name.ljust(20) + "  ".join(x.rjust(18) for x in row) for name, row in ({"bytes": head} | rows).items()]
    return "\n".join(lines)


def role_bytes(models: Mapping[str, nn.Module]) -> dict[str, list[int]]:
    """Role → bytes of weights, gradients and optimizer state; a tensor of two roles is counted for the first."""
    seen: set[int] = set()
    table = {}
    for role, model in models.items():
        trained = [p for p in model.parameters() if p.requires_grad and role in TRAINED]
        table[role] = [held_bytes(model.parameters(), seen), gradient_bytes(trained), optimizer_bytes(trained)]
    return table


def largest_activation(config: ModelConfig, sizes: Sizes, size: int, device: str) -> tuple[str, int]:
    """Its name and bytes, in the update or in sampling."""
    update = activation_bytes(config, sizes.rows, sizes.tokens, size, masked=sizes.packed)
    found = {f"{name}, update": n for name, n in update.items()}
    if any(vars(getattr(model, "head", model)).get("adapter") for model in sizes.models.values()):
        found["head under its adapter, update"] = config.vocab_size * config.d_model * FP32  # and its gradient
    if sizes.targets:
        found["logits, update"] = head_bytes(config, sizes.rows * sizes.targets, device)
    if sizes.answers:
        found |= {f"{name}, prompts": n for name, n in activation_bytes(config, *sizes.prompts, size).items()}
        found["logits, sampling"] = sizes.answers * config.vocab_size * FP32  # of the token that is being drawn
    return max(found.items(), key=lambda item: item[1])
