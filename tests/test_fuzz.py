"""Every reader of files under broken input (tests/fuzz.py): a few hundred each, 2,000 each with -m slow."""

import pytest
from fuzz import fuzz, targets

TARGETS = targets()


@pytest.mark.parametrize("name", TARGETS)
def test_readers_keep_their_promises(name):
    assert sum(fuzz(name, TARGETS[name], 150).values()) == 150


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_readers_keep_their_promises_under_two_thousand(name):
    assert sum(fuzz(name, TARGETS[name], 2000, seed=1).values()) == 2000


def test_every_reader_is_there():
    """Data files of every kind, configurations, templates, tokenizers, models, shards, adapters, checkpoints."""
    kinds = {name.split("-")[0] for name in TARGETS}
    assert kinds >= {"jsonl", "array", "tsv", "text", "gzip", "config", "template", "tokenizer", "model", "reward"}
    assert kinds >= {"adapter", "checkpoint"}
    assert {"model-model.safetensors.index.json", "checkpoint-MANIFEST.json", "checkpoint-state.json"} <= set(TARGETS)
