"""A checkpoint folder: its settings, its tensors under their official names, its tokenizer."""

from export.checkpoint.folder import Checkpoint

__all__ = ["Checkpoint"]
