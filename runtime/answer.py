"""What comes out of a request, and what there is of it while it is being made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from engines.backend import Step
from engines.bundle.geometry import Geometry
from runtime.request import Request
from runtime.stats import Clock, Stats
from runtime.text.stream import TextStream


@dataclass(frozen=True)
class Trace:
    """Everything a parity test wants to see. T answer tokens, M selecting layers (start .. last), C*C cells."""

    logits: np.ndarray  # [T, V] float32; step 0 is the first answer token
    cells: np.ndarray  # [T, M, C, C] bool: the selection each layer made (the last layer's is never used)


@dataclass(frozen=True)
class Answer:
    """An answer. `text` is None when the bundle has no tokenizer; `token_ids` include a final end token."""

    text: str | None
    token_ids: list[int]
    stats: Stats
    trace: Trace | None

    def __str__(self) -> str:
        return self.text if self.text is not None else str(self.token_ids)


@dataclass(eq=False)
class Draft:
    """An answer in the making: the state of one request between two decode steps, whoever runs them.

    text: takes the tokens and gives the text they settle. clock: of this answer alone. geometry: of the model. answer:
    the whole, once `finish` was called.
    """

    request: Request
    text: TextStream
    clock: Clock
    geometry: Geometry
    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)  # one per token until `finish`; without a trace, only page counts
    answer: Answer | None = None

    @property
    def done(self) -> bool:
        """Whether the last token is chosen: there are enough, it ends the answer, or the text has a stop string."""
        ended = bool(self.tokens) and self.tokens[-1] in self.request.ends
        return ended or self.text.stopped or len(self.tokens) >= self.request.options.max_new_tokens

    def add(self, token: int, step: Step) -> str:
        """Take the token that was chosen after `step`; returns the text it settles, often one word, sometimes none."""
        self.tokens.append(token)
        self.steps.append(step if self.request.options.trace else replace(step, fetch=_gone, pages=_NOTHING))
        return "" if token in self.request.ends else self.text.push(token)

    def finish(self, reused_tokens: int) -> None:
        """Make the answer of what there is. `reused_tokens`: prompt tokens that were in the cache already."""
        counts = np.concatenate([step.page_count for step in self.steps])  # [T, M]
        stats = self.clock.stats(
            prompt_tokens=len(self.request.ids),
            reused_tokens=reused_tokens,
            pages_read=counts[:, :-1],  # each reading layer reads what the layer before it selected
        )
        trace = self._trace() if self.request.options.trace else None
        self.answer = Answer(self.text.text, self.tokens, stats, trace)
        self.steps.clear()  # those with logits hold on to their decoder

    def _trace(self) -> Trace:
        mask = np.concatenate([step.cells() for step in self.steps])  # [T, M, C*C]
        logits = np.concatenate([step.logits for step in self.steps])
        side = self.geometry.cells
        return Trace(logits, mask.reshape(*mask.shape[:2], side, side))


_NOTHING = np.zeros(0)


def _gone() -> np.ndarray:
    raise RuntimeError("the logits of this step were not kept")
