"""What comes out of a request, and what there is of it while it is being made, by whoever makes its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from engines.backend import Step, chosen_pages
from engines.bundle.geometry import Geometry
from engines.errors import OptionError
from runtime.request import Request
from runtime.sampling import Sampler, require_finite
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


class Decoding(Protocol):
    """A request between two decode steps, whoever makes them: an answer (`Draft`), or given tokens (runtime.score).

    clock: of this request alone.
    """

    @property
    def request(self) -> Request:
        """What is prefilled, all but its last id."""

    @property
    def clock(self) -> Clock:
        """Takes the time of its stages."""

    @property
    def done(self) -> bool:
        """Whether no step is left to make."""

    @property
    def latest(self) -> int:
        """The token that the next step takes. The prompt's last one is the first: it alone, and every token after it,
        reads pages."""

    @property
    def fed(self) -> int:
        """How many tokens the cache must hold of this request when that step is made, behind what was prefilled. Those
        of steps that count no longer are forgotten."""

    def take(self, step: Step) -> Token:
        """Take what a step of one row says; what to tell of it. Raises BackendError when a logit is not finite, and
        what `require_slots` does."""

    def rest(self) -> Iterator[Token]:
        """What was held back, when no more steps come."""

    def finish(self, reused_tokens: int) -> None:
        """Make the result of what there is. `reused_tokens`: prompt tokens that were in the cache already."""


@dataclass(eq=False)
class Draft:
    """An answer in the making: see Decoding.

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
        """See Decoding.latest."""
        return self.tokens[-1] if self.tokens else int(self.request.ids[-1])

    @property
    def fed(self) -> int:
        """See Decoding.fed: the prompt's last token, and all but the last of the answer."""
        return len(self.tokens)

    def take(self, step: Step) -> Token:
        """Choose a token after a step of one row, and take it. Raises BackendError when a logit is not finite: in the
        first step and the last, and where somebody looks; what goes wrong in a step goes wrong in all after it.
        OptionError when the step selected more pages than there are slots."""
        require_slots(step, self.geometry)
        options = self.request.options
        token = int(step.token[0])  # chosen on the device, where the logits stay
        looks = options.trace or options.temperature > 0  # somebody needs the logits of every step
        if looks or not self.tokens or not 0 <= token < self.geometry.vocab:
            token = self.sampler.pick(step.logits[0])  # raises where there is nothing to choose from
        self.tokens.append(token)
        self.steps.append(step if self.request.options.trace else replace(step, fetch=_gone, pages=_NOTHING))
        text = "" if token in self.request.ends else self.text.push(token)
        if self.done:
            require_finite(step.logits[0])
        return Token(token, text, step.pages[0], step.page_count[0])

    def rest(self) -> Iterator[Token]:
        """See Decoding.rest: of the text; at most one."""
        if text := self.text.finish():
            yield Token(None, text, np.zeros((0, self.geometry.pages), np.int64), np.zeros(0, np.int64))

    def finish(self, reused_tokens: int) -> None:
        """See Decoding.finish."""
        counts = np.concatenate([step.page_count for step in self.steps])  # [T, M]
        stats = self.clock.stats(
            prompt_tokens=len(self.request.ids),
            reused_tokens=reused_tokens,
            pages_read=counts[:, :-1],  # each reading layer reads what the layer before it selected
            turnover=(step.turnover for step in self.steps),
        )
        trace = self._trace() if self.request.options.trace else None
        self.answer = Answer(self.text.text, self.tokens, stats, trace, "stop" if self._ended else "length")
        self.steps.clear()  # those with logits hold on to their decoder

    def _trace(self) -> Trace:
        mask = np.concatenate([step.cells() for step in self.steps])  # [T, M, C*C]
        logits = np.concatenate([step.logits for step in self.steps])
        side = self.geometry.cells
        return Trace(logits, mask.reshape(*mask.shape[:2], side, side))


def require_slots(step: Step, g: Geometry) -> None:
    """OptionError when a layer that is read from selected more pages in a step of one row than the bundle has slots for
    (--page-slots): it then read the best of them alone, which is another answer."""
    most = int(step.page_count[0, :-1].max())
    if most > g.stored_pages:
        raise OptionError(
            f"a step that selects {most} pages of {g.pages} in a layer",
            expected=f"at most {g.stored_pages}, the bundle's --page-slots",
            fix=f"page_budget={g.stored_pages} reads the best {g.stored_pages} in each layer; or build the bundle "
            f"again with --page-slots {most} or more",
        )


_NOTHING = np.zeros(0)


def _gone() -> np.ndarray:
    raise RuntimeError("the logits of this step were not kept")
