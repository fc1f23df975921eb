"""Many questions at once, offline: as many on the way as there are slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from engines.errors import FlexError
from runtime.answer import Answer, Token
from runtime.decode import Stream
from runtime.image import ImageSource
from runtime.text.conversation import Prompt
from runtime.view import ImageView


def generate_many(
    image: Callable[..., ImageView],
    slots: int,
    requests: Iterable[tuple[ImageSource | None, Prompt]],
    progress: Callable[[float], None] | None,
    exif: bool,
    options: Mapping[str, Any],
) -> list[Answer]:
    """See Engine.generate_many. `image`: Engine.image. `slots`: requests at a time."""
    count = len(requests) if isinstance(requests, Sized) else None
    answers: dict[int, Answer] = {}
    running = deque[tuple[int, Stream, Iterator[Token]]]()
    streams = enumerate(_streams(image, requests, exif, options))
    following = next(streams, None)
    while running or following is not None:
        while following is not None and len(running) < slots:
            index, stream = following
            running.append((index, stream, stream.steps()))
            following = next(streams, None)
        index, stream, tokens = running.popleft()
        with_number = f"request {index}"
        try:
            if next(tokens, None) is not None:
                running.append((index, stream, tokens))
                continue
            answers[index] = stream.answer()
        except FlexError as error:
            raise error.within(with_number) from error
        if progress is not None and count:
            progress(len(answers) / count)
    return [answers[index] for index in range(len(answers))]


def _streams(
    image: Callable[..., ImageView],
    requests: Iterable[tuple[ImageSource | None, Prompt]],
    exif: bool,
    options: Mapping[str, Any],
) -> Iterator[Stream]:
    """The questions as streams that have not begun; of those about one image, which follow each other, in one view."""
    view, latest = None, object()
    for index, (source, prompt) in enumerate(requests):
        try:
            if view is None or source is not latest:
                view, latest = image(source, exif=exif), source
            yield view.stream(prompt, **options)
        except FlexError as error:
            raise error.within(f"request {index}") from error
