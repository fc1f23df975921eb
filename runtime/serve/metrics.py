"""What a server counts, for Prometheus: one registry for each app, so that several can live in one process."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client import generate_latest as _written

CONTENT_TYPE = str(CONTENT_TYPE_LATEST)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 200, 500, 1000)


class Metrics:
    """The counters of one app; each may be used by any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("flex_requests", "HTTP requests", ["path", "status"], registry=registry)
        self.answers = Counter(
            "flex_answers", "Chat completions by how they ended: stop, length, cancelled, error", ["end"],
            registry=registry,
        )  # fmt: skip
        self.queue = Gauge("flex_queue_depth", "Requests that wait for the engine", registry=registry)
        self.running = Gauge("flex_running", "Requests that the engine works on", registry=registry)
        self.steps = Gauge("flex_decode_steps", "Steps that its slots have made, each for all rows", registry=registry)
        self.waited = Histogram(
            "flex_queue_seconds", "Time from arrival until the engine began", buckets=_SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "flex_first_token_seconds", "Time from arrival to the first token", buckets=_SECONDS, registry=registry
        )
        self.tokens_per_second = Histogram(
            "flex_tokens_per_second", "Answer tokens per second of decode time, by answer", buckets=_RATES,
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("flex_prompt_tokens", "Prompt tokens, the image's included", registry=registry)
        self.reused_tokens = Counter("flex_reused_tokens", "Prompt tokens that were in a cache", registry=registry)
        self.answer_tokens = Counter("flex_answer_tokens", "Answer tokens", registry=registry)
        self.pages_read = Counter("flex_pages_read", "Hi-res pages read, by all layers and tokens", registry=registry)
        self.page_bytes = Counter("flex_page_bytes", "Bytes of the hi-res pages read", registry=registry)
        self.view_hits = Counter("flex_view_cache_hits", "Requests whose image was encoded already", registry=registry)
        self.view_misses = Counter("flex_view_cache_misses", "Requests whose image was not", registry=registry)
        self.view_evictions = Counter("flex_view_cache_evictions", "Encoded images that were freed", registry=registry)
        self.view_bytes = Gauge("flex_view_cache_bytes", "Bytes of the encoded images that are kept", registry=registry)
        self.view_entries = Gauge("flex_view_cache_entries", "Encoded images that are kept", registry=registry)
        ProcessCollector(registry=registry)  # memory, processor time, open files; on Linux

    def text(self) -> bytes:
        """In Prometheus' text format."""
        written: bytes = _written(self.registry)
        return written
