"""The frame of a run: whose folder it is, what may differ at a resume, what is cut, how it ends."""

import dataclasses
import errno
import fcntl
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import disk_calls, failing, recorded

from minirlhf import checkpoint, run
from minirlhf.config import PPOConfig, RMConfig, SFTConfig, load_config
from minirlhf.engine import Engine
from minirlhf.errors import UsageError
from minirlhf.fit import fit
from minirlhf.run import Run, run_script
from minirlhf.safefile import write_tensors
from minirlhf.settings import to_dict

ROOT = Path(__file__).parent.parent
ARGV = ["--run.steps", "4", "--run.save_every", "1", "--run.log_every", "1", "--optim.warmup_steps", "1"]


@pytest.fixture(autouse=True)
def _signals_stay():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    gc.collect()  # handlers hold a run, and the run its lock


def main(config, run, every=1):
    """A stage of milliseconds."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def losses(step):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        yield model(x).square().mean(), 4

    def validate():
        return {"val/loss": float(model.weight.detach().square().sum())}

    fit(run, Engine(config.run, [model]), model, losses, validate, eval_every=every, words=("loss",))

    def write(folder):
        folder.mkdir()
        write_tensors(folder / "model.safetensors", dict(model.state_dict()))

    run.finish(write)


def stage(folder, *extra, config=SFTConfig, name="sft", body=main):
    flags = dict(zip(ARGV[::2], ARGV[1::2], strict=True)) | {"--run.dir": str(folder)}
    flags |= dict(zip(extra[::2], extra[1::2], strict=True))
    try:
        code = run_script(body, config, name, [x for pair in flags.items() for x in pair])
    except ZeroDivisionError:  # of Crash
        code = -1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    gc.collect()
    return code


def lines(folder, name="metrics.jsonl"):
    found = [json.loads(x) for x in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.startswith("time/") and k != "tokens_per_s"} for x in found]


def outcome(folder):
    return hashlib.sha256((folder / "final/model.safetensors").read_bytes()).hexdigest(), lines(folder)


def test_a_validation_is_logged_whether_its_step_is_due_or_not(tmp_path):
    argv = ["--run.steps", "7", "--run.log_every", "5"]
    assert stage(tmp_path / "x", *argv, body=lambda config, run: main(config, run, every=3)) == 0
    assert [(line["step"], "val/loss" in line) for line in lines(tmp_path / "x")] == [
        (1, False), (3, True), (5, False), (6, True), (7, True)
    ]  # fmt: skip


# ---- folders --------------------------------------------------------------------------------------------------------


def unfinished(folder):
    assert stage(folder, body=lambda config, run: main(config, Crash(run, 2))) == -1


class Crash:
    """A run that is interrupted while it logs a step."""

    def __init__(self, run, at):
        self.run, self.at = run, at

    def __getattr__(self, name):
        if name == "log":
            return self.log
        return getattr(self.run, name)

    def log(self, step, *what, **how):
        self.run.log(step, *what, **how)
        if step == self.at:
            raise ZeroDivisionError


def test_folders_that_may_and_may_not_become_a_run(tmp_path, capsys):
    new, empty = tmp_path / "a/b/new", tmp_path / "empty"
    empty.mkdir()
    assert stage(new) == 0
    assert stage(empty) == 0
    assert {"config.json", "metrics.jsonl", "final", "checkpoints", "environment.json"} <= set(os.listdir(new))
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    file.write_text("mine")
    unfinished(tmp_path / "half")
    capsys.readouterr()
    for folder, words in (
        (foreign, "thesis.txt"),
        (file, "File exists"),
        (file / "below", "Not a directory"),
        (new, "finished run; choose another"),
        (tmp_path / "half", "unfinished run; add --run.resume true"),
    ):
        assert stage(folder) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert (foreign / "thesis.txt").read_text() == file.read_text() == "mine"
    assert os.listdir(foreign) in (["thesis.txt", ".lock"], [".lock", "thesis.txt"])


def test_a_finished_run_has_nothing_to_resume(tmp_path, capsys):
    stage(tmp_path / "x")
    before = outcome(tmp_path / "x")
    assert stage(tmp_path / "x", "--run.resume", "true") == 0
    assert "nothing to resume; python -m minirlhf.report" in capsys.readouterr().out  # which this stage does not make
    assert outcome(tmp_path / "x") == before


def test_what_a_kill_leaves_before_the_first_step_is_not_foreign(tmp_path):
    """PPO answers and evaluates before its first line of metrics; a write may be cut in the middle."""
    for name in [
        ".environment.json.tmp",
        "config.json",
        ".config.json.tmp",
        ".metrics.jsonl.tmp",
        "samples.jsonl",
        "evaluation.json",
        "probe.json",
        "environment.json",
        "dropped.jsonl",
        "alarms.jsonl",
    ]:
        folder = tmp_path / name
        folder.mkdir()
        if name != ".environment.json.tmp":  # the first file
            (folder / "environment.json").write_text("{}\n")
        (folder / name).write_text("{}\n")
        assert stage(folder) == 0, name


@pytest.mark.parametrize("name", ["config.json", "evaluation.json", "dropped.jsonl"])
def test_files_of_these_names_where_nothing_ran_stay_as_they_are(name, tmp_path, capsys):
    (tmp_path / name).write_text('{"run": {"steps": 4}}')
    assert stage(tmp_path) == 2
    assert f"holds {name}, which is no run" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == '{"run": {"steps": 4}}'


def test_default_folders_of_earlier_runs_go_aside(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for n in range(3):
        assert stage("") == 0
        assert len(os.listdir("runs")) == n + 1
    assert sorted(os.listdir("runs")) == ["sft", "sft.1", "sft.2"]
    assert "it is now runs/sft.2" in capsys.readouterr().err
    assert outcome(Path("runs/sft")) == outcome(Path("runs/sft.1"))


# ---- lock -----------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, capsys):
    config = load_config(SFTConfig, ["--run.dir", str(tmp_path / "x")])
    first = Run(config, "sft")
    with pytest.raises(UsageError, match="another process is running here"):
        Run(config, "sft")
    fcntl.flock(first._lock, fcntl.LOCK_UN)
    assert stage(tmp_path / "x") == 0


# ---- resume ---------------------------------------------------------------------------------------------------------


def other(value, field):
    """A different value of the same type that the range allows."""
    if isinstance(value, bool):
        return not value
    if field.metadata["choices"]:
        return next(c for c in field.metadata["choices"] if c != value)
    if isinstance(value, tuple):
        return (*value[:-1], 0.5) if value and isinstance(value[0], float) else (*value, "x")
    return value + "x" if isinstance(value, str) else value + 1 if isinstance(value, int) else value / 2 + 0.01


@pytest.mark.parametrize(("cls", "name"), [(SFTConfig, "sft"), (RMConfig, "rm"), (PPOConfig, "ppo")])
def test_at_a_resume_only_the_pinned_settings_may_differ(cls, name, tmp_path, monkeypatch):
    """Every key of the configuration, one by one."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # handlers hold a run, and the run its lock
    folder = tmp_path / "x"
    config = dataclasses.replace(cls(), run=dataclasses.replace(cls().run, dir=str(folder)))
    (folder / "checkpoints/step_00000001").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    accepted = set()
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for field in dataclasses.fields(part):
            changed = dataclasses.replace(part, **{field.name: other(getattr(part, field.name), field)})
            new = dataclasses.replace(config, **{section.name: changed})
            new = dataclasses.replace(
                new, run=dataclasses.replace(new.run, resume=True, dir=str(folder), log_with="none")
            )
            key = f"{section.name}.{field.name}"
            try:
                run = Run(new, name)
                accepted.add(key)
                run._lock.close()
            except UsageError as e:
                assert f"run.resume: {key} was" in str(e)  # noqa: PT017
    free = {"run.dir", "run.engine", "run.keep", "run.save_every", "run.log_every"}  # the contract's
    assert free <= accepted
    assert accepted - free <= {"run.resume", "run.debug", "run.log_with", "run.dry_run"}  # change no number of a run


