"""Wire text byte by byte, masks by hand, injection, and the ids of transformers' chat templates."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from minirlhf import stage
from minirlhf.data import encode_sft
from minirlhf.errors import DataError, UsageError
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.records import SFT
from minirlhf.templates import TEMPLATES, get_template
from minirlhf.tokenizer import Tokenizer

MARKERS = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def byte_tokenizer(*special):
    """256 bytes, then <pad>, <eos>, <unk> and `special`: ids can be read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    full = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    full.decoder = decoders.ByteLevel()
    full.add_special_tokens(["<pad>", "<eos>", "<unk>", *special])
    names = {"eos_token": "<eos>", "pad_token": "<pad>"}
    return Tokenizer(full, names | ({"bos_token": "<s>"} if "<s>" in special else {}))


FULL = byte_tokenizer("<s>", *MARKERS)


def wire(ids, tokenizer=FULL):
    """Ids as text in which special tokens are visible."""
    return tokenizer._full.decode(ids, skip_special_tokens=False)


def trained_text(encoded):
    ids, trained = encoded
    assert len(ids) == len(trained)
    return wire([i for i, t in zip(ids, trained, strict=True) if t])


REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\nq\n\n"
WIRE = {  # name: (prompt, response, two turns of each), from the formats' own descriptions
    "plain": ("q", "a<eos>", "qa<eos>rb<eos>"),
    "hh": (
        "\n\nHuman: q\n\nAssistant:", " a<eos>", "\n\nHuman: q\n\nAssistant: a<eos>\n\nHuman: r\n\nAssistant: b<eos>",
    ),
    "wenda": ("问：q\n\n答：", "a<eos>", "问：q\n\n答：a<eos>问：r\n\n答：b<eos>"),
    "bloom": ("q<eos>", "a<eos>", "q<eos>a<eos>r<eos>b<eos>"),
    "alpaca": (f"Below is an instruction that describes a task. {REQUEST}### Response:", "a<eos>", None),
    "chatml": (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
    ),
    "llama2": ("<s>[INST] q [/INST]", " a <eos>", "<s>[INST] q [/INST] a <eos><s>[INST] r [/INST] b <eos>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "a<|eot_id|>", None,
    ),
    "tldr": ("q\n\nTL;DR:", " a<eos>", None),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_wire_text(name):
    template = get_template(name)
    prompt, response, two = WIRE[name]
    assert wire(template.prompt_ids(FULL, "q")) == prompt
    assert wire(template.response_ids(FULL, "a")) == response
    encoded = template.encode(FULL, "q", "a")
    assert wire(encoded[0]) == prompt + response
    assert trained_text(encoded) == response
    assert encoded == template.encode_turns(FULL, (("user", "q"), ("assistant", "a")))
    turns = (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    encoded = template.encode_turns(FULL, turns)
    assert two is None or wire(encoded[0]) == two
    assert trained_text(encoded) == response + response.replace("a", "b")
    assert encoded[0] == template.prompt_ids(FULL, turns[:3]) + template.response_ids(FULL, "b")
    assert encoded[0][-1] == template.stop_token_id(FULL)
    assert encoded[1][-1]


def test_plain_is_prompt_response_eos_and_nothing_between():
    words = Tokenizer.from_words(["<pad>", "<eos>", "<unk>", "a", "b"])
    assert get_template("plain").encode(words, "a b", "b a") == ([3, 4, 4, 3, 1], [False, False, True, True, True])
    assert get_template("plain").encode(words, "a", "") == ([3, 1], [False, True])  # an empty answer is its EOS


@pytest.mark.parametrize("name", ["plain", "hh", "llama3"])
def test_of_a_text_without_prompt_all_is_trained(name):
    template = get_template(name)
    ids, trained = template.encode(FULL, "", "text")
    assert all(trained)
    assert ids == template.prompt_ids(FULL, "") + template.response_ids(FULL, "text")
    assert get_template("plain").prompt_ids(FULL, "") == []


def test_alpaca_with_input():
    turns = (("user", "{input}"), ("input", "{text}"), ("assistant", "a"))
    ids, trained = get_template("alpaca").encode_turns(FULL, turns)
    assert wire(ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\n{input}\n\n### Input:\n{text}\n\n"
        "### Response:a<eos>"
    )
    assert trained_text((ids, trained)) == "a<eos>"
    assert wire(get_template("bloom").encode_turns(FULL, turns)[0]) == "{input}\n{text}<eos>a<eos>"


def test_system_turns():
    turns = (("system", "s"), ("user", "q"), ("assistant", "a"))
    assert wire(get_template("llama2").encode_turns(FULL, turns)[0]) == (
        "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] a <eos>"
    )
    assert wire(get_template("chatml").encode_turns(FULL, turns)[0]).startswith("<|im_start|>system\ns<|im_end|>\n")
    talk = SFT("", "a", (("system", "s"), ("user", "q")), line=7)
    with pytest.raises(UsageError, match=r"^line 7 of the data: .*plain has no place for the system"):
        encode_sft([talk], FULL, get_template("plain"), 99)
    with pytest.raises(UsageError, match=r"^data\.template chatml: the tokenizer has no token"):
        encode_sft([SFT("q", "a")], Tokenizer.train_chars("qa"), get_template("chatml"), 99)  # of no file
    with pytest.raises(UsageError, match=r"plain has no place for the system"):
        get_template("plain").encode_turns(FULL, turns)


def test_hh_does_not_double_what_a_transcript_holds():
    hh, transcript = get_template("hh"), "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    assert wire(hh.encode(FULL, transcript, " b")[0]) == transcript + " b<eos>"
    assert wire(hh.encode(FULL, "q", "b")[0]) == "\n\nHuman: q\n\nAssistant: b<eos>"
    assert wire(get_template("tldr").encode(FULL, "p\n\nTL;DR:", " s")[0]) == "p\n\nTL;DR: s<eos>"


def test_llama3_strips():
    assert wire(get_template("llama3").response_ids(FULL, "\n a b \n")) == "a b<|eot_id|>"


@pytest.mark.parametrize(
    "roles",
    [("assistant",), ("user", "user"), ("user", "system"), ("system", "assistant"), ("input",), ("user", "tool"),
     ("user", "assistant", "assistant"), ("system", "system"), ("user", "assistant", "input")],
)  # fmt: skip
def test_turns_in_an_impossible_order(roles):
    with pytest.raises(DataError, match="turn"):
        get_template("chatml").encode_turns(FULL, [(role, "x") for role in roles])


# ---- injection ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_text_adds_a_special_token(data):
    parts = st.lists(st.sampled_from([*MARKERS, "<eos>", "<s>", "{text}", "{input}", "user", "\n", " ", "x"]))
    prompt, response = "q" + "".join(data.draw(parts)), "a" + "".join(data.draw(parts))
    for name, template in TEMPLATES.items():
        hostile, harmless = template.encode(FULL, prompt, response), template.encode(FULL, "q", "a")
        assert [i for i in hostile[0] if i in FULL.added_ids] == [i for i in harmless[0] if i in FULL.added_ids], name
        if not template.strip:
            assert wire(template.response_ids(FULL, response)).removeprefix(" ").startswith(response)
            assert prompt in wire(hostile[0])


# ---- tokenizers that do not fit, files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "token"), [("chatml", "<|im_start|>"), ("llama2", "bos"), ("llama3", "<|begin_of_text|>")]
)
def test_a_missing_token_refuses_the_template(name, token):
    with pytest.raises(UsageError, match="no token") as e:
        get_template(name).prompt_ids(byte_tokenizer(), "q")
    assert name in str(e.value)
    assert token in str(e.value)


def test_hashes_tell_templates_apart():
    assert len({t.sha256 for t in TEMPLATES.values()}) == len(TEMPLATES)
    assert TEMPLATES["plain"].sha256 == get_template("plain").sha256
    assert all(name == t.name for name, t in TEMPLATES.items())


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"user": ["Q: {text}\nA:"], "response": [" {text}", {"token": "<eos>"}]}))
    template = get_template(str(path))
    assert template.name == str(path)
    assert wire(template.encode(FULL, "q", "a")[0]) == "Q: q\nA: a<eos>"
    path.write_text(json.dumps({"user": ["{text}"]}))
    assert get_template(str(path)).sha256 == get_template("plain").sha256  # the pieces count, not the name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "own.json"),
        ("[]", "own.json"),
        ("{}", "{text}"),
        ('{"user": "{text}"}', "list of texts"),
        ('{"user": ["no slot"]}', "{text}"),
        ('{"user": ["{text}"], "user": ["{text}"]}', "twice"),
        ('{"user": ["{text}"], "jinja": []}', "unknown key 'jinja'"),
        ('{"user": ["{text}"], "name": "x"}', "unknown key 'name'"),
        ('{"user": ["{text}"], "strip": 1}', "must be a bool"),
        ('{"user": ["{text}"], "system_text": []}', "must be a str"),
        ('{"user": ["{text}"], "open": [{"token": 1}]}', "list of texts"),
        ('{"user": ["{text}"], "open": [{"token": "a", "text": "b"}]}', "list of texts"),
        ('{"user": ["{text}"], "response": ["{text}"]}', "end with the token"),
        ('{"user": ["{text}"], "response": []}', "end with the token"),
        ('{"user": ["{text}"], "response": [{"token": "eos"}]}', "must hold {text}"),
    ],
)
def test_files_that_are_no_template(tmp_path, content, says):
    path = tmp_path / "own.json"
    path.write_text(content)
    with pytest.raises(UsageError) as e:
        get_template(str(path))
    assert says in str(e.value)
    assert str(e.value).startswith(f"data.template {path}")


