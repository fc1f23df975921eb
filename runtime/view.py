"""`ImageView`: one image held on to for several questions."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from engines.backend import Image, Model
from engines.bundle.manifest import Manifest
from engines.bundle.pages import margins
from engines.errors import OptionError
from runtime.answer import Answer, Decoding, Draft, Token
from runtime.batch import Batch
from runtime.chat import Chat
from runtime.decode import Cache, InOneProcess, Stream, decode, exhaust, prefill
from runtime.image import EXIF, ImageSource, load_image
from runtime.preprocess import preprocess
from runtime.request import Options, Request, read_request
from runtime.sampling import Sampler
from runtime.score.continuations import ContinuationReader, Continuations
from runtime.score.walk import Score, walks
from runtime.stats import Clock
from runtime.text.conversation import Prompt
from runtime.text.prompter import Prompter


class ImageView(InOneProcess):
    """One image (or none), encoded when first needed and kept, with a decoder's cache, until the view is closed.

    Threads may ask one view where they may ask one engine: what they share of it is guarded.
    """

    def __init__(
        self,
        model: Model[Any],
        prompter: Prompter,
        manifest: Manifest,
        image: ImageSource | None,
        *,
        exif: bool = EXIF,
        batch: Batch | None = None,
    ) -> None:
        """`model`, `prompter`, `manifest`, `batch`: of one engine, which `Engine.image` fills in. `image`, `exif`: see
        runtime.image.load_image; no image for text alone. Raises ImageError; computes nothing yet.

        size: width and height of the image in pixels, as it was turned; None without one."""
        super().__init__()
        self._prompter, self._manifest, self._batch = prompter, manifest, batch
        self._model: Model[Any] | None = model
        self._image = None if image is None else load_image(image, exif=exif)
        self._has_image = self._image is not None
        self.size = None if self._image is None else self._image.size
        self._features: tuple[Any, Any] | None = None  # of the low-res and of the hi-res tiles, on the device
        self._encoded: Image[Any] | None = None
        self._idle: Cache | None = None  # what no running answer uses
        self._sharing = threading.RLock()  # of the fields above; a signal handler may close what its thread is using

    def __enter__(self) -> ImageView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the features, pages and cache. The view cannot be asked again; an answer that runs goes on."""
        with self._sharing:
            self._model = self._image = self._features = self._encoded = self._idle = None

    @property
    def nbytes(self) -> int:
        """Bytes it holds on the device: features, pages, and the cache that no running answer uses, or what slots put
        aside of it. 0 before the first question, and once it is closed."""
        with self._sharing:
            model, held, idle, encoded = self._model, list(self._features or ()), self._idle, self._encoded
            held += [] if encoded is None else encoded.pages.values()
        if model is None:
            return 0
        aside = 0 if self._batch is None or encoded is None else self._batch.kept_bytes(encoded)
        return sum(map(model.nbytes, held)) + aside + (0 if idle is None else idle.decoder.nbytes)

    def encode(self, prompt: Prompt) -> None:
        """Encode the image now, for `prompt` and others in the bundle's template, rather than with the first question.
        Errors of `ask`."""
        model = self._opened()
        request = self._request(prompt, None, {"max_new_tokens": 1})
        self._image_of(request, Clock(model.device_ms))

    def chat(self, messages: Sequence[Mapping[str, object]] = ()) -> Chat:
        """A conversation about the image, which goes on from `messages`: see Chat. Raises PromptError."""
        return Chat(self.stream, self.score, messages)

    def ask(self, prompt: Prompt | None = None, *, input_ids: Sequence[int] | None = None, **options: Any) -> Answer:
        """Answer one question; arguments and errors of `Engine.generate`."""
        return self.stream(prompt, input_ids=input_ids, **options).answer()

    def stream(self, prompt: Prompt | None = None, *, input_ids: Sequence[int] | None = None, **options: Any) -> Stream:
        """Answer one question as an iterator of text pieces; arguments and errors of `Engine.generate`.

        A question that cannot be answered is an error here; work begins when the first piece is asked for.
        """
        model = self._opened()
        request = self._request(prompt, input_ids, options)
        text, clock = self._prompter.text_stream(request.options.stop), Clock(model.device_ms)
        draft = Draft(request, text, clock, model.geometry, Sampler(request.options.sampling()))
        return Stream(draft, self._steps(draft))

    def score(
        self,
        prompt: Prompt | None = None,
        continuations: Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        continuation_ids: Sequence[Sequence[int]] | None = None,
        page_budget: int | None = Options.page_budget,
        special_tokens: bool = Options.special_tokens,
    ) -> list[Score]:
        """How likely each of several answers to one question is: a Score for each, in their order. `Engine.score` says
        what they are; here they are lists.

        The image is encoded and the prompt prefilled once, where they are not yet, and tokens that several answers
        begin with are fed once. With slots, answers that begin with different tokens are scored side by side, in as
        many rows as are free. What was asked, and what is asked next, is not changed by it. Errors of `Engine.score`.
        """
        model = self._opened()
        options = Options(page_budget=page_budget, special_tokens=special_tokens)
        reader = ContinuationReader(options, self._has_image, self._prompter, self._manifest)
        scorings = reader.read(prompt, input_ids, Continuations(continuations, continuation_ids))
        rows = 1 if self._batch is None else self._batch.free
        walking = [
            walk
            for scoring in scorings
            for walk in walks(scoring, rows, self._prompter, model.geometry, lambda: Clock(model.device_ms))
        ]
        exhaust(map(self._steps, walking))
        found = {place: score for walk in walking for place, score in walk.scores.items()}
        return [found[place] for place in sorted(found)]

    def _steps(self, decoding: Decoding) -> Generator[Token | None]:
        """Makes the steps of a request, alone or in the batch, once asked for the first."""
        if self._batch is None:
            return decode(self._prefilled(decoding.request, decoding.clock), decoding)
        return self._batch.decode(decoding, partial(self._image_of, decoding.request, decoding.clock))

    def _request(self, prompt: Prompt | None, input_ids: Sequence[int] | None, options: Mapping[str, Any]) -> Request:
        return read_request(
            prompt, input_ids, options, has_image=self._has_image, prompter=self._prompter, manifest=self._manifest
        )

    def _opened(self) -> Model[Any]:
        """The model; OptionError when the view is closed, BackendError in a fork, BundleError when the bundle was
        written to meanwhile."""
        self._require_own_process()
        if self._model is None:
            raise OptionError(
                "this image view, or its engine, is closed", fix="ask, and read the answer, inside the `with` block"
            )
        self._model.require_unchanged()
        return self._model

    @contextmanager
    def _prefilled(self, request: Request, clock: Clock) -> Iterator[Cache]:
        """Lend the block a cache that holds the request's ids but the last, with room for the answer.

        Encodes the image and prefills as far as the view does not hold the results yet, and counts both on `clock`.
        After the block, whatever ends it, the view keeps the decoder for its next question. Raises BackendError.
        """
        with self._sharing:
            model = self._opened()
            image = self._image_at(model, request.begin, clock)
            idle, self._idle = self._idle, None  # who asks meanwhile gets another decoder
        decoder, reused = None, 0
        if idle is not None and idle.request.begin == request.begin:  # of this image at this position
            decoder, reused = idle.decoder, request.known(idle.request.ids[:-1], idle.request.runs)
        idle = None  # its memory may be needed
        with clock.stage("prefill"):
            if decoder is None:
                decoder = model.decoder(image, request.room)
            else:
                decoder.length[:] = reused
                if decoder.capacity < request.room:
                    decoder = decoder.enlarged(request.room)
            prefill(decoder, request, reused)
        cache = Cache(decoder, request, reused)
        try:
            yield cache
        finally:
            with self._sharing:
                if self._model is not None:  # not closed meanwhile
                    self._idle = cache

    def _image_of(self, request: Request, clock: Clock) -> Image[Any] | None:
        """What a batch is given of the image; None without one."""
        with self._sharing:
            return self._image_at(self._opened(), request.begin, clock) if self._has_image else None

    def _image_at(self, model: Model[Any], begin: int, clock: Clock) -> Image[Any]:
        """The encoded image with its first token at position `begin`; what is already there is not computed again.
        The caller holds `_sharing`."""
        if self._image is None:
            return model.no_image(1)
        if self._features is None:
            with clock.stage("preprocess"):
                tiles = preprocess(self._image, model.geometry)
            with self._open("vision", model, clock), clock.stage("vision"):
                self._features = model.vision(tiles[:1]), model.vision(tiles[1:])
        if self._encoded is None or self._encoded.begin[0] != begin:  # hi-res rotary depends on the position
            self._encoded = self._idle = None  # their memory may be needed
            with self._open("pages", model, clock), clock.stage("projection"):
                (lowres, hires), position = self._features, np.array([begin], np.int64)
                sides = np.array([margins(*self._image.size, model.geometry.grid)], np.int64)
                self._encoded = Image(lowres, model.project(hires, position), position, sides)
        return self._encoded

    @staticmethod
    @contextmanager
    def _open(part: str, model: Model[Any], clock: Clock) -> Iterator[None]:
        """Keep a part that encodes images open for the block, and count what opening it took."""
        with model.held(part) as opened_ms:
            clock.add("opening", opened_ms, 0.0)
            yield