def test_a_resumed_run_cuts_what_came_after_and_leaves_what_came_before(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stage(whole)
    unfinished(cut)  # step 2 is logged and not saved
    assert [x["step"] for x in lines(cut)] == [1, 2]
    first = (cut / "metrics.jsonl").read_bytes().split(b"\n")[0]
    with (cut / "metrics.jsonl").open("ab") as f:
        f.write(b'{"step": 3, "loss')
    assert stage(cut, "--run.resume", "true", "--run.keep", "7", "--run.log_every", "1") == 0
    assert outcome(cut) == outcome(whole)
    assert (cut / "metrics.jsonl").read_bytes().split(b"\n")[0] == first  # clocks included


def test_damaged_checkpoints_are_named_passed_over_or_the_end(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stage(whole)
    assert stage(cut, "--run.keep", "3", body=lambda config, run: main(config, Crash(run, 4))) == -1
    (cut / "checkpoints/step_00000003/model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert stage(cut, "--run.resume", "true", "--run.keep", "3") == 0
    assert "step_00000003/model.safetensors" in capsys.readouterr().err
    assert outcome(cut) == outcome(whole)
    broken = tmp_path / "broken"
    unfinished(broken)
    (broken / "checkpoints/step_00000001/state.json").unlink()
    capsys.readouterr()
    assert stage(broken, "--run.resume", "true") == 4
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "step_00000001" in err[0]
    assert err[1].startswith("error: ")


def test_a_resume_without_any_checkpoint_starts_from_the_beginning(tmp_path):
    stage(tmp_path / "whole")
    assert stage(tmp_path / "new", "--run.resume", "true") == 0
    assert stage(tmp_path / "cut", body=lambda config, run: main(config, Crash(run, 1))) == -1
    assert stage(tmp_path / "cut", "--run.resume", "true") == 0
    assert outcome(tmp_path / "new") == outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_another_machine_is_said(tmp_path, capsys):
    unfinished(tmp_path / "x")
    path = tmp_path / "x/environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 77}))
    capsys.readouterr()
    assert stage(tmp_path / "x", "--run.resume", "true") == 0
    assert "resumed elsewhere: threads 77 -> " in capsys.readouterr().err


@pytest.mark.parametrize("source", ["data.path", "model.path", "data.template", "model.tokenizer"])
def test_a_resume_from_other_data_or_another_model_is_refused(source, tmp_path, capsys):
    file = tmp_path / ("from/model.safetensors" if source == "model.path" else "from/own.json")
    file.parent.mkdir()
    file.write_bytes(b"a" * 3000)
    argv = [f"--{source}", str(file.parent if source == "model.path" else file)]
    body = lambda config, run: main(config, Crash(run, 2))  # noqa: E731
    assert stage(tmp_path / "x", *argv, body=body) == -1
    for changed in (b"a" * 2999 + b"b", b"a" * 3001, b""):
        file.write_bytes(changed)
        assert stage(tmp_path / "x", *argv, "--run.resume", "true") == 2
        assert f"{argv[1]} is not what it was when" in capsys.readouterr().err
    file.write_bytes(b"a" * 3000)
    assert stage(tmp_path / "x", *argv, "--run.resume", "true") == 0


def test_of_a_large_file_the_ends_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ENDS", 4)
    path = tmp_path / "d.jsonl"
    config = load_config(SFTConfig, ["--data.path", str(path)])
    path.write_text("1234....7890")
    (known,) = run.sources(config).items()
    for other, same in (("1234.xx.7890", True), ("1x34....7890", False), ("1234....78x0", False)):
        path.write_text(other)
        assert (list(run.sources(config).items()) == [known]) == same
    assert known[0] == str(path)


def test_the_best_checkpoint_stays(tmp_path):
    """val/loss is lowest at the step that the log says."""
    stage(tmp_path / "x", "--run.keep", "1", "--run.steps", "6", "--optim.lr", "10", "--optim.schedule", "constant")
    losses = {x["step"]: x["val/loss"] for x in lines(tmp_path / "x")}
    best = min(losses, key=lambda s: (losses[s], -s))
    found = sorted(p.name for p in (tmp_path / "x/checkpoints").iterdir())
    assert found == ([f"best_{best:08d}"] if best != 6 else []) + ["step_00000006"]


# ---- failing disks --------------------------------------------------------------------------------------------------


ALL = [pytest.param(number, 1, marks=pytest.mark.slow) for number in (errno.ENOSPC, errno.EIO)]


@pytest.mark.parametrize(("number", "every"), [(errno.ENOSPC, 11), (errno.EIO, 13), *ALL])
def test_a_disk_that_fails_anywhere_ends_in_one_line_and_loses_nothing(tmp_path, capsys, number, every):
    stage(tmp_path / "whole", "--run.steps", "2")
    total = len(recorded(lambda: stage(tmp_path / "count", "--run.steps", "2")))
    assert total > 60
    codes = set()
    for at in range(0, total, every):
        folder = tmp_path / f"x{at}"
        capsys.readouterr()
        with disk_calls(failing(number, at=at)):
            code = stage(folder, "--run.steps", "2")
        err = capsys.readouterr().err
        codes.add(code)
        if code:
            assert code in (2, 4), err
            assert err.count("\n") == 1, err
            assert os.strerror(number) in err, err
            assert str(tmp_path) in err, err
        saved = checkpoint.load_newest(folder / "checkpoints")
        done = [x["step"] for x in lines(folder)] if (folder / "metrics.jsonl").exists() else []
        if (folder / "final").exists() or code == 0:
            assert saved[0] == 2
        assert not done or len(done) - (saved[0] if saved else 0) <= 1
        assert stage(folder, "--run.steps", "2", "--run.resume", "true") == 0
        assert outcome(folder) == outcome(tmp_path / "whole")
    assert {0, 4} >= codes - {2}
    assert 4 in codes


# ---- signals --------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from minirlhf.config import SFTConfig
from minirlhf.run import run_script
def main(config, run):
    run.restore()
    if sys.argv[2] == "early":
        print("ready", flush=True)
        time.sleep(60)
    for step in run.steps(0, lambda: ({}, {})):
        print("ready", flush=True)
        for _ in range(600 if sys.argv[2] == "hang" else 10):
            time.sleep(0.1)
run_script(main, SFTConfig, "sft", ["--run.dir", sys.argv[1]])
"""


def child(folder, kind):
    command = [sys.executable, "-c", CHILD, str(folder), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_ends_the_step_and_saves(tmp_path, number, code):
    process = child(tmp_path / "x", "soon")
    process.send_signal(number)
    assert process.wait(20) == code
    assert checkpoint.load_newest(tmp_path / "x/checkpoints")[0] == 1


@pytest.mark.parametrize(
    ("first", "second", "code"), [(signal.SIGTERM, signal.SIGINT, 130), (signal.SIGINT, signal.SIGTERM, 143)]
)
def test_the_second_signal_leaves_at_once(tmp_path, first, second, code):
    process = child(tmp_path / "x", "hang")
    process.send_signal(first)
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(second)
    assert process.wait(20) == code
    assert time.monotonic() - began < 5
    assert checkpoint.load_newest(tmp_path / "x/checkpoints") is None


def test_before_there_is_anything_to_save_one_signal_is_enough(tmp_path):
    process = child(tmp_path / "x", "early")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
