"""TensorRT and TensorRT-RTX: the library, building engines from a bundle, and running them."""
