"""The three scripts under torchrun: any engine, any number of ranks, the same numbers as one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import ENV, ROOT, script

# eps is above the rounding of gradients that are 0 in exact numbers (key biases, the reward model's last bias): Adam
# would turn their last bits into whole steps. 12 rows are no multiple of 2 x 4, nor of 4 ranks.
COMMON = ["--optim.eps", "1e-5", "--optim.warmup_steps", "2", "--run.log_every", "1"]
TINY = {
    "sft": [*COMMON, "--run.steps", "10", "--data.size", "300", "--sft.minibatch_size", "12", "--sft.microbatch_size",
            "4"],
    "rm": [*COMMON, "--run.steps", "10", "--data.size", "60", "--rm.minibatch_size", "12", "--rm.microbatch_size", "3"],
    "ppo": [*COMMON, "--run.steps", "3", "--ppo.rollout_size", "24", "--ppo.minibatch_size", "12",
            "--ppo.microbatch_size", "4", "--ppo.epochs", "2"],
}  # fmt: skip
LONG = {name: ["400" if before == "--run.steps" else x for before, x in pairwise(["", *argv])]
        for name, argv in TINY.items()}  # fmt: skip
LORA = ["--lora.r", "2", "--lora.dropout", "0"]
SETTINGS = {"full": [], "checkpointed": ["--run.checkpoint_activations", "true"], "lora": LORA}


def torchrun(name, world, *argv, cwd, code=0):
    process = start(name, world, *argv, cwd=cwd)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{out}\n{err}"
    return out, err


def start(name, world, *argv, cwd):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command = [*run, str(ROOT / f"train_{name}.py"), *map(str, argv)]
    return subprocess.Popen(command, cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_same_run(found, expected):
    """Weights, and all that was logged."""
    files = [p.relative_to(expected) for p in expected.glob("final/**/*.safetensors")]
    assert files == [p.relative_to(found) for p in found.glob("final/**/*.safetensors")]
    for file in files:
        ours, theirs = load_file(found / file), load_file(expected / file)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
    for log in ("metrics.jsonl", "samples.jsonl"):
        if (expected / log).exists():
            ours, theirs = ([json.loads(x) for x in (f / log).read_text().splitlines()] for f in (found, expected))
            for a, b in zip(ours, theirs, strict=True):
                assert a.keys() == b.keys()
                for k in b:
                    if not k.startswith("time/") and k != "tokens_per_s":
                        close = isinstance(b[k], float) and isinstance(a[k], float)
                        assert a[k] == (pytest.approx(b[k], rel=1e-3, abs=1e-4) if close else b[k]), k


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The three scripts in one process each, under every setting."""
    cwd = tmp_path_factory.mktemp("pipeline")
    script("sft", *TINY["sft"], cwd=cwd)
    script("rm", *TINY["rm"], cwd=cwd)
    return cwd


def single(cwd, name, setting):
    folder = cwd / f"{name}-{'lora' if setting == 'lora' else 'full'}"
    if not (folder / "final").exists():
        given = ["--model.path", "runs/sft/final"] if (name, setting) == ("sft", "lora") else []
        script(name, *TINY[name], *given, *(LORA if setting == "lora" else []), "--run.dir", folder, cwd=cwd)
    return folder


def compare(cwd, folder, name, engine, world, setting):
    given = ["--model.path", "runs/sft/final"] if (name, setting) == ("sft", "lora") else []
    torchrun(name, world, *TINY[name], *given, *SETTINGS[setting], "--run.engine", engine, "--run.dir", folder, cwd=cwd)
    assert_same_run(folder, single(cwd, name, setting))


@pytest.mark.parametrize(("name", "engine", "setting"), [
    ("sft", "mini", "full"), ("rm", "none", "full"), ("rm", "mini", "checkpointed"), ("ppo", "mini", "full"),
    ("ppo", "torch", "full"), ("ppo", "mini", "lora"),
])  # fmt: skip
def test_two_ranks_are_one_process(pipeline, tmp_path, name, engine, setting):
    compare(pipeline, tmp_path / "x", name, engine, 2, setting)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("engine", ["none", "mini", "torch"])
