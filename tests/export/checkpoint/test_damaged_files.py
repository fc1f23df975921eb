"""Weight files that are damaged, made up or changed while they are read: typed errors, soon, in bounded memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engines.errors import CheckpointError, FlexError
from export.checkpoint.folder import Checkpoint
from export.checkpoint.formats.key_table import TABLE_LIMIT
from export.checkpoint.formats.safetensors import read_safetensors
from export.checkpoint.formats.torch_save import read_torch

STATE = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.nn.Parameter(torch.ones(5).half())}


@pytest.fixture
def archive(tmp_path) -> Path:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_header(path: Path, header: object, data: int = 8) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    return path


# safetensors.

HEADERS = {
    "a list": [1],
    "no dict": b'"a"',
    "entry no dict": {"a": 1},
    "entry a list": {"a": [1, 2]},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "dtype a number": {"a": entry([2], [0, 8], 7)},
    "dtype a list": {"a": entry([2], [0, 8], ["F32"])},
    "unknown dtype": {"a": entry([2], [0, 8], "F7")},
    "shape of floats": {"a": entry([2.0], [0, 8])},
    "shape of bools": {"a": entry([True, 2], [0, 8])},
    "shape of text": {"a": entry(["2"], [0, 8])},
    "shape is text": {"a": entry("2", [0, 8])},
    "shape is null": {"a": entry(None, [0, 8])},
    "negative shape": {"a": entry([-2], [0, 8])},
    "two negatives": {"a": entry([-2, -1], [0, 8])},
    "shape beyond 64 bits": {"a": entry([1 << 64], [0, 8])},
    "product beyond 64 bits": {"a": entry([1 << 32, 1 << 32, 1 << 32], [0, 8])},
    "a million dimensions": {"a": entry([1] * 1_000_000, [0, 4])},
    "a hundred large dimensions": {"a": entry([1 << 62] * 100, [0, 8])},
    "float offsets": {"a": entry([2], [0.0, 8.0])},
    "bool offsets": {"a": entry([2], [False, 8])},
    "negative offsets": {"a": entry([2], [-8, 0])},
    "three offsets": {"a": entry([2], [0, 8, 8])},
    "one offset": {"a": entry([2], [0])},
    "offsets in reverse": {"a": entry([2], [8, 0])},
    "offsets beyond 64 bits": {"a": entry([2], [0, 1 << 70])},
    "beyond the end": {"a": entry([4], [0, 16])},
    "too few bytes": {"a": entry([2], [0, 4])},
    "a hole before": {"a": entry([1], [4, 8])},
    "a hole between": {"a": entry([1], [0, 4]), "b": entry([0], [8, 8])},
    "a hole after": {"a": entry([1], [0, 4])},
    "overlap": {"a": entry([2], [0, 8]), "b": entry([1], [4, 8])},
    "the same bytes twice": {"a": entry([2], [0, 8]), "b": entry([2], [0, 8])},
    "metadata a list": {"__metadata__": [1], "a": entry([2], [0, 8])},
    "metadata of numbers": {"__metadata__": {"format": 1}, "a": entry([2], [0, 8])},
    "no tensors, but data": {},
}
ONLY_HERE = {  # what the library takes: a key that comes twice, of which it keeps the last; other names
    "twice": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
    b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "infinity": b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}',
    "large exponent": b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}',
    "5,000 digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}',
    "brackets": b"[" * 100_000,
    "braces": b'{"a":' * 100_000,
    "no UTF-8": b'{"\xff": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "a name nobody can print": {"\x1b[2J": entry([2], [0, 8])},
    "half a character": b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "a name of 10,000 characters": {"x" * 10_000: entry([2], [0, 8])},
    "empty": b"",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_the_library_refuses(tmp_path, kind):
    path = write_header(tmp_path / "model.safetensors", HEADERS[kind])
    with pytest.raises((SafetensorError, TypeError)), safe_open(path, "pt"):
        pass
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ") as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ONLY_HERE)
def test_headers_that_are_refused_here(tmp_path, kind):
    path = write_header(tmp_path / "model.safetensors", ONLY_HERE[kind])
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 1000 and all(line.isprintable() for line in str(caught.value).splitlines())


@pytest.mark.parametrize("claimed", [TABLE_LIMIT + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_that_claims_much_takes_nothing(tmp_path, claimed):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", claimed))
        file.truncate(1 << 42)  # sparse: 4 TB that take no disk
    with pytest.raises(CheckpointError, match="not a whole safetensors header: the file has 4398046511104 bytes"):
        read_safetensors(path)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
        with pytest.raises(CheckpointError, match=r"pointer of Git LFS[\s\S]*git lfs pull"):
            Checkpoint.open(tmp_path)
        (tmp_path / name).unlink()


# torch.save.


def flipped(archive: Path, position: int, bit: int = 0) -> None:
    raw = bytearray(archive.read_bytes())
    raw[position] ^= 1 << bit
    archive.write_bytes(raw)


def rebuilt(archive: Path, change: Callable[[str, bytes], bytes], **options: object) -> None:
    """The archive with what `change` makes of each record, with right checksums."""
    with zipfile.ZipFile(archive) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(archive, "w", **options) as new:
        for name, data in records.items():
            new.writestr(name, change(name, data))


def with_pickle(archive: Path, data: bytes) -> None:
    rebuilt(archive, lambda name, old: data if name.endswith("/data.pkl") else old)


def test_damaged_bytes_are_noticed(archive):
    """Of every seventh byte one bit, one at a time: an error, or the same tensors, since some bytes mean nothing."""
    whole, refused = archive.read_bytes(), 0
    for position in range(0, len(whole), 7):
        archive.write_bytes(whole)
        flipped(archive, position, position % 8)
        try:
            checkpoint = Checkpoint.open(archive.parent)
            assert checkpoint.names == ["a", "b"]
            assert all(torch.equal(checkpoint.tensor(name), value) for name, value in STATE.items())
            assert all(b"".join(checkpoint.chunks(name, 7)) == value.detach().numpy().tobytes() for name, value in
                       STATE.items())  # fmt: skip
        except FlexError:
            refused += 1
    assert refused > len(whole) / 7 / 4


def test_shorter_archives_are_refused(archive):
    whole = archive.read_bytes()
    for length in range(0, len(whole), 19):
        archive.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            Checkpoint.open(archive.parent)


def test_damaged_data_is_told_by_its_checksum(archive):
    info = read_torch(archive)["a"]
    flipped(archive, info.offset + 5)
    checkpoint = Checkpoint.open(archive.parent)
    for read in (checkpoint.tensor, lambda name: list(checkpoint.chunks(name, 16))):
        with pytest.raises(CheckpointError, match=r"the data of a is damaged: its CRC-32 is"):
            read("a")
    assert torch.equal(checkpoint.tensor("b"), STATE["b"])


def test_files_saved_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.info("a").crc is None and torch.equal(checkpoint.tensor("a"), STATE["a"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol(tmp_path, protocol):
    module = torch.nn.Linear(3, 2)  # its state dict is an OrderedDict with _metadata
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == ["bias", "weight"] and torch.equal(checkpoint.tensor("weight"), module.weight)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
     torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2],
)  # fmt: skip
def test_every_dtype(tmp_path, dtype):
    value = torch.tensor([0, 1, 1]).to(dtype)
    torch.save({"x": value}, tmp_path / "pytorch_model.bin")
    read = Checkpoint.open(tmp_path).tensor("x")
    assert read.dtype == dtype and torch.equal(read.view(torch.uint8), value.view(torch.uint8))


class Call:
    def __init__(self, what: object, *arguments: object) -> None:
        self.call = what, arguments

    def __reduce__(self) -> tuple:
        return self.call


CALLS = {
    "exec": Call(exec, "raise SystemExit"),
    "memory": Call(bytearray, 1 << 40),  # torch's safe loader would run this, and the next two
    "a large tensor": Call(torch.Tensor, 1 << 40),
    "a large storage": Call(torch.FloatStorage, 1 << 40),
    "numpy": np.ones(3),
    "a set": {1, 2},
    "a module": torch.nn.Linear(2, 2),
    "text": "text",
    "a list": [torch.ones(2)],
    "numbers": {"a": 1},
    "a trainer's state": {"model": {"a": torch.ones(2)}, "step": 3},
    "a number for a name": {1: torch.ones(2)},
    "complex numbers": {"a": torch.ones(2, dtype=torch.complex64)},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "on the meta device": {"a": torch.ones(2, device="meta")},
    "negated as it is read": {"a": torch._neg_view(torch.ones(2))},
    "float8 negated as it is read": {"a": torch._neg_view(torch.ones(2).to(torch.float8_e5m2))},
    "expanded": {"a": torch.ones(1).expand(5)},
    "transposed": {"a": torch.ones(2, 3).t()},
}


@pytest.mark.parametrize("kind", CALLS)
def test_pickles_of_anything_else(tmp_path, kind):
    torch.save(CALLS[kind], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: ") as caught:
        Checkpoint.open(tmp_path)
    assert len(str(caught.value)) < 1000


HOSTILE = {
    "nested tuples as a key": b"}()" + b"\x85" * 100_000 + b"K\x01u",
    "nested tuples as a tensor": b"}(X\x01\0\0\0a)" + b"\x85" * 100_000 + b"u",
    "doubling": b")q\0" + b"h\0h\0\x86q\0" * 100_000,
    "a memo of 2**31 places": b")r\xff\xff\xff\x7f",
    "text of 4 GB": b"X\xff\xff\xff\xff",
    "bytes of 2**60": b"\x96" + b"\xff" * 7 + b"\x0f",
    "a million operations": b")" * 1_000_000,
    "a mark too many": b"(((",
    "nothing on the stack": b"R",
    "no such memo": b"h\x07",
    "a key twice": b"}(X\x01\0\0\0aNX\x01\0\0\0aNu",
    "state of a tuple": b")}b",
    "a call of a dict": b"})R",
    "a text opcode": b"I" + b"9" * 5000 + b"\n",
    "a storage without a type": b"(X\x07\0\0\0storageNX\x01\0\0\0aX\x01\0\0\0bK\x01tQ",
    "a doubling list for a module": b"]q\0" + b"](h\0h\0eq\0" * 40 + b"X\x01\0\0\0a\x93",
    "a doubling list for a name": b"X\x01\0\0\0a]q\0" + b"](h\0h\0eq\0" * 40 + b"\x93",
    "a persistent number": b"K\x01Q",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_pickles_made_to_hurt(archive, kind):
    with_pickle(archive, b"\x80\x02" + HOSTILE[kind] + b".")
    started = time.process_time()
    with pytest.raises(CheckpointError):
        Checkpoint.open(archive.parent)
    assert time.process_time() - started < 20  # 3 at most where it was measured


def test_names_in_pickles_are_printable(archive):
    torch.save({"\x1b[2J": torch.ones(2)}, archive)
    with pytest.raises(CheckpointError, match="a tensor is called") as caught:
        Checkpoint.open(archive.parent)
    assert "\x1b" not in str(caught.value)


def test_the_pickle_must_tell_the_truth_of_its_storages(archive):
    with zipfile.ZipFile(archive) as source:
        data = source.read("pytorch_model/data.pkl")
    for old, new in (
        (b"K\x0c", b"K\x0d"),
        (b"K\x03K\x04\x86", b"K\x04K\x04\x86"),
        (b"X\x01\x00\x00\x000", b"X\x01\0\0\x007"),
    ):
        assert old in data
        torch.save(STATE, archive)
        with_pickle(archive, data.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=r"the data of a is not what the pickle says|a is not contiguous"):
            Checkpoint.open(archive.parent)


def test_archives_as_of_more_than_4_gb(archive, monkeypatch):
    """Sizes and places are then in other fields; Python writes these from here on."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    rebuilt(archive, lambda name, data: data)
    assert b"PK\x06\x06" in archive.read_bytes()
    checkpoint = Checkpoint.open(archive.parent)
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in STATE.items())


