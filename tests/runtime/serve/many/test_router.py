"""Which replica is asked: the same for the same image, all alike, few of them another when one comes or goes."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

from runtime.serve.ray.router import ImageRouter, ranked

NAMES = [f"replica{number}" for number in range(8)]
KEYS = [f"image{number}" for number in range(4000)]


def test_images_are_spread_evenly():
    for rank in (0, 1):  # the overflow, too
        counts = Counter(ranked(key, NAMES, NAMES)[rank] for key in KEYS)
        assert len(counts) == 8 and max(counts.values()) < 1.2 * 500 and min(counts.values()) > 0.8 * 500


def test_a_replica_that_goes_moves_its_own_images_only():
    before = {key: ranked(key, NAMES, NAMES) for key in KEYS}
    for key, order in before.items():
        after = ranked(key, NAMES[1:], NAMES[1:])
        assert after == [name for name in order if name != NAMES[0]]


def test_the_order_of_the_replicas_does_not_matter():
    assert all(ranked(key, NAMES, NAMES) == ranked(key, NAMES[::-1], NAMES[::-1]) for key in KEYS[:100])


def chosen(key: str) -> list[list[str]]:
    """Ranks of the replicas' names, as Ray asks for them."""
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in NAMES]
    pending = SimpleNamespace(args=[key], routing_context=SimpleNamespace(should_backoff=False))
    router = object.__new__(ImageRouter)  # what it chooses depends on nothing that Ray puts into it
    ranks = asyncio.run(router.choose_replicas(replicas, pending))
    assert pending.routing_context.should_backoff
    return [[each.replica_id.unique_id for each in rank] for rank in ranks]


def test_every_replica_is_tried_before_the_router_waits():
    ranks = chosen(KEYS[0])
    assert ranks == [[name] for name in ranked(KEYS[0], NAMES, NAMES)] and len(ranks) == 8
    two, all_of_them = chosen("")
    assert len(two) == 2 and sorted(all_of_them) == NAMES
