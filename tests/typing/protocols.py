"""Which classes are backends, for mypy: it reads this file, nothing runs it. Where a class lacks a method of its
protocol, or has it with other parameters, mypy says so here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from engines.backend import Decoder, Model, Slots
from engines.ort import OrtDecoder, OrtModel, OrtSlots
from engines.trt.decoder import TrtDecoder
from engines.trt.engine import DeviceArray
from engines.trt.model import TrtModel
from engines.trt.slots import FirstRows, TrtSlots
from export.network.reference import ReferenceDecoder, ReferenceModel, ReferenceRows, ReferenceSlots
from runtime.answer import Decoding, Draft
from runtime.score.walk import Walk

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


def first_rows_on_tensorrt(decoder: FirstRows) -> Decoder:
    return decoder


def reference_rows(decoder: ReferenceRows) -> Decoder:
    return decoder


def slots_on_onnxruntime(slots: OrtSlots) -> Slots[ort.OrtValue]:
    return slots


def slots_on_tensorrt(slots: TrtSlots) -> Slots[DeviceArray]:
    return slots


def reference_slots(slots: ReferenceSlots) -> Slots[Tensor]:
    return slots


def draft_of_an_answer(draft: Draft) -> Decoding:
    """What a decode loop, or a batch, makes the steps of."""
    return draft


def walk_of_a_score(walk: Walk) -> Decoding:
    return walk
