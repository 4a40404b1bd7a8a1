"""Every reader of files under mutated input: `python tests/fuzz.py [--n 100000] [--seed 0] [--only NAME]`.

Good files are broken by bytes, by words that are known to hurt, and by values put into their JSON. Whatever comes out,
a reader gives what it promises or raises a ValueError or OSError of one line that names the file (rows: PATH:LINE),
within a second and within bounded memory. A few thousand inputs of each run in tests/test_fuzz.py.
"""

import argparse
import contextlib
import copy
import faulthandler
import gzip
import io
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save

from minirlhf import checkpoint
from minirlhf.config import PPOConfig, SFTConfig, load_config
from minirlhf.errors import DataError
from minirlhf.formats import FORMATS, Prompt, Ranking, read_records
from minirlhf.heads import RewardModel
from minirlhf.lora import LoRAConfig, adapters, add_adapter, load_adapter, save_adapter
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, load_reward_model, save_pretrained
from minirlhf.rng import generator
from minirlhf.settings import to_dict
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

SECONDS, MEGABYTES = 1.0, 512
WORDS = [
    b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"-1", b"0", b"1.5", b"true", b"null", b'""', b'" "', b"[]", b"{}",
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\\ud800", b"\\udc00\\ud800", b"\\u0000", b"\0", b"\n", b"\r",
    b"\r\n", b"\t", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x1f\x8b", b"\xf0\x9f\x99\x82",
    b"<eos>", b"<unk>", b"{text}", b"\n\nHuman:", b"\n\nAssistant:", b"[" * 3000, b'{"a":' * 3000, b" " * 3000,
    b"A" * 3000, b"\x1b[2J",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 7, 10**30, 0.5, -0.0, 1e308, "", " ", "a", "\n", "\x1b", "x" * 999, "é\u2028", "0",
    [], [None], [1, 2], ["a", "a"], {}, {"a": 1}, {"content": "<eos>"}, [[[[[]]]]], "../x", "/dev/zero", 2**31, 2**63,
]  # fmt: skip


class Target(NamedTuple):
    """One reader: good folders of files, the file that is broken, and what must come out."""

    seeds: list[dict[str, bytes]]
    broken: str
    read: Callable[[Path], None]  # of the folder; raises AssertionError when a promise is broken
    names_line: bool = False  # rows: the message begins with PATH:LINE or PATH


# ---- breaking -------------------------------------------------------------------------------------------------------


