"""What a bundle folder holds and means: geometry, precision, tensors, manifest; opening and writing one."""

from engines.bundle.folder import Bundle

__all__ = ["Bundle"]
