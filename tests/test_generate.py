"""Sampling: the same answers as a loop without cache, whatever stands beside a row; the right distribution; filters by
hand.

`fixed` models give the same logits after every prefix, so that what must be drawn can be worked out on paper. `plain`
is decoding as a textbook has it: one row, no padding, no cache, a full forward per token.
"""

import math
import sys
from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close, exact, fp32, fp64

from minirlhf.errors import NonFiniteError
from minirlhf.generate import Sampling, draw, filtered, generate, row_uniforms
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.rng import generator

generate_module = sys.modules["minirlhf.generate"]
EOS, PAD, V = 1, 0, 13
KINDS = {
    "gpt2": {},
    "bloom": {},
    "llama": {"n_kv_head": 1},
    "mistral": {"sliding_window": 3},
    "gpt_neox": {},
}
PROMPTS = [[5, 6, 7], [8], [2, 9, 2, 9, 2, 9], [3, 4], [8]]


def lm(family="llama", dtype=torch.float64, **settings):
    """Weights large enough that no two rows agree, EOS likely enough that rows end at different times."""
    sizes = {"vocab_size": V, "n_layer": 2, "n_head": 2, "d_model": 16, "max_seq_len": 32} | KINDS[family] | settings
    model = CausalLM(ModelConfig(family=family, **sizes)).to(dtype).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * 0.4)
    return model


def fixed(*logits):
    """Logits that depend on nothing: the last norm scales all away and its bias picks the head's first column."""
    config = ModelConfig(family="gpt2", vocab_size=len(logits), n_layer=1, n_head=1, d_model=2, max_seq_len=64)
    model = CausalLM(config)
    with torch.no_grad():
        model.trunk.final_norm.weight.zero_()
        model.trunk.final_norm.bias.copy_(torch.tensor([1.0, 0.0]))
        model.trunk.embed.weight[:, 0] = torch.tensor(logits)
    return model


def padded(prompts, width=0, pad=PAD):
    width = max(width, *map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])


def streams(n, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + row) for row in range(n)]


def run(model, prompts, **settings):
    settings = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": PAD} | settings
    return generate(model, *padded(prompts), **settings)


def answers(generation):
    """The real tokens of every row."""
    return [row[real].tolist() for row, real in zip(generation.tokens, generation.mask, strict=True)]


def greedy(model, prompt=(0,), n=8, **settings):
    """The answer of a row that no EOS ends."""
    settings = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False} | settings
    return generate(model, torch.tensor([list(prompt)]), max_new_tokens=n, **settings).tokens[0].tolist()


def plain(model, prompt, n, *, temperature=1.0, uniforms=None):
    """Token by token with a full forward → tokens up to EOS, log softmax(z/τ) of each."""
    ids, logprobs = list(prompt), []
    for t in range(n):
        with torch.no_grad():
            z = (model(torch.tensor([ids]))[0, -1] / temperature).tolist()
        top = max(z)
        weights = [math.exp(x - top) for x in z]
        if uniforms is None:
            token = z.index(top)
        else:
            rest, token = uniforms[t] * sum(weights), 0
            while rest >= weights[token]:
                rest, token = rest - weights[token], token + 1
        ids.append(token)
        logprobs.append(math.log(weights[token] / sum(weights)))
        if token == EOS:
            break
    return ids[len(prompt) :], logprobs


def chi_square(counts, probs):
    n = sum(counts)
    return sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, probs, strict=True))