def break_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four cuts, flips, copies and insertions."""
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randint(0, len(data)) for _ in range(2))
        j = min(j, i + rng.choice([1, 1, 8, 64, 10**6]))
        kind = rng.randrange(6)
        if kind == 0 and data:
            i = min(i, len(data) - 1)
            data = data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]
        elif kind == 1:
            data = data[:i] + data[j:]
        elif kind == 2:
            data = data[:j] + data[i:j] * rng.randint(1, 3) + data[j:]
        elif kind == 3:
            data = data[:i] + rng.choice(WORDS) + data[i:]
        elif kind == 4:
            data = data[:i] + rng.choice(WORDS) + data[j:]
        else:
            data = data[:i] + rng.randbytes(rng.randint(1, 9)) + data[j:]
    return data


def break_json(text: bytes, rng: random.Random) -> bytes:
    """One to three values of a JSON text replaced, removed, renamed or repeated."""
    root = [json.loads(text)]
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        stack: list[Any] = [root]
        while stack:
            node = stack.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys if isinstance(node[key], dict | list)]
        node, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0 and node is not root:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["", "x", key + "s", "prompt", "text"])] = node.pop(key)
        elif kind == 2:
            other, name = rng.choice(places)
            node[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else None
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))  # it may be broken in its turn
    return json.dumps(root[0], ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def break_file(data: bytes, rng: random.Random) -> bytes:
    """Gzip around or inside the damage; JSON by values where it is JSON; else by bytes."""
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.5:
        return gzip.compress(break_file(gzip.decompress(data), rng), 1)
    if rng.random() < 0.5:
        if data[:1] in b"[{":
            lines = data.split(b"\n") if data[:1] == b"{" and data.count(b"\n{") else [data]
            i = rng.randrange(len(lines))
            try:
                lines[i] = break_json(lines[i], rng)
                return b"\n".join(lines)
            except (ValueError, IndexError, RecursionError):
                pass
        n = int.from_bytes(data[:8], "little")
        if data[8:9] == b"{" and 0 < n < len(data):  # safetensors
            header = break_json(data[8 : 8 + n].rstrip(), rng)
            return len(header).to_bytes(8, "little") + header + data[8 + n :]
    return break_bytes(data, rng)


# ---- what must come out ---------------------------------------------------------------------------------------------


def check_text(text: object, *, blank: bool = False) -> None:
    assert isinstance(text, str), text
    text.encode()
    assert blank or text.strip(), "a blank text"


def read_data(path: Path, name: str) -> None:
    """Both modes; every record keeps the promises of the contract."""
    error = None
    try:
        records, summary = read_records(path, format=name)
        assert not summary.dropped
    except ValueError as e:
        error = e
    try:
        records, summary = read_records(path, format=name, on_bad_row="drop")
        assert summary.read == summary.kept + len(summary.dropped)
        assert (error is None) == (not summary.dropped), (error, summary)
    except ValueError:
        if error is None:
            raise AssertionError("dropping bad rows made it worse") from None
        raise
    for record in records:
        check_record(record)
    if error is not None:
        raise error


def check_record(record: Any) -> None:
    assert record.line >= 1
    if isinstance(record, Prompt):
        check_text(record.prompt)
        return
    check_text(record.prompt, blank=True)
    if isinstance(record, Ranking):
        assert len(record.ranks) == len(record.responses) >= 2
        assert len({rank for rank in record.ranks if rank}) >= 2
        assert all(type(rank) is int and 0 <= rank <= len(record.ranks) for rank in record.ranks)
        for text in record.responses:
            check_text(text)
    else:
        check_text(record.response)
        for role, text in getattr(record, "turns", ()):
            check_text(role)
            check_text(text)


def read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    for text in ("", "how was <eos> the é\n", "<unk><pad> 好"):
        try:
            ids = tokenizer.encode(text)
        except DataError as e:  # about the text, not the file
            if not str(e).startswith("text "):
                raise
            continue
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not set(ids) & (tokenizer.added_ids - {tokenizer.unk_id})
        check_text(tokenizer.decode(ids), blank=True)
    assert tokenizer.fingerprint


def read_template(folder: Path) -> None:
    template = get_template(str(folder / "own.json"))
    template.encode_turns(TOKENIZER, (("user", "a"), ("input", "b"), ("assistant", "c")))
    assert template.encode(TOKENIZER, "a", "b")[0]


def read_adapter(folder: Path) -> None:
    before = [p.clone() for p in MODEL.parameters()]
    try:
        load_adapter(MODEL, folder, "fuzz")
        assert all(p.isfinite().all() for p in adapters(MODEL)["fuzz"].parameters())
    except ValueError:
        assert "fuzz" not in adapters(MODEL)
        raise
    finally:
        if "fuzz" in adapters(MODEL):
            del adapters(MODEL)["fuzz"]
    assert all(torch.equal(p, q) for p, q in zip(MODEL.parameters(), before, strict=False))


# ---- the readers ----------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2, 0]},
    {"instruction": "q", "input": "i", "output": "a"},
    {"prompt": "q", "completion": "é\u2028🙂"},
    {"messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant", "user", "assistant")]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"info": {"post": "p", "title": "t", "subreddit": "r"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
    {"query": "q", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "d", "best": 3},
    {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 1.0, "score_1": -1.0},
    {"instruction": "q", "completions": [{"response": str(s), "overall_score": s} for s in (1, 1, 2.5)]},
    {"question": "q", "human_answers": ["a"], "chatgpt_answers": ["b"]},
    {"instruction": "q", "instances": [{"input": "", "output": "a"}]},
    {"text": "a", "label": 0.5},
    {"prompt": [{"role": "user", "content": "q"}]},
    {"q": "问：q", "a": "答：a"},
]  # fmt: skip
TOKENIZER = Tokenizer.from_words(["<pad>", "<eos>", "<unk>", "how", "was", "a", "b", "c", "user"])
SIZES = {"vocab_size": 9, "n_layer": 1, "n_head": 2, "d_model": 8, "d_inner": 32, "max_seq_len": 16}
MODEL = CausalLM(ModelConfig(family="gpt2", **SIZES), rng=generator(0, "weights")).requires_grad_(False)


def folder_of(write: Callable[[Path], object]) -> dict[str, bytes]:
    """The files that a writer makes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def data_targets() -> dict[str, Target]:
    lines = [("\n".join([json.dumps(row, ensure_ascii=i % 2 == 0)] * 3) + "\n").encode() for i, row in enumerate(ROWS)]
    arrays = [json.dumps([row] * 3, indent=i % 3).encode() for i, row in enumerate(ROWS)]
    tsv = ["a\tb\tc\n\u3000d \te\tf\r\ng\th\ti".encode(), "\ufeff好\t坏\n很好\t很坏\n".encode()]
    text = [b"one\ntwo\r\n\nthree", "\ufeff第一\n第二\u2028半\n".encode()]
    packed = [gzip.compress(data, 9) for data in (*lines, *arrays[:4], *tsv, *text)]
    files = {"jsonl": lines, "array": arrays, "tsv": tsv, "text": text, "gzip": packed}
    out = {}
    for kind, seeds in files.items():
        name = {"tsv": "rows.tsv", "text": "rows.txt"}.get(kind, "rows.json")
        for forced in ("auto", "any"):
            out[f"{kind}-{forced}"] = Target(
                [{name: data} for data in seeds],
                name,
                lambda folder, name=name, forced=forced: read_data(folder / name, pick(folder, forced)),
                names_line=True,
            )
    return out


