"""The scripts under torchrun: any engine, any number of ranks, the same numbers as one process."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from processes import ENV, ROOT
from test_scripts import script

from minirlhf.checkpoint import load_newest

# eps is above the rounding of gradients that are 0 in exact numbers (key biases, the reward model's last bias): Adam
# would turn their last bits into whole steps. 10 rows in forwards of 2: ranks with 4, 3, 3 rows, forwards of 1 and 2.
COMMON = ["--optim.eps", "1e-5", "--optim.warmup_steps", "2", "--run.log_every", "1"]
TINY = {
    "sft": [*COMMON, "--run.steps", "10", "--data.size", "300", "--sft.minibatch_size", "10", "--sft.microbatch_size",
            "2", "--sft.eval_every", "10"],
    "rm": [*COMMON, "--run.steps", "10", "--data.size", "60", "--rm.minibatch_size", "10", "--rm.microbatch_size", "2",
           "--rm.eval_every", "10"],
    "dpo": [*COMMON, "--run.steps", "10", "--data.size", "61", "--dpo.minibatch_size", "10", "--dpo.microbatch_size", "2",
            "--dpo.eval_every", "10"],
    "ppo": [*COMMON, "--run.steps", "2", "--ppo.rollout_size", "20", "--ppo.minibatch_size", "10",
            "--ppo.microbatch_size", "2", "--ppo.epochs", "2"],
}  # fmt: skip
LORA = ["--lora.r", "2", "--lora.dropout", "0"]
SETTINGS = {"full": [], "checkpointed": ["--run.checkpoint_activations", "true"], "lora": LORA}


def torchrun(name, world, *argv, cwd, code=0):
    process = start(name, world, *argv, cwd=cwd)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{out}\n{err}"
    return out, err


def start(name, world, *argv, cwd):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command = [*run, str(ROOT / "tests/processes.py"), str(ROOT / f"train_{name}.py"), *map(str, argv)]
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
    ("sft", "mini", "full"), ("rm", "mini", "checkpointed"), ("ppo", "mini", "lora"), ("ppo", "torch", "full"),
    ("dpo", "mini", "full"),
])  # fmt: skip
def test_two_ranks_are_one_process(pipeline, tmp_path, name, engine, setting):
    compare(pipeline, tmp_path / "x", name, engine, 2, setting)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world", "setting"), [
    ("none", 2, "full"), ("mini", 3, "full"), ("torch", 3, "full"), ("mini", 4, "checkpointed"), ("mini", 3, "lora"),
    ("torch", 2, "lora"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["sft", "rm", "ppo", "dpo"])
def test_any_number_of_ranks_is_one_process(pipeline, tmp_path, name, engine, setting, world):
    compare(pipeline, tmp_path / "x", name, engine, world, setting)


@pytest.mark.parametrize("name", ["rm", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sft", "ppo"))])
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


@pytest.mark.parametrize(("name", "engine"), [("sft", "mini"), pytest.param("ppo", "torch", marks=pytest.mark.slow)])
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
    few = ["--data.size", "300", "--sft.minibatch_size", "1", "--sft.microbatch_size", "1", "--run.dir", tmp_path / "x"]
    _, err = torchrun("sft", 2, *few, cwd=pipeline, code=1)
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


def lose(cwd, folder, name, rank, number, more, *argv):
    """Send a signal to one rank of two after so many more seconds than the first new checkpoint needs.

    How long it took until all had ended, and stderr; None when the run was at its end before.
    """
    seen = {p.name for p in folder.glob("checkpoints/step_*")}
    process = start(name, 2, *argv, "--run.save_every", "1", "--run.dir", folder, cwd=cwd)
    while process.poll() is None and {p.name for p in folder.glob("checkpoints/step_*")} <= seen:
        time.sleep(0.01)
    time.sleep(more)
    ranks = ranks_of(process)
    if rank not in ranks or (folder / "final").exists():
        assert process.wait(60) == 0, process.communicate()
        return None
    os.kill(ranks[rank], number)
    began = time.monotonic()
    _, err = process.communicate(timeout=150)
    if process.returncode == 0:
        return None
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    return time.monotonic() - began, err


def names(err, rank):
    """Whether stderr names the rank: in our words, or in torchrun's table."""
    return f"rank {rank} has" in err or f"local_rank: {rank}" in err


def test_a_killed_rank_ends_all_and_the_run_goes_on(pipeline, tmp_path):
    argv = [*TINY["sft"], "--run.engine", "mini"]
    argv[argv.index("--run.steps") + 1] = "400"
    seconds, err = lose(pipeline, tmp_path / "x", "sft", 1, signal.SIGKILL, 0.5, *argv)
    assert seconds < 60
    assert names(err, 1)
    assert "run_script" not in err  # of a traceback; torchrun shows its own
    step, tensors, _ = load_newest(tmp_path / "x/checkpoints")
    assert step >= 1
    assert tensors.keys() == {"model", "optimizer"}
    assert not (tmp_path / "x/final").exists()


@pytest.mark.slow
def test_forty_kills_and_stops_leave_no_hang_and_no_damage(pipeline, tmp_path):
    """Each goes on where the one before it was cut; a finished run makes room for the next."""
    rng, lost, runs = random.Random(7), 0, 0
    argv = [*TINY["sft"], "--run.engine", "mini", "--run.resume", "true"]
    argv[argv.index("--run.steps") + 1] = "400"
    while lost < 40:
        folder, rank = tmp_path / str(runs), rng.randrange(2)
        number = signal.SIGSTOP if lost in (9, 29) else signal.SIGKILL
        found = lose(pipeline, folder, "sft", rank, number, rng.uniform(0, 1), *argv)
        if found is None:
            runs += 1
            continue
        seconds, err = found
        lost += 1
        assert seconds < 120
        assert names(err, rank), err
        assert load_newest(folder / "checkpoints")[0] >= 1
    process = start("sft", 2, *argv, "--run.save_every", "1", "--run.dir", folder, cwd=pipeline)
    assert process.wait(300) == 0
    assert [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 401))


def test_a_signal_ends_all_ranks_after_the_same_step(pipeline, tmp_path):
    argv = [*TINY["sft"], "--run.engine", "mini", "--run.dir", tmp_path / "x"]
    argv[argv.index("--run.steps") + 1] = "4000"
    process = start("sft", 2, *argv, cwd=pipeline)
    while process.poll() is None and not (tmp_path / "x/metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "has ended" not in err  # no rank waited for one that was gone
    last = json.loads((tmp_path / "x/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert load_newest(tmp_path / "x/checkpoints")[0] == last
