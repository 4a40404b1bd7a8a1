"""Sharded training against the same training in one process, in plain torch: the weights after ten steps."""

from functools import cache

import pytest
import torch
from ranks import on_ranks
from torch import nn

from minirlhf import dist
from minirlhf.fsdp import shard
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.lora import LoRAConfig, adapter_view, add_adapter
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.ops import token_logprobs
from minirlhf.optim import parameter_groups
from minirlhf.prepared import prepared

STEPS, ROWS, T, V = 10, 9, 8, 17
DTYPES = (torch.float64, torch.float32)
MAX_NORM = 0.02  # clipping acts in every step


def build(case, dtype):
    """A model with sizes that no W divides: (17, 10) embedding, inner width 29."""
    family = {"llama": "llama", "bloom": "bloom"}.get(case, "gpt2")
    config = ModelConfig(family, V, 3, 2, 10, T, head_dim=4, d_inner=29, tied=case != "untied")
    rng = torch.Generator().manual_seed(1)
    if case == "value":
        model = ValueModel(config, rng=rng)
    elif case == "reward":
        model = RewardModel(config, rng=rng)
    else:
        model = CausalLM(config, rng=rng)
    if case == "unused":
        model.extra = nn.Parameter(torch.ones(3))
        model.trunk.blocks[1].extra = nn.Parameter(torch.ones(5, 2))
    if case == "lora":
        add_adapter(model, "policy", LoRAConfig(r=2, alpha=4, targets="all-linear"), rng=rng)
        for layer in model.adapters["policy"].by_path().values():
            nn.init.normal_(layer.B, std=0.1, generator=rng)
        model = adapter_view(model, "policy")
    if case == "half frozen":
        for block in model.trunk.blocks[:2]:
            block.attn.requires_grad_(False)
        model.trunk.blocks[0].requires_grad_(False)
    return model.to(dtype).eval()


def data(step, dtype):
    rng = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(V, (ROWS, T), generator=rng)
    lengths = torch.randint(2, T + 1, (ROWS, 1), generator=rng)
    weight = torch.randn(ROWS, T, generator=rng, dtype=torch.float64).to(dtype)
    return ids, torch.arange(T) < lengths, weight


def loss_of(model, ids, mask, weight):
    """A sum over rows, divided by the count of all rows' tokens elsewhere."""
    if isinstance(model, RewardModel):
        return (model(ids, mask) * weight[:, 0]).sum()
    if isinstance(model, ValueModel):
        return torch.where(mask, (model(ids, mask) - weight) ** 2, 0).sum()
    logprobs = token_logprobs(model(ids[:, :-1], mask[:, :-1]), ids[:, 1:])
    return -torch.where(mask[:, 1:], logprobs, 0).sum()


