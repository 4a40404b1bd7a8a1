"""Seconds from nothing to a policy of mean gold reward ≥ 0.4 at KL ≤ 8 nats per answer on the built-in task.

    python benchmarks/speedrun.py            SFT, reward model and PPO with their default settings, in a fresh folder

The clock runs from the start of the first script to the first rollout (256 answers) that passes; PPO is then stopped.
Printed too: the seconds of processor time, which say more on a busy machine, and the optimizer steps taken.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLD, KL = 0.4, 8.0


def start(name: str, folder: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / f"train_{name}.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(Path(folder) / f"{name}.log", "w") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)


def passed(file: Path) -> dict | None:
    """The first rollout that is good enough."""
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:  # the last line may be half written
            return None
        if metrics.get("gold/score", -1.0) >= GOLD and metrics.get("objective/kl", KL + 1) <= KL:
            return metrics
    return None


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began, found = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sft", "rm"):
            code = start(name, folder).wait()
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
            if code:
                sys.exit((Path(folder) / f"{name}.log").read_text())
        ppo = start("ppo", folder)
        while found is None and ppo.poll() is None:
            time.sleep(0.5)
            found = passed(Path(folder) / "runs/ppo/metrics.jsonl")
        seconds = time.perf_counter() - began
        ppo.send_signal(signal.SIGTERM)
        ppo.wait()
        found = found or passed(Path(folder) / "runs/ppo/metrics.jsonl")
        if found is None:
            sys.exit("never: " + (Path(folder) / "ppo.log").read_text()[-2000:])
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"gold {found['gold/score']:.3f} at KL {found['objective/kl']:.2f} after {found['step']} iterations: "
        f"{seconds:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} s of processor time"
    )


if __name__ == "__main__":
    main()
