"""Data before training, JSON lines in and out: mixing, splitting, what judges disagree on, pairs of scores, ratings.

    python -m minirlhf.prepare mix answers.jsonl texts.jsonl:0.2 --cap 5000 --by task > mixed.jsonl
    python -m minirlhf.prepare split answers.jsonl --by user --share 0.1 --train train.jsonl --held_out test.jsonl
    python -m minirlhf.prepare conflicts pairs.jsonl
    python -m minirlhf.prepare pairs scored.jsonl --margin 0.5 > pairs.jsonl      lines of minirlhf.score
    python -m minirlhf.prepare elo pairs.jsonl > rated.jsonl

Rows keep every field that they have. The same input and seed give the same output.
"""

import argparse
import hashlib
import json
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from minirlhf.errors import DataError, UsageError, tool
from minirlhf.formats import read_records
from minirlhf.readers import LARGEST, is_score
from minirlhf.rows import objects

Row = dict[str, Any]
K_FACTOR, SCALE, START = 32.0, 400.0, 1000.0  # of Elo 1978, section 1.6 and 8.4


def rows_of(path: str) -> tuple[list[Row], list[str]]:
    """The JSON objects of a file, one a line, and the PATH:LINE of each. Raises DataError for a line that is none."""
    rows, places = [], []
    for line, row in objects(path):
        rows.append(row)
        places.append(f"{path}:{line}")
    if not rows:
        raise DataError(f"{path}: holds no row")
    return rows, places


def mix(sources: Sequence[tuple[Sequence[Row], float]], *, by: str, cap: int, seed: int) -> list[Row]:
    """Rows of all sources in random order: of weight w, ⌊w⌋ times all and a random share w - ⌊w⌋ of them. Of the rows
    with one value of the field `by`, and of those of one source without it, a random `cap` are kept; 0: all."""
    rng = random.Random(seed)
    groups: dict[Hashable, list[Row]] = defaultdict(list)
    for place, (rows, weight) in enumerate(sources):
        whole = math.floor(weight)
        part = rng.sample(range(len(rows)), round((weight - whole) * len(rows)))
        for row in [*list(rows) * whole, *(rows[i] for i in sorted(part))]:
            groups[json.dumps(row[by], sort_keys=True) if by in row else place].append(row)
    mixed = [row for rows in groups.values() for row in (rng.sample(rows, cap) if 0 < cap < len(rows) else rows)]
    rng.shuffle(mixed)
    return mixed