def test_compressed_archives_are_not_unpacked(archive):
    rebuilt(
        archive, lambda name, data: bytes(64 << 20) if name.endswith("0") else data, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(CheckpointError, match="compressed"):
        Checkpoint.open(archive.parent)


def test_a_record_that_comes_twice(archive):
    with zipfile.ZipFile(archive, "a") as more, pytest.warns(UserWarning, match="Duplicate name"):
        more.writestr("pytorch_model/data/0", bytes(48))
    with pytest.raises(CheckpointError, match="there twice"):
        Checkpoint.open(archive.parent)


def test_records_that_overlap(archive):
    """Two entries of the directory at one place."""
    raw = bytearray(archive.read_bytes())
    entries = [at for at in range(len(raw) - 46) if raw[at : at + 4] == b"PK\x01\x02"]
    by_name = {bytes(raw[at + 46 : at + 46 + raw[at + 28]]): at for at in entries}
    first, second = by_name[b"pytorch_model/data/0"], by_name[b"pytorch_model/data/1"]
    raw[second + 42 : second + 46] = raw[first + 42 : first + 46]
    archive.write_bytes(raw)
    with pytest.raises(CheckpointError, match="lies in another file"):
        Checkpoint.open(archive.parent)


def test_a_directory_without_end(tmp_path):
    """An archive of a directory alone, of more bytes than a key table may have."""
    size = TABLE_LIMIT + 1
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(4 + size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, 4, 0))
    with pytest.raises(CheckpointError, match=f"a directory of {TABLE_LIMIT + 1} bytes"):
        Checkpoint.open(tmp_path)


