"""What a bundle folder holds and means: geometry, precision, tensors, manifest; opening and writing one."""

from engines.bundle.folder import Bundle  # also for who imported it when this was a file

__all__ = ["Bundle"]
