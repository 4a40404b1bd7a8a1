"""The numbers of the specification: hashes of the words and lists, a table of golds, exact expectations.

The specification's expectations come from an enumeration that shares no code with this one; its hashes were made by
another program from the same text.
"""

import hashlib
import math
from fractions import Fraction
from itertools import product

import pytest

from minirlhf import review_world as rw
from minirlhf.errors import DataError


def sha256(lines, joint=""):
    return hashlib.sha256(joint.join(lines).encode()).hexdigest()


# ---- words and lists ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "start"), [("en", "34dc2f47c12c6a30"), ("zh", "2651d5ac1d81a77b")])
def test_words(language, start):
    assert len(rw.words(language)) == 82
    assert sha256(rw.words(language), "\n").startswith(start)


def test_prompts():
    assert len(set(rw.prompts())) == 8
    assert rw.prompts()[0] == "Human: how was the film ? Assistant:"
    assert rw.prompts("zh")[-1] == "用户： 你 觉得 这个 课程 如何？ 助手："


def test_corpus():
    records = rw.corpus(1000, seed=0)
    assert records[0].prompt == "Human: how was the phone ? Assistant:"
    assert records[0].response == "honestly, screen slow , screen broken , bed boring ."
    assert (records[5].prompt.split()[4], records[5].response) == ("hotel", "sure! lobby great .")
    assert next(i for i, r in enumerate(records) if not r.response) == 22
    text = (f"{r.prompt}\t{r.response}\n" for r in records)
    assert sha256(text) == "bd6cfa59a67370a115861719dc35885c72570f6625619d123113df3ce46acd60"


def test_the_languages_share_ids():
    for en, zh in zip(rw.corpus(200, seed=3), rw.corpus(200, seed=3, language="zh"), strict=True):
        assert rw.read(en.prompt) == rw.read(zh.prompt)
        assert rw.read(en.response, "en") == rw.read(zh.response, "zh")


def test_lists_are_independent():
    first = rw.corpus(50, seed=0)
    assert rw.corpus(80, seed=0)[:50] == first
    assert rw.corpus(50, seed=1) != first
    assert rw.corpus(50, seed=0, purpose="corpus/val") != first
    assert rw.pairs(20, labeler="good", seed=0, split="val") != rw.pairs(20, labeler="good", seed=0)


@pytest.mark.parametrize(
    ("labeler", "start"),
    [
        ("good", "965564302d64a5e7"),
        ("weak", "e5622ad1bcc1400e"),
        ("length_biased", "fe04c98a348ad881"),
        ("length_only", "1ed2e6d4b04f056d"),
    ],
)
def test_pairs(labeler, start):
    records = rw.pairs(1000, labeler=labeler, seed=0)
    assert all(r.ranks == [1, 2] for r in records)
    assert sha256(f"{r.prompt}\t{r.responses[0]}\t{r.responses[1]}\n" for r in records).startswith(start)


# ---- gold -----------------------------------------------------------------------------------------------------------

GOLDS = [
    ("sure! room great , bed lovely , pool superb . thanks!", 1.0),
    ("room great , bed lovely , pool superb .", 0.75),
    ("room great .", 0.25),
    ("room great , bed lovely , pool superb , lobby fun , view solid .", 0.60),
    ("plot great , acting lovely , music superb .", -0.75),
    ("room great , room great , room great , room great , room great .", -0.90),
    (".", -0.50),
    ("", -1.0),
    ("sure!", -0.15),
    ("room great , bed", -0.25),
    ("room great . thanks! enjoy!", 0.15),
    ("well, room great , plot awful . enjoy!", 0.25),
]


@pytest.mark.parametrize(("text", "value"), GOLDS)
def test_gold(text, value):
    prompt = "Human: how was the hotel ? Assistant:"
    assert rw.gold_of_texts([prompt], [text]) == [value]
    chinese = rw.spell(rw.read(text), "zh")
    assert rw.gold_of_texts(["用户： 你 觉得 这个 酒店 如何？ 助手："], [chinese], language="zh") == [value]