@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_any_number_of_ranks_is_one_process(pipeline, tmp_path, name, engine, setting, world):
    compare(pipeline, tmp_path / "x", name, engine, world, setting)


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_one_sharded_rank_is_no_engine_bit_for_bit(pipeline, tmp_path, name):
    whole = single(pipeline, name, "full")
    script(name, *TINY[name], "--run.engine", "mini", "--run.dir", tmp_path / "x", cwd=pipeline)
    for file in whole.glob("final/**/*.safetensors"):
        assert file.read_bytes() == (tmp_path / "x" / file.relative_to(whole)).read_bytes()


def cut_back(folder, target, step):
    """The folder as it was when the checkpoint of this step had been written, and the run was killed."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "final")
    for later in (target / "checkpoints").glob("*"):
        if int(later.name[-8:]) > step:
            shutil.rmtree(later)


@pytest.mark.parametrize(("name", "engine"), [("sft", "mini"), ("ppo", "torch")])
def test_a_checkpoint_of_two_ranks_goes_on_at_any_number(pipeline, tmp_path, name, engine):
    argv = [*TINY[name], "--run.save_every", "2", "--run.keep", "9", "--run.dir"]
    torchrun(name, 2, *argv, tmp_path / "two", "--run.engine", engine, cwd=pipeline)
    for world, other in ((1, "none"), (3, "mini")):
        cut_back(tmp_path / "two", tmp_path / f"{world}", 2)
        go_on = [*argv, tmp_path / f"{world}", "--run.engine", other, "--run.resume", "true"]
        script(name, *go_on, cwd=pipeline) if world == 1 else torchrun(name, world, *go_on, cwd=pipeline)
        assert_same_run(tmp_path / f"{world}", single(pipeline, name, "full"))


def test_a_mistake_is_said_by_rank_0_and_ends_all(pipeline, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    _, err = torchrun("sft", 2, *TINY["sft"], "--run.dir", tmp_path, cwd=pipeline, code=1)
    assert "letter.txt" in err
    assert "run_script" not in err  # of a traceback; torchrun shows its own
    few = ["--sft.minibatch_size", "1", "--sft.microbatch_size", "1", "--run.dir", tmp_path / "x"]
    _, err = torchrun("sft", 2, *TINY["sft"], *few, cwd=pipeline, code=1)
    assert "too few for 2 ranks" in err
    assert "run_script" not in err  # of a traceback; torchrun shows its own


# ---- a rank that is lost --------------------------------------------------------------------------------------------


def ranks_of(process):
    """The processes of the ranks, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == process.pid:  # its parent
                environment = folder.joinpath("environ").read_bytes().split(b"\0")
                found |= {int(x[5:]): int(folder.name) for x in environment if x.startswith(b"RANK=")}
        except OSError:  # it has ended meanwhile
            continue
    return found


def lose(cwd, folder, name, rank, number, after, *argv):
    """Send a signal to one rank of two when so many checkpoints are there; how long the others went on, and stderr."""
    process = start(name, 2, *argv, "--run.save_every", "1", "--run.dir", folder, cwd=cwd)
    while process.poll() is None and len(list(folder.glob("checkpoints/step_*"))) < after:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    ranks = ranks_of(process)
    os.kill(ranks[rank], number)
    began = time.monotonic()
    _, err = process.communicate(timeout=150)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    return time.monotonic() - began, err


def test_a_killed_rank_ends_all_and_the_run_goes_on(pipeline, tmp_path):
    argv = [*LONG["sft"], "--run.engine", "mini"]
    seconds, err = lose(pipeline, tmp_path / "x", "sft", 1, signal.SIGKILL, 2, *argv)
    assert seconds < 60
    assert "rank 1" in err.replace(":", "").replace("rank       1", "rank 1")
    assert "run_script" not in err  # of a traceback; torchrun shows its own
    steps = len(list((tmp_path / "x/checkpoints").glob("step_*")))
    assert steps >= 1
