"""The simulation against what queueing theory knows, and against what must be so."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.scaling.simulate import Fleet, Load, Service, capacity, simulate

EXPONENTIAL = np.random.default_rng(1).exponential(0.1, 20_000)
CONSTANT = np.full(1, 0.1)


@pytest.mark.parametrize(("samples", "mean"), [(EXPONENTIAL, 0.1 / (1 - 0.7)), (CONSTANT, 0.1 * (1 + 0.7 / 0.6))])
def test_one_replica_is_a_queue_of_the_textbook(samples, mean):
    """M/M/1: the mean time is s / (1 - load). M/D/1: s (1 + load / (2 - 2 load))."""
    load = Load(rate=7.0, questions=1, seconds=8000.0)
    outcome = simulate(load, Service(samples, samples), Fleet(1, False, ongoing=10**9))
    assert outcome.seconds.mean() == pytest.approx(mean, rel=0.06) and outcome.busy == pytest.approx(0.7, rel=0.03)


def test_the_bound_of_a_replica_changes_no_time_of_one():
    """Whether one waits at the replica or before it."""
    times = [
        simulate(Load(8.0, 1, seconds=500.0), Service(CONSTANT, CONSTANT), Fleet(1, True, ongoing=most)).seconds
        for most in (1, 4, 10**9)
    ]
    assert np.allclose(times[0], times[1]) and np.allclose(times[0], times[2])


def test_affinity_finds_every_image_again():
    service, load = Service(CONSTANT, CONSTANT / 10), Load(8.0, questions=4)
    kept = simulate(load, service, Fleet(8, True))
    spread = simulate(load, service, Fleet(8, False))
    assert kept.hits == pytest.approx(3 / 4, abs=0.03)
    assert spread.hits == pytest.approx((1 / 8 + 15 / 64 + 169 / 512) / 4, abs=0.03), "each asked at one of eight"
    assert kept.percentile(50) < spread.percentile(50) and kept.busy < spread.busy


def test_images_that_are_not_kept_are_not_found():
    outcome = simulate(Load(8.0), Service(CONSTANT, CONSTANT / 10), Fleet(8, True, images=1))
    assert outcome.hits < 0.5


def test_an_overload_shows():
    outcome = simulate(Load(30.0, 1), Service(CONSTANT, CONSTANT), Fleet(2, True))
    assert outcome.busy > 0.99 and outcome.percentile(95) > 10


def test_capacity_grows_with_the_replicas():
    service, load = Service(CONSTANT, CONSTANT), Load(0.0, questions=1, seconds=200.0)
    one, four = (capacity(service, Fleet(count, False), 0.5, load)[0] for count in (1, 4))
    assert 6 < one < 10 and 4 * one < four < 40
