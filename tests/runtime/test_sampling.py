"""Greedy and sampled tokens."""

from __future__ import annotations

import numpy as np
import pytest

from runtime import BackendError, OptionError
from runtime.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draw(count: int = 2000, logits: np.ndarray = LOGITS, **options) -> np.ndarray:
    sampler = Sampler(Sampling(**options))
    return np.bincount([sampler.pick(logits) for _ in range(count)], minlength=len(logits)) / count


def test_greedy_takes_the_first_of_equals():
    assert Sampler(Sampling()).pick(np.array([0, 3, 3, 1], np.float32)) == 1


def test_same_seed_same_tokens():
    runs = [
        [Sampler(Sampling(temperature=1.0, seed=seed)).pick(LOGITS) for _ in range(1)]
        + [sampler.pick(LOGITS) for sampler in [Sampler(Sampling(temperature=1.0, seed=seed))] for _ in range(50)]
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_distribution():
    assert np.abs(draw(temperature=1.0, seed=0) - [0.5, 0.3, 0.15, 0.05]).max() < 0.04
    cold = draw(temperature=0.5, seed=0)
    assert cold[0] > 0.6 and cold[3] < 0.02


def test_filters():
    assert draw(temperature=1.0, top_k=2, seed=0)[2:].sum() == 0
    assert draw(temperature=1.0, top_k=1, seed=0)[0] == 1
    assert draw(temperature=1.0, top_k=99, seed=0)[3] > 0
    assert draw(temperature=1.0, top_p=0.7, seed=0)[2:].sum() == 0  # 0.5 < 0.7 <= 0.5 + 0.3
    assert draw(temperature=1.0, top_p=0.01, seed=0)[0] == 1
    shuffled = draw(logits=LOGITS[::-1], temperature=1.0, top_k=2, seed=0)
    assert shuffled[:2].sum() == 0 and shuffled[3] > shuffled[2] > 0


def test_extreme_logits_do_not_overflow():
    for temperature in (1e-3, 1e-300, 1e-320):
        for logits in ([1e30, -1e30, 0], [3e38, -3e38, 0], [10, 9, 0]):
            assert draw(10, np.array(logits, np.float32), temperature=temperature, seed=0)[0] == 1


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_k": 9999}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.5}])
def test_kept_tokens_are_those_of_a_full_sort(options):
    logits = np.random.default_rng(0).integers(-9, 9, 500).astype(np.float32)  # many equal ones
    order = np.argsort(-logits, kind="stable")[: options.get("top_k") or None]
    share = np.cumsum(np.exp(logits[order].astype(np.float64)))
    expected = order[: int(np.searchsorted(share / share[-1], options.get("top_p", 1.0))) + 1]
    allowed = Recorder()
    sampler = Sampler(Sampling(temperature=1.0, **options))
    sampler._random = allowed
    sampler.pick(logits)
    assert allowed.count == (len(expected) if "top_p" in options else len(order))
    drawn = draw(3000, logits, temperature=1.0, seed=0, **options)
    assert set(np.flatnonzero(drawn)) <= set(expected)


class Recorder:
    """In place of the random generator: how many tokens it may choose from."""

    def choice(self, count: int, p: np.ndarray) -> int:
        self.count = count
        return 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "hot"},
        {"temperature": True}, {"temperature": 1, "top_k": -1}, {"temperature": 1, "top_k": 2.5},
        {"temperature": 1, "top_p": 0}, {"temperature": 1, "top_p": 1.1}, {"temperature": 1, "seed": -1},
        {"top_k": 5}, {"top_p": 0.5}, {"seed": 1},
    ],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(OptionError, match=list(options)[-1]):
        Sampling(**options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(BackendError, match="not finite"):
        Sampler(Sampling()).pick(np.array([0, bad], np.float32))