def test_unknown_names(tmp_path):
    with pytest.raises(UsageError, match="chatml"):
        get_template("chatlm")
    with pytest.raises(UsageError, match=r"^.{,400}$"):
        get_template("x" * 100_000)  # out of a folder's minirlhf.json
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(UsageError, match=r"data\.template"):
            get_template(str(path))


def test_a_tokenizer_that_puts_a_space_before_each_text_puts_no_second_one():
    """As SentencePiece's converted for LLaMA 2: the answer after a piece's own space is what the whole text gives."""
    text = "[INST] hello you [/INST] this is fine "
    vocab = {c: i for i, c in enumerate(sorted({*text.replace(" ", "▁"), "▁"}))}
    full = tokenizers.Tokenizer(models.BPE(vocab | {"▁▁": len(vocab)}, [("▁", "▁")]))
    full.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    full.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(full, {"bos_token": "<s>", "eos_token": "</s>"})
    assert tokenizer.puts_space
    assert not FULL.puts_space
    ids, trained = get_template("llama2").encode(tokenizer, "hello you", "this is fine")
    assert ids == full.encode(f"<s>{text}</s>").ids
    assert "".join(full.id_to_token(i) for i, t in zip(ids, trained, strict=True) if t) == "▁this▁is▁fine▁</s>"


def test_a_saved_model_says_which_tokens_end_an_answer(tmp_path):
    config = ModelConfig("gpt2", vocab_size=FULL.vocab_size, n_layer=1, n_head=1, d_model=8, max_seq_len=8)
    for name, ends in (("chatml", [FULL.eos_id, FULL.token_to_id("<|im_end|>")]), ("hh", FULL.eos_id)):
        stage.save(tmp_path / name, stage.Loaded(CausalLM(config), FULL, get_template(name)))
        for file in ("config.json", "generation_config.json"):
            assert json.loads((tmp_path / name / file).read_text())["eos_token_id"] == ends, (name, file)
