"""What comes out of a request, and what there is of it while it is being made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from engines.backend import Step, chosen_pages
from engines.bundle.geometry import Geometry
from runtime.request import Request
from runtime.sampling import Sampler
from runtime.stats import Clock, Stats
from runtime.text.stream import TextStream


@dataclass(frozen=True)
class Trace:
    """Everything a parity test wants to see. T answer tokens, M selecting layers (start .. last), C*C cells."""

    logits: np.ndarray  # [T, V] float32; step 0 is the first answer token
    cells: np.ndarray  # [T, M, C, C] bool: the selection each layer made (the last layer's is never used)


@dataclass(frozen=True, eq=False)
class Token:
    """One token of a running answer. text: what it settles of the answer's text, often one word, sometimes none. What
    is held back until no more tokens come (the begin of a stop string, half a character) is a last one without an id.
    """

    id: int | None
    text: str
    _pages: np.ndarray  # [M, C*C] int64, best first
    _page_count: np.ndarray  # [M] int64

    @property
    def cells(self) -> np.ndarray:
        """bool [M, C, C]: the selection each layer made in the step that chose this token; a layer reads that of the
        layer before it, so nobody reads the last one's. M is 0 without an id."""
        side = math.isqrt(self._pages.shape[-1])
        return chosen_pages(self._pages, self._page_count).reshape(-1, side, side)


@dataclass(frozen=True)
class Answer:
    """An answer. `text` is None when the bundle has no tokenizer; `token_ids` include a final end token.
    finish_reason: "stop" when an end token or a stop string ended it, "length" when max_new_tokens did."""

    text: str | None
    token_ids: list[int]
    stats: Stats
    trace: Trace | None
    finish_reason: Literal["stop", "length"]

    def __str__(self) -> str:
        return self.text if self.text is not None else str(self.token_ids)


@dataclass(eq=False)
class Draft:
    """An answer in the making: the state of one request between two decode steps, whoever runs them.

    text: takes the tokens and gives the text they settle. clock: of this answer alone. geometry: of the model. sampler:
    chooses the tokens. answer: the whole, once `finish` was called.
    """

    request: Request
    text: TextStream
    clock: Clock
    geometry: Geometry
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)  # one per token until `finish`; without a trace, only page counts
    answer: Answer | None = None

    @property
    def done(self) -> bool:
        """Whether the last token is chosen: there are enough, it ends the answer, or the text has a stop string."""
        return self._ended or len(self.tokens) >= self.request.options.max_new_tokens

    @property
    def _ended(self) -> bool:
        """Whether the answer has come to its end, rather than to its longest."""
        return self.text.stopped or (bool(self.tokens) and self.tokens[-1] in self.request.ends)

    @property
    def latest(self) -> int:
        """The token that the next step takes. The prompt's last one is the first: it alone, and every answer token
        after it, reads pages."""
        return self.tokens[-1] if self.tokens else int(self.request.ids[-1])

    def take(self, step: Step) -> Token:
        """Choose a token after a step of one row, and take it. Raises BackendError when a logit is not finite: in the
        first step and the last, and where somebody looks; what goes wrong in a step goes wrong in all after it."""
        options = self.request.options
        token = int(step.token[0])  # chosen on the device, where the logits stay
        looks = options.trace or options.temperature > 0  # somebody needs the logits of every step
        if looks or not self.tokens or not 0 <= token < self.geometry.vocab:
            token = self.sampler.pick(step.logits[0])  # raises where there is nothing to choose from
        self.tokens.append(token)
        self.steps.append(step if self.request.options.trace else replace(step, fetch=_gone, pages=_NOTHING))
        text = "" if token in self.request.ends else self.text.push(token)
        if self.done:
            self.sampler.check(step.logits[0])
        return Token(token, text, step.pages[0], step.page_count[0])

    def rest(self) -> Iterator[Token]:
        """What was held back of the text, when no more tokens come; at most one."""
        if text := self.text.finish():
            yield Token(None, text, np.zeros((0, self.geometry.pages), np.int64), np.zeros(0, np.int64))

    def finish(self, reused_tokens: int) -> None:
        """Make the answer of what there is. `reused_tokens`: prompt tokens that were in the cache already."""
        counts = np.concatenate([step.page_count for step in self.steps])  # [T, M]
        stats = self.clock.stats(
            prompt_tokens=len(self.request.ids),
            reused_tokens=reused_tokens,
            pages_read=counts[:, :-1],  # each reading layer reads what the layer before it selected
        )
        trace = self._trace() if self.request.options.trace else None
        self.answer = Answer(self.text.text, self.tokens, stats, trace, "stop" if self._ended else "length")
        self.steps.clear()  # those with logits hold on to their decoder

    def _trace(self) -> Trace:
        mask = np.concatenate([step.cells() for step in self.steps])  # [T, M, C*C]
        logits = np.concatenate([step.logits for step in self.steps])
        side = self.geometry.cells
        return Trace(logits, mask.reshape(*mask.shape[:2], side, side))


_NOTHING = np.zeros(0)


def _gone() -> np.ndarray:
    raise RuntimeError("the logits of this step were not kept")
