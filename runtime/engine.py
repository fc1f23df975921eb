"""`Engine`: a bundle folder in, answers out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from engines.backend import Image, Opening, Step
from engines.bundle.folder import Bundle
from engines.bundle.pages import margins
from engines.errors import BundleError, OptionError, PromptError
from engines.memory import peak_rss
from engines.open import open_model
from runtime.image import ImageSource, load_image
from runtime.preprocess import preprocess
from runtime.prompt import Prompter
from runtime.sampling import Sampler
from runtime.types import Answer, Options, Stats, Trace

if TYPE_CHECKING:
    from engines.open import Decoder, Model


class Engine:
    """An opened bundle. Not thread-safe: one request at a time. No request leaves anything behind for the next."""

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        backend: str | None = Opening.backend,
        device: str | None = Opening.device,
        threads: int | None = Opening.threads,
        verify: bool = Opening.verify,
    ) -> None:
        """Open a bundle folder; the other arguments: see Opening. Raises BundleError, BackendError, TokenizerError."""
        if not isinstance(bundle, str | os.PathLike):
            raise BundleError(f"a bundle of type {type(bundle).__name__}", expected="the path of a bundle folder")
        opened = Bundle(bundle, verify=verify)
        self.manifest = opened.manifest
        self.geometry = opened.manifest.geometry
        prompt = opened.manifest.prompt
        self.prompter = Prompter(
            opened.file(prompt.tokenizer) if prompt.tokenizer else None,
            template=prompt.template,
            bos_id=prompt.bos_token_id,
            vocab=self.geometry.vocab,
            image_tokens=self.geometry.image_tokens,
        )
        self.model = open_model(opened, Opening(backend, device, threads, verify))

    def generate(
        self,
        image: ImageSource | None,
        prompt: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        **options: object,
    ) -> Answer:
        """Answer `prompt` about `image` (path, bytes, PIL image, uint8 array [H, W, 3], or None for text alone).

        `input_ids` instead of `prompt`: raw token ids, -200 where the image goes. `options`: fields of `Options`.
        Raises ImageError, PromptError, OptionError or BackendError; the engine stays usable after each.
        """
        return self.stream(image, prompt, input_ids=input_ids, **options).answer()

    def stream(
        self,
        image: ImageSource | None,
        prompt: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        **options: object,
    ) -> Stream:
        """Like `generate`, as an iterator of text pieces; `.answer()` then gives the whole answer."""
        return self.image(image).stream(prompt, input_ids=input_ids, **options)

    def image(self, image: ImageSource | None) -> ImageView:
        """Hold on to an image for several questions: `with engine.image(photo) as view: view.ask("..."), ...`.

        Vision and page projection run once, and the cache keeps the prompt up to and including the image.
        """
        return ImageView(self, image)


class ImageView:
    """One image (or none), encoded when first needed and kept until the view is closed."""

    def __init__(self, engine: Engine, image: ImageSource | None) -> None:
        self._engine = engine
        self._source = None if image is None else load_image(image)
        self._has_image = image is not None
        self._hires = None  # features of the hi-res tiles, on the device
        self._features = None
        self._encoded: Image | None = None
        # An idle decoder, and the ids its cache holds up to the end of the image.
        self._idle: tuple[Decoder, np.ndarray] | None = None

    def __enter__(self) -> ImageView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the features, pages and cache. The view cannot be asked again."""
        self._engine = self._source = self._hires = self._features = self._encoded = self._idle = None

    def ask(self, prompt: str | None = None, *, input_ids: Sequence[int] | None = None, **options: object) -> Answer:
        """Answer one question; arguments and errors of `Engine.generate`."""
        return self.stream(prompt, input_ids=input_ids, **options).answer()

    def stream(self, prompt: str | None = None, *, input_ids: Sequence[int] | None = None, **options: object) -> Stream:
        """Answer one question as an iterator of text pieces; arguments and errors of `Engine.generate`."""
        engine = self._opened()
        parsed = Options.parse(options)
        if (prompt is None) == (input_ids is None):
            raise PromptError(
                "both prompt and input_ids" if prompt is not None else "no prompt", expected="one of them"
            )
        raw = engine.prompter.encode(prompt, self._has_image) if prompt is not None else input_ids
        ids, begin = engine.prompter.expand(raw, self._has_image)
        budget = self._budget(parsed)
        needed, context = len(ids) + parsed.max_new_tokens - 1, engine.geometry.context  # the last token is never fed
        if needed > context:
            room = context - len(ids) + 1
            raise PromptError(
                f"a prompt of {len(ids)} tokens (image included) and up to {parsed.max_new_tokens} answer tokens",
                expected=f"at most {context} tokens together",
                fix=f"max_new_tokens={room}" if room > 0 else "shorten the prompt, or build with a larger --context",
            )
        return Stream(self, ids, begin, parsed, budget)

    def _opened(self) -> Engine:
        if self._engine is None:
            raise OptionError("this image view is closed", fix="ask, and read the answer, inside the `with` block")
        return self._engine

    def _budget(self, options: Options) -> int:
        most = self._engine.manifest.page_budget
        if options.page_budget is not None and options.page_budget > most:
            raise OptionError(f"page_budget={options.page_budget}", expected=f"at most the bundle's {most}")
        return (most if options.page_budget is None else options.page_budget) if self._has_image else 0

    def _prepare(self, begin: int, clock: dict[str, float]) -> Image:
        """The encoded image with its first token at position `begin`; what is already there is not computed again."""
        model, geometry = self._engine.model, self._engine.geometry
        if not self._has_image:
            return model.no_image(1)
        if self._features is None:
            with _timed(clock, "preprocess"):
                tiles = preprocess(self._source, geometry)
            with _timed(clock, "vision", model):
                self._features, self._hires = model.vision(tiles[:1]), model.vision(tiles[1:])
        if self._encoded is None or self._encoded.begin[0] != begin:  # hi-res rotary depends on the position
            with _timed(clock, "projection", model):
                position = np.array([begin], np.int64)
                self._encoded = self._idle = None  # their memory may be needed
                pages = model.project(self._hires, position)
                sides = np.array([margins(*self._source.size, geometry.grid)], np.int64)
                self._encoded = Image(self._features, pages, position, sides)
        return self._encoded

    def _start(
        self, ids: np.ndarray, begin: int, room: int, clock: dict[str, float]
    ) -> tuple[Decoder, np.ndarray, int]:
        """A decoder whose cache holds `ids` but the last, with room for `room` more; the part of `ids` worth keeping
        for the next question; and how many ids the cache had already. The caller gives the decoder back."""
        image = self._prepare(begin, clock)
        end = begin + self._engine.geometry.image_tokens if self._has_image else 0
        prefix = ids[: min(end, len(ids) - 1)]
        (decoder, kept), self._idle = self._idle or (None, None), None
        reusable = decoder is not None and np.array_equal(prefix, kept)
        if not reusable:
            decoder = None  # its memory may be needed
        with _timed(clock, "prefill", self._engine.model):
            if reusable:
                decoder.length[:] = len(prefix)
                if decoder.capacity < len(ids) + room:
                    decoder = decoder.enlarged(len(ids) + room)
            else:
                decoder = self._engine.model.decoder(image, len(ids) + room)
                if len(prefix):
                    decoder.run(prefix[None])
            if len(ids) - 1 > len(prefix):
                decoder.run(ids[None, len(prefix) : -1])
        return decoder, prefix, len(prefix) if reusable else 0

    def _give_back(self, decoder: Decoder, prefix: np.ndarray) -> None:
        if self._has_image and self._engine is not None:
            self._idle = decoder, prefix


