"""Answers questions about images with a FlexAttention bundle; needs numpy, Pillow, tokenizers, pydantic, a backend."""

from flexattention_deploy import require_own

require_own("engines", "plugins")

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
from runtime.answer import Answer, Trace
from runtime.decode import Stream
from runtime.engine import Engine
from runtime.request import Options
from runtime.stats import Stats
from runtime.view import ImageView

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
