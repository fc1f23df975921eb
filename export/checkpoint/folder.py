"""The tensors of a checkpoint and its vision tower under their official names, read piece by piece.

Files are read with ordinary reads, never mapped: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from engines.bundle.tensors import HEAD, TOWER_PREFIX
from engines.errors import CheckpointError
from export.checkpoint.formats.key_table import DAMAGED, TensorInfo, stamp
from export.checkpoint.model_folder import read_folder, require_plain_names, require_whole_weights, weights_in
from plugins.files import open_file, read_file

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights the export can convert
_LISTED = 10  # problems spelt out in one error
_ACCEPTED = " or ".join(str(dtype) for dtype in DTYPES)
_GONE = "the file has gone or its disk fails; start again when it is back"
_SAMPLE = 64  # bytes of every tensor that enter the identity


class Checkpoint:
    """A checkpoint folder, opened: one namespace of tensor names over all its files. Holds no tensor data.

    unread: what lies in its folders and is not read, and why: weight files, and tensors by `FILE: NAME`.
    dropped: what a bundle leaves out of all this, and why that changes nothing, once open_checkpoint has proven it.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, TensorInfo], unread: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.unread = dict(unread or {})
        self.dropped: dict[str, str] = {}
        self._tensors = dict(sorted(tensors.items()))

    @classmethod
    def open(cls, folder: Path, tower_folder: Path | None = None) -> Checkpoint:
        """Read the key tables of all weight files of `folder`.

        If they hold no vision tower, the tensors of `tower_folder` (a CLIP folder) join under their official names.
        Raises CheckpointError if there are no weight files, or a file is missing, truncated, damaged or unsafe, and for
        weights that are an adapter, parts of a training run, or under the names of a wrapper.
        """
        folder = Path(folder)
        require_whole_weights(folder)
        listing = read_folder(folder)
        if listing is None:
            raise CheckpointError(
                f"{folder}: no weight files",
                expected="model.safetensors or pytorch_model.bin, or their shards with an index",
                fix="check the path and the download",
            )
        tensors, unread = dict(listing.tensors), dict(listing.unread)
        require_plain_names(folder, tensors)
        own_tower = any(name.startswith(TOWER_PREFIX + "vision_model.") for name in tensors)
        if tower_folder is not None and own_tower:
            why = "file not read: the checkpoint has a vision tower of its own"
            unread |= {f"{Path(tower_folder).name}/{name}": why for name in weights_in(Path(tower_folder))}
        elif tower_folder is not None:
            tower, left = read_tower_weights(Path(tower_folder))
            tensors |= tower
            unread |= left
        return cls(folder, tensors, unread)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return list(self._tensors)

    def has(self, name: str) -> bool:
        """Whether there is a tensor `name`."""
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Where tensor `name` lies. Raises CheckpointError if there is none."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: key {name} is missing", fix=self._hint(name, ())) from None

    def chunks(self, name: str, max_bytes: int = 16 << 20) -> Iterator[bytes]:
        """The raw little-endian bytes of tensor `name` in order, in pieces of `max_bytes` (the last may be shorter).

        Raises CheckpointError if there is no such tensor, or its file was changed since it was opened or is damaged.
        """
        info, crc = self.info(name), 0
        with _opened(info) as file:
            for start in range(0, info.nbytes, max_bytes):
                size = min(max_bytes, info.nbytes - start)
                piece = file.read(size)
                if len(piece) < size:
                    raise _ended(info)
                crc = zlib.crc32(piece, crc) if info.crc is not None else 0
                yield piece
        _require_crc(info, crc)

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` in its stored dtype, in memory of its own.

        Raises CheckpointError if it is missing, or its file was changed or is damaged.
        """
        info = self.info(name)
        with _opened(info) as file:
            data = torch.empty(info.nbytes, dtype=torch.uint8)
            view = data.numpy().data
            if file.readinto(view) < info.nbytes:
                raise _ended(info)
        _require_crc(info, zlib.crc32(view) if info.crc is not None else 0)
        return data.view(info.dtype).reshape(info.shape)

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every key of `expected` is present with that shape and a dtype of `DTYPES`.

        Raises one CheckpointError that lists all that is wrong (the first ones in full, the rest as a count).
        """
        problems: list[str] = []
        for name, shape in expected.items():
            info = self._tensors.get(name)
            wanted = f"expected {list(shape)}"
            if info is None:
                hint = self._hint(name, expected) if len(problems) < _LISTED else ""  # slow, and only these are shown
                problems.append(f"{name}: missing, {wanted}; {hint}")
            elif info.shape != tuple(shape):
                problems.append(f"{name}: shape {list(info.shape)} in {info.file.name}, {wanted}")
            elif info.dtype not in DTYPES:
                problems.append(f"{name}: dtype {info.dtype} in {info.file.name}, expected {_ACCEPTED}")
        if problems:
            more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            empty = [name for name in expected if name in self._tensors and self._tensors[name].nbytes == 0]
            fix = "check that config.json belongs to these weights and that the download or merge is complete"
            if empty:  # what Hugging Face's Trainer saves beside the states of DeepSpeed's stage 3
                fix = f"{len(empty)} tensors are empty: ZeRO's placeholders; merge the states with its zero_to_fp32.py"
            raise CheckpointError(
                f"{self.folder}: {len(problems)} of {len(expected)} keys are missing or wrong:\n    "
                + "\n    ".join(problems[:_LISTED] + more),
                expected="the keys and shapes that config.json implies",
                fix=fix,
            )

    def _hint(self, name: str, expected: Mapping[str, Any] | tuple[()]) -> str:
        """A name that is present, not `expected`, and close to `name`; only names of the same layer count."""
        if name == HEAD:
            return "config.json does not say that it shares model.embed_tokens.weight (tie_word_embeddings)"
        numbers = re.findall(r"\d+", name)
        spare = [other for other in self._tensors if other not in expected and re.findall(r"\d+", other) == numbers]
        close = difflib.get_close_matches(name, spare, n=1, cutoff=0.8)
        if close:
            return f"similar key: {close[0]}"
        if name.startswith(TOWER_PREFIX):
            return "neither the checkpoint nor a vision tower folder has it"
        return "no similar key"

    def identity(self) -> dict[str, Any]:
        """What a manifest records of the source: folder name, size of every weight file in bytes, and a SHA-256.

        The digest covers config.json, the key table and the first bytes of every tensor. It tells fine-tunes of one
        model apart without reading all the weights; it is not a proof against deliberate changes. It does not depend
        on where the folder is.
        """
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        if config.exists():
            digest.update(read_file(config, CheckpointError))
        sizes = {}
        for info in self._tensors.values():
            row = [info.name, info.file.name, str(info.dtype), info.shape, info.offset, info.nbytes]
            digest.update(json.dumps(row).encode())
            with _opened(info) as file:
                digest.update(file.read(min(_SAMPLE, info.nbytes)))
                sizes[info.file] = os.fstat(file.fileno()).st_size
        return {
            "folder": self.folder.resolve().name,
            "files": {self._relative(file): sizes[file] for file in sorted(sizes)},
            "sha256": digest.hexdigest(),
        }

    def _relative(self, file: Path) -> str:
        inside = file.is_relative_to(self.folder)
        return file.relative_to(self.folder).as_posix() if inside else f"{file.parent.name}/{file.name}"


def read_tower_weights(folder: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a CLIP folder's vision model under their official names; what else is there, and why not."""
    listing = read_folder(folder)
    if listing is None:
        raise CheckpointError(
            f"{folder}: no weight files of the vision tower",
            expected="model.safetensors or pytorch_model.bin",
            fix="download the vision tower's weights into this folder",
        )
    require_plain_names(folder, listing.tensors)
    tensors, unread = {}, {f"{folder.name}/{name}": why for name, why in listing.unread.items()}
    for name, info in listing.tensors.items():
        if name.startswith("vision_model."):
            tensors[TOWER_PREFIX + name] = replace(info, name=TOWER_PREFIX + name)
        else:  # a whole CLIP has a text model, too
            unread[f"{folder.name}/{info.file.name}: {name}"] = "not of the vision model"
    return tensors, unread


@contextmanager
def _opened(info: TensorInfo) -> Iterator[BufferedReader]:
    """The file of a tensor, at its beginning. What goes wrong with reading it is the checkpoint's error, and so is a
    file that somebody wrote to since its key table was read."""
    try:
        with open_file(info.file, CheckpointError, fix=_GONE) as file:
            _require_unchanged(info, file)
            file.seek(info.offset)
            yield cast(BufferedReader, file)
            _require_unchanged(info, file)
    except OSError as error:
        raise CheckpointError(f"{info.file}: {info.name} cannot be read: {error.strerror}", fix=_GONE) from error


def _require_unchanged(info: TensorInfo, file: BinaryIO) -> None:
    now = stamp(file)
    if now[0] < info.offset + info.nbytes:
        raise _ended(info)
    if now != info.stamp:
        raise CheckpointError(
            f"{info.file}: changed since its key table was read (size and time {info.stamp}, now {now})",
            expected="a file that nobody writes to",
            fix="start again when it is complete",
        )


def _require_crc(info: TensorInfo, crc: int) -> None:
    if info.crc is not None and crc != info.crc:
        raise CheckpointError(
            f"{info.file}: the data of {info.name} is damaged: its CRC-32 is {crc:08x}",
            expected=f"{info.crc:08x}, as the archive says",
            fix=DAMAGED,
        )


def _ended(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: ended inside {info.name}",
        expected=f"at least {info.offset + info.nbytes} bytes",
        fix="the file changed while it was read; start again when it is complete",
    )