class Stream:
    """A running answer: iterate for text pieces, `answer()` for the whole."""

    def __init__(self, view: ImageView, ids: np.ndarray, begin: int, options: Options, budget: int) -> None:
        self._pieces = self._run(view, ids, begin, options, budget)
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def answer(self) -> Answer:
        """Run to the end and return the whole answer."""
        for _ in self._pieces:
            pass
        if self._answer is None:
            raise OptionError("this answer was cut off", fix="ask again")
        return self._answer

    def _run(self, view: ImageView, ids: np.ndarray, begin: int, options: Options, budget: int) -> Iterator[str]:
        engine = view._opened()  # the view may have been closed since the question
        clock = dict.fromkeys((f"{stage}_ms" for stage in ("preprocess", "vision", "projection", "prefill")), 0.0)
        clock |= dict.fromkeys((f"{stage}_device_ms" for stage in ("vision", "projection", "prefill")), 0.0)
        ends = set(engine.manifest.prompt.eos_token_ids) if options.stop_at_eos else set()
        sampler, text = Sampler(options.sampling()), engine.prompter.text_stream(options.stop)
        decoder, prefix, reused = view._start(ids, begin, options.max_new_tokens - 1, clock)

        # The last prompt token is the first decoding step: it alone, and every answer token after it, reads pages.
        tokens: list[int] = []
        steps: list[Step] = []
        times: list[float] = []
        device_times: list[float] = []
        token = int(ids[-1])
        try:
            while len(tokens) < options.max_new_tokens and not (tokens and token in ends) and not text.stopped:
                started = perf_counter()
                step = decoder.run(np.array([[token]], np.int64), budget)
                token = int(step.token[0])  # chosen on the device, where the logits stay
                if options.trace or options.temperature > 0 or not tokens or not 0 <= token < engine.geometry.vocab:
                    token = sampler.pick(step.logits[0])  # raises where there is nothing to choose from
                device_times.append(engine.model.device_ms())
                times.append(1000 * (perf_counter() - started))
                tokens.append(token)
                steps.append(step if options.trace else replace(step, fetch=_gone, pages=_NOTHING))
                if token not in ends and (piece := text.push(token)):
                    yield piece
            sampler.check(step.logits[0])  # what goes wrong in a step goes wrong in all after it
            if piece := text.finish():
                yield piece
        finally:
            view._give_back(decoder, prefix)

        counts = np.concatenate([step.page_count for step in steps])  # [T, M]
        stats = Stats(
            **clock,
            decode_ms=tuple(times),
            decode_device_ms=tuple(device_times) if any(device_times) else (),
            prompt_tokens=len(ids),
            reused_tokens=reused,
            pages_read=counts[:, :-1],  # each reading layer reads what the layer before it selected
            peak_rss_bytes=peak_rss(),
        )
        trace = _trace(steps, engine.geometry.cells) if options.trace else None
        self._answer = Answer(text.text, tokens, stats, trace)


_NOTHING = np.zeros(0)


def _trace(steps: list[Step], cells: int) -> Trace:
    mask = np.concatenate([step.cells() for step in steps])  # [T, M, C*C]
    return Trace(np.concatenate([step.logits for step in steps]), mask.reshape(*mask.shape[:2], cells, cells))


def _gone() -> np.ndarray:
    raise RuntimeError("the logits of this step were not kept")


class _timed:
    """Add the milliseconds of a block to an entry of `clock`, and those its model's device worked to another."""

    def __init__(self, clock: dict[str, float], stage: str, model: Model | None = None) -> None:
        self.clock, self.stage, self.model = clock, stage, model

    def __enter__(self) -> None:
        self.started = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock[f"{self.stage}_ms"] += 1000 * (perf_counter() - self.started)
        if self.model:
            self.clock[f"{self.stage}_device_ms"] += self.model.device_ms()
