"""Reward models on grades: margins, direct scores, normalization, through the script and by hand."""

import json
import math
import re

import pytest
import torch
from test_scripts import metrics, script
from tolerance import assert_close, fp32, fp64

from minirlhf import review_world, stage
from minirlhf.config import RMConfig, RMSection, load_config
from minirlhf.data import RankedList, side_by_side
from minirlhf.errors import CheckpointError, DataError
from minirlhf.evaluate import score_rows
from minirlhf.formats import read_records
from minirlhf.heads import RewardModel
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.score import reward_of
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer
from train_rm import list_losses

SHORT = ["--run.steps", "40", "--optim.warmup_steps", "2", "--rm.minibatch_size", "16", "--rm.microbatch_size", "16"]
PROMPT = "Human: how was the hotel ? Assistant:"
GOOD, BAD = "bed great , lobby lovely .", "bed awful , lobby broken ."


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_a_labeler_that_never_prefers_is_an_error_and_no_endless_search(monkeypatch):
    config = load_config(RMConfig, ["--data.size", "4", "--sample.max_new_tokens", "2"])
    words = review_world.words("en")
    tokenizer = Tokenizer.from_words(words)
    sizes = ModelConfig("gpt2", vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, d_model=8, max_seq_len=32)
    loaded = stage.Loaded(CausalLM(sizes), tokenizer, get_template("plain"))
    monkeypatch.setattr(stage, "JUDGED", 4)
    monkeypatch.setattr(review_world, "judge", lambda *_, **__: None)
    with pytest.raises(DataError, match=r"data\.labeler good: prefers none of 4 pairs"):
        stage.judged_pairs(config, loaded, 4, "pair")


def test_margins_by_hand():
    """Two lists: grades 3, 1, 0 with margin ½ of their differences; and one without grades."""
    lists = [RankedList([[0]] * 3, [1, 2, 3], [3.0, 1.0, 0.0]), RankedList([[0]] * 2, [2, 1])]
    found = list_losses(torch.tensor([1.0, 0.5, -1.0, 0.25, 2.0]).double(), lists, RMSection(margin=0.5))
    gaps = [0.5 - 1.0, 2.0 - 1.5, 1.5 - 0.5]  # r_i - r_j - m (g_i - g_j)
    assert_close(found, [sum(-math.log(sigmoid(g)) for g in gaps) / 3, -math.log(sigmoid(1.75))], fp64)
    plain = list_losses(torch.tensor([1.0, 0.5, -1.0, 0.25, 2.0]).double(), lists, RMSection())
    assert_close(plain[0], sum(-math.log(sigmoid(g)) for g in (0.5, 2.0, 1.5)) / 3, fp64)


def test_direct_scores_by_hand():
    """The mean over the answers of a list of (σ(r) - grade)²; padding counts for nothing."""
    lists = [RankedList([[0]], [1], [1.0]), RankedList([[0]] * 2, [1, 2], [0.75, 0.0])]
    scores = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    found = list_losses(scores, lists, RMSection(loss="direct"))
    expected = [(sigmoid(2) - 1) ** 2, ((sigmoid(1) - 0.75) ** 2 + sigmoid(-1) ** 2) / 2]
    assert_close(found, expected, fp64)
    found.sum().backward()
    slope = 2 * (sigmoid(2) - 1) * sigmoid(2) * (1 - sigmoid(2))
    assert scores.grad[0].item() == pytest.approx(slope, rel=1e-12)


def test_graded_answers_side_by_side():
    grades = [0.5, 1.0, 0.5, 0.0, 1.0, 0.25, 0.75]
    lists = [RankedList([[i]], [1], [grade]) for i, grade in enumerate(grades)]
    found = side_by_side(lists, 4, seed=0)
    assert sorted(s for one in found for s in one.sequences) == [[i] for i in range(7)]
    for one in found:
        own = [grades[s[0]] for s in one.sequences]
        assert one.ranks == [1 + sorted(own, reverse=True).index(grade) for grade in own]
    assert side_by_side(lists, 4, seed=1) != found
    assert side_by_side([RankedList([[i]], [1], [1.0]) for i in range(5)], 4, seed=0) == []


