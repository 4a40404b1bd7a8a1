"""Records → tensors: every row once an epoch, nothing trained that is not in the text, what is left out is counted."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.data import (
    by_length,
    collate,
    decode,
    encode_lists,
    encode_prompts,
    encode_sft,
    left_padded,
    microbatches,
    pad,
    step_rows,
)
from minirlhf.errors import DataError
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_words(["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "e"])
PLAIN = get_template("plain")
EOS = 1


def record(**fields):
    return SimpleNamespace(**fields)


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_row_comes_once_an_epoch(n, size, seed):
    steps = -(-3 * n // size)
    rows = [r for step in range(steps) for r in step_rows(n, size, step, seed=seed)]
    assert all(sorted(rows[e * n : (e + 1) * n]) == list(range(n)) for e in range(3))


def test_the_order_is_a_function_of_seed_and_step():
    assert step_rows(100, 10, 7, seed=1) == step_rows(100, 10, 7, seed=1)
    assert step_rows(100, 10, 7, seed=1) != step_rows(100, 10, 7, seed=2)
    assert step_rows(100, 100, 0, seed=1) != step_rows(100, 100, 1, seed=1)
    assert step_rows(2, 6, 0, seed=0) == [row for step in range(3) for row in step_rows(2, 2, step, seed=0)]


def test_groups_of_similar_length():
    lengths = [5, 1, 4, 1, 3]
    assert by_length(range(5), 2, lambda i: lengths[i]) == [[1, 3], [4, 2], [0]]
    groups = microbatches(range(5), 2, lambda i: lengths[i])
    assert sorted(i for g in groups for i in g) == [0, 1, 2, 3, 4]
    assert all(len(g) <= 2 for g in groups)
    ordered = [lengths[i] for g in groups for i in g]
    assert ordered == sorted(ordered)


def test_padding_left_and_right():
    assert pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
    assert pad([[1], [2, 3]], 9, left=True).tolist() == [[9, 1], [2, 3]]
    ids, mask = left_padded([[7], [5, 6, 7]], 0)
    assert ids.tolist() == [[0, 0, 7], [5, 6, 7]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    assert mask.dtype == torch.bool


def test_sft_trains_the_answer_and_its_eos():
    examples, counts = encode_sft([record(prompt="a b", response="c d")], TOKENIZER, PLAIN, 10)
    assert examples[0].ids == [3, 4, 5, 6, EOS]
    assert examples[0].trained == [False, False, True, True, True]
    assert counts == {"cut": 0, "no_label": 0}
    batch = collate([*examples, *encode_sft([record(prompt="a", response="b")], TOKENIZER, PLAIN, 10)[0]])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, EOS], [3, 4, EOS, 0, 0]]
    assert batch.attention_mask.tolist()[1] == [True, True, True, False, False]
    assert batch.trained.tolist()[1] == [False, True, True, False, False]


def test_an_answer_that_is_cut_has_no_label_that_is_not_in_the_text():
    examples, counts = encode_sft([record(prompt="a b", response="c d e")], TOKENIZER, PLAIN, 4)
    assert examples[0].ids == [3, 4, 5, 6]
    assert EOS not in examples[0].ids
    assert counts == {"cut": 1, "no_label": 0}


def test_a_prompt_as_long_as_the_window_is_counted_never_a_loss_of_zero():
    good = record(prompt="a", response="b")
    examples, counts = encode_sft([record(prompt="a b c d", response="e"), good], TOKENIZER, PLAIN, 4)
    assert len(examples) == 1
    assert counts == {"cut": 1, "no_label": 1}
    with pytest.raises(DataError, match="no record keeps a trained token"):
        encode_sft([record(prompt="a b c d", response="e")], TOKENIZER, PLAIN, 4)


def test_a_list_that_is_too_long_is_left_out_whole():
    lists = [record(prompt="a", responses=["b", text], ranks=[1, 2]) for text in ("c", "c d e")]
    found, counts = encode_lists(lists, TOKENIZER, PLAIN, 4)
    assert [x.sequences for x in found] == [[[3, 4, EOS], [3, 5, EOS]]]
    assert counts == {"too_long": 1}
    with pytest.raises(DataError, match="no list fits"):
        encode_lists(lists[1:], TOKENIZER, PLAIN, 4)


def test_prompts_without_room_are_left_out_and_texts_stay_beside_their_tokens():
    texts, ids, counts = encode_prompts(["a b c", "d", "", "e a"], TOKENIZER, PLAIN, 2)
    assert texts == ["d", "e a"]
    assert ids == [[6], [7, 3]]
    assert counts == {"too_long": 1, "empty": 1}
    with pytest.raises(DataError, match="no prompt has between 1 and 2 tokens"):
        encode_prompts(["a b c", ""], TOKENIZER, PLAIN, 2)


def test_decoding_shows_real_tokens_without_special_ones():
    ids = torch.tensor([[0, 3, 4], [5, EOS, 0]])
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert decode(ids, mask, TOKENIZER) == ["a b", "c"]
