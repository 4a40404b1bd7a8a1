"""Records → tensors. The order of rows is a function of (seed, epoch), rows of one forward have similar lengths.

Truncation never makes a label that is not in the text: an answer cut in SFT loses its EOS label, a preference list that
is too long is left out whole, and both are counted.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirlhf import dist
from minirlhf.errors import DataError, UsageError, UserError
from minirlhf.records import Question
from minirlhf.rng import generator
from minirlhf.templates import Template
from minirlhf.tokenizer import Tokenizer


class Example(NamedTuple):
    """One sequence of SFT."""

    ids: list[int]
    trained: list[bool]  # True where the token is a label
    weight: float = 1.0  # of its loss; below 0: to be unlearnt
    lengths: tuple[int, ...] = ()  # of the texts that share the row, see `pack`; empty: it is one


class RankedList(NamedTuple):
    """K answers to one prompt, each with its prompt before it."""

    sequences: list[list[int]]
    ranks: list[int]  # 1 = best, ties allowed, 0 = absent
    grades: Sequence[float] = ()  # one per answer, where the data has them


class Pair(NamedTuple):
    """Two answers to one prompt."""

    better: Example
    worse: Example


class Batch(NamedTuple):
    """Right-padded rows."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) bool
    trained: Tensor  # (B, T) bool, True where input_ids is a label
    texts: Tensor | None = None  # (B, T) int, which of a row's texts a token belongs to; None: each row is one


def step_rows(n: int, size: int, step: int, *, seed: int) -> list[int]:
    """Rows of the step-th batch (from 0) out of n: the epochs' permutations laid end to end and cut into batches."""
    rows = []
    for position in range(step * size, (step + 1) * size):
        epoch, index = divmod(position, n)
        rows.append((epoch, index))
    orders = {e: torch.randperm(n, generator=generator(seed, "order", e)).tolist() for e in {e for e, _ in rows}}
    return [orders[epoch][index] for epoch, index in rows]


