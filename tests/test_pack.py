"""Short texts in one row: none sees another, and nothing but the count of rows changes."""

import pytest
import torch
from test_scripts import metrics, script
from tolerance import assert_close, exact, fp64

from minirlhf import dist
from minirlhf.data import Example, collate, cut, pack
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.rng import generator
from minirlhf.rollout import IGNORE, sft_targets, target_stats

FAMILIES = ["gpt2", "bloom", "llama", "gpt_neox", "mistral", "opt"]


def lm(family, **more):
    sizes = {"vocab_size": 19, "n_layer": 2, "n_head": 2, "d_model": 16, "max_seq_len": 12} | more
    return CausalLM(ModelConfig(family=family, **sizes), rng=generator(0, "weights")).double()


def texts(lengths, seed=0):
    rng = generator(seed, "texts")
    made = []
    for n in lengths:
        trained = (torch.rand(n, generator=rng) < 0.7).tolist()
        made.append(Example(torch.randint(19, (n,), generator=rng).tolist(), [*trained[:-1], True]))
    return made


def summed(model, examples):
    """Σ log π over the labels, and its gradient."""
    batch = collate(examples)
    targets = sft_targets(batch.input_ids, batch.trained)
    found = target_stats(model, batch.input_ids, batch.attention_mask, targets, texts=batch.texts)["logprobs"].sum()
    return found.detach(), torch.autograd.grad(found, list(model.parameters())), int((targets != IGNORE).sum())


def test_rows_by_hand():
    """Longest first, each into the first row with room for it; other weights apart."""
    a, b, c, d = (Example([i] * n, [True] * n) for i, n in ((1, 3), (2, 5), (3, 2), (4, 4)))
    heavy = Example([5], [True], 2.0)
    found = pack([a, b, c, d, heavy], 8)
    assert [one.ids for one in found] == [[2] * 5 + [1] * 3, [4] * 4 + [3] * 2, [5]]
    assert [one.lengths for one in found] == [(5, 3), (4, 2), ()]
    assert found[2] == heavy
    assert [one.weight for one in found] == [1.0, 1.0, 2.0]
    assert found[0].trained == [False, True, True, True, True, False, True, True]
    batch = collate(found)
    assert batch.texts.tolist() == [[0] * 5 + [1] * 3, [0] * 4 + [1] * 2 + [0] * 2, [0] * 8]
    assert collate([a, b]).texts is None


@pytest.mark.parametrize(("world", "size", "rows"), [(1, 1, 3), (2, 1, 4), (2, 2, 3), (3, 1, 3), (4, 1, 4), (5, 1, 5)])
def test_all_ranks_have_rows(world, size, rows, monkeypatch):
    """Five texts in three rows, or in so many more that every rank runs as many forwards as the others."""
    monkeypatch.setattr(dist, "world_size", lambda: world)
    five = [Example([i] * n, [True] * n) for i, n in enumerate((5, 3, 4, 3, 8))]
    found = pack(five, 8, size)
    assert len(found) == rows
    assert sorted(token for one in found for token in one.ids) == sorted(token for one in five for token in one.ids)
    assert len(cut(len(found), size)) % world == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_texts_are_the_texts_alone(family, seed):
    """Log-probs and every gradient in fp64; windows, rotations and biases count from each text's own beginning."""
    model = lm(family, **({"sliding_window": 3} if family == "mistral" else {}))
    alone = texts([2 + (3 * i + seed) % 5 for i in range(11)] + [12], seed)
    rows = pack(alone, 12)
    assert len(rows) <= len(alone) / 2
    assert max(len(row.ids) for row in rows) <= 12
    found, slopes, n = summed(model, rows)
    parts = [summed(model, [e]) for e in alone]
    assert n == sum(part[2] for part in parts)
    assert_close(found, sum(part[0] for part in parts), fp64)
    for i, slope in enumerate(slopes):
        assert_close(slope, sum(part[1][i] for part in parts), {"rtol": 1e-9, "atol": 1e-12})


def test_what_stands_in_another_text_changes_no_bit():
    model = lm("llama")
    row = pack(texts([5, 4, 3]), 12)
    before = model.hidden(collate(row).input_ids, texts=collate(row).texts)
    other = row[0]._replace(ids=[*row[0].ids[:5], *[(i + 1) % 19 for i in row[0].ids[5:9]], *row[0].ids[9:]])
    after = model.hidden(collate([other]).input_ids, texts=collate([other]).texts)
    assert_close(after[0, :5], before[0, :5], exact)
    assert_close(after[0, 9:], before[0, 9:], exact)
    assert not torch.equal(after[0, 5:9], before[0, 5:9])


def test_packed_rows_through_the_script(tmp_path):
    """The same losses from fewer forwards."""
    (tmp_path / "short.txt").write_text("\n".join(f"the film was {'very ' * (i % 5)}good" for i in range(40)))
    argv = ["--data.path", "short.txt", "--run.steps", "5", "--optim.warmup_steps", "1", "--run.log_every", "1",
            "--sft.microbatch_size", "8", "--sft.minibatch_size", "32"]  # fmt: skip
    found = {}
    for on in ("false", "true"):
        script("sft", *argv, "--sft.pack", on, "--run.dir", tmp_path / on, cwd=tmp_path)
        found[on] = [line["loss"] for line in metrics(tmp_path / on)]
    assert found["true"] == pytest.approx(found["false"], rel=1e-4)
