"""Answers questions about images with a FlexAttention bundle; needs numpy, Pillow, tokenizers, pydantic, a backend."""

from flexattention_deploy import require_own

require_own("engines", "plugins")

from engines.errors import (
    BackendError,
    BundleError,
    ContextError,
    FlexError,
    ImageError,
    KernelError,
    OptionError,
    PromptError,
    TokenizerError,
)
from runtime.answer import Answer, Token, Trace
from runtime.chat import Chat
from runtime.decode import Stream
from runtime.engine import Engine
from runtime.request import Options
from runtime.score.walk import Score
from runtime.stats import Stats
from runtime.view import ImageView

__all__ = [
    "Answer",
    "BackendError",
    "BundleError",
    "Chat",
    "ContextError",
    "Engine",
    "FlexError",
    "ImageError",
    "ImageView",
    "KernelError",
    "OptionError",
    "Options",
    "PromptError",
    "Score",
    "Stats",
    "Stream",
    "Token",
    "TokenizerError",
    "Trace",
]