def test_legacy_pickles_never_run(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(CALLS["exec"]))
    with pytest.raises(CheckpointError, match="not a zip archive"):
        Checkpoint.open(tmp_path)


# While they are read.


@pytest.mark.parametrize("how", ["shorter", "longer", "touched", "replaced", "gone", "a pipe", "a folder"])
def test_files_that_change_after_their_table_was_read(tmp_path, how):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    checkpoint, content = Checkpoint.open(tmp_path), path.read_bytes()
    match how:
        case "shorter":
            path.write_bytes(content[:-8])
        case "longer":
            path.write_bytes(content + b"x")
        case "touched":
            os.utime(path, ns=(1, 1))
        case "replaced":
            path.unlink()
            path.write_bytes(content)
            os.utime(path, ns=(1, 1))
        case "gone":
            path.unlink()
        case "a pipe":
            path.unlink()
            os.mkfifo(path)
        case "a folder":
            path.unlink()
            path.mkdir()
    for read in (checkpoint.tensor, lambda name: list(checkpoint.chunks(name)), lambda _: checkpoint.identity()):
        with pytest.raises(CheckpointError, match=r"ended inside a|changed since|is missing|is a pipe|is a folder"):
            read("a")


def test_a_file_that_changes_between_two_pieces(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1 << 16)}, path)
    pieces = Checkpoint.open(tmp_path).chunks("a", 1 << 16)
    next(pieces)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since its key table was read"):
        list(pieces)


def test_a_disk_that_fails(tmp_path, monkeypatch):
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("export.checkpoint.folder.stamp", fails)
    with pytest.raises(CheckpointError, match="a cannot be read: Input/output error"):
        checkpoint.tensor("a")
    monkeypatch.setattr("export.checkpoint.formats.safetensors.stamp", fails)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        Checkpoint.open(tmp_path)