def softmax(logits):
    weights = [math.exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


# ---- one row, whatever stands beside it -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_greedy_answers_are_those_of_the_loop_without_cache(family):
    model = lm(family)
    got = run(model, PROMPTS, do_sample=False, temperature=0.7)
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = plain(model, prompt, 12, temperature=0.7)
        assert got.tokens[row][got.mask[row]].tolist() == tokens
        assert_close(got.logprobs[row][got.mask[row]], logprobs, fp64)


@pytest.mark.parametrize("family", KINDS)
def test_sampled_answers_are_those_of_the_loop_without_cache(family):
    model = lm(family)
    got = run(model, PROMPTS, temperature=1.3, rng=streams(5))
    uniforms = [torch.rand(12, generator=g, dtype=torch.float64).tolist() for g in streams(5)]
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = plain(model, prompt, 12, temperature=1.3, uniforms=uniforms[row])
        assert got.tokens[row][got.mask[row]].tolist() == tokens
        assert_close(got.logprobs[row][got.mask[row]], logprobs, fp64)
        lengths.add(len(tokens))
    assert len(lengths) > 1  # otherwise no row ever left the batch


@pytest.mark.parametrize("family", KINDS)
def test_an_answer_depends_on_its_prompt_and_its_stream_alone(family):
    model = lm(family)
    whole = run(model, PROMPTS, rng=streams(5))
    for row, prompt in enumerate(PROMPTS):  # alone, and behind more padding
        for width in (0, 9):
            ids, mask = padded([prompt], width)
            alone = generate(
                model, ids, mask, max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD, rng=[streams(5)[row]]
            )
            assert answers(alone) == [answers(whole)[row]]
            assert_close(alone.logprobs[0], whole.logprobs[row][: alone.tokens.shape[1]], fp64)
    order = [4, 2, 0, 3, 1]
    shuffled = run(model, [PROMPTS[i] for i in order], rng=[streams(5)[i] for i in order])
    assert answers(shuffled) == [answers(whole)[i] for i in order]


def test_one_generator_gives_row_r_the_same_stream_in_any_batch():
    model = lm()
    whole = run(model, PROMPTS, rng=torch.Generator().manual_seed(5))
    for n in range(1, 5):
        part = run(model, PROMPTS[:n], rng=torch.Generator().manual_seed(5))
        assert answers(part) == answers(whole)[:n]


def test_a_lower_limit_gives_the_beginning_of_the_same_answer():
    model = lm()
    long = answers(run(model, PROMPTS, max_new_tokens=24, rng=streams(5)))
    for limit in (1, 2, 5, 17):
        short = run(model, PROMPTS, max_new_tokens=limit, rng=streams(5))
        assert answers(short) == [answer[:limit] for answer in long]


@pytest.mark.parametrize("pad", [-100, PAD, 7, 10**6])
def test_what_stands_under_the_padding_changes_nothing(pad):
    model, settings = lm(), {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    ids, mask = padded(PROMPTS, pad=pad)
    settings |= {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": PAD}
    got = generate(model, ids, mask, rng=streams(5), **settings)
    alone = [generate(model, torch.tensor([p]), rng=[streams(5)[i]], **settings) for i, p in enumerate(PROMPTS)]
    assert answers(got) == [answers(a)[0] for a in alone]


def test_every_module_is_afterwards_as_it_was():
    model = lm().train()
    model.trunk.blocks[0].eval()
    before = [module.training for module in model.modules()]
    run(model, PROMPTS, rng=streams(5))
    assert [module.training for module in model.modules()] == before


def test_the_mask_may_be_left_out_or_be_of_integers():
    model, ids = lm(), torch.tensor([[5, 6], [7, 8]])
    settings = {"max_new_tokens": 6, "eos_token_id": EOS, "pad_token_id": PAD}
    results = [
        generate(model, ids, mask, rng=streams(2), **settings)
        for mask in (None, torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.int64))
    ]
    assert answers(results[0]) == answers(results[1]) == answers(results[2])


def test_answers_to_one_prompt_stand_together():
    model = lm()
    several = run(model, PROMPTS, num_return_sequences=3, rng=streams(15))
    repeated = run(model, [p for p in PROMPTS for _ in range(3)], rng=streams(15))
    assert torch.equal(several.tokens, repeated.tokens)
    assert_close(several.logprobs, repeated.logprobs, fp64)
    assert len({tuple(a) for a in answers(several)[:3]}) > 1
    single = run(model, PROMPTS, num_return_sequences=3, rng=torch.Generator().manual_seed(2))
    assert len({tuple(a) for a in answers(single)[:3]}) > 1  # one generator, yet three streams


def test_each_distinct_prompt_runs_once_and_finished_rows_leave():
    model = lm()
    shapes = []
    model.trunk.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    got = run(model, PROMPTS, num_return_sequences=4, rng=streams(20))  # prompts 1 and 4 are equal
    lengths = got.mask.sum(1)
    assert shapes[0] == (4, 6)
    assert shapes[1:] == [(int((lengths > t).sum()), 1) for t in range(1, int(lengths.max()))]
    assert len(set(lengths.tolist())) > 1


# ---- the distribution -----------------------------------------------------------------------------------------------

LOGITS = (1.0, 0.2, -1.5, 0.0, -0.4, 0.7, -3.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_tokens_are_distributed_as_softmax(seed, temperature):
    got = generate(
        fixed(*LOGITS), torch.tensor([[0]]), max_new_tokens=10, eos_token_id=None, pad_token_id=0,
        temperature=temperature, num_return_sequences=1000, rng=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    counts = torch.bincount(got.tokens.flatten(), minlength=7).tolist()
    assert sum(counts) == 10_000
    assert chi_square(counts, softmax([z / temperature for z in LOGITS])) < 22.46  # 99.9 % quantile, 6 degrees


def test_neighbours_in_a_row_and_in_a_column_are_independent():
    tokens = generate(
        fixed(0.5, 0.0, -0.5), torch.tensor([[0]]), max_new_tokens=16, eos_token_id=None, pad_token_id=0,
        num_return_sequences=1001, rng=torch.Generator().manual_seed(0),
    ).tokens  # fmt: skip
    p = softmax([0.5, 0.0, -0.5])
    expected = [a * b for a in p for b in p]
    for first, second in ((tokens[:, 0::2], tokens[:, 1::2]), (tokens[0:1000:2], tokens[1:1000:2])):
        counts = torch.bincount((3 * first + second).flatten(), minlength=9).tolist()
        assert chi_square(counts, expected) < 26.12  # 99.9 % quantile, 8 degrees


def test_a_models_second_token_follows_the_conditional_distribution():
    model = lm("gpt2")
    got = run(model, [[5, 6]], max_new_tokens=2, num_return_sequences=20_000, rng=torch.Generator().manual_seed(0))
    first = Counter(got.tokens[:, 0].tolist())
    common = max(first, key=lambda token: first[token] * (token != EOS))
    second = got.tokens[got.tokens[:, 0] == common, 1]
    with torch.no_grad():
        for prefix, tokens in (([5, 6], got.tokens[:, 0]), ([5, 6, common], second)):
            probs = softmax(model(torch.tensor([prefix]))[0, -1].tolist())
            counts = torch.bincount(tokens, minlength=V).tolist()
            rare = [i for i in range(V) if len(tokens) * probs[i] < 5]  # too few for the test; put together
            counts = [counts[i] for i in range(V) if i not in rare] + [sum(counts[i] for i in rare)]
            probs = [probs[i] for i in range(V) if i not in rare] + [max(sum(probs[i] for i in rare), 1e-9)]
            assert chi_square(counts, probs) < 32.91  # 99.9 % quantile, 12 degrees, or fewer


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().double()  # cumulated .5, .75, 1
    expected = {0.0: 0, 0.49: 0, 0.51: 1, 0.74: 1, 0.76: 2, 1 - 2**-53: 2}
    for u, token in expected.items():
        assert draw(logits, torch.tensor([u], dtype=torch.float64))[0].item() == token


@pytest.mark.parametrize("apart", [1, 64, 100])
def test_draw_sums_in_fp64_and_scales_by_the_total(apart):
    """fp32 probabilities ½, 2⁻²⁶, ½: ½ of their sum 1 + 2⁻²⁶ is ½ + 2⁻²⁷, which the second alone reaches."""
    logits = torch.full((1, 2 * apart + 1), float("-inf"))
    logits[0, ::apart] = torch.tensor([0.0, -25 * math.log(2), 0.0])
    token, logprob = draw(logits, torch.tensor([0.5], dtype=torch.float64))
    assert token.tolist() == [apart]
    assert_close(logprob, [-26 * math.log(2)], fp32)


def test_draw_at_the_beginning_of_a_block():
    """Sums 1 and p, whose sum rounds up: from the end of the first block to that of the second is more than p."""
    for hundredths in range(2200, 2300):
        logits = torch.full((1, 66), float("-inf"))
        logits[0, 0], logits[0, 65] = 0, -hundredths / 100
        one, p = logits.softmax(-1)[0, ::65].double().tolist()
        u = 1 / (1 + p)
        if one == 1 and 1 + p - 1 > p and u * (1 + p) == 1:
            break
    else:
        pytest.fail("no such p among these logits")
    token, logprob = draw(logits, torch.tensor([u], dtype=torch.float64))
    assert token.tolist() == [65]
    assert_close(logprob, [-hundredths / 100], fp32)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 1000])
def test_draw_finds_every_token_of_a_vocabulary_of_any_size(size):
    """u in the middle of a token's interval gives that token, in whichever block it lies."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size))
    p = softmax(logits.tolist())
    middle = [sum(p[:i]) + p[i] / 2 for i in range(size)]
    token, logprob = draw(logits.repeat(size, 1), torch.tensor(middle, dtype=torch.float64))
    assert token.tolist() == list(range(size))
    assert_close(logprob, [math.log(x) for x in p], fp32)


@given(
    size=st.integers(1, 200),
    allowed=st.sets(st.integers(0, 199), min_size=1, max_size=5),
    u=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 2**-53, 1 - 2**-53])),
)
def test_draw_keeps_to_what_is_allowed(size, allowed, u):
    allowed = {i % size for i in allowed}
    logits = torch.full((1, size), float("-inf"))
    logits[0, list(allowed)] = torch.linspace(0, -9, len(allowed))
    token, logprob = draw(logits, torch.tensor([u], dtype=torch.float64))
    assert token.item() in allowed
    assert logprob.isfinite().all()


def test_log_probs_are_those_of_the_unfiltered_policy():
    logits = (2.0, 1.0, 0.0, -1.0)
    got = generate(
        fixed(*logits), torch.tensor([[3]]), max_new_tokens=6, eos_token_id=3, pad_token_id=0, temperature=0.5,
        top_k=2, top_p=0.9, repetition_penalty=1.3, min_new_tokens=6, begin_suppress_tokens=[0],
        num_return_sequences=4, rng=torch.Generator().manual_seed(0),
    )  # fmt: skip
    table = [math.log(p) for p in softmax([z / 0.5 for z in logits])]
    assert_close(got.logprobs, [[table[token] for token in row] for row in got.tokens.tolist()], fp32)
    assert got.logprobs.dtype == torch.float32
    assert len(got.tokens.unique()) > 1


@pytest.mark.parametrize(
    ("temperature", "more"), [(1.0, {"top_k": 2}), (2.0, {}), (2.0, {"do_sample": False}), (1.0, {"do_sample": False})]
)
def test_log_probs_know_the_temperature_and_no_filter(temperature, more):
    logits = (2.0, 1.0, 0.0, -1.0)
    got = generate(
        fixed(*logits), torch.tensor([[3]]), max_new_tokens=6, eos_token_id=None, pad_token_id=0,
        temperature=temperature, num_return_sequences=4, rng=torch.Generator().manual_seed(0), **more,
    )  # fmt: skip
    table = [math.log(p) for p in softmax([z / temperature for z in logits])]
    assert_close(got.logprobs, [[table[token] for token in row] for row in got.tokens.tolist()], fp32)


def test_a_row_draws_from_the_stream_of_its_number():
    base = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(1)))
    assert base > 2**61  # of a number below, the limit would not be seen
    expected = [torch.rand(3, generator=generator(base, "sample", row=r), dtype=torch.float64) for r in range(2)]
    assert_close(row_uniforms(torch.Generator().manual_seed(1), 2, 3), torch.stack(expected), exact)


# ---- the filters, by hand -------------------------------------------------------------------------------------------


def probabilities(logits, *, t=0, prompt=(0,), real=None, answer=(), **settings):
    """Softmax of what the filters leave of one row."""
    seen = (
        torch.tensor([list(prompt)]),
        torch.tensor([[True] * len(prompt) if real is None else list(real)]),
        torch.tensor([list(answer)], dtype=torch.int64).reshape(1, -1),
    )
    sampling = Sampling(**{"max_new_tokens": 9, "eos_token_ids": ()} | settings)
    before = torch.tensor([list(logits)], dtype=torch.float64)
    z = filtered(before.clone(), sampling, t, seen)
    again = before.clone()
    filtered(again, sampling, t, seen)
    assert torch.equal(again, before)  # the policy's logits stay as they are
    return z.softmax(-1)[0]


def test_no_filter_leaves_the_logits_alone():
    """The very tensor, at the first token too, whether or not what was said is given."""
    logits, ids = torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 1, 0]])
    for seen in (None, (ids, ids >= 0, ids)):
        assert filtered(logits, Sampling(9, (1,)), 0, seen) is logits


def test_who_looks_back():
    assert not Sampling(9, (1,)).looks_back
    assert Sampling(9, (1,), repetition_penalty=2.0).looks_back
    assert Sampling(9, (1,), no_repeat_ngram_size=1).looks_back


def test_one_row_without_a_token_is_an_error():
    ids = torch.tensor([[0, 1], [0, 0]])
    with pytest.raises(NonFiniteError, match="new token 3"):
        filtered(torch.zeros(2, 2), Sampling(9, (), no_repeat_ngram_size=1), 3, (ids, ids >= 0, ids[:, :0]))


P4 = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.5, 0.3, 0.15, 0.05)),
        ({"top_k": 1}, (1, 0, 0, 0)),
        ({"top_k": 2}, (0.625, 0.375, 0, 0)),
        ({"top_k": 4}, (0.5, 0.3, 0.15, 0.05)),
        ({"top_k": 99}, (0.5, 0.3, 0.15, 0.05)),
        ({"top_p": 0.85}, (0.5263157895, 0.3157894737, 0.1578947368, 0)),  # .5 + .3 < .85 <= .95
        ({"top_p": 0.79}, (0.625, 0.375, 0, 0)),
        ({"top_p": 0.49}, (1, 0, 0, 0)),
        ({"top_p": 0.0}, (1, 0, 0, 0)),  # never nothing
        ({"top_p": 0.999}, (0.5, 0.3, 0.15, 0.05)),
        ({"temperature": 0.5}, (0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365)),  # squares
        (
            {"temperature": 2.0, "top_k": 2},
            (math.sqrt(5) / (math.sqrt(5) + math.sqrt(3)), math.sqrt(3) / (math.sqrt(5) + math.sqrt(3)), 0, 0),
        ),  # roots of .5, .3
        ({"temperature": 0.5, "top_p": 0.6}, (1, 0, 0, 0)),  # temperature first: 0.685 reaches 0.6 alone
        ({"top_k": 2, "top_p": 0.6}, (1, 0, 0, 0)),  # top-k first: 0.625 reaches 0.6 alone
        ({"top_p": 0.6}, (0.625, 0.375, 0, 0)),
        ({"suppress_tokens": (0,)}, (0, 0.6, 0.3, 0.1)),
        ({"suppress_tokens": (0,), "top_k": 1}, (0, 1, 0, 0)),  # exclusions before top-k
    ],
)
def test_temperature_top_k_and_top_p(settings, expected):
    assert_close(probabilities(P4, **settings), expected, fp64)


def test_top_p_keeps_tokens_by_probability_not_by_position():
    order = [2, 0, 3, 1]  # P4 shuffled: position of the i-th most likely token
    shuffled = [P4[order.index(i)] for i in range(4)]
    expected = [0.0] * 4
    expected[2], expected[0] = 0.625, 0.375
    assert_close(probabilities(shuffled, top_p=0.79), expected, fp64)


def test_equal_tokens():
    assert_close(probabilities([0.0] * 4, top_p=0.5), (0.5, 0.5, 0, 0), fp64)  # exactly two reach a half
    assert_close(probabilities([1.0, 0.0, 0.0, -9.0], top_k=2)[3:], [0.0], exact)
    assert probabilities([1.0, 0.0, 0.0, -9.0], top_k=2)[1:3].unique().numel() == 1  # ties live or die together


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"prompt": [0, 1]}, (1.6666666667, -1.2, 0.5, 0.0)),
        ({"prompt": [0, 0, 0]}, (1.6666666667, -1.0, 0.5, 0.0)),  # once, not once per occurrence
        ({"prompt": [2], "answer": [1]}, (2.0, -1.2, 0.4166666667, 0.0)),
        ({"prompt": [0, 1], "real": [False, True]}, (2.0, -1.2, 0.5, 0.0)),  # padding is no text
        ({"prompt": [3]}, (2.0, -1.0, 0.5, 0.0)),  # a logit of 0 stays 0
    ],
)
def test_repetition_penalty(kwargs, expected):
    assert_close(probabilities([2.0, -1.0, 0.5, 0.0], repetition_penalty=1.2, **kwargs), softmax(expected), fp64)


def test_a_repetition_penalty_of_two():
    halved = softmax([1.0, -1.0, 0.5])
    assert_close(probabilities([2.0, -0.5, 0.5], repetition_penalty=2.0, prompt=[0, 1]), halved, fp64)


def test_repetition_penalty_while_decoding():
    # 2.0; then 2/1.2 = 1.667 < 1.9; then 1.667 > 1.9/1.2 = 1.583, from here on for ever
    assert greedy(fixed(2.0, 1.9, -5.0), [2], 5, repetition_penalty=1.2) == [0, 1, 0, 0, 0]
    assert greedy(fixed(2.0, 1.9, -5.0), [0], 3, repetition_penalty=1.2) == [1, 0, 0]


@pytest.mark.parametrize(
    ("n", "prompt", "expected"),
    [
        # 3|0: (0,?) new · 00: (0,0) gone · 001 · 0010: (0,0) (0,1) gone · 00102 · 0 · (0,3) is left · (3,0) gone: 1
        (2, [3], [0, 0, 1, 0, 2, 0, 3, 1]),
        (2, [0, 0], [1, 0, 2, 0, 3, 0]),  # the prompt counts; (0,1) ends at 1, (1,0) is new, and so on
        (3, [3], [0, 0, 0, 1, 0, 0, 2, 0]),  # 3 0 0 0: (0,0,0) may stand once
        (1, [3], [0, 1, 2]),
        (9, [3], [0] * 8),
    ],
)
def test_no_repeated_ngrams(n, prompt, expected):
    if n == 2 and prompt == [0, 0]:
        expected = expected[:5]  # after 0 0 1 0 2 0 3 every pair that begins with 3 is new again
    assert greedy(fixed(3.0, 2.0, 1.0, 0.0), prompt, len(expected), no_repeat_ngram_size=n) == expected


def test_no_ngram_stands_twice_in_a_sampled_answer():
    model = lm()
    got = run(model, PROMPTS, eos_token_id=None, max_new_tokens=20, no_repeat_ngram_size=2, rng=streams(5))
    free = run(model, PROMPTS, eos_token_id=None, max_new_tokens=20, rng=streams(5))

    def repeats(generation):
        texts = [p + a for p, a in zip(PROMPTS, generation.tokens.tolist(), strict=True)]
        return [max(Counter(pairwise(ids)).values()) for ids in texts]

    assert repeats(got)[0:2] == [1, 1]  # row 2's prompt itself repeats
    assert max(repeats(free)[0:2]) > 1


def test_ngrams_do_not_reach_into_the_padding():
    got = run(fixed(3.0, 2.0, 1.0, 0.0), [[3], [1, 0, 0, 2]], eos_token_id=None, pad_token_id=0, max_new_tokens=2,
              do_sample=False, no_repeat_ngram_size=2)  # fmt: skip
    assert got.tokens.tolist() == [[0, 0], [0, 1]]  # (0,0) is in the pads of row 0, in the text of row 1


def test_no_end_before_min_new_tokens():
    model = fixed(1.0, 5.0, 0.0, 4.0)  # both ends are likelier than anything else
    got = greedy(model, n=6, eos_token_id=[1, 3], min_new_tokens=3)
    assert got == [0, 0, 0, 1]
    assert greedy(model, n=6, eos_token_id=[1, 3]) == [1]
    assert greedy(model, n=2, eos_token_id=1, min_new_tokens=3) == [3, 3]


def test_begin_suppress_holds_for_the_first_token_alone():
    assert greedy(fixed(3.0, 2.0, 1.0), n=4, begin_suppress_tokens=[0]) == [1, 0, 0, 0]
    assert greedy(fixed(3.0, 2.0, 1.0), n=4, begin_suppress_tokens=(0, 1)) == [2, 0, 0, 0]
    assert greedy(fixed(3.0, 2.0, 1.0), n=4, suppress_tokens=[0]) == [1, 1, 1, 1]


@pytest.mark.parametrize("do_sample", [True, False])
def test_filters_that_leave_nothing_are_an_error(do_sample):
    model = fixed(3.0, 2.0, 1.0)
    with pytest.raises(NonFiniteError, match="leave no token to draw at new token 2"):
        greedy(model, [0], 4, no_repeat_ngram_size=1, do_sample=do_sample)
    with pytest.raises(NonFiniteError, match="leave no token"):
        greedy(model, [0], 4, suppress_tokens=[0, 1, 2], do_sample=do_sample)


# ---- the end of an answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [PAD, EOS])  # GPT-2 has one id for both
def test_an_answer_ends_with_its_eos(pad):
    got = run(lm("gpt2"), PROMPTS * 4, pad_token_id=pad, rng=streams(20))
    lengths = got.mask.sum(1)
    assert got.tokens.dtype == torch.int64
    assert got.mask.dtype == torch.bool
    assert got.tokens.shape == got.mask.shape == got.logprobs.shape == (20, int(lengths.max()))
    ended = 0
    for tokens, mask, logprobs, n in zip(*got_rows(got), lengths.tolist(), strict=True):
        assert mask == [True] * n + [False] * (len(mask) - n)
        assert EOS not in tokens[: n - 1]
        assert n == 12 or tokens[n - 1] == EOS
        assert tokens[n:] == [pad] * (len(tokens) - n)
        assert logprobs[n:] == [0.0] * (len(tokens) - n)
        assert all(x < 0 for x in logprobs[:n])
        ended += n < 12
    assert 0 < ended < 20


def got_rows(generation):
    return generation.tokens.tolist(), generation.mask.tolist(), generation.logprobs.tolist()


def test_the_result_is_as_wide_as_its_longest_answer():
    got = generate(fixed(0.0, 9.0), torch.tensor([[0], [0]]), max_new_tokens=50, eos_token_id=1, pad_token_id=0,
                   do_sample=False)  # fmt: skip
    assert got.tokens.tolist() == [[1], [1]]
    assert got.mask.tolist() == [[True], [True]]


def test_several_ends():
    for end in (1, 2):
        logits = [0.0, 0.0, 0.0]
        logits[end] = 9.0
        assert greedy(fixed(*logits), n=5, eos_token_id=(1, 2)) == [end]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        [[True, True, False]],  # padded on the right
        [[True, False, True]],  # a hole
        [[False, False, False]],  # nothing
        [[False, True, True], [True, True, False]],  # one row of two
        [[False, True, True], [False, False, False]],
    ],
)
def test_prompts_that_are_not_left_padded_are_refused(mask):
    mask = torch.tensor(mask)
    with pytest.raises(ValueError, match="left-padded"):
        generate(lm(), torch.full(mask.shape, 5), mask, max_new_tokens=2, eos_token_id=EOS, pad_token_id=PAD)


@pytest.mark.parametrize(("ids", "mask"), [((3,), (3,)), ((2, 3), (1, 3)), ((2, 3), (2, 2))])
def test_shapes_that_do_not_fit_are_refused(ids, mask):
    ids, mask = torch.full(ids, 5), torch.ones(mask, dtype=torch.bool)
    with pytest.raises(AssertionError):
        generate(lm(), ids, mask, max_new_tokens=2, eos_token_id=EOS, pad_token_id=PAD)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_batch_is_refused(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="empty"):
        generate(lm(), ids, max_new_tokens=2, eos_token_id=EOS, pad_token_id=PAD)


def test_a_prompt_too_long_for_the_positions_is_refused():
    settings = {"eos_token_id": None, "pad_token_id": PAD, "do_sample": False}
    model = lm("gpt2", max_seq_len=8)
    generate(model, torch.full((1, 5), 5), max_new_tokens=3, **settings)  # fills the table exactly
    with pytest.raises(ValueError, match="9 tokens exceed 8 positions"):
        generate(model, torch.full((1, 5), 5), max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match="9 tokens exceed 8 positions"):  # the longest counts
        generate(model, *padded([[5], [5] * 5]), max_new_tokens=4, **settings)
    ids, mask = padded([[5, 6]], width=20)  # padding takes no positions
    assert generate(model, ids, mask, max_new_tokens=6, **settings).tokens.shape == (1, 6)
    generate(lm("llama", max_seq_len=8), torch.full((1, 5), 5), max_new_tokens=9, **settings)  # there is no table


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": 9e-7},
        {"temperature": math.nan}, {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0},
        {"repetition_penalty": math.nan}, {"num_return_sequences": 0},
    ],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(setting):
    run(lm(), [[5]], max_new_tokens=1, temperature=1e-6)
    with pytest.raises(ValueError, match="must be positive"):
        run(lm(), [[5]], **setting)


def test_as_many_generators_as_rows():
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        run(lm(), [[5]], num_return_sequences=3, rng=streams(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_their_row(bad):
    model = lm("llama").train()
    with torch.no_grad():
        model.trunk.embed.weight[11] = bad
    with pytest.raises(NonFiniteError, match="row 2 at new token 0"):
        run(model, [[5], [6, 7], [5, 11]], rng=streams(3))
    assert model.training  # restored although it failed
    with torch.no_grad():
        model.head.weight[4] = bad
    with pytest.raises(NonFiniteError, match="row 0 at new token 0"):
        run(model, [[5], [6, 7]], do_sample=False)
    for filters in ({"top_k": 3}, {"top_p": 0.5}, {"suppress_tokens": [2]}, {"temperature": 0.5}):
        for do_sample in (True, False):
            with pytest.raises(NonFiniteError, match="row 0 at new token 0 are NaN"):
                run(model, [[5], [6, 7]], do_sample=do_sample, **filters)


def test_a_logit_of_minus_infinity_is_never_drawn():
    """Only one sign of infinity has a softmax."""
    got = run(fixed(0.0, float("-inf"), 0.0), [[0]] * 50, rng=streams(50), eos_token_id=None)
    assert set(got.tokens.flatten().tolist()) == {0, 2}
    assert_close(got.logprobs, torch.full_like(got.logprobs, math.log(0.5)), fp32)


def test_rows_are_named_by_their_place_in_the_result():
    model = fixed(0.0, 0.0)
    hidden, calls = model.hidden, []

    def poisoned(ids, mask, cache):
        calls.append(len(ids))
        return hidden(ids, mask, cache=cache) * (float("nan") if len(calls) == 3 else 1.0)

    model.hidden = poisoned
    rng = [torch.Generator().manual_seed(s) for s in (7, 7, 1)]
    with pytest.raises(NonFiniteError, match=r"row \d at new token 2") as error:
        run(model, [[0]], num_return_sequences=3, eos_token_id=1, rng=rng)
    first = [torch.rand(2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (7, 7, 1)]
    alive = next(row for row, u in enumerate(first) if bool((u < 0.5).all()))  # token 0, twice
    assert f"row {alive} " in str(error.value)


# ---- what it leaves alone -------------------------------------------------------------------------------------------


def test_greedy_needs_no_randomness_and_sampling_takes_only_its_own():
    model, before = lm(), torch.get_rng_state()
    rng = torch.Generator().manual_seed(0)
    state = rng.get_state()
    first = run(model, PROMPTS, do_sample=False, rng=rng)
    assert torch.equal(rng.get_state(), state)
    assert torch.equal(first.tokens, run(model, PROMPTS, do_sample=False).tokens)
    one, two = run(model, PROMPTS, rng=rng), run(model, PROMPTS, rng=rng)
    assert torch.equal(torch.get_rng_state(), before)
    assert answers(one) != answers(two)  # a generator moves on
    rng.set_state(state)
    assert answers(run(model, PROMPTS, rng=rng)) == answers(one)


def test_without_a_generator_torchs_own_is_used():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = answers(run(lm(), PROMPTS))
        two = answers(run(lm(), PROMPTS))
        torch.manual_seed(0)
        model = lm()  # the constructor draws too
        assert answers(run(model, PROMPTS)) == one != two


def test_dropout_is_off_and_training_mode_comes_back():
    model = lm(dropout=0.5)
    expected = run(model, PROMPTS, rng=streams(5))
    got = run(model.train(), PROMPTS, rng=streams(5))
    assert torch.equal(got.tokens, expected.tokens)
    assert_close(got.logprobs, expected.logprobs, exact)
    assert all(m.training for m in model.modules())
    run(model.eval(), PROMPTS)
    assert not model.training


def test_inputs_stay_as_they_are_and_nothing_carries_a_gradient():
    model = lm()
    ids, mask = padded(PROMPTS)
    before = ids.clone(), mask.clone(), {name: p.clone() for name, p in model.named_parameters()}
    got = generate(model, ids, mask, max_new_tokens=5, eos_token_id=EOS, pad_token_id=PAD)
    assert not got.logprobs.requires_grad
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])
    assert all(torch.equal(p, before[2][name]) for name, p in model.named_parameters())


def test_everything_is_made_where_the_prompts_are():
    """A tensor made without a device would be on meta here, and mixing is refused."""
    model, (ids, mask) = lm(), padded(PROMPTS)
    settings = {"max_new_tokens": 5, "eos_token_id": EOS, "pad_token_id": PAD, "suppress_tokens": [2]}
    for rng in (torch.Generator().manual_seed(0), streams(5)):
        expected = generate(model, ids, mask, rng=rng, stop=lambda _: False, **settings)
        rng = torch.Generator().manual_seed(0) if isinstance(rng, torch.Generator) else streams(5)
        with torch.device("meta"):
            got = generate(model, ids, mask, rng=rng, stop=lambda _: False, **settings)
        assert torch.equal(got.tokens, expected.tokens)
        assert torch.equal(got.logprobs, expected.logprobs)
    with torch.device("meta"):  # all prompts are different
        made = generate(model, ids[:3], mask[:3], num_return_sequences=2, rng=streams(6), **settings)
    expected = generate(model, ids[:3], mask[:3], num_return_sequences=2, rng=streams(6), **settings)
    assert torch.equal(made.tokens, expected.tokens)


def test_fp64_weights_give_fp64_log_probs_that_a_backward_pass_may_keep():
    got = run(lm(), PROMPTS)
    assert got.logprobs.dtype == torch.float64
    assert not any(x.is_inference() for x in (got.tokens, got.mask, got.logprobs))


def test_settings_and_answers_are_not_changed_by_accident():
    with pytest.raises(FrozenInstanceError):
        Sampling(9, (1,)).temperature = 2.0
    with pytest.raises(FrozenInstanceError):
        run(lm(), PROMPTS).tokens = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_fp32_on_the_cpu(dtype):
    model = lm(dtype=dtype)
    cache = generate_module._prefill(model, model, *padded(PROMPTS), 3)[1].cache
    assert {t.dtype for t in (*cache.keys, *cache.values)} == {torch.float32}


def test_elsewhere_the_cache_has_the_dtype_of_products():
    assert generate_module.cache_dtype(torch.float32, "cuda") == torch.float32
    assert generate_module.cache_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert generate_module.cache_dtype(torch.float32, "cuda") == torch.bfloat16
        assert generate_module.cache_dtype(torch.float64, "cuda") == torch.float64
        assert generate_module.cache_dtype(torch.float32, "cpu") == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_bf16_weights_give_fp32_log_probs(family):
    model = lm(family, torch.bfloat16)
    got = run(model, PROMPTS, rng=streams(5))
    assert got.logprobs.dtype == torch.float32
    assert bool((got.logprobs[got.mask] < 0).all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(lm(family, torch.float32), PROMPTS, rng=streams(5))
    assert mixed.logprobs.dtype == torch.float32


def test_what_is_drawn_can_be_trained_on():
    model = lm("llama", torch.float32)
    made = run(model, PROMPTS, rng=streams(5))
    loss = (model(made.tokens).log_softmax(-1).gather(2, made.tokens[..., None])[..., 0] - made.logprobs).square()
    torch.where(made.mask, loss, 0.0).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("rows", [1, 3])
def test_stop_ends_a_row_and_leaves_the_others_alone(rows):
    """The answers are those of an unstopped run, cut after the first token that ends one."""
    model, asked = lm(), torch.tensor([[5, 6, 7]] * rows)
    how = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": PAD}
    whole = generate(model, asked, rng=torch.Generator().manual_seed(0), **how)

    def stop(tokens):
        return len(tokens) >= 2 and sum(tokens) % 5 == 0

    found = generate(model, asked, rng=torch.Generator().manual_seed(0), stop=stop, **how)
    ends = [next((n for n in range(2, 12) if stop(row[:n])), 12) for row in whole.tokens.tolist()]
    assert found.mask.sum(1).tolist() == ends
    assert min(ends) < 12
    for row, n in enumerate(ends):
        assert found.tokens[row, :n].tolist() == whole.tokens[row, :n].tolist()
        assert_close(found.logprobs[row, :n], whole.logprobs[row, :n], fp64)
