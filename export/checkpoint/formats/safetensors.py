"""Key tables of safetensors files."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import torch

from engines.errors import CheckpointError
from export.checkpoint.formats.key_table import DAMAGED, TABLE_LIMIT, TensorInfo, opened, require_name, sizes, stamp
from plugins.files import parse_json

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
