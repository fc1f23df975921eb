"""ONNX Runtime: the library, and the three parts of a bundle on it. numpy and onnxruntime only."""

from engines.ort.library import PROVIDERS, installed
from engines.ort.model import ACCURACY_LEVEL, MAX_THREADS, OrtDecoder, OrtModel, OrtSlots

__all__ = ["ACCURACY_LEVEL", "MAX_THREADS", "PROVIDERS", "OrtDecoder", "OrtModel", "OrtSlots", "installed"]
