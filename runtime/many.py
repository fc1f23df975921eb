"""Many questions at once, offline: as many on the way as there are slots, and the next images encoded meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from engines.errors import FlexError
from engines.progress import progress as progress_bar
from runtime.answer import Answer, Token
from runtime.decode import Stream
from runtime.image import ImageSource
from runtime.text.conversation import Prompt
from runtime.view import ImageView

AHEAD = 2  # times the slots: so many requests are looked at before their turn, for images to encode


def generate_many(
    image: Callable[..., ImageView],
    slots: int,
    requests: Iterable[tuple[ImageSource | None, Prompt]],
    progress: bool | Callable[[float], None],
    exif: bool,
    options: Mapping[str, Any],
    *,
    ahead: bool = True,
) -> list[Answer]:
    """See Engine.generate_many. `image`: Engine.image. `slots`: requests at a time. `ahead`: encode the next images
    while others are being answered."""
    answers: dict[int, Answer] = {}
    running = deque[tuple[int, Stream, Iterator[Token]]]()
    with ExitStack() as stack:
        report = _reporter(requests, progress, stack)
        waiting = _Waiting(enumerate(_streams(image, requests, exif, options)), AHEAD * slots, stack, ahead)
        while running or waiting.some:
            while waiting.some and len(running) < slots:
                index, stream = waiting.take()
                with _numbered(index):
                    stream.join()
                running.append((index, stream, stream.steps()))
            index, stream, tokens = running.popleft()
            with _numbered(index):
                if next(tokens, None) is not None:
                    running.append((index, stream, tokens))
                    continue
                answers[index] = stream.answer()
            report(len(answers))
    return [answers[index] for index in range(len(answers))]


class _Waiting:
    """The next requests, whose images are encoded in a thread of their own while others are being answered; without
    `ahead`, by whoever asks."""

    def __init__(
        self, streams: Iterator[tuple[int, tuple[Stream, ImageView, Prompt]]], most: int, stack: ExitStack, ahead: bool
    ) -> None:
        self._streams, self._most, self._ahead = streams, most if ahead else 1, ahead
        self._encoding = stack.enter_context(ThreadPoolExecutor(1, "flexattention-encode"))
        self._queue = deque[tuple[int, Stream, Future[None] | None]]()
        self._latest: ImageView | None = None
        stack.callback(self._encoding.shutdown, wait=True, cancel_futures=True)
        self._fill()

    @property
    def some(self) -> bool:
        """Whether there are any."""
        return bool(self._queue)

    def take(self) -> tuple[int, Stream]:
        """The next, with its image encoded. Raises what encoding it did, with the number of the request."""
        index, stream, encoded = self._queue.popleft()
        self._fill()
        if encoded is not None:
            with _numbered(index):
                encoded.result()
        return index, stream

    def _fill(self) -> None:
        while len(self._queue) < self._most and (following := next(self._streams, None)) is not None:
            index, (stream, view, prompt) = following
            known = view is self._latest or not self._ahead
            encoded = None if known else self._encoding.submit(view.encode, prompt)
            self._latest = view
            self._queue.append((index, stream, encoded))


def _reporter(
    requests: Iterable[object], progress: bool | Callable[[float], None], stack: ExitStack
) -> Callable[[int], None]:
    """What is told how many answers there are."""
    count = len(requests) if isinstance(requests, Sized) else 0
    if progress is False or not count:
        return lambda done: None
    tell = stack.enter_context(progress_bar(f"{count} questions")) if progress is True else progress
    return lambda done: tell(done / count)


def _streams(
    image: Callable[..., ImageView],
    requests: Iterable[tuple[ImageSource | None, Prompt]],
    exif: bool,
    options: Mapping[str, Any],
) -> Iterator[tuple[Stream, ImageView, Prompt]]:
    """The questions as streams that have not begun; of those about one image, which follow each other, in one view."""
    view, latest = None, object()
    for index, (source, prompt) in enumerate(requests):
        with _numbered(index):
            if view is None or source is not latest:
                view, latest = image(source, exif=exif), source
            stream = view.stream(prompt, **options)
        yield stream, view, prompt


@contextmanager
def _numbered(index: int) -> Iterator[None]:
    """An error of the block says which request it was."""
    try:
        yield
    except FlexError as error:
        raise error.within(f"request {index}") from error
