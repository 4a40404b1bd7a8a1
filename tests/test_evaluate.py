"""Losses, accuracies and exams, by hand: against one example at a time, and with models that say what they are told."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_close, fp32

from minirlhf import evaluate, review_world
from minirlhf.data import Example, RankedList
from minirlhf.evaluate import (
    answer_logprobs,
    exact_kl,
    examine,
    frontier_share,
    ranking_accuracy,
    score_rows,
    score_sequences,
    score_texts,
    sft_loss,
    summary,
    text_ids,
    wilson,
)
from minirlhf.heads import RewardModel
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.rng import generator
from minirlhf.rollout import Roles
from minirlhf.templates import get_template
from minirlhf.tokenizer import SPECIAL, Tokenizer

TOKENS = [*SPECIAL, "good", "bad", "so", "film"]
WORDS = Tokenizer.from_words(TOKENS)
CONFIG = ModelConfig(vocab_size=WORDS.vocab_size, n_layer=1, n_head=2, d_model=8, max_seq_len=12)


class Scorer:
    """Scores a list of tokens Σ (position + 1)·token, so that order and padding are seen."""

    config = CONFIG

    def __init__(self):
        self.shapes = []

    def __call__(self, ids, mask):
        self.shapes.append(tuple(ids.shape))
        assert (ids[~mask] == 0).all()
        return (ids * mask * (1 + torch.arange(ids.shape[1]))).sum(1).double()


def said(ids):
    return float(sum((i + 1) * token for i, token in enumerate(ids)))


SEQUENCES = [[3, 4, 5], [6], [5, 5], [3, 3, 3, 3], [4], [6, 5, 4]]

# ---- language model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 9])
def test_sft_loss_is_the_mean_over_all_trained_tokens(size):
    model = CausalLM(CONFIG, rng=generator(0, "weights"))
    examples = [
        Example([3, 4, 5, 1], [False, False, True, True]),
        Example([6, 3], [False, True]),
        Example([3, 4, 5, 6, 5, 4, 1], [False, True, True, True, True, True, True]),
    ]
    nats = []
    for example in examples:
        logprobs = model(torch.tensor([example.ids]))[0].detach().double().log_softmax(-1)  # (T, V)
        nats += [-float(logprobs[t - 1, example.ids[t]]) for t in range(1, len(example.ids)) if example.trained[t]]
    assert len(nats) == 9
    found = sft_loss(model, examples, size)
    assert found == pytest.approx(sum(nats) / 9, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_log_probs_of_answers_come_in_the_order_of_the_examples():
    model = CausalLM(CONFIG, rng=generator(0, "weights"))
    rows = [[3, 4, 5, 1], [6, 3], [3, 4, 5, 6, 5, 4, 1], [5, 6], [4, 4, 1]]
    examples = [Example(ids, [i > 0 for i in range(len(ids))]) for ids in rows]
    expected = []
    for ids in rows:
        logprobs = model(torch.tensor([ids]))[0].detach().log_softmax(-1)  # (T, V)
        expected.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(1, len(ids))))
    found = answer_logprobs(model, examples, 2)
    assert_close(found, expected, fp32)
    assert found.requires_grad  # DPO learns from them
    for function in (answer_logprobs, sft_loss):
        with pytest.raises(ValueError, match="impl 'nonsense'"):
            function(model, examples, 2, impl="nonsense")


# ---- reward model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [score_sequences, score_rows])
def test_scores_come_in_the_order_of_the_lists_and_lists_of_a_length_share_a_forward(score):
    model = Scorer()
    found = score(model, SEQUENCES, 2, "cpu")
    assert found.tolist() == [said(ids) for ids in SEQUENCES]
    assert model.shapes == [(2, 1), (2, 3), (2, 4)]  # 1 1 | 2 3 | 3 4
    assert score(model, SEQUENCES[:1], 64, "cpu").tolist() == [said(SEQUENCES[0])]


def test_no_list_has_no_score():
    assert score_rows(Scorer(), [], 4, "cpu").tolist() == []


def test_a_rank_that_is_done_runs_its_last_lists_again_without_a_gradient(monkeypatch):
    monkeypatch.setattr(evaluate.dist, "all_max", lambda x: x + 2)
    model, weight = Scorer(), torch.ones((), dtype=torch.float64, requires_grad=True)
    found = score_sequences(lambda *both: weight * model(*both), SEQUENCES[:3], 2, in_step=True)
    assert model.shapes == [(2, 2), (1, 3), (1, 3), (1, 3)]
    assert found.tolist() == [said(ids) for ids in SEQUENCES[:3]]
    found.sum().backward()
    assert float(weight.grad) == sum(map(said, SEQUENCES[:3]))


def test_scores_of_texts_are_of_prompt_answer_and_end():
    template, model = get_template("plain"), Scorer()
    prompts, responses = ["so film", "film", "good"], ["good", "bad bad so", "so"]
    ids = text_ids(model, WORDS, template, prompts, responses)
    words = [[*p.split(), *r.split(), "<eos>"] for p, r in zip(prompts, responses, strict=True)]
    assert ids == [[TOKENS.index(word) for word in row] for row in words]
    assert score_texts(model, WORDS, template, prompts, responses) == [said(row) for row in ids]
    (cut,) = text_ids(model, WORDS, template, ["film " * 10], ["good bad so"])
    assert (len(cut), cut[-1]) == (12, TOKENS.index("bad"))  # what the model reads is the beginning
    with pytest.raises(ValueError, match="shorter"):
        text_ids(model, WORDS, template, prompts, responses[:2])
    reward = RewardModel(CONFIG, rng=generator(0, "weights"))
    both = score_texts(reward, WORDS, template, ["so film", "film"], ["good", "bad"])
    assert not score_rows(reward, ids, 2, "cpu").requires_grad
    assert both == pytest.approx([reward(torch.tensor([row])).item() for row in text_ids(
        reward, WORDS, template, ["so film", "film"], ["good", "bad"])], rel=1e-5)  # fmt: skip


def test_accuracy_of_rankings_by_hand():
    """A list's only token is its score; ranks 0 are absent, ties are no pairs, equal scores are wrong."""
    lists = [
        RankedList([[5], [4], [3]], [1, 2, 3]),  # 3 pairs right, its end right, in order
        RankedList([[5], [6], [3], [7]], [1, 2, 2, 0]),  # 1 of 2, both ends are pairs
        RankedList([[4], [4]], [2, 1]),  # equal: 0 of 1
        RankedList([[6], [3], [3]], [1, 1, 1]),  # no pair
        RankedList([[3], [5], [6], [4]], [4, 1, 3, 2]),  # 5·6 wrong, 4·6 wrong: 4 of 6; ends right, not in order
    ]
    found = ranking_accuracy(lambda ids, mask: ids[:, 0].double(), lists, 4)
    assert found.pop("accuracy_low") == pytest.approx(wilson(8, 12)[0], abs=1e-15)
    assert found.pop("accuracy_high") == pytest.approx(wilson(8, 12)[1], abs=1e-15)
    assert found == {"accuracy": 8 / 12, "best_worst_accuracy": 3 / 5, "exact_order": 1 / 4, "pairs": 12}


