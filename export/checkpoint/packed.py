"""The tensors of a packed checkpoint: a linear layer's qweight, qzeros, scales (and g_idx) read as its weight.

A layer has N outputs, K inputs and K / group groups. Codes and zeros lie in words of 32 bits, the lowest bits first:

  AWQ   qweight [K, N/8], qzeros [K/group, N/8]: a word is eight columns in the order ORDER; scales [K/group, N]
  GPTQ  qweight [K * bits/32, N]: a word is 32/bits rows in order; qzeros [K/group, N * bits/32]: a word is 32/bits
        columns in order, in the first format each less one; scales [K/group, N]; g_idx [K]: the group of each row

The value is (code - zero) * scale. The formats are those of AutoAWQ (WQLinear_GEMM) and AutoGPTQ (QuantLinear).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.bundle.precision import Precision
from engines.bundle.tensors import expected_tensors, quantised_tensors
from engines.errors import CheckpointError
from export.checkpoint.config import ModelConfig
from export.checkpoint.folder import Checkpoint
from export.checkpoint.formats.key_table import TensorInfo
from export.checkpoint.leftovers import dropped_tensors, require_depth, require_one_tower
from export.checkpoint.packed_settings import Packing
from export.checkpoint.tower import require_blocks_of

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: field i of a word is column ORDER[i] of its eight
PIECE = 1 << 15  # words unpacked at once: they stay in a core's cache
_SUFFIX = ".qweight"
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_UNEVEN = "quantise the model in groups that divide the inputs of every layer"
_DAMAGED = "check that the quantisation settings belong to these weights, and that the download is complete"


@dataclass(frozen=True)
class _Linear:
    """The tensors of one packed layer. n, k: its outputs and inputs; group: inputs that share a scale."""

    qweight: TensorInfo
    qzeros: TensorInfo
    scales: TensorInfo
    g_idx: TensorInfo | None
    n: int
    k: int
    group: int


class PackedCheckpoint(Checkpoint):
    """A packed checkpoint. To all that asks by official name, a packed weight [N, K] is a float32 tensor; its value
    integer * scale is exact there."""

    def __init__(self, raw: Checkpoint, packing: Packing) -> None:
        """`raw`: the checkpoint with its tensors as they are in the files.

        CheckpointError for tensors that are missing, of the wrong shape or dtype, or contradict the settings, for
        groups of inputs that are not neighbours, and for scales that are not positive float16 values. Reads everything
        but the codes.
        """
        self._raw, self.packing, self._linears = raw, packing, {}
        tensors = {name: raw.info(name) for name in raw.names}
        for name in [name for name in raw.names if name.endswith(_SUFFIX)]:
            prefix = name.removesuffix(_SUFFIX)
            official = f"{prefix}.weight"
            if official in tensors:
                raise CheckpointError(f"{raw.folder}: {prefix} is there twice, as floats and packed", fix=_DAMAGED)
            linear = self._linears[official] = _linear(raw, prefix, packing)
            _check_groups(raw, linear, packing)
            self._zeros(linear), self._scales(linear)  # small beside the codes: errors come before the work
            for suffix in ("qweight", "qzeros", "scales", "g_idx"):
                tensors.pop(f"{prefix}.{suffix}", None)
            parts = (linear.qweight, linear.qzeros, linear.scales, linear.g_idx)
            size = sum(part.nbytes for part in parts if part is not None)
            weight = linear.qweight
            shape = (linear.n, linear.k)
            tensors[official] = replace(weight, name=official, dtype=torch.float32, shape=shape, nbytes=size)
        super().__init__(raw.folder, tensors, raw.unread)

    def packs(self, name: str) -> bool:
        """Whether this weight is packed."""
        return name in self._linears

    def integers(self, name: str) -> tuple[Tensor, Tensor]:
        """A packed weight: code - zero [K, N] int8 and scales [K / group, N] float16, both exactly the checkpoint's."""
        linear, bits = self._linears[name], self.packing.bits
        zeros = self._zeros(linear)
        integers = torch.empty(linear.k, linear.n, dtype=torch.int8)
        width = linear.qweight.shape[1]
        start, rows = 0, max(1, PIECE // width)
        for chunk in self._raw.chunks(linear.qweight.name, rows * width * 4):
            fields = _fields(torch.frombuffer(bytearray(chunk), dtype=torch.int32).view(-1, width), bits)
            codes = _in_columns(fields) if self.packing.method == "awq" else fields.transpose(1, 2).flatten(0, 1)
            end = start + len(codes)
            group = torch.arange(start, end) // linear.group
            # Modulo 256, and the result is within -128 .. 127: all bits of its two's complement are right.
            integers[start:end] = (codes - zeros[group]).view(torch.int8)
            start = end
        return integers, self._scales(linear)

    def chunks(self, name: str, max_bytes: int = 16 << 20) -> Iterator[bytes]:
        """See Checkpoint.chunks; a packed weight comes in whole rows of float32, at least one at a time."""
        if not self.packs(name):
            yield from self._raw.chunks(name, max_bytes)
            return
        linear = self._linears[name]
        integers, scales = self.integers(name)
        rows = max(1, max_bytes // (4 * linear.k))
        for start in range(0, linear.n, rows):
            groups = integers[:, start : start + rows].t().float().unflatten(1, (-1, linear.group))
            values = groups * scales[:, start : start + rows].t().float()[..., None]
            yield values.contiguous().numpy().tobytes()

    def tensor(self, name: str) -> Tensor:
        """See Checkpoint.tensor."""
        if not self.packs(name):
            return self._raw.tensor(name)
        data = bytearray().join(self.chunks(name))
        return torch.frombuffer(data, dtype=torch.float32).reshape(self.info(name).shape)

    def identity(self) -> dict[str, Any]:
        """See Checkpoint.identity: of the files, packed as they are."""
        return self._raw.identity()

    def _zeros(self, linear: _Linear) -> Tensor:
        """[K / group, N] uint8."""
        packing = self.packing
        fields = _fields(self._raw.tensor(linear.qzeros.name), packing.bits)
        zeros = _in_columns(fields) if packing.method == "awq" else fields.flatten(1)
        if packing.zero_offset and int(zeros.max()) == 2**packing.bits - 1:
            raise CheckpointError(
                f"{linear.qzeros.file}: {linear.qzeros.name} stores a zero point of {2**packing.bits - 1}: "
                "0 less one, which overflows into its neighbours",
                expected="zero points that every reader of this format takes for the same",
                fix="save the checkpoint in the format gptq_v2, or quantise it with sym true",
            )
        return zeros + packing.zero_offset

    def _scales(self, linear: _Linear) -> Tensor:
        """[K / group, N] float16."""
        scales = self._raw.tensor(linear.scales.name)
        exact = scales.half()
        most = torch.finfo(torch.float16).max / 2 ** (self.packing.bits - self.packing.symmetric)
        fits = (exact.float() == scales.float()) & (exact > 0) & (exact <= most)  # False for NaN
        if not fits.all():
            worst = float(scales[~fits][0])
            raise CheckpointError(
                f"{linear.scales.file}: {linear.scales.name} holds {worst:g} ({scales.dtype})",
                expected=f"positive float16 values of at most {most:g}",
                fix="save the checkpoint's scales as float16" if 0 < worst <= most else "repair the checkpoint",
            )
        return exact


def open_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    """The checkpoint in `folder`, whose configuration is `config`: a PackedCheckpoint when it is quantised. It has all
    that the model needs, and nothing that the model would not use (see dropped_tensors).

    Raises CheckpointError as Checkpoint.open, PackedCheckpoint, require and dropped_tensors do, and when weights and
    configuration disagree on whether they are packed, or on the number of layers.
    """
    raw = Checkpoint.open(folder, config.tower_folder)
    require_depth(raw, config.geometry)
    if config.tower_blocks is not None:
        require_blocks_of(config.tower_blocks, raw.names, folder)
    checkpoint = _unpacked(raw, config)
    checkpoint.require(expected_tensors(config.geometry))
    require_one_tower(checkpoint, config.tower_folder, config.geometry)
    checkpoint.dropped = dropped_tensors(checkpoint, config.geometry)
    return checkpoint


def _unpacked(raw: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The checkpoint as it is, or its packed weights as weights."""
    packed = [name for name in raw.names if name.endswith(_SUFFIX)]
    if config.packing is None:
        if packed:
            raise CheckpointError(
                f"{raw.folder}: {len(packed)} packed weights such as {packed[0]}, and nothing says how they are packed",
                expected="quantization_config in config.json, or quantize_config.json beside it",
                fix="copy it from where the checkpoint was made",
            )
        return raw
    if not packed:
        raise CheckpointError(
            f"{raw.folder}: no packed weights, though its configuration says {config.packing.text}",
            expected="tensors called .qweight, .qzeros and .scales",
            fix="if these are floats, remove the quantisation settings; else complete the download",
        )
    largest = max(math.prod(shape) for shape in expected_tensors(config.geometry).values())
    for name in packed:  # scales and zeros are read whole: no more of them than the model has weights
        linear = _linear(raw, name.removesuffix(_SUFFIX), config.packing)
        if linear.n * linear.k > largest:
            raise CheckpointError(
                f"{linear.qweight.file}: {name} packs {linear.n} x {linear.k} weights",
                expected=f"at most {largest}, as many as the largest tensor has by config.json",
                fix=_DAMAGED,
            )
    return PackedCheckpoint(raw, config.packing)


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the checkpoint holds this weight as integers."""
    return isinstance(checkpoint, PackedCheckpoint) and checkpoint.packs(name)


def floats_of(checkpoint: PackedCheckpoint, config: ModelConfig) -> tuple[str, ...]:
    """Weights of the decoder's linear layers that a packed checkpoint holds as floats: they stay floats."""
    names = quantised_tensors(config.geometry, checkpoint.packing.head)
    return tuple(name for name in names if not checkpoint.packs(name))


def summary(checkpoint: PackedCheckpoint, precision: Precision, floats: tuple[str, ...]) -> str:
    """For people: what a bundle takes over, and what it does not."""
    text = f"quantised already ({checkpoint.packing.text}): its integers and scales are carried over exactly"
    if checkpoint.packing.grows:
        text += f", as code - zero point in {precision}: TensorRT takes no zero points"
    if floats:
        text += f"; {len(floats)} weights of linear layers are floats there and stay float16: {floats[0]}"
    return text + (", ..." if len(floats) > 1 else "")


def _linear(raw: Checkpoint, prefix: str, packing: Packing) -> _Linear:
    """The layer `prefix`, its shapes and dtypes checked against each other and the settings."""
    for suffix in ("qzeros", "scales"):
        if not raw.has(f"{prefix}.{suffix}"):
            raise CheckpointError(
                f"{raw.folder}: {prefix}.{suffix} is missing", expected="it beside the layer's qweight", fix=_DAMAGED
            )
    qweight, qzeros, scales = (raw.info(f"{prefix}.{suffix}") for suffix in ("qweight", "qzeros", "scales"))
    g_idx = raw.info(f"{prefix}.g_idx") if packing.method == "gptq" and raw.has(f"{prefix}.g_idx") else None
    for info, dtypes in ((qweight, (torch.int32,)), (qzeros, (torch.int32,)), (scales, _SCALES)):
        if info.dtype not in dtypes or len(info.shape) != 2:
            raise CheckpointError(
                f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}",
                expected=f"two dimensions of {' or '.join(map(str, dtypes))}",
                fix=_DAMAGED,
            )
    per, (rows, columns) = 32 // packing.bits, qweight.shape
    k, n = (rows, columns * per) if packing.method == "awq" else (rows * per, columns)
    group = packing.group or k
    if k % group:
        raise CheckpointError(
            f"{qweight.file}: {qweight.name} has {k} inputs in groups of {group}", expected="whole groups", fix=_UNEVEN
        )
    for info, shape in ((scales, (k // group, n)), (qzeros, (k // group, n // per))):
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {info.name} has the shape {list(info.shape)}, qweight {list(qweight.shape)}",
                expected=f"{list(shape)} for {packing.text}",
                fix=_DAMAGED,
            )
    if g_idx is not None and (g_idx.shape != (k,) or g_idx.dtype not in (torch.int32, torch.int64)):
        raise CheckpointError(
            f"{g_idx.file}: {g_idx.name} is {g_idx.dtype} {list(g_idx.shape)}", expected=f"int32 [{k}]", fix=_DAMAGED
        )
    return _Linear(qweight, qzeros, scales, g_idx, n, k, group)


def _check_groups(raw: Checkpoint, linear: _Linear, packing: Packing) -> None:
    """CheckpointError unless groups are neighbours and zeros what the settings say."""
    if linear.g_idx is None:
        permuted = packing.desc_act and linear.group != linear.k
    else:
        permuted = not torch.equal(raw.tensor(linear.g_idx.name).long(), torch.arange(linear.k) // linear.group)
    if permuted:
        raise CheckpointError(
            f"{linear.qweight.file}: {linear.qweight.name} has groups of inputs that are not neighbours (desc_act)",
            expected="g_idx = input // group_size: what shares a scale in a bundle are neighbours",
            fix="quantise the model with desc_act false",
        )
    if packing.symmetric:
        middle = 2 ** (packing.bits - 1) - packing.zero_offset
        word = int.from_bytes(bytes([middle if packing.bits == 8 else middle * 0x11] * 4), "little", signed=True)
        if not (raw.tensor(linear.qzeros.name) == word).all():
            raise CheckpointError(
                f"{linear.qzeros.file}: {linear.qzeros.name} holds zero points other than {2 ** (packing.bits - 1)}",
                expected=f"none: the configuration says {packing.text}",
                fix="put what holds into the quantisation settings: sym false (gptq) or zero_point true (awq)",
            )


def _fields(words: Tensor, bits: int) -> Tensor:
    """int32 [r, c] -> uint8 [r, c, 32 / bits], the lowest bits first."""
    data = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))  # little-endian
    return data if bits == 8 else torch.stack((data & 15, data >> 4), dim=-1).flatten(2)


def _in_columns(fields: Tensor) -> Tensor:
    """AWQ: uint8 [r, c, 8] -> [r, 8 * c], columns in their own order."""
    return fields[:, :, [ORDER.index(column) for column in range(8)]].flatten(1)
