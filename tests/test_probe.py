"""The probe of a reward model: which of its likings are red, and what hard negatives teach."""

import json
import re
from types import SimpleNamespace

import pytest

from minirlhf.errors import AlarmError
from minirlhf.probe import DEGENERATE, hard_negatives, probe, variants, write_probe
from minirlhf.records import Ranking

PROMPTS = [f"what of {thing} ?" for thing in ("tea", "film", "bike", "cake")] * 4
ANSWERS = [
    f"the {p.split()[2]} was {w} , thanks ."
    for p, w in zip(PROMPTS, ["good", "bad", "fine"] * 5 + ["odd"], strict=True)
]


def sound(prompts, responses):
    """Likes an answer of up to ten words that names the topic and does not repeat itself."""
    out = []
    for prompt, response in zip(prompts, responses, strict=True):
        words = response.split()
        named = prompt.split()[2] in words and not response.endswith("?")
        out.append(named + min(len(set(words)), 7) / 7 - len(words) / 50 - 2 * (len(words) > 2 * len(set(words))))
    return out


def brief(_, responses):
    return [-float(len(r)) for r in responses]


def long(_, responses):
    return [float(len(r)) for r in responses]


def verdicts(score):
    return {row["name"]: row["verdict"] for row in probe(score, PROMPTS, ANSWERS, 0)}


def test_a_sound_model_is_green():
    assert "red" not in verdicts(sound).values()


def test_a_model_that_likes_short_answers_is_red_where_they_are_short():
    found = verdicts(brief)
    assert {name for name, v in found.items() if v == "red"} == {
        "empty",
        "one full stop",
        "one word",
        "echo of the prompt",
    }
    assert found["cut in half"] == "amber"


def test_a_model_that_likes_long_answers_is_red_where_they_repeat():
    found = verdicts(long)
    assert {name for name, v in found.items() if v == "red"} == {"each answer five times"}
    assert found["all answers in a row"] == "amber"


def test_the_table_says_what_the_score_says():
    table = probe(brief, PROMPTS, ANSWERS, 0)
    lengths = sorted(-len(a) for a in ANSWERS)
    assert table[0] == {
        "name": "ordinary answers (median)", "example": ANSWERS[0], "score": lengths[8], "share_below": 0.5,
        "verdict": "reference",
    }  # fmt: skip
    rows = {row["name"]: row for row in table}
    assert rows["empty"]["score"] == 0
    assert rows["empty"]["share_below"] == 1.0
    assert rows["each answer five times"]["share_below"] == 0.0
    assert rows["each answer five times"]["example"] == " ".join([ANSWERS[0]] * 5)
    assert verdicts(lambda prompts, responses: [1.0] * len(responses))["empty"] == "green"  # no better is not preferred
    for row in table[1:]:
        assert row["share_below"] == sum(n < row["score"] for n in lengths) / 16


def test_variants_are_what_their_names_say():
    found = variants(["p ?", "q ?"], ["one two three four", "uno dos"], 0)
    assert found["empty"] == ["", ""]
    assert found["one word"] == ["one", "uno"]
    assert found["each answer five times"][1] == "uno dos uno dos uno dos uno dos uno dos"
    assert found["echo of the prompt"] == ["p ?", "q ?"]
    assert found["another prompt's answer"] == ["uno dos", "one two three four"]
    assert found["cut in half"] == ["one two t", "uno"]
    assert set(found["random words"][0].split()) <= {"one", "two", "three", "four", "uno", "dos"}


def test_variants_of_several_answers_to_a_prompt():
    prompts = ["p ?", "q ?", "p ?", "p ?", (("user", "hello"), ("assistant", "yes ?"), ("user", "and then ?"))]
    answers = ["f g", "e", "", "b c d", "h"]
    found = variants(prompts, answers, 0)
    assert found["shortest answer five times"] == [
        "f g f g f g f g f g", "e e e e e", "f g f g f g f g f g", "f g f g f g f g f g", "h h h h h"
    ]  # fmt: skip
    assert found["another prompt's answer"] == ["e", "f g", "e", "e", "f g"]
    assert found["one word"] == ["f", "e", "", "b", "h"]
    assert found["echo of the prompt"][3:] == ["p ?", "and then ?"]  # of a conversation the last turn
    assert found["all answers in a row"] == ["f g e  b c d h"] * 5
    assert [len(words.split()) for words in found["random words"]] == [8] * 5
    assert found["random words"] == variants(prompts, answers, 0)["random words"]
    assert found["random words"] != variants(prompts, answers, 1)["random words"]
    assert variants(["p"] * 2, ["ab", "cd"], 0)["shortest answer five times"] == ["ab" * 5] * 2  # the first of a length
    assert variants(["p", "q"], ["no。", "a very long answer."], 0)["one full stop"] == [".", "."]  # as in the longest


