"""Beam search: with enough beams, the likeliest of all answers."""

import itertools

import pytest
import torch

from minirlhf.beam import beam_search
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


def test_one_beam_is_greedy(model):
    prompts = torch.tensor([[1, 2, 3], [2, 2, 1]])
    how = {"max_new_tokens": 6, "eos_token_id": EOS, "pad_token_id": 0}
    one = beam_search(model, prompts, num_beams=1, length_penalty=0.0, **how)  # no longer answer can be likelier
    greedy = generate(model, prompts, do_sample=False, **how)
    for row in range(2):
        assert one.tokens[row, 0][one.mask[row, 0]].tolist() == greedy.tokens[row][greedy.mask[row]].tolist()
