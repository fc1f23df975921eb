"""Which classes are backends, for mypy: it reads this file, nothing runs it. A class that lacks a method of its
protocol, or has it with other parameters, is an error here, at its own name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from engines.backend import Decoder, Model
from engines.ort import OrtDecoder, OrtModel
from engines.trt.engine import DeviceArray
from engines.trt.model import TrtDecoder, TrtModel
from export.network.reference import ReferenceDecoder, ReferenceModel

if TYPE_CHECKING:
    import onnxruntime as ort


def models(
    on_onnxruntime: OrtModel, on_tensorrt: TrtModel, reference: ReferenceModel
) -> tuple[Model[ort.OrtValue], Model[DeviceArray], Model[Tensor]]:
    """Each with the tensor type it keeps."""
    return on_onnxruntime, on_tensorrt, reference


def decoders(
    on_onnxruntime: OrtDecoder, on_tensorrt: TrtDecoder, reference: ReferenceDecoder
) -> tuple[Decoder, Decoder, Decoder]:
    """A decoder hides its tensors."""
    return on_onnxruntime, on_tensorrt, reference