def pick(folder: Path, forced: str) -> str:
    """auto, or a format chosen by the content."""
    if forced == "auto":
        return "auto"
    size = sum(p.stat().st_size for p in folder.iterdir())
    return sorted(FORMATS)[size % len(FORMATS)]


def other_targets() -> dict[str, Target]:
    made = [TOKENIZER, Tokenizer.train_chars(["how was é"]), Tokenizer.train_bpe(["how was <eos> é"] * 3, 262)]
    tokenizers = [folder_of(t.save) for t in made]
    template = {"user": ["Q: {text}\n"], "input_user": ["{text}{input}"], "response": [" {text}", {"token": "eos"}]}
    models = [
        folder_of(lambda p, f=f: save_pretrained(CausalLM(ModelConfig(family=f, **SIZES)), p, tokenizer=TOKENIZER))
        for f in ("gpt2", "llama", "bloom")
    ]
    reward = [folder_of(lambda p: save_pretrained(RewardModel(ModelConfig(family="llama", **SIZES)), p))]
    add_adapter(MODEL, "a", LoRAConfig(r=2, alpha=4, targets=("mlp.c_proj",)))
    adapter = [folder_of(lambda p: save_adapter(MODEL, "a", p, base="here"))]
    groups = {"policy": {"w": torch.ones(2, 3)}, "optimizer": {"m": torch.zeros(4)}}
    steps = [folder_of(lambda p: checkpoint.save(p, 3, groups, {"step": 3, "coef": 0.1}, keep=1))]
    configs = [{"c.json": json.dumps(to_dict(c())).encode()} for c in (SFTConfig, PPOConfig)]
    toml = [{"c.toml": b'[run]\nseed = 1\ndir = "x"\n[optim]\nbetas = [0.9, 0.99]\n[ppo]\nprompts = ["a"]\n'}]
    out = {
        "template": Target([{"own.json": json.dumps(template).encode()}], "own.json", read_template),
        "config-json": Target(configs, "c.json", lambda p: check_config(p / "c.json")),
        "config-toml": Target(toml, "c.toml", lambda p: check_config(p / "c.toml")),
    }
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        out[f"tokenizer-{file}"] = Target(tokenizers, file, read_tokenizer)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        out[f"model-{file}"] = Target(models, file, lambda p: check_model(load_causal_lm(p)))
    shards = [sharded(model) for model in models]
    for file in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        out[f"model-{file}"] = Target(shards, file, lambda p: check_model(load_causal_lm(p)))
    for file in ("config.json", "model.safetensors"):
        out[f"reward-{file}"] = Target(reward, file, lambda p: check_model(load_reward_model(p)))
    for file in adapter[0].keys() & {"adapter_config.json", "adapter_model.safetensors"}:
        out[f"adapter-{file}"] = Target(adapter, file, read_adapter)
    for file in steps[0]:
        out[f"checkpoint-{Path(file).name}"] = Target(steps, file, lambda p: check_step(newest(p)))
    return out


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same model in two files and an index."""
    tensors = sorted(load(files["model.safetensors"]).items())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = {name: dict(tensors[i::2]) for i, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    return (
        rest
        | {name: save(part) for name, part in parts.items()}
        | {"model.safetensors.index.json": json.dumps(index).encode()}
    )


def check_config(path: Path) -> None:
    for cls in (SFTConfig, PPOConfig):
        json.dumps(to_dict(load_config(cls, [str(path)])), allow_nan=False)


def check_model(model: torch.nn.Module) -> None:
    assert all(p.isfinite().all() for p in model.parameters())


def newest(path: Path) -> Any:
    """The newest checkpoint, without the lines that name damaged ones."""
    with contextlib.redirect_stderr(io.StringIO()):
        return checkpoint.load_newest(path)


def check_step(found: Any) -> None:
    assert found is None or set(found[1]) == {"policy", "optimizer"}


# ---- the loop -------------------------------------------------------------------------------------------------------

PLACE = re.compile(r":\d+: ")


def write(folder: Path, files: dict[str, bytes]) -> None:
    """These files, by their paths in the folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def attempt(target: Target, folder: Path, rng: random.Random) -> str:
    """One broken input; what came of it, or AssertionError."""
    seed = rng.choice(target.seeds)
    data = break_file(seed[target.broken], rng)
    write(folder, seed | {target.broken: data})
    start, clock = time.process_time(), time.perf_counter()  # of this process alone; and against waiting for ever
    try:
        target.read(folder)
        outcome = "read"
    except (ValueError, OSError) as e:
        outcome, message = type(e).__name__, str(e)
        assert str(folder) in message, f"names no file: {message}"
        assert len(message.splitlines()) == 1, f"not one line: {message!r}"
        assert message.isprintable(), f"control characters: {message!r}"
        assert len(message) < 1000, f"{len(message)} characters: {message[:200]}"
        if target.names_line:
            rest = message.removeprefix(str(folder / target.broken))
            assert PLACE.match(rest) or rest.startswith(": "), f"names no place: {message}"
    taken, waited = time.process_time() - start, time.perf_counter() - clock
    assert taken < SECONDS, f"{taken:.1f} s"
    assert waited < 30 * SECONDS, f"{waited:.1f} s"
    return outcome


