"""What goes into a request: its options, and the question as the ids a decoder is fed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from engines.bundle.manifest import Manifest
from engines.errors import OptionError, PromptError
from runtime.prompt import Prompter
from runtime.sampling import Sampling, is_whole_number


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
    def parse(cls, given: Mapping[str, Any]) -> Options:
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
        if not is_whole_number(self.max_new_tokens) or self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens={self.max_new_tokens!r}", expected="an integer of at least 1")
        if self.page_budget is not None and (not is_whole_number(self.page_budget) or self.page_budget < 0):
            raise OptionError(f"page_budget={self.page_budget!r}", expected="an integer of at least 0, or None")
        for name in ("stop_at_eos", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}", expected="True or False")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop={self.stop!r}", expected="non-empty strings")


@dataclass(frozen=True, eq=False)
class Request:
    """A question that was checked against the bundle: it fits, and nothing about it is left to find out.

    ids: the prompt, [n] int64, where -1-j is image feature j. begin: position of image feature 0 (0 without an image).
    image_end: position after the last one (0 without an image). page_budget: pages each layer reads at most.
    ends: token ids that end the answer.
    """

    ids: np.ndarray
    begin: int
    image_end: int
    page_budget: int
    ends: frozenset[int]
    options: Options

    @property
    def prefix(self) -> np.ndarray:
        """The ids up to the end of the image, which a next question about it mostly begins with, too. Without the
        prompt's very last id: that one is a decode step. Empty without an image."""
        return self.ids[: min(self.image_end, len(self.ids) - 1)]

    @property
    def room(self) -> int:
        """Tokens a cache must have room for: the prompt and the answer, whose last token is never fed."""
        return len(self.ids) + self.options.max_new_tokens - 1


def read_request(
    prompt: str | None,
    input_ids: Sequence[int] | None,
    given: Mapping[str, Any],
    *,
    has_image: bool,
    prompter: Prompter,
    manifest: Manifest,
) -> Request:
    """A question, as text or as token ids, with the `given` options, checked.

    Raises OptionError for options that are unknown or out of range, PromptError for a prompt that is no prompt, does
    not go with the image (or the lack of one), or leaves no room for the answer in the bundle's context.
    """
    options, geometry = Options.parse(given), manifest.geometry
    if input_ids is None:
        if prompt is None:
            raise PromptError("no prompt", expected="one of them")
        input_ids = prompter.encode(prompt, has_image)
    elif prompt is not None:
        raise PromptError("both prompt and input_ids", expected="one of them")
    ids, begin = prompter.expand(input_ids, has_image)
    budget, most = options.page_budget, manifest.page_budget
    if budget is not None and budget > most:
        raise OptionError(f"page_budget={budget}", expected=f"at most the bundle's {most}")
    request = Request(
        ids,
        begin,
        begin + geometry.image_tokens if has_image else 0,
        (most if budget is None else budget) if has_image else 0,
        frozenset(manifest.prompt.eos_token_ids if options.stop_at_eos else ()),
        options,
    )
    if request.room > geometry.context:
        left = geometry.context - len(ids) + 1
        raise PromptError(
            f"a prompt of {len(ids)} tokens (image included) and up to {options.max_new_tokens} answer tokens",
            expected=f"at most {geometry.context} tokens together",
            fix=f"max_new_tokens={left}" if left > 0 else "shorten the prompt, or build with a larger --context",
        )
    return request
