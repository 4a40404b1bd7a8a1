"""Answers for ranking: different, not blank, a function of model, flags and place; and a file for the labeling page."""

import json
from types import SimpleNamespace

import pytest
from test_chat import folders  # noqa: F401  the fixture

from minirlhf import candidates, review_world
from minirlhf.label.store import read_tasks

PROMPTS = review_world.prompts()


@pytest.fixture
def make(folders, capsys, tmp_path):  # noqa: F811
    """Arguments → (exit code, tasks, stderr)."""

    def run(*args, prompts=None, folder="a"):
        if prompts is not None:
            (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
            args = ("--prompts", str(tmp_path / "prompts.jsonl"), *args)
        code = candidates.main([str(folders / folder), *map(str, args)])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return run


@pytest.mark.parametrize("k", [2, 4, 9])
def test_k_different_answers_to_each_prompt(make, tmp_path, k):
    code, tasks, err = make("--k", k, "--max_new_tokens", 12)
    assert (code, err) == (0, f"{len(PROMPTS)} tasks\n")
    assert [task["prompt"] for task in tasks] == PROMPTS
    for task in tasks:
        assert len(set(task["responses"])) == k
        assert all(text.strip() for text in task["responses"])
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    assert [task.responses for task in read_tasks(tmp_path / "t.jsonl")] == [task["responses"] for task in tasks]


def test_the_seed_decides_and_other_prompts_do_not(make):
    first = make(prompts=PROMPTS[:3])[1]
    assert make(prompts=PROMPTS[:3])[1] == first
    assert make("--seed", 1, prompts=PROMPTS[:3])[1] != first
    assert make(prompts=PROMPTS)[1][:3] == first
    assert len(make(prompts=[PROMPTS[0]] * 70)[1]) == 70  # more than one forward holds
    twice = make(prompts=[PROMPTS[0]] * 2)[1]
    assert twice[0]["responses"] == first[0]["responses"]
    assert twice[1]["responses"] != twice[0]["responses"]


def test_answers_that_came_before_or_are_blank_are_drawn_again(monkeypatch):
    """A model that says a, a, blank, b in the first round and b, c, d, c in the second."""
    said = iter([["a", "a", " ", "b"], ["b", "c", "d", "c"]])
    template = SimpleNamespace(prompt_ids=lambda *_: [1])
    loaded = SimpleNamespace(
        template=template, tokenizer=None, model=SimpleNamespace(config=SimpleNamespace(max_seq_len=9))
    )
    monkeypatch.setattr(candidates, "generate", lambda *_, **__: SimpleNamespace(tokens=0, mask=0))
    monkeypatch.setattr(candidates, "decode", lambda *_: next(said))
    sampling = {"max_new_tokens": 4, "pad_token_id": 0}
    assert list(candidates.candidates(loaded, ["p"], 4, sampling, 0)) == [["a", "b", "c", "d"]]


def test_a_prompt_with_too_few_answers(make):
    """Of one token there are not nine different answers among the likeliest three, and of the likeliest one no two."""
    code, tasks, err = make("--k", 9, "--max_new_tokens", 1, "--top_k", 3, prompts=PROMPTS[:4])
    assert code == 0
    assert all(2 <= len(task["responses"]) <= 3 for task in tasks)
    assert "with fewer answers" in err
    code, tasks, err = make("--max_new_tokens", 1, "--top_k", 1)
    assert (code, tasks) == (2, [])
    assert "no prompt has 2 different answers" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [(["--k", 1], 2, "--k 1"), (["--k", 10], 2, "--k 10"), (["--max_new_tokens", 48], 2, "48 positions"),
     (["--temperature", 0], 2, "temperature"), (["--prompts", "nowhere"], 3, "nowhere"),
     (["--template", "none"], 2, "none")],
)  # fmt: skip
def test_mistakes(make, args, code, words, capsys):
    try:
        found, out, err = make(*args)
    except SystemExit as e:
        found, out, err = e.code, [], capsys.readouterr().err.splitlines()[-1]
    assert (found, out) == (code, [])
    assert words in err
    assert len(err.splitlines()) == 1


def test_prompts_that_do_not_fit_and_folders_that_are_none(make, tmp_path):
    code, _, err = make(prompts=[PROMPTS[0], "film " * 100])
    assert code == 3
    assert "prompt 2" in err
    assert make(folder="nowhere")[0] == 4
    assert make(folder="rm")[0] == 4
    (tmp_path / "talk.jsonl").write_text(json.dumps({"instruction": "sum", "input": "1 2", "output": "3"}) + "\n")
    code, _, err = make("--prompts", tmp_path / "talk.jsonl")
    assert (code, "talk.jsonl:1: more than one turn" in err) == (3, True)
    odd = {"prompt": "q", "instruction": "a", "output": "b", "conversations": []}
    bad = {"prompt: wrong_type (int, not text); mend the file": {"prompt": 3},
           "those of no format; mend the file)": {"x": 1},
           "keys of the formats alpaca and sharegpt; mend the file": odd}  # fmt: skip
    for words, row in bad.items():
        (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
        code, _, err = make("--prompts", tmp_path / "bad.jsonl")
        assert (code, err.strip().endswith(words)) == (3, True), err
    (tmp_path / "texts.tsv").write_text("good\tbad\n")
    assert make("--prompts", tmp_path / "texts.tsv")[0] == 3


def test_a_stop_text_ends_every_answer_before_it(make, tmp_path):
    plain = make("--k", "4")[1]
    word = plain[0]["responses"][0].split(" ")[1]
    found = make("--k", "4", "--stop", f" {word}")[1]
    assert any(f" {word}" in answer for task in plain for answer in task["responses"])
    assert not any(f" {word}" in answer for task in found for answer in task["responses"])
