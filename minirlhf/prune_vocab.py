"""A smaller vocabulary for a model: only the tokens that a corpus, or another tokenizer, needs.

Of BLOOM-560m's 559 million parameters 257 million are its embedding, for languages that one may never use. Rows that
are kept stay as they are, so that a text made of kept tokens has the logits it had, without the columns that are gone.

What goes wrong: byte-pair encoding reaches a long token over shorter ones. A merge whose result is dropped is never
made again, and everything built on it falls apart; therefore the way to each kept token is kept with it.

    python -m minirlhf.prune_vocab MODEL OUT --corpus texts.jsonl [more.txt ...]
    python -m minirlhf.prune_vocab MODEL OUT --tokenizer FOLDER
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
import torch

from minirlhf.adapt import META, read_meta
from minirlhf.errors import CheckpointError, UsageError, tool
from minirlhf.formats import read_records
from minirlhf.model import CausalLM
from minirlhf.pretrained import load_causal_lm, save_pretrained
from minirlhf.run import write_json
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

Json = dict[str, Any]


# ---- which tokens ---------------------------------------------------------------------------------------------------


def needed(full: Json, spellings: Iterable[str]) -> list[str]:
    """Spellings of a tokenizer.json, in the order of their ids: these, what leads to them, what any text may need
    (single characters, bytes), and the added tokens."""
    model, vocab = full["model"], vocabulary(full)
    kept = {token["content"] for token in full["added_tokens"]} | set(spellings) | {model.get("unk_token")}
    if model["type"] == "BPE":
        kept |= {token for token in vocab if len(token) == 1 or (token.startswith("<0x") and token.endswith(">"))}
        ranks = {pair: rank for rank, pair in enumerate(merges(model))}
        for token in list(kept & vocab.keys()):
            kept.update(way_to(token, ranks))
    return sorted(kept & vocab.keys(), key=vocab.__getitem__)


def vocabulary(full: Json) -> dict[str, int]:
    """Spelling → id, added tokens included. Raises CheckpointError for a model without a plain table of tokens."""
    if full["model"]["type"] not in ("BPE", "WordLevel"):
        raise CheckpointError(
            f"tokenizer.json: a {full['model']['type']} model cannot be pruned; BPE and WordLevel can"
        )
    return full["model"]["vocab"] | {token["content"]: token["id"] for token in full["added_tokens"]}


def merges(model: Json) -> list[tuple[str, str]]:
    """Pairs in the order in which they are tried; files write them as "a b" or as ["a", "b"]."""
    return [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]


def way_to(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """Every token that byte-pair encoding passes through when it reads this one's spelling."""
    parts, seen = list(token), set(token)
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == best:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
        seen.update(parts)
    return seen


# ---- the smaller tokenizer and model --------------------------------------------------------------------------------


def pruned_tokenizer(full: Json, kept: Sequence[str]) -> Json:
    """The tokenizer.json of these tokens, numbered in their order."""
    ids, model = {token: i for i, token in enumerate(kept)}, dict(full["model"])
    model["vocab"] = {token: ids[token] for token in model["vocab"] if token in ids}
    if model["type"] == "BPE":
        model["merges"] = [[a, b] for a, b in merges(model) if {a, b, a + b} <= ids.keys()]
    added = [token | {"id": ids[token["content"]]} for token in full["added_tokens"]]
    return full | {"model": model, "added_tokens": added, "post_processor": renumbered(full["post_processor"], ids)}


def renumbered(processor: Any, ids: dict[str, int]) -> Any:
    """A post-processor with the new ids of the special tokens it adds."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        return processor | {"processors": [renumbered(one, ids) for one in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        tokens = {
            name: token | {"ids": [ids[spelling] for spelling in token["tokens"]]}
            for name, token in processor["special_tokens"].items()
        }
        return processor | {"special_tokens": tokens}
    raise CheckpointError(f"tokenizer.json: a post-processor of type {processor['type']} cannot be renumbered")


def pruned_model(model: CausalLM, rows: Sequence[int], token_ids: Json) -> CausalLM:
    """The model with these rows of its embedding and head; a tied head stays tied."""
    config = replace(model.config, vocab_size=len(rows), **token_ids)
    with torch.device("meta"):
        small = CausalLM(config)
    weights, index = model.state_dict(), torch.tensor(rows)
    for name in ("trunk.embed.weight", "head.weight"):
        if name in weights:
            weights[name] = weights[name][index]
    small = small.to_empty(device="cpu")
    small.load_state_dict(weights)
    small.tie()
    return small.eval()


# ---- the command ----------------------------------------------------------------------------------------------------


def texts_of(paths: Sequence[str]) -> list[str]:
    """Every text of the data files."""
    found: list[str] = []
    for path in paths:
        for record in read_records(path)[0]:
            turns = [text for _, text in getattr(record, "context", ())]  # templates tokenise each by itself
            answers = getattr(record, "responses", None) or [getattr(record, "response", "")]
            found += [text for text in (record.prompt, *turns, *answers) if text]
    return found


def prune(folder: str, out: str, corpus: Sequence[str], wanted_of: str | None) -> str:
    """Load, choose, cut, check, save; what came out, in a line. Texts count as they are and within the template."""
    if Path(out).exists():
        raise UsageError(f"{out}: exists; choose a new folder")
    model, tokenizer, meta = load_causal_lm(folder), Tokenizer.load(folder), read_meta(Path(folder))
    template = get_template(str(meta.get("template", "plain")))
    full: Json = json.loads(tokenizer.to_json())
    old = vocabulary(full)
    bare = ["", *texts_of(corpus)]
    texts = list(dict.fromkeys([*bare, *(text for one in bare for text in template.around(one))]))
    wanted = {tokenizer.id_to_token(i) or "" for text in texts for i in tokenizer.encode(text)}
    if wanted_of is not None:
        wanted = set(vocabulary(json.loads(Tokenizer.load(wanted_of).to_json())))
        foreign = sorted(wanted - old.keys())
        if foreign:
            raise CheckpointError(f"{wanted_of}: {len(foreign)} tokens are not the model's, such as {foreign[0]!a}")
    kept = needed(full, wanted)
    smaller = json.dumps(pruned_tokenizer(full, kept))
    new = Tokenizer(tokenizers.Tokenizer.from_str(smaller), tokenizer.names, tokenizer.chat_template)
    for text in texts:
        if [kept[i] for i in new.encode(text)] != [tokenizer.id_to_token(i) for i in tokenizer.encode(text)]:
            raise CheckpointError(f"{folder}: {text[:40]!a} would be read as other tokens; its merges are irregular")
    token_ids = {f"{name}_token_id": getattr(new, f"{name}_id") for name in ("bos", "eos", "pad")}
    small = pruned_model(model, [old[token] for token in kept], token_ids)
    save_pretrained(small, out, tokenizer=new, stop_token_id=template.stop_token_id(new) if meta else None)
    if meta:
        write_json(Path(out) / META, meta)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return f"{out}: {len(kept):,} of {model.config.vocab_size:,} tokens, {after:,} of {before:,} parameters"


@tool()
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line on stderr and its exit code."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.prune_vocab", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="folder of a causal language model")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help="texts whose tokens are kept")
    source.add_argument("--tokenizer", metavar="FOLDER", help="a tokenizer whose tokens are kept")
    args = parser.parse_args(argv)
    print(prune(args.model, args.out, args.corpus, args.tokenizer))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
