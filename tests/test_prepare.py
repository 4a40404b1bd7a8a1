"""Data before training: weights and caps counted, groups kept together, conflicts, margins and ratings by hand."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from minirlhf import prepare
from minirlhf.errors import DataError, UsageError
from minirlhf.formats import read_records
from minirlhf.prepare import conflicts, elo, games, mix, pairs, split, weighted


def rows(n, **more):
    return [{"prompt": f"p{i}", "response": f"r{i}", **more} for i in range(n)]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Files as {name: rows}, arguments → (exit code, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(files, *argv):
        for name, content in files.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        code = prepare.main([*map(str, argv)])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return call


@pytest.mark.parametrize(("weight", "copies"), [(1, {1: 10}), (2, {2: 10}), (0.3, {1: 3}), (2.5, {2: 5, 3: 5})])
def test_a_weight_is_so_many_copies(weight, copies):
    mixed = mix([(rows(10, task="a"), weight), (rows(4, task="b"), 1)], by="", cap=0, seed=0)
    times = Counter(row["prompt"] for row in mixed if row["task"] == "a")
    assert Counter(times.values()) == copies
    assert sum(row["task"] == "b" for row in mixed) == 4


def test_a_cap_counts_files_or_values_of_a_field():
    both = [(rows(10, task="a"), 1), (rows(10, task="a") + rows(3, task="b"), 1)]
    by_file = mix(both, by="", cap=8, seed=0)
    assert len(by_file) == 16
    by_task = mix(both, by="task", cap=8, seed=0)
    assert Counter(row["task"] for row in by_task) == {"a": 8, "b": 3}
    texts = [[{"text": f"{name}{i}"} for i in range(5)] for name in "st"]
    by_task = mix([*both, *((rows_, 1) for rows_ in texts)], by="task", cap=4, seed=0)
    assert len(by_task) == 4 + 3 + 4 + 4  # what has no task is counted by its file


def test_values_are_equal_whatever_the_order_of_their_keys():
    content = [{"deep": {"a": 1, "b": 2}}, {"deep": {"b": 2, "a": 1}}, {"deep": {"a": 1, "b": 3}}]
    assert len(mix([(content, 1)], by="deep", cap=1, seed=0)) == 2


def test_the_seed_decides_the_order_and_nothing_is_lost():
    sources = [(rows(20, deep={"kept": [1]}), 1)]
    first = mix(sources, by="", cap=0, seed=0)
    assert first == mix(sources, by="", cap=0, seed=0) != mix(sources, by="", cap=0, seed=1)
    assert sorted(row["prompt"] for row in first) == sorted(row["prompt"] for row in sources[0][0])
    assert all(row["deep"] == {"kept": [1]} for row in first)


def test_groups_stay_together_in_every_file():
    users = [{"user": f"u{i % 50}", "i": i} for i in range(500)]
    train, held_out = split(users, by="user", share=0.3, seed=0)
    assert len(train) + len(held_out) == 500
    there, here = {row["user"] for row in train}, {row["user"] for row in held_out}
    assert not there & here
    assert 5 < len(here) < 25  # 15 expected, deviation 3.2
    other = split([{"user": f"u{i}"} for i in range(50)], by="user", share=0.3, seed=0)
    assert {row["user"] for row in other[1]} == here
    assert split(users, by="user", share=0.0, seed=0)[1] == split(users, by="user", share=1.0, seed=0)[0] == []
    with pytest.raises(DataError, match="row 2: has no field 'user'"):
        split([{"user": 1}, {"name": 1}], by="user", share=0.5, seed=0)


def ranked(tmp_path, *lists):
    path = tmp_path / "ranked.jsonl"
    content = [{"prompt": p, "responses": answers, "ranks": ranks} for p, answers, ranks in lists]
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return read_records(path)[0]


def test_conflicts_are_pairs_that_were_judged_both_ways(tmp_path):
    lists = [("p", ["a", "b", "c"], [1, 2, 3]), ("p", ["a", "b"], [2, 1]), ("p", ["b", "a"], [1, 2]),
             ("q", ["a", "b"], [2, 1]), ("p", ["c", "a", "d"], [1, 1, 2])]  # fmt: skip
    assert conflicts(games(ranked(tmp_path, *lists))) == [{"prompt": "p", "responses": ["a", "b"], "wins": [1, 2]}]


def test_an_answer_is_in_no_conflict_with_itself():
    assert conflicts([("p", "a", "a"), ("p", "a", "b")]) == []


def test_margins_by_hand():
    scored = [{"prompt": "p", "response": r, "score": s} for r, s in (("a", 1.0), ("b", 3.5), ("c", 1.25))]
    assert pairs(scored, margin=0.25) == [
        {"prompt": "p", "chosen": "b", "rejected": "a", "margin": 2.5},
        {"prompt": "p", "chosen": "b", "rejected": "c", "margin": 2.25},
    ]
    assert len(pairs(scored, margin=0.0)) == 3
    with pytest.raises(DataError, match="row 1: needs prompt, response and a number"):
        pairs([{"prompt": "p", "response": "a"}], margin=0.0)
    with pytest.raises(DataError, match="row 1: needs prompt, response and a number"):
        pairs([{"prompt": "p", "response": "a", "score": 10**400}], margin=0.0)
    with pytest.raises(DataError, match=r"row 2: needs prompt, response and a number up to 1e\+30"):  # inf is no JSON
        pairs([scored[0], {"prompt": "p", "response": "d", "score": -1.7e308}], margin=0.0)


def test_elo_by_hand(tmp_path):
    """a beats b: 1000 ± 16. Then a beats b again: E = 1/(1 + 10^(-32/400)) = 0.545922, so ± 32·0.454078 = 14.5305."""
    found = elo(
        games(ranked(tmp_path, ("p", ["a", "b"], [1, 2]), ("p", ["b", "a"], [2, 1]), ("q", ["a", "b"], [1, 2])))
    )
    ratings = {(row["prompt"], row["response"]): row["elo"] for row in found}
    assert ratings["p", "a"] == pytest.approx(1030.5305, abs=1e-4)
    assert ratings["p", "b"] == pytest.approx(969.4695, abs=1e-4)
    assert ratings["q", "a"] == 1016.0


def test_commands(run):
    files = {"a.jsonl": rows(10, task="x"), "b.jsonl": rows(10, task="y")}
    code, out, err = run(files, "mix", "a.jsonl", "b.jsonl:0.2")
    assert (code, len(out), err) == (0, 12, "12 of 20 rows\n")
    code, out, err = run({}, "split", "a.jsonl", "--by", "prompt", "--share", 0.5, "--train", "t", "--held_out", "h")
    assert (code, out) == (0, [])
    both = [json.loads(line) for name in "th" for line in Path(name).read_text().splitlines()]
    assert sorted(row["prompt"] for row in both) == sorted(row["prompt"] for row in files["a.jsonl"])
    scored = [{"prompt": "p", "response": f"r{i}", "score": i} for i in range(4)]
    code, out, err = run({"s.jsonl": scored}, "pairs", "s.jsonl", "--margin", 1)
    assert (code, len(out), err) == (0, 3, "3 pairs\n")
    code, out, err = run({"p.jsonl": out}, "elo", "p.jsonl")
    assert (code, len(out), err) == (0, 4, "4 answers in 3 pairs\n")
    assert run({}, "conflicts", "p.jsonl") == (0, [], "0 conflicts in 3 pairs\n")


def test_what_is_left_out_has_its_default(run):
    """Seed 0, a share of 0.1, a margin of 0."""
    users = rows(100)
    assert run({"a.jsonl": users}, "mix", "a.jsonl")[1] == mix([(users, 1)], by="", cap=0, seed=0)
    assert run({}, "mix", "a.jsonl", "--seed", 3)[1] == mix([(users, 1)], by="", cap=0, seed=3)
    run({}, "split", "a.jsonl", "--by", "prompt", "--train", "t", "--held_out", "h")
    held_out = [json.loads(line) for line in Path("h").read_text().splitlines()]
    assert held_out == split(users, by="prompt", share=0.1, seed=0)[1]
    close = [{"prompt": "p", "response": r, "score": s} for r, s in (("a", 0.0), ("b", 0.0), ("c", 0.5))]
    assert run({"s.jsonl": close}, "pairs", "s.jsonl")[2] == "2 pairs\n"


def test_a_field_that_some_rows_lack_and_a_single_pair(run):
    both = rows(3, task="x") + rows(2)
    assert run({"a.jsonl": both}, "mix", "a.jsonl", "--by", "task", "--cap", 1)[2] == "2 of 5 rows\n"
    assert run({"p.jsonl": [{"prompt": "p", "chosen": "a", "rejected": "b"}]}, "elo", "p.jsonl")[1] == [
        {"prompt": "p", "response": "a", "elo": 1016.0},
        {"prompt": "p", "response": "b", "elo": 984.0},
    ]


def test_letters_are_written_as_they_are(tmp_path, capsys):
    (tmp_path / "a").write_text('{"text": "é早"}\n', encoding="utf-8")
    out = [str(tmp_path / name) for name in ("t", "h")]
    prepare.main(["mix", str(tmp_path / "a")])
    assert capsys.readouterr().out == '{"text": "é早"}\n'
    prepare.main(["split", str(tmp_path / "a"), "--by", "text", "--train", out[0], "--held_out", out[1]])
    assert b"".join(Path(path).read_bytes() for path in out) == '{"text": "é早"}\n'.encode()


def test_a_reader_that_has_left_is_no_mistake(run, monkeypatch, tmp_path):
    """Whatever is written later goes nowhere."""
    with open(tmp_path / "gone", "wb") as file:

        class Gone(io.StringIO):
            def flush(self):
                raise BrokenPipeError

            def fileno(self):
                return file.fileno()

        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
        monkeypatch.setattr(sys, "stdout", Gone())
        assert prepare.main(["mix", "a.jsonl"]) == 0
        monkeypatch.undo()
        os.write(file.fileno(), b"late")
    assert (tmp_path / "gone").read_bytes() == b""


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "minirlhf.prepare", "mix", "a.jsonl"], cwd=tmp_path, stdout=full,
                              stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_module_is_a_command_through_the_script(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[1, 2\n")
    call = [sys.executable, "-m", "minirlhf.prepare", "mix", str(path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ")


SPLIT = ["split", "a.jsonl", "--by", "prompt", "--train", "t", "--held_out", "h"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: command"),
        (["mix", "a.jsonl", "--see", "1"], "--see"),
        (["conflicts", "a.jsonl", "--seed", "1"], "--seed"),
        (["mix", "a.jsonl", "--seed", "x"], "invalid int"),
        (["mix", "a.jsonl", "--cap", "1.5"], "invalid int"),
        (["mix", "a.jsonl", "--cap", "-1"], "--cap -1 is out of range"),
        (["mix", "a.jsonl", "--cap", str(2**31 + 1)], "out of range"),
        ([*SPLIT, "--share", "1.5"], "--share 1.5 is out of range"),
        ([*SPLIT, "--share", "-0.5"], "out of range"),
        ([*SPLIT, "--share", "nan"], "out of range"),
        (["pairs", "a.jsonl", "--margin", "1.5e30"], "out of range"),
        (["pairs", "a.jsonl", "--margin", "-0.5"], "out of range"),
        (SPLIT[:2] + SPLIT[4:], "required: --by"),
        (SPLIT[:4] + SPLIT[6:], "required: --train"),
        (SPLIT[:6], "required: --held_out"),
        (["--hel"], "required: command"),  # no option is abbreviated
    ],
)
def test_a_command_line_that_is_none(run, capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        run({"a.jsonl": rows(2)}, *argv)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("usage: python -m minirlhf.prepare ")


def test_limits_themselves_are_in_range(run):
    for share in ("0", "1"):
        assert run({"a.jsonl": rows(2)}, *SPLIT, "--share", share)[0] == 0
    assert run({}, "mix", "a.jsonl", "--cap", 2**31)[0] == 0
    scored = [{"prompt": "p", "response": r, "score": s} for r, s in (("a", -1e30), ("b", 1e30))]
    assert run({"s.jsonl": scored}, "pairs", "s.jsonl", "--margin", "1e30")[2] == "1 pairs\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["mix files together, FILE:WEIGHT", "split training and held-out rows", "conflicts pairs that were",
              "pairs pairs of scored answers", "elo ratings of ranked answers"]),
        ("mix", ["FILE [FILE ...] files together, FILE:WEIGHT", "--seed SEED of what is drawn",
                 "--by FIELD what --cap counts by", "--cap CAP rows of one value"]),
        ("split", ["FILE training and held-out rows", "--by FIELD rows with one value", "--share SHARE of the groups",
                   "--train OUT file to write", "--held_out OUT file to write", "--seed SEED of what"]),
        ("conflicts", ["FILE pairs that were judged both ways"]),
        ("pairs", ["FILE pairs of scored answers", "--margin MARGIN scores must differ"]),
        ("elo", ["FILE ratings of ranked answers"]),
    ],
)  # fmt: skip
def test_help_says_what_everything_is(capsys, monkeypatch, command, words):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        prepare.main([*([command] if command else []), "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for one in words:
        assert one in said


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a.jsonl", ("a.jsonl", 1.0)),
        ("a.jsonl:0.5", ("a.jsonl", 0.5)),
        ("c:a.jsonl", ("c:a.jsonl", 1.0)),
        ("a:1000", ("a", 1000.0)),
    ],
)
def test_weights_of_files(argument, expected):
    assert weighted(argument) == expected
    with pytest.raises(UsageError, match="at most 1000"):
        weighted("a:1000.5")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["mix", "nowhere.jsonl"], 3, "nowhere.jsonl: No such file"),
        (["mix", "a.jsonl:0"], 2, "above 0"),
        (["mix", "bad.jsonl"], 3, "bad.jsonl:1: "),
        (["mix", "a.jsonl", "empty.jsonl"], 3, "empty.jsonl: holds no row"),
        (["split", "a.jsonl", "--by", "user", "--train", "t", "--held_out", "h"], 3, " a.jsonl:1: has no field 'user'"),
        (["split", "a.jsonl", "--by", "prompt", "--train", "no/t", "--held_out", "h"], 2, "no/t: No such file"),
        (["mix", "a.jsonl", "--by", "tsak"], 3, "no row of a.jsonl has a field 'tsak'"),
        (["pairs", "twice.jsonl"], 3, " twice.jsonl:3: the same answer to the same prompt had another score"),
        (["conflicts", "a.jsonl"], 3, "a.jsonl: holds no preferences"),
        (["pairs", "a.jsonl"], 3, " a.jsonl:1: needs"),
        (["elo", "unlike.jsonl"], 3, "unlike.jsonl:1: prompt: wrong_type (int, not text); --on_bad_row drop leaves"),
        (["elo", "unlike.jsonl", "--format", "alpacca"], 2, "unlike.jsonl: --format alpacca is unknown; choose auto"),
        (["conflicts", "unlike.jsonl", "--on_bad_row", "drop"], 3, "unlike.jsonl: holds no preferences"),
    ],
)
def test_mistakes_are_one_line(run, argv, code, words, tmp_path):
    (tmp_path / "bad.jsonl").write_text("[1, 2\n")
    (tmp_path / "empty.jsonl").write_text("")
    twice = [{"prompt": "p", "response": "a", "score": s} for s in (1, 5)]
    (tmp_path / "twice.jsonl").write_text("\n".join(json.dumps(row) + "\n" for row in twice))  # a blank line between
    (tmp_path / "unlike.jsonl").write_text('{"prompt": 3, "chosen": "a", "rejected": "b"}\n')
    got, out, err = run({"a.jsonl": rows(2)}, *argv)
    assert (got, out) == (code, [])
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["conflicts", "elo"])
def test_labels_that_prefer_nothing_are_one_line(run, command):
    tied = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1], "annotator": "me"}
    code, out, err = run({"tied.jsonl": [tied]}, command, "tied.jsonl")
    assert (code, out, err) == (3, [], "error: tied.jsonl: holds no preferences\n")


def test_one_file_cannot_take_both_halves(run):
    with pytest.raises(SystemExit):
        run({"a.jsonl": rows(2)}, "split", "a.jsonl", "--by", "prompt", "--train", "o", "--held_out", "./o")


def test_a_name_with_a_colon_is_a_name(run):
    assert run({"a:2": rows(3)}, "mix", "a:2")[2] == "3 of 3 rows\n"
    assert run({}, "mix", "a:2:2")[2] == "6 of 3 rows\n"
