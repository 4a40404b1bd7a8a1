"""The failure lab: how RLHF goes wrong on the built-in task, what each cure brings back, in numbers over three seeds.

    python -m minirlhf.lab               every scenario; one page, runs/lab/lab.html
    python -m minirlhf.lab weak lr       some of them

A job is a command line of the three scripts, run in runs/lab/seed_N, and the page prints it. A job that has ended is
not run again; what went wrong on purpose is in `FILES`, which are written beside the runs.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from minirlhf import lab_page
from minirlhf.errors import UsageError, tool
from minirlhf.page import page, section
from minirlhf.run import write_json
from minirlhf.safefile import write_file

ROOT = Path(__file__).parent.parent
RM = "train_rm.py --model.path sft/final"
WEAK = f"{RM} --data.labeler weak --data.size 1024 --optim.lr 1e-3"
ROLLOUT = "--ppo.rollout_size 128 --ppo.minibatch_size 64 --ppo.microbatch_size 64"
START = f"train_ppo.py --model.path sft/final {ROLLOUT}"
PPO = f"{START} --run.steps 30 --ppo.kl_coef"
FREE = f"{START} --run.steps 24 --optim.lr 1.5e-4 --ppo.kl_coef 0 --ppo.missing_eos replace --ppo.missing_eos_penalty 3"
GOOD, BAD = "--reward.path rm-good/final", "--reward.path rm-weak/final"
DROPOUT = f"--model.path sft-dropout/final {ROLLOUT} --run.steps 30 --ppo.kl_coef 0.1 {GOOD}"

# name → command line. `NAME/` in it, or in a file of FILES that it names, is another job, which runs before.
JOBS: dict[str, str] = {
    "sft": "train_sft.py",
    "rm-good": f"{RM} --data.size 8192 --run.steps 768",
    "ppo-good": f"{PPO} 0.1 {GOOD}",
    "rm-weak": f"{WEAK} --run.steps 160",
    "ppo-weak": f"{PPO} 0.1 {BAD}",
    "ppo-weak-eos": f"{PPO} 0.1 {BAD} --sample.begin_suppress_eos true",
    "ppo-weak-kl": f"{PPO} 0.5 {BAD}",
    "rm-weak-hard": f"{WEAK} --run.steps 200 --rm.hard_negatives 0.25",
    "ppo-weak-hard": f"{PPO} 0.1 --reward.path rm-weak-hard/final",
    "rm-weak-2": f"{WEAK} --run.steps 160 --run.seed 1000{{seed}}",
    "rm-weak-3": f"{WEAK} --run.steps 160 --run.seed 2000{{seed}}",
    "ppo-weak-three": f"{PPO} 0.1 --reward.fn three_models:lowest",
    "rm-512": f"{RM} --data.size 512 --run.steps 96",
    "rm-2048": f"{RM} --data.size 2048 --run.steps 256",
    "ppo-512": f"{FREE} --reward.path rm-512/final",
    "ppo-2048": f"{FREE} --reward.path rm-2048/final",
    "ppo-8192": f"{FREE} {GOOD}",
    "ppo-lr": f"{PPO} 0.1 {GOOD} --optim.lr 5e-3",
    "sft-dropout": "train_sft.py --model.dropout 0.1",
    "ppo-dropout-off": f"train_ppo.py {DROPOUT}",
    "ppo-dropout-on": f"dropout_on.py {DROPOUT}",
    "ppo-refused": f"{PPO} 0.1 {GOOD} --data.template alpaca",
    "ppo-template-same": f"{PPO} 0.1 --reward.fn two_templates:same",
    "ppo-template-other": f"{PPO} 0.1 --reward.fn two_templates:other",
}
REFUSED = {"ppo-refused": 2}  # exit codes that are meant
FILES = {
    "three_models.py": '''"""Three reward models, each of other choices of the weak labeler; the lowest counts."""

import json
from pathlib import Path

from minirlhf.score import reward_of

FOLDERS = [Path("rm-weak/final"), Path("rm-weak-2/final"), Path("rm-weak-3/final")]
SHAPES = [json.loads((folder / "minirlhf.json").read_text()) for folder in FOLDERS]
MODELS = [reward_of(str(folder)) for folder in FOLDERS]


def lowest(prompts, responses):
    """In deviations of each model's own scores from their mean."""
    opinions = [
        [(s - shape["score_mean"]) / shape["score_std"] for s in model(prompts, responses)]
        for model, shape in zip(MODELS, SHAPES)
    ]
    return [min(said) for said in zip(*opinions)]
''',
    "dropout_on.py": '''"""train_ppo.py with one mistake: the policy stays in training mode, with its dropout on."""

import runpy

from minirlhf import lab, stage

proper = stage.ppo_roles


def mistaken(config):
    found = proper(config)
    found[0].policy.train()
    return found


stage.ppo_roles = mistaken
runpy.run_path(str(lab.ROOT / "train_ppo.py"), run_name="__main__")
''',
    "two_templates.py": '''"""The good reward model, under the template it was trained with and under another one."""

from functools import partial

from minirlhf.evaluate import score_texts
from minirlhf.pretrained import load_reward_model
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

