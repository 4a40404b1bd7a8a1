"""Prompt templates: pieces with roles, each tokenised by itself, never one string that is tokenised later.

A piece is a text with a slot, `{text}`, or a token by its spelling, `{"token": "<|im_end|>"}`, which enters by id. So
no user text becomes a special token, no BOS doubles, and the prompt's ids are always a prefix of the whole. Chat
templates in jinja are programs and are never run. Own templates are JSON files with the fields of `Template`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from minirlhf.errors import CheckpointError, DataError, UsageError
from minirlhf.safefile import read_json, shown
from minirlhf.tokenizer import Tokenizer

Piece = str | dict[str, str]  # text with slots, or {"token": spelling}; "eos" and "bos" are the tokenizer's own
Turns = Sequence[tuple[str, str]]  # (role, text); roles: system, user, input (more of the user's turn), assistant
Encoded = tuple[list[int], list[bool]]  # ids, and True where an id is trained
EOS: Piece = {"token": "eos"}
BOS: Piece = {"token": "bos"}
AFTER = {"system": ("",), "user": ("", "system", "assistant"), "assistant": ("user",)}  # role -> what it may follow
SLOTS = re.compile(r"(\{text\}|\{input\})")


@dataclass(frozen=True)
class Template:
    """A sequence is `start`, then per turn `system`, `user` or `open` + `response` (the only part that is trained),
    with `after` between an answer and the next turn."""

    name: str
    user: tuple[Piece, ...]
    response: tuple[Piece, ...] = ("{text}", EOS)  # the last piece is the token that ends an answer
    start: tuple[Piece, ...] = ()
    system: tuple[Piece, ...] = ()
    open: tuple[Piece, ...] = ()
    after: tuple[Piece, ...] = ()
    system_text: str = ""  # in place of `system`: what the first user's text is preceded by
    input_user: tuple[Piece, ...] = ()  # `user` with {input}; empty: the input is a further line of {text}
    strip: bool = False  # texts lose outer white space
    once: bool = False  # what a text itself begins or ends with is not put around it again

    @cached_property
    def sha256(self) -> str:
        """Identity of the pieces; the name does not count."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str | Turns) -> list[int]:
        """All that stands before the answer to a prompt, or to turns; without a prompt, `start` alone."""
        if not prompt:
            return self._fill(tokenizer, self.start)
        turns = (("user", prompt),) if isinstance(prompt, str) else prompt
        return self.encode_turns(tokenizer, turns)[0] + self._fill(tokenizer, self.open)

    def response_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """An answer with the token that ends it."""
        return self._fill(tokenizer, self.response, response)

    def encode(self, tokenizer: Tokenizer, prompt: str, response: str) -> Encoded:
        """Prompt and answer. Of a plain text, which has no prompt, every token is trained."""
        before, answer = self.prompt_ids(tokenizer, prompt), self.response_ids(tokenizer, response)
        return before + answer, [not prompt] * len(before) + [True] * len(answer)

    def encode_turns(self, tokenizer: Tokenizer, turns: Turns) -> Encoded:
        """A conversation of user and assistant in turns, perhaps after one of the system; the answers are trained."""
        ids, trained = self._fill(tokenizer, self.start), list[bool]()
        previous = ""
        for role, text, extra in self._merged(turns):
            if role == "assistant":
                ids += self._fill(tokenizer, self.open)
                trained += [False] * (len(ids) - len(trained))
                ids += self.response_ids(tokenizer, text)
                trained += [True] * (len(ids) - len(trained))
            else:
                ids += self._fill(tokenizer, self.after) if previous == "assistant" else []
                ids += self._turn(tokenizer, role, text, extra)
            previous = role
        return ids, trained + [False] * (len(ids) - len(trained))

    def stop_token_id(self, tokenizer: Tokenizer) -> int:
        """The token that ends an answer."""
        return self._token(tokenizer, self.response[-1])

    def around(self, text: str) -> list[str]:
        """Every string of the template, with this text in its slots."""
        parts = [getattr(self, f.name) for f in fields(self) if isinstance(f.default, tuple) or f.name == "user"]
        strings = [piece for part in (*parts, (self.system_text,)) for piece in part if isinstance(piece, str)]
        return [self._around(piece, text, text) for piece in strings]

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _merged(self, turns: Turns) -> list[tuple[str, str, str]]:
        """(role, text, input) with the roles in an order that a conversation can have."""
        merged: list[tuple[str, str, str]] = []
        for role, text in turns:
            previous = merged[-1][0] if merged else ""
            if role == "input" and previous == "user":
                merged[-1] = ("user", merged[-1][1], text)
            elif previous in AFTER.get(role, ()):
                merged.append((role, text, ""))
            else:
                raise DataError(f"a turn of {role!a} after {previous!a}: system, then user and assistant by turns")
        if self.system_text and [role for role, _, _ in merged[:2]] == ["system", "user"]:
            text = self._around(self.system_text, merged.pop(0)[1]) + merged[0][1]
            merged[0] = ("user", text, merged[0][2])
        return merged

    def _turn(self, tokenizer: Tokenizer, role: str, text: str, extra: str) -> list[int]:
        if role == "system":
            if not self.system:
                raise UsageError(f"data.template {self.name} has no place for the system turns of this data")
            return self._fill(tokenizer, self.system, text)
        if extra and self.input_user:
            return self._fill(tokenizer, self.input_user, text, extra)
        return self._fill(tokenizer, self.user, f"{text}\n{extra}" if extra else text)

    def _fill(self, tokenizer: Tokenizer, pieces: tuple[Piece, ...], text: str = "", extra: str = "") -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, str):
                said = self._around(piece, text, extra)
                twice = tokenizer.puts_space and piece.startswith(" ")  # the piece's own space and the tokenizer's
                ids += tokenizer.encode(said[1:] if twice else said)
            else:
                ids.append(self._token(tokenizer, piece))
        return ids

    def _around(self, piece: str, text: str, extra: str = "") -> str:
        """The piece with its slots filled; what stands in a text is never taken for a slot."""
        text = text.strip() if self.strip else text
        if self.once and "{text}" in piece:
            before, _, after = piece.partition("{text}")
            before = "" if text.startswith(before.rstrip(" ") or before) else before
            return before + text + ("" if text.endswith(after) else after)
        return "".join({"{text}": text, "{input}": extra}.get(part, part) for part in SLOTS.split(piece))

    def _token(self, tokenizer: Tokenizer, piece: Piece) -> int:
        assert isinstance(piece, dict), piece
        spelling = piece["token"]
        own = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id}
        token = own[spelling] if spelling in own else tokenizer.token_to_id(spelling)
        if token is None:
            raise UsageError(f"data.template {self.name}: the tokenizer has no token {shown(spelling)}; choose another")
        return token


