"""Rank answers in a browser, and make training data of the labels.

    python -m minirlhf.label TASKS.jsonl --out RANKINGS.jsonl    opens the page at the address it prints
    python -m minirlhf.label RANKINGS.jsonl --agreement          how far the annotators agree
    python -m minirlhf.label RANKINGS.jsonl --export pairs --out PAIRS.jsonl

TASKS has a `prompt` and 2 to 9 `responses` a line; `python -m minirlhf.candidates` makes such a file. RANKINGS is
itself a file that `train_rm.py` reads; an export leaves out what was edited since, skipped, or shown twice.
"""

import argparse
import ipaddress
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from minirlhf.errors import DataError, UsageError, tool
from minirlhf.label.agreement import agreement
from minirlhf.label.server import Server
from minirlhf.label.store import Line, Rankings, current, export, plan, read_labels, read_tasks

T = TypeVar("T")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.label", allow_abbrev=False)
    add = parser.add_argument
    add("path", metavar="FILE", help="tasks to label; with --export or --agreement a file of labels")
    add("--out", default="", metavar="FILE", help="where labels are appended, or what is exported goes")
    add("--port", type=int, default=0, help="port of the page; 0: any that is free (default 0)")
    add("--host", default="127.0.0.1", help="a loopback address (default 127.0.0.1)")
    add("--annotator", default="anonymous", metavar="NAME", help="who is labeling (default anonymous)")
    add("--team", default="", metavar="NAME,NAME", help="all annotators, who then share the tasks")
    add("--overlap", type=float, default=0.15, help="share of the tasks that the whole team sees (default 0.15)")
    add("--repeats", type=float, default=0.0, help="share of the tasks shown a second time (default 0)")
    add("--seed", type=int, default=0, help="seed of the blind order and of who sees what (default 0)")
    add("--export", default="", choices=("ranked", "pairs", "tsv"), help="write training data instead")
    add("--agreement", action="store_true", help="print statistics of the labels instead")
    args = parser.parse_args(argv)
    args.team = tuple(name for name in args.team.split(",") if name)
    if not args.agreement and not args.out:
        parser.error("--out is missing: the file that labels go to")
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port} is no port")
    for name in ("overlap", "repeats"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)} is no share from 0 to 1")
    if not args.annotator.strip() or not args.annotator.isprintable():
        parser.error(f"--annotator {args.annotator!r} is no name")
    if args.team and args.annotator not in args.team:
        parser.error(f"--annotator {args.annotator} is not in --team {','.join(args.team)}")
    return args


def loopback(host: str) -> str:
    """The address, if nobody outside this machine can reach it."""
    try:
        if ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback:
            return host
    except ValueError:
        pass
    raise UsageError(f"--host {host}: only loopback addresses, such as 127.0.0.1; from elsewhere come through ssh -L")


def serve(args: argparse.Namespace) -> None:
    """Until a signal. The first line says where."""
    host = loopback(args.host)
    items = plan(
        read_tasks(args.path), args.annotator,
        team=args.team, overlap=args.overlap, repeats=args.repeats, seed=args.seed,
    )  # fmt: skip
    rankings = Rankings(args.out, args.annotator, items)
    try:
        server = Server(host, args.port, rankings)
    except OSError as e:
        raise UsageError(f"--host {host} --port {args.port}: {e.strerror or e}; choose another port") from e
    say(server.url)
    say(f"{args.annotator}: {rankings.done} of {len(items)} done; open the address in a browser, Ctrl-C ends")
    server.serve_forever()


def say(text: str) -> None:
    """A line on stdout, at once."""
    print(text, flush=True)  # noqa: T201


def of_file(path: str, function: Callable[[list[Line]], T]) -> T:
    """What the function makes of a file's labels; an error of theirs names the file."""
    lines = read_labels(path)
    try:
        return function(lines)
    except DataError as e:
        raise DataError(f"{path}: {e}") from e


def write(args: argparse.Namespace) -> None:
    """--export: complete or not at all."""
    rows = of_file(args.path, partial(export, kind=args.export))
    temporary = Path(f"{args.out}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(row + "\n" for row in rows), encoding="utf-8", newline="")
        os.replace(temporary, args.out)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        raise UsageError(f"--out {args.out}: {e.strerror or e}; choose a file that can be written") from e
    say(f"{args.out}: {len(rows)} rows")


@tool()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line on stderr and its exit code."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.out and all(map(os.path.exists, (args.path, args.out))) and os.path.samefile(args.path, args.out):
        raise UsageError(f"--out {args.out} is the file that is read; choose another")
    if args.agreement:
        found = of_file(args.path, lambda lines: agreement(current(lines)))
        say(json.dumps(found, ensure_ascii=False, indent=1))
    elif args.export:
        write(args)
    else:
        serve(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
