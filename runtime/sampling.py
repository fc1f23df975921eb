"""From logits to a token."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from engines.checks import require_integer, shown
from engines.errors import BackendError, OptionError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 = greedy; otherwise sample, from the top_k likeliest (0 = all) and the smallest set of the
    likeliest that holds top_p of the probability (1 = all). The same seed gives the same tokens; None = random."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks every field, and makes Python's numbers of NumPy's, which wrap around."""
        settle = partial(object.__setattr__, self)
        settle("temperature", require_number(self.temperature, "temperature", "a number of at least 0"))
        if self.temperature < 0:
            raise OptionError(f"temperature={shown(self.temperature)}", expected="a number of at least 0")
        settle("top_k", require_integer(self.top_k, f"top_k={shown(self.top_k)}", 0))  # 0 = all tokens
        settle("top_p", require_number(self.top_p, "top_p", "a number above 0, at most 1"))
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p={shown(self.top_p)}", expected="a number above 0, at most 1")
        settle("seed", require_integer(self.seed, f"seed={shown(self.seed)}", 0, none="a random one"))
        given = [name for name, off in (("top_k", 0), ("top_p", 1.0), ("seed", None)) if getattr(self, name) != off]
        if self.temperature == 0 and given:
            raise OptionError(
                f"{', '.join(given)} with temperature=0, where decoding is greedy and would ignore it",
                fix="pass a temperature above 0 too, for instance temperature=0.7",
            )


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        """`sampling`: how, and from which seed on."""
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: np.ndarray) -> int:
        """One token id from logits [V] float32; greedy takes the first of equal ones.

        Raises BackendError when a logit is not finite: the engine is broken, and any token would be a lie.
        """
        require_finite(logits)
        options = self._sampling
        if options.temperature == 0:
            return int(logits.argmax())
        distance = logits.astype(np.float64) - logits.max()  # before dividing: the likeliest stays at exactly 0
        with np.errstate(over="ignore"):  # -inf at a tiny temperature is right: probability 0
            weights = np.exp(distance / options.temperature)
        tokens = _likeliest(distance, options.top_k)
        if options.top_p < 1:
            tokens = _nucleus(tokens, weights[tokens], options.top_p)
        kept = weights[tokens]
        return int(tokens[self._random.choice(len(tokens), p=kept / kept.sum())])


def require_finite(logits: np.ndarray) -> None:
    """BackendError when one of the logits [V] is not finite."""
    if not np.isfinite(logits).all():
        raise BackendError("the model produced logits that are not finite", fix="rebuild with --bf16 or --fp32")


def _likeliest(scores: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` highest scores (0 = all), of equal ones the first. Sorting a vocabulary would take longer."""
    if not 0 < count < len(scores):
        return np.arange(len(scores))
    last = np.partition(scores, -count)[-count]
    above = np.flatnonzero(scores > last)
    return np.concatenate((above, np.flatnonzero(scores == last)[: count - len(above)]))


def _nucleus(tokens: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """The fewest `tokens`, likeliest first, whose `weights` hold `share` of the total."""
    total = weights.sum()
    # All tokens below this weight together hold less than 1 - share, so none is needed, and few are left to sort.
    large = weights >= (1 - share) * total / len(weights)
    tokens, weights = tokens[large], weights[large]
    order = np.argsort(-weights, kind="stable")
    return tokens[order[: int(np.searchsorted(np.cumsum(weights[order]), share * total)) + 1]]


def require_number(value: object, name: str, expected: str) -> float:
    """`value` as one of Python's floats; OptionError, which calls it `name`, unless it is a finite number."""
    if isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer that no float can be
            number = float(value)
            if math.isfinite(number):
                return number
    raise OptionError(f"{name}={shown(value)}", expected=expected)