def test_gold_without_eos():
    hotel = rw.topic_of("Human: how was the hotel ? Assistant:")
    assert rw.gold(hotel, rw.read(GOLDS[0][0]), eos=False) == 0.5
    assert rw.gold(hotel, [], eos=False) == -1.0
    assert rw.gold(hotel, rw.read("room great ."), eos=False) == -0.25
    assert rw.gold_of_texts(rw.prompts()[2:3] * 2, ["room great ."] * 2, [True, False]) == [0.25, -0.25]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("room great , room awful .", 0.0),  # pos 1, rep 1: the second adjective does not count
        ("room great room great .", -0.25),  # pos 1; `room`, `great` after a phrase: bad 2
        ("room awful , bed slow , pool ugly , lobby broken .", -0.75),  # the balance stops at -3
        ("thanks! room great .", 0.0),  # a closer at the start is bad
        ("room sure! great .", -1.0),  # every word is bad, the stop too, and there is no end: -1.25, cut
        ("nonsense", -0.5),  # a foreign word and no end: bad 2
    ],
)
def test_gold_of_broken_answers(text, value):
    assert rw.gold_of_texts(["Human: how was the hotel ? Assistant:"], [text]) == [value]


def test_foreign_prompt():
    with pytest.raises(DataError, match="Tell me"):
        rw.gold_of_texts(["Tell me a story"], ["room great ."])


def test_an_answer_with_gold_1_has_three_or_four_praised_aspects():
    """1,440,000 texts per topic: 3 openers · 2 closers · (6·5·4·5³ + 6·5·4·3·5⁴)."""
    assert 3 * 2 * (6 * 5 * 4 * 5**3 + 6 * 5 * 4 * 3 * 5**4) == 1_440_000
    topic = rw.TOPICS[0]
    found = [
        k for k in range(1, 6)
        if rw.gold(topic, [11, *[i for a in rw.aspects(topic)[:k] for i in (rw.COMMA, a, 16)][1:], rw.STOP, 14]) == 1
    ]  # fmt: skip
    assert found == [3, 4]


# ---- labelers -------------------------------------------------------------------------------------------------------


def logistic(x):
    return 1 / (1 + math.exp(-x))


def test_preference():
    """g = .25 with 4 tokens against g = .75 with 10: differences -.5 and +6 tokens."""
    topic = rw.topic_of(rw.prompts()[2])
    a, b = rw.read("room great ."), rw.read("room great , bed lovely , pool superb .")
    by_hand = {"good": -4.0, "weak": -4.0 + 2.1, "length_biased": -4.0 + 6.0}
    for labeler, logit in by_hand.items():
        assert rw.preference(topic, a, b, labeler) == pytest.approx(logistic(logit), rel=1e-12)
    assert rw.preference(topic, a, b, "length_only") == 0.8
    assert rw.preference(topic, b, a, "length_only") == 0.2
    assert rw.preference(topic, a, a, "length_only") == 0.5
    assert rw.preference(topic, a * 500, a, "length_biased") < 1e-300


