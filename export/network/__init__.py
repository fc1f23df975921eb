"""The model in plain PyTorch: what is traced, and the reference that everything is compared with."""
