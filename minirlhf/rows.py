"""A data file → its rows, whatever the file is: JSON lines, one JSON array, tab-separated or plain lines, gzipped or not.

Rows end at \\n only: U+2028 and a lone \\r are text. JSON is read more strictly than Python does (no NaN, no repeated
key, no half of a surrogate pair), and nothing in a file can take more memory or time than its size allows.
"""

import gzip
import io
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minirlhf.errors import DataError

MAX_LINE = 8 * 2**20  # bytes of a line
MAX_ARRAY = 256 * 2**20  # bytes of a file that is one JSON array
FREE_UNPACKED, MAX_RATIO = 16 * 2**20, 100  # past the first, a file may unpack to that many times its size
BOM = b"\xef\xbb\xbf"
LFS = b"version https://git-lfs"


class Bad(ValueError):
    """Why a row cannot be used: a reason that is counted, the field, and perhaps a remark."""

    def __init__(self, reason: str, field: str = "", remark: str = "") -> None:
        super().__init__(f"{field}: {reason}" * bool(field) or reason)
        self.reason, self.field, self.remark = reason, field, remark

    def __str__(self) -> str:
        return (f"{self.field}: " if self.field else "") + self.reason + (f" ({self.remark})" if self.remark else "")


class Source:
    """An open data file, read once from top to bottom. `line` is the number of the last line that was read."""

    def __init__(self, path: Path | str) -> None:
        self.path, self.line, self._unpacked = path, 0, 0
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DataError(f"{path}: is no regular file")
            raw = open(path, "rb")  # noqa: SIM115  closed by __exit__
        except (OSError, ValueError) as e:
            if isinstance(e, DataError):
                raise
            raise DataError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
        self._size = os.fstat(raw.fileno()).st_size
        self._raw = raw
        self._packed = raw.peek(2)[:2] == b"\x1f\x8b"
        self._file: Any = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if self._packed else raw  # type: ignore[type-var]

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._raw.close()

    def lines(self) -> Iterator[bytes]:
        """Lines that are not blank, without their ends; of one that is too long, its beginning."""
        while line := self._read(self._file.readline, MAX_LINE + 2):
            self.line += 1
            if self.line == 1:
                line = line.removeprefix(BOM)
                if line.startswith(LFS):
                    raise DataError(f"{self.path}:1: a Git LFS pointer, not the data; run git lfs pull")
            if line.strip(b" \t\r\n"):
                yield line

    def skip_line(self) -> None:
        """Read on to the end of a line whose beginning was too long."""
        while (part := self._read(self._file.readline, MAX_LINE)) and not part.endswith(b"\n"):
            pass

    def rest(self, start: bytes) -> bytes:
        """`start` and all that follows it, for a JSON array."""
        parts, size = [start], len(start)
        while part := self._read(self._file.read, 2**20):
            parts.append(part)
            size += len(part)
            if size > MAX_ARRAY:
                raise DataError(f"{self.path}: a JSON array over {MAX_ARRAY >> 20} MB; write one object per line")
        return b"".join(parts)

    def _read(self, read: Any, size: int) -> bytes:
        try:
            data: bytes = read(size)
        except (OSError, EOFError, zlib.error) as e:
            damage = "damaged or cut gzip data" if self._packed else "cannot be read"
            raise DataError(f"{self.path}:{self.line + 1}: {damage} ({e})") from e
        self._unpacked += len(data)
        if self._packed and self._unpacked > max(FREE_UNPACKED, MAX_RATIO * self._size):
            raise DataError(f"{self.path}:{self.line + 1}: unpacks to over {MAX_RATIO} times its size; unpack it first")
        return data


def text_rows(source: Source, lines: Iterator[bytes]) -> Iterator[tuple[int, str | Bad]]:
    """(line number, text) of plain and tab-separated lines."""
    for line in lines:
        number = source.line
        yield number, _text(source, line)


def json_rows(source: Source, lines: Iterator[bytes]) -> Iterator[tuple[int, Any]]:
    """(line number, object or Bad) of JSON lines."""
    decoder = _Decoder()
    for line in lines:
        number = source.line
        text = _text(source, line)
        yield number, text if isinstance(text, Bad) else decoder.whole(text)


def array_rows(source: Source, first: bytes) -> Iterator[tuple[int, Any]]:
    """(line number, object or Bad) of one JSON array; what breaks the array itself ends the reading."""
    number = source.line
    try:
        text = source.rest(first).decode()
    except UnicodeDecodeError as e:
        line = number + e.object.count(b"\n", 0, e.start)
        raise DataError(f"{source.path}:{line}: bad_utf8") from e
    decoder, at, expected = _Decoder(), text.index("[") + 1, "],"
    seen = 0

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    while True:
        at = skip(at)
        number, seen = number + text.count("\n", seen, at), at
        if text[at : at + 1] == "]" and expected != "":
            break
        value, at = decoder.next(text, at)
        if at < 0:
            raise DataError(f"{source.path}:{number}: {value}; the rest of the array cannot be read")
        yield number, value
        at = skip(at)
        expected = text[at : at + 1]
        if expected not in ("]", ",") or not expected:
            raise DataError(f"{source.path}:{number + text.count(chr(10), seen, at)}: bad_json (no , or ] here)")
        at += expected == ","
    if skip(at + 1) != len(text):
        raise DataError(f"{source.path}:{number}: bad_json (text after the array)")


def _text(source: Source, line: bytes) -> str | Bad:
    if len(line) > MAX_LINE + 1:
        if not line.endswith(b"\n"):
            source.skip_line()
        return Bad("line_too_long", remark=f"over {MAX_LINE >> 20} MB")
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as e:
        return Bad("bad_utf8", remark=f"byte {e.start + 1}")


class _Decoder(json.JSONDecoder):
    """JSON that says what Python's own would let pass."""

    def __init__(self) -> None:
        self._flaw: Bad | None = None
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float)

    def whole(self, text: str) -> Any:
        """The one object of a line, or Bad."""
        value, end = self.next(text, len(text) - len(text.lstrip(" \t\r\n")))
        if end >= 0 and text[end:].strip(" \t\r\n"):
            return Bad("bad_json", remark=f"text after the object, column {end + 1}")
        return value

    def next(self, text: str, at: int) -> tuple[Any, int]:
        """The object that begins at `at`, or Bad, and where it ends; -1 where that cannot be said."""
        self._flaw = None
        try:
            value, end = self.raw_decode(text, at)
            if "\\u" in text[at:end]:
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Bad("lone_surrogate"), end
        except json.JSONDecodeError as e:
            return Bad("bad_json", remark=f"{e.msg}, column {e.pos + 1 - text.rfind(chr(10), 0, e.pos) - 1}"), -1
        except ValueError as e:  # an integer of thousands of digits
            return Bad("bad_json", remark=str(e)[:80]), -1
        except RecursionError:
            return Bad("bad_json", remark="nested too deeply"), -1
        if self._flaw is None and not isinstance(value, dict):
            return Bad("wrong_type", remark="not a JSON object"), end
        return self._flaw or value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            keys = [key for key, _ in pairs]
            self._flaw = Bad("duplicate_key", next(key for key in keys if keys.count(key) > 1)[:40])
        return out

    def _constant(self, name: str) -> float:
        self._flaw = Bad("bad_json", remark=f"{name} is no JSON")
        return 0.0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self._constant(f"{digits[:20]}, out of range,")
        return value
