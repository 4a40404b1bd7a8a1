"""Collectives that put rows in order, and words that rank 0 says to all."""

import os
import signal
import time

import pytest
import torch
from ranks import on_ranks

from minirlhf import dist
from minirlhf.data import cut, microbatches
from minirlhf.errors import NonFiniteError, UsageError
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.rng import generator
from minirlhf.rollout import sample_rows


def test_alone_they_do_nothing():
    x = torch.tensor([1.0, 2.0])
    assert dist.rank() == 0
    assert dist.world_size() == 1
    assert dist.all_sum(x) is x
    assert dist.all_max(x) is x
    assert dist.all_rows(x, 2) is x
    assert dist.mine([4, 5, 6]) == [4, 5, 6]
    assert dist.text_of_first("a") == "a"
    dist.wait_for_first("never")


def dies():
    if dist.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_is_an_error_and_no_wait():
    with pytest.raises(AssertionError, match="rank 1, exit code -9: it ended without an answer"):
        on_ranks(2, dies)


def rows():
    n = 5
    own = dist.mine(torch.arange(n))
    wide = torch.arange(12.0).view(1, -1).expand(len(own), -1)[:, : 2 + dist.rank()] + 100 * own[:, None]
    flags = own[:, None] == torch.tensor([[0, 3, 4]])
    few = dist.all_rows(torch.ones(len(dist.mine(range(2))), 3), 2)  # rank 2 has no row
    return (
        dist.all_rows(own, n).tolist(),
        dist.all_rows(wide, n).tolist(),
        dist.all_rows(flags, n).tolist(),
        few.tolist(),
    )


def answers_of_a_broken_model():
    config = ModelConfig(vocab_size=8, n_layer=1, n_head=1, d_model=4, max_seq_len=8, tied=False)
    model = CausalLM(config, rng=generator(0, "weights"))
    with torch.no_grad():
        model.trunk.embed.weight[5] = torch.nan
    prompts = torch.tensor([[1], [5], [2]])
    try:
        sample_rows(model, prompts, prompts > 0, rng=[generator(0, "rows", row=i) for i in range(3)],
                    max_new_tokens=1, eos_token_id=0, pad_token_id=0)  # fmt: skip
    except NonFiniteError as e:
        return str(e)


def test_all_ranks_hear_of_the_nan_of_one():
    """Else the others would wait for its answers, and it for their next step."""
    first, second = on_ranks(2, answers_of_a_broken_model)
    assert "another rank" in first
    assert "row 0" in second


def test_rows_of_ranks_come_in_the_order_of_rows():
    for found, wide, flags, few in on_ranks(3, rows):
        assert found == [0, 1, 2, 3, 4]
        assert wide == [[0, 1, 0, 0], [100, 101, 102, 0], [200, 201, 202, 203], [300, 301, 0, 0], [400, 401, 402, 0]]
        assert flags == [[i == 0, i == 3, i == 4] for i in range(5)]
        assert few == [[1.0] * 3] * 2


def words():
    x = torch.tensor(float(dist.rank() + 1))
    said = dist.text_of_first("für alle 你好" if dist.rank() == 0 else "not mine")
    began = time.monotonic()
    if dist.rank() == 0:
        time.sleep(0.5)
    dist.wait_for_first("slow work")
    return (
        float(dist.all_sum(x)),
        float(dist.all_max(x)),
        float(x),
        said,
        dist.text_of_first(""),
        time.monotonic() - began,
    )


def test_words_of_rank_0_reach_all():
    for rank, (total, largest, x, said, nothing, waited) in enumerate(on_ranks(2, words)):
        assert (total, largest, x) == (3, 2, rank + 1)
        assert said == "für alle 你好"
        assert nothing == ""
        assert waited >= 0.4


def parts(n, size):
    try:
        return cut(n, size), microbatches(list(range(100, 100 + n)), size, lambda r: -r)
    except UsageError as e:
        return str(e), None


@pytest.mark.parametrize(("n", "size"), [(10, 2), (12, 4), (7, 7), (3, 1), (64, 64), (11, 3)])
def test_every_rank_has_as_many_forwards_and_all_rows_are_in_one(n, size):
    for world in (1, 3):
        found = on_ranks(world, parts, n, size)
        groups = found[0][0]
        assert all(g == groups for g, _ in found)
        assert sorted(i for group in groups for i in group) == list(range(n))
        assert all(1 <= len(group) <= size for group in groups)
        assert len({len(mine) for _, mine in found}) == 1
        assert len(groups) == world * -(-n // (world * size))
        assert sorted(r for _, mine in found for group in mine for r in group) == list(range(100, 100 + n))
        assert all(group == sorted(group, reverse=True) for _, mine in found for group in mine)  # by length


def test_too_few_rows_are_refused():
    for found, _ in on_ranks(2, parts, 1, 4):
        assert "1 rows" in found
        assert "2 ranks" in found
    assert "microbatch_size 1" in on_ranks(2, parts, 3, 1)[0][0]
