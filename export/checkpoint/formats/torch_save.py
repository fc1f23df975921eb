"""Key tables of `torch.save` files: the archive's directory, and the pickle, which is read and never run."""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from engines.checks import is_integer
from engines.errors import CheckpointError
from export.checkpoint.formats.key_table import DAMAGED, TABLE_LIMIT, TensorInfo, opened, require_name, sizes, stamp
from export.checkpoint.formats.safetensors import DTYPES

_TORCH_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TORCH_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}
_OPERATIONS = 1 << 19  # of a pickle; a tensor takes 30


class _Record(NamedTuple):
    """One file of a zip archive, stored as it is: position and size in bytes, its CRC-32 (None: saved without)."""

    offset: int
    nbytes: int
    crc: int | None


class _Global(NamedTuple):
    """Something a pickle names: `module.name`. Never imported."""

    path: str


class _Storage(NamedTuple):
    """dtype: None for bytes that get theirs from the tensor; count: elements of it, or bytes."""

    dtype: torch.dtype | None
    key: str
    count: int


class _Tensor(NamedTuple):
    """A view of a storage; offset, shape and stride in elements, as found."""

    storage: _Storage
    dtype: torch.dtype
    offset: Any
    shape: Any
    stride: Any


def read_torch(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one `torch.save` file (a flat dict of name: tensor) by name.

    The pickle is read, not run: of its operations and names only those of a state dict are known, and they make plain
    records. CheckpointError for the legacy format that is not a zip archive, a damaged archive, a pickle that wants
    anything else, tensors that are not contiguous, and storages that are compressed or shorter than said.
    """
    with opened(path) as file:
        seen = stamp(file)
        if file.read(4) != b"PK\x03\x04":
            raise CheckpointError(
                f"{path}: not a zip archive: torch's legacy format, or not a torch.save file at all",
                expected="the format torch.save writes since torch 1.6",
                fix="load the file and save it again with torch.save, or convert the checkpoint to safetensors",
            )
        try:
            records = _zip_records(file, seen[0])
            if "byteorder" in records and _content(file, records["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: saved on a big-endian machine", expected="little-endian data")
            if "data.pkl" not in records:
                raise ValueError("it holds no data.pkl")
            data = _content(file, records["data.pkl"])
        # What Python's reader of archives leads damaged bytes into; NotImplementedError is a RuntimeError.
        except (zipfile.BadZipFile, struct.error, RuntimeError, ValueError, OverflowError, EOFError) as error:
            raise CheckpointError(
                f"{path}: truncated or damaged archive of {seen[0]} bytes: {error!s:.200}",
                expected="a zip archive with its directory at the end, nothing compressed",
                fix=DAMAGED,
            ) from None
    try:
        state = _Pickle(data).load()
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a state dict: {_readable(error)}",
            expected="a pickled dict of plain tensors; a pickle can hold programs, and this one is not run",
            fix="if you trust the file, load it where it was made and save its state dict as safetensors",
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {_kind(state)}", expected="a flat dict of name: tensor")
    return {require_name(name, path): _torch_entry(name, value, path, records, seen) for name, value in state.items()}


def _readable(error: Exception) -> str:
    """What went wrong in a pickle, in one printable line."""
    reason = str(error) if type(error) is ValueError else f"damaged ({type(error).__name__})"
    return "".join(character if character.isprintable() else "?" for character in reason[:200])


def _kind(value: object) -> str:
    return type(value).__name__.lstrip("_")


def _torch_entry(name: str, value: Any, path: Path, records: dict[str, _Record], seen: tuple[int, int]) -> TensorInfo:
    if not isinstance(value, _Tensor):
        raise CheckpointError(
            f"{path}: {name} is a {_kind(value)}",
            expected="a flat dict of name: tensor",
            fix="save the model's state dict alone: torch.save(model.state_dict(), FILE)",
        )
    try:
        shape, stride = sizes(value.shape, "shape"), sizes(value.stride, "stride")
        (offset,) = sizes([value.offset], "offset")
        if len(shape) != len(stride):
            raise ValueError(f"its shape is {list(shape)}, its stride {list(stride)}")
    except ValueError as error:
        raise CheckpointError(f"{path}: {name}: {error}", expected="a tensor", fix=DAMAGED) from None
    if not _is_contiguous(shape, stride):
        raise CheckpointError(
            f"{path}: {name} is not contiguous (shape {list(shape)}, stride {list(stride)})",
            expected="row-major tensors",
            fix="call .contiguous() on it and save the file again, or convert the checkpoint to safetensors",
        )
    storage, record = value.storage, records.get(f"data/{value.storage.key}")
    held = storage.count * (storage.dtype.itemsize if storage.dtype else 1)
    begin, nbytes = offset * value.dtype.itemsize, math.prod(shape) * value.dtype.itemsize
    if record is None or record.nbytes != held or begin + nbytes > held:
        there = "not there" if record is None else f"{record.nbytes} bytes"
        raise CheckpointError(
            f"{path}: the data of {name} is not what the pickle says: its storage is {there}",
            expected=f"{held} bytes, {nbytes} of them from {begin} on",
            fix="load the file and save it again with torch.save, or convert the checkpoint to safetensors",
        )
    crc = record.crc if nbytes == held else None
    return TensorInfo(name, path, value.dtype, shape, record.offset + begin, nbytes, seen, crc)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements lie in row-major order without gaps, as torch defines it."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected and 0 not in shape:
            return False
        expected *= size
    return True


class _Bounded:
    """A file that refuses to read much at once: zipfile reads a directory of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, or all that are left; ValueError for more than TABLE_LIMIT."""
        if size > TABLE_LIMIT:
            raise ValueError(f"a directory of {size} bytes")
        data = self._file.read(TABLE_LIMIT + 1 if size < 0 else size)
        if len(data) > TABLE_LIMIT:
            raise ValueError("a directory without end")
        return data


def _zip_records(file: BinaryIO, size: int) -> dict[str, _Record]:
    """What an archive of `size` bytes holds, by name below its one folder. Raises what zipfile does, and ValueError."""
    with zipfile.ZipFile(_Bounded(file)) as archive:  # has all of a file that it uses
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    records, end = {}, 0
    for entry in entries:
        folder, slash, name = entry.filename.partition("/")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(f"{entry.filename!a:.80} is compressed or encrypted")
        if not slash or folder != entries[0].filename.partition("/")[0] or name in records:
            raise ValueError(f"{entry.filename!a:.80} is there twice, or in another folder than the rest")
        file.seek(entry.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
        begin = entry.header_offset + 30 + name_length + extra_length
        if signature != b"PK\x03\x04" or entry.header_offset < end or begin + entry.file_size > size:
            raise ValueError(f"{entry.filename!a:.80} lies in another file, or beyond the end")
        end = begin + entry.file_size
        records[name] = _Record(begin, entry.file_size, entry.CRC or None)  # torch can save without: 0
    return records


def _content(file: BinaryIO, record: _Record) -> bytes:
    if record.nbytes > TABLE_LIMIT:
        raise ValueError(f"a key table of {record.nbytes} bytes")
    file.seek(record.offset)
    data = file.read(record.nbytes)
    if len(data) != record.nbytes or (record.crc is not None and zlib.crc32(data) != record.crc):
        raise ValueError("bytes of its key table are damaged (CRC)")
    return data


class _Pickle:
    """The machine of a pickle, with the operations of a state dict and no other; `load` returns what it makes.

    Bounded: the pickle's size (its caller's limit), its operations, and by these two all memory, since every operation
    makes at most one object no larger than what it takes from the stack or the pickle. Nothing is imported or called.
    ValueError, IndexError, KeyError or TypeError for a pickle of anything else.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        for count, (operation, argument, _) in enumerate(pickletools.genops(self._data)):
            if count >= _OPERATIONS:
                raise ValueError(f"more than {_OPERATIONS} operations")
            if operation.name == "STOP":
                return self._stack.pop()
            self._step(operation.name, argument)
        raise ValueError("no end")

    def _step(self, operation: str, argument: Any) -> None:
        stack = self._stack
        if operation in ("PROTO", "FRAME"):
            return
        if operation in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif operation == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif operation == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif operation in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            stack.append(argument)
        elif operation in _CONSTANTS:
            stack.append(_CONSTANTS[operation])
        elif operation in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if operation == "EMPTY_DICT" else [])
        elif operation == "TUPLE":
            items = self._since_mark()
            self._stack.append(tuple(items))
        elif operation in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(operation[-1]))]
            stack.append(tuple(reversed(items)))
        elif operation in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if operation == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _fill(self._stack[-1], items)
        elif operation in ("APPEND", "APPENDS"):
            items = self._since_mark() if operation == "APPENDS" else [stack.pop()]
            if type(self._stack[-1]) is not list:
                raise ValueError("damaged")
            self._stack[-1].extend(items)
        elif operation == "GLOBAL":
            stack.append(_global(argument.replace(" ", ".", 1)))
        elif operation == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):  # of lists in lists, not even text may be made
                raise ValueError("damaged: a name that is no text")
            stack.append(_global(f"{module}.{name}"))
        elif operation == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif operation == "REDUCE":
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        elif operation == "BUILD":  # what a module notes beside its state dict: _metadata
            stack.pop()
            if type(stack[-1]) is not dict:
                raise ValueError(f"it wants to set the state of a {_kind(stack[-1])}")
        else:
            raise ValueError(f"it wants to {operation}")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_REBUILDERS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_parameter_with_state")


