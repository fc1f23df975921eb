"""The threads that ask the engine, one for each of its slots, and the queue before them."""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from engines.bundle.precision import precision_named
from engines.errors import FlexError, OptionError
from engines.sizing.needs import Configuration, store_bytes
from runtime.answer import Answer, Token
from runtime.engine import Engine
from runtime.request import read_request
from runtime.serve.errors import ApiError, no_engine, queue_full, told, unavailable
from runtime.serve.metrics import Metrics
from runtime.serve.settings import Settings
from runtime.serve.views import Views
from runtime.view import ImageView

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """The engine took a request. size: width and height of its image, upright. cached: it was encoded already."""

    size: tuple[int, int] | None
    cached: bool


@dataclass(frozen=True)
class Finished:
    """The whole answer. first_token: seconds from the arrival to the first token."""

    answer: Answer
    first_token: float


@dataclass(frozen=True)
class Failed:
    """There will be no more of an answer."""

    error: ApiError


Event = Started | Token | Finished | Failed


@dataclass(eq=False)
class Job:
    """One question for the engine.

    messages: as `Engine.generate` takes them. image: encoded, None = text alone. max_tokens: None = as many as the
    settings say and the context has room for. options: other fields of `runtime.Options`. tell: takes the events, from
    the worker's thread. cancelled: nobody wants the answer any more; looked at before each step.
    """

    messages: list[dict[str, str]]
    image: bytes | None
    max_tokens: int | None
    options: Mapping[str, Any]
    tell: Callable[[Event], None]
    arrived: float = field(default_factory=perf_counter)
    cancelled: bool = False


class Worker:
    """Asks one engine, as many questions at a time as it has slots, in the order they came.

    Without slots one: an answer is soonest there when it has the machine to itself. A request that is cancelled leaves
    the queue at once, or the engine within one step.

    page_bytes: of one page of one layer. accepting: whether questions are taken.
    """

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self.page_bytes = _page_bytes(engine)
        self._views = Views(engine, metrics, limit=settings.view_bytes, pixels=settings.pixels)
        metrics.steps.set_function(lambda: engine.steps)
        # Threads start with the first jobs; the exit waits for them.
        self._threads = ThreadPoolExecutor(engine.slots, "flexattention-serve")
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self.accepting, self._ended = True, False

    def require_ready(self) -> None:
        """ApiError (503) when the server is ending or its engine is closed, BundleError when its bundle was written
        to: no question will be answered."""
        if not self.accepting:
            raise unavailable()
        self._require_usable()

    def _require_usable(self) -> None:
        try:
            self._engine.require_usable()
        except OptionError:  # it is closed, which is nothing that a request could have done better
            raise no_engine("the engine is closed", "start the server again") from None

    def submit(self, job: Job) -> None:
        """Queue a question. ApiError: 429 when too many wait; and errors of `require_ready`."""
        with self._changed:
            self.require_ready()
            if len(self._waiting) >= self._settings.queue:
                raise queue_full(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(job)
            self._metrics.queue.set(len(self._waiting))
            self._threads.submit(self._run_next)

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer any more. Allowed at any time, in any thread."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:  # its image goes with it
                self._waiting.remove(job)
                self._metrics.queue.set(len(self._waiting))
                self._metrics.answers.labels("cancelled").inc()
                self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Take no more questions; let those that came be answered, for so many seconds, then end them with an error.
        Returns when nothing runs; may be called again, with fewer seconds, while another thread is in here."""
        with self._changed:
            self.accepting = False
            self._changed.wait_for(lambda: not self._waiting and not self._running, seconds)
            left = [*self._waiting, *self._running]
        for job in left:
            self.cancel(job)
            job.tell(Failed(unavailable()))
        with self._changed:
            ended, self._ended = self._ended, True
        self._threads.shutdown(wait=True)
        if not ended:
            self._views.close()

    def _run_next(self) -> None:
        """The oldest job, if it was not cancelled meanwhile."""
        with self._changed:
            if not self._waiting:
                return
            job = self._waiting.popleft()
            self._running.append(job)
            self._metrics.queue.set(len(self._waiting))
            self._metrics.running.set(len(self._running))
        try:
            job.tell(self._end_of(job))
        finally:
            with self._changed:
                self._running.remove(job)
                self._metrics.running.set(len(self._running))
                self._changed.notify_all()

    def _end_of(self, job: Job) -> Event:
        """Answer a question; returns what is to be told last."""
        self._metrics.waited.observe(perf_counter() - job.arrived)
        try:
            self._require_usable()  # it may have been closed while the question waited
            with self._views.borrow(job.image) as (view, cached):
                job.image = None  # who reads slowly does not hold on to it
                job.tell(Started(view.size, cached))
                finished = self._answer(job, view)
            end = finished.answer.finish_reason if finished is not None else "cancelled"
        except Exception as error:
            failed = Failed(told(error))
            if not isinstance(error, FlexError | ApiError):  # its message may hold what somebody asked
                where = "".join(traceback.format_tb(error.__traceback__))
                _log.error("the engine failed: %s\n%s", type(error).__name__, where)
            elif failed.error.status >= 500:  # of the backend or the bundle
                _log.error("the engine failed: %s", error)
            self._metrics.answers.labels("error").inc()
            return failed
        self._metrics.answers.labels(end).inc()
        return finished or Failed(unavailable())

    def _answer(self, job: Job, view: ImageView) -> Finished | None:
        """Tell the tokens; None when the job was cancelled on the way."""
        stream = view.stream(job.messages, **job.options, max_new_tokens=self._room(job, view))
        first = 0.0
        try:
            for token in stream.steps():
                if not first:
                    first = perf_counter() - job.arrived
                self._metrics.answer_tokens.inc(token.id is not None)
                job.tell(token)
                if job.cancelled:
                    return None
            finished = Finished(stream.answer(), first)
        finally:
            stream.close()
        self._count(finished)
        return finished

    def _room(self, job: Job, view: ImageView) -> int:
        """Answer tokens at most: what was asked for, or the settings' number, if the context has room for them."""
        if job.max_tokens is not None:
            return job.max_tokens
        request = read_request(
            job.messages, None, {"max_new_tokens": 1},
            has_image=view.size is not None, prompter=self._engine.prompter, manifest=self._engine.manifest,
        )  # fmt: skip
        return min(self._settings.max_tokens, self._engine.geometry.context - request.room + 1)

    def _count(self, finished: Finished) -> None:
        stats, count, pages = finished.answer.stats, self._metrics, int(finished.answer.stats.pages_read.sum())
        count.first_token.observe(finished.first_token)
        count.tokens_per_second.observe(stats.tokens_per_second)
        count.prompt_tokens.inc(stats.prompt_tokens)
        count.reused_tokens.inc(stats.reused_tokens)
        count.pages_read.inc(pages)
        count.page_bytes.inc(pages * self.page_bytes)


def _page_bytes(engine: Engine) -> int:
    """Bytes of the keys and values of one page in one layer, as the backend keeps them."""
    geometry, precision = engine.geometry, precision_named(engine.manifest.precision)
    pages = geometry.pages * len(geometry.reading_layers)
    return store_bytes(Configuration(geometry, precision, backend=engine.backend)) // pages if pages else 0
