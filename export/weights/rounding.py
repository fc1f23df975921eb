"""Quantised weights made from a checkpoint's, and compared with them: rounding, packing, and the way back.

No library does this part: NVIDIA's modelopt, Intel's neural-compressor and ONNX Runtime's own quantiser read a whole
model, or run it, to quantise it; here a 7B checkpoint passes through in pieces of a megabyte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from engines.bundle.precision import Scheme
from engines.errors import ExportError
from export.checkpoint.formats.key_table import TensorInfo
from export.checkpoint.packed import PackedCheckpoint, is_packed

PIECE = 1 << 18  # values of a weight handled at once: their floats stay in a core's cache
RATIOS = tuple(1 - index / 20 for index in range(11))  # how far a block may be clipped: the share of its range kept

Item = TypeVar("Item")
Result = TypeVar("Result")


class Source(Protocol):
    """Where weights come from: a checkpoint, or one with scales folded in (export/weights/folding.py)."""

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and file of a tensor."""

    def chunks(self, name: str, max_bytes: int = ...) -> Iterator[bytes]:
        """Its bytes in order, in pieces."""


def quantise(values: Tensor, scheme: Scheme, ratios: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[n, K] of any float dtype -> codes [n, K] int8 (of E4M3 their bits) and scales [n, K / block] float16, rounded to
    nearest.

    A scale is the smallest float16 with which no value of its block is clipped; a block of zeros has the scale 1.
    `ratios` [n, K / block], among RATIOS: the share of a block's range that is kept; what lies outside is clipped.
    """
    low, high = scheme.limits
    blocks = values.float().unflatten(1, (-1, scheme.span(values.shape[1])))
    exact = _exact_scales(blocks, scheme)
    scales = _stored_scales(exact if ratios is None else exact * ratios)
    codes = (blocks / scales.float()[..., None]).clamp_(low, high)
    codes = codes.to(torch.float8_e4m3fn).view(torch.int8) if scheme.e4m3 else codes.round_().to(torch.int8)
    return codes.flatten(1), scales


def values_of(codes: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """[n, K] float32 that codes and scales as `quantise` gives them stand for."""
    blocks = _floats(codes, scheme).unflatten(1, (-1, scheme.span(codes.shape[1])))
    return (blocks * scales.float()[..., None]).flatten(1)


def _exact_scales(blocks: Tensor, scheme: Scheme) -> Tensor:
    """[n, K / block] float32 for blocks [n, K / block, block]: the smallest with which nothing is clipped."""
    low, high = scheme.limits
    least, most = blocks.aminmax(dim=2)
    return torch.maximum(most / high, least / low)


def _stored_scales(exact: Tensor) -> Tensor:
    """Scales as float16, rounded up; 1 for 0."""
    scales = exact.half()
    scales = torch.where(scales.float() < exact, (scales.view(torch.int16) + 1).view(torch.float16), scales)
    return torch.where(scales > 0, scales, 1.0)


def ratios_of(index: Tensor) -> Tensor:
    """The ratios that uint8 indices stand for, float32."""
    return torch.tensor(RATIOS)[index.long()]


def pack(integers: Tensor, bits: int) -> bytes:
    """int8 codes -> bytes as ONNX stores them: two int4 values in a byte, the first in its lower half."""
    if bits == 4:
        pairs = integers.reshape(-1, 2)
        integers = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
    return integers.contiguous().numpy().tobytes()


def unpack(data: bytes, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: int8 codes of `shape`."""
    values = torch.frombuffer(bytearray(data), dtype=torch.int8)
    if bits == 4:
        values = torch.stack(((values << 4) >> 4, values >> 4), dim=-1)  # shifts of int8 keep the sign
    return values.reshape(shape)


def dequantise(data: bytes, scales: bytes, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Packed codes and their scales -> the weight `shape` [N, K] they stand for, float32."""
    return values_of(_codes(data, scheme, shape), _scales(scales, shape[0]), scheme)


def _codes(data: bytes, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Codes of a weight `shape` [N, K] in that order, int8, however they are stored."""
    n, k = shape
    return unpack(data, scheme.bits, (n, k)) if scheme.rows else unpack(data, scheme.bits, (k, n)).t()


def _floats(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes as `unpack` gives them -> the float32 values they stand for, without their scales."""
    return codes.view(torch.float8_e4m3fn).float() if scheme.e4m3 else codes.float()


def _spacing(values: Tensor) -> Tensor:
    """Distance of the E4M3 numbers around each of `values`, float32: three bits after the first, none below 2**-9."""
    exponents = torch.where(values == 0, -5, torch.frexp(values).exponent.clamp(min=-5))
    return torch.ldexp(torch.ones_like(values), exponents - 4)


def _scales(data: bytes, n: int) -> Tensor:
    """[N, K / block] float32."""
    return torch.frombuffer(bytearray(data), dtype=torch.float16).view(-1, n).t().float()


def quantised(
    checkpoint: Source, schemes: Mapping[str, Scheme], clips: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[bytes, bytes]]:
    """Codes [K, N] ([N, K] where rows are gathered), packed, and scales [K / block, N] float16 of each weight of
    `schemes`, in order.

    Rounded from the checkpoint's floats; of a packed checkpoint its own, which are not rounded again.
    `clips`: how far to clip the blocks of a weight, uint8 [N, K / block] into RATIOS. Every core works on a weight of
    its own. ExportError for a value that is not finite or too large for float16, which TensorRT computes in.
    """
    yield from _on_all_cores(lambda item: _quantised(checkpoint, *item, (clips or {}).get(item[0])), schemes.items())


def largest_errors(
    checkpoint: Source, stored: Iterable[tuple[str, Scheme, bytes, bytes]], clipped: bool = False
) -> Iterator[tuple[str, float]]:
    """For each (name, its scheme, packed codes, scales): the name and the largest distance of a stored value from the
    checkpoint's, in steps. A step is the scale of a block, and of E4M3 the distance of those around the value. Rounded
    right, that is at most half a step.

    A scale that `quantise` gives for none of RATIOS (for 1, unless `clipped`) is an infinite distance; with one that it
    gives, what the codes cannot reach is compared with the last that they can.
    """
    ratios = RATIOS if clipped else RATIOS[:1]

    def error(item: tuple[str, Scheme, bytes, bytes]) -> tuple[str, float]:
        name, scheme, data, scales = item
        n, k = checkpoint.info(name).shape
        codes, factors = _codes(data, scheme, (n, k)), _scales(scales, n)
        worst = 0.0
        for start, rows in _pieces(checkpoint, name):
            blocks = rows.float().unflatten(1, (-1, scheme.span(k)))
            exact, step = _exact_scales(blocks, scheme), factors[start : start + len(rows)]
            known = torch.stack([_stored_scales(exact * ratio).float() == step for ratio in ratios]).any(0)
            wanted = (blocks / step[..., None]).clamp_(*scheme.limits)
            found = _floats(codes[start : start + len(rows)], scheme).unflatten(1, (-1, scheme.span(k)))
            distance = (wanted - found).abs() / (_spacing(wanted) if scheme.e4m3 else 1.0)
            worst = max(worst, float(torch.where(known[..., None], distance, torch.inf).nan_to_num(torch.inf).max()))
        return name, worst

    yield from _on_all_cores(error, stored)


def carried(checkpoint: PackedCheckpoint, name: str, scheme: Scheme) -> tuple[bytes, bytes]:
    """Integers, packed, and scales of a weight that the checkpoint holds as such. A group larger than the blocks gives
    each of its blocks the same scale. ExportError when the scheme cannot hold them."""
    integers, scales = checkpoint.integers(name)
    low, high = (int(end) for end in integers.aminmax())
    group = len(integers) // len(scales)
    if low < -(2 ** (scheme.bits - 1)) or high >= 2 ** (scheme.bits - 1) or group % scheme.block:
        raise ExportError(
            f"{name} has integers in {low} .. {high} and groups of {group} (code less zero point)",
            expected=f"what {scheme.precision} in blocks of {scheme.block} holds exactly",
            fix=f"build with --{checkpoint.packing.precision} and no --block-size",
        )
    scales = scales.repeat_interleave(group // scheme.block, 0)
    return pack(integers, scheme.bits), scales.numpy().tobytes()


def _quantised(checkpoint: Source, name: str, scheme: Scheme, clips: Tensor | None) -> tuple[bytes, bytes]:
    if is_packed(checkpoint, name):
        return carried(checkpoint, name, scheme)
    n, k = checkpoint.info(name).shape
    codes = torch.empty((n, k) if scheme.rows else (k, n), dtype=torch.int8)
    scales = torch.empty(k // scheme.span(k), n, dtype=torch.float16)
    for start, rows in _pieces(checkpoint, name):
        end = start + len(rows)
        found, steps = quantise(rows, scheme, None if clips is None else ratios_of(clips[start:end]))
        (codes if scheme.rows else codes.t())[start:end], scales[:, start:end] = found, steps.t()
    return pack(codes, scheme.bits), scales.numpy().tobytes()


def _pieces(checkpoint: Source, name: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, K]) of a weight, a few rows at a time, checked to be finite."""
    info = checkpoint.info(name)
    k = info.shape[1]
    start, rows = 0, max(1, PIECE // k)
    for chunk in checkpoint.chunks(name, rows * k * info.dtype.itemsize):
        values = torch.frombuffer(bytearray(chunk), dtype=info.dtype).view(-1, k)
        worst = float(values.abs().max())
        if not worst <= torch.finfo(torch.float16).max:
            raise ExportError(
                f"{name} in {info.file} holds {worst:g}",
                expected=f"finite values within {torch.finfo(torch.float16).max:g}",
                fix="build with --bf16 or --fp32" if worst < float("inf") else "repair the checkpoint",
            )
        yield start, values
        start += len(values)


def _on_all_cores(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` of every item, in order; a few results ahead of the reader, never all of them."""
    items = iter(items)
    with _one_thread_each() as cores, ThreadPoolExecutor(cores) as pool:
        pending: deque[Future] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > cores:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """How many cores there are; in the block, threads that are started use one each, not all of them."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)