def train(model, optimizer, clip, microbatches, dtype, steps=range(STEPS)):
    """The loop; each rank has its rows."""
    norms = []
    for step in steps:
        ids, mask, weight = data(step, dtype)
        n = mask.sum()
        mine = torch.arange(ROWS)[dist.rank() :: dist.world_size()]
        for rows in mine.tensor_split(microbatches):
            (loss_of(model, ids[rows], mask[rows], weight[rows]) / n).backward()
        norms.append(float(clip()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms


def adamw(model):
    """With eps above the rounding of gradients that are 0 in exact numbers (key biases), which Adam would blow up."""
    return torch.optim.AdamW(parameter_groups(model.named_parameters(), 0.1), lr=1e-2, eps=1e-5, fused=True)


def plain(case, dtype, microbatches=1):
    """The truth: torch alone."""
    model = build(case, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]

    def clip():
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return nn.utils.clip_grad_norm_(trained, MAX_NORM)

    norms = train(model, adamw(model), clip, microbatches, dtype)
    assert min(norms) > MAX_NORM
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def sharded(case, dtype, microbatches, checkpoint):
    """The same with `fsdp.shard`, on each rank."""
    model = build(case, dtype)
    (s,) = shard([model], checkpoint=checkpoint)
    norms = train(model, adamw(model), lambda: s.clip(MAX_NORM), microbatches, dtype)
    return whole(s), norms


def whole(s, pick=lambda p: p):
    return {name: x.clone().numpy() for name, x in s.full(pick)}


def distance(found, expected):
    assert found.keys() == expected.keys()
    return max(float((torch.from_numpy(found[k]) - expected[k]).abs().max()) for k in expected)


CASES = ["tied", "untied", "llama", "bloom", "value", "reward", "unused", "lora", "half frozen"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_rank_is_the_plain_model_bit_for_bit(case, checkpoint):
    expected, norms = plain(case, torch.float32, 2)
    weights, found = sharded(case, torch.float32, 2, checkpoint)
    assert distance(weights, expected) == 0
    assert found == norms


def every_case():
    found = {}
    for case in CASES:
        for dtype in DTYPES[: 2 if case in ("tied", "lora", "value") else 1]:
            found[case, str(dtype)] = sharded(case, dtype, 2 if dist.world_size() < 4 else 1, dist.world_size() > 2)
    return found


@cache
def on_world(world):
    return on_ranks(world, every_case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_agree_with_one_process(case, world):
    for dtype, tolerance in zip(DTYPES, (1e-12, 1e-5), strict=True):
        expected, norms = plain(case, dtype)
        for found in on_world(world):
            weights, found_norms = found.get((case, str(dtype)), (None, None))
            if weights is None:
                continue
            assert distance(weights, expected) <= tolerance
            assert found_norms == pytest.approx(norms, rel=1e-9 if dtype == torch.float64 else 1e-4)


# ---- what it costs --------------------------------------------------------------------------------------------------


def counted(case, dtype, checkpoint):
    """Traffic and memory of one step with two microbatches."""
    model = build(case, torch.float32)
    (s,) = shard([model], dtype=dtype, checkpoint=checkpoint)
    optimizer = adamw(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        train(model, optimizer, lambda: s.clip(MAX_NORM), 2, torch.float32, steps=range(1))
    held = sum(p.nbytes for p in model.parameters())
    held += sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.ndim)
    return vars(s.traffic), held, s.root.elements, [unit.elements for unit in s.blocks]


def groups_of(model, dtype):
    """By hand: the elements of each group, as (in the root, trained, bytes of an element on the wire)."""
    found = {}
    for name, p in model.named_parameters():
        unit = name.split(".")[2] if name.startswith("trunk.blocks.") else "root"
        low = dtype is not None and unit != "root" and "norm" not in name
        found.setdefault((unit, p.requires_grad, 2 if low else 4), []).append(p.numel())
    return {key: sum(sizes) for key, sizes in found.items()}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("case", "dtype", "checkpoint"), [
    ("tied", None, False), ("tied", None, True), ("lora", None, False), ("tied", torch.bfloat16, False),
    ("half frozen", torch.bfloat16, True),
])  # fmt: skip
def test_bytes_on_the_wire_are_the_formula(case, dtype, checkpoint, world):
    groups = groups_of(build(case, torch.float32), dtype)
    gathers = gathered = reductions = reduced = 0
    for (unit, trains, size), elements in groups.items():
        n = -(-elements // world)
        # The root once; a block in the forward and in the backward pass.
        times = 1 if unit == "root" else 2
        gathers, gathered = gathers + times, gathered + times * (world - 1) * n * size
        if trains:
            reductions, reduced = reductions + 1, reduced + (world - 1) * n * 4
    for traffic, *_ in on_ranks(world, counted, case, dtype, checkpoint):
        assert traffic["gathers"] == 2 * gathers  # two microbatches
        assert traffic["gathered_bytes"] == 2 * gathered
        assert traffic["reductions"] == 2 * reductions
        assert traffic["reduced_bytes"] == 2 * reduced


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_rank_holds_its_share_and_never_more_than_two_blocks(world):
    for traffic, _, root, blocks in on_ranks(world, counted, "tied", None, False):
        assert traffic["live"] == 0
        assert root < traffic["peak"] <= root + 2 * max(blocks)


def big(world):
    """State of a model in which the rounding of shares to whole elements is small."""
    config = ModelConfig("gpt2", 517, 3, 2, 50, T, d_inner=203)
    model = CausalLM(config, rng=torch.Generator().manual_seed(1))
    total = 12 * sum(p.numel() for p in model.parameters())  # weights and two moments
    (s,) = shard([model])
    optimizer = adamw(model)
    ids = torch.arange(2 * T).view(2, T)
    loss_of(model, ids, torch.ones_like(ids, dtype=torch.bool), None).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters())
    optimizer.step()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for p in model.parameters() for x in (p, *optimizer.state[p].values()) if x.ndim}  # fmt: skip
    return sum(storages.values()) / total, gradients * 3 / total, s.traffic.live


@pytest.mark.parametrize("world", [2, 3, 4])
def test_state_per_rank_is_its_share(world):
    for share, gradients, live in on_ranks(world, big, world):
        assert abs(share - 1 / world) <= 0.01
        assert abs(gradients - 1 / world) <= 0.01
        assert live == 0


# ---- whole again ----------------------------------------------------------------------------------------------------


def saved(case, steps):
    """Weights and moments after some steps, whole."""
    model = build(case, torch.float64)
    (s,) = shard([model])
    optimizer = adamw(model)
    train(model, optimizer, lambda: s.clip(MAX_NORM), 1, torch.float64, steps=steps)
    return whole(s), {k: whole(s, lambda p, k=k: optimizer.state.get(p, {}).get(k)) for k in ("exp_avg", "exp_avg_sq")}


def resumed(case, weights, moments, steps):
    model = build(case, torch.float64)
    (s,) = shard([model])
    optimizer = adamw(model)
    for p in model.parameters():
        if p.requires_grad:
            optimizer.state[p] = {"step": torch.tensor(float(steps[0]))}
            optimizer.state[p] |= {k: torch.zeros_like(p) for k in moments}
    with torch.no_grad():
        s.put(lambda p: p, {k: torch.from_numpy(x) for k, x in weights.items()})
        for kind, found in moments.items():
            s.put(
                lambda p, k=kind: optimizer.state.get(p, {}).get(k), {k: torch.from_numpy(x) for k, x in found.items()}
            )
    assert all((whole(s)[k] == weights[k]).all() for k in weights)
    train(model, optimizer, lambda: s.clip(MAX_NORM), 1, torch.float64, steps=steps)
    return whole(s)


@pytest.mark.parametrize("case", ["tied", "lora"])
def test_what_is_saved_on_two_ranks_goes_on_at_any_number(case):
    weights, moments = on_ranks(2, saved, case, range(5))[0]
    trained = [k for k, p in build(case, torch.float64).named_parameters() if p.requires_grad]
    assert moments["exp_avg"].keys() == moments["exp_avg_sq"].keys() == set(trained)
    expected, _ = plain(case, torch.float64)
    for world in (1, 3):
        for found in on_ranks(world, resumed, case, weights, moments, range(5, STEPS)):
            assert distance(found, expected) <= 1e-12


def looked_at(case):
    """Logits inside `gathered` between steps, with ranks that run unequally often; modules can be stood in for."""
    model = build(case, torch.float64)
    (s,) = shard([model])
    optimizer, logits = adamw(model), []
    ids, mask, _ = data(0, torch.float64)
    for step in range(3):
        train(model, optimizer, lambda: s.clip(MAX_NORM), 1, torch.float64, steps=range(step, step + 1))
        with s.gathered():
            before = s.traffic.gathers
            for _ in range(1 + dist.rank()):
                found = model(ids, mask)
            assert not found.requires_grad
            assert s.traffic.gathers == before
            trunk = prepared(model, 1, 1).trunk
            assert not any(isinstance(part, nn.Module) for part in (trunk, *trunk.blocks))
            with torch.enable_grad(), pytest.raises(AssertionError, match="gradients outside"):
                model(ids, mask)
        assert prepared(model, 1, 1).trunk is model.trunk
        assert s.traffic.live == 0
        logits.append(found.numpy())
    return logits


@pytest.mark.parametrize("case", ["tied", "lora"])
def test_gathered_weights_are_the_newest_and_need_no_collectives(case):
    expected = on_ranks(1, looked_at, case)[0]
    for found in on_ranks(2, looked_at, case):
        for ours, theirs in zip(found, expected, strict=True):
            assert abs(ours - theirs).max() <= 1e-12


def roles(checkpoint):
    """Policy, reference and value adapter on one base: losses of two roles, one backward pass."""
    base = build("tied", torch.float64)
    rng = torch.Generator().manual_seed(3)
    for name in ("policy", "value"):
        add_adapter(base, name, LoRAConfig(r=2, alpha=4, targets="all-linear"), rng=rng)
        for layer in base.adapters[name].by_path().values():
            nn.init.normal_(layer.B, std=0.1, generator=rng)
    policy, reference, value = (adapter_view(base, name) for name in ("policy", None, "value"))
    s = shard([policy, reference, value], checkpoint=checkpoint)
    bases = {p.data_ptr() for m in (policy, reference, value) for p in m.trunk.parameters() if p.numel()}
    ids, mask, _ = data(0, torch.float64)
    ids, mask = ids[dist.rank() :: dist.world_size()], mask[dist.rank() :: dist.world_size()]
    with s[1].gathered():
        reference(ids, mask)
    (loss_of(policy, ids, mask, None) + 2 * loss_of(value, ids, mask, None)).backward()
    gradients = [whole(x, lambda p: p.grad) for x in (s[0], s[2])]
    return gradients, len(bases), s[0].traffic.live


def test_roles_share_a_base():
    ((expected, tensors, _),) = on_ranks(1, roles, False)
    assert all(abs(x).max() > 0 for found in expected for x in found.values())
    for found, here, live in (r for c in (False, True) for r in on_ranks(2, roles, c)):
        assert live == 0
        assert here <= tensors
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            assert max(abs(ours[k] - theirs[k]).max() for k in ours) <= 1e-12


def twice(kind):
    """Two forwards to a backward pass, twice before a step, as the reward model does it."""
    model = build("reward", torch.float32)
    s = shard([model])[0] if kind == "sharded" else None
    ids, mask, weight = data(0, torch.float32)
    for rows in (slice(0, 4), slice(4, 9)):
        parts = [loss_of(model, ids[rows][i::2], mask[rows][i::2], weight[rows][i::2]) for i in (0, 1)]
        (parts[0] * 3 + parts[1]).backward()
    picked = s.full(lambda p: p.grad) if s else ((name, p.grad) for name, p in model.named_parameters())
    return {name: x.numpy() for name, x in picked}


def test_two_forwards_to_a_backward_pass_add_as_autograd_adds():
    ours, theirs = twice("sharded"), twice("plain")
    assert all((ours[name] == x).all() for name, x in theirs.items())
