"""Scripts and commands as processes, in one thread each.

Most are forked off a process that has imported torch, which alone takes longer than a small run does. A new
interpreter, as a user has it, is for signals, and for first runs, so that a rerun has other hash seeds.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from importlib import import_module
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TIMEOUT = 240  # seconds
SMALLER = [  # how much is held out and examined, which else would be most of a small run
    ("minirlhf.evaluate", "EXAM", 64), ("minirlhf.stage", "VALIDATION", 64), ("minirlhf.ptx", "HELD_OUT", 64),
]  # fmt: skip
MP = multiprocessing.get_context("forkserver")
MP.set_forkserver_preload(
    ["pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "minirlhf.fsdp", "minirlhf.stage"]
)


def start(*argv, cwd):
    """A new interpreter, of which as little is held out and examined as of a fork."""
    command = [sys.executable, __file__, *map(str, argv)]
    return subprocess.Popen(command, cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_anew(*argv, cwd):
    """What `run` returns, of a new interpreter."""
    process = start(*argv, cwd=cwd)
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def forked(function, *args):
    """A process that has imported torch."""
    with mock.patch.dict(os.environ, ENV, clear=True):
        ensure_running()
    process = MP.Process(target=function, args=args)
    process.start()
    return process


def run(*argv, cwd, text=""):
    """`python *argv`, forked, with this text as its input → exit code, output, errors."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        files[0].write_text(text)
        process = forked(interpreter, [*map(str, argv)], str(cwd), files)
        process.join(TIMEOUT)
        late = process.is_alive()
        process.kill()
        process.join()
        out, err = (file.read_text() for file in files[1:])
    assert not late, f"still running after {TIMEOUT} s\n{out}\n{err}"
    return process.exitcode, out, err


def interpreter(argv, cwd, files):
    """What `python *argv` does, after its start."""
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    make_small()
    sys.modules["matplotlib"] = None  # not installed: a report without figures takes a quarter less of a small run
    sys.path[:] = [str(ROOT), *(p for p in sys.path if not Path(p).is_relative_to(ROOT / "tests"))]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def make_small():
    """SMALLER, in this process; before a script is imported, which copies some of it."""
    for module, name, n in SMALLER:
        setattr(import_module(module), name, n)


if __name__ == "__main__":  # python processes.py SCRIPT ...: in a new interpreter what `run` forks
    make_small()
    sys.path[0] = str(ROOT)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
