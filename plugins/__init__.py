"""The custom ops, a folder each, and what compiles and launches their kernels."""
