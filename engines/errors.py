"""The errors this project raises on purpose: one hierarchy, whose root lies with the plugins, the lowest floor.

Every one says what was found, what was expected and what fixes it.
"""

from __future__ import annotations

from plugins.errors import FlexError, KernelError

__all__ = [
    "BackendError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "ContextError",
    "DataError",
    "ExportError",
    "FlexError",
    "ImageError",
    "KernelError",
    "OptionError",
    "ParityError",
    "PromptError",
    "TokenizerError",
]


class CheckpointError(FlexError):
    """A checkpoint folder cannot be read: missing file or key, wrong shape, truncated shard, unsafe pickle."""


class ConfigError(FlexError):
    """A `config.json` describes a model this project does not support, or contradicts itself."""


class TokenizerError(FlexError):
    """A tokenizer is missing, unreadable, or does not survive its conversion."""


class ExportError(FlexError):
    """A graph or its weights could not be written (value out of range for the precision, full disk, ...)."""


class ParityError(FlexError):
    """A fresh bundle does not reproduce the reference model; names the first stage that differs."""


class BundleError(FlexError):
    """A bundle is missing, changed, incomplete, or of a newer format than this code."""


class BackendError(FlexError):
    """The inference backend is not installed, lacks the requested device, or failed to run."""


class ImageError(FlexError):
    """An image is missing, corrupt, too small or large, or of a kind with no faithful 8-bit RGB reading."""


class PromptError(FlexError):
    """A prompt does not fit: too long, wrong number of image placeholders, token ids outside the vocabulary."""


class ContextError(PromptError):
    """Prompt and answer do not fit into the bundle's context together. `turns`: so many of a conversation's earlier
    turns would, the last ones; None where it has none, or the question itself is too long."""

    turns: int | None = None


class OptionError(FlexError):
    """A generation option is unknown or outside its range."""


class DataError(FlexError):
    """A data set, or a file of results, is missing, incomplete, or not in its layout."""
