"""What a reward model says of the answers of a data file: JSON lines on stdout, a summary on stderr.

    python -m minirlhf.score runs/rm/final answers.jsonl > scores.jsonl
    python -m minirlhf.score runs/rm/final < answers.jsonl

Every format that `formats` reads. Of ranked answers, pairs among them, the summary also tells how often the model
agrees with the ranks. From Python: `reward_of(folder)`.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from minirlhf.chat import open_folder
from minirlhf.data import encode_lists
from minirlhf.errors import DataError, NonFiniteError, UserError, tool
from minirlhf.evaluate import ranking_accuracy, score_sequences, text_ids
from minirlhf.formats import read_records
from minirlhf.pretrained import load_reward_model
from minirlhf.records import asked


def reward_of(folder: str, *, template: str = "", device: str = "cpu") -> Callable[..., list[float]]:
    """The reward model of a folder as a function (prompts, responses) → scores, to build a `reward.fn` of: sums with
    weights, the lowest of several models, models with another tokenizer, template or size than the policy's. Each rank
    asks about its own answers. A text that was cut ends here like any other; one that is too long is read to where
    the model's positions end."""
    model, tokenizer, words = open_folder(folder, load_reward_model, template=template, device=device)

    @torch.no_grad()
    def scores(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        sequences = text_ids(model, tokenizer, words, prompts, responses)
        return score_sequences(model, sequences, 64, device).tolist() if sequences else []

    return scores


def read(args: argparse.Namespace) -> tuple[list[Any], Any]:
    """Records of the file, or of what is piped in, which is kept in a file until it is whole."""
    how = {"format": args.format, "on_bad_row": args.on_bad_row}
    if args.path != "-":
        return read_records(args.path, **how)
    with tempfile.NamedTemporaryFile() as piped:
        shutil.copyfileobj(sys.stdin.buffer, piped)
        piped.flush()
        try:
            return read_records(piped.name, **how)
        except DataError as e:
            raise DataError(str(e).replace(piped.name, "-")) from e


def answers(record: Any) -> list[dict[str, Any]]:
    """The answers of a record, each as the line that its score will join."""
    if hasattr(record, "ranks"):
        rows = zip(record.responses, record.ranks, strict=True)
        return [{"prompt": record.prompt, "response": text, "rank": rank} for text, rank in rows]
    if hasattr(record, "response"):
        label = {"label": record.label} if hasattr(record, "label") else {}
        return [{"prompt": record.prompt, "response": record.response, **label}]
    return []


@torch.no_grad()
def scored(loaded: Any, records: Sequence[Any], device: str, path: str) -> list[dict[str, Any]]:
    """One line per answer; an answer that is longer than the model reads is refused."""
    lines, sequences = [], []
    for record in records:
        try:
            prompt = loaded.template.prompt_ids(loaded.tokenizer, asked(record))
        except UserError as e:  # turns that the template has no place for
            raise type(e)(f"{path}:{record.line}: {e}") from e
        for line in answers(record):
            ids = prompt + loaded.template.response_ids(loaded.tokenizer, line["response"])
            if len(ids) > loaded.model.config.max_seq_len:
                raise DataError(
                    f"{path}:{record.line}: {len(ids)} tokens, more than the model's "
                    f"{loaded.model.config.max_seq_len}; shorten the row or leave it out"
                )
            lines.append(line)
            sequences.append(ids)
    scores = score_sequences(loaded.model, sequences, 64, device).tolist() if lines else []
    if not all(map(math.isfinite, scores)):
        raise NonFiniteError("the reward model's scores are NaN or infinite")
    return [{**line, "score": score} for line, score in zip(lines, scores, strict=True)]


def summary(loaded: Any, records: Sequence[Any], lines: Sequence[dict[str, Any]], device: str) -> str:
    """Count, mean, deviation; agreement with the ranks where there are some."""
    scores = [line["score"] for line in lines]
    words = (
        f"{len(scores)} answers, score mean {statistics.fmean(scores):.3f}, deviation {statistics.pstdev(scores):.3f}"
    )
    ranked = [record for record in records if hasattr(record, "ranks")]
    if ranked:
        lists, _ = encode_lists(ranked, loaded.tokenizer, loaded.template, loaded.model.config.max_seq_len)
        found = ranking_accuracy(loaded.model, lists, 64, device)
        words += (
            f"; agrees with {found['accuracy']:.3f} of {found['pairs']} pairs "
            f"(95 % interval {found['accuracy_low']:.3f} to {found['accuracy_high']:.3f})"
        )
    return words


@tool(os_error=DataError.exit_code, options=("format", "on_bad_row", "template"))
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line on stderr and its exit code."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.score", allow_abbrev=False)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="folder of a reward model")
    add("path", metavar="FILE", nargs="?", default="-", help="answers, in a format of `formats` (default: stdin)")
    add("--format", default="auto", help="the file's format (default: told from its rows)")
    add("--on_bad_row", default="error", choices=("error", "drop"), help="what a bad row does (default error)")
    add("--template", default="", help="prompt template (default: the model's own)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    args = parser.parse_args(argv)
    loaded = open_folder(args.folder, load_reward_model, template=args.template, device=args.device)
    records, found = read(args)
    lines = scored(loaded, records, args.device, args.path)
    if not lines:
        raise DataError(f"{args.path}: holds no answers to score")
    for line in lines:
        print(json.dumps(line, ensure_ascii=False))  # noqa: T201
    sys.stdout.flush()
    dropped = f"; {len(found.dropped)} rows left out" if found.dropped else ""
    print(summary(loaded, records, lines, args.device) + dropped, file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
