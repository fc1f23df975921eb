"""Key tables of weight files: which tensor lies where, without reading the tensors; those of safetensors.

Files are those of others: nothing is mapped into memory, and what a file claims is compared with its size before memory
is taken for it. Everything that is wrong is a CheckpointError.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engines.checks import is_integer
from engines.errors import CheckpointError
from engines.files import open_file, parse_json

TABLE_LIMIT = 8 << 20  # bytes of a key table; that of a whole 7B checkpoint has 0.1 MB
DAMAGED = "the file is incomplete or damaged: download or save it again"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
_DIMENSIONS = 64  # of a tensor, as in torch
_NAME = 500  # characters
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: `nbytes` little-endian, row-major bytes at `offset`.

    stamp: size and time of the file when its table was read; crc: CRC-32 of the bytes, where the format has one.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: tuple[int, int] | None = None
    crc: int | None = None


def stamp(file: BinaryIO) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns of an open file: the same as long as nobody writes to it."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The weight file at `path`. What a failing disk raises is the checkpoint's error."""
    with open_file(path, CheckpointError) as file:
        try:
            if file.read(len(_POINTER)) == _POINTER:
                raise CheckpointError(
                    f"{path}: a pointer of Git LFS, {os.fstat(file.fileno()).st_size} bytes of text in place of the "
                    "weights",
                    expected="the weights themselves",
                    fix=f"run `git lfs pull` in {path.parent}",
                )
            file.seek(0)
            yield file
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}", fix="check the disk") from error


def require_name(name: object, path: Path) -> str:
    """`name` of a tensor in file `path`. CheckpointError unless it is printable text of bounded length."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > _NAME:
        raise CheckpointError(
            f"{path}: a tensor is called {name!a:.80}", expected=f"text of at most {_NAME} characters", fix=DAMAGED
        )
    return name


def sizes(value: Any, what: str) -> tuple[int, ...]:
    """`value` as a shape, strides or offsets; ValueError unless it is a short row of integers of 0 .. 2**63 - 1."""
    row = isinstance(value, (list, tuple)) and len(value) <= _DIMENSIONS
    if not row or not all(is_integer(number) and 0 <= number < 1 << 63 for number in value):
        raise ValueError(f"its {what} is no row of at most {_DIMENSIONS} sizes")
    return tuple(value)


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name.

    Checks what the safetensors library does: tensors follow each other from the header to the end of the file, without
    holes and overlaps. CheckpointError for a file that is none, damaged, too short or too long.
    """
    with opened(path) as file:
        seen = stamp(file)
        size = seen[0]
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size - 8, TABLE_LIMIT):
            raise CheckpointError(
                f"{path}: not a whole safetensors header: the file has {size} bytes",
                expected=f"a header of at most {TABLE_LIMIT} bytes inside the file",
                fix=DAMAGED,
            )
        header = file.read(length)
    entries = parse_json(header, f"{path}: corrupt safetensors header: it", CheckpointError, fix=DAMAGED)
    if not isinstance(entries, dict):
        raise _corrupt(path, f"a JSON {type(entries).__name__}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "__metadata__ is not text by name")
    tensors = {name: _safetensors_entry(name, entry, path, 8 + length, seen) for name, entry in entries.items()}
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            what = "a hole before" if info.offset > end else "another tensor in the bytes of"
            raise _corrupt(path, f"{what} {info.name}")
        end += info.nbytes
        if end > size:
            raise CheckpointError(
                f"{path}: truncated: the file has {size} bytes, and {info.name} lies beyond its end",
                expected=f"at least {end} bytes",
                fix=DAMAGED,
            )
    if end != size:
        raise _corrupt(path, f"{size - end} bytes after the last tensor")
    return tensors


def _corrupt(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: corrupt safetensors header: {what}",
        expected="known dtype, shape and data_offsets of every key, one after another and nothing between",
        fix=DAMAGED,
    )


def _safetensors_entry(name: str, entry: Any, path: Path, data: int, seen: tuple[int, int]) -> TensorInfo:
    require_name(name, path)
    try:
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError("no dtype")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"the dtype {entry['dtype']!r:.40}")
        dtype, shape = DTYPES[entry["dtype"]], sizes(entry.get("shape"), "shape")
        offsets = sizes(entry.get("data_offsets"), "data_offsets")
        if len(offsets) != 2 or offsets[1] < offsets[0]:
            raise ValueError("its data_offsets is no begin and end")
    except ValueError as error:
        raise _corrupt(path, f"{name}: {error}") from None
    begin, end = offsets
    wanted = math.prod(shape) * dtype.itemsize
    if end - begin != wanted:
        raise CheckpointError(
            f"{path}: {name} has {end - begin} bytes", expected=f"{wanted} for {dtype} {list(shape)}", fix=DAMAGED
        )
    return TensorInfo(name, path, dtype, shape, data + begin, end - begin, seen)
