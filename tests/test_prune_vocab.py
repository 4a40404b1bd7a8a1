"""A smaller vocabulary: the same text is the same tokens, the same tokens have the same logits."""

import json

import pytest
import torch
from tokenizers import pre_tokenizers

from minirlhf.generate import generate
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, save_pretrained
from minirlhf.prune_vocab import main, way_to
from minirlhf.rng import generator
from minirlhf.templates import EOS, get_template
from minirlhf.tokenizer import Tokenizer

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "今天的天气很好，我们去公园",
]
OTHER = ["sphinx of black quartz judge my vow", "how vexingly quick daft zebras jump", "明天可能会下雨"]


@pytest.fixture
def folder(tmp_path):
    def make(family, spare=5):
        tokenizer = Tokenizer.train_bpe((LINES + OTHER) * 3, 420)
        config = ModelConfig(family=family, vocab_size=tokenizer.vocab_size + spare, n_layer=2, n_head=2, d_model=16,
                             max_seq_len=64, eos_token_id=tokenizer.eos_id)  # fmt: skip
        save_pretrained(CausalLM(config, rng=generator(3, "weights")), tmp_path / "big", tokenizer=tokenizer)
        return tmp_path / "big"

    return make


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES))
    return path


def opened(folder):
    return load_causal_lm(folder), Tokenizer.load(folder)


@pytest.mark.parametrize("family", ["bloom", "gpt2", "llama"])
def test_the_same_text_has_the_same_tokens_logits_and_greedy_answer(family, folder, corpus, tmp_path, capsys):
    big_folder, out = folder(family), tmp_path / "small"
    assert main([str(big_folder), str(out), "--corpus", str(corpus)]) == 0
    (big, old), (small, new) = opened(big_folder), opened(out)
    kept = [old.token_to_id(new.id_to_token(i)) for i in range(new.vocab_size)]
    assert kept == sorted(kept)
    assert 259 < len(kept) < old.vocab_size
    assert small.config.vocab_size == len(kept)
    assert (small.head.weight is small.trunk.embed.weight) == (big.head.weight is big.trunk.embed.weight)
    tables = 1 if big.config.tied else 2
    gone = tables * (big.config.vocab_size - len(kept)) * big.config.d_model
    sizes = [sum(p.numel() for p in model.parameters()) for model in (big, small)]
    assert sizes[0] - sizes[1] == gone
    assert f"{sizes[1]:,} of {sizes[0]:,}" in capsys.readouterr().out
    dropped = [i for i in range(big.config.vocab_size) if i not in kept]
    for text in LINES:
        ids = old.encode(text)
        assert [kept[i] for i in new.encode(text)] == ids
        assert new.decode(new.encode(text)) == text
        with torch.no_grad():
            before, after = big(torch.tensor([ids])), small(torch.tensor([new.encode(text)]))
        # Without oneDNN the library chooses other sums for other shapes.
        near = 0 if torch.backends.mkldnn.is_available() else 1e-6
        torch.testing.assert_close(after, before[..., kept], rtol=0, atol=near)
        how = {"max_new_tokens": 12, "do_sample": False}
        a = generate(
            big, torch.tensor([ids]), eos_token_id=old.eos_id, pad_token_id=old.pad_id, suppress_tokens=dropped, **how
        )
        b = generate(small, torch.tensor([new.encode(text)]), eos_token_id=new.eos_id, pad_token_id=new.pad_id, **how)
        assert old.decode(a.tokens[0].tolist()) == new.decode(b.tokens[0].tolist())
    for text in OTHER:  # any text can still be read, with more tokens
        assert new.decode(new.encode(text)) == text


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN sums depend on the shape")
def test_the_template_goes_along_and_keeps_its_tokens(folder, corpus, tmp_path):
    big, out = folder("gpt2"), tmp_path / "small"
    (tmp_path / "t.json").write_text(json.dumps({"user": ["how vexingly {text} quartz"], "response": ["{text}", EOS]}))
    template = get_template(str(tmp_path / "t.json"))
    said = {"template": template.name, "template_sha256": template.sha256}
    (big / "minirlhf.json").write_text(json.dumps(said))
    assert main([str(big), str(out), "--corpus", str(corpus)]) == 0
    assert json.loads((out / "minirlhf.json").read_text()) == said
    for text in LINES:
        old, new = (template.prompt_ids(Tokenizer.load(model), text) for model in (big, out))
        spellings = [Tokenizer.load(model).id_to_token for model in (big, out)]
        assert list(map(spellings[0], old)) == list(map(spellings[1], new))