# ---- the known ones -------------------------------------------------------------------------------------------------


def _header(role: str) -> tuple[Piece, ...]:
    """LLaMA 3's, without the text."""
    return ({"token": "<|start_header_id|>"}, role, {"token": "<|end_header_id|>"})


def _known() -> dict[str, Template]:
    im_start, im_end = {"token": "<|im_start|>"}, {"token": "<|im_end|>"}
    eot = {"token": "<|eot_id|>"}
    alpaca = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request.\n\n### Instruction:\n{text}\n\n"
    all_known = [
        Template("plain", ("{text}",)),
        Template("hh", ("\n\nHuman: {text}\n\nAssistant:",), (" {text}", EOS), once=True),
        Template("wenda", ("问：{text}\n\n答：",)),
        Template("bloom", ("{text}", EOS)),
        Template(
            "alpaca",
            (f"{alpaca}. {request}### Response:",),
            input_user=(
                f"{alpaca}, paired with an input that provides further context. {request}"
                "### Input:\n{input}\n\n### Response:",
            ),
        ),
        Template(
            "chatml",
            (im_start, "user\n{text}", im_end, "\n"),
            ("{text}", im_end),
            system=(im_start, "system\n{text}", im_end, "\n"),
            open=(im_start, "assistant\n"),
            after=("\n",),
        ),
        Template(
            "llama2",
            (BOS, "[INST] {text} [/INST]"),
            (" {text} ", EOS),
            system_text="<<SYS>>\n{text}\n<</SYS>>\n\n",
        ),
        Template(
            "llama3",
            (*_header("user"), "\n\n{text}", eot),
            ("{text}", eot),
            start=({"token": "<|begin_of_text|>"},),
            system=(*_header("system"), "\n\n{text}", eot),
            open=(*_header("assistant"), "\n\n"),
            strip=True,
        ),
        Template("tldr", ("{text}\n\nTL;DR:",), (" {text}", EOS), once=True),
    ]
    return {template.name: template for template in all_known}


TEMPLATES = _known()


def get_template(name: str) -> Template:
    """One of `TEMPLATES`, or the one in a JSON file, whose path is then its name."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".json"):
        raise UsageError(
            f"data.template {name[:100]}: unknown; choose {', '.join(TEMPLATES)}, or a JSON file of your own"
        )
    try:
        data = read_json(Path(name))
    except CheckpointError as e:
        raise UsageError(f"data.template {e}") from e
    return _from_json(name, data)


def _from_json(name: str, data: dict[str, Any]) -> Template:
    known = {f.name: f.default for f in fields(Template) if f.name != "name"}
    parts: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise UsageError(f"data.template {name}: unknown key {shown(key)}; known: {', '.join(known)}")
        if isinstance(known[key], bool | str):
            fits, wanted = type(value) is type(known[key]), type(known[key]).__name__
        else:
            fits = isinstance(value, list) and all(map(_is_piece, value))
            wanted = 'list of texts and {"token": "..."}'
        if not fits:
            raise UsageError(f"data.template {name}: {key} must be a {wanted}")
        parts[key] = tuple(value) if isinstance(value, list) else value
    if "{text}" not in str(parts.get("user")):
        raise UsageError(f"data.template {name}: user must say where {{text}} stands")
    template = Template(name, **parts)
    if "{text}" not in str(template.response) or isinstance(template.response[-1], str):
        raise UsageError(
            f"data.template {name}: response must hold {{text}} and end with the token that ends an answer"
        )
    return template


def _is_piece(piece: Any) -> bool:
    return isinstance(piece, str) or (
        isinstance(piece, dict) and piece.keys() == {"token"} and isinstance(piece["token"], str)
    )
