"""Text ↔ token ids, over the library `tokenizers`: a `tokenizer.json` of Hugging Face, or one trained on a corpus.

Two tokenizers are made from one file. The full one knows the special tokens and decodes; the other has lost them and
reads what users wrote, so that `<eos>` typed by a user is five characters and never the end of the text. Special tokens
enter a sequence through a template, by id. What goes wrong elsewhere: stored truncation and padding act in silence, and
a library flag against injection leaves role markers (`special: false`) and whole words of the vocabulary open.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minirlhf.errors import CheckpointError, DataError

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL = (PAD, EOS, UNK)  # ids 0, 1, 2 of every tokenizer made here
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
USUAL = {  # spellings to look for in a bare tokenizer.json, which does not say what its special tokens are for
    "bos_token": ("<bos>", "<s>", "<|begin_of_text|>"),
    "eos_token": (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>"),
    "unk_token": (UNK, "[UNK]"),
    "pad_token": (PAD, "[PAD]", "<|padding|>"),
}
MAX_BYTES = 100 * 2**20  # of a tokenizer.json; published ones reach 35 MB


class Tokenizer:
    """`encode` reads user text, `decode` writes text; ids of special tokens as attributes, None where there is none."""

    def __init__(self, full: tokenizers.Tokenizer, names: dict[str, str], chat_template: str | None = None) -> None:
        """`names` maps bos_token, eos_token, unk_token, pad_token to spellings that `full` holds."""
        full.no_truncation()
        full.no_padding()
        self._full = full
        self.names = names
        self.chat_template = chat_template  # kept for the folders we write; never run
        added = full.get_added_tokens_decoder()
        # runs of spaces are ordinary text that some tokenizers hold as added tokens
        plain = {i for i, token in added.items() if not token.special and token.content.isspace()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        ids = {name: full.token_to_id(spelling) for name, spelling in names.items()}
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int | None = ids.get("eos_token")
        self.unk_id: int | None = ids.get("unk_token")
        self.pad_id: int | None = ids.get("pad_token", self.eos_id)  # what is padding is said by masks, never by this
        self.added_ids = frozenset(added) - plain | {i for i in ids.values() if i is not None}
        self._user = _without_added(full, {added[i].content for i in plain})
        self._renumber = {self._user.token_to_id(added[i].content): i for i in plain}

    # ---- text ↔ ids -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of user text. No special token is added, and none comes out of the text: a word of the vocabulary that
        spells one becomes <unk>."""
        try:
            found = self._user.encode(text, add_special_tokens=False).ids
        except TypeError as e:  # what the library says of a lone surrogate
            raise DataError(f"text {text[:40]!a} is not valid Unicode: it holds a lone surrogate") from e
        ids = [self._renumber.get(i, i) for i in found]
        if not self.added_ids.isdisjoint(ids):
            if self.unk_id is None:
                raise DataError(
                    f"text {text[:40]!r} spells a special token, and this tokenizer has no <unk> to put there"
                )
            ids = [self.unk_id if i in self.added_ids else i for i in ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Special tokens are left out, and so are ids past the vocabulary, which padded embeddings have.
        The first ids of a character of several tokens give U+FFFD."""
        return self._full.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token's spelling, special ones too."""
        return self._full.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Spelling of an id."""
        return self._full.id_to_token(token_id)

    @cached_property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the largest id and one."""
        return max(self._full.get_vocab(with_added_tokens=True).values()) + 1

    # ---- files ------------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical tokenizer.json."""
        canonical = json.dumps(json.loads(self._full.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """The three files from which transformers' AutoTokenizer makes the same tokenizer."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.names}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        files = {
            "tokenizer.json": self._full.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            "special_tokens_map.json": json.dumps(self.names, indent=2, ensure_ascii=False),
        }
        for name, text in files.items():
            (Path(folder) / name).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """A folder, or a bare tokenizer.json, whose special tokens are then told by their usual spellings."""
        path = Path(path)
        if not path.is_dir():
            full = _parse(path)
            vocab = full.get_vocab(with_added_tokens=True)
            found = {name: next((s for s in spellings if s in vocab), None) for name, spellings in USUAL.items()}
            return cls(full, {name: spelling for name, spelling in found.items() if spelling is not None})
        if not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists():
            raise CheckpointError(
                f"{path / 'tokenizer.model'}: SentencePiece is not read; make a tokenizer.json with transformers: "
                f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        full = _parse(path / "tokenizer.json")
        config = _read_object(path / "tokenizer_config.json")
        names = _special_names(path, config)
        if not names:
            return cls.load(path / "tokenizer.json")
        _check_folder(path, full, names, config)
        return cls(full, names, _chat_template(path, config))

    # ---- made here --------------------------------------------------------------------------------------------------

    @classmethod
    def from_words(cls, words: Sequence[str]) -> "Tokenizer":
        """One token per word of the list, in its order; words of a text are separated by spaces. The list begins with
        <pad>, <eos>, <unk>."""
        assert tuple(words[:3]) == SPECIAL, words[:3]
        assert len(set(words)) == len(words), "a word is listed twice"
        full = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
        full.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return cls._made(full)

    @classmethod
    def train_chars(cls, texts: Iterable[str], *, min_count: int = 1) -> "Tokenizer":
        """One token per character seen `min_count` times, the most frequent first; the others are <unk>."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        kept = sorted((c for c, n in counts.items() if n >= min_count), key=lambda c: (-counts[c], c))
        vocab = {token: i for i, token in enumerate([*SPECIAL, *kept])}
        full = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
        full.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        full.decoder = decoders.Fuse()
        return cls._made(full)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2): any text is read
        and comes back unchanged."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        assert vocab_size >= len(SPECIAL) + len(alphabet), (vocab_size, "256 bytes and 3 special tokens")
        full = tokenizers.Tokenizer(models.BPE())
        full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        full.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        full.train_from_iterator(texts, trainer)
        return cls._made(full)

    @classmethod
    def _made(cls, full: tokenizers.Tokenizer) -> "Tokenizer":
        full.add_special_tokens(list(SPECIAL))
        return cls(full, {"eos_token": EOS, "unk_token": UNK, "pad_token": PAD})


# ---- reading --------------------------------------------------------------------------------------------------------


def _without_added(full: tokenizers.Tokenizer, keep: set[str]) -> tokenizers.Tokenizer:
    """A copy that does not know the added tokens, but for those in `keep`; it may number these anew."""
    data = json.loads(full.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in keep]
    data["post_processor"] = None  # refers to special tokens
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: is no regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror or e}") from e
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES >> 20} MB, which no tokenizer is")
    return data


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        data = json.loads(_read(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


def _parse(path: Path) -> tokenizers.Tokenizer:
    data = _read(path)
    try:
        full = tokenizers.Tokenizer.from_str(data.decode("utf-8-sig"))
        empty = not full.get_vocab(with_added_tokens=True)
    except Exception as e:
        raise CheckpointError(f"{path}: not a tokenizer.json ({str(e)[:200]})") from e
    if empty:
        raise CheckpointError(f"{path}: holds no token")
    return full


def _special_names(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token ... → spelling, from tokenizer_config.json, else special_tokens_map.json."""
    names = {}
    for source, data in (
        (folder / "special_tokens_map.json", _read_object(folder / "special_tokens_map.json")),
        (folder / "tokenizer_config.json", config),
    ):
        for name in NAMES:
            value = data.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str):
                raise CheckpointError(f"{source}: {name} {value!r} is no text")
            names[name] = value
    return names


def _check_folder(folder: Path, full: tokenizers.Tokenizer, names: dict[str, str], config: dict[str, Any]) -> None:
    """tokenizer.json must hold every special token, under the id that tokenizer_config.json and config.json state."""
    stated: list[tuple[str, str, Any]] = []
    decoder = config.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else token
        stated.append(("tokenizer_config.json: added_tokens_decoder", str(content), key))
    model = _read_object(folder / "config.json")
    for name, spelling in names.items():
        stated.append(("config.json: " + name, spelling, model.get(name + "_id")))
    for where, spelling, ids in stated:
        actual = full.token_to_id(spelling)
        if actual is None:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: does not hold {spelling!r}, named by {where}")
        allowed = ids if isinstance(ids, list) else [ids]
        if ids is not None and str(actual) not in map(str, allowed):
            raise CheckpointError(f"{folder / 'tokenizer.json'}: {spelling!r} has id {actual}, but {ids} by {where}")
    largest = max(full.get_vocab(with_added_tokens=True).values())
    rows = model.get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: id {largest} is beyond the {rows} rows of the embedding")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The text of the folder's chat template, to be handed on."""
    if isinstance(config.get("chat_template"), str):
        return config["chat_template"]
    path = folder / "chat_template.jinja"
    return _read(path).decode("utf-8", "replace") if path.is_file() else None
