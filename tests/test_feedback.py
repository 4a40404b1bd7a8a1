"""What SFT learns of answers that people have judged: weights by hand."""

import json
import math

import pytest
from test_scripts import metrics, script

from minirlhf.errors import DataError
from minirlhf.feedback import judged
from minirlhf.formats import SFT, Prompt, Ranking, Scored
from minirlhf.stage import texts_of

LISTS = [Ranking("q", ["a", "b", "c", "d"], [2, 1, 3, 0]), Ranking("p", ["e", "f"], [1, 2])]
HOW = {"temperature": 0.5, "good": "+", "bad": "-"}


def weights(objective, records=LISTS):
    return {one.prompt + one.response: one.weight for one in judged(records, objective, **HOW)}


def test_an_answer_keeps_the_line_of_its_list():
    """An error of its text names it."""
    lists = [Ranking("q", ["a", "b"], [1, 2], line=7)]
    assert [one.line for one in texts_of([*lists, Prompt("p", line=8)])] == [7, 7, 8]
    for objective in ("rwr", "conditional"):
        assert [one.line for one in judged(lists, objective, **HOW)] == [7, 7]


def test_chosen_are_the_best_of_each_list():
    assert weights("chosen") == {"qb": 1, "pe": 1}


def test_unlikelihood_unlearns_the_worst():
    assert weights("unlikelihood") == {"qb": 1, "qc": -1, "pe": 1, "pf": -1}


def test_conditional_says_it_before_the_prompt():
    found = judged(LISTS, "conditional", **HOW)
    assert found == [SFT("+q", "b"), SFT("-q", "c"), SFT("+p", "e"), SFT("-p", "f")]


def test_reward_weights_by_hand():
    raw = {"qa": math.exp(1), "qb": math.exp(2), "qc": 1.0, "pe": math.exp(2), "pf": 1.0}  # e^(m/.5), m .5 1 0 1 0
    mean = sum(raw.values()) / 5
    assert weights("rwr") == pytest.approx({k: v / mean for k, v in raw.items()})


def test_reward_weights_at_a_temperature_whose_powers_no_float_holds():
    found = judged(LISTS, "rwr", temperature=1e-3, good="", bad="")  # e^0, e^-500; e^-1000 is 0 and left out
    assert [(one.response, one.weight) for one in found if one.weight > 1e-100] == [("b", 1.5), ("e", 1.5)]


def test_advantage_weights_by_hand_and_bounded():
    raw = {"qa": 1.0, "qb": math.e, "qc": 1 / math.e, "pe": math.e, "pf": 1 / math.e}
    mean = sum(raw.values()) / 5
    assert weights("awr") == pytest.approx({k: v / mean for k, v in raw.items()})
    sharp = [one.weight for one in judged(LISTS, "awr", temperature=0.01, good="", bad="")]
    assert max(sharp) / sharp[0] == pytest.approx(20)  # e^50 is not
    sharper = judged([Ranking("p", list("abcd"), [1, 2, 2, 2])], "awr", temperature=1e-3, good="", bad="")  # e^750
    assert [one.response for one in sharper if one.weight > 1e-9] == ["a"]


def test_labels_are_merits():
    graded = [Scored("q", "a", 1.0), Scored("q", "b", 0.25)]
    found = weights("rwr", graded)
    assert found["qa"] / found["qb"] == pytest.approx(math.exp(0.75 / 0.5))


def test_single_labels_are_held_against_the_mean_of_all_labels():
    single = [Scored("p", "good", 1.0), Scored("p", "bad", 0.0), Scored("q", "so", 0.2)]
    raw = {"good": math.exp(0.6), "bad": math.exp(-0.4), "so": math.exp(-0.2)}  # τ = 1, mean 0.4
    found = {one.response: one.weight for one in judged(single, "awr", temperature=1.0, good="", bad="")}
    assert found == pytest.approx({k: 3 * v / sum(raw.values()) for k, v in raw.items()})
    sharp = judged(single[:2], "awr", temperature=0.1, good="", bad="")  # e^5, cut to 20, and e^-5
    assert sharp[0].weight / sharp[1].weight == pytest.approx(20 * math.exp(5))
    (alone,) = judged(single[1:2], "awr", temperature=0.1, good="", bad="")
    assert alone.weight == 1


def test_tied_lists_say_nothing():
    tied = [Ranking("q", ["a", "b"], [1, 1])]
    assert weights("chosen", tied) == {}
    assert weights("unlikelihood", tied) == {}
    assert weights("conditional", tied) == {}


def test_without_judgement_there_is_nothing_to_learn():
    with pytest.raises(DataError, match="neither ranks nor labels"):
        judged([SFT("q", "a")], "chosen", **HOW)
    with pytest.raises(DataError, match="neither ranks nor labels"):
        judged([*LISTS, SFT("q", "a")], "chosen", **HOW)
    with pytest.raises(ValueError, match="zip"):
        judged([Ranking("q", ["a", "b"], [1])], "chosen", **HOW)


def test_ranked_answers_through_the_script(tmp_path, stages):
    rows = [{"prompt": "the film", "responses": ["is lovely", "is awful"], "ranks": [1, 2]}] * 8
    (tmp_path / "ranked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["--model.path", stages / "runs/sft/final", "--data.path", "ranked.jsonl", "--run.log_every", "1",
            "--run.steps", "8", "--sft.minibatch_size", "8", "--sft.microbatch_size", "4",
            "--optim.warmup_steps", "1"]  # fmt: skip
    said = {}
    for objective in ("chosen", "unlikelihood", "rwr", "awr"):
        script("sft", *more, "--sft.objective", objective, "--run.dir", objective, cwd=tmp_path)
        said[objective] = [line["loss"] for line in metrics(tmp_path / objective)]
        assert said[objective][-1] < said[objective][0], objective
    assert said["rwr"] == said["awr"]  # for pairs they are the same
    assert len({losses[-1] for losses in said.values()}) == 3
    (tmp_path / "plain.jsonl").write_text('{"prompt": "the film", "completion": "is lovely"}\n')
    more[more.index("ranked.jsonl")] = "plain.jsonl"
    line = script("sft", *more, "--sft.objective", "chosen", cwd=tmp_path, code=3)
    assert "neither ranks nor labels" in line
    (tmp_path / "plain.jsonl").write_text('{"prompt": "the film", "response": "is lovely", "label": 0.9}\n')
    assert "no answer is the best" in script("sft", *more, "--sft.objective", "chosen", cwd=tmp_path, code=3)