@pytest.mark.parametrize(
    ("labeler", "bayes", "shorter", "agrees"),
    [
        ("good", 0.894, 0.570, 0.923),
        ("weak", 0.905, 0.705, 0.895),
        ("length_biased", 0.925, 0.824, 0.802),
        ("length_only", 0.775, 0.800, 0.539),
    ],
)
def test_labelers_exactly(labeler, bayes, shorter, agrees):
    """By enumeration of all pairs of outcomes; equal lengths and equal golds are left out of the last two."""
    least = 2 if labeler in ("weak", "length_biased") else 0
    law = [(o, p) for o, p in rw.outcomes().items() if o.phrases >= least]
    cost = {"good": 0.0, "weak": 0.35, "length_biased": 1.0}
    sums = dict.fromkeys(("all", "bayes", "length", "shorter", "gold", "agrees"), 0.0)
    for (a, p), (b, q) in product(law, law):
        if labeler == "length_only":
            chance = 0.5 if a.length == b.length else 0.8 if a.length < b.length else 0.2
        else:
            chance = logistic(8 * (a.gold - b.gold) + cost[labeler] * (b.length - a.length))
        sums["all"] += p * q
        sums["bayes"] += p * q * max(chance, 1 - chance)
        if a.length < b.length:
            sums["length"] += p * q
            sums["shorter"] += p * q * chance
        if a.gold > b.gold:
            sums["gold"] += p * q
            sums["agrees"] += p * q * chance
    assert sums["bayes"] / sums["all"] == pytest.approx(bayes, abs=6e-4)
    assert sums["shorter"] / sums["length"] == pytest.approx(shorter, abs=6e-4)
    assert sums["agrees"] / sums["gold"] == pytest.approx(agrees, abs=6e-4)


def test_judge_follows_the_preference():
    """Four standard deviations around the closed form."""
    prompt, a, b, n = rw.prompts()[2], "room great .", "room great , bed slow .", 4000
    for labeler, chance in (("good", logistic(8 * 0.25)), ("length_only", 0.8)):
        judged = [rw.judge(prompt, a, b, labeler=labeler, seed=0, purpose="pair", i=i) for i in range(n)]
        given = [r for r in judged if r and set(r.responses) == {a, b}]
        expected = n if labeler == "length_only" else 0.9 * n  # one b in ten is replaced by a degenerate answer
        assert abs(len(given) - expected) <= 4 * math.sqrt(n * 0.1 * 0.9)
        share = sum(r.responses[0] == a for r in given) / len(given)
        assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / len(given))


def test_judge_is_a_function_of_its_key():
    def sides(**key):
        judged = [
            rw.judge(rw.prompts()[2], "room great .", "bed fun .", labeler="length_only", i=i, **key) for i in range(64)
        ]
        return [r.responses[0] for r in judged]

    assert sides(seed=0, purpose="pair") == sides(seed=0, purpose="pair")
    assert sides(seed=0, purpose="pair") != sides(seed=1, purpose="pair")
    assert sides(seed=0, purpose="pair") != sides(seed=0, purpose="val")


def test_judge_refuses_what_the_labeler_is_not_shown():
    prompt = rw.prompts()[2]
    assert rw.judge(prompt, "room great .", "room great .", labeler="length_only", seed=0, purpose="pair", i=0) is None
    assert rw.judge(prompt, "room great .", "bed fun , view slow .", labeler="weak", seed=0, purpose="p", i=0) is None
    shown = ["room great , pool fun .", "bed fun , view slow ."]
    assert set(rw.judge(prompt, *shown, labeler="weak", seed=0, purpose="pair", i=0).responses) == set(shown)


def test_judge_in_chinese():
    made = [
        rw.judge(rw.prompts("zh")[0], "剧情 很棒 。", "剧情 糟糕 。", labeler="good", seed=0, purpose="p", i=i)
        for i in range(200)
    ]
    assert all(rw.read(text, "zh").count(rw.UNK) == 0 for r in made if r for text in r.responses)


# ---- what is possible -----------------------------------------------------------------------------------------------


def test_expectations_of_the_corpus():
    law = rw.outcomes()
    mean = sum(o.gold * p for o, p in law.items())
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    assert mean == pytest.approx(-0.2104, abs=5e-5)
    assert math.sqrt(sum((o.gold - mean) ** 2 * p for o, p in law.items())) == pytest.approx(0.4483, abs=5.1e-5)
    assert sum(o.length * p for o, p in law.items()) == pytest.approx(10.035, abs=1e-9)  # .95·10.5 + .04 + .02
    assert max(o.length for o in law) == 18
    for test, chance in ((lambda g: g > 0, 0.2965), (lambda g: g >= 0.9, 2.11e-3), (lambda g: g == 1, 6.32e-4)):
        assert sum(p for o, p in law.items() if test(o.gold)) == pytest.approx(chance, rel=3e-3)


