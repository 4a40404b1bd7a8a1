"""`--run.log_with`: the lines of metrics.jsonl, elsewhere; checked against the packages' own readers, or a stand-in."""

import json
import os
import subprocess
import sys

import pytest
from processes import ENV, ROOT
from test_scripts import script

from minirlhf.errors import UsageError
from minirlhf.log import exporter

SFT = ["--run.steps", "4", "--data.size", "600", "--optim.warmup_steps", "2", "--run.log_every", "1"]
WANDB = """
import json
class Error(Exception): pass
class Run:
    def __init__(self, how): self.path = how["dir"] + "/seen.jsonl"; self.log(how, None)
    def log(self, line, step):
        with open(self.path, "a") as f: f.write(json.dumps([line, step]) + "\\n")
def init(**how):
    if how["name"] == "refused": raise Error("no key")
    return Run(how)
"""


def test_a_missing_package_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(UsageError, match=rf"run\.log_with {name}: .*minirlhf\[log\]"):
            exporter(name, tmp_path, {})
    exporter("none", tmp_path, {})({"step": 1})


def test_an_unknown_one_is_refused(tmp_path):
    assert "run.log_with" in script("sft", "--run.log_with", "neptune", cwd=tmp_path, code=2)


def test_wandb_gets_every_line(tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "wandb.py").write_text(WANDB)
    env = ENV | {"PYTHONPATH": f"{tmp_path / 'stub'}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "train_sft.py"), *SFT, "--run.log_with", "wandb", "--run.dir"]
    how = {"env": env, "capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run([*command, str(tmp_path / "x")], **how)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in (tmp_path / "x/seen.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
    assert seen[0][0]["name"] == "x"
    assert seen[0][0]["config"]["run"]["steps"] == 4
    assert seen[1:] == [[{k: v for k, v in line.items() if v is not None}, line["step"]] for line in metrics]
    done = subprocess.run([*command, str(tmp_path / "refused")], **how)
    assert done.returncode == 2
    assert "no key" in done.stderr
    assert "Traceback" not in done.stderr


def test_tensorboard_reads_what_was_written(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    script("sft", *SFT, "--run.log_with", "tensorboard", "--run.dir", tmp_path / "x", cwd=tmp_path)
    found = reader.EventAccumulator(str(tmp_path / "x/tensorboard")).Reload()
    metrics = [json.loads(line) for line in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics]
    assert len(losses) == 4