def test_normalized_scores():
    config = ModelConfig(vocab_size=11, n_layer=1, n_head=1, d_model=8, max_seq_len=8)
    model = RewardModel(config, rng=torch.Generator().manual_seed(0))
    ids = torch.randint(11, (40, 8), generator=torch.Generator().manual_seed(1))
    before = model(ids).detach()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    assert not score_rows(model, ids.tolist(), 8, "cpu").requires_grad  # which no memory would be free for
    model.normalize(before)
    after = model(ids).detach()
    assert_close(after.mean(), 0.0, {"rtol": 0, "atol": 1e-6})
    assert_close(after.std(correction=0), 1.0, fp32)
    assert_close(after, (before - before.mean()) / before.std(correction=0), fp32)
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    model.normalize(after * 3 + 5)  # once more, of scores that are what the model says now
    assert_close(model(ids).detach(), (after - 5) / 3, fp32)
    gain, bias = model.gain, model.bias
    model.normalize(torch.full((4,), 2.0))  # no deviation to divide by
    assert (model.gain, model.bias) == (gain, pytest.approx(bias - 2.0))


# ---- files ----------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
RATED = {"instruction": "q", "completions": [{"response": "a", "overall_score": 2},
                                             {"response": "b", "overall_score": 9}]}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "grades"),
    [
        (PAIR, []),
        (PAIR | {"margin": 1.5}, [1.5, 0.0]),
        (PAIR | {"margin": None}, []),
        *((PAIR | {"margin": unusable}, []) for unusable in (-1, "large", True, 10**400)),
        (PAIR | {"score_chosen": 1, "score_rejected": 2}, []),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1], "scores": [0.5, 1]}, [0.5, 1.0]),
        (PAIR | {"score_chosen": 8, "score_rejected": 6.5}, [8.0, 6.5]),
        (RATED, [2.0, 9.0]),
        ({"question": "q", "answer_0": "a", "answer_1": "b", "score_0": -1, "score_1": 1}, [-1.0, 1.0]),
    ],
)  # fmt: skip
def test_grades_of_data_files(tmp_path, row, grades):
    (record,), _ = read_records(write(tmp_path / "x.jsonl", [row]))
    assert record.grades == grades


def test_grades_that_cannot_be_used_are_counted(tmp_path):
    rows = [PAIR, PAIR | {"margin": "large"}, PAIR | {"margin": -1}, PAIR | {"score_chosen": 1, "score_rejected": 2}]
    records, summary = read_records(write(tmp_path / "x.jsonl", rows))
    assert summary.notes == {"unusable_margin": 2, "scores_against_choice": 1}
    assert len(records) == 4


