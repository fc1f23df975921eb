"""A bundle as a model of lmms-eval: `python -m lmms_eval --model flexattention --model_args bundle=build/NAME ...`

lmms-eval finds it by the entry point in pyproject.toml. Its tasks are its own: docs/evaluation.md tells how they differ
from the paper's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import PIL.Image
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from engines.backend import Opening
from engines.checks import require_integer, shown
from engines.errors import OptionError
from runtime.engine import Engine
from runtime.evaluate.asking import in_order
from runtime.evaluate.task import MAX_NEW_TOKENS, answer_to
from runtime.score.walk import Score
from runtime.text.prompter import PLACEHOLDER
from runtime.view import ImageView

NAME = "flexattention"
# What tasks set, and what of it changes nothing here. The model has one way to fit an image, pad; others are of models
# that have several.
_SAMPLING = ("temperature", "top_p", "top_k", "seed")
_USED = {"max_new_tokens", "until", "do_sample", *_SAMPLING}
_ONLY: dict[str, tuple[object, ...]] = {
    "num_beams": (1, None),
    "repetition_penalty": (1, None),
    "image_aspect_ratio": ("pad", "original", None),
}


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    return ModelManifest(NAME, simple_class_path=f"{__name__}.FlexAttention")


class FlexAttention(lmms):  # type: ignore[misc] # its base has no annotations
    """A bundle. Requests that follow each other and share an image encode it once; those of `batch_size` images share
    decode steps."""

    is_simple = True

    def __init__(
        self,
        bundle: str,
        backend: str | None = Opening.backend,
        device: str | None = Opening.device,
        threads: int | None = Opening.threads,
        page_budget: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Open a bundle folder; --model_args names these. `batch_size`: images at a time, as the command line gives it.
        `max_batch_size`: of an automatic batch size, which there is not. Raises what `Engine` does, and OptionError
        under a launcher of several processes."""
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OptionError(
                f"{os.environ['WORLD_SIZE']} processes", expected="one", fix="--batch_size N shares one device's steps"
            )
        slots = str(batch_size or 1)
        if not slots.isdecimal():
            raise OptionError(f"--batch_size {slots}", expected="a number")
        place = "cuda" if device == "cuda:0" else device  # as lmms-eval writes it
        self.page_budget = page_budget
        self.engine = Engine(str(bundle), backend=backend, device=place, threads=threads, slots=int(slots))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests of (context, generation settings, doc_to_visual, doc id, task, split)."""

        def ask(group: _Group) -> list[str]:
            with self._view(group.image) as view:
                return [self._answer(view, *request.args[:2]) for request in group.requests]

        return [answer for answers in in_order(ask, self._by_image(requests), self.engine.slots) for answer in answers]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of every round, for requests of (context, generation settings, doc_to_visual, doc_to_text, doc
        id, task, split); doc_to_text gives the next round, until it says that there is none."""

        def ask(group: _Group) -> list[list[str]]:
            with self._view(group.image) as view:
                return [self._rounds(view, group.image, request) for request in group.requests]

        return [rounds for answers in in_order(ask, self._by_image(requests), self.engine.slots) for rounds in answers]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """(mean loss of the continuation's tokens, whether they are what the model would answer) for requests of
        (context, continuation, doc_to_visual, doc id, task, split). The continuation may bring the space that the
        bundle's template has before it.

        The loss, in spite of the name: lmms-eval's own models return that, and its multiple choice takes the smallest.
        And not as the bare pair, of which lmms-eval 0.7 would make text.
        """

        def ask(group: _Group) -> list[GenerationResult]:
            scores = list[Score]()
            with self._view(group.image) as view:
                for context, of_context in groupby(group.requests, key=lambda each: each.args[0]):
                    options = [self._continuation(request) for request in of_context]
                    scores += view.score(_plain(context), options, page_budget=self.page_budget)
            return [GenerationResult((-score.mean, score.greedy)) for score in scores]

        return [score for scores in in_order(ask, self._by_image(requests), self.engine.slots) for score in scores]

    def _row(self, request: Any) -> Any:
        """The document that a request is about."""
        doc, task, split = request.args[-3:]
        return self.task_dict[task][split][doc]

    def _continuation(self, request: Any) -> str:
        given = request.args[1]
        return (given if isinstance(given, str) else str(given(self._row(request)))).removeprefix(" ")

    def _by_image(self, requests: Iterable[Any]) -> Iterator[_Group]:
        """Requests that follow each other and have equal images, in their order: those of one document, and of several
        about one picture. Without images, those of one document."""
        given = ((_image(request.args[2](self._row(request))), request) for request in requests)
        for (image, *_), group in groupby(given, key=lambda each: (each[0], each[0] is None and each[1].args[-3:])):
            yield _Group(image, [request for _, request in group])

    def _rounds(self, view: ImageView, image: PIL.Image.Image | None, request: Any) -> list[str]:
        """The answers of every round of a request, whose first is about the image of `view`."""
        context, settings, _, to_text = request.args[:4]
        row, answers, info = self._row(request), list[str](), None
        asked = image
        while True:
            with nullcontext(view) if asked == image else self._view(asked) as current:
                answers.append(self._answer(current, context, settings))
            visuals, context, over, said, info = to_text(
                row, previous_output=answers, round_idx=len(answers), previous_round_info=info
            )
            if over:
                return list(said)
            asked = _image(visuals)

    def _view(self, image: PIL.Image.Image | None) -> ImageView:
        return self.engine.image(image, exif=False)

    def _answer(self, view: ImageView, context: str, settings: dict[str, Any]) -> str:
        return str(answer_to(self.engine, view, _plain(context), self.page_budget, **_options(settings)))


@dataclass(frozen=True, eq=False)
class _Group:
    """Requests about one image, or about none."""

    image: PIL.Image.Image | None
    requests: list[Any]


def _image(visuals: Iterable[object] | None) -> PIL.Image.Image | None:
    """What doc_to_visual gave. OptionError for anything but one image, or none."""
    given = list(visuals or ())
    image = given[0] if given else None
    if len(given) > 1 or not (image is None or isinstance(image, PIL.Image.Image)):
        kinds = ", ".join(type(each).__name__ for each in given)
        raise OptionError(f"a question about {len(given)} visuals: {kinds:.100}", expected="one image, or none")
    return image


def _plain(context: str) -> str:
    """A context without the placeholder that some tasks put first: the bundle's template has its own."""
    return context.removeprefix(PLACEHOLDER).lstrip("\n") if context.startswith(PLACEHOLDER) else context


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """Generation settings of a task as options of a request. OptionError for what this would leave undone."""
    for name, value in settings.items():
        if name not in _USED and value not in _ONLY.get(name, ()):
            raise OptionError(
                f"generation_kwargs: {name}={value!r:.60}",
                expected=f"some of {sorted(_USED | _ONLY.keys())}",
                fix="leave it out of a copy of the task",
            )
    until, most = settings.get("until") or (), settings.get("max_new_tokens")
    found = f"generation_kwargs: max_new_tokens={shown(most)}"
    options: dict[str, Any] = {
        "max_new_tokens": require_integer(most, found, 1, none=f"{MAX_NEW_TOKENS}") or MAX_NEW_TOKENS,
        "stop": tuple(text for text in ((until,) if isinstance(until, str) else until) if text),
    }
    if settings.get("temperature") and settings.get("do_sample", True):
        options |= {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    return options
