"""Key tables of weight files: which tensor lies where, without reading the tensors. What the formats share.

Files are those of others: nothing is mapped into memory, and what a file claims is compared with its size before memory
is taken for it. Everything that is wrong is a CheckpointError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engines.checks import is_integer
from engines.errors import CheckpointError
from plugins.files import open_file

TABLE_LIMIT = 8 << 20  # bytes of a key table; that of a whole 7B checkpoint has 0.1 MB
DAMAGED = "the file is incomplete or damaged: download or save it again"
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
    stamp: tuple[int, int]
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
