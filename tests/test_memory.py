"""What run.dry_run says against what is there: storages, gradients, moments, caches and the tensors of a real step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirlhf import memory
from minirlhf.generate import generate
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.lora import LoRAConfig, adapter_view, add_adapter
from minirlhf.model import Cache, CausalLM, ModelConfig
from minirlhf.optim import adamw
from minirlhf.rng import generator
from minirlhf.rollout import target_stats

SIZES = {"vocab_size": 50, "n_layer": 2, "n_head": 4, "d_model": 16, "max_seq_len": 64}
CASES = {  # what is largest
    "MLP": ("gpt2", {}),
    "MLP, gated": ("llama", {"n_kv_head": 2}),
    "attention": ("gpt2", {"d_inner": 16}),
    "split": ("llama", {"d_inner": 8, "n_kv_head": 2, "head_dim": 32}),
    "ALiBi bias": ("bloom", {"n_head": 8}),
    "hidden state": ("llama", {"d_model": 64, "d_inner": 8, "n_kv_head": 1, "head_dim": 2}),
    "mask": ("llama", {"d_inner": 8, "n_kv_head": 1, "head_dim": 2}),
    "logits": ("gpt2", {"vocab_size": 5000}),
}


def lm(family="gpt2", **sizes):
    return CausalLM(ModelConfig(family=family, **(SIZES | sizes)), rng=generator(0, "weights"))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, weights and their gradients apart."""

    def __init__(self, model):
        super().__init__()
        self.apart = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.ndim == 2}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.shape not in self.apart and 0 not in t.stride():
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return out


def take_a_step(model, targets=20, packed=True):
    """Forward, backward and AdamW on (5, 40), of two texts to a row or of one."""
    ids = torch.randint(50, (5, 40), generator=generator(0, "ids"))
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[0, -7:] = False
    texts = (torch.arange(40) > 30).long().expand(ids.shape) if packed else None
    optimizer = adamw(model.named_parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    with Largest(model) as seen:
        target_stats(model, ids, mask, ids[:, -targets:], texts=texts)["logprobs"].sum().backward()
    optimizer.step()
    return seen.bytes, optimizer


@pytest.mark.parametrize("name", CASES)
def test_largest_activation(name):
    family, sizes = CASES[name]
    model = lm(family, **sizes)
    told = memory.Sizes({"model": model}, 5, 40, targets=20, packed=True)
    where, largest = memory.largest_activation(model.config, told, 4, "cpu")
    assert where.removesuffix(", update") == {"MLP, gated": "MLP", "split": "attention"}.get(name, name)
    assert largest == take_a_step(model)[0]


@pytest.mark.parametrize(("sliding_window", "name"), [(None, "hidden state"), (40, "hidden state"), (39, "mask")])
def test_texts_alone_in_their_rows_need_a_mask_for_a_window_alone(sliding_window, name):
    model = lm("llama", d_inner=8, n_kv_head=1, head_dim=2, sliding_window=sliding_window)
    told = memory.Sizes({"model": model}, 5, 40, targets=20)
    where, largest = memory.largest_activation(model.config, told, 4, "cpu")
    assert where == f"{name}, update"
    assert largest == take_a_step(model, packed=False)[0]


def test_gradients_and_moments():
    model = lm()
    add_adapter(model, "a", LoRAConfig(r=2, alpha=2))
    for made in (lm(), lm("llama", tied=False), adapter_view(model, "a")):
        _, optimizer = take_a_step(made)
        trained = [p for p in made.parameters() if p.requires_grad]
        real = [p.grad for p in made.parameters() if p.grad is not None]
        assert memory.gradient_bytes(trained) == sum(g.untyped_storage().nbytes() for g in real)
        state = [t for s in optimizer.state.values() for t in s.values()]
        assert memory.optimizer_bytes(trained) == sum(t.untyped_storage().nbytes() for t in state)


def test_weights_are_counted_once():
    base = lm()
    plain = sum(p.numel() for p in base.parameters()) * 4  # tied: the head is the embedding
    reward, value = RewardModel(base.trunk, rng=generator(1, "r")), ValueModel.from_trunk(base.trunk)
    for owner in (base, reward):
        add_adapter(owner, "a", LoRAConfig(r=2, alpha=2))
    views = {"policy": adapter_view(base, "a"), "reference": adapter_view(base, None),
             "reward model": adapter_view(reward, "a"), "value model": value}  # fmt: skip
    table = memory.role_bytes(views)
    adapter = 4 * 2 * 2 * ((16 + 48) + (16 + 16) + 2 * (16 + 64))  # bytes · layers · r · (n_in + n_out)
    head = 16 * 4
    assert table["policy"] == [plain + adapter, adapter, 2 * adapter + 4 * 16]  # 16 matrices, a count each
    assert table["reference"] == [0, 0, 0]
    assert table["reward model"][0] == adapter + 2 * head  # its own, and the one it was made with
    trunk = plain + head
    assert table["value model"] == [trunk, trunk, 2 * trunk + 4 * len(list(value.parameters()))]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cache(family):
    config = lm(family, n_kv_head=2 if family == "llama" else 4, n_layer=3).config
    for dtype in (torch.float32, torch.bfloat16):
        cache = Cache(config, 7, 11, dtype=dtype)
        held = sum(t.untyped_storage().nbytes() for t in cache.keys + cache.values)
        assert memory.cache_bytes(config, 7, 11, dtype.itemsize) == held


def test_logits_of_sampling():
    model = lm(vocab_size=9001).eval()
    with Largest(model) as seen:
        generate(model, torch.ones(6, 3, dtype=torch.long), max_new_tokens=2, eos_token_id=None, pad_token_id=0,
                 rng=generator(0, "sample"))  # fmt: skip
    told = memory.Sizes({"model": model}, 1, 4, targets=1, answers=6, prompts=(1, 3))
    where, largest = memory.largest_activation(model.config, told, 4, "cpu")
    assert where == "logits, sampling"
    assert largest == 6 * 9001 * 4
    assert seen.bytes == 6 * 9024 * 4  # a distribution is summed in blocks of 64