def fuzz(name: str, target: Target, n: int, seed: int = 0) -> Counter[str]:
    """n broken inputs of one reader; raises AssertionError, with the input in a file, at the first broken promise."""
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        with contextlib.suppress(ValueError, OSError):  # what a first call imports is no part of its time
            write(folder, target.seeds[0])
            target.read(folder)
        for i in range(n):
            try:
                outcomes[attempt(target, folder, random.Random(f"{name}/{seed}/{i}"))] += 1
            except Exception as e:
                kept = Path(tempfile.mkdtemp(prefix="fuzz_")) / Path(target.broken).name
                kept.write_bytes((folder / target.broken).read_bytes())
                raise AssertionError(f"{name}, input {i} of seed {seed}: {type(e).__name__}: {e}; input: {kept}") from e
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{name}: {grown:.0f} MB more than before"
    return outcomes


def targets() -> dict[str, Target]:
    """All readers by name."""
    return data_targets() | other_targets()


def main() -> int:
    """Fuzz all readers, or one; the exit code says how many broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    broken = 0
    for name, target in targets().items():
        if args.only not in name:
            continue
        faulthandler.dump_traceback_later(3600, exit=True)
        start = time.perf_counter()
        try:
            outcomes = dict(fuzz(name, target, args.n, args.seed))
            print(f"{name:36} {time.perf_counter() - start:7.1f} s  {outcomes}", flush=True)
        except AssertionError as e:
            broken += 1
            print(f"BROKEN {e}", flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(main())
