"""Ids by hand, round trips, injection, and folders that lie."""

import json
import os
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from minirlhf.errors import CheckpointError, DataError
from minirlhf.tokenizer import Tokenizer

WORDS = ["<pad>", "<eos>", "<unk>", "how", "was", "film", "你", "好！"]
TEXTS = ["how was the film?", "你好，世界 ", "  two  spaces\n\nand\tlines\r\n", "naïve café 🙂 <eos>"] * 3


def words():
    return Tokenizer.from_words(WORDS)


def bpe():
    return Tokenizer.train_bpe(TEXTS, 300)


def chars():
    return Tokenizer.train_chars(TEXTS)


MAKERS = pytest.mark.parametrize("make", [words, bpe, chars])


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# ---- made here ------------------------------------------------------------------------------------------------------


def test_words_by_hand():
    t = words()
    assert t.encode("how was  film\n好！ 你") == [3, 4, 5, 7, 6]
    assert t.encode("") == []
    assert t.decode([3, 4, 1, 0, 5, 2]) == "how was film"  # special tokens are left out, <unk> is one
    assert (t.pad_id, t.eos_id, t.unk_id, t.bos_id, t.vocab_size) == (0, 1, 2, None, 8)
    assert t.added_ids == {0, 1, 2}
    assert t.token_to_id("film") == 5
    assert t.id_to_token(5) == "film"
    assert t.token_to_id("absent") is None


def test_chars_by_hand():
    t = Tokenizer.train_chars(["aab\n", "ca b"], min_count=2)
    assert [t.id_to_token(i) for i in range(t.vocab_size)] == ["<pad>", "<eos>", "<unk>", "a", "b"]  # a 3, b 2
    assert t.encode("abx\n") == [3, 4, 2, 2]
    assert t.decode([3, 4, 3, 1]) == "aba"