def split(
    rows: Sequence[Row],
    *,
    by: str,
    share: float,
    seed: int,
    places: Sequence[str] = (),  # PATH:LINE of each row, for errors
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows. All rows with one value of the field `by` go the same way, in this file and in any
    other, so that nothing of a user or of a prompt leaks. Raises DataError for a row without it."""
    kept: tuple[list[Row], list[Row]] = [], []
    for i, row in enumerate(rows):
        if by not in row:
            raise DataError(f"{_place(places, i)}: has no field {by!r} to split by")
        digest = hashlib.sha256(f"{seed}/{json.dumps(row[by], sort_keys=True)}".encode()).digest()
        kept[int.from_bytes(digest[:8], "big") < share * 2**64].append(row)
    return kept


def _place(places: Sequence[str], i: int) -> str:
    return places[i] if places else f"row {i + 1}"


Game = tuple[str, str, str]  # prompt, better answer, worse answer


def games(records: Iterable[Any]) -> Iterator[Game]:
    """Every pair of ranked answers that are not tied, in the order of the file."""
    for record in records:
        answers = [(r, a) for r, a in zip(record.ranks, record.responses, strict=True) if r]
        for (i, a), (j, b) in combinations(answers, 2):
            if i != j:
                yield (record.prompt, a, b) if i < j else (record.prompt, b, a)


def conflicts(played: Iterable[Game]) -> list[Row]:
    """Pairs of answers of which each has been called the better, and how often."""
    wins = Counter(played)
    return [
        {"prompt": p, "responses": [a, b], "wins": [n, wins[p, b, a]]}
        for (p, a, b), n in wins.items()
        if a < b and (p, b, a) in wins
    ]


def pairs(
    rows: Sequence[Row],
    *,
    margin: float,
    places: Sequence[str] = (),  # PATH:LINE of each row, for errors
) -> list[Row]:
    """Scored answers → for each prompt every pair whose scores differ by more than `margin`, and by how much."""
    answers: dict[str, dict[str, float]] = defaultdict(dict)
    for i, row in enumerate(rows):
        place = _place(places, i)
        prompt, response, score = (row.get(name) for name in ("prompt", "response", "score"))
        if not isinstance(prompt, str) or not isinstance(response, str) or not is_score(score):
            raise DataError(
                f"{place}: needs prompt, response and a number up to {LARGEST:.0e} as score, as minirlhf.score gives"
            )
        if answers[prompt].setdefault(response, float(score)) != score:  # type: ignore[arg-type]
            raise DataError(f"{place}: the same answer to the same prompt had another score before")
    found = []
    for prompt, scores in answers.items():
        for (a, x), (b, y) in combinations(scores.items(), 2):
            if abs(x - y) > margin:
                chosen, rejected = (a, b) if x > y else (b, a)
                found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": abs(x - y)})
    return found


def elo(played: Iterable[Game]) -> list[Row]:
    """Ratings of the answers to each prompt (Elo 1978): R ← R + K (S - E) game by game, E = 1/(1 + 10^((R' - R)/400)),
    S = 1 for the better, K = 32, R = 1000 at first."""
    ratings: dict[str, dict[str, float]] = defaultdict(dict)
    for prompt, better, worse in played:
        R = ratings[prompt]
        high, low = R.setdefault(better, START), R.setdefault(worse, START)
        surprise = 1 - 1 / (1 + 10 ** ((low - high) / SCALE))
        R[better], R[worse] = high + K_FACTOR * surprise, low - K_FACTOR * surprise
    return [{"prompt": p, "response": a, "elo": r} for p, R in ratings.items() for a, r in R.items()]


def weighted(argument: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT."""
    path, colon, number = ("", "", "") if Path(argument).exists() else argument.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        return argument, 1.0
    if not 0 < weight <= 1000:
        raise UsageError(f"{argument}: the weight must be above 0 and at most 1000")
    return (path if colon else argument), weight


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.prepare", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, words: str, files: str = "", *, seeded: bool = False) -> Any:
        made = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        made.add_argument("files", nargs=files or None, metavar="FILE")
        if seeded:
            made.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
        return made.add_argument

    add = command("mix", "files together, FILE:WEIGHT for more or less of one", "+", seeded=True)
    add("--by", default="", metavar="FIELD", help="what --cap counts by (default: the file)")
    add("--cap", type=int, default=0, help="rows of one value at most; 0: all (default)")
    add = command("split", "training and held-out rows, by groups", seeded=True)
    add("--by", required=True, metavar="FIELD", help="rows with one value of it stay together")
    add("--share", type=float, default=0.1, help="of the groups that are held out (default 0.1)")
    add("--train", required=True, metavar="OUT", help="file to write")
    add("--held_out", required=True, metavar="OUT", help="file to write")
    add = command("pairs", "pairs of scored answers with their margins")
    add("--margin", type=float, default=0.0, help="scores must differ by more (default 0)")
    for name, words in (("conflicts", "pairs that were judged both ways"), ("elo", "ratings of ranked answers")):
        add = command(name, words)
        add("--format", default="auto", help="the file's format (default: told from its rows)")
        add("--on_bad_row", default="error", choices=("error", "drop"), help="what a bad row does (default error)")
    args = parser.parse_args(argv)
    if args.command == "split" and Path(args.train).resolve() == Path(args.held_out).resolve():
        parser.error("--train and --held_out are the same file")
    for name, low, high in (("cap", 0, 2**31), ("share", 0.0, 1.0), ("margin", 0.0, 1e30)):
        if not low <= getattr(args, name, low) <= high:
            parser.error(f"--{name} {getattr(args, name)} is out of range")
    return args


def run(args: argparse.Namespace) -> tuple[list[Row], str]:
    """Rows for stdout, and what there is to say about them."""
    if args.command == "mix":
        sources = [(rows_of(path)[0], weight) for path, weight in map(weighted, args.files)]
        if args.by and not any(args.by in row for rows, _ in sources for row in rows):
            raise DataError(f"no row of {', '.join(args.files)} has a field {args.by!r} to count by")
        mixed = mix(sources, by=args.by, cap=args.cap, seed=args.seed)
        return mixed, f"{len(mixed)} of {sum(len(rows) for rows, _ in sources)} rows"
    if args.command == "split":
        rows, places = rows_of(args.files)
        both = split(rows, by=args.by, share=args.share, seed=args.seed, places=places)
        for path, part in zip((args.train, args.held_out), both, strict=True):
            with open(path, "w", encoding="utf-8") as out:
                out.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in part)
        return [], f"{len(both[0])} rows in {args.train}, {len(both[1])} in {args.held_out}"
    if args.command == "pairs":
        rows, places = rows_of(args.files)
        made = pairs(rows, margin=args.margin, places=places)
        return made, f"{len(made)} pairs"
    records, _ = read_records(args.files, format=args.format, on_bad_row=args.on_bad_row)
    if not records or not hasattr(records[0], "ranks"):
        raise DataError(f"{args.files}: holds no preferences")
    played = list(games(records))
    found = conflicts(played) if args.command == "conflicts" else elo(played)
    return found, f"{len(found)} {'conflicts' if args.command == 'conflicts' else 'answers'} in {len(played)} pairs"


@tool(os_error=UsageError.exit_code, options=("format", "on_bad_row"))
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line on stderr and its exit code."""
    args = parse(argv)
    rows, words = run(args)
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))  # noqa: T201
    sys.stdout.flush()
    print(words, file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