def test_accuracy_of_no_pair_is_not_known_and_that_of_one_is():
    found = ranking_accuracy(lambda ids, mask: ids[:, 0].double(), [RankedList([[4], [5]], [1, 0])], 4)
    assert found == {"accuracy": 0.0, "accuracy_low": 0.0, "accuracy_high": 1.0, "best_worst_accuracy": 0.0,
                     "exact_order": 0.0, "pairs": 0}  # fmt: skip
    one = ranking_accuracy(lambda ids, mask: ids[:, 0].double(), [RankedList([[4], [5]], [2, 1])], 4)
    assert (one["accuracy"], one["best_worst_accuracy"], one["exact_order"], one["pairs"]) == (1.0, 1.0, 1.0, 1)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (8, 10), (10, 10), (81, 263), (1, 1000)])
def test_wilson_s_interval_ends_where_the_share_is_z_deviations_away(k, n):
    """Its definition: both ends q solve |k/n - q| = z √(q(1-q)/n), with the z that 97.5 % of all lie below."""
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(0.95, dtype=torch.float64)))
    low, high = wilson(k, n)
    assert low - 1e-12 <= k / n <= high + 1e-12
    for q in (low, high):
        assert (k / n - q) ** 2 == pytest.approx(z * z * q * (1 - q) / n, abs=1e-12)
    assert high - low > 1e-3 / n


def test_wilson_s_interval_as_published():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I, method 3
    assert wilson(0, 0) == (0.0, 1.0)


# ---- policy ---------------------------------------------------------------------------------------------------------


def roles():
    policy = CausalLM(CONFIG, rng=generator(0, "weights"))
    with torch.no_grad():
        policy.trunk.embed.weight.mul_(4)  # answers of several lengths
    ref_policy = copy.deepcopy(policy)
    with torch.no_grad():
        ref_policy.trunk.embed.weight.mul_(0.5)
    return Roles(policy, ref_policy, None, lambda rollout: rollout.lengths.double() / 2)


