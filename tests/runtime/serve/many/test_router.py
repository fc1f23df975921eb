"""Which replica is asked: the same for the same image, all alike, few of them another when one comes or goes."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Id:
    unique_id: str


REPLICAS = [SimpleNamespace(replica_id=Id(name)) for name in NAMES]


@pytest.fixture
def router() -> ImageRouter:
    """Without what Ray puts into it: its choice depends on nothing of that."""
    made = object.__new__(ImageRouter)
    made._last = OrderedDict()
    made._replica_queue_len_cache = {}  # as Ray's, of which only `get` is called
    made.initialize_state(spill=8)
    return made


def chosen(router: ImageRouter, key: str) -> list[list[str]]:
    """Ranks of the replicas' names, as Ray asks for them."""
    pending = SimpleNamespace(args=[key], routing_context=SimpleNamespace(should_backoff=False))
    ranks = asyncio.run(router.choose_replicas(REPLICAS, pending))
    assert pending.routing_context.should_backoff
    return [[each.replica_id.unique_id for each in rank] for rank in ranks]


def test_every_replica_is_tried_before_the_router_waits(router):
    order = ranked(KEYS[0], NAMES, NAMES)
    assert chosen(router, KEYS[0]) == [[], order[:2], *([name] for name in order[2:])]
    two, all_of_them = chosen(router, "")
    assert len(two) == 2 and sorted(all_of_them) == NAMES


def test_who_had_it_last_is_asked_first(router):
    pending = SimpleNamespace(args=[KEYS[0]])
    router.on_request_routed(pending, REPLICAS[5].replica_id, None)
    assert chosen(router, KEYS[0])[0] == [NAMES[5]] and chosen(router, KEYS[1])[0] == []
    router.on_request_routed(pending, Id("gone"), None)
    assert chosen(router, KEYS[0])[0] == []


def test_an_image_that_many_ask_about_is_spread(router):
    """But only where another of its two is less busy: one that is busy everywhere stays."""
    (first, second), held = ranked(KEYS[0], NAMES, NAMES)[:2], router._replica_queue_len_cache
    by_name = {each.replica_id.unique_id: each.replica_id for each in REPLICAS}
    router.on_request_routed(SimpleNamespace(args=[KEYS[0]]), by_name[first], None)
    for own, other, stays in ((7, 0, True), (8, 0, False), (15, 8, True), (15, 7, False)):
        held.update({by_name[first]: own, by_name[second]: other})
        assert chosen(router, KEYS[0])[0] == [first] * stays
        assert chosen(router, KEYS[0])[1] == [first, second]


def test_what_is_remembered_is_bounded(router, monkeypatch):
    monkeypatch.setattr(ImageRouter, "REMEMBERED", 2)
    for key in [*KEYS[:2], KEYS[0], KEYS[2], ""]:
        router.on_request_routed(SimpleNamespace(args=[key]), REPLICAS[0].replica_id, None)
    assert list(router._last) == [KEYS[0], KEYS[2]]
