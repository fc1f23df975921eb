"""Bundles, and the engines that run them: ONNX Runtime, TensorRT, TensorRT-RTX. Imports plugins alone; never torch."""

from flexattention_deploy import require_own

require_own("plugins")
