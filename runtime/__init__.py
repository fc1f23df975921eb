"""Answers questions about images with a FlexAttention bundle; needs numpy, Pillow, tokenizers, pydantic, a backend."""

from engines.errors import (
    BackendError,
    BundleError,
    FlexError,
    ImageError,
    KernelError,
    OptionError,
    PromptError,
    TokenizerError,
)
from runtime.engine import Engine, ImageView, Stream
from runtime.types import Answer, Options, Stats, Trace

__all__ = [
    "Answer",
    "BackendError",
    "BundleError",
    "Engine",
    "FlexError",
    "ImageError",
    "ImageView",
    "KernelError",
    "OptionError",
    "Options",
    "PromptError",
    "Stats",
    "Stream",
    "TokenizerError",
    "Trace",
]
