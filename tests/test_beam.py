"""Beam search: with enough beams, the likeliest of all answers; with few, those of a search without cache or batch.

`Chain` is a model whose next token depends on the last one and its position alone, by a table.
"""

import itertools
import math
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_close, fp64

from minirlhf.beam import beam_search
from minirlhf.errors import NonFiniteError
from minirlhf.generate import generate
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.rng import generator

V, EOS, R = 4, 0, 3


@pytest.fixture(params=["gpt2", "bloom", "llama"])
def model(request):
    config = ModelConfig(family=request.param, vocab_size=V, n_layer=1, n_head=2, d_model=8, max_seq_len=16)
    model = CausalLM(config, rng=generator(5, "weights")).eval()
    with torch.no_grad():
        model.trunk.embed.weight.mul_(20)
    return model


def every_answer(model, prompt, alpha):
    """(score, answer) of all answers of up to R tokens, the best first."""
    found = []
    for r in range(1, R + 1):
        for tokens in itertools.product(range(V), repeat=r):
            if EOS in tokens[:-1] or (r < R and tokens[-1] != EOS):
                continue
            with torch.no_grad():
                logprobs = model(torch.tensor([[*prompt, *tokens]]))[0].double().log_softmax(-1)
            total = sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(tokens))
            found.append((total / r**alpha, list(tokens)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_enough_beams_find_the_likeliest_answers(model, alpha):
    prompts = torch.tensor([[1, 2, 3], [9, 3, 1]])
    mask = torch.tensor([[True] * 3, [False, True, True]])
    found = beam_search(model, prompts, mask, num_beams=V**R, max_new_tokens=R, eos_token_id=EOS, pad_token_id=0,
                        length_penalty=alpha)  # fmt: skip
    for row, prompt in enumerate(([1, 2, 3], [3, 1])):
        expected = every_answer(model, prompt, alpha)[:5]
        answers = [found.tokens[row, i][found.mask[row, i]].tolist() for i in range(5)]
        assert answers == [answer for _, answer in expected]
        torch.testing.assert_close(found.scores[row, :5].tolist(), [s for s, _ in expected], rtol=1e-4, atol=1e-4)


def test_dropout_is_off_and_every_module_is_afterwards_as_it_was():
    config = ModelConfig(vocab_size=V, n_layer=2, n_head=2, d_model=8, max_seq_len=16, dropout=0.5)
    model = CausalLM(config, rng=generator(5, "weights")).train()
    model.trunk.blocks[0].eval()
    before = [module.training for module in model.modules()]
    how = {"num_beams": 3, "max_new_tokens": 6, "eos_token_id": EOS, "pad_token_id": 0}
    once, again = (beam_search(model, torch.tensor([[1, 2, 3]]), **how).scores for _ in range(2))
    assert torch.equal(once, again)
    assert [module.training for module in model.modules()] == before


def test_fp64_stays_fp64(model):
    """To more digits than fp32 has."""
    prompts, how = torch.tensor([[1, 2, 3]]), {"max_new_tokens": R, "eos_token_id": EOS, "pad_token_id": 0}
    found = beam_search(model.double(), prompts, num_beams=V**R, **how).scores
    assert_close(found[0, :5], [score for score, _ in every_answer(model, (1, 2, 3), 1.0)[:5]], fp64)


def test_what_stands_under_the_padding_need_not_be_a_token(model):
    mask, how = torch.tensor([[False, True, True]]), {"num_beams": 2, "max_new_tokens": 4, "repetition_penalty": 1.5}
    one, other = (
        beam_search(model, torch.tensor([[pad, 2, 1]]), mask, eos_token_id=EOS, pad_token_id=0, **how)
        for pad in (0, -100)
    )
    assert torch.equal(one.tokens, other.tokens)


def test_logits_that_are_no_numbers_are_an_error(model):
    with torch.no_grad():
        model.trunk.embed.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="logits of row"):
        beam_search(model, torch.tensor([[1, 2], [1, 3]]), num_beams=2, max_new_tokens=4, eos_token_id=EOS,
                    pad_token_id=0)  # fmt: skip


def test_one_beam_is_greedy(model):
    prompts = torch.tensor([[1, 2, 3], [2, 2, 1]])
    how = {"max_new_tokens": 6, "eos_token_id": EOS, "pad_token_id": 0}
    one = beam_search(model, prompts, num_beams=1, length_penalty=0.0, **how)  # no longer answer can be likelier
    greedy = generate(model, prompts, do_sample=False, **how)
    for row in range(2):
        assert one.tokens[row, 0][one.mask[row, 0]].tolist() == greedy.tokens[row][greedy.mask[row]].tolist()


# ---- few beams ------------------------------------------------------------------------------------------------------


class Chain(torch.nn.Module):
    """Logits after a token: its row of the table of its position. `passes` counts them."""

    def __init__(self, tables):
        super().__init__()
        self.tables, self.passes = torch.tensor(tables).float(), 0  # (T, V, V)
        self.config = ModelConfig("llama", vocab_size=self.tables.shape[-1], n_layer=1, n_head=1, d_model=2)
        self.trunk = SimpleNamespace(embed=SimpleNamespace(weight=torch.zeros(1)))

    def hidden(self, ids, mask, cache):
        return torch.stack([mask.sum(1, keepdim=True).expand_as(ids) - 1, ids], -1)

    def head(self, hidden):
        self.passes += 1
        return self.tables[hidden[..., 0], hidden[..., 1]]

    def forward(self, ids):
        return self.tables[torch.arange(ids.shape[1]), ids]


def chain(seed, size=6):
    return Chain((2 * torch.randn(9, size, size, generator=torch.Generator().manual_seed(seed))).tolist())


def textbook(model, prompt, n, limit, ends=(EOS,), alpha=1.0, allowed=lambda _, z: z):
    """One prompt, a full forward per beam → [(score, answer)], the best first."""
    open_, best = [(0.0, [])], []
    for t in range(1, limit + 1):
        found = []
        for score, answer in open_:
            with torch.no_grad():
                z = model(torch.tensor([[*prompt, *answer]]))[0, -1].double().log_softmax(-1).tolist()
            found += [(score + x, [*answer, token]) for token, x in enumerate(allowed(answer, z))]
        found.sort(reverse=True)
        over = [answer[-1] in ends or t == limit for _, answer in found]
        best += [(score / t**alpha, answer) for (score, answer), end in list(zip(found, over, strict=True))[:n] if end]
        best = sorted(best, reverse=True)[:n]
        open_ = [one for one, end in zip(found, over, strict=True) if not end][:n]
        if not open_ or (len(best) == n and open_[0][0] / t**alpha <= best[-1][0]):
            break
    return best


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])


