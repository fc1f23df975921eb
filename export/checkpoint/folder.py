"""The tensors of a checkpoint and its vision tower under their official names, read piece by piece.

Files are read with ordinary reads, never mapped: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engines.bundle.geometry import Geometry
from engines.bundle.tensors import TOWER_PREFIX, expected_tensors
from engines.errors import CheckpointError
from export.checkpoint.shards import TensorInfo, read_folder

_BLOCK = re.compile(re.escape(TOWER_PREFIX) + r"vision_model\.encoder\.layers\.(\d+)\.")
_HIRES = re.compile(r"model\.layers\.(\d+)\.self_attn\.[kv]_proj_hd\.")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights the export can convert
_LISTED = 10  # problems spelt out in one error
_ACCEPTED = " or ".join(str(dtype) for dtype in DTYPES)
_SAMPLE = 64  # bytes of every tensor that enter the identity


class Checkpoint:
    """A checkpoint folder, opened: one namespace of tensor names over all its files. Holds no tensor data."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self._tensors = dict(sorted(tensors.items()))

    @classmethod
    def open(cls, folder: Path, tower_folder: Path | None = None) -> Checkpoint:
        """Read the key tables of all weight files of `folder`.

        If they hold no vision tower, the tensors of `tower_folder` (a CLIP folder) join under their official names.
        Raises CheckpointError if there are no weight files, or a file is missing, truncated, damaged or unsafe.
        """
        folder = Path(folder)
        tensors = read_folder(folder)
        if tensors is None:
            lora = (folder / "adapter_config.json").is_file()
            raise CheckpointError(
                f"{folder}: no weight files" + (", only a LoRA adapter" if lora else ""),
                expected="model.safetensors or pytorch_model.bin, or their shards with an index",
                fix="merge the adapter into its base model first" if lora else "check the path and the download",
            )
        own_tower = any(name.startswith(TOWER_PREFIX + "vision_model.") for name in tensors)
        if not own_tower and tower_folder is not None:
            tower = read_folder(Path(tower_folder))
            if tower is None:
                raise CheckpointError(
                    f"{tower_folder}: no weight files of the vision tower",
                    expected="model.safetensors or pytorch_model.bin",
                    fix="download the vision tower's weights into this folder",
                )
            for name, info in tower.items():
                if name.startswith("vision_model."):  # a whole CLIP has a text model too
                    name = TOWER_PREFIX + name
                    tensors[name] = TensorInfo(name, info.file, info.dtype, info.shape, info.offset, info.nbytes)
        return cls(folder, tensors)

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

        Raises CheckpointError if there is no such tensor or the file has become shorter than when it was opened.
        """
        info = self.info(name)
        with _opened(info) as file:
            for start in range(0, info.nbytes, max_bytes):
                size = min(max_bytes, info.nbytes - start)
                piece = file.read(size)
                while len(piece) < size:  # rare: one read may return less
                    rest = file.read(size - len(piece))
                    if not rest:
                        raise _ended(info)
                    piece += rest
                yield piece

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` in its stored dtype, in memory of its own.

        Raises CheckpointError if it is missing or its file has become shorter.
        """
        info = self.info(name)
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        view, done = data.numpy().data, 0
        with _opened(info) as file:
            while done < info.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise _ended(info)
                done += count
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
            raise CheckpointError(
                f"{self.folder}: {len(problems)} of {len(expected)} keys are missing or wrong:\n    "
                + "\n    ".join(problems[:_LISTED] + more),
                expected="the keys and shapes that config.json implies",
                fix="check that config.json belongs to these weights and that the download or merge is complete",
            )

    def _hint(self, name: str, expected: Mapping[str, Any] | tuple[()]) -> str:
        """A name that is present, not `expected`, and close to `name`; only names of the same layer count."""
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
        if config.is_file():
            digest.update(config.read_bytes())
        for info in self._tensors.values():
            row = [info.name, info.file.name, str(info.dtype), info.shape, info.offset, info.nbytes]
            digest.update(json.dumps(row).encode())
            digest.update(next(self.chunks(info.name, _SAMPLE), b""))
        files = sorted({info.file for info in self._tensors.values()})
        return {
            "folder": self.folder.resolve().name,
            "files": {self._relative(file): file.stat().st_size for file in files},
            "sha256": digest.hexdigest(),
        }

    def _relative(self, file: Path) -> str:
        inside = file.is_relative_to(self.folder)
        return file.relative_to(self.folder).as_posix() if inside else f"{file.parent.name}/{file.name}"


@contextmanager
def _opened(info: TensorInfo) -> Iterator[io.RawIOBase]:
    """The file of a tensor, at its beginning. What goes wrong with reading it is the checkpoint's error."""
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: {info.name} cannot be read: {error.strerror}",
            fix="the file has gone or its disk fails; start again when it is back",
        ) from error


def _ended(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: ended inside {info.name}",
        expected=f"at least {info.offset + info.nbytes} bytes",
        fix="the file changed while it was read; start again when it is complete",
    )


def dropped_tensors(checkpoint: Checkpoint, geometry: Geometry) -> dict[str, str]:
    """The name of every tensor of the checkpoint that the export does not need, and why."""
    needed = expected_tensors(geometry)
    return {name: _reason(name, geometry) for name in checkpoint.names if name not in needed}


def _reason(name: str, g: Geometry) -> str:
    hires, block = _HIRES.match(name), _BLOCK.match(name)
    if hires and int(hires[1]) <= g.start_layer:
        return f"hi-res projection of a layer that reads no pages (those after {g.start_layer} do)"
    if block and int(block[1]) >= g.vision.layers:
        return f"vision block after the selected layer (the first {g.vision.layers} run)"
    if name.startswith(TOWER_PREFIX + "vision_model.post_layernorm."):
        return "norm after the last vision block, which is not used"
    if name.endswith((".position_ids", ".rotary_emb.inv_freq")):
        return "constant table, computed instead"
    if name == "lm_head.weight" and g.tied_embeddings:
        return "shared with model.embed_tokens.weight"
    return "unknown to this model"
