"""Tokenizer folders and templates against transformers: the same ids from the same files."""

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

MARKERS = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXTS = ["how was the film?", "你好，世界 ", "  two  spaces\n\nand\tlines\r\n", "naïve café 🙂 <eos>"] * 3


def words():
    return Tokenizer.from_words(["<pad>", "<eos>", "<unk>", "how", "was", "film", "你", "ok", ".", ","])


def bpe():
    return Tokenizer.train_bpe(TEXTS, 300)


def chars():
    return Tokenizer.train_chars(TEXTS)


@pytest.mark.parametrize("make", [words, bpe, chars])
def test_transformers_reads_the_folder(tmp_path, make):
    t = make()
    t.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 0, 2)
    for text in ("how was film", "It 's 你 , ok ."):
        ids = t.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode([*ids, 1], skip_special_tokens=True) == t.decode([*ids, 1])
    theirs.save_pretrained(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint == t.fingerprint


CHATML = (  # as published with the models that use them
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPLIT = (  # LLaMA 3's: a run of newlines is one word, whatever follows it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TURNS = (("system", "be kind"), ("user", "  2 + 2?"), ("assistant", "4\n"), ("user", "你好 there"), ("assistant", "hi"))


@pytest.mark.parametrize(("name", "jinja"), [("chatml", CHATML), ("llama3", LLAMA3)])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_ids_of_transformers(tmp_path, name, jinja, n):
    base = Tokenizer.train_bpe(["be kind 2 + 2? 4 hello there user assistant system\n\n"] * 20, 300)
    words = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    base._full.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    base._full.add_special_tokens(MARKERS)
    base.save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": role, "content": text} for role, text in TURNS[:n]]
    asked = n % 2 == 0  # the last turn is the user's
    expected = theirs.apply_chat_template(
        messages, chat_template=jinja, add_generation_prompt=asked, tokenize=True, return_dict=False
    )
    template = get_template(name)
    ids = template.prompt_ids(ours, TURNS[:n]) if asked else template.encode_turns(ours, TURNS[:n])[0]
    newline = ours.encode("\n") if name == "chatml" and not asked else []  # theirs ends with one
    assert ids + newline == expected
