"""ONNX Runtime: the library, and the three parts of a bundle on it. numpy and onnxruntime only."""

from engines.ort.decoder import OrtDecoder
from engines.ort.library import PROVIDERS, installed
from engines.ort.model import ACCURACY_LEVEL, MAX_THREADS, OrtModel
from engines.ort.slots import OrtSlots

__all__ = ["ACCURACY_LEVEL", "MAX_THREADS", "PROVIDERS", "OrtDecoder", "OrtModel", "OrtSlots", "installed"]