def by_length(rows: Sequence[int], size: int, length: Callable[[int], int]) -> list[list[int]]:
    """Cut rows into groups of `size` of similar length, so that padding is short."""
    ordered = sorted(rows, key=length)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def cut(n: int, size: int) -> list[list[int]]:
    """Positions 0 … n - 1 in groups of at most `size`, as many for each of W ranks, in turn; rank r has r, r + W, …

    Every rank runs as many forwards as the others, so that none waits for one that does not come.
    """
    W, k = dist.world_size(), _forwards(n, size)
    if n // W < k:
        raise UsageError(f"{n} rows of a step are too few for {W} ranks at microbatch_size {size}; raise one of them")
    rows = [range(r, n, W) for r in range(W)]
    return [list(mine[len(mine) * j // k : len(mine) * (j + 1) // k]) for j in range(k) for mine in rows]


def _forwards(n: int, size: int) -> int:
    """Of each rank, for n rows."""
    return -(-n // (dist.world_size() * size))


def microbatches(rows: Sequence[int], size: int, length: Callable[[int], int]) -> list[list[int]]:
    """This rank's rows of an optimizer step, in groups of at most `size` rows of similar length."""
    ordered = sorted(rows, key=length)
    return dist.mine([[ordered[i] for i in group] for group in cut(len(ordered), size)])


def pad(
    rows: Sequence[Sequence[Any]], value: Any, *, left: bool = False, device: str | torch.device = "cpu"
) -> Tensor:  # (B, T)
    """Rows of unequal length as one tensor."""
    width = max(map(len, rows))
    fill = ([value] * (width - len(row)) for row in rows)
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in zip(rows, fill, strict=True)], device=device)


def left_padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: str = "cpu"
) -> tuple[Tensor, Tensor]:  # (B, P) int64, (B, P) bool
    """Prompts, ready for sampling."""
    ids = pad(rows, pad_id, left=True, device=device)
    return ids, pad([[True] * len(row) for row in rows], False, left=True, device=device)


def decode(ids: Tensor, mask: Tensor, tokenizer: Tokenizer) -> list[str]:  # (B, T), (B, T)
    """The text of the real tokens of every row, special tokens left out."""
    return [tokenizer.decode(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]


def collate(examples: Sequence[Example], device: str = "cpu") -> Batch:
    """Right-padded rows of SFT; id 0 stands in the padding, which no mask shows."""
    real = pad([[True] * len(e.ids) for e in examples], False, device=device)
    ids = pad([e.ids for e in examples], 0, device=device)
    trained, texts = pad([e.trained for e in examples], False, device=device), None
    if any(e.lengths for e in examples):
        number = [[k for k, n in enumerate(e.lengths or (len(e.ids),)) for _ in range(n)] for e in examples]
        texts = pad(number, 0, device=device)
    return Batch(ids, real, trained, texts)


def pack(examples: Sequence[Example], room: int, size: int = 1) -> list[Example]:
    """Short texts one after another in rows of at most `room` tokens, each in the first row that has room for it, the
    longest before the others. Texts of unequal weight do not share a row, and none sees another: see `Trunk`.

    Some texts get rows of their own where all ranks together could not run the rows, `size` at a time, otherwise.
    """
    rows: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        fits = (r for r in rows if r[0].weight == example.weight and sum(len(e.ids) for e in [*r, example]) <= room)
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(example)
    while len(rows) // dist.world_size() < _forwards(len(rows), size) and len(longest := max(rows, key=len)) > 1:
        rows.append([longest.pop()])
    return [_joined(row) if len(row) > 1 else row[0] for row in rows]


def _joined(row: Sequence[Example]) -> Example:
    """One example of several; no text's first token is a label, since nothing of its own stands before it."""
    ids = [token for e in row for token in e.ids]
    trained = [on and t > 0 for e in row for t, on in enumerate(e.trained)]
    return Example(ids, trained, row[0].weight, tuple(len(e.ids) for e in row))


def encode_sft(
    records: Sequence[Any],  # prompt, response, and turns of a conversation
    tokenizer: Tokenizer,
    template: Template,
    max_length: int,
) -> tuple[list[Example], dict[str, int]]:
    """Records → examples, a sequence too long cut at its end; and how many were cut, or lost every label."""
    examples, counts = [], {"cut": 0, "no_label": 0}
    for record in records:
        turns = getattr(record, "turns", ())
        try:
            encoded = (
                template.encode_turns(tokenizer, turns)
                if turns
                else template.encode(tokenizer, record.prompt, record.response)
            )
        except UserError as e:  # such as turns that the template has no place for
            place = f"line {record.line} of the data: " if record.line else ""
            raise type(e)(f"{place}{e}") from e
        ids, trained = encoded[0][:max_length], encoded[1][:max_length]
        counts["cut"] += len(ids) < len(encoded[0])
        if any(trained[1:]):  # the first token has no token before it to be predicted from
            examples.append(Example(ids, trained, getattr(record, "weight", 1.0)))
        else:
            counts["no_label"] += 1
    if not examples:
        raise DataError(f"no record keeps a trained token within data.max_length {max_length}")
    return examples, counts


def encode_lists(
    records: Sequence[Any],  # prompt, responses, ranks
    tokenizer: Tokenizer,
    template: Template,
    max_length: int,
) -> tuple[list[RankedList], dict[str, int]]:
    """Ranked lists → token lists; one with an answer that is too long is left out whole, and counted."""
    lists, counts = [], {"too_long": 0}
    for record in records:
        prompt = template.prompt_ids(tokenizer, record.prompt)
        sequences = [prompt + template.response_ids(tokenizer, response) for response in record.responses]
        if max(map(len, sequences)) > max_length:
            counts["too_long"] += 1
        else:
            lists.append(RankedList(sequences, list(record.ranks), getattr(record, "grades", ())))
    if not lists:
        raise DataError(f"no list fits into data.max_length {max_length}")
    return lists, counts


def side_by_side(lists: Sequence[RankedList], size: int, *, seed: int) -> list[RankedList]:
    """Graded answers, whatever their prompts, drawn together in lists of at most `size` and ranked by grade; lists of
    one grade say nothing and are left out."""
    flat = [answer for one in lists for answer in zip(one.sequences, one.grades, strict=True)]
    order = torch.randperm(len(flat), generator=generator(seed, "side_by_side")).tolist()
    made = []
    for first in range(0, len(flat), size):
        sequences, grades = zip(*(flat[i] for i in order[first : first + size]), strict=True)
        if len(set(grades)) > 1:
            made.append(RankedList(list(sequences), [1 + sum(g > own for g in grades) for own in grades], grades))
    return made


def encode_pairs(
    records: Sequence[Any],  # prompt, responses, ranks
    tokenizer: Tokenizer,
    template: Template,
    max_length: int,
) -> tuple[list[Pair], dict[str, int]]:
    """Ranked lists → their strict pairs; a list with an answer that is too long is left out whole, and counted."""
    pairs, counts = [], {"too_long": 0}
    for record in records:
        made = [Example(*template.encode(tokenizer, record.prompt, response)) for response in record.responses]
        if max(len(example.ids) for example in made) > max_length:
            counts["too_long"] += 1
            continue
        present = [(rank, example) for rank, example in zip(record.ranks, made, strict=True) if rank > 0]
        pairs += [Pair(a, b) for i, a in present for j, b in present if i < j]
    if not pairs:
        raise DataError(f"no pair fits into data.max_length {max_length}")
    return pairs, counts


def encode_prompts(
    prompts: Sequence[Question],
    tokenizer: Tokenizer,
    template: Template,
    max_length: int,  # prompt tokens that leave room for the answer
) -> tuple[list[Question], list[list[int]], dict[str, int]]:
    """Prompts → those that fit, and their token lists; over-long ones are left out and counted."""
    encoded = [template.prompt_ids(tokenizer, prompt) for prompt in prompts]
    kept = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= max_length]
    if not kept:
        raise DataError(f"no prompt has between 1 and {max_length} tokens, which leave room for sample.max_new_tokens")
    counts = {"too_long": sum(len(ids) > max_length for ids in encoded), "empty": sum(not ids for ids in encoded)}
    return [prompts[i] for i in kept], [encoded[i] for i in kept], counts
