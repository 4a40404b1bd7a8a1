"""The whole of RLHF on the built-in task with several seeds, and the first seed twice: the README's table.

python benchmarks/review_world.py [SEED ...] [--section.key=value for train_ppo.py ...]
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("sft", "rm", "ppo")
COLUMNS = ("seed", "reward model: pairs right", "gold of SFT", "of PPO", "gain", "KL, nats", "of the frontier's gain",
           "answer's tokens", "seconds")  # fmt: skip


def pipeline(folder, seed, ppo_settings):
    """Seconds of the three scripts, run in `folder`."""
    folder.mkdir(parents=True)
    began = time.perf_counter()
    for stage in STAGES:
        settings = ["--run.seed", str(seed), *(ppo_settings if stage == "ppo" else [])]
        subprocess.run([sys.executable, ROOT / f"train_{stage}.py", *settings], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - began


def row(folder, seed, seconds):
    """A line of the table."""
    validation = json.loads((folder / "runs/rm/metrics.jsonl").read_text().splitlines()[-1])
    e = json.loads((folder / "runs/ppo/evaluation.json").read_text())
    before, after = e["before"], e["after"]
    return (f"| {seed} | {validation['val/accuracy']:.3f} | {before['gold']:+.2f} | {after['gold']:+.2f} | "
            f"{after['gold'] - before['gold']:.2f} | {after['kl']:.1f} | {after['frontier_share']:.0%} | "
            f"{before['length']:.1f} → {after['length']:.1f} | {seconds:.0f} |")  # fmt: skip


def weights(folder):
    return [(folder / f"runs/{stage}/final/model.safetensors").read_bytes() for stage in STAGES]


def main():
    seeds = [int(a) for a in sys.argv[1:] if not a.startswith("-")] or [0, 1, 2]
    ppo_settings = [a for a in sys.argv[1:] if a.startswith("-")]
    with tempfile.TemporaryDirectory() as place:
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        for seed in seeds:
            folder = Path(place) / str(seed)
            print(row(folder, seed, pipeline(folder, seed, ppo_settings)), flush=True)
        pipeline(Path(place) / "again", seeds[0], ppo_settings)
        same = weights(Path(place) / "again") == weights(Path(place) / str(seeds[0]))
    print(f"\nseed {seeds[0]} again: {'the same bits' if same else 'OTHER BITS'}")
    print(f"memory: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB at most")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
