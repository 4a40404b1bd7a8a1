"""Adapters in all three stages against all weights, on the built-in task: the table of docs/families.md.

python benchmarks/lora_gold.py [SEED ...]        by default seeds 0 1 2, a process each
"""

import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from compare import script


def gains(seed):
    """Gold before PPO, and gold and KL after it, of both: {"all weights": (before, after, kl), "lora.r 8": ...}."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder, of_seed = Path(place), ["--run.seed", str(seed)]
        script(folder, "sft", *of_seed)
        for name, lora in (("all weights", []), ("lora.r 8", ["--lora.r", "8"])):
            model = ["--model.path", "runs/sft/final"]
            if lora:
                script(folder, "sft", *of_seed, *model, *lora, "--run.dir", f"{name}/sft")
                model = ["--model.path", f"{name}/sft/final"]
            script(folder, "rm", *of_seed, *model, *lora, "--run.dir", f"{name}/rm")
            reward = ["--reward.path", f"{name}/rm/final"]
            script(folder, "ppo", *of_seed, *model, *reward, *lora, "--run.dir", f"{name}/ppo")
            said = json.loads((folder / name / "ppo/evaluation.json").read_text())
            found[name] = said["before"]["gold"], said["after"]["gold"], said["after"]["kl"]
    return found


def main():
    seeds = [int(a) for a in sys.argv[1:]] or [0, 1, 2]
    with ProcessPoolExecutor(len(seeds)) as pool:
        found = list(pool.map(gains, seeds))
    print("| seed | all weights: gold, KL | lora.r 8: gold, KL | gain of all weights | of adapters | difference |")
    print("|---" * 6 + "|")
    for seed, of_seed in zip(seeds, found, strict=True):
        (b, a, kl), (lb, la, lkl) = of_seed["all weights"], of_seed["lora.r 8"]
        print(
            f"| {seed} | {a:.2f}, {kl:.1f} | {la:.2f}, {lkl:.1f} | "
            f"{a - b:.2f} | {la - lb:.2f} | {a - b - (la - lb):.2f} |"
        )


if __name__ == "__main__":
    main()
