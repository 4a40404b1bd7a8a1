"""Kill a run anywhere, resume it, and find every bit as if nothing had happened: `python tests/kill_matrix.py`.

Four subjects (SFT, reward model, PPO, PPO with LoRA) at a size of seconds. A trial kills one of them by SIGKILL, either
at a random time or at a named crash point (before or after a call that changes the disk, or half-way through a write),
resumes it, perhaps kills it again, and compares final/, metrics.jsonl without its clocks, samples, alarms and the
evaluation with those of a run that was left alone. A parent with everything imported forks each child.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from faults import REAL_WRITE, disk_calls

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train_ppo  # noqa: E402
import train_rm  # noqa: E402
import train_sft  # noqa: E402
from minirlhf import stage  # noqa: E402
from minirlhf.config import PPOConfig, RMConfig, SFTConfig  # noqa: E402
from minirlhf.run import run_script  # noqa: E402

SMALL = ["--run.threads", "1", "--run.log_every", "1", "--run.save_every", "1"]
MODEL = ["--model.n_layer", "1", "--model.d_model", "16", "--model.n_head", "2"]
PPO = ["--run.steps", "4", "--ppo.rollout_size", "8", "--ppo.minibatch_size", "4", "--ppo.microbatch_size", "4",
       "--ppo.epochs", "2", "--ppo.kl_target", "1"]  # fmt: skip
SUBJECTS = {
    "sft": (train_sft, SFTConfig, "sft", ["--run.steps", "6", "--data.size", "80", "--sft.minibatch_size", "16",
            "--sft.microbatch_size", "8", "--optim.warmup_steps", "2", "--sft.eval_every", "2", *MODEL]),
    "rm": (train_rm, RMConfig, "rm", ["--run.steps", "5", "--data.size", "60", "--rm.minibatch_size", "16",
           "--rm.microbatch_size", "8", "--optim.warmup_steps", "2", "--rm.eval_every", "2"]),
    "ppo": (train_ppo, PPOConfig, "ppo", PPO),
    "ppo-lora": (train_ppo, PPOConfig, "ppo", [*PPO, "--lora.r", "2"]),
}  # fmt: skip
torch.optim.AdamW([torch.zeros(1)])  # imports what a first optimizer imports
FILES = ("samples.jsonl", "alarms.jsonl", "evaluation.json")


def run(subject, *extra):
    """The subject in this process; its exit code. What comes later of the settings counts.

    Without a report, which comes after final/ and whose figures take longer than all the rest; with few records held
    out, and small exams.
    """
    module, config, name, argv = SUBJECTS[subject]
    given = [*SMALL, *argv, *extra]
    flags = dict(zip(given[::2], given[1::2], strict=True))
    with (
        mock.patch.object(stage, "write_report", lambda folder: folder),
        mock.patch.object(stage, "VALIDATION", 64),
        mock.patch.object(train_ppo, "EXAM", 64),
    ):
        return run_script(module.main, config, name, [x for pair in flags.items() for x in pair])


def start(subject, cwd, folder, *extra, act=None):
    """A child that runs the subject in `folder`; its number. `act` may end it, see faults.py."""
    child = os.fork()
    if child:
        return child
    os.chdir(cwd)
    log = os.open(f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    with disk_calls(act) if act else contextlib.nullcontext():
        try:
            code = run(subject, "--run.dir", str(folder), *extra)
        except SystemExit as e:
            code = e.code
        except BaseException as e:  # noqa: BLE001  (a child must never return into the parent's code)
            REAL_WRITE(2, f"{type(e).__name__}: {e}\n".encode())
            code = 1
    os._exit(code)


def wait(child):
    """The exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(subject, cwd, folder):
    """Run to the end; its crash points as (i, label) and its seconds."""
    read, write = os.pipe()

    def tell(i, label, moment, *_):
        if moment == "after":
            REAL_WRITE(write, f"{i}\t{label}\n".encode())

    began = time.monotonic()
    child = start(subject, cwd, folder, act=tell)
    os.close(write)
    with os.fdopen(read) as lines:
        points = [(int(i), label) for i, label in (line.rstrip("\n").split("\t") for line in lines)]
    code = wait(child)
    assert code == 0, f"{subject}: exit code {code}; see {cwd / folder.name}.log"
    return points, time.monotonic() - began