HOW = {"eos_token_id": 1, "pad_token_id": 0, "max_new_tokens": 5, "temperature": 0.8}


def test_an_exam_says_the_same_however_many_answers_share_a_forward(monkeypatch):
    prompts, graded = [[3 + i % 4] * (1 + i % 3) for i in range(22)], []

    def gold(asked, answers, finished):
        graded.extend(zip(asked, answers, finished, strict=True))
        return [float(i) for i in range(len(asked))]

    models = roles()
    whole = examine(models, prompts, WORDS, HOW, gold, seed=3)
    monkeypatch.setattr(evaluate, "AT_ONCE", 4)
    parts = examine(models, prompts, WORDS, HOW, None, seed=3)
    assert [record["prompt"] for record in whole] == [WORDS.decode(ids) for ids in prompts]
    assert [record["gold"] for record in whole] == [float(i) for i in range(22)]
    assert graded == [(r["prompt"], r["response"], r["eos"]) for r in whole]
    assert len({record["length"] for record in whole}) > 2
    assert {record["eos"] for record in whole} == {True, False}
    for one, other in zip(whole, parts, strict=True):
        assert other.pop("kl") == pytest.approx(one.pop("kl"), rel=1e-4)
        assert one["score"] == one["length"] / 2
        assert other == {key: x for key, x in one.items() if key != "gold"}
    assert examine(models, prompts, WORDS, HOW, None, seed=4) != parts


def test_the_kl_of_an_exam_is_that_of_whole_distributions():
    """Σ_t Σ_v p (log p - log q) with both softmaxes written out, one answer at a time, at the sampler's temperature."""
    seen = []
    models = roles()
    models = models._replace(score=lambda rollout: seen.append(rollout) or rollout.lengths.double())
    records = examine(models, [[3 + i % 4] * (1 + i % 3) for i in range(22)], WORDS, HOW, None, seed=3)
    (rollout,) = seen
    assert len(set(rollout.lengths.tolist())) > 2
    found = exact_kl(models, rollout, 0.8)
    assert_close(found, [record["kl"] for record in records], fp32)
    assert not found.requires_grad
    for i, record in enumerate(records):
        prompt, answer = rollout.prompts[i][rollout.prompt_mask[i]], rollout.responses[i][rollout.response_mask[i]]
        ids = torch.cat([prompt, answer])[None]
        log_p, log_q = (m(ids)[0, len(prompt) - 1 : -1].detach().double().div(0.8).log_softmax(-1) for m in models[:2])
        assert record["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-4)
        assert record["kl"] > 1e-3
    warm = examine(models, [[3, 4]], WORDS, {k: x for k, x in HOW.items() if k != "temperature"}, None, seed=3)
    assert warm == examine(models, [[3, 4]], WORDS, HOW | {"temperature": 1.0}, None, seed=3)
    with pytest.raises(ValueError, match="impl 'nonsense'"):
        examine(models, [[3, 4]], WORDS, HOW, None, seed=3, impl="nonsense")
    with pytest.raises(ValueError, match="impl 'nonsense'"):
        exact_kl(models, rollout, 0.8, impl="nonsense")


def test_a_summary_by_hand():
    records = [
        {"prompt": "p", "response": "a", "score": 1.0, "kl": 0.5, "length": 2, "eos": True},
        {"prompt": "p", "response": "a", "score": 4.0, "kl": 1.5, "length": 4, "eos": False},
        {"prompt": "q", "response": "a", "score": 4.0, "kl": 1.0, "length": 3, "eos": True},
        {"prompt": "q", "response": "b", "score": 7.0, "kl": 2.0, "length": 7, "eos": True},
    ]
    expected = {"answers": 4, "score": 4.0, "kl": 1.25, "length": 4.0, "eos": 0.75, "score_std": math.sqrt(18 / 4),
                "distinct_frac": 0.75}  # fmt: skip
    assert summary(records) == expected
    assert summary([record | {"gold": record["kl"] - 1} for record in records]) == expected | {"gold": 0.25}


def test_the_share_of_the_frontier(monkeypatch):
    monkeypatch.setattr(evaluate, "review_world", SimpleNamespace(frontier={0.0: -0.25, 0.5: 0.25, 3.0: 0.75}.get))
    assert frontier_share(-0.2, 0.4, 3.0) == pytest.approx(0.6)
    assert frontier_share(-0.25, 0.0, 0.5) == pytest.approx(0.5)
    assert frontier_share(-0.2, 0.4, 0.0) == 0.0
    monkeypatch.undo()
    assert frontier_share(review_world.frontier(0.0), review_world.frontier(2.0), 2.0) == pytest.approx(1.0)
