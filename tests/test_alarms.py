"""Alarms on histories made by hand: what raises them, what does not, once each, the same after a resume."""

import math

import pytest
import torch

from minirlhf.alarms import RULES, Limits, alarms, correlation, repeated, signals
from minirlhf.rollout import Rollout

SOUND = {
    "objective/kl": 0.5,
    "objective/kl_se": 0.1,
    "objective/entropy": 12.0,
    "objective/scores": 0.3,
    "objective/score_length_corr": 0.2,
    "response/length_mean": 10.0,
    "response/empty_frac": 0.03,
    "response/short_frac": 0.05,
    "response/eos_frac": 1.0,
    "response/distinct_frac": 0.95,
    "response/repeat_frac": 0.01,
    "val/first_ratio_gap": 0.0,
    "value/explained_var": 0.4,
}
LIMITS = Limits(kl_target=2.0, score_max=3.0)


def history(n, **changed):
    """One sound line, then n lines with changes; keys are written with _ for /."""
    changed = {next(k for k in SOUND if k.replace("/", "_") == name): x for name, x in changed.items()}
    return [{"step": 1, **SOUND}] + [{"step": 2 + i, **SOUND, **changed} for i in range(n)]


def raised(lines, limits=LIMITS):
    """(step, alarm) over a whole run."""
    return [
        (lines[n - 1]["step"], a.split(":")[0]) for n in range(1, len(lines) + 1) for a in alarms(lines[:n], limits)
    ]


CASES = [
    ("length", 3, {"response_length_mean": 3.9}, {"response_length_mean": 6.5}),
    ("length", 3, {"response_length_mean": 21.0}, {"response_length_mean": 19.0}),
    ("empty answers", 3, {"response_empty_frac": 0.07}, {"response_empty_frac": 0.055}),
    ("length", 3, {"response_short_frac": 0.085}, {"response_short_frac": 0.079}),
    ("unfinished answers", 3, {"response_eos_frac": 0.75}, {"response_eos_frac": 0.85}),
    ("sameness", 3, {"response_distinct_frac": 0.4}, {"response_distinct_frac": 0.5}),
    ("repetition", 3, {"response_repeat_frac": 0.25}, {"response_repeat_frac": 0.19}),
    ("KL", 5, {"objective_kl": 4.1}, {"objective_kl": 3.9}),
    ("negative KL", 1, {"objective_kl": -0.31}, {"objective_kl": -0.29}),
    ("ratio", 1, {"val_first_ratio_gap": 1.1e-5}, {"val_first_ratio_gap": 0.9e-5}),
    ("entropy", 1, {"objective_entropy": 1.1}, {"objective_entropy": 1.3}),
    ("entropy", 1, {"objective_entropy": 1.3, "response_length_mean": 12.0}, {"response_length_mean": 19.0}),
    ("value", 20, {"value_explained_var": -0.1}, {"value_explained_var": 0.01}),
    ("score and length", 3, {"objective_score_length_corr": -0.95}, {"objective_score_length_corr": -0.85}),
    ("score range", 3, {"objective_scores": 9.0}, {"objective_scores": 2.9}),
]


@pytest.mark.parametrize(("name", "lines", "bad", "good"), CASES)
def test_each_alarm_fires_after_its_lines_and_not_below_its_limit(name, lines, bad, good):
    assert raised(history(lines - 1, **bad)) == []
    assert raised(history(lines + 10, **bad)) == [(1 + lines, name)]
    assert raised(history(40, **good)) == []


@pytest.mark.parametrize(
    ("name", "first", "bad", "good"),
    [
        ("empty answers", {"response/empty_frac": 0.0}, 0.021, 0.019),
        ("empty answers", {"response/empty_frac": 0.1}, 0.21, 0.19),
        ("length", {"response/short_frac": 0.0}, 0.051, 0.049),
        ("unfinished answers", {"response/eos_frac": 0.8}, 0.59, 0.61),
        ("unfinished answers", {"response/eos_frac": 0.95}, 0.79, 0.81),
        ("sameness", {"response/distinct_frac": 0.6}, 0.29, 0.31),
        ("sameness", {"response/distinct_frac": 1.0}, 0.49, 0.51),
        ("repetition", {"response/repeat_frac": 0.3}, 0.61, 0.59),
    ],
)
def test_limits_that_depend_on_the_first_line(name, first, bad, good):
    (metric,) = first
    for value, expected in ((bad, [(4, name)]), (good, [])):
        start, *others = history(3)
        assert raised([start | first, *(line | {metric: value} for line in others)]) == expected


