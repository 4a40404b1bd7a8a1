"""DPO: the fourth script, its pairs and its log-probs."""

import math
import shutil

import pytest
from test_scripts import metrics, script

from minirlhf.data import encode_pairs
from minirlhf.errors import DataError
from minirlhf.formats import Ranking
from minirlhf.templates import get_template
from minirlhf.tokenizer import SPECIAL, Tokenizer

WORDS = Tokenizer.from_words([*SPECIAL, "good", "bad", "so", "film"])


def encoded(*records, max_length=16):
    return encode_pairs(records, WORDS, get_template("plain"), max_length)


def texts(pair):
    return tuple(WORDS.decode([i for i, on in zip(e.ids, e.trained, strict=True) if on]) for e in pair)


def test_a_list_gives_its_strict_pairs():
    pairs, counts = encoded(Ranking("film", ["good", "so", "bad", "good bad"], [1, 2, 2, 0]))
    assert [texts(pair) for pair in pairs] == [("good", "so"), ("good", "bad")]
    assert counts == {"too_long": 0}


def test_what_is_too_long_is_left_out_whole_and_counted():
    long, short = Ranking("film", ["good " * 20, "bad"], [1, 2]), Ranking("film", ["good", "bad"], [2, 1])
    pairs, counts = encoded(long, short)
    assert [texts(pair) for pair in pairs] == [("bad", "good")]
    assert counts == {"too_long": 1}
    with pytest.raises(DataError, match="no pair"):
        encoded(long)


def test_dpo_starts_at_ln_2_and_runs_again_bit_for_bit(tmp_path, stages):
    shutil.copytree(stages, tmp_path, dirs_exist_ok=True)
    tiny = ["--data.size", "64", "--dpo.minibatch_size", "16", "--dpo.microbatch_size", "8",
            "--optim.warmup_steps", "1", "--run.log_every", "1", "--run.steps", "6"]  # fmt: skip
    said = script("dpo", *tiny, cwd=tmp_path)
    assert "runs/dpo/report.html" in said
    lines = metrics(tmp_path / "runs/dpo")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[1]["loss"] != lines[0]["loss"]
    script("dpo", *tiny, cwd=tmp_path)
    weights = [(tmp_path / "runs" / name / "final/model.safetensors").read_bytes() for name in ("dpo", "dpo.1")]
    assert weights[0] == weights[1]
