"""Checkpoint tensors -> one weight file per graph, in bounded memory: a chunk is read, converted, checked, written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir
import torch

from engines.bundle.precision import Scheme
from engines.bundle.writer import BundleWriter
from engines.errors import ExportError
from export.weights.rounding import Source, quantised
from export.weights.scheme import CODES, SCALE_SUFFIX
from plugins.op import ALIGNMENT

CHUNK = 16 << 20  # bytes held at once


def stored_bytes(model: ir.Model) -> int:
    """Bytes the weights of a traced graph take as the graph reads them."""
    return sum(_bytes(value) for value in _weights(model))


def write_weights(
    model: ir.Model,
    checkpoint: Source,
    dtype: torch.dtype,
    bundle: BundleWriter,
    file: str,
    progress: Callable[[int], None] | None = None,
    schemes: Mapping[str, Scheme] | None = None,
    clips: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Stream the tensors of a traced graph from the checkpoint into `file` and point the graph's initializers at it.

    `dtype`: of those that are not quantised; `schemes`, `clips`: of those that are (see quantised). Raises ExportError
    when a value is not finite or out of range. `progress` is told bytes written.
    """
    weights = sorted(_weights(model), key=lambda value: str(value.name))  # scales right after their weight
    coded = {name: (schemes or {})[name] for name in (str(value.name) for value in weights if value.dtype in CODES)}

    def chunks() -> Iterator[bytes]:
        offset = 0
        made = quantised(checkpoint, coded, clips)
        scales = b""
        for value in weights:
            padding = -offset % ALIGNMENT
            yield bytes(padding)
            offset += padding
            size = _bytes(value)
            value.const_value = ir.ExternalTensor(
                file, offset, size, value.dtype, shape=value.shape, name=value.name, base_dir=bundle.folder
            )
            offset += size
            if value.dtype in CODES:
                data, scales = next(made)
                yield data
            elif value.name.endswith(SCALE_SUFFIX):
                yield scales
            else:
                yield from converted(checkpoint, value.name, dtype)

    bundle.write(file, chunks(), progress)


def converted(checkpoint: Source, name: str, dtype: torch.dtype) -> Iterator[bytes]:
    """Raw little-endian bytes of a tensor in `dtype`, in chunks; ExportError for a value `dtype` cannot hold."""
    source = checkpoint.info(name).dtype
    for chunk in checkpoint.chunks(name, CHUNK):
        values = torch.frombuffer(bytearray(chunk), dtype=source)
        result = values.to(dtype)
        # Both ends at once, without a mask over the chunk: NaN and infinities survive into min and max.
        low, high = (float(end) for end in result.aminmax())
        if not -float("inf") < low <= high < float("inf"):
            finite = torch.isfinite(values).all()
            worst = float(values.abs().max())
            raise ExportError(
                f"{name} in {checkpoint.info(name).file} holds {worst:g}" + ("" if finite else " (not finite)"),
                expected=f"finite values within {torch.finfo(dtype).max:g} for {dtype}",
                fix="build with --bf16 or --fp32" if finite else "repair the checkpoint",
            )
        yield result.view(torch.uint8).numpy().tobytes()


def _weights(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values() if value.const_value is None]


def _bytes(value: ir.Value) -> int:
    return int(torch.Size(value.shape.numpy()).numel()) * value.dtype.bitwidth // 8
