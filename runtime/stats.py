"""What an answer cost: the clock that takes the time of its stages, and the sums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import fsum
from time import perf_counter

import numpy as np

from engines.memory import peak_rss


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
    # Vision and page projection, opened for this answer: with the residency "shared". Where pages have several engines
    # (TensorRT, weights in codes), opening these is part of their projection.
    opened_ms: float = 0.0
    # With page slots (--page-slots): how often a page of a layer gave its slot to another, and how often one was
    # projected that had been before, for this image.
    pages_evicted: int = 0
    pages_projected_again: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens per second of decode time."""
        return 1000.0 * len(self.decode_ms) / sum(self.decode_ms)

    def __str__(self) -> str:
        pages = f", {self.pages_read.mean():.1f} pages read per layer and token" if self.pages_read.size else ""
        if self.pages_evicted or self.pages_projected_again:
            pages += f" ({self.pages_evicted} evicted, {self.pages_projected_again} projected again)"
        device = f" ({np.mean(self.decode_device_ms):.2f} ms each on the GPU)" if self.decode_device_ms else ""
        opened = f"opening {self.opened_ms:.0f} ms, " if self.opened_ms else ""
        return (
            f"{opened}preprocess {self.preprocess_ms:.0f} ms, vision {self.vision_ms:.0f} ms, page projection "
            f"{self.projection_ms:.0f} ms, prefill {self.prefill_ms:.0f} ms ({self.prompt_tokens} tokens, "
            f"{self.reused_tokens} reused), decode {len(self.decode_ms)} tokens at {self.tokens_per_second:.1f}/s"
            f"{device}{pages}, peak memory {self.peak_rss_bytes / 1e9:.2f} GB"
        )


class Clock:
    """Takes the time of the stages of one answer: "preprocess", "opening" of parts, "vision", "projection", "prefill",
    and "decode" once for each token. Milliseconds."""

    def __init__(self, device_ms: Callable[[], float]) -> None:
        """`device_ms`: what the model's device has worked since it was last asked, `Model.device_ms`."""
        self._ask_device = device_ms
        self._host: defaultdict[str, list[float]] = defaultdict(list)
        self._device: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of a block."""
        started = perf_counter()
        try:
            yield
        finally:  # also when it fails: the device's time must not be counted to the next stage
            device_ms = self._ask_device()
            self.add(name, 1000 * (perf_counter() - started), device_ms)

    def add(self, name: str, host_ms: float, device_ms: float) -> None:
        """Count time that was taken elsewhere, of a run that several answers share."""
        self._host[name].append(host_ms)
        self._device[name].append(device_ms)

    def stats(
        self, *, prompt_tokens: int, reused_tokens: int, pages_read: np.ndarray, turnover: Iterable[np.ndarray | None]
    ) -> Stats:
        """The sums, with what else Stats tells: see there. `turnover`: of each step, Step.turnover."""
        host, device = self._host, self._device
        evicted, again = sum((each.reshape(-1, 2).sum(0) for each in turnover if each is not None), np.zeros(2, int))
        return Stats(
            preprocess_ms=fsum(host["preprocess"]),
            vision_ms=fsum(host["vision"]),
            projection_ms=fsum(host["projection"]),
            prefill_ms=fsum(host["prefill"]),
            decode_ms=tuple(host["decode"]),
            prompt_tokens=prompt_tokens,
            reused_tokens=reused_tokens,
            pages_read=pages_read,
            peak_rss_bytes=peak_rss(),
            vision_device_ms=fsum(device["vision"]),
            projection_device_ms=fsum(device["projection"]),
            prefill_device_ms=fsum(device["prefill"]),
            decode_device_ms=tuple(device["decode"]) if any(device["decode"]) else (),
            opened_ms=fsum(host["opening"]),
            pages_evicted=int(evicted),
            pages_projected_again=int(again),
        )