model, tokenizer = load_reward_model("rm-good/final"), Tokenizer.load("rm-good/final")
same = partial(score_texts, model, tokenizer, get_template("plain"))
other = partial(score_texts, model, tokenizer, get_template("alpaca"))
''',
}


# ---- jobs -----------------------------------------------------------------------------------------------------------


def needs(job: str) -> list[str]:
    """The jobs whose folders a job reads."""
    used = [code for name, code in FILES.items() if re.search(Path(name).stem + r"(\.py|:)", JOBS[job])]
    text = JOBS[job] + "".join(used)
    return sorted({found for found in re.findall(r"(?<![\w/-])([\w-]+)/", text) if found in JOBS and found != job})


def closure(jobs: Iterable[str]) -> list[str]:
    """These jobs and all they need, in an order in which they can run."""
    ordered: dict[str, None] = {}
    for job in jobs:
        ordered |= dict.fromkeys([*closure(needs(job)), job])
    return list(ordered)


def command(job: str, seed: int) -> list[str]:
    """Its words as the page prints them."""
    words = JOBS[job].format(seed=seed).split()
    own_seed = [] if "--run.seed" in words else ["--run.seed", str(seed)]
    return [*words, *own_seed, "--run.dir", job, "--run.threads", "1"]


def run_job(folder: Path, job: str, seed: int) -> float:
    """Run one command in the seed's folder; its seconds of processor time. Raises UsageError when it fails."""
    words, note = command(job, seed), folder / f"{job}.json"
    if note.is_file() and json.loads(note.read_text())["command"] == words:
        return 0.0
    shutil.rmtree(folder / job, ignore_errors=True)
    program = folder / words[0] if words[0] in FILES else ROOT / words[0]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (folder / f"{job}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(program.resolve()), *words[1:]], cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)  # which also tells the processor time
    process.returncode = os.waitstatus_to_exitcode(status)
    said = [line for line in (folder / f"{job}.log").read_text().splitlines() if line]
    if process.returncode != REFUSED.get(job, 0):
        raise UsageError(f"{folder / job}: exit code {process.returncode}: {said[-1] if said else 'no words'}")
    seconds = used.ru_utime + used.ru_stime
    write_json(note, {"command": words, "code": process.returncode, "seconds": seconds, "said": said[-1]})
    return seconds


def run_jobs(jobs: Sequence[str], seeds: Sequence[int], out: Path, workers: int) -> None:
    """All jobs of all seeds, as many at a time as there are processors, each when what it needs is there."""
    began, done = time.perf_counter(), set()
    todo = [(job, seed) for job in jobs for seed in seeds]
    for seed in seeds:
        folder(out, seed).mkdir(parents=True, exist_ok=True)
        for name, code in FILES.items():
            (folder(out, seed) / name).write_text(code)
    running: dict[Future[float], tuple[str, int]] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            while todo or running:
                ready = [(job, seed) for job, seed in todo if all((need, seed) in done for need in needs(job))]
                for job, seed in ready[: workers - len(running)]:
                    todo.remove((job, seed))
                    running[pool.submit(run_job, folder(out, seed), job, seed)] = (job, seed)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, seed = running.pop(future)
                    seconds = future.result()
                    done.add((job, seed))
                    total, elapsed = len(jobs) * len(seeds), time.perf_counter() - began
                    print(f"{len(done)}/{total}  {elapsed:.0f} s  seed {seed}  {job} {seconds:.0f} s", flush=True)  # noqa: T201
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def folder(out: Path, seed: int) -> Path:
    """Where a seed's jobs run."""
    return out / f"seed_{seed}"


# ---- the whole lab --------------------------------------------------------------------------------------------------


def write_page(names: Sequence[str], seeds: Sequence[int], out: Path) -> list[lab_page.Claim]:
    """runs/lab/lab.html; what it claims."""
    folders = {seed: folder(out, seed) for seed in seeds}
    sections, claims = [], []
    jobs = closure(job for name in names for job in jobs_of(name))
    notes = [json.loads((folder(out, seed) / f"{job}.json").read_text()) for job in jobs for seed in seeds]
    minutes = sum(note["seconds"] for note in notes) / 60
    for name in names:
        scenario = lab_page.SCENARIOS[name]
        commands = [" ".join(command(job, seeds[0])) for job in closure(jobs_of(name))]
        text, new = lab_page.scenario_section(scenario, folders, commands)
        sections.append(text)
        claims += new
    files = [f"<details><summary>{n}</summary><pre>{html.escape(code)}</pre></details>" for n, code in FILES.items()]
    top = [
        "<h1>The failure lab</h1>",
        f'<p class="dim">The built-in task, seeds {", ".join(map(str, seeds))}: mean and range; gold and KL '
        f"over 1,024 answers after the last iteration; {minutes:,.0f} minutes of processor time.</p>",
        lab_page.verdicts(claims),
    ]
    write_file(out / "lab.html", [page("The failure lab", [*top, *sections, section("Files", *files)]).encode()])
    return claims


def jobs_of(name: str) -> list[str]:
    """The jobs that a scenario shows, and those that it needs besides."""
    extra = {"template": ["ppo-refused"]}
    return [*lab_page.SCENARIOS[name].jobs, *extra.get(name, [])]


@tool()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line."""
    scenarios = lab_page.SCENARIOS
    parser = argparse.ArgumentParser(prog="python -m minirlhf.lab", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(scenarios)}; none: all of them")
    parser.add_argument("--out", default="runs/lab", help="folder of jobs and page")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    names, out = args.names or list(scenarios), Path(args.out)
    unknown = [name for name in names if name not in scenarios]
    if unknown:
        raise UsageError(f"{unknown[0]} is no scenario; choose of {', '.join(scenarios)}")
    seeds = range(args.seeds)
    run_jobs(closure(job for name in names for job in jobs_of(name)), seeds, out, os.cpu_count() or 1)
    for claim in write_page(names, seeds, out):
        print(f"{'yes' if claim.held else 'NO '}  {claim.words}: {claim.measured}")  # noqa: T201
    print(f"page: {out / 'lab.html'}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