def check_beams(model, prompts, n, limit, ends=(EOS,), alpha=1.0, allowed=None, **filters):
    """Answers and scores of every row are those of the textbook."""
    found = beam_search(model, *padded(prompts), num_beams=n, max_new_tokens=limit, eos_token_id=ends, pad_token_id=3,
                        length_penalty=alpha, **filters)  # fmt: skip
    lengths = []
    for row, prompt in enumerate(prompts):

        def only(answer, z, prompt=prompt):
            return allowed(prompt + answer, len(answer), z) if allowed else z

        expected = textbook(model, prompt, n, limit, ends, alpha, only)
        assert [found.tokens[row, i][found.mask[row, i]].tolist() for i in range(n)] == [a for _, a in expected]
        torch.testing.assert_close(found.scores[row].tolist(), [s for s, _ in expected], rtol=1e-4, atol=1e-4)
        lengths += [len(answer) for _, answer in expected]
    assert found.tokens.shape == found.mask.shape == (len(prompts), n, max(lengths))
    assert found.tokens[~found.mask].eq(3).all()
    return lengths


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("ends", [(EOS,), (EOS, 2), (EOS, 2, 4)])
def test_beams_are_those_of_the_textbook(alpha, ends):
    lengths = set()
    for seed in range(6):
        for n in (1, 2, 3):
            lengths |= set(check_beams(chain(seed), [[1]], n, 6, ends, alpha))
    assert len(lengths) > 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_beams_of_a_batch_with_a_cache(family):
    config = ModelConfig(family, vocab_size=9, n_layer=2, n_head=2, d_model=8, max_seq_len=16)
    model = CausalLM(config, rng=generator(5, "weights")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(15 if p.ndim > 1 else 1)
    lengths = check_beams(model, [[1, 2, 3], [5, 1], [8], [2, 2, 7]], 3, 6, alpha=0.0)
    assert len(set(lengths)) > 2


def test_no_end_at_all():
    check_beams(chain(0), [[1], [2]], 2, 4, ends=(), alpha=0.0)


def test_every_token_is_an_end():
    """Of two tokens and two beams there are fewer extensions than places."""
    found = beam_search(Chain([[[0.0, 1.0], [1.0, 0.0]]]), torch.tensor([[0]]), num_beams=2, max_new_tokens=3,
                        eos_token_id=(0, 1), pad_token_id=0)  # fmt: skip
    assert found.tokens.tolist() == [[[1], [0]]]
    torch.testing.assert_close(found.scores, -torch.tensor([[math.log1p(math.exp(-1)), math.log1p(math.e)]]))


def test_the_score_by_hand():
    """After 1: end 0.4, 2 0.6. After 2: end 0.55, 2 0.45. By default 2 0 scores log √0.33, more than log 0.4."""
    logs = [[0.0] * 3, [math.log(0.4), -99.0, math.log(0.6)], [math.log(0.55), -99.0, math.log(0.45)]]
    found = beam_search(Chain([logs] * 2), torch.tensor([[1]]), num_beams=2, max_new_tokens=2, eos_token_id=0,
                        pad_token_id=1)  # fmt: skip
    assert found.tokens.tolist() == [[[2, 0], [2, 2]]]
    assert found.scores[0].tolist() == pytest.approx([math.log(0.33) / 2, math.log(0.27) / 2], abs=1e-5)


def test_it_stops_when_nothing_can_be_gained():
    """An end of 0.9, then an end of 0.99 after 2: no open beam is as likely as the worst kept."""
    logs = [[0.0] * 3, [math.log(0.9), math.log(0.001), math.log(0.099)], [math.log(0.99), -99.0, math.log(0.01)]]
    model = Chain([logs] * 9)
    how = {"num_beams": 2, "eos_token_id": 0, "pad_token_id": 0, "length_penalty": 0.0}
    found = beam_search(model, torch.tensor([[1]]), max_new_tokens=9, **how)
    assert found.mask.tolist() == [[[True, False], [True, True]]]
    assert model.passes == 2
    model.passes = 0
    beam_search(model, torch.tensor([[1]]), max_new_tokens=1, **how)
    assert model.passes == 1


def test_it_stops_where_nothing_but_a_tie_is_left():
    """Kept: an end of 0.4, and one of 0.6 · 0.5; open: 0.6 · 0.5."""
    logs = [[0.0] * 3, [math.log(0.4), -99.0, math.log(0.6)], [math.log(0.5), -99.0, math.log(0.5)]]
    model = Chain([logs] * 9)
    beam_search(model, torch.tensor([[1]]), num_beams=2, max_new_tokens=9, eos_token_id=0, pad_token_id=0,
                length_penalty=0.0)  # fmt: skip
    assert model.passes == 2


def test_ends_do_not_push_open_beams_out():
    """Ends are 0 and 4. After two tokens 2 1 has 0.2, four ended answers have more than 3 2, which has 0.044; but
    2 1 goes on with five tokens of 0.2 each, 0.04, and 3 2 with a 3 of 0.97, 0.04268."""
    none = [0.2] * 5
    first = [none, [0.05, 1e-9, 0.5, 0.4, 0.05], none, none, none]
    second = [none, none, [0.29, 0.4, 0.01, 0.01, 0.29], [0.46, 1e-9, 0.11, 1e-9, 0.43], none]
    third = [none, none, [0.01, 0.01, 0.005, 0.97, 0.005], none, none]
    model = Chain([[[math.log(p) for p in row] for row in table] for table in (first, second, third)])
    found = beam_search(model, torch.tensor([[1]]), num_beams=2, max_new_tokens=3, eos_token_id=(0, 4),
                        pad_token_id=0, length_penalty=3.0)  # fmt: skip
    assert found.tokens[0, 0].tolist() == [3, 2, 3]
    assert found.scores[0, 0].item() == pytest.approx(math.log(0.4 * 0.11 * 0.97) / 27, abs=1e-6)


@pytest.mark.parametrize("ends", [(EOS,), (EOS, 2)])
def test_filters_of_beams(ends):
    def no_token_twice(ids, _, z):
        return [-math.inf if token in ids else x for token, x in enumerate(z)]

    def penalty(ids, _, z):
        return [2 * x if token in ids else x for token, x in enumerate(z)]

    def late(_, t, z):
        return [-math.inf if t < 3 and token in ends else x for token, x in enumerate(z)]

    def without(_, t, z):
        return [-math.inf if token in (3, 5) else x for token, x in enumerate(z)]

    for seed in range(4):
        prompts, n, alpha = [[1, 3], [4]], 2, 0.0
        check_beams(chain(seed, 9), prompts, n, 4, ends, alpha, no_token_twice, no_repeat_ngram_size=1)
        check_beams(chain(seed, 9), prompts, n, 5, ends, alpha, penalty, repetition_penalty=2.0)
        check_beams(chain(seed, 9), prompts, n, 5, ends, alpha, late, min_new_tokens=3)
        check_beams(chain(seed, 9), prompts, n, 5, ends, alpha, without, suppress_tokens=(3, 5))


def test_a_done_row_does_not_wait_for_its_neighbour():
    """After 1: end 0.6, 3 0.4; done, since log 0.6 > log 0.4. 3 3 0 would score log √³0.376, but nobody looks there."""
    none = [0.25] * 4
    tables = [[none, [0.6, 1e-9, 1e-9, 0.4], [0.03, 0.03, 0.9, 0.04], none],
              [none, none, [0.03, 0.03, 0.9, 0.04], [0.01, 0.01, 0.01, 0.97]],
              [none, none, [0.9, 0.03, 0.03, 0.04], [0.97, 0.01, 0.01, 0.01]]]  # fmt: skip
    model, how = Chain([[[math.log(p) for p in row] for row in table] for table in tables]), {"num_beams": 1}
    how |= {"max_new_tokens": 3, "eos_token_id": 0, "pad_token_id": 0, "length_penalty": 1.0}
    alone = beam_search(model, torch.tensor([[1]]), **how)
    both = beam_search(model, torch.tensor([[1], [2]]), **how)
    assert alone.mask.sum(-1).tolist() == [[1]]
    assert both.mask.sum(-1).tolist() == [[1], [3]]


# ---- what it leaves alone, and what it refuses ----------------------------------------------------------------------


def test_beams_are_made_where_the_prompts_are(model):
    """A tensor made without a device would be on meta here, and mixing is refused."""
    prompts, how = torch.tensor([[1, 2, 3], [2, 2, 1]]), {"num_beams": 3, "eos_token_id": EOS, "pad_token_id": 0}
    expected = beam_search(model, prompts, max_new_tokens=4, **how)
    with torch.device("meta"):
        found = beam_search(model, prompts, max_new_tokens=4, **how)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_beams_of_other_dtypes(model, dtype):
    prompts, how = torch.tensor([[1, 2, 3]]), {"num_beams": 2, "eos_token_id": EOS, "pad_token_id": 0}
    found = beam_search(model.to(dtype), prompts, max_new_tokens=4, **how)
    assert found.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.scores.requires_grad
    with pytest.raises(FrozenInstanceError):
        found.scores = None


def test_no_beam_is_refused(model):
    with pytest.raises(ValueError, match="number of answers 0 must be positive"):
        beam_search(model, torch.tensor([[1, 2]]), num_beams=0, max_new_tokens=2, eos_token_id=EOS, pad_token_id=0)


def test_beams_want_left_padding(model):
    with pytest.raises(ValueError, match="left-padded"):
        beam_search(model, torch.tensor([[1, 2]]), torch.tensor([[True, False]]), num_beams=2, max_new_tokens=2,
                    eos_token_id=EOS, pad_token_id=0)  # fmt: skip