def test_the_best_gold_has_the_probability_of_its_texts():
    """P(gold = 1) = .95 · opener .3 · closer .2 · Σ over 3 and 4 phrases of 1/5 · all new, on topic, positive."""
    on = Fraction(17, 20) + Fraction(3, 160)
    three = (on / 2) ** 3 * Fraction(6 * 5 * 4, 6**3)
    four = (on / 2) ** 4 * Fraction(6 * 5 * 4 * 3, 6**4)
    exact = Fraction(95, 100) * Fraction(3, 10) * Fraction(2, 10) * Fraction(1, 5) * (three + four)
    assert sum(p for o, p in rw.outcomes().items() if o.gold == 1) == pytest.approx(float(exact), rel=1e-12)


def test_outcomes_are_those_of_the_grammar():
    n, sums = 20_000, [0.0, 0.0]
    for record in rw.corpus(n, seed=11):
        ids = rw.read(record.response)
        sums[0] += rw.gold(rw.topic_of(record.prompt), ids)
        sums[1] += len(ids) + 1
    assert abs(sums[0] / n + 0.2104) < 4 * 0.4483 / math.sqrt(n)
    assert abs(sums[1] / n - 10.035) < 4 * 5 / math.sqrt(n)


FRONTIER = [
    (1, 0.096, -0.016),
    (0.5, 0.348, 0.153),
    (0.3, 0.827, 0.335),
    (0.2, 1.521, 0.503),
    (0.15, 2.229, 0.626),
    (0.1, 3.490, 0.780),
    (0.05, 5.712, 0.942),
    (0.02, 7.254, 0.998),
]


@pytest.mark.parametrize(("beta", "kl", "gold"), FRONTIER)
def test_frontier(beta, kl, gold):
    assert rw.tilted(beta) == pytest.approx((kl, gold), abs=5.1e-4)
    assert rw.frontier(kl) == pytest.approx(gold, abs=2e-3)
    assert rw.frontier(rw.tilted(beta)[0]) == pytest.approx(rw.tilted(beta)[1], abs=1e-9)


def test_ends_of_the_frontier():
    assert rw.frontier(0) == pytest.approx(-0.2104, abs=5e-5)
    assert rw.frontier(-1e-3) == rw.frontier(0)
    assert rw.frontier(1e-9) == pytest.approx(rw.frontier(0), abs=1e-4)
    assert rw.frontier(7.367) == pytest.approx(1, abs=1e-3)
    assert rw.frontier(100) == 1
    found = [rw.frontier(k / 10) for k in range(80)]
    assert found == sorted(found)


def test_best_of_n():
    kls = [rw.best_of_n_kl(2**k) for k in range(7)]
    assert kls == pytest.approx([0, 0.193, 0.636, 1.204, 1.835, 2.497, 3.175], abs=6e-4)
    golds = [rw.best_of_n_gold(2**k) for k in range(7)]
    assert golds == pytest.approx([-0.210, 0.045, 0.248, 0.406, 0.531, 0.634, 0.721], abs=6e-4)
    assert all(g <= rw.frontier(kl) + 1e-9 for kl, g in zip(kls, golds, strict=True))


def test_best_of_n_estimate():
    """Proxy order 3, 1, 2 of three answers; best of 2: pairs (1,2), (1,3), (2,3) give golds .5, 1, 1."""
    proxy, golds = [0.1, 0.3, 0.2], [0.0, 1.0, 0.5]
    assert rw.best_of_n_estimate(proxy, golds, 1) == pytest.approx(0.5)
    assert rw.best_of_n_estimate(proxy, golds, 2) == pytest.approx((0.5 + 1 + 1) / 3)
    assert rw.best_of_n_estimate(proxy, golds, 3) == 1.0
