"""Bundles, and the engines that run them: ONNX Runtime, TensorRT, TensorRT-RTX. Imports plugins alone; never torch."""