@pytest.mark.parametrize(
    ("first", "at"),
    [
        ({}, {"response/length_mean": 20.0}),
        ({}, {"response/length_mean": 5.8}),
        ({}, {"response/empty_frac": 0.06}),
        ({"response/eos_frac": 0.875}, {"response/eos_frac": 0.75}),
        ({}, {"response/distinct_frac": 0.475}),
        ({}, {"objective/kl": 4.0}),
        ({}, {"objective/kl": -1.5, "objective/kl_se": 0.5}),
        ({}, {"val/first_ratio_gap": 1e-5}),
        ({}, {"objective/entropy": 1.2}),
        ({}, {"value/explained_var": 0.0}),
        ({}, {"objective/score_length_corr": 0.9}),
        ({}, {"objective/scores": 3.0}),
    ],
)
def test_at_its_limit_nothing_is_raised(first, at):
    start, *others = history(25)
    assert raised([start | first, *(line | at for line in others)]) == []


def test_what_is_wrong_from_the_first_line_on_is_told_there_and_once():
    assert raised([{"step": 7 + i, **SOUND, "val/first_ratio_gap": 0.1} for i in range(3)]) == [(7, "ratio")]


def test_a_small_target_counts_too():
    assert raised(history(5, objective_kl=0.9), Limits(kl_target=0.4)) == [(6, "KL")]


def test_what_an_alarm_says():
    def words(lines):
        return [a.split("; ")[0] for a in alarms(lines, LIMITS)]

    assert words(history(3, response_length_mean=3.0)) == [
        "length: response/length_mean is 3, at step 1 it was 10, 3 lines in a row"
    ]
    assert words(history(1, objective_entropy=0.1)) == ["entropy: objective/entropy is 0.1, at step 1 it was 12"]
    assert words([{"step": 4, **SOUND}, {"step": 8, **SOUND, "objective/kl": -5.0}]) == [
        "negative KL: objective/kl is -5, at step 4 it was 0.5"
    ]


def test_every_rule_has_a_case_and_a_cure():
    assert {rule.name for rule in RULES} == {name for name, *_ in CASES}
    for name, lines, bad, _ in CASES:
        words = [a for n in range(1, lines + 2) for a in alarms(history(lines, **bad)[:n], LIMITS)]
        assert len(words) == 1
        assert words[0].startswith(f"{name}: ")
        assert "\n" not in words[0]
        assert len(words[0].split("; ")[-1]) > 20


def test_a_condition_that_comes_and_goes_is_told_again_only_after_a_while():
    short = {"response/length_mean": 3.0}
    lines = [{"step": i + 1, **SOUND, **(short if i % 5 > 1 and i > 1 else {})} for i in range(60)]
    assert len([1 for _, name in raised(lines) if name == "length"]) == 1
    for back, times in ((28, 2), (27, 1)):  # it held last after 10 lines, and holds again after 31, or 30
        lines = [{"step": i + 1, **SOUND, **(short if 5 <= i < 10 or i >= back else {})} for i in range(60)]
        assert len([1 for _, name in raised(lines) if name == "length"]) == times


def test_empty_answers_are_measured_against_the_first_rollout():
    """Data with empty answers makes a policy with empty answers."""
    lines = [dict(line, **{"response/empty_frac": 0.3}) for line in history(9)]
    assert raised(lines) == []


def test_without_a_target_or_a_known_range_nothing_is_said_of_them():
    assert raised(history(30, objective_kl=50.0, objective_scores=99.0), Limits()) == []


@pytest.mark.parametrize("value", [None, ...])
@pytest.mark.parametrize("name", SOUND)
def test_what_was_not_logged_or_null_raises_nothing(name, value):
    lines = history(30)
    for line in lines:
        if value is ...:
            del line[name]
        else:
            line[name] = value
    assert raised(lines) == []


