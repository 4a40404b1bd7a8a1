"""How near do sound and unsound runs come to the alarms' limits? `python benchmarks/alarm_thresholds.py --seeds 0-9`

For each seed: the built-in task with a sound reward model, with the failure lab's weak one, which was trained on few
pairs of a labeler who likes short answers, and with that one under hard negatives. Finished runs are not repeated. The
tables say when the probe is red, which alarms were raised at which step, and how near each watched number came to its
limit; docs/reliability.md quotes them.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from minirlhf.alarms import Limits, alarms

ROOT = Path(__file__).parent.parent
WEAK = ["--data.labeler", "weak", "--data.size", "1024", "--optim.lr", "1e-3", "--run.steps"]  # as in the failure lab
SHORT = ["--run.steps", "12"]
KINDS = {"good": ([], []), "weak": ([*WEAK, "160"], SHORT),
         "cured": ([*WEAK, "200", "--rm.hard_negatives", "0.25"], SHORT)}  # fmt: skip


def script(name, out, *argv):
    """One stage, unless it has been run."""
    if (out / "final").exists():
        return
    command = [sys.executable, ROOT / f"train_{name}.py", "--run.dir", out, *argv]
    if (out / "config.json").exists():
        command += ["--run.resume", "true"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([str(x) for x in command], check=True, env=environment, stdout=subprocess.DEVNULL)


def run(seed, kinds, out):
    """All stages of a seed."""
    common = ["--run.seed", seed, "--run.threads", 1]
    sft = out / f"sft-{seed}"
    script("sft", sft, *common)
    for kind in kinds:
        rm, ppo = KINDS[kind]
        script("rm", out / f"rm-{kind}-{seed}", *common, "--model.path", sft / "final", *rm)
        script("ppo", out / f"ppo-{kind}-{seed}", *common, "--model.path", sft / "final",
               "--reward.path", out / f"rm-{kind}-{seed}/final", *ppo)  # fmt: skip


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def table(kind, seeds, out):
    """A line per seed."""
    print(f"\n{kind}\n seed  red in the probe | alarms, steps | length at steps 1, 5, 10, last | gold first, last")
    for seed in seeds:
        folder = out / f"ppo-{kind}-{seed}"
        history = lines(folder / "metrics.jsonl")
        if not history:
            continue
        probe = json.loads((folder / "probe.json").read_text())["probe"]
        red = ", ".join(row["name"] for row in probe if row["verdict"] == "red") or "-"
        raised = ", ".join(f"{a['alarm'].split(':')[0]} {a['step']}" for a in raised_by(history, folder)) or "-"
        length = " ".join(f"{history[min(i, len(history)) - 1]['response/length_mean']:.1f}" for i in (1, 5, 10, 10**9))
        gold = f"{history[0]['gold/score']:.2f} {history[-1]['gold/score']:.2f}"
        print(f"{seed:5}  {red} | {raised} | {length} | {gold}")


def raised_by(history, folder):
    """The alarms under the limits of today, not of the day of the run."""
    reward = Path(json.loads((folder / "config.json").read_text())["reward"]["path"])
    meta = json.loads((reward / "minirlhf.json").read_text())
    limits = Limits(score_max=meta["score_max"] + meta["score_std"])
    heads = [history[:n] for n in range(1, len(history) + 1)]
    return [{"step": head[-1]["step"], "alarm": words} for head in heads for words in alarms(head, limits)]


def nearest(kind, seeds, out):
    """The extremes over seeds, of the numbers that the rules watch, each at its worst run of consecutive lines."""
    print(f"\n{kind}: extremes over seeds (a number must stay there for so many lines in a row)")
    watched = {
        "length / first, low": (3, min, max, lambda m, f: m["response/length_mean"] / f["response/length_mean"]),
        "length / first, high": (3, max, min, lambda m, f: m["response/length_mean"] / f["response/length_mean"]),
        "empty_frac": (3, max, min, lambda m, f: m["response/empty_frac"]),
        "short_frac": (3, max, min, lambda m, f: m["response/short_frac"]),
        "unfinished": (3, max, min, lambda m, f: 1 - m["response/eos_frac"]),
        "distinct_frac": (3, min, max, lambda m, f: m["response/distinct_frac"]),
        "repeat_frac": (3, max, min, lambda m, f: m["response/repeat_frac"]),
        "kl / se": (1, min, max, lambda m, f: m["objective/kl"] / max(m["objective/kl_se"], 1e-9)),
        "first_ratio_gap": (1, max, min, lambda m, f: m["val/first_ratio_gap"]),
        "entropy / first": (1, min, max, lambda m, f: m["objective/entropy"] / m["response/length_mean"]
                            / (f["objective/entropy"] / f["response/length_mean"])),
        "explained_var": (20, min, max, lambda m, f: m["value/explained_var"]),
        "|score-length r|": (3, max, min, lambda m, f: abs(m["objective/score_length_corr"])),
        "score": (3, max, min, lambda m, f: m["objective/scores"]),
    }  # fmt: skip
    for name, (width, worst, inner, value) in watched.items():
        found = []
        for seed in seeds:
            history = lines(out / f"ppo-{kind}-{seed}/metrics.jsonl")
            values = [value(m, history[0]) for m in history]
            windows = [values[i : i + width] for i in range(len(values) - width + 1)]
            found += [worst(map(inner, windows))] if windows else []
        print(f"  {name:22} {width:3} lines  " + " ".join(f"{x:.3g}" for x in found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", default="0-9")
    parser.add_argument("--kinds", default="good,weak,cured")
    parser.add_argument("--out", type=Path, default=Path("runs/alarms"))
    args = parser.parse_args()
    first, _, last = args.seeds.partition("-")
    seeds, kinds = range(int(first), int(last or first) + 1), args.kinds.split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        run(seed, kinds, args.out)
    for kind in kinds:
        table(kind, seeds, args.out)
        nearest(kind, seeds, args.out)


if __name__ == "__main__":
    main()
