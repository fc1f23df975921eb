"""The way of one question through the decoder: prefill, then token by token."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import numpy as np

from engines.backend import Decoder
from engines.errors import BackendError, OptionError
from runtime.answer import Answer, Decoding, Draft, Token
from runtime.request import Request


@dataclass(frozen=True, eq=False)
class Cache:
    """A decoder that holds the prompt of `request`, prefilled. reused: how many of its ids it held before."""

    decoder: Decoder
    request: Request
    reused: int


def prefill(decoder: Decoder, request: Request, known: int) -> None:
    """Feed the prompt's ids but the last to a cache that holds the first `known`, whole runs of the request.

    The runs are the request's, not what happens to be missing, so that the cache holds the same, to the last bit,
    whether a conversation was held turn by turn or comes all at once.
    """
    for begin, end in pairwise((known, *(end for end in request.runs if end > known))):
        decoder.run(request.ids[None, begin:end])


def decode(lent: AbstractContextManager[Cache], decoding: Decoding) -> Generator[Token | None]:
    """Make the steps of `decoding`: yields None before it begins, what each step tells, and has it finish.

    `lent`: gives a cache that holds the prompt's ids but the last, as long as tokens are to come. Raises what it
    raises, and BackendError when the device fails or a logit is not finite.
    """
    yield None
    with lent as cache:
        prefilled = len(cache.request.ids) - 1
        while not decoding.done:
            with decoding.clock.stage("decode"):
                cache.decoder.length[:] = prefilled + decoding.fed
                step = cache.decoder.run(np.array([[decoding.latest]], np.int64), decoding.request.page_budget)
                token = decoding.take(step)
            yield token
    yield from decoding.rest()
    decoding.finish(cache.reused)


def exhaust(running: Iterable[Generator[Token | None]]) -> None:
    """Make all steps of several generators of `decode`, or of a batch, where they get in line before the first begins.
    Raises what one of them does; the others are closed."""
    with ExitStack() as stack:
        entered = [stack.enter_context(closing(each)) for each in running]
        for each in entered:
            next(each, None)
        for each in entered:
            for _ in each:
                pass


class InOneProcess:
    """Base of what belongs to the process that made it: it holds open files, threads, or memory of a device."""

    def __init__(self) -> None:
        """Remember the process."""
        self._process = os.getpid()

    def _require_own_process(self) -> None:
        """BackendError in a fork of the process: threads of ONNX Runtime do not come along, and a run may wait for them
        for ever; nor does what a driver knows of the GPU."""
        if os.getpid() != self._process:
            raise BackendError(
                f"{type(self).__name__} of process {self._process}, of which this is a fork",
                expected="a bundle opened after the fork",
                fix="open an Engine(path) in each process; with multiprocessing, start them by 'spawn'",
            )

    def __reduce__(self) -> NoReturn:
        """What pickle and copy ask for. Always raises OptionError."""
        raise OptionError(
            f"{type(self).__name__} cannot be pickled or copied: it belongs to this process",
            fix="send the bundle's path, and open an Engine(path) in each process",
        )


class Stream(InOneProcess):
    """A running answer: iterate for text pieces, or `steps()` for tokens; `answer()` for the whole. Nothing runs before
    the first is asked for.

    One thread reads at a time; who asks while another does gets an OptionError, and the other goes on. A stream that is
    dropped half-way gives its cache back.
    """

    def __init__(self, draft: Draft, tokens: Generator[Token | None]) -> None:
        """`tokens`: makes the tokens of `draft`, and finishes it; None, as its first, when it is in line for a row."""
        super().__init__()
        # The generator does not know the stream: no circle keeps it, and the cache it uses, from being freed at once.
        self._draft, self._tokens = draft, tokens
        self._reading, self._joined = threading.Lock(), False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(token.text for token in self.steps() if token.text)

    def join(self) -> None:
        """Get in line for one of the engine's slots now, rather than with the first token: prompts of those who wait
        together are prefilled together. Encodes the image. Raises what the first token would."""
        with self._one_reader():
            self._join()

    def steps(self) -> Iterator[Token]:
        """The tokens that are still to come, one for each decode step; the prompt is prefilled before the first."""
        while True:
            with self._one_reader():
                self._join()
                token = next(self._tokens, None)
            if token is None:
                return
            yield token

    def close(self) -> None:
        """End it here: nothing more is computed, and the cache goes back. OptionError while another thread reads."""
        with self._one_reader():
            self._tokens.close()

    @property
    def finished(self) -> Answer | None:
        """The whole answer, once it was read to its end."""
        return self._draft.answer

    def answer(self) -> Answer:
        """Run to the end and return the whole answer. Raises what `Engine.generate` does while it runs, and OptionError
        for an answer that an error has cut off before."""
        with self._one_reader():
            for _ in self._tokens:
                pass
        if self._draft.answer is None:
            raise OptionError("this answer was cut off", fix="ask again")
        return self._draft.answer

    def _join(self) -> None:
        if not self._joined:
            self._joined = True
            next(self._tokens, None)

    @contextmanager
    def _one_reader(self) -> Iterator[None]:
        self._require_own_process()
        if not self._reading.acquire(blocking=False):
            raise OptionError(
                "this answer is being read by another thread", expected="one reader", fix="ask once for each reader"
            )
        try:
            yield
        finally:
            self._reading.release()
