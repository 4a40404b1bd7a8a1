"""One golden file per public format with its trap; every refusal; files that lie about what they are."""

import gzip
import json
import os
import resource
import time

import pytest

from minirlhf.errors import DataError, UserError
from minirlhf.formats import FORMATS, read_records


def write(tmp_path, content, name="data.jsonl"):
    """A file of raw bytes, of text, or of one JSON row per line."""
    path = tmp_path / name
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def plain(record):
    """A record as a tuple without its line."""
    if hasattr(record, "ranks"):
        return record.prompt, record.responses, record.ranks
    if hasattr(record, "label"):
        return record.prompt, record.response, record.label
    if hasattr(record, "response"):
        return (record.prompt, record.response, *([record.turns] if record.turns else []))
    return (record.prompt,)


# ---- one golden row per format --------------------------------------------------------------------------------------

HUMAN, BOT = "\n\nHuman:", "\n\nAssistant:"
SYSTEM, ASK = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
YES, NO = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
GOLDEN = [  # name, rows, records: written down from the formats' own descriptions
    (
        "hh",
        [{"chosen": f"{HUMAN} q{BOT} x Human: y Assistant: z", "rejected": f"{HUMAN} q{BOT} no"}],
        [(f"{HUMAN} q{BOT}", [" x Human: y Assistant: z", " no"], [1, 2])],
    ),
    (
        "hh",
        [{"chosen": f"{HUMAN} q{BOT} a{HUMAN} r{BOT} b", "rejected": f"{HUMAN} q{BOT} a{HUMAN} r{BOT} c"}],
        [(f"{HUMAN} q{BOT} a{HUMAN} r{BOT}", [" b", " c"], [1, 2])],
    ),
    ("hh", [{"chosen": [ASK, YES], "rejected": [ASK, NO]}], [("q", ["a", "b"], [1, 2])]),
    ("pair", [{"prompt": "q", "chosen": "same start a", "rejected": "same start b"}],
     [("q", ["same start a", "same start b"], [1, 2])]),
    (  # the marker at the start of the answers belongs to the prompt; one further on is text
        "pair",
        [{"prompt": "\n\nHuman: q\n\n", "chosen": "Assistant: a Assistant: b", "rejected": "Assistant: c"}],
        [("\n\nHuman: q\n\nAssistant:", [" a Assistant: b", " c"], [1, 2])],
    ),
    ("pair", [{"prompt": "q", "response": "a", "chosen": "a", "rejected": "b"}], [("q", ["a", "b"], [1, 2])]),
    (
        "pair",
        [{"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO], "messages": [ASK, YES], "score_chosen": 8.5,
          "score_rejected": 3}],
        [("q", ["a", "b"], [1, 2])],
    ),
    ("pair", [{"prompt": [ASK], "chosen": [YES], "rejected": [NO]}], [("q", ["a", "b"], [1, 2])]),
    ("ranking", [{"prompt": "q", "responses": ["a", "b", "c", "d"], "ranks": [3, 3, 2, 1]}],
     [("q", ["a", "b", "c", "d"], [3, 3, 2, 1])]),
    ("ranking", [{"prompt": "q", "responses": ["a", "b", "c"], "ranks": [0, 3, 1], "task": "t"}],
     [("q", ["a", "b", "c"], [0, 3, 1])]),
    (
        "ultrafeedback",
        [{"instruction": "q", "models": [], "completions": [
            {"response": r, "overall_score": s, "annotations": {"honesty": {"Rating": "5"}}}
            for r, s in (("a", 7.5), ("b", 9), ("c", 7.5))]}],
        [("q", ["a", "b", "c"], [2, 1, 2])],
    ),
    (
        "summarize",
        [{"info": {"id": "1", "post": "p", "title": "t", "subreddit": "r", "article": None}, "choice": 1,
          "summaries": [{"text": " a", "policy": "x", "note": None}, {"text": " b"}], "worker": "w", "extra": {}}],
        [("SUBREDDIT: r/r\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", [" a", " b"], [2, 1])],
    ),
    (
        "summarize",
        [{"info": {"article": "news"}, "choice": 0, "summaries": [{"text": " a"}, {"text": " b"}]}],
        [("Article: news\n\nTL;DR:", [" a", " b"], [1, 2])],
    ),
    (
        "lm-human-preferences",
        [{"query": "q", "sample0": "x", "sample1": "x", "sample2": "y", "sample3": "z", "best": 2}],
        [("q", ["x", "x", "y", "z"], [2, 2, 1, 2])],
    ),
    (
        "webgpt",
        [{"question": {"full_text": "q", "id": 1}, "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": 0.5}],
        [("q", ["a", "b"], [2, 1])],
    ),
    ("stack-exchange", [{"qid": 1, "question": "q", "response_j": "a", "response_k": "b"}],
     [("q", ["a", "b"], [1, 2])]),
    ("scored", [{"text": "a", "label": 0.25}], [("", "a", 0.25)]),
    ("scored", [{"prompt": "q", "completion": "a", "label": True}], [("q", "a", 1.0)]),
    ("scored", [{"prompt": "q", "response": "a", "label": 0}], [("q", "a", 0.0)]),
    (
        "alpaca",
        [{"instruction": "q", "input": "", "output": "a"}, {"instruction": "q", "output": "a"},
         {"instruction": "q", "input": "i", "output": "a", "text": "all of it"}],
        [("q", "a"), ("q", "a"), ("q\ni", "a", (("user", "q"), ("input", "i"), ("assistant", "a")))],
    ),
    ("dolly", [{"instruction": "q", "context": "", "response": "a", "category": "c"}], [("q", "a")]),
    ("sft", [{"prompt": "q", "response": "a"}], [("q", "a")]),
    ("completion", [{"prompt": " q", "completion": " a "}], [(" q", " a ")]),
    ("completion", [{"prompt": [ASK], "completion": [YES]}], [("q", "a")]),
    (
        "sharegpt",
        [{"id": 1, "conversations": [{"from": "gpt", "value": "late"}, {"from": "human", "value": "q"},
                                     {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"},
                                     {"from": "assistant", "value": "b"}, {"from": "human", "value": "and?"}]}],
        [("q\n\na\n\nr", "b", (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")))],
    ),
    ("messages", [{"messages": [ASK, YES]}], [("q", "a")]),
    ("messages", [{"messages": [SYSTEM, ASK, YES], "prompt": "q"}],
     [("s\n\nq", "a", (("system", "s"), ("user", "q"), ("assistant", "a")))]),
    (
        "seed_tasks",
        [{"id": 1, "name": "n", "is_classification": False, "instruction": "q",
          "instances": [{"input": "", "output": "a"}, {"input": "", "output": "b"}]}],
        [("q", "a"), ("q", "b")],
    ),
    (
        "hc3",
        [{"question": "q", "human_answers": ["a", "b"], "chatgpt_answers": ["c"], "source": "s"}],
        [("q", "a"), ("q", "b"), ("q", "c")],
    ),
    ("qa", [{"q": "问：天气", "a": "答：晴"}, {"q": "天气", "a": "晴"}], [("天气", "晴"), ("天气", "晴")]),
    ("prompts", [{"prompt": "q", "prompt_id": "1"}], [("q",)]),
    ("prompts", [{"prompt": [ASK]}], [("q",)]),
    ("text", [{"text": "a"}], [("", "a")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "expected"), GOLDEN, ids=[f"{g[0]}-{i}" for i, g in enumerate(GOLDEN)])
def test_golden(tmp_path, name, rows, expected):
    array = json.dumps(rows, indent=1).encode()
    for path in (write(tmp_path, rows), write(tmp_path, array, "a.json"), write(tmp_path, gzip.compress(array), "z")):
        for given in (name, "auto"):
            records, summary = read_records(path, format=given)
            assert [plain(record) for record in records] == expected
            assert (summary.format, summary.read, summary.kept, summary.dropped) == (name, len(rows), len(rows), [])


def test_every_format_has_a_golden_row():
    assert {name for name, _, _ in GOLDEN} == FORMATS.keys() - {"tsv"}


def test_what_readers_leave_out_is_counted(tmp_path):
    rows = next(rows for name, rows, _ in GOLDEN if name == "sharegpt")
    _, summary = read_records(write(tmp_path, rows * 2))
    assert summary.notes == {"leading_answer": 2, "last_question": 2}
    assert "last_question 2" in str(summary)


def test_lines_are_those_of_the_file(tmp_path):
    rows = b'\n{"text": "a"}\r\n\n \n{"text": "b"}'
    records, _ = read_records(write(tmp_path, rows))
    assert [(r.response, r.line) for r in records] == [("a", 2), ("b", 5)]
    records, _ = read_records(write(tmp_path, b'\n[\n\n{"text": "a"\n},\n{"text":"b"}]\n'))
    assert [(r.response, r.line) for r in records] == [("a", 4), ("b", 6)]


# ---- plain lines and columns ----------------------------------------------------------------------------------------


def test_tsv(tmp_path):
    text = "\ufeff好\t\u3000坏 \t[x]\r\n a\tb\u2028b\tc\ufeff\n"  # the first mark is a BOM, the last one is text
    for name in ("data.tsv", "data.txt"):
        records, summary = read_records(write(tmp_path, text, name))
        assert [r.responses for r in records] == [["好", "\u3000坏 ", "[x]"], [" a", "b\u2028b", "c\ufeff"]]
        assert all(r.ranks == [1, 2, 3] and r.prompt == "" for r in records)
        assert summary.format == "tsv"


def test_a_tsv_may_begin_with_a_bracket(tmp_path):
    records, _ = read_records(write(tmp_path, "{smile} good\t[bad]\n", "a.tsv"))
    assert records[0].responses == ["{smile} good", "[bad]"]
    assert read_records(write(tmp_path, "[1]\t[2]\n", "a.txt"), format="tsv")[0][0].responses == ["[1]", "[2]"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a\tb", "wrong_type"),
        ("a\tb\tc\td", "wrong_type"),
        ("a\t\tc", "empty_response"),
        ("\t\t", "empty_response"),
        ("a\tb\t \u3000", "empty_response"),
        ("a\tb\ta", "identical_answers"),
        ("one", "wrong_type"),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_bad_rows_of_a_tsv(tmp_path, row, reason, at):
    lines = ["a\tb\tc", "d\te\tf"]
    lines.insert(at, row)
    path = write(tmp_path, "\n".join(lines), "x.tsv")
    with pytest.raises(DataError, match=rf"x\.tsv:{at + 1}: .*{reason}"):
        read_records(path, format="tsv")
    records, summary = read_records(path, format="tsv", on_bad_row="drop")
    assert len(records) == 2
    assert [(d.line, d.reason) for d in summary.dropped] == [(at + 1, reason)]


def test_plain_lines_are_prompts_or_texts(tmp_path):
    path = write(tmp_path, "first \n\nsecond\u2028half\x85\r\nthird\rhalf\n", "x.txt")
    prompts, _ = read_records(path)
    assert [r.prompt for r in prompts] == ["first ", "second\u2028half\x85", "third\rhalf"]
    texts, _ = read_records(path, format="text")
    assert [(r.prompt, r.response, r.line) for r in texts][1] == ("", "second\u2028half\x85", 3)


# ---- bad rows -------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}
DONE = {"prompt": "q", "completion": "a"}
HH = {"chosen": f"{HUMAN} q{BOT} a", "rejected": f"{HUMAN} q{BOT} b"}
BEST = {"query": "q", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "d", "best": 0}
NEWS = {"info": {"article": "x"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
BAD = [  # a good row, what makes it bad, the reason
    (PAIR, {"chosen": None}, "null"),
    (PAIR, {"chosen": ...}, "missing_key"),
    (PAIR, {"prompt": ...}, "wrong_type"),  # then it should be a transcript
    (PAIR, {"rejected": " \n\u3000"}, "empty_response"),
    (PAIR, {"prompt": "\t"}, "empty_prompt"),
    (PAIR, {"rejected": 7}, "wrong_type"),
    (PAIR, {"rejected": "a"}, "identical_answers"),
    (PAIR, {"rejected": "\ud83d"}, "lone_surrogate"),
    (PAIR, {"extra": {"deep": ["\udc00"]}}, "lone_surrogate"),
    (PAIR, {"score_chosen": 1, "score_rejected": 1.0}, "rank_invalid"),
    (PAIR, {"score_chosen": 1}, "missing_key"),
    (PAIR, {"score_chosen": True, "score_rejected": 0}, "wrong_type"),
    (PAIR, {"chosen": "Assistant: ", "rejected": "Assistant: b"}, "empty_response"),
    (PAIR, {"chosen": [ASK, YES], "rejected": [{"role": "user", "content": "other"}, NO]}, "prompt_mismatch"),
    (PAIR, {"chosen": [ASK, YES, ASK, YES], "rejected": [ASK, NO]}, "wrong_type"),
    (PAIR, {"chosen": [], "rejected": []}, "wrong_type"),
    (RANKED, {"ranks": ...}, "missing_key"),
    (RANKED, {"ranks": [1, 2]}, "rank_invalid"),
    (RANKED, {"ranks": [1, 2, -1]}, "rank_invalid"),
    (RANKED, {"ranks": [1, 2, 4]}, "rank_invalid"),
    (RANKED, {"ranks": [1, 2, 2.0]}, "rank_invalid"),
    (RANKED, {"ranks": [True, 2, 3]}, "rank_invalid"),
    (RANKED, {"ranks": [1, 2, "3"]}, "rank_invalid"),
    (RANKED, {"ranks": [2, 2, 2]}, "rank_invalid"),
    (RANKED, {"ranks": [0, 0, 1]}, "rank_invalid"),
    (RANKED, {"ranks": 1}, "wrong_type"),
    (RANKED, {"responses": ["a", "a", "b"]}, "identical_answers"),
    (RANKED, {"responses": ["a", "", "b"]}, "empty_response"),
    (RANKED, {"responses": ["a", None, "b"]}, "null"),
    (RANKED, {"responses": [], "ranks": []}, "rank_invalid"),
    (RANKED, {"responses": "abc"}, "wrong_type"),
    (DONE, {"completion": None}, "null"),
    (DONE, {"completion": ...}, "missing_key"),
    (DONE, {"completion": ""}, "empty_response"),
    (DONE, {"prompt": ["q"]}, "wrong_type"),
    ({"text": "a"}, {"text": " "}, "empty_response"),
    ({"text": "a", "label": 1}, {"label": 1.01}, "label_invalid"),
    ({"text": "a", "label": 1}, {"label": "1"}, "label_invalid"),
    ({"text": "a", "label": 1}, {"label": None}, "null"),
    ({"messages": [ASK, YES]}, {"messages": [ASK, ASK, YES]}, "unknown_role"),
    ({"messages": [ASK, YES]}, {"messages": [ASK, {"role": "tool", "content": "x"}]}, "unknown_role"),
    ({"messages": [ASK, YES]}, {"messages": [ASK, SYSTEM, YES]}, "unknown_role"),
    ({"messages": [ASK, YES]}, {"messages": [ASK]}, "empty_response"),
    ({"messages": [ASK, YES]}, {"messages": []}, "empty_response"),
    ({"messages": [ASK, YES]}, {"messages": [ASK, {"role": "assistant", "content": None}]}, "null"),
    ({"messages": [ASK, YES]}, {"messages": [ASK, {"role": "assistant", "content": [{"image": 1}]}]}, "wrong_type"),
    ({"messages": [ASK, YES]}, {"messages": "q"}, "wrong_type"),
    ({"messages": [ASK, YES]}, {"messages": ["q"]}, "wrong_type"),
    (HH, {"rejected": f"{HUMAN} r{BOT} b"}, "prompt_mismatch"),
    (HH, {"chosen": f"{HUMAN} q{BOT} "}, "empty_response"),
    (HH, {"chosen": "plain"}, "wrong_type"),
    (HH, {"chosen": f"{HUMAN} q{BOT} a{HUMAN} r"}, "wrong_type"),
    ({"question": "q", "human_answers": ["a"], "chatgpt_answers": []}, {"human_answers": []}, "empty_response"),
    ({"question": "q", "human_answers": ["a"], "chatgpt_answers": []}, {"human_answers": ["a", ""]}, "empty_response"),
    (BEST, {"best": 4}, "rank_invalid"),
    (BEST, {"query": [50256]}, "wrong_type"),
    ({"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 0}, {"score_1": 1}, "rank_invalid"),
    (NEWS, {"choice": 2}, "rank_invalid"),
    (NEWS, {"info": []}, "wrong_type"),
]  # fmt: skip


def changed(row, change):
    return {k: v for k, v in {**row, **change}.items() if v is not ...}


@pytest.mark.parametrize(("good", "change", "reason"), BAD)
@pytest.mark.parametrize("array", [False, True])
def test_bad_rows(tmp_path, good, change, reason, array):
    rows = [json.dumps(row) for row in (good, good, changed(good, change), good)]
    path = write(tmp_path, "[" + ",\n".join(rows) + "]" if array else "\n".join(rows))
    with pytest.raises(DataError) as e:
        read_records(path)
    assert str(e.value).startswith(f"{path}:3: ")
    assert reason in str(e.value)
    assert "\n" not in str(e.value)
    records, summary = read_records(path, on_bad_row="drop")
    assert [r.line for r in records] == [1, 2, 4]
    assert [(d.line, d.reason) for d in summary.dropped] == [(3, reason)]
    assert (summary.read, summary.kept, summary.reasons) == (4, 3, {reason: 1})


@pytest.mark.parametrize(("good", "change"), [bad[:2] for bad in BAD if bad[:2] != (DONE, {"completion": ...})])
def test_a_bad_row_alone_is_refused_too(tmp_path, good, change):
    with pytest.raises(DataError) as e:
        read_records(write(tmp_path, json.dumps(changed(good, change))))
    assert f"{tmp_path}/data.jsonl:1: " in str(e.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "bad_json"),
        (b'{"text": "a"} x', "bad_json"),
        (b'{"text": "a"}{"text": "b"}', "bad_json"),
        (b"text", "bad_json"),
        (b'{"text": "a", "n": NaN}', "bad_json"),
        (b'{"text": "a", "n": -Infinity}', "bad_json"),
        (b'{"text": "a", "n": 1e999}', "bad_json"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "bad_json"),
        (b'{"text": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json"),
        (b'{"text": "a\tb"}', "bad_json"),
        (b'{"text": "a", "text": "b"}', "duplicate_key"),
        (b'{"text": "a", "n": {"x": 1, "y": [{"x": 1, "x": 1}]}}', "duplicate_key"),
        (b'{"text": "\xff"}', "bad_utf8"),
        (b'{"text": "\xed\xa0\x80"}', "bad_utf8"),
        (b'{"text": "a\0"}', "bad_utf8"),
        (b'{"text": "\\ud83d \\ude00"}', "lone_surrogate"),
        (b'["text"]', "wrong_type"),
        (b'"text"', "wrong_type"),
        (b"null", "wrong_type"),
        (b"0", "wrong_type"),
        (b'{"text": "' + b"a" * (8 << 20) + b'"}', "line_too_long"),
    ],
)
def test_lines_that_are_no_rows(tmp_path, line, reason):
    path = write(tmp_path, b'{"text": "good"}\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(DataError) as e:
        read_records(path)
    assert str(e.value).startswith(f"{path}:2: ")
    assert reason in str(e.value)
    assert len(str(e.value)) < 300
    records, summary = read_records(path, on_bad_row="drop")
    assert [r.response for r in records] == ["good", "last"]
    assert [r.line for r in records] == [1, 3]
    assert summary.reasons == {reason: 1}


def test_lines_of_white_space_are_no_rows_of_json(tmp_path):
    path = write(tmp_path, b'{"text": "a"}\n\t\n \t \r\n  \n{"text": "b"}\n')
    records, summary = read_records(path)
    assert ([r.line for r in records], summary.read) == ([1, 5], 2)
    with pytest.raises(DataError, match=r"x\.tsv:2: column 1: empty_response"):  # there it has two columns
        read_records(write(tmp_path, b"a\tb\n\t\nc\td\n", "x.tsv"))


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    assert read_records(write(tmp_path, b'{"text": "\\ud83d\\ude00\\u2028"}'))[0][0].response == "\U0001f600\u2028"


def test_the_first_five_bad_rows_are_named(tmp_path):
    rows = [{"text": "a"}, {"text": ""}] * 9
    with pytest.raises(DataError, match=r":2: text: empty_response; also line 4, 6, 8, 10; data\.on_bad_row drop"):
        read_records(write(tmp_path, rows))


def test_all_rows_dropped(tmp_path):
    records, summary = read_records(write(tmp_path, [{"text": ""}]), on_bad_row="drop")
    assert records == []
    assert summary.kept == 0


def test_a_wrong_format_ends_the_reading(tmp_path):
    path = write(tmp_path, "x\n" * 150_000)
    start = time.perf_counter()
    with pytest.raises(DataError, match="100000 bad rows"):
        read_records(path, format="sft", on_bad_row="drop")
    assert time.perf_counter() - start < 10


# ---- which format ---------------------------------------------------------------------------------------------------


def test_rows_of_two_formats_ask_for_the_name(tmp_path):
    path = write(tmp_path, [{"prompt": "q", "completion": "a", "instruction": "i", "output": "o"}])
    with pytest.raises(DataError, match=r":1: keys of the formats alpaca and completion; say data\.format"):
        read_records(path)
    assert read_records(path, format="completion")[0][0].response == "a"


@pytest.mark.parametrize(
    "row",
    [
        {"transcript": "t", "rating": 1, "tags": []},  # red-team data
        {"prompt": "q", "chosen": "a"},
        {"prompt": "q", "responses": ["a", "b"]},
        {"completion": "a"},
        {},
    ],
)
def test_rows_of_no_format(tmp_path, row):
    for mode in ("error", "drop"):
        with pytest.raises(DataError, match=r"data\.jsonl:1: missing_key .*data\.format"):
            read_records(write(tmp_path, [row]), on_bad_row=mode)


def test_the_majority_of_rows_decides(tmp_path):
    path = write(tmp_path, [{"prompt": "q"}, {"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r":1: completion: missing_key"):
        read_records(path)


def test_unknown_names(tmp_path):
    path = write(tmp_path, [{"text": "a"}])
    with pytest.raises(UserError, match=r"data\.format csv .*alpaca"):
        read_records(path, format="csv")
    with pytest.raises(UserError, match=r"data\.on_bad_row skip .*drop"):
        read_records(path, on_bad_row="skip")


# ---- files ----------------------------------------------------------------------------------------------------------

ROW = b'{"prompt": "q", "completion": "a"}\n'


def test_bom_and_crlf(tmp_path):
    bom, crlf = b"\xef\xbb\xbf", ROW.replace(b"\n", b"\r\n")
    for content in (bom + ROW, crlf * 2, bom + b"[" + ROW + b"]", b"\n\n" + ROW, gzip.compress(bom + crlf)):
        records, _ = read_records(write(tmp_path, content))
        assert (records[0].prompt, records[0].response) == ("q", "a")
    with pytest.raises(DataError, match=":1: bad_utf8"):
        read_records(write(tmp_path, ROW.decode().encode("utf-16")))


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf", b"[]", b" [ \n ] \n", gzip.compress(b"")])
@pytest.mark.parametrize("name", ["auto", "completion"])
def test_files_without_rows(tmp_path, content, name):
    for mode in ("error", "drop"):
        with pytest.raises(DataError, match=r"data\.jsonl: holds no row"):
            read_records(write(tmp_path, content), format=name, on_bad_row=mode)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent", tmp_path / "loop", "/dev/zero", "a\0b", "n" * 5000):
        with pytest.raises(DataError) as e:
            read_records(path)
        assert str(e.value).startswith(str(path))
    (tmp_path / "link").symlink_to(write(tmp_path, ROW))
    assert len(read_records(str(tmp_path / "link"))[0]) == 1


def test_git_lfs_pointer(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    with pytest.raises(DataError, match="git lfs pull"):
        read_records(write(tmp_path, pointer, "data.jsonl.gz"))


def test_damaged_gzip(tmp_path):
    rows = b"".join(b'{"prompt": "q%d", "completion": "%d"}\n' % (i, i * 7919 % 1000) for i in range(2000))
    packed = gzip.compress(rows)
    damaged = [packed[:-4], packed[: len(packed) // 2], packed + b"garbage", packed[:12] + b"\xff\xff" + packed[14:]]
    flipped = bytearray(packed)
    flipped[-6] ^= 1
    for content in (*damaged, bytes(flipped), b"\x1f\x8b", b"\x1f\x8b\x08\x00"):
        for mode in ("error", "drop"):
            with pytest.raises(DataError, match=r"d\.gz:\d+: (damaged or cut gzip data|bad_)"):
                read_records(write(tmp_path, content, "d.gz"), on_bad_row=mode)
    two = gzip.compress(ROW) + gzip.compress(ROW)  # two members are one file
    assert len(read_records(write(tmp_path, two, "d.gz"))[0]) == 2


def test_a_bad_array_ends_the_reading(tmp_path):
    for content, line in (
        (b'[\n{"text": "a"},\n{"text": }]', 3),
        (b'[{"text": "a"}\n{"text": "b"}]', 2),
        (b'[{"text": "a"},\n]', 2),
        (b'[{"text": "a"}', 1),
        (b'[{"text": "a"},\n\n', 3),
        (b'[{"text": "a"}]\n[]', 2),
        (b'[\n\n{"text": "\xff"}]', 3),
        (b"[" * 100_000, 1),
        (b'[{"text": "' + b"a" * (17 << 20), 1),
    ):
        for mode in ("error", "drop"):
            with pytest.raises(DataError, match=rf"data\.jsonl:{line}: "):
                read_records(write(tmp_path, content), on_bad_row=mode)


def test_elements_across_chunks(tmp_path):
    rows = [{"text": "é" * n} for n in (1, 70_000, 3, 65_536, 200_000, 5)] * 3
    records, _ = read_records(write(tmp_path, json.dumps(rows, ensure_ascii=False, indent=2)))
    assert [r.response for r in records] == [row["text"] for row in rows]
    assert [r.line for r in records] == [2 + 3 * i for i in range(len(rows))]


def test_flaws_of_one_element_leave_the_array_readable(tmp_path):
    rows = (b'{"text": "a", "n": NaN}', b'{"text": "b", "text": "c"}', b"7", b'{"text": "\\ud800"}', b'{"text": "d"}')
    path = write(tmp_path, b"[" + b",\n".join(rows) + b"]")
    records, summary = read_records(path, on_bad_row="drop")
    assert [r.response for r in records] == ["d"]
    assert [d.reason for d in summary.dropped] == ["bad_json", "duplicate_key", "wrong_type", "lone_surrogate"]


# ---- time and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "times", "says"),
    [
        (b"\0" * 2**20, 256, "times its size"),  # one endless line, a quarter of a gigabyte
        (b"\n" * 2**20, 256, "blank lines"),
        (b'{"text": "a"}\n' + b"\n" * 500_000, 256, "times its size"),
        (b"[" + b" " * 2**20, 256, "bomb.gz:"),
        (b'[{"text": "' + b"a" * 2**20, 256, "bomb.gz:"),
        (b'{"text": ""}\n' * 2**16, 256, "bad rows"),
    ],
)
def test_decompression_bombs(tmp_path, unit, times, says):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=9) as f:
        for _ in range(times):
            f.write(unit)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for mode in ("error", "drop"):
        with pytest.raises(DataError) as e:
            read_records(path, on_bad_row=mode, format="text")
        assert "bomb.gz" in str(e.value)
    assert says in str(e.value)
    assert time.perf_counter() - start < 20  # generous: a hang is minutes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


@pytest.mark.parametrize(
    "line",
    [
        b"{" + b",".join(b'"%d": 1' % i for i in range(300_000)) + b', "299999": 2}',  # the repeated key comes last
        b'{"text": "' + b"\\u0061" * 1_000_000 + b'"}',
        b'{"text": [' + b"0," * 2_000_000 + b"0]}",
        b'{"a":' * 500_000,
        b" " * 8_000_000 + b"x",
        b'{"text": "' + b"\xf0\x9f\x99" * 2_000_000 + b'"}',
    ],
)
@pytest.mark.parametrize("start", [b"", b"["])
def test_long_lines_take_no_time(tmp_path, line, start):
    path = write(tmp_path, start + line)
    begin = time.perf_counter()
    for mode in ("error", "drop"):
        assert outcome(path, mode) in ("record", "error")
    assert time.perf_counter() - begin < 8


def outcome(path, mode):
    try:
        records, _ = read_records(path, on_bad_row=mode, format="text")
    except DataError as e:
        return "error" if str(e).startswith(str(path)) else str(e)
    return "record" if len(records) <= 1 else f"{len(records)} records"
