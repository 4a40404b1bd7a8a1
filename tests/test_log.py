"""Lines are complete or absent, earlier ones are never touched, and the terminal gets what it can show."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest
from faults import disk_calls, failing, recorded

from minirlhf.errors import CheckpointError, NonFiniteError, UsageError
from minirlhf.log import Progress, append_line, cut_after, read_lines, to_json


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    records = [{"step": 1, "x": 0.1 + 0.2}, {"step": 2, "word": "é\u2028🙂"}, {"step": 3, "none": None}]
    for record in records:
        append_line(path, record)
    assert read_lines(path) == records
    assert path.read_bytes().count(b"\n") == 3
    assert read_lines(tmp_path / "nowhere") == []


def test_a_line_is_one_write(tmp_path):
    labels = recorded(lambda: append_line(tmp_path / "x.jsonl", {"step": 1, "long": "x" * 100_000}))
    assert labels == ["open x.jsonl", "write x.jsonl"]


def test_a_write_that_takes_only_a_part_goes_on(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:7])))
    append_line(tmp_path / "x.jsonl", {"step": 1, "word": "abcdefghij"})
    monkeypatch.undo()
    assert read_lines(tmp_path / "x.jsonl") == [{"step": 1, "word": "abcdefghij"}]


@pytest.mark.parametrize("at", [0, 1])
def test_a_full_disk_is_said_with_the_file(tmp_path, at):
    append_line(tmp_path / "x.jsonl", {"step": 1})
    with disk_calls(failing(errno.ENOSPC, at=at)), pytest.raises(CheckpointError, match=r"x\.jsonl: .*No space left"):
        append_line(tmp_path / "x.jsonl", {"step": 2})
    assert read_lines(tmp_path / "x.jsonl") == [{"step": 1}]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(NonFiniteError, match=r"x\.jsonl"):
        append_line(tmp_path / "x.jsonl", {"step": 1, "loss": float("nan")})
    assert not (tmp_path / "x.jsonl").exists()


def test_a_name_that_is_no_utf8_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"x\.json: .*data/l\\udce9\.json.* is no UTF-8"):
        to_json(tmp_path / "x.json", {"path": "data/l\udce9.jsonl"})


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 4, "lo', b'{"step": 4}', b"\xff\xfe", b'{"st\n{"step": 5}\n', b"[]\n", b"3\n"]
)
def test_cutting_leaves_earlier_bytes_and_drops_what_is_torn(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    kept = b'{"step": 0, "a":   1}\n{"step": 1}\n{"step": 1, "b": 2}\n{"step": 2, "c": "\\u00e9"}\n'
    path.write_bytes(kept + b'{"step": 3}\n' + torn)
    cut_after(path, 2)
    assert path.read_bytes() == kept
    path.write_bytes(kept + torn)
    cut_after(path, 2)
    assert path.read_bytes() == kept
    cut_after(path, -1)
    assert path.read_bytes() == b""
    cut_after(tmp_path / "nowhere", 3)
    assert not (tmp_path / "nowhere").exists()


def test_a_cut_that_fails_leaves_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    before = path.read_bytes()
    (tmp_path / "copy").write_bytes(before)
    for at in range(len(recorded(lambda: cut_after(tmp_path / "copy", 1)))):
        with disk_calls(failing(errno.EIO, at=at)), pytest.raises(OSError, match="Input/output error"):
            cut_after(path, 1)
        assert path.read_bytes() == before


def test_readers_skip_what_is_no_object(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"step": 1}\n[]\nnull\n{"step"\n\xff\n{"step": 2}\n{"step": 3')
    assert read_lines(tmp_path / "x.jsonl") == [{"step": 1}, {"step": 2}]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_only_the_first_and_last_lines_that_count():
    out = io.StringIO()
    progress = Progress("sft", 3, out=out)
    for step in (1, 2, 3):
        progress.show(step, {"loss": 1.0 / step}, ("loss",), keep=step != 2)
    shown = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert shown[0].startswith("sft 1/3  loss 1")
    assert shown[-1].startswith("sft 3/3  loss 0.333")


def test_a_watcher_that_left_or_reads_few_letters_does_not_end_a_run(tmp_path):
    command = "from minirlhf.log import tell; tell('a → b\\n'); tell('c\\n'); print('d')"
    how = {"env": os.environ | {"PYTHONIOENCODING": "latin-1"}, "stderr": subprocess.PIPE, "check": False}
    seen = subprocess.run([sys.executable, "-c", command], stdout=subprocess.PIPE, **how)
    assert (seen.returncode, seen.stdout, seen.stderr) == (0, b"a ? b\nc\nd\n", b"")
    read, write = os.pipe()
    os.close(read)
    unseen = subprocess.run([sys.executable, "-c", command], stdout=write, **how)
    os.close(write)
    assert (unseen.returncode, unseen.stderr) == (0, b"")


def test_a_terminal_has_one_line_that_renews_itself():
    out = Terminal()
    progress = Progress("sft", 3, out=out)
    for step in (1, 2, 3):
        progress.show(step, {"loss": 2.0, "other": 1}, ("loss", "absent"), keep=False)
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().endswith("\n")
    assert out.getvalue().count("\r") == 3
    assert "other" not in out.getvalue()


def test_names_and_numbers_are_short():
    out = io.StringIO()
    metrics = {"objective/kl": 1.23456, "response/length_mean": 12345.6, "policy/clipfrac_avg": 0.0, "n": 7}
    Progress("ppo", 1, out=out).show(1, metrics, tuple(metrics), keep=True)
    assert "kl 1.23  length 12,346  policy/clipfrac 0  n 7" in out.getvalue()
    assert json.dumps(metrics)
