"""Files from strangers: strict JSON objects, and safetensors read and written by hand.

A safetensors file is 8 bytes (little-endian n), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Not here: what a model needs of them (`pretrained.py`). What goes wrong: the library keeps the last of two equal names
in silence, and a header can promise more than any memory holds; so the header is checked against the size of the file
before anything is allocated, and tensors are read piece by piece into memory the caller owns.
"""

import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from minirlhf.errors import CheckpointError

MAX_HEADER = 16 << 20  # bytes; 100,000 tensors with names of 80 characters
MAX_TENSORS = 100_000
PIECE = 4 << 20  # bytes read at once
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2}
SIZES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}


@contextmanager
def open_file(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file, open for reading, and its size; a pipe is refused instead of waited for."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
            info = os.fstat(f.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{path}: is no regular file")
            yield f, info.st_size
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e})") from e


def parse_json(data: bytes, path: Path, what: str = "file") -> dict[str, Any]:
    """One JSON object in UTF-8 without repeated keys, NaN or Infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: the {what} names {shown(twice)} twice")
        return found

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode()  # no lone surrogate
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: the {what} is no valid JSON ({e})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the {what} must be a JSON object, not {type(value).__name__}")
    return value


def read_file(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes."""
    with open_file(path) as (f, size):
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, more than the {limit} that such a file may have")
        return f.read()


def read_json(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """A file with one JSON object of at most `limit` bytes."""
    return parse_json(read_file(path, limit), path)


def read_json_if_there(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """`read_json`; empty where nothing has that name. A link that leads nowhere is refused, not passed over."""
    return read_json(path, limit) if os.path.lexists(path) else {}


class Entry(NamedTuple):
    """One line of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the data
    end: int


class TensorFile:
    """The checked header of one safetensors file; `read` copies tensors out of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_file(path) as (f, size):
            head = f.read(8)
            n = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= n <= min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path}: is no safetensors file (header of {n} bytes in a file of {size})")
            header = parse_json(f.read(n), path, "header")
        self.data_start, self.data_size = 8 + n, size - 8 - n
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"{path}: __metadata__ of the header must map words to words")
        if len(header) > MAX_TENSORS:
            raise CheckpointError(f"{path}: {len(header)} tensors, more than {MAX_TENSORS}")
        self.entries = {name: self._entry(name, line) for name, line in header.items()}
        self._check_offsets()

    def _entry(self, name: str, line: object) -> Entry:
        """One line, if its shape and dtype fill its bytes exactly."""
        where = f"{self.path}: tensor {shown(name)}"
        if not isinstance(line, dict) or set(line) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where} must have dtype, shape and data_offsets")
        dtype, shape, offsets = line["dtype"], line["shape"], line["data_offsets"]
        if not isinstance(dtype, str) or dtype not in SIZES:
            raise CheckpointError(f"{where} has the unknown dtype {shown(dtype)}")
        if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2 and len(shape) <= 8):
            raise CheckpointError(f"{where}: shape {shown(shape)} or data_offsets {shown(offsets)} is no list of sizes")
        entry = Entry(dtype, tuple(shape), *offsets)
        if entry.end - entry.start != prod(shape) * SIZES[dtype]:
            raise CheckpointError(f"{where}: {dtype} {shape} does not fill its data_offsets {offsets}")
        return entry

    def _check_offsets(self) -> None:
        """The tensors cover the data without gap or overlap."""
        at = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != at:
                raise CheckpointError(f"{self.path}: tensor {shown(name)} begins at byte {entry.start}, not at {at}")
            at = entry.end
        if at != self.data_size:
            raise CheckpointError(f"{self.path}: the header describes {at} bytes, the file has {self.data_size}")

    def pieces(self, name: str, rows: int, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Rows first ... first + rows of a floating tensor, as (offset, some of them), in one buffer of PIECE bytes."""
        entry = self.entries[name]
        row = prod(entry.shape[1:]) * SIZES[entry.dtype]  # bytes
        step = max(1, PIECE // max(row, 1))
        buffer = torch.empty(min(step, rows) * row, dtype=torch.uint8)
        with open_file(self.path) as (f, _):
            f.seek(self.data_start + entry.start + first * row)
            for i in range(0, rows, step):
                piece = buffer[: min(step, rows - i) * row]
                if f.readinto(piece.numpy()) < len(piece):  # type: ignore[arg-type]
                    raise CheckpointError(f"{self.path}: became shorter while it was read")
                yield i, piece.view(FLOATS[entry.dtype]).view(-1, *entry.shape[1:])

    def read(
        self,
        name: str,
        out: Tensor,  # (rows, ...) any strides, dtype and device
        first: int = 0,  # first row of the stored tensor
    ) -> None:
        """Copies rows first ... first + len(out) into `out`, converting."""
        for i, piece in self.pieces(name, len(out), first):
            part = out[i : i + len(piece)].copy_(piece)
            low, high = part.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise CheckpointError(f"{self.path}: tensor {shown(name)} holds NaN or infinity as {part.dtype}")

    def same(self, name: str, other: Tensor) -> bool:  # (rows, ...)
        """Whether the stored tensor equals this one, once converted."""
        pieces = self.pieces(name, len(other))
        return all(torch.equal(piece.to(other), other[i : i + len(piece)]) for i, piece in pieces)


def shown(value: object) -> str:
    """A value from a file as one short printable line."""
    text = ascii(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _naturals(value: object) -> bool:
    """Whether this is a list of sizes."""
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**48 for x in value)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file; tensors of any strides and device, copied one by one."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    plain = (tensor.detach().to("cpu").contiguous().reshape(-1) for tensor in tensors.values())
    write_file(path, chain([struct.pack("<Q", len(text)) + text], (x.view(torch.uint8).numpy() for x in plain)))


def write_file(path: Path, parts: Iterable[Any]) -> None:
    """A file of these parts (bytes, or arrays of bytes), on disk when this returns; an OSError names it."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
