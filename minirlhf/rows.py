"""A data file → its rows: JSON lines, one JSON array, tab-separated or plain lines, each of them gzipped or not.

Rows end at \\n only: U+2028 and a lone \\r are text. JSON is read more strictly than Python does: no NaN, no repeated
key, no half of a surrogate pair. One row at a time is held, however long the file is or would unpack to.
"""

import codecs
import gzip
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minirlhf.errors import DataError

MAX_LINE = 8 << 20  # bytes of a line, characters of an element of an array
MAX_BLANK = 1_000_000  # blank lines in a row
FREE_UNPACKED, MAX_RATIO = 4 << 20, 30  # past the first, a file may unpack to that many times its size; text: 3 to 10
SPACE = " \t\r\n"
SPACES = re.compile(f"[{SPACE}]*")


class Bad(ValueError):
    """Why a row cannot be used: a reason to be counted, the field, and perhaps a remark."""

    def __init__(self, reason: str, field: str = "", remark: str = "") -> None:
        super().__init__((f"{field}: " if field else "") + reason + (f" ({remark})" if remark else ""))
        self.reason = reason


class Source:
    """An open data file, read once from top to bottom; `line` is the number of the line read last."""

    def __init__(self, path: Path | str) -> None:
        self.path, self.line, self._unpacked = path, 0, 0
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is not waited for
        except (OSError, ValueError) as e:  # ValueError: NUL in the name
            raise DataError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            os.close(handle)
            raise DataError(f"{path}: is no regular file")
        raw = self._raw = open(handle, "rb")  # noqa: SIM115  closed by __exit__
        self._size, self._packed = info.st_size, raw.peek(2)[:2] == b"\x1f\x8b"
        self._file: Any = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if self._packed else raw

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._raw.close()

    def lines(self) -> Iterator[bytes]:
        """Lines that are not blank, with their ends; of one over MAX_LINE, its beginning."""
        blank = 0
        while line := self._read(self._file.readline, MAX_LINE + 2):
            self.line += 1
            if self.line == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.startswith(b"version https://git-lfs"):
                    raise DataError(f"{self.path}:1: a Git LFS pointer, not the data; run git lfs pull")
            if line.strip(b" \r\n"):
                blank = 0
                yield line
            elif (blank := blank + 1) > MAX_BLANK:
                raise DataError(f"{self.path}:{self.line}: {MAX_BLANK} blank lines in a row")

    def skip_line(self) -> None:
        """Read on to the end of a line of which `lines` gave the beginning."""
        while (part := self._read(self._file.readline, MAX_LINE)) and not part.endswith(b"\n"):
            pass

    def read(self, size: int) -> bytes:
        """What follows the lines read so far, empty at the end."""
        return self._read(self._file.read, size)

    def _read(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            data = read(size)
        except (OSError, EOFError, zlib.error) as e:
            what = "damaged or cut gzip data" if self._packed else "cannot be read"
            raise DataError(f"{self.path}:{self.line + 1}: {what} ({e})") from e
        self._unpacked += len(data)
        if self._packed and self._unpacked > max(FREE_UNPACKED, MAX_RATIO * self._size):
            raise DataError(f"{self.path}:{self.line + 1}: unpacks to over {MAX_RATIO} times its size; unpack it first")
        return data


# ---- lines ----------------------------------------------------------------------------------------------------------


def text_rows(source: Source, lines: Iterator[bytes]) -> Iterator[tuple[int, str | Bad]]:
    """(line number, text or Bad) of plain and tab-separated lines."""
    for line in lines:
        number = source.line
        yield number, _decoded(source, line)


def json_rows(source: Source, lines: Iterator[bytes]) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    """(line number, object or Bad) of JSON lines."""
    decoder = _Decoder()
    for number, text in text_rows(source, lines):
        if isinstance(text, Bad):
            yield number, text
        elif text.strip(SPACE):  # a line of tabs is a row in TSV alone
            yield number, decoder.whole(text)


def objects(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file of JSON lines. Raises DataError for a line that is none."""
    with Source(path) as source:
        for line, row in json_rows(source, source.lines()):
            if isinstance(row, Bad):
                raise DataError(f"{path}:{line}: {row}")
            yield line, row


def _decoded(source: Source, line: bytes) -> str | Bad:
    if len(line) > MAX_LINE + 1:
        if not line.endswith(b"\n"):
            source.skip_line()
        return Bad("line_too_long", remark=f"over {MAX_LINE >> 20} MB")
    if b"\0" in line:
        return Bad("bad_utf8", remark="a NUL byte, this is no text")
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as e:
        return Bad("bad_utf8", remark=f"byte {e.start + 1} of the line")


# ---- one array ------------------------------------------------------------------------------------------------------


def array_rows(source: Source, first: bytes) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    """(line number, object or Bad) of a JSON array that begins in the line `first`. What breaks the array itself ends
    the reading, for nobody can say where the next element begins."""
    window, decoder = _Window(source, first), _Decoder()
    separator = window.take(1)  # [
    if window.char() == "]":
        separator = window.take(1)
    while separator != "]":
        window.char()
        number = window.line
        value, length = window.element(decoder)
        if length < 0:
            raise DataError(f"{source.path}:{number}: {value}; the rest of the array cannot be read")
        yield number, value
        window.take(length)
        if window.char() not in ("]", ","):
            raise DataError(f"{source.path}:{window.line}: bad_json (neither , nor ] after an element)")
        separator = window.take(1)
    if window.char():
        raise DataError(f"{source.path}:{window.line}: bad_json (text after the array)")


class _Window:
    """The part of an array's text that is being looked at, from `at` on; `line` is the line of that character."""

    def __init__(self, source: Source, first: bytes) -> None:
        self._source, self.line = source, source.line
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self._add(first)
        self.char()

    def char(self) -> str:
        """The next character that is not white space, which is passed over; empty at the end."""
        while True:
            end = SPACES.match(self._text, self._at).end()  # type: ignore[union-attr]
            self.take(end - self._at)
            if end < len(self._text) or self._ended:
                return self._text[end : end + 1]
            self._add(self._source.read(1 << 16))

    def take(self, n: int) -> str:
        """Pass over n characters, and say which."""
        taken = self._text[self._at : self._at + n]
        self.line += taken.count("\n")
        self._at += n
        return taken

    def element(self, decoder: "_Decoder") -> tuple[dict[str, Any] | Bad, int]:
        """The value that begins here, and its length; -1 where it has no end."""
        while True:
            value, end = decoder.next(self._text, self._at)
            if self._ended or 0 <= end < len(self._text):
                return value, end - self._at if end >= 0 else -1
            size = len(self._text) - self._at
            if size > MAX_LINE:
                return value if end < 0 else Bad("line_too_long"), -1
            self._add(self._source.read(max(1 << 16, size)))

    def _add(self, data: bytes) -> None:
        self._ended = not data
        self._text, self._at = self._text[self._at :], 0
        try:
            self._text += self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as e:
            line = self.line + self._text.count("\n") + e.object.count(b"\n", 0, e.start)
            raise DataError(f"{self._source.path}:{line}: bad_utf8") from e


# ---- strict JSON ----------------------------------------------------------------------------------------------------


class _Decoder(json.JSONDecoder):
    """JSON that refuses what Python's own lets pass."""

    def __init__(self) -> None:
        self._flaw: Bad | None = None
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float)

    def whole(self, text: str) -> dict[str, Any] | Bad:
        """The one object of a line."""
        value, end = self.next(text, len(text) - len(text.lstrip(SPACE)))
        if end >= 0 and text[end:].strip(SPACE):
            return Bad("bad_json", remark=f"text after the object, column {end + 1}")
        return value

    def next(self, text: str, at: int) -> tuple[dict[str, Any] | Bad, int]:
        """The object that begins at `at`, or Bad, and where it ends; -1 where that cannot be said."""
        self._flaw = None
        try:
            value, end = self.raw_decode(text, at)
            if text.find("\\u", at, end) >= 0:
                self._check_surrogates(value)
        except json.JSONDecodeError as e:
            return Bad("bad_json", remark=f"{e.msg}, column {e.colno}"), -1
        except ValueError as e:  # an integer of thousands of digits
            return Bad("bad_json", remark=str(e)[:60]), -1
        except RecursionError:
            return Bad("bad_json", remark="nested too deeply"), -1
        if self._flaw is None and not isinstance(value, dict):
            return Bad("wrong_type", remark="not a JSON object"), end
        return self._flaw or value, end

    def _check_surrogates(self, value: Any) -> None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            self._flaw = Bad("lone_surrogate")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._flaw = Bad("duplicate_key", ascii(twice[:40]))
        return out

    def _constant(self, name: str) -> float:
        self._flaw = Bad("bad_json", remark=f"{name} is no number of JSON")
        return 0.0

    def _float(self, digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else self._constant(digits[:20])
