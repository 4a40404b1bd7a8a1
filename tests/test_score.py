"""Scores of a file's answers: the reward model's own, one line each, and how often they agree with ranks."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import processes
import pytest
import torch
from test_chat import folders  # noqa: F401  the fixture

from minirlhf import review_world, score
from minirlhf.errors import CheckpointError
from minirlhf.pretrained import load_reward_model

FILM, HOTEL = review_world.prompts()[0], review_world.prompts()[2]
ROWS = [
    {"prompt": FILM, "response": "plot great ."},
    {"prompt": HOTEL, "response": "bed awful , lobby slow ."},
    {"prompt": FILM, "response": "great"},
]


@pytest.fixture
def run(folders, capsys, tmp_path):  # noqa: F811
    """Rows or bytes, arguments → (exit code, lines of stdout, stderr)."""

    def call(rows, *args, folder="rm"):
        path = tmp_path / "answers.jsonl"
        path.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(r) + "\n" for r in rows).encode())
        code = score.main([str(folders / folder), str(path), *args])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return call


def by_hand(folder, prompt, response):
    """The head's score at the EOS of prompt and answer, one sequence alone."""
    words = {word: i for i, word in enumerate(review_world.words())}
    ids = [words[w] for w in f"{prompt} {response}".split()] + [1]
    with torch.no_grad():
        return float(load_reward_model(folder)(torch.tensor([ids])))


def test_one_line_per_answer_with_the_model_s_score(run, folders):  # noqa: F811
    code, lines, err = run(ROWS)
    assert code == 0
    assert [{k: v for k, v in line.items() if k != "score"} for line in lines] == ROWS
    expected = [by_hand(folders / "rm", row["prompt"], row["response"]) for row in ROWS]
    assert [line["score"] for line in lines] == pytest.approx(expected, abs=1e-5)
    mean = sum(expected) / 3
    deviation = (sum((x - mean) ** 2 for x in expected) / 3) ** 0.5
    assert err == f"3 answers, score mean {mean:.3f}, deviation {deviation:.3f}\n"


def test_ranked_answers_and_agreement(run, folders):  # noqa: F811
    texts = ["plot great .", "plot awful .", "great", "slow"]
    scores = [by_hand(folders / "rm", FILM, text) for text in texts]
    order = sorted(range(4), key=lambda i: -scores[i])
    ranks = [0] * 4
    for place, i in enumerate(order):
        ranks[i] = place + 1
    code, lines, err = run([{"prompt": FILM, "responses": texts, "ranks": ranks}])
    assert code == 0
    assert [(line["response"], line["rank"]) for line in lines] == list(zip(texts, ranks, strict=True))
    assert "agrees with 1.000 of 6 pairs" in err
    _, _, err = run([{"prompt": FILM, "responses": texts, "ranks": [5 - r for r in ranks]}])
    assert "agrees with 0.000 of 6 pairs" in err
    best, worst = texts[order[0]], texts[order[-1]]
    _, lines, err = run([{"prompt": FILM, "chosen": best, "rejected": worst}])
    assert [line["rank"] for line in lines] == [1, 2]
    assert "agrees with 1.000 of 1 pairs" in err


def test_labels_come_along(run):
    _, lines, _ = run([{"prompt": FILM, "response": "great", "label": 0.25}])
    assert lines[0]["label"] == 0.25


def test_standard_input_is_a_file(run, folders, monkeypatch, capsys):  # noqa: F811
    _, lines, err = run(ROWS)
    data = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
    for args in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        assert score.main([str(folders / "rm"), *args]) == 0
        captured = capsys.readouterr()
        assert [json.loads(line) for line in captured.out.splitlines()] == lines
        assert captured.err == err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data + b"{")))
    assert score.main([str(folders / "rm")]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: -:4: ")


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [(b"", 3, "answers.jsonl"), (b'{"prompt": "a"}\n', 3, "no answers"),
     (b'{"prompt": "a", "response": 3}\n', 3, ":1:"),
     (json.dumps({"prompt": FILM, "response": "great " * 60}).encode(), 3, "answers.jsonl:1: 68 tokens"),
     (json.dumps({"messages": [{"role": r, "content": "a"} for r in ("system", "user", "assistant")]}).encode(), 2,
      "answers.jsonl:1: --template plain has no place for the system turns"),
     (b'{"prompt": "a", "response": 3}\n', 3, "; --on_bad_row drop leaves bad rows out")],
)  # fmt: skip
def test_files_that_cannot_be_scored(run, data, code, words):
    found, lines, err = run(data)
    assert (found, lines) == (code, [])
    assert words in err
    assert len(err.splitlines()) == 1


def test_bad_rows_can_be_left_out(run):
    data = json.dumps(ROWS[0]).encode() + b"\n{broken\n" + json.dumps(ROWS[1]).encode() + b"\n"
    assert run(data)[0] == 3
    code, lines, err = run(data, "--on_bad_row", "drop")
    assert (code, len(lines)) == (0, 2)
    assert "1 rows left out" in err


def test_folders_that_are_no_reward_model(run):
    assert run(ROWS, folder="a")[0] == 4
    assert run(ROWS, folder="nowhere")[0] == 4
    assert run(ROWS, "--template", "unheard-of")[0] == 2


def test_a_pipe(folders):  # noqa: F811
    """As a program, with chat's words."""
    data = "".join(json.dumps(r) + "\n" for r in ROWS)
    code, out, _ = processes.run("-m", "minirlhf.score", folders / "rm", cwd=folders, text=data)
    assert code == 0
    assert len(out.splitlines()) == 3


def test_scores_that_are_no_numbers(run, monkeypatch):
    monkeypatch.setattr(score, "score_sequences", lambda model, sequences, *_: torch.full((len(sequences),), torch.nan))
    code, lines, err = run(ROWS)
    assert (code, lines) == (5, [])
    assert "NaN" in err


def test_a_reader_that_has_left_is_no_mistake(folders):  # noqa: F811
    """More lines than a pipe holds; nobody reads one."""
    data = "".join(json.dumps(ROWS[0] | {"id": "x" * 9999}) + "\n" for _ in range(20))
    (folders / "many.jsonl").write_text(data)
    command = (
        f"{sys.executable} -m minirlhf.score {folders / 'rm'} {folders / 'many.jsonl'} | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reward_model_as_a_function_of_texts(folders):  # noqa: F811
    """To be summed with rules or with other models."""
    judge = score.reward_of(str(folders / "rm"))
    prompts, answers = [row["prompt"] for row in ROWS], [row["response"] for row in ROWS]
    expected = [by_hand(folders / "rm", p, a) for p, a in zip(prompts, answers, strict=True)]
    assert judge(prompts, answers) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        score.reward_of("nowhere")