@pytest.mark.parametrize("scores", [[1], [1, "2"], [1, 10**400], 1, {"a": 1}])
def test_scores_of_a_ranking_that_cannot_be_used_are_counted(tmp_path, scores):
    row = {"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1], "scores": scores}
    (record,), summary = read_records(write(tmp_path / "x.jsonl", [row]))
    assert record.grades == []
    assert summary.notes == {"unusable_scores": 1}


# ---- the script -----------------------------------------------------------------------------------------------------


def test_direct_scores_from_labels_through_the_script(stages, tmp_path):
    """Labels in, a reward model that tells good from bad out; normalized where asked, and PPO reads it so."""
    rows = [{"prompt": PROMPT, "response": text, "label": label} for text, label in ((GOOD, 1.0), (BAD, 0.0))] * 60
    data = write(tmp_path / "labels.jsonl", rows)
    model = ["--model.path", stages / "runs/sft/final", "--data.path", data, "--data.holdout", "20"]
    out = script("rm", *SHORT, *model, "--rm.loss", "direct", "--rm.hard_negatives", "0.1",
                 "--rm.normalize", "true", "--sample.max_new_tokens", "4", cwd=tmp_path)  # fmt: skip
    assert "held-out pairs" in out
    last = metrics(tmp_path / "runs/rm")[-1]
    assert last["val/accuracy"] == 1.0
    assert last["loss"] < 0.25  # that of always one half
    final = tmp_path / "runs/rm/final"
    meta = json.loads((final / "minirlhf.json").read_text())
    raw_head = reward_of(str(final))
    good, bad = raw_head([PROMPT] * 2, [GOOD, BAD])
    assert good > bad
    (final / "minirlhf.json").write_text(json.dumps(meta | {"score_gain": 1.0, "score_bias": 0.0}))
    plain = reward_of(str(final))([PROMPT] * 2, [GOOD, BAD])
    assert_close(torch.tensor([good, bad]), torch.tensor(plain) * meta["score_gain"] + meta["score_bias"], fp32)
    assert meta["score_gain"] != 1.0
    (final / "minirlhf.json").write_text(json.dumps(meta))
    script("ppo", "--model.path", stages / "runs/sft/final", "--run.steps", "1", "--ppo.rollout_size", "128",
           "--ppo.prompts", PROMPT, "--sample.max_new_tokens", "4", "--run.log_every", "1", cwd=tmp_path)  # fmt: skip
    first = metrics(tmp_path / "runs/ppo")[0]  # most answers are cut, and have no end that a text would have
    assert abs(first["objective/scores"]) < 0.4
    assert 0.7 < first["objective/scores_std"] < 1.4
    (final / "minirlhf.json").write_text(json.dumps(meta | {"score_gain": -1.0}))
    with pytest.raises(CheckpointError, match=r"score_gain -1\.0"):
        reward_of(str(final))


def test_margins_change_what_is_learnt_through_the_script(stages, tmp_path):
    data = write(tmp_path / "m.jsonl", [{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD, "margin": 2.0}] * 24)
    model = ["--model.path", stages / "runs/sft/final", "--data.path", data]
    first = {}
    for margin in ("0", "1"):
        folder = tmp_path / f"m{margin}"
        script("rm", *SHORT, *model, "--rm.margin", margin, "--run.dir", folder, cwd=tmp_path)
        first[margin] = metrics(folder)[0]["loss"]
    gap = -math.log(math.exp(first["0"]) - 1)  # the pairs are one and the same
    assert first["1"] == pytest.approx(math.log(1 + math.exp(2.0 - gap)), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "argv", "words"),
    [
        ([PAIR], ["--rm.margin", "1"], "no scores or margins"),
        ([PAIR], ["--rm.loss", "direct"], r"x.jsonl:1: no label or score"),
        ([PAIR | {"margin": 0.5}], ["--rm.loss", "direct"], r"x.jsonl:1: no label or score"),
        ([PAIR | {"score_chosen": 2, "score_rejected": 1}], ["--rm.loss", "direct"], r"x.jsonl:1: .* not from 0 to 1"),
        (
            [{"text": "so", "label": i % 2} for i in range(9)],
            ["--rm.loss", "direct", "--rm.normalize", "true"],
            "x.jsonl: its records have no prompts",
        ),
        ([PAIR], ["--rm.normalize", "true", "--sample.temperature", "0.000001"], "always says the same"),
        ([{"prompt": "q", "response": "a", "label": 1}], [], "--rm.loss direct learns from labels"),
        ([PAIR], ["--rm.loss", "softmax", "--rm.margin", "1"], "softmax has no pairs"),
        (None, ["--rm.loss", "direct"], "--data.path FILE"),
        (None, ["--rm.margin", "1"], "--data.path FILE"),
    ],
)
def test_what_cannot_work_is_said_through_the_script(stages, tmp_path, rows, argv, words):
    data = ["--data.path", write(tmp_path / "x.jsonl", rows)] if rows else []
    code = 3 if rows and "softmax" not in argv else 2
    said = script("rm", *SHORT, "--model.path", stages / "runs/sft/final", *data, *argv, cwd=tmp_path, code=code)
    assert re.search(words, said), said