def _fill(target: Any, items: list[Any]) -> None:
    """Put pairs of key and value into a dict; each key once."""
    if type(target) is not dict or len(items) % 2:
        raise ValueError("damaged")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int)) or key in target:
            raise ValueError("a dict has a key twice, or one that is no text")
        target[key] = value


def _global(path: str) -> _Global | torch.dtype:
    if path in _TORCH_DTYPES:
        return _TORCH_DTYPES[path]
    module, _, name = path.rpartition(".")
    known = (
        path in ("collections.OrderedDict", "torch.storage.UntypedStorage")
        or (module == "torch._utils" and name in _REBUILDERS)
        or (module in ("torch", "torch.cuda") and name in _TORCH_STORAGES)
    )
    if not known:
        raise ValueError(f"it holds {path:.120}, which is no part of a plain tensor")
    return _Global(path)


def _storage(key: Any) -> _Storage:
    """What ("storage", type, key, device, elements) stands for."""
    if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or not isinstance(key[1], _Global):
        raise ValueError("damaged: no storage where one should be")
    if not isinstance(key[2], str) or not is_integer(key[4]) or key[4] < 0:
        raise ValueError("damaged: a storage without a name and a size")
    name = key[1].path.rpartition(".")[2]
    if name != "UntypedStorage" and name not in _TORCH_STORAGES:
        raise ValueError(f"damaged: a storage of {name:.80}")
    return _Storage(_TORCH_STORAGES.get(name), key[2], key[4])


def _made(what: Any, arguments: Any) -> Any:
    """What a call of the pickle stands for: a dict, or a tensor of a storage; a parameter is its tensor."""
    if not isinstance(what, _Global) or not isinstance(arguments, tuple):
        raise ValueError("damaged")
    name = what.path.rpartition(".")[2]
    if name == "OrderedDict" and not arguments:
        return {}
    if name.startswith("_rebuild_parameter") and arguments and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if name.startswith("_rebuild_tensor") and len(arguments) >= 6 and isinstance(arguments[0], _Storage):
        dtype, *notes = arguments[6:] if name.endswith("_v3") else (arguments[0].dtype, *arguments[6:])
        if any(notes):  # of torch: that the numbers are to be negated, for instance
            raise ValueError("a tensor has notes beside its data, which say how to read it")
        if isinstance(dtype, torch.dtype):
            return _Tensor(arguments[0], dtype, *arguments[1:4])
    raise ValueError(f"it calls {what.path} in a way no state dict does")
