"""The labeling page's protocol, file and statistics. Requests are written by hand, byte by byte where it matters."""

import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest

from minirlhf.formats import read_records
from minirlhf.label import agreement, store
from minirlhf.label.__main__ import main

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
TASKS = [
    {"prompt": "How was the film?", "responses": ["great fun", "too long", "<b>so</b> so"]},
    {"prompt": "茶怎么样？", "responses": ["很香", "太苦", "一般", "还行"]},
    {"prompt": "How was the room?", "responses": ["clean", "noisy"]},
]
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'"


def write_tasks(path, tasks=TASKS):
    path.write_text("".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks))
    return path


class Page:
    """A running server and a client without a browser."""

    def __init__(self, tasks, out, *args):
        command = [sys.executable, "-m", "minirlhf.label", str(tasks), "--out", str(out), *args]
        self.process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        found = re.fullmatch(r"http://(127\.0\.0\.1|localhost):(\d+)/\?token=([0-9a-f]{32,})", self.url)
        assert found, (self.url, self.process.stderr.read() if self.process.poll() is not None else "")
        self.port, self.token = int(found[2]), found[3]

    def call(self, path, body=None, *, method=None, token="header", **headers):
        """(status, headers, body); `token` says how it is given, or is a wrong one."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if token == "header":
            headers["X-Token"] = self.token
        elif token == "cookie":
            headers["Cookie"] = f'a={{"b": 1}}; =; c; label_{self.port}={self.token}'
        elif token == "query":
            path += ("&" if "?" in path else "?") + f"token={self.token}"
        elif token:
            headers["X-Token"] = token
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as e:
            return e.code, e.headers, e.read()

    def task(self, **kwargs):
        code, _, body = self.call("/api/task", **kwargs)
        assert code == 200
        return json.loads(body)

    def rank(self, task, ranks, **more):
        return self.call("/api/rank", {"task": task, "ranks": ranks, **more})[0]

    def raw(self, data, half_close=True):
        """Bytes in, bytes out."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as s:
            s.sendall(data)
            if half_close:
                s.shutdown(socket.SHUT_WR)
            out = b""
            while part := s.recv(65536):
                out += part
        return out

    def close(self):
        self.process.kill()
        self.process.communicate()


@contextmanager
def serving(*args):
    page = Page(*args)
    try:
        yield page
    finally:
        page.close()


