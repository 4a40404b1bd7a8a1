"""docs/human_feedback.md, command by command, with fewer steps; the person is a program that ranks by gold."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ENV, ROOT
from test_label import Page
from test_readme import commands

from minirlhf import review_world
from minirlhf.formats import read_records

DOCUMENT = (ROOT / "docs/human_feedback.md").read_text()
SETTINGS = {  # of the document's commands, replaced or added
    "train_sft.py": {"--run.steps": "60", "--data.size": "2000", "--optim.warmup_steps": "3"},
    "train_rm.py": {"--data.path": "ranked.jsonl", "--run.steps": "25"},
    "--reward.fn human": {"--run.steps": "1"},
    "train_ppo.py --run.steps": {"--run.steps": "2", "--ppo.rollout_size": "16", "--ppo.minibatch_size": "8",
                                 "--ppo.microbatch_size": "8"},
}  # fmt: skip


def shortened(line):
    """The command as the document has it, but for the settings that make it long."""
    for part, settings in SETTINGS.items():
        if part in line:
            for key, value in settings.items():
                line, n = re.subn(rf"{re.escape(key)} \S+", f"{key} {value}", line)
                line += "" if n else f" {key} {value}"
    return line.replace("python train_", f"python {ROOT}/train_")


def by_gold(task):
    answers = task["responses"]
    golds = review_world.gold_of_texts([task["prompt"]] * len(answers), answers, [True] * len(answers))
    return [1 + sum(other > gold for other in golds) for gold in golds]


def label_all(line, judge=by_gold):
    """The labeling page's command, and somebody who answers until there is nothing left."""
    tasks, *args = shlex.split(line)[3:]
    page = Page(tasks, args.pop(args.index("--out") + 1), *(a for a in args if a != "--out"))
    try:
        while (task := page.task())["task"]:
            assert page.rank(task["task"], judge(task), ms=4000) == 200
        return task["done"]
    finally:
        page.close()


@pytest.mark.slow
def test_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = ENV | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = {}
    for line in commands(DOCUMENT):
        if "minirlhf.label tasks.jsonl" in line:
            said[line] = label_all(line)
            continue
        typed = "0.5\n" * 20 if "--reward.fn human" in line else None
        done = subprocess.run(
            ["bash", "-euc", shortened(line)], cwd=tmp_path, env=env, input=typed, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said[line] = done.stdout + done.stderr
    tasks = [json.loads(line) for line in Path("tasks.jsonl").read_text().splitlines()]
    assert len(tasks) == 32
    assert all(len(set(task["responses"])) == 4 for task in tasks)
    records, summary = read_records("rankings.jsonl")
    assert 32 <= len(records) + summary.notes["no_preference"] <= 45  # repeats among them
    ranked, _ = read_records("ranked.jsonl")
    assert 25 < len(ranked) <= 32
    agreement = json.loads(next(out for line, out in said.items() if "--agreement" in line))
    assert agreement["annotators"]["ann"] == len(records) + summary.notes["no_preference"]
    assert agreement["retest"] in (1.0, None)
    assert agreement["median_seconds"] == 4
    score = next(out for line, out in said.items() if "minirlhf.score" in line)
    assert float(re.search(r"agrees with ([\d.]+)", score)[1]) > 0.8
    assert Path("runs/ppo/final/model.safetensors").exists()
    assert Path("runs/ppo.1/evaluation.json").exists()  # the one before, by the reward model


@pytest.mark.parametrize("line", [x for x in DOCUMENT.splitlines() if x.startswith("    python -m minirlhf.label")])
def test_the_commands_of_a_team(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p {i}", "responses": ["a", "b"]} for i in range(40)]
    Path("tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 10 < label_all(line.strip(), lambda task: [1, 2]) < 40
