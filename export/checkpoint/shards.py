"""Key tables of weight files: which tensor lies where, without reading the tensors.

Nothing here maps files into memory or unpickles anything but plain tensors.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.errors import CheckpointError

_SAFETENSORS_DTYPES = {
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
_HEADER_LIMIT = 100 << 20  # bytes; the safetensors format itself allows no more
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")
_DAMAGED = "the file is incomplete or damaged: download or save it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: `nbytes` little-endian, row-major bytes at `offset`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_folder(folder: Path) -> dict[str, TensorInfo] | None:
    """The tensors of all weight files of a Hugging Face model folder by name, or None if it has no weight files.

    Looks for, in this order: model.safetensors, its index, pytorch_model.bin, its index; then, without an index, every
    *.safetensors, every pytorch_model*.bin. Raises CheckpointError for a missing, truncated, damaged or unsafe file, an
    index that does not match, and shards without an index that are incomplete or hold a key twice.
    """
    kinds: tuple[tuple[str, Callable[[Path], dict[str, TensorInfo]]], ...]
    kinds = (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch))
    for name, reader in kinds:
        if (folder / name).is_file():
            return reader(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_indexed(index, reader)
    for pattern, reader in (("*.safetensors", read_safetensors), ("pytorch_model*.bin", read_torch)):
        files = sorted(folder.glob(pattern))
        if files:
            return _read_all(files, reader)
    return None


def _read_all(files: list[Path], reader: Callable[[Path], dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    for file in files:
        numbers = _SHARD.search(file.stem)
        present = numbers and len([other for other in files if other.stem.endswith(f"-of-{numbers[2]}")])
        if numbers and present != int(numbers[2]):
            raise CheckpointError(
                f"{file.parent}: {present} of {int(numbers[2])} shards like {file.name}, and no index",
                expected="every shard",
                fix="download the missing shards",
            )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        found = reader(file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{twice[0]} is in {tensors[twice[0]].file.name} and in {file.name}",
                expected="every key once, or an index that says which file counts",
                fix="keep the files of one checkpoint in the folder",
            )
        tensors.update(found)
    return tensors


def _read_indexed(index: Path, reader: Callable[[Path], dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(key): str(file) for key, file in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index}: not a shard index", expected='a JSON object with a "weight_map" of key: file', fix=_DAMAGED
        ) from None
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(files.values())):
        path = index.parent / file
        needed = [key for key in files if files[key] == file]
        if not path.is_file():
            raise CheckpointError(
                f"{path}: shard is missing, with {len(needed)} keys such as {needed[0]}",
                expected=f"every shard that {index.name} names",
                fix="download the missing shard",
            )
        found = reader(path)
        absent = [key for key in needed if key not in found]
        if absent:
            raise CheckpointError(
                f"{path}: key {absent[0]} is missing ({len(absent)} keys in all)",
                expected=f"the keys that {index.name} places in this file",
                fix="index and shards come from different saves: download or save the folder again",
            )
        tensors.update(found)
    return tensors


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name. Raises CheckpointError for a damaged header or a short file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(
                f"{path}: not a whole safetensors header: the file has {size} bytes",
                expected=f"a header of at most {_HEADER_LIMIT} bytes inside the file",
                fix=_DAMAGED,
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _safetensors_entry(name, entry, path, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path}: corrupt safetensors header",
            expected="known dtype, shape and data_offsets of every key",
            fix=_DAMAGED,
        ) from None
    for info in tensors.values():
        _check_inside(info, size)
    return tensors


def _safetensors_entry(name: str, entry: dict[str, Any], path: Path, data: int) -> TensorInfo:
    begin, end = map(int, entry["data_offsets"])
    shape, dtype = tuple(map(int, entry["shape"])), _SAFETENSORS_DTYPES[entry["dtype"]]
    if begin < 0 or end < begin or min(shape, default=0) < 0:
        raise ValueError
    info = TensorInfo(name, path, dtype, shape, data + begin, end - begin)
    wanted = math.prod(shape) * dtype.itemsize
    if info.nbytes != wanted:
        raise CheckpointError(
            f"{path}: {name} has {info.nbytes} bytes", expected=f"{wanted} for {dtype} {list(shape)}", fix=_DAMAGED
        )
    return info


def _check_inside(info: TensorInfo, size: int) -> None:
    if info.offset + info.nbytes > size:
        raise CheckpointError(
            f"{info.file}: truncated: the file has {size} bytes, and {info.name} lies beyond its end",
            expected=f"at least {info.offset + info.nbytes} bytes",
            fix=_DAMAGED,
        )


def read_torch(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one `torch.save` file (a flat dict of name: tensor) by name.

    Loads onto the meta device with the safe unpickler: torch then reads no tensor data but notes where each storage
    lies in the (uncompressed) zip archive. Raises CheckpointError for the legacy format that is not a zip archive, a
    damaged file, a pickle that wants to run code, and tensors that are not contiguous.
    """
    records = _zip_records(path)
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises whatever the damaged pickle led it into
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{path}: torch's safe loader refuses the file ({type(error).__name__}: {reason[:200]})",
            expected="a state dict of plain tensors",
            fix="if you trust the file, load it where it was made and save its state dict as safetensors",
        ) from None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}", expected="a flat dict of name: tensor")
    return {name: _torch_entry(name, value, path, records) for name, value in state.items()}


def _torch_entry(name: str, value: Any, path: Path, records: dict[int, int]) -> TensorInfo:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{path}: {name} is a {type(value).__name__}", expected="a flat dict of name: tensor")
    if value.layout != torch.strided or not value.is_contiguous():
        raise CheckpointError(
            f"{path}: {name} is not contiguous (shape {list(value.shape)}, layout {value.layout})",
            expected="row-major tensors",
            fix="call .contiguous() on it and save the file again, or convert the checkpoint to safetensors",
        )
    storage = value.untyped_storage()
    start = storage._checkpoint_offset
    begin, nbytes = int(value.storage_offset()) * value.itemsize, value.numel() * value.itemsize
    # torch derives the position from the sizes of the records before it; the archive's own directory must agree.
    if start is None or records.get(start) != storage.nbytes() or begin + nbytes > storage.nbytes():
        raise CheckpointError(
            f"{path}: the data of {name} is not where torch places it",
            expected="an archive written by torch.save",
            fix="load the file and save it again with torch.save, or convert the checkpoint to safetensors",
        )
    return TensorInfo(name, path, value.dtype, tuple(value.shape), start + begin, nbytes)


def _zip_records(path: Path) -> dict[int, int]:
    """Size by position in the file, both in bytes, of every storage of a `torch.save` archive."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise CheckpointError(
                f"{path}: not a zip archive: torch's legacy format, or not a torch.save file at all",
                expected="the format torch.save writes since torch 1.6",
                fix="load the file and save it again with torch.save, or convert the checkpoint to safetensors",
            )
        records = {}
        try:
            with zipfile.ZipFile(file) as archive:
                for record in archive.infolist():
                    if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                        raise CheckpointError(f"{path}: saved on a big-endian machine", expected="little-endian data")
                    if "/data/" in record.filename and record.compress_type == zipfile.ZIP_STORED:
                        file.seek(record.header_offset + 26)
                        name_length, extra_length = struct.unpack("<HH", file.read(4))
                        records[record.header_offset + 30 + name_length + extra_length] = record.file_size
        except (zipfile.BadZipFile, struct.error, OSError, RuntimeError):
            raise CheckpointError(
                f"{path}: truncated or damaged archive of {path.stat().st_size} bytes",
                expected="a zip archive with its directory at the end",
                fix=_DAMAGED,
            ) from None
    return records
