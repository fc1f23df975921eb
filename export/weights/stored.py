"""What a bundle stores, compared with the checkpoint, and as the weights of a PyTorch model."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import Tensor

from engines.bundle.folder import Bundle
from engines.bundle.kinds import TRACED
from engines.errors import ParityError
from export.checkpoint.folder import Checkpoint
from export.checkpoint.packed import is_packed
from export.weights.folding import Folded, read_scales
from export.weights.rounding import dequantise, largest_errors, quantised
from export.weights.scheme import CODES, SCALE_SUFFIX, scheme_of
from export.weights.write import converted

HALF_A_STEP = 0.5001  # the division by the scale rounds, too


class Stored:
    """The weights of a bundle by their official names. Holds no tensor data."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.dtype = getattr(torch, bundle.precision.dtype)
        self._bundle = bundle
        self._tensors: dict[str, tuple[str, ir.ExternalTensor]] = {}
        for part, description in manifest.parts.items():
            for value in ir.load(bundle.graph(part, TRACED)).graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    self._tensors[value.name] = description.weights, value.const_value
        self.schemes = {
            name: scheme_of(name, tensor.dtype, self._shape(name), self._shape(name + SCALE_SUFFIX))
            for name, (_, tensor) in self._tensors.items()
            if tensor.dtype in CODES
        }  # of the weights that are quantised
        self.names = [name for name in self._tensors if name.removesuffix(SCALE_SUFFIX) not in self.schemes]
        self.names += self.schemes

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name][1].shape.numpy())

    def file(self, name: str) -> str:
        """The bundle's file that holds a tensor."""
        return self._tensors[name][0]

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """The file that holds a tensor, at its beginning."""
        with open(self._bundle.file(self.file(name)), "rb") as file:
            file.seek(self._tensors[name][1].offset)
            yield file

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """The scales that the bundle was built with, none where it was not calibrated. BundleError where they are
        damaged."""
        return read_scales(self._bundle)

    def source(self, checkpoint: Checkpoint) -> Checkpoint | Folded:
        """What was stored: the checkpoint, with the scales that the bundle was built with."""
        return Folded(checkpoint, self._bundle.manifest.geometry, self.scales) if self.scales else checkpoint

    @property
    def clipped(self) -> bool:
        """Whether blocks may be clipped: calibrated bundles alone."""
        return self._bundle.manifest.scales is not None

    def bytes(self, name: str) -> bytes:
        """All bytes of a tensor."""
        with self.opened(name) as file:
            return file.read(self._tensors[name][1].length)

    def codes(self, name: str) -> tuple[builtins.bytes, builtins.bytes]:
        """A quantised weight: codes as packed in the file, and its scales (see quantised)."""
        return self.bytes(name), self.bytes(name + SCALE_SUFFIX)

    def tensor(self, name: str) -> Tensor:
        """A weight as the graphs see it, in the checkpoint's layout; codes times their scales in float32."""
        shape, scheme = self._shape(name), self.schemes.get(name)
        if scheme:
            n, k = shape if scheme.rows else reversed(shape)
            return dequantise(*self.codes(name), scheme, (n, k))
        return torch.frombuffer(bytearray(self.bytes(name)), dtype=self.dtype).reshape(shape)


def largest_rounding(stored: Stored, checkpoint: Checkpoint) -> float:
    """Largest distance of a quantised value from the checkpoint's, in quantisation steps; 0 when nothing was rounded.
    Values of calibrated bundles are compared with the checkpoint's times the bundle's scales.

    Raises ParityError, which names the weight, when it is more than rounding to nearest explains, and when integers
    and scales that a packed checkpoint has itself are not the very same.
    """
    worst = 0.0
    own = {name: scheme for name, scheme in stored.schemes.items() if is_packed(checkpoint, name)}
    for name, expected in zip(own, quantised(checkpoint, own), strict=True):
        if stored.codes(name) != expected:
            raise ParityError(
                f"{name} in {stored.file(name)} is not the checkpoint's", expected="its own integers and scales"
            )
    rounded = ((name, scheme, *stored.codes(name)) for name, scheme in stored.schemes.items() if name not in own)
    for name, error in largest_errors(stored.source(checkpoint), rounded, stored.clipped):
        if not error <= HALF_A_STEP:
            raise ParityError(
                f"{name} in {stored.file(name)} differs from the checkpoint's by {error:.3f} quantisation steps",
                expected="at most half a step, and steps that the checkpoint's values give",
            )
        worst = max(worst, error)
    return worst


def stored_weights(bundle: Bundle, checkpoint: Checkpoint) -> int:
    """Compare every tensor stored in the bundle with the checkpoint, in bounded memory: byte for byte after conversion,
    and what was rounded to integers to within half a step; after folding in the scales of a calibrated bundle.

    Returns the number of tensors compared; raises ParityError at the first difference.
    """
    stored = Stored(bundle)
    largest_rounding(stored, checkpoint)
    require_others(stored, checkpoint)
    return len(stored.names)


def require_others(stored: Stored, checkpoint: Checkpoint) -> None:
    """ParityError unless every tensor that is not quantised is the checkpoint's, byte for byte after conversion."""
    source = stored.source(checkpoint)
    for name in stored.names:
        if name not in stored.schemes:
            with stored.opened(name) as file:
                for chunk in converted(source, name, stored.dtype):
                    if file.read(len(chunk)) != chunk:
                        raise ParityError(f"{name} in {stored.file(name)} is not the checkpoint's")
