"""What goes into a request and what comes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from engines.errors import OptionError
from runtime.sampling import Sampling, is_integer


@dataclass(frozen=True)
class Options:
    """Options of one request: their names, defaults and ranges.

    max_new_tokens: answer tokens at most. temperature: 0 = greedy; top_k (0 = off), top_p (1 = off) and seed need a
    temperature. stop: strings that end the answer, not part of it. stop_at_eos: end at the model's end token.
    page_budget: pages each layer reads at most, 0 .. the bundle's; None = the bundle's. trace: keep logits and cells.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True
    page_budget: int | None = None
    trace: bool = False

    @classmethod
    def parse(cls, given: dict[str, object]) -> Options:
        """Options from keyword arguments; OptionError for an unknown name or a value out of range."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(f"unknown option {', '.join(unknown)}", expected=f"some of {', '.join(known)}")
        stop = given.get("stop", ())
        if not isinstance(stop, Iterable):
            raise OptionError(f"stop={stop!r}", expected="a string or several")
        options = cls(**{**given, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})
        options._check()
        return options

    def sampling(self) -> Sampling:
        """The part that chooses tokens."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    def _check(self) -> None:
        self.sampling()  # checks its own
        if not is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens={self.max_new_tokens!r}", expected="an integer of at least 1")
        if self.page_budget is not None and (not is_integer(self.page_budget) or self.page_budget < 0):
            raise OptionError(f"page_budget={self.page_budget!r}", expected="an integer of at least 0, or None")
        for name in ("stop_at_eos", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}", expected="True or False")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop={self.stop!r}", expected="non-empty strings")


@dataclass(frozen=True)
class Stats:
    """What one answer cost. Times in milliseconds; 0 where nothing had to be done again.

    `..._device_ms`: of that, what the GPU took by its own clock; 0, and no tuple, where the backend does not measure.
    """

    preprocess_ms: float
    vision_ms: float
    projection_ms: float  # hi-res pages
    prefill_ms: float
    decode_ms: tuple[float, ...]  # one per answer token
    prompt_tokens: int  # in the embedded sequence, image tokens included
    reused_tokens: int  # of those, already in the cache of the image view
    pages_read: np.ndarray  # [T, reading layers] int64: pages each layer read for each answer token
    peak_rss_bytes: int  # of this process, so far
    vision_device_ms: float = 0.0
    projection_device_ms: float = 0.0
    prefill_device_ms: float = 0.0
    decode_device_ms: tuple[float, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens per second of decode time."""
        return 1000.0 * len(self.decode_ms) / sum(self.decode_ms)

    def __str__(self) -> str:
        pages = f", {self.pages_read.mean():.1f} pages read per layer and token" if self.pages_read.size else ""
        device = f" ({np.mean(self.decode_device_ms):.2f} ms each on the GPU)" if self.decode_device_ms else ""
        return (
            f"preprocess {self.preprocess_ms:.0f} ms, vision {self.vision_ms:.0f} ms, page projection "
            f"{self.projection_ms:.0f} ms, prefill {self.prefill_ms:.0f} ms ({self.prompt_tokens} tokens, "
            f"{self.reused_tokens} reused), decode {len(self.decode_ms)} tokens at {self.tokens_per_second:.1f}/s"
            f"{device}{pages}, peak memory {self.peak_rss_bytes / 1e9:.2f} GB"
        )


@dataclass(frozen=True)
class Trace:
    """Everything a parity test wants to see. T answer tokens, M selecting layers (start .. last), C*C cells."""

    logits: np.ndarray  # [T, V] float32; step 0 is the first answer token
    cells: np.ndarray  # [T, M, C, C] bool: the selection each layer made (the last layer's is never used)


@dataclass(frozen=True)
class Answer:
    """An answer. `text` is None when the bundle has no tokenizer; `token_ids` include a final end token."""

    text: str | None
    token_ids: list[int]
    stats: Stats
    trace: Trace | None

    def __str__(self) -> str:
        return self.text if self.text is not None else str(self.token_ids)
