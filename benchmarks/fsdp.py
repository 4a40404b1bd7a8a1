"""A training step under `mini` against torch's `fully_shard`, on the same rows, in turns in the same processes.

    torchrun --nproc_per_node 2 benchmarks/fsdp.py                      GPT-2 small on two CPU ranks
    python benchmarks/fsdp.py                                           one rank: what sharding costs for nothing
    python benchmarks/fsdp.py --device cuda --dtype bf16 --size llama-1b --rows 16 --length 1024

Ratios above 1: mini is faster. A step takes as long as its slowest rank. FLOP utilisation counts 6 P per token and
12 L C T for attention (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), against the products measured before.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from paired import ceilings

from minirlhf import dist
from minirlhf.engine import Engine
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.optim import adamw
from minirlhf.rollout import target_stats

SIZES = {
    "gpt2": ModelConfig("gpt2", 50257, 12, 12, 768, 1024),
    "tiny": ModelConfig("gpt2", 1000, 4, 4, 128, 1024),
    "llama-1b": ModelConfig("llama", 32000, 22, 32, 2048, 2048, n_kv_head=4, d_inner=5632),
}

CLOCKS = ("wall", "cpu")


def trainer(kind, config, a):
    """A function that takes one step."""
    torch.manual_seed(0)
    run = SimpleNamespace(engine=kind, device=a.device, dtype=a.dtype, checkpoint_activations=a.checkpoint)
    model = CausalLM(config, rng=torch.Generator().manual_seed(0))
    engine = Engine(run, [model])
    optimizer = adamw(model.named_parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    ids = torch.randint(config.vocab_size, (a.rows, a.length), device=a.device)
    real = torch.ones_like(ids, dtype=torch.bool)

    def step():
        with engine.precision():
            stats = target_stats(model, ids, real, ids[:, 1:])
        (-stats["logprobs"].sum() / ids.numel()).backward()
        norm = engine.clip(model, 1.0)
        optimizer.step()
        costs["state"] = state_bytes(model, optimizer)
        optimizer.zero_grad(set_to_none=True)
        costs["traffic"] = dict(vars(engine.of[model].traffic)) if kind == "mini" else {}
        return norm

    costs: dict = {}
    return step, costs


def state_bytes(model, optimizer):
    """Weights, gradients and moments of this rank; a storage that several tensors share counts once."""
    tensors = [x for p in model.parameters() for x in (p, p.grad, *optimizer.state[p].values()) if x is not None]
    local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors if x.ndim]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local}.values())


def seconds(step, device):
    """Wall clock and this rank's CPU; (2,), each the largest of all ranks."""
    dist.all_sum(torch.zeros(1))
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return dist.all_max(torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rows", type=int, default=2, help="per rank")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--rivals", default="torch,none")
    parser.add_argument("--checkpoint", action="store_true")
    a = parser.parse_args()
    dist.start(a.device)
    config = SIZES[a.size]
    names = ["mini", *a.rivals.split(",")]
    rate = 0.0
    if dist.rank() == 0:
        rate = ceilings((torch.bfloat16 if a.dtype == "bf16" else torch.float32,)).popitem()[1]
    made = {name: trainer(name, config, a) for name in names}
    steps = {name: step for name, (step, _) in made.items()}
    norms = {name: float(step()) for name, step in steps.items()}  # also the warm-up
    costs = {name: dict(cost) for name, (_, cost) in made.items()}  # of this first step
    assert max(norms.values()) <= min(norms.values()) * (1.05 if a.dtype == "bf16" else 1.0001), norms
    found = {name: [] for name in names}
    for i in range(a.pairs):
        for name in names[:: 1 if i % 2 == 0 else -1]:
            found[name].append(seconds(steps[name], a.device).tolist())
    if dist.rank() != 0:
        return
    P = sum(p.numel() for p in CausalLM(config).parameters())
    flops = (6 * P + 12 * config.n_layer * config.d_model * a.length) * a.rows * a.length
    print(
        f"{a.size}, {P / 1e6:.0f} M parameters, {dist.world_size()} ranks, {a.rows} x {a.length} tokens each, {a.dtype}"
    )
    for name in names:
        wall = statistics.median(x[0] for x in found[name])
        ratios = [sorted(b[k] / o[k] for o, b in zip(found["mini"], found[name], strict=True)) for k in (0, 1)]
        words = [
            f"{w} {statistics.median(r):.3f} [{r[0]:.2f}, {r[-1]:.2f}]" for w, r in zip(CLOCKS, ratios, strict=True)
        ]
        print(f"{name:6} {wall:8.3f} s  utilisation {flops / wall / rate:5.1%}  ratio to mini: {', '.join(words)}")
        print(f"{'':6} weights, gradients and moments of rank 0: {costs[name]['state'] / 2**20:.1f} MiB")
    traffic = costs["mini"]["traffic"]
    print(f"mini, a step of rank 0: {', '.join(f'{k} {v:,}' for k, v in traffic.items())}")


if __name__ == "__main__":
    main()
    dist.stop()
