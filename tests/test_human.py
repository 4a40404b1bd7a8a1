"""A person as the reward: what is shown, what is asked again, and PPO with typed numbers."""

import io
import json
import sys

import pytest
from processes import ROOT, run
from test_chat import folders  # noqa: F401  the fixture
from test_scripts import TINY

from minirlhf import human
from minirlhf.errors import UsageError
from minirlhf.reward import load_reward_fn


def test_each_answer_is_shown_and_its_number_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n-0.5\nten\n\nnan\ninf\n 2e-1 \n"))
    reward = load_reward_fn("human")
    talk = (("user", "how?"), ("assistant", "so"), ("user", "why?"))
    assert reward(["how?", talk, "\x1b[2J"], ["well", "", "a\nb"]) == [1.0, -0.5, 0.2]
    out = capsys.readouterr().out
    assert "[1/3] how?\n> well\nreward: " in out
    assert "[2/3] user: how?⏎\nassistant: so⏎\nuser: why?\n> (empty)" in out
    assert "⟨U+001B⟩[2J" in out
    assert "> a⏎\nb" in out
    assert out.count("a number, such as 1") == 4


def test_the_end_of_the_input_is_told(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    with pytest.raises(UsageError, match=r"reward\.fn .* the input ended"):
        load_reward_fn("human")(["p", "p"], ["a", "b"])


def test_one_person_cannot_sit_at_several_ranks(monkeypatch):
    monkeypatch.setattr(human.dist, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="torchrun"):
        load_reward_fn("human")(["p"], ["a"])


def ppo(model, typed, *argv):
    command = [ROOT / "train_ppo.py", *TINY["ppo"], "--reward.fn", "human", "--model.path", model, *argv]
    return run(*command, cwd=ROOT, text=typed)


def test_ppo_learns_from_typed_numbers(folders, tmp_path):  # noqa: F811
    """Six answers before, 3 × 16 of the rollouts, six after: 60 numbers, of which the i-th is i."""
    typed = "".join(f"{i}\n" for i in range(60))
    code, out, err = ppo(folders / "a", typed, "--run.log_every", "1", "--run.dir", tmp_path / "x")
    assert code == 0, err
    assert out.count("reward: ") == 60
    metrics = [json.loads(line) for line in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
    means = [sum(range(6 + 16 * k, 22 + 16 * k)) / 16 for k in range(3)]  # 13.5, 29.5, 45.5
    assert [line["objective/scores"] for line in metrics] == means
    samples = [json.loads(line) for line in (tmp_path / "x/samples.jsonl").read_text().splitlines()]
    assert [s["score"] for s in samples] == [*range(6), *range(54, 60)]
    assert (tmp_path / "x/report.html").exists()
    code, _, err = ppo(folders / "a", typed[:80], "--run.dir", tmp_path / "y")
    assert code == 2
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in err
