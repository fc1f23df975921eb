"""Which classes are backends, for mypy: it reads this file, nothing runs it. Where a class lacks a method of its
protocol, or has it with other parameters, mypy says so here."""

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


def model_on_onnxruntime(model: OrtModel) -> Model[ort.OrtValue]:
    """Each model with the type of its tensors."""
    return model


def model_on_tensorrt(model: TrtModel) -> Model[DeviceArray]:
    return model


def reference_model(model: ReferenceModel) -> Model[Tensor]:
    return model


def decoder_on_onnxruntime(decoder: OrtDecoder) -> Decoder:
    return decoder


def decoder_on_tensorrt(decoder: TrtDecoder) -> Decoder:
    return decoder


def reference_decoder(decoder: ReferenceDecoder) -> Decoder:
    return decoder
