"""Beam search against transformers: the same answers, in the same order, with the same scores."""

import pytest
import torch

from minirlhf.beam import beam_search
from minirlhf.pretrained import load_causal_lm

transformers = pytest.importorskip("transformers")
FILTERS = [{}, {"min_new_tokens": 4}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=19, n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                                     eos_token_id=1, pad_token_id=2, initializer_range=1.0)  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(folder)
    return load_causal_lm(folder), theirs


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    "filters", [{}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}, {"min_new_tokens": 4}]
)
def test_the_same_beams(n, length_penalty, filters, both):
    ours, theirs = both
    gen = torch.Generator().manual_seed(n)
    ids = torch.randint(3, 19, (4, 6), generator=gen)
    pads = (0, 2, 5, 1) if filters in FILTERS[:2] else (0, 0, 0, 0)  # the other two take padding for text there
    mask = torch.tensor([[False] * k + [True] * (6 - k) for k in pads])
    ids = torch.where(mask, ids, 2)
    how = {"num_beams": n, "max_new_tokens": 10, "length_penalty": length_penalty, "eos_token_id": 1, "pad_token_id": 2}
    found = beam_search(ours, ids, mask, **how, **filters)
    said = theirs.generate(ids, attention_mask=mask.long(), do_sample=False, num_return_sequences=n, output_scores=True,
                           return_dict_in_generate=True, **how, **filters)  # fmt: skip
    expected = said.sequences[:, 6:].view(4, n, -1)
    R = min(expected.shape[2], found.tokens.shape[2])
    assert torch.equal(torch.where(found.mask, found.tokens, 2)[..., :R], expected[..., :R])
    torch.testing.assert_close(found.scores, said.sequences_scores.view(4, n), rtol=1e-5, atol=1e-5)
