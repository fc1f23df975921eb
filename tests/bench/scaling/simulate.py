"""Replicas, a router and people who ask, in simulated time: what more machines than are here would give.

Images come at random (Poisson). About each, some questions are asked, one after the other: the next so long after the
answer, at random (exponential), as the one who asks thinks. A replica answers one question at a time; one about an
image it has kept takes a hit's time, else a miss's. It keeps the latest images, and holds so many requests at most. The
router is that of runtime/serve/ray/router.py, or, without affinity, takes the less busy of two, as Ray's own does. What
no replica has room for waits, in order.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

WARM_UP = 0.4  # of the simulated time, before anything is counted


@dataclass(frozen=True)
class Service:
    """Seconds of one replica for a question about an image it has to encode, and one it has kept: samples of either."""

    miss: np.ndarray  # [samples]
    hit: np.ndarray  # [samples]


@dataclass(frozen=True)
class Load:
    """What is asked: questions a second; of each image; seconds of thought between two; seconds simulated."""

    rate: float
    questions: int = 4
    thought: float = 10.0
    seconds: float = 100.0


@dataclass(frozen=True)
class Fleet:
    """Who answers. ongoing: requests that one replica holds at most. spill: by so many more than the less busy of
    an image's two its own has too many for it. images: that it keeps."""

    replicas: int
    affinity: bool
    ongoing: int = 16
    spill: int = 8
    images: int = 1000


@dataclass(frozen=True)
class Outcome:
    """Seconds from a question to its answer, sorted; the share of hits; the share of time that replicas work."""

    seconds: np.ndarray
    hits: float
    busy: float

    def percentile(self, share: float) -> float:
        """Seconds within which so many percent were answered."""
        return float(np.percentile(self.seconds, share))


@dataclass
class _Replica:
    holds: deque[tuple[float, _Session]] = field(default_factory=deque)
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)


@dataclass(eq=False)
class _Session:
    image: int
    left: int
    order: list[int] | None = None
    last: _Replica | None = None


def simulate(load: Load, service: Service, fleet: Fleet, seed: int = 0) -> Outcome:
    """One run."""
    random = Random(seed)
    replicas = [_Replica() for _ in range(fleet.replicas)]
    waiting: deque[tuple[float, _Session]] = deque()
    starts = np.random.default_rng(seed).exponential(
        load.questions / load.rate, int(1.2 * load.rate * load.seconds) + 20
    )
    miss, hit_times = service.miss.tolist(), service.hit.tolist()
    events: list[tuple[float, int, _Replica | None, _Session]] = [
        (float(time), number, None, _Session(number, load.questions)) for number, time in enumerate(np.cumsum(starts))
    ]
    count, begin, found, hits, worked = len(events), WARM_UP * load.seconds, list[float](), 0, 0.0
    choose = _by_image if fleet.affinity else _by_load

    def start(replica: _Replica, now: float) -> None:
        nonlocal count, hits, worked
        asked, session = replica.holds[0]
        hit = session.image in replica.kept
        took = random.choice(hit_times if hit else miss)
        replica.kept[session.image] = None
        replica.kept.move_to_end(session.image)
        if len(replica.kept) > fleet.images:
            replica.kept.popitem(last=False)
        if asked >= begin:
            hits += hit
        worked += max(0.0, min(now + took, load.seconds) - max(now, begin))
        heapq.heappush(events, (now + took, count, replica, session))
        count += 1

    def place(asked: float, session: _Session, replica: _Replica, now: float) -> None:
        replica.holds.append((asked, session))
        if len(replica.holds) == 1:
            start(replica, now)

    while events and events[0][0] < load.seconds:
        now, _, replica, session = heapq.heappop(events)
        if replica is None:  # a question
            chosen = None if waiting else choose(session, replicas, fleet, random)
            if chosen is None:
                waiting.append((now, session))
            else:
                place(now, session, chosen, now)
            continue
        asked, _ = replica.holds.popleft()  # an answer
        if asked >= begin:
            found.append(now - asked)
        session.left -= 1
        if session.left:
            heapq.heappush(events, (now + random.expovariate(1 / load.thought), count, None, session))
            count += 1
        if replica.holds:
            start(replica, now)
        if waiting:
            place(*waiting.popleft(), replica, now)
    # Who still waits has waited so long at least; leaving them out would make an overload look well.
    still = [load.seconds - asked for each in replicas for asked, _ in each.holds if asked >= begin]
    still += [load.seconds - asked for asked, _ in waiting if asked >= begin]
    window = (load.seconds - begin) * fleet.replicas
    return Outcome(np.sort([*found, *still]), hits / max(1, len(found)), worked / window)


_Choose = Callable[[_Session, list[_Replica], Fleet, Random], _Replica | None]


def _by_image(session: _Session, replicas: list[_Replica], fleet: Fleet, random: Random) -> _Replica | None:
    if session.order is None:  # a hash of the image is as good as chance, but always the same
        session.order = random.sample(range(len(replicas)), len(replicas))
    first = [replicas[index] for index in session.order[:2]]
    less_busy = min(first, key=lambda each: len(each.holds))
    own = session.last or less_busy
    if len(own.holds) - len(less_busy.holds) >= fleet.spill:
        own = less_busy
    ranks = itertools.chain([own, less_busy], first, (replicas[index] for index in session.order[2:]))
    found = next((each for each in ranks if len(each.holds) < fleet.ongoing), None)
    session.last = found or session.last
    return found


def _by_load(session: _Session, replicas: list[_Replica], fleet: Fleet, random: Random) -> _Replica | None:
    if len(replicas) > 1:
        better = min(random.sample(replicas, 2), key=lambda each: len(each.holds))
        if len(better.holds) < fleet.ongoing:
            return better
    free = [each for each in replicas if len(each.holds) < fleet.ongoing]
    return random.choice(free) if free else None


def capacity(service: Service, fleet: Fleet, within: float, load: Load | None = None) -> tuple[float, Outcome]:
    """Questions a second of which 95 % are answered within so many seconds, to 4 %; and the run at that rate. `load`:
    everything but the rate."""
    load = load or Load(0.0)

    def run(rate: float) -> Outcome:
        return simulate(Load(rate, load.questions, load.thought, load.seconds), service, fleet)

    low, high = 0.0, 1.1 * fleet.replicas / float(service.hit.mean())
    best = run(high / 100)
    while high - low > 0.04 * high:
        middle = (low + high) / 2
        outcome = run(middle)
        if len(outcome.seconds) and outcome.percentile(95) <= within:
            low, best = middle, outcome
        else:
            high = middle
    return low, best
