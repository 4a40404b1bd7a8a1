"""The failure lab: what runs before what, its arithmetic on made-up runs, and the page of tiny jobs."""

import json
import math
import re
import subprocess

import processes
import pytest
from tolerance import fp64

from minirlhf import lab, lab_page
from minirlhf.lab_page import bon_fit, gain, halved, spread, turn
from minirlhf.report import RunFiles

TINY = {
    "train_sft.py": "--run.steps 8 --data.size 200 --optim.warmup_steps 2",
    "train_rm.py": "--run.steps 4 --data.size 64 --optim.warmup_steps 1",
    "train_ppo.py": "--run.steps 6 --ppo.rollout_size 8 --ppo.minibatch_size 8 --ppo.microbatch_size 8",
}
SCRIPT = {"dropout_on.py": "train_ppo.py"}


def run(before=None, after=None, **metrics):
    lines = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
    return RunFiles(None, lines, [], [], [], {}, {}, {"before": before or {}, "after": after or {}})


@pytest.fixture
def tiny(monkeypatch):
    """Every job with so few steps that only its form is tested."""
    for name, line in lab.JOBS.items():
        first = line.split()[0]
        keys = TINY.get(SCRIPT.get(first, first))
        if keys:
            for key in re.findall(r"--[\w.]+", keys):
                line = re.sub(rf" {key} \S+", "", line)
            monkeypatch.setitem(lab.JOBS, name, f"{line} {keys}")
    popen = subprocess.Popen
    smaller = lambda command, **how: popen([command[0], processes.__file__, *command[1:]], **how)  # noqa: E731
    monkeypatch.setattr(lab.subprocess, "Popen", smaller)


# ---- what runs before what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lab.JOBS)
def test_a_job_comes_after_what_it_reads(name):
    ordered = lab.closure([name])
    assert ordered[-1] == name
    assert all(ordered.index(need) < ordered.index(job) for job in ordered for need in lab.needs(job))


def test_folders_in_command_and_files_are_needs():
    assert lab.needs("ppo-weak") == ["rm-weak", "sft"]
    assert lab.needs("ppo-weak-three") == ["rm-weak", "rm-weak-2", "rm-weak-3", "sft"]
    assert lab.needs("ppo-template-other") == ["rm-good", "sft"]


def test_every_job_belongs_to_a_scenario():
    assert set(lab.closure(job for name in lab_page.SCENARIOS for job in lab.jobs_of(name))) == set(lab.JOBS)


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_halved_at_the_first_iteration_of_half_the_length():
    lengths = lambda *x: run(**{"response/length_mean": x})  # noqa: E731
    assert halved(lengths(10.0, 7.0, 5.0, 6.0)) == 3
    assert halved(lengths(10.0, 5.5, 6.0)) == math.inf


def test_gain_counts_in_deviations_of_the_first_scores():
    assert gain(run({"score": 1.0, "score_std": 0.5}, {"score": 2.0})) == 2.0


def test_turn_of_a_gold_that_halves_while_the_score_grows():
    gold = [0.0] * 5 + [0.4] * 5 + [0.2] * 5
    rising = [float(i) for i in range(15)]
    found = turn(run({"score_std": 2.0}, **{"gold/score": gold, "objective/scores": rising, "objective/kl": rising}))
    assert found.peak == pytest.approx(0.4, abs=fp64["atol"])
    assert found.last == pytest.approx(0.2, abs=fp64["atol"])
    assert found.fall == pytest.approx(0.5, abs=fp64["atol"])
    assert found.kl == pytest.approx(7.0, abs=fp64["atol"])  # of iterations 5 to 9
    assert found.proxy == pytest.approx(2.5, abs=fp64["atol"])  # from 7 to 12, in deviations of 2


def test_best_of_n_law_is_found_again():
    points = [(d, -0.2 + d * (0.9 - 0.15 * d)) for d in (0.0, 0.4, 0.8, 1.2, 1.8)]
    assert bon_fit(points) == pytest.approx((0.9, 0.15), abs=fp64["atol"])


def test_spread_counts_what_never_happened():
    assert spread([2.0, 4.0]) == '3 <span class="dim">(2 … 4)</span>'
    assert spread([3.0, math.inf]) == "3 in 1 of 2"
    assert spread([math.inf]) == "never"


# ---- the command ----------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_one_line(capsys):
    assert lab.main(["weka"]) == 2
    assert capsys.readouterr().err == "error: weka is no scenario; choose of weak, overopt, lr, dropout, template\n"


def test_a_failed_job_is_one_line(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setitem(lab.JOBS, "sft", "train_sft.py --run.steps 0")
    assert lab.main(["lr", "--seeds", "1", "--out", str(tmp_path)]) == 2
    assert "sft: exit code 2: error: " in capsys.readouterr().err


def test_page_of_one_scenario_and_no_second_run(tmp_path, tiny, capsys):
    assert lab.main(["template", "--seeds", "1", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "lab.html").read_text()
    assert "every stage must use the same" in page  # what train_ppo.py says to another template
    for job in lab.closure(lab.jobs_of("template")):
        assert " ".join(lab.command(job, 0)) in page
    metrics = tmp_path / "seed_0/ppo-template-same/metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    assert lab.main(["template", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert metrics.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "seed_0/ppo-refused.json").read_text())["code"] == 2


@pytest.mark.slow
def test_page_of_everything(tmp_path, tiny):
    assert lab.main(["--seeds", "2", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "lab.html").read_text()
    assert all(scenario.title in page for scenario in lab_page.SCENARIOS.values())
    assert page.count("<svg") >= 5
    assert "<script" not in page
