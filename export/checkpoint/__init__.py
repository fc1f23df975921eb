"""A checkpoint folder: its settings, its tensors under their official names, its tokenizer."""

from export.checkpoint.folder import Checkpoint  # also for who imported it when this was a file

__all__ = ["Checkpoint"]
