"""The output layer's log-probs, forward and backward, against whoever else computes them.

    python benchmarks/head.py                             N 2048, C 768, V 50257 (GPT-2), frozen and trained head
    python benchmarks/head.py --vocab 250880 --rows 1536  BLOOM's vocabulary; memory is what counts
    --liger DIR: where `pip install --no-deps --target DIR liger-kernel` put it

Ratios above 1: ours is faster. Memory: what the process grows by, beyond inputs and their gradients.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from paired import ceilings, compare, extra_memory

from minirlhf.ops import head_stats

GOALS = {
    True: {"cross_entropy": 1.4, "liger": 2.0, "trl": 2.8},
    False: {"liger": 1 / 1.05},
}


def contenders(hidden, weight, targets, slopes, liger):
    """Name → a function that fills hidden.grad (and weight.grad where it is trained) with d Σ slopes · logprobs."""
    inputs = [x for x in (hidden, weight) if x.requires_grad]

    def ours():
        return torch.autograd.grad((head_stats(hidden, weight, targets).logprobs * slopes).sum(), inputs)

    def cross_entropy():
        losses = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
        return torch.autograd.grad(-(losses * slopes).sum(), inputs)

    def trl():  # selective_log_softmax of TRL 1.12.0 on (1, N, V): what its trainers call
        logits = F.linear(hidden, weight)[None]
        picked = logits.gather(-1, targets[None, :, None])[..., 0]
        norms = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return torch.autograd.grad(((picked - norms)[0] * slopes).sum(), inputs)

    def torch_chunked():
        losses = F.linear_cross_entropy(hidden, weight, targets, reduction="none")
        return torch.autograd.grad(-(losses * slopes).sum(), inputs)

    rivals = {"cross_entropy": cross_entropy, "trl": trl}
    if hasattr(F, "linear_cross_entropy"):
        rivals["torch chunked"] = torch_chunked
    if liger is not None:

        def liger_chunked():
            logprobs = liger.apply(hidden, weight, targets, None, 1.0, 4096)
            return torch.autograd.grad((logprobs * slopes).sum(), inputs)

        rivals["liger"] = liger_chunked
    return ours, rivals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--head", choices=["frozen", "trained", "both"], default="both")
    parser.add_argument("--liger")
    args = parser.parse_args()
    ceiling = ceilings()[torch.float32]
    liger = None
    if args.liger:
        sys.path.append(args.liger)
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as liger
    N, C, V = args.rows, args.width, args.vocab
    rng = torch.Generator().manual_seed(0)
    for frozen in [f for f, name in ((True, "frozen"), (False, "trained")) if args.head in (name, "both")]:
        hidden = torch.randn(N, C, generator=rng).requires_grad_()
        weight = (torch.randn(V, C, generator=rng) * 0.1).requires_grad_(not frozen)
        targets = torch.randint(V, (N,), generator=rng)
        slopes = torch.randn(N, generator=rng)
        ours, rivals = contenders(hidden, weight, targets, slopes, liger)
        label = f"{'frozen' if frozen else 'trained'} head, N {N} C {C} V {V}"
        medians = compare(label, ours, rivals, runs=args.runs, target=GOALS[frozen])
        flops = (4 if frozen else 8) * N * C * V
        print(f"  ours: {flops / medians['ours'] / ceiling:.0%} of the products' ceiling")
        gradients = 4 * N * C + (0 if frozen else 4 * V * C)
        for name, work in {"ours": ours, **rivals}.items():
            print(f"  {name:16} {(extra_memory(work) - gradients) / 2**20:8.0f} MiB beyond the gradients")
        truth = contenders(*(x.detach().double().requires_grad_(x.requires_grad) for x in (hidden[:64], weight)),
                           targets[:64], slopes[:64].double(), None)[1]["cross_entropy"]()  # fmt: skip
        few = contenders(hidden[:64].detach().requires_grad_(), weight, targets[:64], slopes[:64], None)[0]()
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(few, truth, strict=True)]
        print(f"  error of the gradients against fp64, of their largest entry: {', '.join(f'{e:.1e}' for e in errors)}")


if __name__ == "__main__":
    main()
