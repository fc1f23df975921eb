"""From PyTorch modules to ONNX graphs, and from those to what a backend runs."""