def test_chars_of_equal_count_are_in_code_point_order():
    assert Tokenizer.train_chars(["dbca"]).encode("abcd") == [3, 4, 5, 6]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    assert chars().decode(chars().encode(text)) == text
    assert bpe().decode(bpe().encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_read_everything(text):
    t = TRAINED
    assert t.decode(t.encode(text)) == text


def test_bpe_is_deterministic_and_of_the_size_asked_for():
    texts = [" ".join(random.Random(i).choices(["alpha", "beta", "gamma", "delta"], k=9)) for i in range(50)]
    t = Tokenizer.train_bpe(texts, 270)
    assert t.vocab_size == 270
    assert t.fingerprint == Tokenizer.train_bpe(list(texts), 270).fingerprint
    assert [t.id_to_token(i) for i in range(3)] == ["<pad>", "<eos>", "<unk>"]
    with pytest.raises(AssertionError):
        Tokenizer.train_bpe(texts, 258)


def test_partial_characters_decode_to_the_replacement_sign():
    ids = Tokenizer.train_bpe(["x"], 260).encode("你")
    assert len(ids) == 3
    assert [TRAINED.decode([i]) for i in ids] == ["\ufffd"] * 3


def test_ids_past_the_vocabulary_are_left_out():
    assert words().decode([3, 99, 4]) == "how was"


TRAINED = bpe()


# ---- injection ------------------------------------------------------------------------------------------------------


@MAKERS
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_text_never_becomes_a_special_token(make, data):
    t = make()
    spellings = [t.id_to_token(i) for i in t.added_ids]
    parts = data.draw(st.lists(st.one_of(st.sampled_from(spellings), st.sampled_from([" ", "", "a", "<", ">", "how"]))))
    assert not (set(t.encode("".join(parts))) & (t.added_ids - {t.unk_id}))


def with_markers(special):
    """A byte-level BPE with a role marker that is added with special: false, as in some chat models."""
    base = tokenizers.Tokenizer.from_str(json.dumps(json.loads(TRAINED._full.to_str())))
    base.add_tokens([tokenizers.AddedToken("<tool>", special=special), tokenizers.AddedToken("    ", normalized=True)])
    base.add_tokens([tokenizers.AddedToken("ü", normalized=True)])
    return base


@pytest.mark.parametrize("special", [False, True])
def test_role_markers_runs_of_spaces_and_letters(tmp_path, special):
    (tmp_path / "tokenizer.json").write_text(with_markers(special).to_str())
    t = Tokenizer.load(tmp_path)
    marker, spaces = t.token_to_id("<tool>"), t.token_to_id("    ")
    assert with_markers(special).encode("<tool>x").ids[0] == marker  # what the library itself does
    assert marker not in t.encode("<tool>x")
    assert t.encode("<tool>") == TRAINED.encode("<tool>")
    assert spaces in t.encode("a    b")  # ordinary text, as the model was trained on
    assert t.encode("für") == with_markers(special).encode("für", add_special_tokens=False).ids
    assert t.token_to_id("ü") in t.encode("für")
    assert marker in t.added_ids
    assert spaces not in t.added_ids
    assert t.decode(t.encode("a    b")) == "a    b"


def test_a_word_that_spells_a_special_token_without_unk_is_refused(tmp_path):
    full = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    full.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tokenizer.json").write_text(full.to_str())
    t = Tokenizer.load(tmp_path)
    assert t.encode("a a") == [1, 1]
    for text in ("a </s>", "a b"):  # unknown words would become the end of the text
        with pytest.raises(DataError, match="special token"):
            t.encode(text)


def test_lone_surrogates_are_refused():
    with pytest.raises(DataError, match="surrogate"):
        words().encode("how \ud83d")


# ---- folders --------------------------------------------------------------------------------------------------------


@MAKERS
def test_save_and_load(tmp_path, make):
    t = make()
    t.chat_template = "{{ never run }}"
    t.save(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.fingerprint == t.fingerprint
        assert (again.eos_id, again.pad_id, again.unk_id) == (1, 0, 2)
        assert again.encode(TEXTS[0]) == t.encode(TEXTS[0])
    assert Tokenizer.load(tmp_path).chat_template == "{{ never run }}"


def test_chat_templates_are_handed_on(tmp_path):
    """Of two, the one that transformers takes: a file of its own. Several may have names."""
    words().save(tmp_path)
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    edit(tmp_path / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    Tokenizer.load(tmp_path).save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == named
    (tmp_path / "chat_template.jinja").write_text("{{ new }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ new }}"


def test_special_tokens_keep_their_settings(tmp_path):
    words().save(tmp_path)
    swallows = {"lstrip": True, "rstrip": True, "normalized": True}
    edit(tmp_path / "tokenizer.json", lambda data: data["added_tokens"][1].update(swallows))
    before = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert json.loads(Tokenizer.load(tmp_path).to_json())["added_tokens"] == before


def test_fingerprints_differ():
    others = [words(), bpe(), chars(), Tokenizer.from_words([*WORDS[:-1], "好!"])]
    assert len({t.fingerprint for t in others}) == 4


def test_stored_truncation_padding_and_post_processor_do_nothing(tmp_path):
    words().save(tmp_path)
    full = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    full.enable_truncation(2)
    full.enable_padding(length=6)
    full.post_processor = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    full.save(str(tmp_path / "tokenizer.json"))
    t = Tokenizer.load(tmp_path)
    assert t.encode("how was film how") == [3, 4, 5, 3]
    assert t.fingerprint == words().fingerprint


def test_stored_dropout_does_nothing(tmp_path):
    TRAINED.save(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda data: data["model"].update(dropout=0.9))
    t = Tokenizer.load(tmp_path)
    assert [t.encode(text) for text in TEXTS] == [TRAINED.encode(text) for text in TEXTS]
    assert t.fingerprint == TRAINED.fingerprint


def test_pad_falls_back_to_eos_and_names_may_be_objects(tmp_path):
    words().save(tmp_path)
    config = {"eos_token": {"content": "<eos>", "special": True}, "pad_token": None, "model_max_length": 10**30}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    t = Tokenizer.load(tmp_path)
    assert (t.pad_id, t.eos_id, t.unk_id) == (1, 1, None)


def test_a_folder_that_names_nothing_is_told_by_the_ids_of_config_json(tmp_path):
    Tokenizer.from_words([*WORDS, "<stop>"]).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 8, "vocab_size": 9}))
    t = Tokenizer.load(tmp_path)
    assert (t.eos_id, t.pad_id) == (8, 0)
    assert t.decode([3, 8]) == "how"


def test_special_tokens_held_as_ordinary_words_are_special_here(tmp_path):
    words().save(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda data: data.update(added_tokens=[]))
    t = Tokenizer.load(tmp_path)
    assert t.decode([3, 1, 0]) == "how"
    assert t.encode("<eos>") == [2]


def test_added_tokens_of_the_configuration_held_as_ordinary_words(tmp_path):
    """Unigram finds whole words; a user could speak for another."""
    pieces = ["<unk>", "<eos>", "<|user|>", "<tool>", "a", *"<|>"]
    full = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    assert full.encode("a<|user|>").ids == [4, 2]
    full.save(str(tmp_path / "tokenizer.json"))
    stated = {"2": {"content": "<|user|>", "special": True}, "3": {"content": "<tool>", "special": False}}
    config = {"eos_token": "<eos>", "unk_token": "<unk>", "added_tokens_decoder": stated}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    t = Tokenizer.load(tmp_path)
    assert {2, 3} <= t.added_ids
    assert not {2, 3} & set(t.encode("a<|user|><tool>"))
    assert t.decode([4, 2, 3]) == "a <tool>"  # as transformers
    t.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == t.fingerprint


def rename_eos(data):
    data["model"]["vocab"] = {("<EOS>" if k == "<eos>" else k): v for k, v in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        token["content"] = token["content"].replace("<eos>", "<EOS>")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("tokenizer.json", rename_eos, "does not hold '<eos>'"),
        ("tokenizer.json", lambda d: d["model"]["vocab"].update(far=10**6), "ids up to 1000000"),
        ("tokenizer.json", lambda d: d["added_tokens"][1].update(id=5), "'<eos>' under id 1, not 5"),
        (
            "tokenizer.json",
            lambda d: d["added_tokens"].append({**d["added_tokens"][1], "content": "<s>"}),
            "'<s>' under id",
        ),
        ("tokenizer.json", lambda d: d.update(model={"type": "Secret"}), "no usable tokenizer.json"),
        ("tokenizer_config.json", lambda d: d.update(eos_token=7), "eos_token 7"),
        ("tokenizer_config.json", lambda d: d.update(bos_token="<bos>"), "does not hold '<bos>'"),
        (
            "tokenizer_config.json",
            lambda d: d.update(added_tokens_decoder={"5": {"content": "<eos>"}}),
            "under id 1, not '5'",
        ),
    ],
)
def test_folders_that_lie(tmp_path, file, change, says):
    words().save(tmp_path)
    Tokenizer.load(tmp_path)
    edit(tmp_path / file, change)
    with pytest.raises(CheckpointError) as e:
        Tokenizer.load(tmp_path)
    assert says in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe{", b"[" * 200_000, b'{"version": 1', b"null"])
def test_files_that_are_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            Tokenizer.load(path)


def test_two_words_under_one_id(tmp_path):
    """The library reads it, and may write a merge that it cannot read again."""
    vocab = {"<eos>": 0, "a": 1, "b": 2, "ab": 3, "F": 1, "Z": 2}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is no usable tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_panic_of_the_library_is_an_error_like_others(tmp_path):
    """A prefix longer than the second half of a merge."""
    vocab = {"<eos>": 0, "a": 1, "b": 2, "ab": 3}
    model = {"type": "BPE", "continuing_subword_prefix": "#" * 9, "vocab": vocab, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is no usable tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_panic_over_a_text_is_an_error_like_others(tmp_path):
    """A table of characters that is cut, and a decoder that takes more off a word than it has."""
    words().save(tmp_path)
    cut = {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}
    edit(tmp_path / "tokenizer.json", lambda data: data.update(normalizer=cut))
    t = Tokenizer.load(tmp_path)
    for call in (lambda: t.encode("how"), lambda: t.puts_space):
        with pytest.raises(CheckpointError, match="damaged"):
            call()
    edit(tmp_path / "tokenizer.json", lambda data: data.update(normalizer=None))
    edit(tmp_path / "tokenizer.json", lambda data: data["model"]["vocab"].update({"-": len(WORDS)}))
    strip = {"type": "Strip", "content": "-", "start": 0, "stop": 2}
    edit(tmp_path / "tokenizer.json", lambda data: data.update(decoder=strip))
    t = Tokenizer.load(tmp_path)
    assert t.decode([3]) == "how"
    with pytest.raises(CheckpointError, match="damaged"):
        t.decode([len(WORDS)])


def test_absent_files_and_sentencepiece(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(CheckpointError, match="AutoTokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").rmdir()
    os.mkfifo(tmp_path / "tokenizer.json")  # nobody writes: opening it must not wait
    with pytest.raises(CheckpointError, match="regular"):
        Tokenizer.load(tmp_path)


def test_a_decoder_of_bytes_is_read_as_it_is(tmp_path):
    full = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "Ġa": 1}, unk_token="<unk>"))
    full.decoder = decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(full.to_str())
    assert Tokenizer.load(tmp_path).decode([1]) == " a"
