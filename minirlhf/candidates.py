"""Several answers of a model to each prompt, ready for ranking: JSON lines with `prompt` and `responses` on stdout.

    python -m minirlhf.candidates runs/sft/final --k 4 --prompts prompts.txt > tasks.jsonl

The answers to a prompt are different and not blank: an answer that came before, or is blank, is drawn again. Which are
drawn depends on the model, the flags and the prompt's place in the file, not on the other prompts.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from minirlhf import review_world, stage
from minirlhf.chat import before, open_folder, options, sampling
from minirlhf.data import decode, left_padded
from minirlhf.errors import DataError, UsageError, tool
from minirlhf.formats import read_records
from minirlhf.generate import generate
from minirlhf.label.store import MAX_ANSWERS, MIN_ANSWERS
from minirlhf.pretrained import load_causal_lm
from minirlhf.records import asked
from minirlhf.rng import generator

ROUNDS = 8  # of K answers each, before a prompt that has not K different ones goes with those it has
AT_ONCE = 128  # answers of one forward


def read_prompts(path: str, language: str) -> list[str]:
    """The prompts of a file, or of the built-in task."""
    if not path:
        return review_world.prompts(language)
    records = read_records(path)[0]
    talks = [record.line for record in records if not isinstance(asked(record), str)]
    if talks:
        raise DataError(f"{path}:{talks[0]}: more than one turn, for which ranked lists have no place; leave it out")
    prompts = [record.prompt for record in records]
    if not all(prompts):
        raise DataError(f"{path}: its records have no prompts; give one prompt a line, or JSON lines with a prompt")
    return prompts


def candidates(
    loaded: stage.Loaded,
    prompts: Sequence[str],
    k: int,
    sampling: dict[str, Any],
    seed: int,
    device: str = "cpu",
    stops: Sequence[str] = (),  # an answer ends before the first of these
) -> Iterator[list[str]]:
    """For each prompt up to k different answers, in the order in which they were drawn."""
    encoded = [loaded.template.prompt_ids(loaded.tokenizer, prompt) for prompt in prompts]
    room = loaded.model.config.max_seq_len - sampling["max_new_tokens"]
    for row, ids in enumerate(encoded):
        if not 0 < len(ids) <= room:
            raise DataError(f"prompt {row + 1}: {len(ids)} tokens; 1 to {room} leave room for an answer")
    size = max(1, AT_ONCE // k)

    def over(tokens: list[int]) -> bool:
        text = loaded.tokenizer.decode(tokens)
        return before(text, stops) != text

    stop = over if stops else None
    for first in range(0, len(prompts), size):
        found: dict[int, list[str]] = {row: [] for row in range(first, min(first + size, len(prompts)))}
        for turn in range(ROUNDS):
            rows = [row for row, answers in found.items() if len(answers) < k]
            if not rows:
                break
            padded = left_padded([encoded[row] for row in rows], sampling["pad_token_id"], device)
            rngs = [generator(seed, "candidates", row, turn * k + i) for row in rows for i in range(k)]
            made = generate(loaded.model, *padded, num_return_sequences=k, rng=rngs, stop=stop, **sampling)
            texts = [before(text, stops) for text in decode(made.tokens, made.mask, loaded.tokenizer)]
            for i, row in enumerate(rows):
                new = dict.fromkeys(text for text in texts[i * k : (i + 1) * k] if text.strip())
                found[row] += [text for text in new if text not in found[row]]
        yield from (answers[:k] for answers in found.values())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.candidates", allow_abbrev=False)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="folder of a model")
    add("--k", type=int, default=4, help=f"answers to each prompt, {MIN_ANSWERS} to {MAX_ANSWERS} (default 4)")
    add("--prompts", default="", metavar="FILE", help="a prompt a line, or any format with prompts; default: built-in")
    add("--language", default="en", choices=("en", "zh"), help="of the built-in prompts (default en)")
    return options(parser, argv, greedy=False, k=(MIN_ANSWERS, MAX_ANSWERS))


def run(args: argparse.Namespace) -> str:
    """Lines on stdout; what there is to say about them."""
    loaded = open_folder(args.folder, load_causal_lm, template=args.template, device=args.device)
    prompts = read_prompts(args.prompts, args.language)
    how = sampling(loaded, args, args.folder)
    counts = {"tasks": 0, "with fewer answers": 0, "prompts left out": 0}
    try:
        for prompt, answers in zip(
            prompts, candidates(loaded, prompts, args.k, how, args.seed, args.device, args.stop), strict=True
        ):
            if len(answers) < MIN_ANSWERS:
                counts["prompts left out"] += 1
                continue
            counts["tasks"] += 1
            counts["with fewer answers"] += len(answers) < args.k
            print(json.dumps({"prompt": prompt, "responses": answers}, ensure_ascii=False))  # noqa: T201
    except DataError as e:
        raise DataError(f"{args.prompts or 'built-in prompts'}: {e}") from e
    if not counts["tasks"]:
        raise UsageError(
            f"{args.folder}: no prompt has {MIN_ANSWERS} different answers; raise --temperature or --max_new_tokens"
        )
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n)


@tool(options=("template",))
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line on stderr and its exit code."""
    args = parse(argv)
    print(run(args), file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
