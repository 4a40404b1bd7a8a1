"""The ledger: columns that add up to the log, and an update that is done again bit for bit."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import run
from safetensors.torch import load_file, save_file
from test_scripts import script
from tolerance import assert_close, fp32

from minirlhf.config import PPOConfig, load_config
from minirlhf.ledger import COLUMNS, SUMS, differences, main, replay, sums
from minirlhf.rollout import load_rollout

SMALL = ["--run.steps", "2", "--run.save_every", "1", "--run.log_every", "1", "--run.threads", "1",
         "--ppo.rollout_size", "8", "--ppo.minibatch_size", "4", "--ppo.microbatch_size", "2",
         "--ppo.save_rollouts", "1"]  # fmt: skip
RUNS = ("", "oai2019", "trl-v2", "dschat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stages):
    """Tiny runs under four presets."""
    cwd = tmp_path_factory.mktemp("ledger")
    shutil.copytree(stages, cwd, dirs_exist_ok=True)
    for name in RUNS:
        preset = ["--ppo.preset", name] if name else []
        said = script("ppo", *SMALL, *preset, "--run.dir", f"run-{name}", cwd=cwd)
        assert (f"preset {name}: score_at" in said) == bool(name)
    return cwd


@pytest.fixture(scope="module")
def again(folder):
    """Replays in this process, each once, in one thread and the folder of the runs."""
    done, threads, before = {}, torch.get_num_threads(), Path.cwd()
    os.chdir(folder)
    torch.set_num_threads(1)

    def run(name, step=2, *settings):
        if (name, step, settings) not in done:
            config = load_config(PPOConfig, [f"run-{name}/config.json", *settings])
            path = Path(f"run-{name}/rollouts/step_{step:08d}.safetensors")
            done[name, step, settings] = replay(config, path, [s[2:] for s in settings[::2]])
        return done[name, step, settings]

    yield run
    os.chdir(before)
    torch.set_num_threads(threads)


def logged(folder, name, step=2):
    lines = (folder / f"run-{name}/metrics.jsonl").read_text().splitlines()
    return next(line for line in map(json.loads, lines) if line["step"] == step)


@pytest.mark.parametrize("name", RUNS)
def test_columns_add_up_to_the_log(folder, name, again):
    rows = sums(again(name), logged(folder, name))
    assert len(rows) == len(SUMS) + 1
    for metric, _, total, n, mean, log in rows:
        assert log is not None, metric
        assert mean == pytest.approx(total / n)
        assert mean == pytest.approx(log, rel=2e-5, abs=2e-6), metric


def test_one_episode_by_hand(folder, again):
    """Rewards, δ, returns of one answer in a loop over its tokens; γ = 1, λ = 0.95."""
    r = again("")
    rollout, state, _ = load_rollout(folder / "run-/rollouts/step_00000002.safetensors")
    for b in range(len(rollout)):
        n, following, beta = int(rollout.lengths[b]), 0.0, state["kl_coef"]
        score = (float(rollout.scores[b]) - state["shift"]) / state["scale"]
        for t in reversed(range(n)):
            x = float(rollout.old_logprobs[b, t]) - float(rollout.ref_logprobs[b, t])
            reward = -beta * x + (score if t == n - 1 else 0.0)
            value = float(rollout.values[b, t])
            delta = reward + (float(rollout.values[b, t + 1]) if t + 1 < n else 0.0) - value
            following = delta + 0.95 * following
            for name, expected in (("kl", x), ("reward", reward), ("value", value), ("delta", delta),
                                   ("return", following + value), ("mask", 1.0)):  # fmt: skip
                assert_close(r.columns[name][b, t], expected, fp32)
        assert not any(x[b, n:].any() for x in r.columns.values())


def test_the_ratio_is_the_mean_over_the_passes(folder, again):
    """With a rate of 0 nothing moves: every ratio is 1 and nothing is clipped."""
    r = again("", 2, "--optim.lr", "0")
    mask = r.rollout.action_mask
    assert_close(r.columns["ratio"][mask], torch.ones(int(mask.sum())), fp32)
    assert not r.columns["clipped"].any()


@pytest.mark.parametrize("name", RUNS)
def test_the_state_after_an_answer_is_in_the_table_of_those_who_score_it(folder, name, again):
    r = again(name)
    extra = (r.rollout.value_mask & ~r.rollout.action_mask).sum(1)
    cut = r.rollout.lengths == r.rollout.responses.shape[1]
    assert torch.equal(extra, (~cut).long() if name in ("trl-v2", "dschat") else torch.zeros_like(extra))
    assert bool(r.columns["value_loss"][r.rollout.value_mask & ~r.rollout.action_mask].any()) == (name == "trl-v2")
    if name == "oai2019":
        beta = load_rollout(folder / "run-oai2019/rollouts/step_00000002.safetensors")[1]["kl_coef"]
        bonus = r.columns["reward"] + beta * r.columns["kl"]
        assert_close(bonus[:, -1], r.scores, fp32)
        assert bonus[:, :-1].abs().max() < 1e-6
        assert (r.columns["answer"].sum(1) < r.columns["mask"].sum(1)).any()


@pytest.fixture
def ledger(again, capsys):
    """The command, in this process → exit code, stdout, stderr."""

    def run(*argv):
        try:
            code = main([str(x) for x in argv])
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


def test_the_printed_columns_add_up_to_the_printed_sums(ledger):
    code, out, _ = ledger("run-", "--step", 1, "--episode", 3)
    assert code == 0
    table, below = out.split("\n\n")[1:3]
    head, *rows, last = table.splitlines()
    assert tuple(head.split()[3:]) == COLUMNS
    tokens = [line.split()[-11:] for line in rows]
    total = last.split()[-11:]
    assert int(total[0]) == len(rows) == sum(int(row[0]) for row in tokens)
    for i in range(1, 11):
        assert sum(float(row[i]) for row in tokens) == pytest.approx(float(total[i]), abs=1e-5 * len(rows))
    assert len(below.splitlines()) == len(SUMS) + 2
    for line in below.splitlines()[1:]:
        mean, log = map(float, line.split()[-2:])
        assert mean == pytest.approx(log, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("step", [1, 2])
def test_a_replay_is_the_run_in_every_bit(folder, again, name, step):
    compared, wrong = differences(folder / f"run-{name}", step, again(name, step), logged(folder, name, step))
    assert wrong == []
    assert len(compared) > 60
    assert sum("step_" in word for word in compared) > 40


def test_the_command_says_so(folder):
    code, out, err = run("-m", "minirlhf.ledger", "run-", "--step", "1", "--replay", cwd=folder)
    assert code == 0, err
    equal, compared = map(int, re.search(r"^(\d+) of (\d+) numbers and tensors equal", out, re.M).groups())
    assert equal == compared > 60
    assert "differs" not in out


@pytest.mark.parametrize("where", ["metric", "checkpoint", "rollout"])
def test_a_replay_that_differs_ends_with_5_and_says_where(folder, ledger, tmp_path, where):
    run = tmp_path / "run"
    shutil.copytree(folder / "run-", run)
    if where == "metric":
        path = run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[1]["loss/policy_avg"] *= 1 + 1e-9
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path = run / ("checkpoints/step_00000002/policy.safetensors" if where == "checkpoint" else
                      "rollouts/step_00000002.safetensors")  # fmt: skip
        with torch.no_grad():
            tensors = load_file(path)
            name = next(n for n, x in tensors.items() if x.ndim == 2 and x.is_floating_point() and "rollout" not in n)
            tensors[name][0, 0] += 1e-3
        words = {"minirlhf": ""} if where == "checkpoint" else metadata(path)
        save_file(tensors, path, metadata=words)
    code, out, _ = ledger(run, "--step", 2, "--replay")
    assert code == 5, out
    assert {"metric": "differs: metric loss/policy_avg", "checkpoint": "differs: step_00000002: policy."}.get(
        where, "differs: "
    ) in out


def test_a_checkpoint_cut_short_is_named(folder, ledger, tmp_path):
    shutil.copytree(folder / "run-", tmp_path / "run")
    path = tmp_path / "run/checkpoints/step_00000002/policy.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = ledger(tmp_path / "run", "--step", 2, "--replay")
    assert code == 4
    assert str(path) in err.splitlines()[-1]


def metadata(path):
    with path.open("rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]


def test_a_replay_with_another_setting_says_what_it_would_have_done(ledger):
    code, out, _ = ledger("run-", "--step", 2, "--replay", "--ppo.clip_range", "0.0001")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("policy/clipfrac_avg")).split()
    assert float(row[2]) > float(row[1])
    assert row[3] == "differs"
    assert "with --ppo.clip_range 0.0001" in out
    row = next(line for line in out.splitlines() if line.startswith("objective/kl")).split()
    assert row[1] == row[2]  # the rollout is the same


def test_the_penalty_of_a_replay_can_be_changed(folder, again):
    r = again("", 2, "--ppo.kl_coef", "0")
    one_reward = (r.columns["reward"] != 0).sum(1)
    assert (one_reward <= 1).all()


def test_mistakes_end_in_one_line_and_their_code(ledger, tmp_path):
    (tmp_path / "empty").mkdir()
    for argv, code, word in [
        (["run-", "--step", 9], 4, "steps 1, 2"),
        (["nowhere", "--step", 1], 4, "nowhere"),
        ([tmp_path / "empty", "--step", 1], 4, "ppo.save_rollouts"),
        (["run-", "--step", 1, "--episode", 8], 2, "0 to 7"),
        (["run-", "--step", 1, "--ppo.clip_range", "0.1"], 2, "--replay"),
        (["run-", "--step", 1, "--replay", "--ppo.clip", "0.1"], 2, "ppo.clip"),
        (["run-", "--step", 1, "--replay", "--ppo.score_at", "next"], 2, "score_at"),
        (["run-"], 2, "--step"),
    ]:
        got, out, err = ledger(*argv)
        assert (got, out) == (code, ""), argv
        assert word in err.splitlines()[-1]