@pytest.mark.parametrize("first", [None, ...])
def test_an_alarm_does_not_need_a_number_of_the_first_line(first):
    """Scores that are all alike at first leave the value model nothing to explain: null."""
    lines = history(20, value_explained_var=-0.1)
    lines[0] = {k: v for k, v in lines[0].items() if k != "value/explained_var"}
    lines[0] |= {} if first is ... else {"value/explained_var": first}
    (said,) = alarms(lines, LIMITS)
    assert said.startswith("value: value/explained_var is -0.1, 20 lines in a row; ")


def test_the_lines_alone_decide():
    """A run that is resumed reads its lines back from the file: as JSON, with other keys in between."""
    import json

    lines = history(9, response_length_mean=2.0, objective_kl=-3.0)
    again = [json.loads(json.dumps({**line, "time/step_s": 3.0})) for line in lines]
    for n in range(1, len(lines) + 1):
        assert alarms(lines[:n], LIMITS) == alarms(again[:n], LIMITS)


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_signals_of_a_rollout_by_hand():
    prompts = torch.tensor([[0, 5], [6, 5], [0, 5], [0, 5], [0, 5]])
    prompt_mask = prompts > 0
    lengths = torch.tensor([2, 2, 2, 6, 3])
    mask = torch.arange(6) < lengths[:, None]
    responses = torch.where(mask, torch.tensor([[7], [7], [7], [8], [9]]), 0)
    old = torch.full((5, 6), float("nan"))
    old[mask] = 1.0
    ref = torch.where(mask, 0.5, float("inf"))
    scores = torch.tensor([1.0, 1.0, 1.0, 5.0, 2.0])
    rollout = Rollout(prompts, prompt_mask, responses, mask, old, old, ref, old, scores, mask[:, 0])
    found = signals(rollout)
    assert found["response/short_frac"] == 0.6
    assert found["response/distinct_frac"] == 0.8  # rows 0 and 2 are equal; row 1 answers another prompt
    assert found["response/repeat_frac"] == pytest.approx(2 / 3, rel=1e-12)  # three 4-grams in row 3, all the same
    assert found["objective/score_length_corr"] == pytest.approx(1.0, rel=1e-12)
    # KL per answer 1, 1, 1, 3, 1.5: variance 3/4 with n - 1
    assert found["objective/kl_se"] == pytest.approx(math.sqrt(0.75 / 5), rel=1e-12)
    assert signals(rollout.rows(torch.tensor([0])))["objective/kl_se"] == math.inf  # of one answer nothing is known
    assert signals(rollout.rows(torch.tensor([0, 3])))["objective/kl_se"] == pytest.approx(1.0, rel=1e-12)


def test_a_prompt_and_its_answer_are_not_another_prompt_and_another_answer():
    prompts, responses = torch.tensor([[0, 5], [5, 0]]), torch.tensor([[0, 7], [7, 0]])
    prompt_mask, mask = torch.tensor([[False, True], [True, True]]), torch.tensor([[True, True], [True, False]])
    zeros = torch.zeros(2, 2)
    rollout = Rollout(prompts, prompt_mask, responses, mask, *[zeros] * 4, zeros[0], mask[:, 0])
    assert signals(rollout)["response/distinct_frac"] == 1.0  # 5 | 0 7 and 5 0 | 7


def test_correlation_against_numpy_and_where_it_has_no_meaning():
    import numpy

    x, y = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert correlation(x, x + y) == pytest.approx(numpy.corrcoef(x, x + y)[0, 1], rel=1e-12)
    assert correlation(x / 1e3, x / 1e3) == pytest.approx(1.0, rel=1e-12)
    assert correlation(x, torch.ones(50, dtype=torch.float64)) == 0.0


def test_repeated_ngrams_by_hand():
    assert repeated([[1, 2, 3]]) == 0.0
    assert repeated([[1, 2, 3, 4, 1, 2, 3, 4]]) == 1 - 4 / 5
    assert repeated([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0  # other rows do not count
    assert math.isclose(repeated([[1, 1, 1, 1, 1], [1, 2, 3, 4]]), 1 / 3)