@pytest.fixture
def files(tmp_path):
    return write_tasks(tmp_path / "tasks.jsonl"), tmp_path / "rankings.jsonl"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A server whose labels nobody looks at."""
    folder = tmp_path_factory.mktemp("label")
    with serving(write_tasks(folder / "tasks.jsonl"), folder / "rankings.jsonl") as one:
        yield one


def lines_of(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


# ---- from the first task to the last --------------------------------------------------------------------------------


def test_every_task_once_and_a_file_that_trains(files):
    tasks, out = files
    given = [[2, 3, 1], [1, 4, 2, 2], [2, 1]]
    with serving(tasks, out) as page:
        for i, ranks in enumerate(given):
            task = page.task()
            assert (task["done"], task["total"]) == (i, 3)
            assert (task["prompt"], task["responses"]) == (TASKS[i]["prompt"], TASKS[i]["responses"])
            assert sorted(task["shown"]) == list(range(len(ranks)))
            assert page.rank(task["task"], ranks, ms=1500) == 200
            last = lines_of(out)[-1]  # it is in the file before the answer is here
            assert (last["task"], last["ranks"], last["ms"], last["rev"]) == (task["task"], ranks, 1500, 1)
        end = page.task()
        assert end["task"] is None
        assert (end["done"], end["total"]) == (3, 3)
    records, summary = read_records(out)
    assert [(r.prompt, r.responses, r.ranks) for r in records] == [
        (t["prompt"], t["responses"], ranks) for t, ranks in zip(TASKS, given, strict=True)
    ]
    assert (summary.format, summary.dropped) == ("ranking", [])


def test_the_page_and_its_parts(page):
    code, headers, body = page.call("/", token="query")
    assert code == 200
    cookie = headers["Set-Cookie"]
    assert cookie.startswith(f"label_{page.port}={page.token};")
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert headers["Content-Security-Policy"].startswith(POLICY)
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    sizes = [len(body)]
    for part in re.findall(r'(?:src|href)="([^"]+)"', body.decode()):
        code, headers, body = page.call(part, token="cookie")
        assert code == 200
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in body
        assert b"innerHTML" not in body
        sizes.append(len(body))
    assert len(sizes) == 4
    assert sum(sizes) <= 40 << 10


# ---- who may ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["header", "cookie", "query"])
def test_the_token_may_come_in_three_ways(page, token):
    assert page.call("/api/task", token=token)[0] == 200


@pytest.mark.parametrize("token", ["", "0" * 32, "é", "x" * 4096])
@pytest.mark.parametrize(("path", "body"), [("/", None), ("/api/task", None), ("/page.js", None), ("/api/rank", {})])
def test_without_the_token_nothing(page, token, path, body):
    for how in ({"token": token.encode("utf-8").decode("latin-1")}, {"token": "", "Cookie": f"label_{page.port}=x"}):
        code, _, reply = page.call(path, body, **how)
        assert code == 403
        assert page.token.encode() not in reply


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}", "",
             "[::1]:{port}"],
)  # fmt: skip
def test_another_host_is_refused(page, host):
    for path, body in (("/", None), ("/api/task", None), ("/api/rank", {"task": "x", "ranks": []})):
        assert page.call(path, body, Host=host.format(port=page.port))[0] == 403


def test_both_names_of_this_machine_are_its_host(page):
    assert page.call("/api/task", Host=f"localhost:{page.port}")[0] == 200
    assert page.call("/api/task", Host=f"127.0.0.1:{page.port}")[0] == 200


@pytest.mark.parametrize(
    "origin", ["null", "http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1:1", ""]
)
def test_another_origin_is_refused(page, origin):
    body = {"task": page.task()["task"], "ranks": [1, 2, 3]}
    assert page.call("/api/rank", body, Origin=origin.format(port=page.port))[0] == 403
    assert page.task()["done"] == 0


def test_its_own_origin_may_post(files):
    with serving(*files) as page:
        body = {"task": page.task()["task"], "ranks": [1, 2, 3]}
        assert page.call("/api/rank", body, Origin=f"http://127.0.0.1:{page.port}")[0] == 200


def test_two_hosts_are_one_too_many(page):
    host = f"Host: 127.0.0.1:{page.port}\r\n"
    ask = f"GET /api/task?token={page.token} HTTP/1.1\r\n"
    assert page.raw((ask + host + "\r\n").encode()).startswith(b"HTTP/1.0 200")
    assert page.raw((ask + host + host + "\r\n").encode()).startswith(b"HTTP/1.0 403")
    assert page.raw((ask + "\r\n").encode()).startswith(b"HTTP/1.0 403")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/nothing", "/api", "/api/task/", "/page.html", "/../pyproject.toml", "/..%2f..%2fetc/passwd",
             "/etc/passwd", "/.", "/api/rank", "http://127.0.0.1/", "/page.js/", "/%00", "/api/task?task=unknown"],
)  # fmt: skip
def test_other_addresses_are_404(page, path):
    reply = page.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nX-Token: {page.token}\r\n\r\n".encode())
    assert reply.startswith(b"HTTP/1.0 404")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW"])
def test_other_methods_are_404(page, method):
    assert page.call("/api/task", method=method)[0] == 404


def test_posting_elsewhere_is_404(page):
    assert page.call("/api/task", {})[0] == 404
    assert page.call("/", b"x" * 100)[0] == 404


BODIES = [
    b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"{}", b"[" * 100_000, b"1" * 6000,
    *(json.dumps(body).encode() for body in (
        {"task": "unknown", "ranks": [1, 2, 3]}, {"task": None, "ranks": [1, 2, 3]}, {"task": [], "ranks": []},
        {"task": "TASK"},
        *({"task": "TASK", "ranks": ranks} for ranks in (
            None, {}, "123", [], [1, 2], [1, 2, 3, 1], [1, 2, 4], [1, 2, -1], [1, 2, 3.0], [1, 2, "3"], [True, 2, 3],
            [1, 2, None], [1, 2, [3]], [1, 2, 10**400])),
        *({"task": "TASK", "ranks": [1, 2, 3], **more} for more in (
            {"ms": -1}, {"ms": "5"}, {"ms": True}, {"flags": ["<b>"]}, {"flags": 1})),
    )),
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_malformed_is_400_and_changes_nothing(page, body):
    task = page.task()
    assert page.call("/api/rank", body.replace(b"TASK", task["task"].encode()), method="POST")[0] == 400
    assert page.task() == task


def test_sizes(page):
    limit = 1 << 20
    assert page.call("/api/rank", b"x" * limit)[0] == 400
    for size in (limit + 1, 3 << 20, 30 << 20):
        code, _, reply = page.call("/api/rank", b"x" * size)  # the answer arrives although the body was not wanted
        assert (code, reply) == (413, b"over 1048576 bytes\n")
    assert page.call("/api/rank", b"x" * (3 << 20), token="wrong")[0] == 403


@pytest.mark.parametrize(
    ("headers", "code"),
    [("Content-Length: 99999999999999999999", 413), ("Content-Length: -1", 400), ("Content-Length: +5", 400),
     ("Content-Length: 1_0", 400), ("Content-Length: ٣", 400), ("Content-Length: 5\r\nContent-Length: 6", 400),
     ("X: y", 400), ("Transfer-Encoding: chunked", 400), ("Content-Length: 50", 400)],
)  # fmt: skip
def test_lengths_that_lie(page, headers, code):
    head = f"POST /api/rank HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nX-Token: {page.token}\r\n{headers}\r\n\r\n"
    assert page.raw(head.encode() + b"hello").startswith(b"HTTP/1.0 %d" % code)


@pytest.mark.parametrize(
    "data",
    [b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / x y z\r\n\r\n",
     b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"A" * 100,
     b"GET / HTTP/1.1\r\n" + b"A" * 70_000 + b"\r\n\r\n", b"POST /api/rank HTTP/0.9\r\n\r\n",
     b"GET http://[ HTTP/1.1\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http(page, data):
    reply = page.raw(data)
    assert not re.match(rb"HTTP/1.. (2|5)", reply)
    assert page.task()["total"] == 3  # it goes on


def test_silent_clients_do_not_stop_the_others(page):
    """More than there are threads: they are given up after five seconds of silence."""
    idle = [socket.create_connection(("127.0.0.1", page.port)) for _ in range(40)]
    assert page.task()["total"] == 3
    for s in idle:
        s.close()


# ---- blindness, edits, resumption -----------------------------------------------------------------------------------


def test_the_order_on_the_page_says_nothing():
    """Each answer is in each place about equally often: 1,000 tasks of 4, sd of a count of 250 is 13.7."""
    tasks = [store.Task(f"{i:016x}", "p", list("abcd")) for i in range(1000)]
    items = store.plan(tasks, "ann")
    for place in range(4):
        for answer in range(4):
            assert 250 - 70 < sum(item.shown[place] == answer for item in items) < 250 + 70
    assert [item.shown for item in store.plan(tasks, "ann")] == [item.shown for item in items]
    assert [item.shown for item in store.plan(tasks, "bob")] != [item.shown for item in items]
    assert [item.shown for item in store.plan(tasks, "ann", seed=1)] != [item.shown for item in items]


def test_an_edit_is_a_new_revision_and_the_last_one_counts(files, capfd):
    tasks, out = files
    with serving(tasks, out) as page:
        first = page.task()["task"]
        assert page.rank(first, [1, 2, 3]) == 200
        assert page.rank(first, [1, 2, 3]) == 200  # twice the same, as from a double click, is one line
        assert len(lines_of(out)) == 1
        later = page.task()
        assert (later["done"], later["previous"]) == (1, first)
        again = json.loads(page.call(f"/api/task?task={first}")[2])
        assert (again["ranks"], again["task"]) == ([1, 2, 3], first)
        assert page.rank(first, [3, 2, 1], flags=["flag"]) == 200
        assert page.task()["done"] == 1
    assert [(line["rev"], line["ranks"]) for line in lines_of(out)] == [(1, [1, 2, 3]), (2, [3, 2, 1])]
    current = store.current(store.read_labels(out))
    assert [(line["ranks"], line["flags"]) for line in current] == [([3, 2, 1], ["flag"])]


def test_skips_and_total_ties_are_kept_but_teach_nothing(files):
    tasks, out = files
    with serving(tasks, out) as page:
        for ranks in ([0, 0, 0], [2, 2, 2, 2], [1, 2]):
            assert page.rank(page.task()["task"], ranks) == 200
        assert page.task()["task"] is None
    assert [line["ranks"] for line in lines_of(out)] == [[0, 0, 0], [2, 2, 2, 2], [1, 2]]
    records, summary = read_records(out)
    assert [r.ranks for r in records] == [[1, 2]]
    assert (summary.kept, summary.notes["no_preference"]) == (1, 2)


@pytest.mark.parametrize("torn", [b"{", b'{"schema": 1, "task": "a', b"whole line without its end"])
def test_resume_after_a_torn_line(files, torn):
    tasks, out = files
    with serving(tasks, out) as page:
        first = page.task()["task"]
        page.rank(first, [1, 2, 3])
    whole = out.read_bytes()
    out.write_bytes(whole[:-1] if torn.startswith(b"whole") else whole + torn)
    with serving(tasks, out) as page:
        assert page.task()["done"] == 1
        assert page.rank(page.task()["task"], [1, 2, 3, 4]) == 200
    assert out.read_bytes().startswith(whole)
    assert [line["ranks"] for line in lines_of(out)] == [[1, 2, 3], [1, 2, 3, 4]]


def test_equal_tasks_are_different_tasks(tmp_path):
    tasks = write_tasks(tmp_path / "t.jsonl", [TASKS[2]] * 3)
    with serving(tasks, tmp_path / "out.jsonl") as page:
        seen = []
        while (task := page.task())["task"]:
            seen.append(task["task"])
            page.rank(task["task"], [1, 2])
    assert len(set(seen)) == 3


def test_acknowledged_is_on_the_disk(files, monkeypatch):
    """The line is written and fsynced, in this order, before `save` returns."""
    tasks, out = files
    rankings = store.Rankings(out, "ann", store.plan(store.read_tasks(tasks), "ann"))
    did = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: did.append("write") or write(fd, data))
    monkeypatch.setattr(os, "fsync", lambda fd: did.append("fsync") or fsync(fd))
    rankings.save(rankings.next(), [1, 2, 3])
    assert did == ["write", "fsync"]


def test_a_full_disk_is_told_and_leaves_no_half_line(files, monkeypatch):
    tasks, out = files
    rankings = store.Rankings(out, "ann", store.plan(store.read_tasks(tasks), "ann"))
    rankings.save(rankings.next(), [1, 2, 3])
    before, write = out.read_bytes(), os.write

    def full(fd, data):
        if len(data) > 20:
            return write(fd, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        rankings.save(rankings.next(), [1, 2, 3, 4])
    monkeypatch.setattr(os, "write", write)
    assert out.read_bytes() == before
    assert rankings.done == 1
    rankings.save(rankings.next(), [1, 2, 3, 4])
    assert len(lines_of(out)) == 2


def test_two_servers_append_to_one_file(files):
    tasks, out = files
    with serving(tasks, out, "--annotator", "ann") as ann, serving(tasks, out, "--annotator", "bob") as bob:
        for page in (ann, bob, bob, ann, ann, bob):
            task = page.task()
            assert page.rank(task["task"], list(range(1, len(task["responses"]) + 1))) == 200
    assert [line["annotator"] for line in lines_of(out)] == ["ann", "bob", "bob", "ann", "ann", "bob"]
    assert len(read_records(out)[0]) == 6


def test_many_threads_lose_nothing(tmp_path):
    tasks = write_tasks(tmp_path / "t.jsonl", [{"prompt": f"p {i}", "responses": ["a", "b"]} for i in range(60)])
    with serving(tasks, tmp_path / "out.jsonl") as page:
        keys = [task.key for task in store.read_tasks(tasks)]
        codes = []

        def work(part):
            codes.extend(page.rank(key, [1, 2]) for key in part)

        threads = [threading.Thread(target=work, args=(keys[i::6],)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == [200] * 60
        assert page.task()["done"] == 60
    assert {line["task"] for line in lines_of(tmp_path / "out.jsonl")} == set(keys)


def kill_and_resume(folder, kills, rng):
    """Label from a thread while the server is killed at random times; (acknowledged, lines that were saved)."""
    tasks = write_tasks(
        folder / "t.jsonl", [{"prompt": f"p {i}", "responses": ["a", "b", "c"]} for i in range(100 * kills)]
    )
    out = folder / "out.jsonl"
    acknowledged = {}
    for _ in range(kills):
        with serving(tasks, out) as page:
            timer = threading.Timer(rng.uniform(0, 0.15), page.process.kill)
            timer.start()
            try:
                while True:
                    task, ranks = page.task()["task"], rng.sample([1, 2, 3], 3)
                    if page.rank(task, ranks) == 200:
                        acknowledged[task] = ranks
            except (OSError, HTTPException, AssertionError, ValueError):  # it is dead
                timer.join()
    with serving(tasks, out) as page:
        assert page.task()["done"] >= len(acknowledged)
    return acknowledged, lines_of(out)


def check_kills(acknowledged, lines):
    saved = {line["task"]: line["ranks"] for line in lines}
    assert len(saved) == len(lines)  # none is doubled
    assert acknowledged
    assert {task: saved.get(task) for task in acknowledged} == acknowledged


def test_kills_lose_no_acknowledged_label(tmp_path):
    check_kills(*kill_and_resume(tmp_path, 5, random.Random(0)))


@pytest.mark.slow
def test_200_kills_lose_no_acknowledged_label(tmp_path):
    check_kills(*kill_and_resume(tmp_path, 200, random.Random(1)))


# ---- random requests ------------------------------------------------------------------------------------------------

PIECES = [
    b"GET", b"POST", b"PUT", b"HEAD", b" ", b"/", b"/api/task", b"/api/rank", b"/page.js", b"?token=", b"?task=",
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"\r\n", b"\n", b"\r", b"\0", b"\xff\xfe", b"Host: ",
    b"Origin: ", b"Cookie: ", b"Content-Length: ", b"Transfer-Encoding: chunked", b"X-Token: ", b"{", b"}", b"[",
    b'"task": ', b'"ranks": ', b"1", b"-1", b"9" * 30, b"%00", b"%", b"&", b";", b"=", b",", b"null", b":", b"a" * 200,
    b"Expect: 100-continue", b"..",
]  # fmt: skip


def random_request(rng, page, task):
    """Anything from noise to an almost good judgement."""
    kind = rng.random()
    if kind < 0.3:
        return b"".join(rng.choices(PIECES, k=rng.randrange(1, 30)))
    body = json.dumps(
        {"task": rng.choice([task, "x"]), "ranks": [rng.randrange(-1, 5) for _ in range(rng.randrange(5))]}
    )
    body = bytearray(body.encode())
    for _ in range(rng.choice([0, 0, 1, 5])):
        body[rng.randrange(len(body))] = rng.randrange(256)
    head = [rng.choice([b"GET", b"POST", b"POST", b"POST", b"PATCH"]) + b" " + rng.choice(
        [b"/", b"/api/task", b"/api/rank", b"/api/rank", b"/api/rank", b"/x?%ff=%zz&&;;"]) + b" HTTP/1.1",
        b"Host: 127.0.0.1:%d" % page.port, b"X-Token: " + page.token.encode(),
        b"Content-Length: %d" % rng.choice([len(body)] * 8 + [0, 5, len(body) + 9])]  # fmt: skip
    if kind > 0.7:
        head.insert(rng.randrange(len(head)), b"".join(rng.choices(PIECES, k=rng.randrange(1, 8))))
    return b"\r\n".join(head) + b"\r\n\r\n" + bytes(body)


def fuzz(page, count, seed):
    rng = random.Random(seed)
    task = page.task()["task"]
    codes = set()
    for _ in range(count):
        request = random_request(rng, page, task)
        try:
            status = re.match(rb"HTTP/1\.. (\d)", page.raw(request))
        except ConnectionError:  # noise may be cut off
            continue
        codes.add(status[1] if status else b"")
    return codes


def test_random_requests_are_never_the_servers_fault(files):
    with serving(*files) as page:
        assert fuzz(page, 1500, 0) >= {b"2", b"4"}
        assert b"5" not in fuzz(page, 500, 1)
        assert page.task()["total"] == 3
        page.process.kill()
        assert "Traceback" not in page.process.communicate()[1]
    read_records(files[1])


@pytest.mark.slow
def test_100_000_random_requests(files):
    with serving(*files) as page:
        codes = set().union(*(fuzz(page, 10_000, seed) for seed in range(2, 12)))
        assert b"5" not in codes
        assert page.task()["total"] == 3
        page.process.kill()
        assert "Traceback" not in page.process.communicate()[1]
    read_records(files[1])


# ---- the command line -----------------------------------------------------------------------------------------------


def label(*args, stdin=None):
    command = [sys.executable, "-m", "minirlhf.label", *map(str, args)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


BAD_TASKS = [
    b"", b"\n\n", b"{", b"[1]\n", b'{"prompt": "p"}\n', b'{"prompt": "p", "responses": "ab"}\n',
    b'{"prompt": "p", "responses": ["a"]}\n', b'{"prompt": "p", "responses": []}\n',
    json.dumps({"prompt": "p", "responses": list("abcdefghij")}).encode(), b'{"prompt": "p", "responses": ["a", 3]}\n',
    b'{"prompt": "p", "responses": ["a", null]}\n', b'{"prompt": "p", "responses": ["a", ""]}\n',
    b'{"prompt": "p", "responses": ["a", " \\n"]}\n', b'{"prompt": "p", "responses": ["a", "a"]}\n',
    b'{"prompt": "", "responses": ["a", "b"]}\n', b'{"prompt": null, "responses": ["a", "b"]}\n',
    b'{"prompt": 3, "responses": ["a", "b"]}\n', b'{"responses": ["a", "b"]}\n',
    b'{"prompt": "\\ud800", "responses": ["a", "b"]}\n', b'{"prompt": "p", "prompt": "q", "responses": ["a", "b"]}\n',
    b'{"prompt": "p", "responses": ["a", "\xff"]}\n', b'{"prompt": "p", "responses": ["a", NaN]}\n',
    b"\x1f\x8b\x08broken",
]  # fmt: skip


@pytest.mark.parametrize("data", BAD_TASKS, ids=range(len(BAD_TASKS)))
def test_bad_tasks_exit_3(tmp_path, data):
    (tmp_path / "t.jsonl").write_bytes(json.dumps(TASKS[0]).encode() + b"\n" + data if len(data) > 2 else data)
    code, out, err = label(tmp_path / "t.jsonl", "--out", tmp_path / "out.jsonl")
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert "t.jsonl" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_other_mistakes(files, tmp_path):
    tasks, out = files
    (tmp_path / "notes.txt").write_text("my notes\nmore\n")
    (tmp_path / "notes2.txt").write_text("my notes")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for code, args in (
            (3, [tmp_path / "none.jsonl", "--out", out]),
            (3, [tasks, "--out", tmp_path / "notes.txt"]),
            (3, [tasks, "--out", tmp_path / "notes2.txt"]),
            (2, [tasks, "--out", tasks]),
            (2, [tasks, "--out", tasks, "--export", "ranked"]),
            (3, [tmp_path / "none.jsonl", "--out", tasks]),
            (2, [tasks, "--out", tmp_path]),
            (2, [tasks, "--out", tmp_path / "no" / "out.jsonl"]),
            (2, [tasks, "--out", out, "--host", "0.0.0.0"]),
            (2, [tasks, "--out", out, "--host", "192.168.1.5"]),
            (2, [tasks, "--out", out, "--host", "example.org"]),
            (2, [tasks, "--out", out, "--host", "::"]),
            (2, [tasks, "--out", out, "--host", ""]),
            (2, [tasks, "--out", out, "--port", taken.getsockname()[1]]),
            (3, [tmp_path / "notes.txt", "--agreement"]),
        ):
            found, said, err = label(*args)
            assert (found, said) == (code, ""), args
            assert len(err.splitlines()) == 1, err
        for args in ([], [tasks], [tasks, "--out", out, "--port", "70000"], [tasks, "--out", out, "--team", "a,b"],
                     [tasks, "--out", out, "--overlap", "2"], [tasks, "--out", out, "--annotator", "\n"]):  # fmt: skip
            assert label(*args)[0] == 2
    assert (tmp_path / "notes.txt").read_text() == "my notes\nmore\n"
    assert (tmp_path / "notes2.txt").read_text() == "my notes"
    assert tasks.read_text() == write_tasks(tmp_path / "again").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(files, number, code):
    with serving(*files) as page:
        page.process.send_signal(number)
        _, err = page.process.communicate(timeout=10)
    assert (page.process.returncode, err) == (code, "")
    assert stat.S_ISREG(files[1].stat().st_mode)


def test_the_server_needs_no_torch():
    code = "import sys, minirlhf.label.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENV, check=False).returncode == 0


# ---- several annotators ---------------------------------------------------------------------------------------------


def test_a_team_shares_the_tasks():
    tasks = [store.Task(f"{i:016x}", "p", ["a", "b"]) for i in range(2000)]
    team = ("ann", "bob", "cat")
    seen = {name: {item.id for item in store.plan(tasks, name, team=team, overlap=0.15)} for name in team}
    common = seen["ann"] & seen["bob"] & seen["cat"]
    assert set().union(*seen.values()) == {task.key for task in tasks}
    assert 0.15 * 2000 - 64 < len(common) < 0.15 * 2000 + 64  # 4 sd of 16
    assert seen["ann"] & seen["bob"] == common
    for name in team:  # 15 % and a third of the rest: 867, sd 22
        assert 867 - 90 < len(seen[name]) < 867 + 90
    more = {item.id for item in store.plan(tasks[:1000], "ann", team=team)}
    assert more == {key for key in seen["ann"] if int(key, 16) < 1000}  # what is added later moves nobody
    assert len(store.plan(tasks, "ann")) == 2000


def test_hidden_repeats_come_later_and_look_like_any_other():
    tasks = [store.Task(store._digest(i), f"p {i}", list("abcde")) for i in range(1000)]
    items = store.plan(tasks, "ann", repeats=0.05)
    repeats = [i for i, item in enumerate(items) if item.repeat]
    assert 50 - 28 < len(repeats) < 50 + 28  # 4 sd of 6.9
    assert len({item.id for item in items}) == len(items)
    assert all(re.fullmatch("[0-9a-f]{16}", item.id) for item in items)
    first = {item.task.key: i for i, item in enumerate(items) if not item.repeat}
    assert all(i - first[items[i].task.key] > 10 for i in repeats)
    assert sum(items[i].shown != items[first[items[i].task.key]].shown for i in repeats) > 0.9 * len(repeats)
    assert [item.task for item in items if not item.repeat] == tasks


# ---- export ---------------------------------------------------------------------------------------------------------


def labelled(task, ranks, annotator="ann", rev=1, **more):
    responses = [f"{task} {c}" for c in "abcdefghi"[: len(ranks)]]
    return {"schema": 1, "task": task, "prompt": f"p {task}", "responses": responses, "ranks": ranks, "ms": 2000,
            "annotator": annotator, "flags": [], "rev": rev, **more}  # fmt: skip


LABELS = [
    labelled("x", [3, 1, 2]), labelled("y", [1, 2, 2]), labelled("z", [0, 0, 0]), labelled("x", [1, 2, 3], rev=2),
    labelled("w", [2, 1, 3], repeat_of="x"),
]  # fmt: skip


def test_exports_are_what_the_reward_model_reads(tmp_path):
    path, out = tmp_path / "labels.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(line) + "\n" for line in LABELS))
    assert label(path, "--export", "ranked", "--out", out)[0] == 0
    assert [(r.prompt, r.ranks) for r in read_records(out)[0]] == [("p x", [1, 2, 3]), ("p y", [1, 2, 2])]
    assert label(path, "--export", "pairs", "--out", out)[0] == 0
    pairs = [(r.responses, r.ranks) for r in read_records(out)[0]]
    assert pairs == [(list(pair), [1, 2]) for pair in
                     (("x a", "x b"), ("x a", "x c"), ("x b", "x c"), ("y a", "y b"), ("y a", "y c"))]  # fmt: skip
    assert [json.loads(line)["margin"] for line in out.read_text().splitlines()] == [1, 2, 1, 1, 1]
    code, _, err = label(path, "--export", "tsv", "--out", out)
    assert code == 3
    assert "tie" in err
    path.write_text(json.dumps(LABELS[0]) + "\n")
    assert label(path, "--export", "tsv", "--out", out)[0] == 0
    assert out.read_text() == "x b\tx c\tx a\n"
    assert read_records(out)[0][0].responses == ["x b", "x c", "x a"]
    path.write_text(json.dumps(LABELS[0] | {"responses": ["a\tb", "c", "d"]}) + "\n")
    assert label(path, "--export", "tsv", "--out", out)[0] == 3


@pytest.mark.parametrize("ranks", [[1, 2], [1, 0, 2]])
def test_a_tsv_has_lists_of_one_length(ranks, tmp_path, capsys):
    path, out = tmp_path / "labels.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(line) + "\n" for line in (LABELS[0], labelled("v", ranks))))
    assert main([str(path), "--export", "tsv", "--out", str(out)]) == 3
    assert capsys.readouterr().err.startswith(f"error: {path}: task v: 2 ranked answers, the first has 3")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [{"prompt": "\ud800"}, {"responses": ["a", "\udfff"]}, {"annotator": "\ud800"}, {"task": "\ud800"},
     {"repeat_of": ["x"]}, {"repeat_of": None}, {"ms": 10**400}, {"ms": -1}, {"responses": {"a": 1, "b": 2}},
     {"responses": "ab"}],
)  # fmt: skip
@pytest.mark.parametrize("command", ["--agreement", "--export=ranked", "--export=pairs", "--export=tsv"])
def test_lines_that_the_page_did_not_write(command, change, tmp_path, capsys):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (LABELS[0], labelled("v", [1, 2]) | change)))
    assert main([str(path), command, "--out", str(tmp_path / "out")]) == 3
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(f"error: {path}:2: ")
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    path, out = tmp_path / "labels.jsonl", tmp_path / "out"
    path.write_text(json.dumps(LABELS[0]) + "\n")
    out.mkdir()
    assert main([str(path), "--export", "ranked", "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [path, out]


# ---- agreement ------------------------------------------------------------------------------------------------------


def test_kappa_by_hand():
    """[[4, 1], [2, 3]]: p_o = 7/10, p_e = (5·6 + 5·4)/100 = 1/2, κ = .2/.5."""
    assert agreement.cohen_kappa([[4, 1], [2, 3]]) == pytest.approx(0.4, rel=1e-12)
    assert agreement.cohen_kappa([[5, 0], [0, 0]]) is None


def test_w_by_hand():
    """Rank sums 4, 6, 8, 12 … of the first: S = 35, 12·35/(9·60) = 7/9."""
    assert agreement.kendall_w([(1, 2, 3, 4), (2, 1, 3, 4), (1, 3, 2, 4)]) == pytest.approx(7 / 9, rel=1e-12)
    assert agreement.kendall_w([(1, 2.5, 2.5, 4), (1, 2, 3, 4)]) == pytest.approx(37 / 38, rel=1e-12)
    assert agreement.kendall_w([(1, 2, 2, 4), (1, 2, 3, 4)]) == pytest.approx(37 / 38, rel=1e-12)  # ranks as typed
    assert agreement.kendall_w([(1, 1), (2, 2)]) is None


def test_alpha_by_hand():
    """11 22 33 32 22 12: n_1 = 3, n_2 = 6, n_3 = 3; δ²(1,2) = (9/2)² = δ²(2,3); α = 1 - 11·(2·2·20.25)/… = 25/36."""
    units = [[int(c) for c in pair] for pair in ["11", "22", "33", "32", "22", "12"]]
    assert agreement.krippendorff_alpha(units) == pytest.approx(25 / 36, rel=1e-12)
    assert agreement.krippendorff_alpha([*units, [3]]) == pytest.approx(25 / 36, rel=1e-12)  # seen by one alone
    assert agreement.krippendorff_alpha([[1, 1], [1]]) is None


def test_agreement_of_labels(tmp_path):
    """x: ann abc, bob acb, 2 of 3 pairs alike; y: both abc, but bob ties b and c, 2 of 2. Repeat: 1 of 3 alike."""
    lines = [
        labelled("x", [1, 2, 3]), labelled("x", [1, 3, 2], "bob"),
        labelled("y", [1, 2, 3]), labelled("y", [1, 2, 2], "bob"),
        labelled("w", [3, 1, 2], repeat_of="x"), labelled("z", [0, 0, 0]), labelled("v", [1, 2, 3], rev=1),
    ]  # fmt: skip
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = label(path, "--agreement")
    with path.open("a") as f:
        f.write(json.dumps(labelled("x", [1, 2, 3, 4], "eve")) + "\n")
    found, _, err = label(path, "--agreement")
    assert found == 3
    assert err.startswith(f"error: {path}: task x: ranked as")
    assert code == 0
    found = json.loads(out)
    assert (found["labels"], found["skipped"], found["shared_tasks"]) == (7, 1, 2)
    assert found["annotators"] == {"ann": 5, "bob": 2}
    assert found["pairwise"] == pytest.approx(4 / 5)
    assert found["retest"] == pytest.approx(1 / 3)
    # better, tie, worse of ann by bob over 6 pairs: [[4, 1, 1], 0, 0]: p_o = 4/6 = p_e
    assert found["kappa"] == pytest.approx(0, abs=1e-12)
    # x: sums 2, 5, 5, S = 6, 12·6/(4·24) = 3/4; y: ranks 1 2 3 and 1 2.5 2.5, sums 2, 4.5, 5.5, S = 6.5, T = 6:
    # 78/(96 - 12) = 13/14
    assert found["kendall_w"] == pytest.approx((3 / 4 + 13 / 14) / 2)
    assert found["median_seconds"] == 2
