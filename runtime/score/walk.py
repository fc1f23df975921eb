"""Given tokens, step by step: what `Draft` is for tokens that the model chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from engines.backend import Step, chosen_pages
from engines.bundle.geometry import Geometry
from runtime.answer import Token, require_slots
from runtime.request import Request
from runtime.sampling import require_finite
from runtime.score.continuations import Scoring
from runtime.stats import Clock, Stats
from runtime.text.prompter import Prompter


@dataclass(frozen=True, eq=False)
class Score:
    """How likely T given tokens are after a prompt. Of each token, what the step says that predicts it.

    stats: of the run that gave it, which other continuations may have shared: a decode step for each token that they do
    not begin with alike.
    """

    token_ids: list[int]
    tokens: list[str] | None  # as the vocabulary spells them, "" where it has none; None without a tokenizer
    logprobs: np.ndarray  # [T] float64: log-softmax of the float32 logits, in float64, no temperature
    greedy: bool  # whether each of them has the largest logit, so that a greedy answer begins with them
    pages_read: np.ndarray  # [T, reading layers] int64
    cells: np.ndarray  # [T, M, C, C] bool: the selection each layer made (start .. last; the last one's is never used)
    stats: Stats

    @property
    def sum(self) -> float:
        """Log-probability of the whole continuation."""
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        """Log-probability per token: what the official V* script compares, which calls it a loss, is -mean."""
        return self.sum / len(self.logprobs)


def _nothing() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(eq=False)
class _Node:
    """A token, behind those that lead to it. depth: how many tokens are fed between the prefilled ones and it.
    children: what may follow it. logprob, likeliest: of itself. pages, page_count: selected when it was fed."""

    token: int
    depth: int
    children: dict[int, _Node] = field(default_factory=dict)
    logprob: float = math.nan
    likeliest: bool = False
    pages: np.ndarray = field(default_factory=_nothing)  # [M, C*C] int64, best first
    page_count: np.ndarray = field(default_factory=_nothing)  # [M] int64


class Walk:
    """Scores of continuations of one prompt: see runtime.answer.Decoding.

    They are a tree, whose root is the prompt's last token; each token that something follows is fed once, depth first.
    So what is fed is always behind the tokens that lead to it, and what other branches left in the cache is forgotten.

    scores: by the place of the continuation, once it is finished.
    """

    def __init__(
        self,
        request: Request,
        continuations: Mapping[int, np.ndarray],
        clock: Clock,
        geometry: Geometry,
        pieces: Callable[[list[int]], list[str] | None],
    ) -> None:
        """`continuations`: token ids [n] int64 of each, by its place. `clock`: of this run alone. `pieces`: spells
        tokens, Prompter.pieces."""
        self.request, self.clock = request, clock
        self._continuations = {place: ids.tolist() for place, ids in continuations.items()}
        self._geometry, self._pieces = geometry, pieces
        self._root = _Node(int(request.ids[-1]), 0)
        self._ahead = [self._root]  # to be fed, the next one last
        self._page_counts: list[np.ndarray] = []
        self._turnover: list[np.ndarray | None] = []
        self.scores: dict[int, Score] = {}
        for ids in self._continuations.values():
            node = self._root
            for token in ids:
                node = node.children.setdefault(token, _Node(token, node.depth + 1))

    @property
    def done(self) -> bool:
        """See Decoding.done."""
        return not self._ahead

    @property
    def latest(self) -> int:
        """See Decoding.latest."""
        return self._ahead[-1].token

    @property
    def fed(self) -> int:
        """See Decoding.fed: less than before where the walk goes back to another branch."""
        return self._ahead[-1].depth if self._ahead else 0

    def take(self, step: Step) -> Token:
        """See Decoding.take."""
        logits = step.logits[0]
        require_finite(logits)
        require_slots(step, self._geometry)
        node, exact = self._ahead.pop(), logits.astype(np.float64)
        largest = exact.max()
        total = largest + math.log(np.exp(exact - largest).sum())
        for child in node.children.values():
            child.logprob = float(exact[child.token] - total)
            child.likeliest = child.token == int(step.token[0])
        node.pages, node.page_count = step.pages[0], step.page_count[0]
        self._page_counts.append(node.page_count)
        self._turnover.append(step.turnover)
        self._ahead += [child for child in reversed(node.children.values()) if child.children]
        return Token(None, "", node.pages, node.page_count)

    def rest(self) -> Iterator[Token]:
        """See Decoding.rest: nothing is held back."""
        return iter(())

    def finish(self, reused_tokens: int) -> None:
        """See Decoding.finish."""
        stats = self.clock.stats(
            prompt_tokens=len(self.request.ids),
            reused_tokens=reused_tokens,
            pages_read=np.stack(self._page_counts)[:, :-1],
            turnover=self._turnover,
        )
        self.scores = {place: self._score(ids, stats) for place, ids in self._continuations.items()}

    def _score(self, ids: list[int], stats: Stats) -> Score:
        path = [self._root]
        for token in ids:
            path.append(path[-1].children[token])
        counts = np.stack([node.page_count for node in path[:-1]])  # [T, M]
        mask = chosen_pages(np.stack([node.pages for node in path[:-1]]), counts)
        side = self._geometry.cells
        return Score(
            token_ids=ids,
            tokens=self._pieces(ids),
            logprobs=np.array([node.logprob for node in path[1:]]),
            greedy=all(node.likeliest for node in path[1:]),
            pages_read=counts[:, :-1],  # each reading layer reads what the layer before it selected
            cells=mask.reshape(*mask.shape[:2], side, side),
            stats=stats,
        )


def walks(
    scoring: Scoring, rows: int, prompter: Prompter, geometry: Geometry, clock: Callable[[], Clock]
) -> list[Walk]:
    """The walks that score a prompt's continuations, at most `rows`, at least one. Those that begin with the same token
    stay together: so no token but the prompt's last one is fed more than once. `clock`: makes one for each."""
    by_first: dict[int, dict[int, np.ndarray]] = {}
    for place, ids in scoring.continuations.items():
        by_first.setdefault(int(ids[0]), {})[place] = ids
    steps = {first: sum(len(ids) - 1 for ids in each.values()) for first, each in by_first.items()}  # at most
    most = max(1, min(rows, sum(map(bool, steps.values()))))
    shares: list[dict[int, np.ndarray]] = [{} for _ in range(most)]
    loads = [0] * most
    for first in sorted(steps, key=steps.__getitem__, reverse=True):  # each to the row that has least to do
        least = loads.index(min(loads))
        shares[least] |= by_first[first]
        loads[least] += steps[first]
    return [Walk(scoring.request, share, clock(), geometry, prompter.pieces) for share in shares]
