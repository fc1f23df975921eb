"""What is to be scored: prompts, and the tokens of what may follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engines.bundle.manifest import Manifest
from engines.checks import shown
from engines.errors import PromptError
from runtime.request import (
    Options,
    Request,
    answer_room,
    check_count,
    may_fit,
    read_prompt,
    request_of,
    too_long,
    too_many_characters,
)
from runtime.text.conversation import Conversation, Prompt
from runtime.text.prompter import IMAGE_TOKEN, Prompter

# Of a prompt: its ids, and how many of them come before each earlier answer.
_Tokens = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Scoring:
    """Continuations of one prompt.

    request: the prompt, with room for the longest of them. continuations: token ids [n] int64, by their place among
    those that were given.
    """

    request: Request
    continuations: dict[int, np.ndarray]


@dataclass(frozen=True)
class Continuations:
    """What may follow a prompt, as it was given: `texts`, or token `ids`, the other being None. Several of either, in
    arrays of NumPy too."""

    texts: Sequence[str] | None
    ids: Sequence[Sequence[int]] | None

    @property
    def characters(self) -> int:
        """Of the longest text; 0 of ids."""
        return 0 if self.texts is None else max(map(len, self.texts))


@dataclass(frozen=True)
class ContinuationReader:
    """Reads what one view is asked to score. Its arguments are those of runtime.request.read_request."""

    options: Options
    has_image: bool
    prompter: Prompter
    manifest: Manifest

    def read(
        self, prompt: Prompt | None, input_ids: Sequence[int] | None, continuations: Continuations
    ) -> list[Scoring]:
        """The continuations by their prompts: all have the same one, unless a token spans the seam of some.

        Raises PromptError for a prompt that is none or does not go with the image (or the lack of one), for
        continuations that are no list of either kind or have no token, for ids that are out of range, and for text that
        was to follow ids; ContextError for what does not fit together; OptionError for a page budget above the
        bundle's.
        """
        _require_several(continuations)
        asked = read_prompt(prompt, input_ids)
        if asked is None:
            if continuations.ids is None:
                raise PromptError(
                    "input_ids with a continuation as text, which is tokenised as one with its prompt",
                    expected="both as text, or continuation_ids",
                )
            assert input_ids is not None  # read_prompt saw to it
            check_count(input_ids, "input_ids", self._context)
            return [self._scoring(input_ids, (), self._checked(continuations.ids), None, continuations)]
        characters = asked.characters + continuations.characters
        if not may_fit(characters, self.prompter, self._context):
            raise too_many_characters(
                asked, lambda shorter: self._room(shorter, continuations), characters, self.prompter, self._context
            )
        return [
            self._scoring(ids, turns, found, asked, continuations)
            for (ids, turns), found in self._by_prompt(asked, continuations).items()
        ]

    @property
    def _context(self) -> int:
        return self.manifest.geometry.context

    def _by_prompt(self, asked: Conversation, continuations: Continuations) -> dict[_Tokens, dict[int, np.ndarray]]:
        """Prompts -> the continuations of each."""
        special = self.options.special_tokens
        if continuations.ids is not None:
            ids, turns = self.prompter.encode_turns(asked, self.has_image, special_tokens=special)
            return {(tuple(ids), tuple(turns)): self._checked(continuations.ids)}
        found: dict[_Tokens, dict[int, np.ndarray]] = {}
        assert continuations.texts is not None  # as one of the two is given
        for index, text in enumerate(continuations.texts):
            ids, turns = self.prompter.encode_turns(asked, self.has_image, special_tokens=special, answer=text)
            *earlier, begin = turns
            if IMAGE_TOKEN in ids[begin:]:
                raise PromptError(f"an image in continuation {index}", expected="text alone")
            if begin == len(ids):
                raise PromptError(f"continuation {index}, {shown(text)}, has no token", expected="one or more")
            prompt = tuple(ids[:begin]), tuple(earlier)
            found.setdefault(prompt, {})[index] = np.array(ids[begin:], np.int64)
        return found

    def _checked(self, continuations: Sequence[Sequence[int]]) -> dict[int, np.ndarray]:
        checked = {}
        for index, ids in enumerate(continuations):
            check_count(ids, "continuation_ids", self._context)
            try:
                checked[index] = self.prompter.continuation(ids)
            except PromptError as error:
                raise error.within(f"continuation {index}") from None
        return checked

    def _scoring(
        self,
        input_ids: Sequence[int],
        turns: Sequence[int],
        found: dict[int, np.ndarray],
        asked: Conversation | None,
        continuations: Continuations,
    ) -> Scoring:
        """One prompt with its continuations, which must fit."""
        longest = max(map(len, found.values()))
        request = request_of(
            input_ids,
            turns,
            replace(self.options, max_new_tokens=longest),
            has_image=self.has_image,
            prompter=self.prompter,
            manifest=self.manifest,
        )
        if request.room > self._context:
            left = answer_room(len(request.ids), self._context)
            raise too_long(
                asked,
                lambda shorter: self._room(shorter, continuations),
                len(request.ids),
                f"a continuation of {longest}",
                self.prompter,
                self._context,
                [f"a continuation of at most {left} tokens"] if left > 0 else [],
            )
        return Scoring(request, found)

    def _room(self, asked: Conversation, continuations: Continuations) -> int:
        """Tokens that the longest of the continuations takes in a cache, with its prompt; the last one is never fed."""
        if not may_fit(asked.characters + continuations.characters, self.prompter, self._context):
            return self._context + 1
        found = self._by_prompt(asked, continuations)
        return max(
            len(self.prompter.expand(ids, self.has_image)[0]) + max(map(len, each.values())) - 1
            for (ids, _), each in found.items()
        )


def _require_several(given: Continuations) -> None:
    """PromptError unless one of the two is given, a list of one or more, and each text is one and not empty."""
    if given.texts is not None and given.ids is not None:
        raise PromptError("both continuations and continuation_ids", expected="one of them")
    several, what = (given.texts, "texts") if given.ids is None else (given.ids, "lists of token ids")
    if several is None:
        raise PromptError("no continuation", expected="one of continuations and continuation_ids")
    if not isinstance(several, Sequence | np.ndarray) or isinstance(several, str | bytes | bytearray | memoryview):
        raise PromptError(f"continuations {shown(several)}", expected=f"a list of {what}")
    if isinstance(several, np.ndarray) and not several.ndim:
        raise PromptError(f"continuations {shown(several)}, an array without dimensions", expected=f"a list of {what}")
    if all(False for _ in several):  # len() cannot count every range
        raise PromptError("no continuation", expected=f"a list of one or more {what}")
    for index, text in enumerate(() if given.texts is None else given.texts):
        if not isinstance(text, str):
            raise PromptError(f"continuation {index} of type {type(text).__name__}", expected="str")
        if not text:
            raise PromptError(f"continuation {index} is empty", expected="text of at least one token")