def result(folder):
    """All that must be equal."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in m.items() if not (k.startswith("time/") or k == "tokens_per_s")} for m in metrics]
    files = {p.name: (folder / p.name).read_bytes() for p in map(Path, FILES) if (folder / p.name).exists()}
    final = {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "final").rglob("*")) if p.is_file()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in (files | final).items()}
    return hashes | {"metrics": kept}


def dying(at, what, how):
    """An `act` that kills at one call: before it, after it, or with half of its bytes written."""

    def act(i, label, moment, *args):
        if i != at or (moment == "after") != (how == "after"):
            return
        same = label == what or (label.split()[0] == what.split()[0] and what.split()[1] in SUBJECTS)  # run folder
        assert same, f"call {i} is {label}, not {what}"
        if how == "half":
            REAL_WRITE(args[0], bytes(args[1])[: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    return act


class Matrix:
    """The subjects' inputs, uninterrupted runs and crash points, in one temporary folder."""

    def __init__(self, cwd, subjects=tuple(SUBJECTS)):
        torch.set_num_threads(1)
        (cwd / "runs").mkdir()
        self.cwd, self.points, self.seconds, self.whole = cwd, {}, {}, {}
        for subject in dict.fromkeys(["sft", "rm", *subjects]):
            folder = cwd / f"runs/{subject}"
            self.points[subject], self.seconds[subject] = whole(subject, cwd, folder)
            self.whole[subject] = result(folder)

    def trial(self, subject, name, *, point=None, seed=0):
        """Kill, resume, perhaps kill again, compare; what differs, empty where nothing does."""
        rng = random.Random(f"{subject}/{name}/{seed}")
        for attempt in range(100):  # a random time may be after the end
            folder = self.cwd / f"{subject}-{name}-{attempt}"
            child = start(subject, self.cwd, folder, act=dying(*point) if point else None)
            if self.killed(child, subject, 0 if point else rng.random()):
                break
            if point:
                return f"not reached: {(self.cwd / f'{folder.name}.log').read_text()[-300:]}"
        for _ in range(rng.choice((0, 0, 1, 3))):
            child = start(subject, self.cwd, folder, "--run.resume", "true")
            self.killed(child, subject, rng.random())
        code = wait(start(subject, self.cwd, folder, "--run.resume", "true"))
        if code:
            return f"exit code {code}: {(self.cwd / f'{folder.name}.log').read_text()[-300:]}"
        found, expected = result(folder), self.whole[subject]
        return ", ".join(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))

    def killed(self, child, subject, share):
        """Kill it after this share of a run's time (0: it does that itself); whether that was in time."""
        if share:
            time.sleep(share * self.seconds[subject])
            os.kill(child, signal.SIGKILL)
        return wait(child) == -signal.SIGKILL

    def named(self, subject, rng):
        """Every label once, at one of its places: before it, after it, and for writes half-way."""
        places = {}
        for i, label in self.points[subject]:
            places.setdefault(label, []).append(i)
        out = []
        for label, where in places.items():
            for how in ("before", "after", *(("half",) if label.startswith("write") else ())):
                out.append((f"{how} {label}", (rng.choice(where), label, how)))
        return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--random", type=int, default=200, help="random kills, over all subjects")
    parser.add_argument("--points", type=int, default=10**6, help="crash points of each subject, at most")
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, subjects = random.Random(args.seed), args.subjects.split(",")
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as cwd:
        matrix = Matrix(Path(cwd), subjects)
        trials = [(subjects[k % len(subjects)], f"time {k}", None) for k in range(args.random)]
        for subject in subjects:
            points = matrix.named(subject, rng)
            rng.shuffle(points)
            trials += [(subject, name, point) for name, point in points[: args.points]]
        print(f"{len(trials)} trials", flush=True)
        for n, (subject, name, point) in enumerate(trials):
            wrong = matrix.trial(subject, name.replace("/", "_"), point=point, seed=args.seed)
            counts[subject, "crash point" if point else "random time", "differs" if wrong else "equal"] += 1
            if wrong:
                failures.append((subject, name, wrong))
                print(f"DIFFERS {subject}, killed at {name}: {wrong}", flush=True)
            if n % 50 == 49:
                print(f"{n + 1} done, {len(failures)} differ", flush=True)
    for key, count in sorted(counts.items()):
        print(f"{count:5}  {', '.join(key)}")
    return min(len(failures), 125)


if __name__ == "__main__":
    sys.exit(main())