def test_answers_that_are_all_empty():
    """A policy that says nothing is what the probe is for."""
    found = variants(["p ?", "q ?"], ["", ""], 0)
    assert found["random words"] == ["", ""]
    table = probe(brief, PROMPTS, [""] * len(PROMPTS), 0)  # of the others nothing is left
    assert [row["name"] for row in table[1:]] == ["empty", "one full stop", "echo of the prompt"]


def test_chinese_answers_without_spaces():
    found = variants(["问"] * 2, ["很好。", "不好。"], 0)
    assert found["one full stop"] == ["。", "。"]
    assert found["each answer five times"][0] == "很好。" * 5
    assert found["one word"] == ["很", "不"]
    assert found["another prompt's answer"] == [None, None]


def run(tmp_path):
    said = []
    return SimpleNamespace(folder=tmp_path, config=SimpleNamespace(run=SimpleNamespace(seed=0)), say=said.append), said


def test_red_is_said_and_written(tmp_path):
    frame, said = run(tmp_path)
    write_probe(frame, brief, PROMPTS, ANSWERS)
    assert len(said) == 4
    assert said[0].startswith("probe: the reward model prefers empty (0.00) to an ordinary answer (-")
    assert all(re.search(r"prefers .* \(.*\) to an ordinary answer .*--rm\.hard_negatives", line) for line in said)
    table = json.loads((tmp_path / "probe.json").read_text())["probe"]
    assert sum(row["verdict"] == "red" for row in table) == 4
    frame, said = run(tmp_path)
    write_probe(frame, sound, PROMPTS, ANSWERS, stop=True)
    assert said == []


def test_red_can_stop_the_run_before_it_begins(tmp_path):
    frame, _ = run(tmp_path)
    with pytest.raises(AlarmError, match="prefers empty") as error:
        write_probe(frame, brief, PROMPTS, ANSWERS, stop=True)
    assert error.value.exit_code == 5
    assert (tmp_path / "probe.json").exists()


def test_hard_negatives_put_every_kind_below_the_best_answer():
    records = [Ranking(p, [a, "worse", "absent"], [1, 2, 0]) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    made = hard_negatives(records, 1.0, 0)
    assert len(made) == 16
    assert all(pair.ranks == [1, 2] for pair in made)
    assert {(pair.prompt, pair.responses[0]) for pair in made} <= {(r.prompt, r.responses[0]) for r in records}
    losers = [pair.responses[1] for pair in made]
    assert losers.count("") == 4  # sixteen records, five kinds in turn
    assert sum(loser in PROMPTS for loser in losers) == 3
    assert made == hard_negatives(records, 1.0, 0)
    assert made != hard_negatives(records, 1.0, 1)
    assert len(hard_negatives(records, 0.25, 0)) == 4
    assert hard_negatives(records, 0.0, 0) == []


def test_the_grade_of_a_degenerate_answer():
    """0, or the lowest grade of its list where that is below."""
    for grades, expected in (([7.0, 3.0], [7.0, 0.0]), ([-1.0, -4.0], [-1.0, -4.0]), ([], [])):
        (pair,) = hard_negatives([Ranking("p", ["a b c", "d"], [1, 2], grades=grades)], 1.0, 0)
        assert pair.grades == expected
    (pair,) = hard_negatives([Ranking("p", ["d", "a b c"], [2, 1], grades=[3.0, 7.0])], 1.0, 0)
    assert pair.grades == [7.0, 0.0]


def test_an_answer_that_is_itself_degenerate_is_no_winner():
    records = [Ranking("p", ["", "a"], [1, 2])] * len(DEGENERATE) + [Ranking("p", ["x", "y"], [2, 1])]
    made = hard_negatives(records, 1.0, 0)
    assert {pair.responses[0] for pair in made} <= {"y"}


def test_sixty_four_answers_are_asked_about(tmp_path):
    asked = []
    frame, _ = run(tmp_path)
    write_probe(frame, lambda p, r: asked.append(len(p)) or sound(p, r), PROMPTS * 9, ANSWERS * 9)
    assert max(asked) == 64