def test_blooms_vocabulary_bit_for_bit(folder, corpus, tmp_path):
    """250,880 rows: whatever the shape, and so whatever the path of the product, a kept logit is what it was."""
    big_folder, out = folder("bloom", spare=250_460), tmp_path / "small"
    assert main([str(big_folder), str(out), "--corpus", str(corpus)]) == 0
    (big, old), (small, new) = opened(big_folder), opened(out)
    assert big.config.vocab_size > 250_000
    kept = torch.tensor([old.token_to_id(new.id_to_token(i)) for i in range(new.vocab_size)])
    for shape in ((1, 1), (1, 2), (2, 7), (3, 16), (16, 1), (16, 32)):
        ids = torch.randint(len(kept), shape, generator=generator(0, "ids"))
        with torch.no_grad():
            assert torch.equal(big(kept[ids])[..., kept], small(ids)), shape


def test_the_tokens_of_another_tokenizer(folder, corpus, tmp_path):
    big_folder = folder("bloom")
    main([str(big_folder), str(tmp_path / "small"), "--corpus", str(corpus)])
    assert main([str(big_folder), str(tmp_path / "same"), "--tokenizer", str(tmp_path / "small")]) == 0
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "small" / name).read_bytes(), name


def test_each_turn_of_a_conversation_is_kept(tmp_path):
    """Templates tokenise it by itself; a tokenizer that begins each text with a space has other tokens there."""
    base = Tokenizer.train_bpe([f" {line}" for line in LINES + OTHER] * 3, 420)
    base._full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = Tokenizer(base._full, base.names)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, d_model=4)
    save_pretrained(CausalLM(config), tmp_path / "big", tokenizer=tokenizer)
    said = {"user": LINES[0], "assistant": LINES[1]}, {"user": OTHER[0], "assistant": OTHER[1]}
    turns = [{"role": role, "content": text} for pair in said for role, text in pair.items()]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}))
    assert main([str(tmp_path / "big"), str(tmp_path / "out"), "--corpus", str(tmp_path / "talk.jsonl")]) == 0
    _, old = opened(tmp_path / "big")
    _, new = opened(tmp_path / "out")
    for text in (*LINES[:2], *OTHER[:2]):
        assert [new.id_to_token(i) for i in new.encode(text)] == [old.id_to_token(i) for i in old.encode(text)]


def test_the_way_to_a_token_by_hand():
    ranks = {("a", "b"): 0, ("c", "d"): 1, ("ab", "cd"): 2, ("b", "c"): 3}
    assert way_to("abcd", ranks) == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    assert way_to("bc", ranks) == {"b", "c", "bc"}
    assert way_to("abab", ranks) == {"a", "b", "ab"}


def test_refusals_are_one_line(folder, corpus, tmp_path, capsys):
    big_folder = folder("bloom")
    assert main([str(big_folder), str(big_folder), "--corpus", str(corpus)]) == 2
    assert main([str(big_folder), str(tmp_path / "x"), "--corpus", str(tmp_path / "none.txt")]) == 3
    assert main([str(tmp_path / "none"), str(tmp_path / "x"), "--corpus", str(corpus)]) == 4
    foreign = Tokenizer.train_chars(["xyzzy ☃"])
    (tmp_path / "foreign").mkdir()
    foreign.save(tmp_path / "foreign")
    assert main([str(big_folder), str(tmp_path / "x"), "--tokenizer", str(tmp_path / "foreign")]) == 4
    data = json.loads((big_folder / "tokenizer.json").read_text())
    data["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[t, -1.0] for t in data["model"]["vocab"]]}
    (big_folder / "tokenizer.json").write_text(json.dumps(data))
    assert main([str(big_folder), str(tmp_path / "x"), "--corpus", str(corpus)]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("error: ") for line in lines)
    assert "Unigram" in lines[-1]
    assert not (tmp_path / "x").exists()
