"""Text ↔ token ids, over the library `tokenizers`: a `tokenizer.json` of Hugging Face, or one trained on a corpus.

Two tokenizers are made from one file. The full one knows the special tokens and decodes; the other has lost them and
reads what users wrote, so that `<eos>` typed by a user is five characters and never the end of the text. Special tokens
enter a sequence through a template, by id. What goes wrong elsewhere: stored truncation and padding act in silence, and
a library flag against injection leaves role markers (`special: false`) and whole words of the vocabulary open.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minirlhf.errors import CheckpointError, DataError
from minirlhf.safefile import open_file, read_file, read_json_if_there, shown

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL = (PAD, EOS, UNK)  # ids 0, 1, 2 of every tokenizer made here
USUAL = {  # the special tokens that we use, and how they are spelled where no file says so
    "bos_token": ("<bos>", "<s>", "<|begin_of_text|>"),
    "eos_token": (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>"),
    "unk_token": (UNK, "[UNK]"),
    "pad_token": (PAD, "[PAD]", "<|padding|>"),
}
ChatTemplate = str | list[Any] | None
MAX_BYTES, MAX_CONFIG = 100 << 20, 16 << 20  # of tokenizer.json (published ones reach 35 MB) and the files beside it


class Tokenizer:
    """`encode` reads user text, `decode` writes text; ids of special tokens as attributes, None where there is none."""

    def __init__(self, full: tokenizers.Tokenizer, names: dict[str, str], chat_template: ChatTemplate = None) -> None:
        """`names` maps bos_token, eos_token, unk_token, pad_token to spellings that `full` holds."""
        full.no_truncation()
        full.no_padding()
        if getattr(full.model, "dropout", None) is not None:  # of merges, at random in every call
            full.model.dropout = None
        special = {token.content for token in full.get_added_tokens_decoder().values() if token.special}
        # some files hold them as ordinary words; those that are special keep their other settings
        full.add_special_tokens([spelling for spelling in names.values() if spelling not in special])
        self._full = full
        self.names = names
        self.chat_template = chat_template  # handed on to the folders we write; never run
        ids = {name: full.token_to_id(spelling) for name, spelling in names.items()}
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int | None = ids.get("eos_token")
        self.unk_id: int | None = ids.get("unk_token")
        self.pad_id: int | None = ids.get("pad_token", self.eos_id)  # what is padding, masks say, never this id
        added = full.get_added_tokens_decoder()
        # some tokenizers hold runs of spaces, or letters (DeepSeek: ü), which are ordinary text, as added tokens
        texts = {i: token.content for i, token in added.items() if not token.special}
        plain = {i: text for i, text in texts.items() if text.isspace() or len(text) == 1}
        self.added_ids = frozenset(added) - plain.keys()  # these never come out of text
        self._user = _without_added(full, set(plain.values()))
        self._renumber = {self._user.token_to_id(content): i for i, content in plain.items()}

    # ---- text ↔ ids -------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of user text. No special token is added, and none comes out of the text: a word of the vocabulary that
        spells one becomes <unk>."""
        try:
            found = _without_panic(self._user.encode, text, add_special_tokens=False).ids
        except CheckpointError:
            raise
        except Exception as e:
            why = "it holds a lone surrogate" if isinstance(e, TypeError) else str(e)[:100]
            raise DataError(f"text {text[:40]!a} cannot be tokenised: {why}") from e
        ids = [self._renumber.get(i, i) for i in found]
        if not self.added_ids.isdisjoint(ids):
            if self.unk_id in (None, self.bos_id, self.eos_id, self.pad_id):
                raise DataError(f"text {text[:40]!a} spells a special token, and there is no <unk> to put in its place")
            ids = [self.unk_id if i in self.added_ids else i for i in ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Special tokens are left out, and so are ids past the vocabulary, which padded embeddings have.
        The first ids of a character of several tokens give U+FFFD."""
        return _without_panic(self._full.decode, list(ids), skip_special_tokens=True)

    @cached_property
    def puts_space(self) -> bool:
        """Whether each text gets a space of its own before it, as in SentencePiece's tokenizers for LLaMA 2."""
        normalizer = self._user.normalizer
        return normalizer is not None and _without_panic(normalizer.normalize_str, "a") == "▁a"

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

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._full.to_str(pretty=True)

    # ---- files ------------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides ids: tokenizer.json without its post-processor, which we never run, and names."""
        data = {**json.loads(self.to_json()), "post_processor": None, "names": self.names}
        canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """The three files from which transformers' AutoTokenizer makes the same tokenizer."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.names}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        files = {
            "tokenizer.json": self.to_json(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
            "special_tokens_map.json": json.dumps(self.names, indent=2, ensure_ascii=False),
        }
        for name, text in files.items():
            (Path(folder) / name).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """A folder, or a tokenizer.json. Raises CheckpointError."""
        path = Path(path)
        if not path.is_dir():
            full = _parse(path)
            return cls(full, _usual_names(full))
        if not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists():
            raise CheckpointError(
                f"{path / 'tokenizer.model'}: SentencePiece is not read; make a tokenizer.json with transformers: "
                f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        full, config = _parse(path / "tokenizer.json"), read_json_if_there(path / "tokenizer_config.json", MAX_CONFIG)
        names = _special_names(path, full, config)
        _check_names(path / "tokenizer.json", full, names, config)
        _add_stated(full, config)
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


def _without_panic(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a function of the library gives. Over a damaged file it may panic, which is no Exception."""
    try:
        return call(*args, **options)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise CheckpointError(f"tokenizer.json: is damaged, the library fails on it ({shown(str(e))})") from e


def _without_added(full: tokenizers.Tokenizer, keep: set[str]) -> tokenizers.Tokenizer:
    """A copy that does not know the added tokens, but for those in `keep`, which it may number anew."""
    data = json.loads(full.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in keep]
    data["post_processor"] = None  # refers to special tokens
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _parse(path: Path) -> tokenizers.Tokenizer:
    data = read_file(path, MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
        full = tokenizers.Tokenizer.from_str(text)
        ids = full.get_vocab(with_added_tokens=True).values()
        added = [(token["content"], token["id"]) for token in json.loads(text)["added_tokens"]]
        if not ids or max(ids) > 2 * len(ids) + 1024:
            raise ValueError(f"{len(ids)} tokens with ids up to {max(ids, default=0)}")
        if len(set(ids)) < len(ids):
            raise ValueError("two tokens have one id")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of the library is no Exception
        raise CheckpointError(f"{path}: is no usable tokenizer.json ({shown(str(e))})") from e
    for spelling, token_id in added:  # the library numbers them anew where they do not fit
        if full.token_to_id(spelling) != token_id:
            raise CheckpointError(
                f"{path}: holds {spelling[:40]!a} under id {full.token_to_id(spelling)}, not {token_id}"
            )
    return full


def _special_names(folder: Path, full: tokenizers.Tokenizer, config: dict[str, Any]) -> dict[str, str]:
    """Spellings of the special tokens: of tokenizer_config.json, special_tokens_map.json, or by the ids in config.json
    where neither names any, or usual ones."""
    names: dict[str, str] = {}
    for data in (config, read_json_if_there(folder / "special_tokens_map.json", MAX_CONFIG)):
        for name in USUAL:
            value = data.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names.setdefault(name, value)
            elif value is not None:
                raise CheckpointError(f"{folder}: {name} {str(value)[:40]} of the tokenizer's configuration is no text")
    if names:
        return names
    model = read_json_if_there(folder / "config.json", MAX_CONFIG)
    for name in USUAL:
        token_id = model.get(f"{name}_id")
        spelling = full.id_to_token(token_id) if isinstance(token_id, int) and 0 <= token_id < 2**31 else None
        if spelling is not None:
            names[name] = spelling
    return _usual_names(full) | names


def _usual_names(full: tokenizers.Tokenizer) -> dict[str, str]:
    """What a bare tokenizer.json does not say: which of its tokens are special, by their usual spellings."""
    found = {name: [s for s in spellings if full.token_to_id(s) is not None] for name, spellings in USUAL.items()}
    return {name: spellings[0] for name, spellings in found.items() if spellings}


def _check_names(file: Path, full: tokenizers.Tokenizer, names: dict[str, str], config: dict[str, Any]) -> None:
    """tokenizer.json must hold the special tokens that the files beside it name, under the ids they give. Whether these
    suit the model, `pretrained` asks."""
    decoder = config.get("added_tokens_decoder")
    stated = [(spelling, None) for spelling in names.values()]
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        stated.append((str(token.get("content") if isinstance(token, dict) else token), key))
    for spelling, key in stated:
        actual = full.token_to_id(spelling)
        if actual is None:
            raise CheckpointError(f"{file}: does not hold {spelling[:40]!a}, which the folder names as a special token")
        if key not in (None, str(actual)):
            raise CheckpointError(f"{file}: holds {spelling[:40]!a} under id {actual}, not {key[:40]!a}")


def _add_stated(full: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """What tokenizer_config.json calls an added token is one, though tokenizer.json holds it as an ordinary word."""
    decoder, known = config.get("added_tokens_decoder"), {t.content for t in full.get_added_tokens_decoder().values()}
    new = []
    for token in decoder.values() if isinstance(decoder, dict) else ():
        settings = token if isinstance(token, dict) else {"content": str(token)}
        if (spelling := str(settings.get("content"))) not in known:
            flags = {name: settings.get(name) is True for name in ("lstrip", "rstrip", "normalized", "single_word")}
            new.append(tokenizers.AddedToken(spelling, special=settings.get("special") is not False, **flags))
    full.add_tokens(new)


def _chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate:
    """The folder's chat template, or several with their names, to be handed on. The file comes before the setting, as
    in transformers."""
    path, template = folder / "chat_template.jinja", config.get("chat_template")
    if not os.path.lexists(path):
        return template if isinstance(template, str | list) else None
    with open_file(path) as (file, _):
        return file.read(MAX_CONFIG).decode("utf-8", "replace")
