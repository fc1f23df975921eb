"""How throughput grows with replicas: measured for one and two, simulated for more. Writes a picture, prints tables.

python -m tests.bench.scaling build/default-fp16 --out docs/scaling.png
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.bench.scaling.measure import PEOPLE, QUESTIONS, Rate, rates, service_times
from tests.bench.scaling.picture import Line, plot
from tests.bench.scaling.simulate import Fleet, Load, Outcome, Service, capacity, simulate

REPLICAS = (1, 2, 4, 8, 16, 32, 64)
DRAWN = (1, 8, 64)
WITHIN = 1.0  # seconds
SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of what a fleet could answer if every image were found again
BOUNDS = ((4, 99), (16, 2), (16, 4), (16, 8), (16, 99))  # ongoing, spill; 99: never
# 7B's shape on an H100 under ONNX Runtime, from docs/figures.md: vision 75 ms, pages 29, prefill 189, of what follows
# the image 16; 16 answer tokens of 16.5 ms.
LARGE = Service(np.array([0.075 + 0.029 + 0.189 + 16 * 0.0165]), np.array([0.016 + 16 * 0.0165]))
LARGE_WITHIN = 3.0
LARGE_IMAGES = int((80 - 28.9) / 1.95)  # of 80 GB, beside what is in use; pages of 23 layers, float16
DAY = 1_000_000  # images
PEAK = 3.0  # times the day's average


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="of the default model")
    parser.add_argument("--out", type=Path, default=Path("build/scaling.png"))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round with clients")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    given = parser.parse_args()
    service = service_times(given.bundle)
    print(
        f"one engine, one thread: {1000 * np.median(service.miss):.0f} ms for a new image, "
        f"{1000 * np.median(service.hit):.0f} ms for a known one (medians of {len(service.miss)}, {len(service.hit)})\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        measured, memory = rates(given.bundle.resolve(), given.seconds, given.rounds, Path(folder))
    _print_measured(measured)
    print(
        f"memory: a replica {memory.replica / 1e6:.0f} MB, the front {memory.front / 1e6:.0f} MB, all of Ray with two "
        f"replicas {memory.all / 1e9:.2f} GB\n"
    )
    lines = _simulated("the default model", service, WITHIN, Fleet.images)
    _simulated("7B's shape on an H100, its times computed from its figures", LARGE, LARGE_WITHIN, LARGE_IMAGES)
    _print_bounds(service)
    _print_day(service)
    plot(lines, [(1, measured[1].rate), (2, measured[2].rate)], WITHIN, given.out)
    print(f"{given.out} is written")


def _print_measured(measured: list[Rate]) -> None:
    print(f"measured, {PEOPLE} ask at a time, {QUESTIONS} questions of each image:\n")
    print("| | questions/s | median | 95 % within | image known |\n|---|---:|---:|---:|---:|")
    for each in measured:
        print(
            f"| {each.name} | {each.rate:.1f} | {1000 * each.p50:.0f} ms | {1000 * each.p95:.0f} ms | {each.hits:.0%} |"
        )
    print()


def _simulated(name: str, service: Service, within: float, images: int) -> list[Line]:
    print(f"simulated, {name}: questions/s of which 95 % are answered within {within:g} s\n")
    print("| replicas | by image | image known | by load alone | image known | gain |\n|---:|---:|---:|---:|---:|---:|")
    found: dict[bool, list[tuple[int, float, Outcome]]] = {True: [], False: []}
    for replicas in REPLICAS:
        for affinity in (True, False):
            found[affinity].append((replicas, *capacity(service, Fleet(replicas, affinity, images=images), within)))
        (_, image, known), (_, alone, guessed) = found[True][-1], found[False][-1]
        print(
            f"| {replicas} | {image:.0f} | {known.hits:.0%} | {alone:.0f} | {guessed.hits:.0%} | "
            f"{image / alone:.1f} |", flush=True,
        )  # fmt: skip
    print()
    return [
        Line(
            affinity,
            {replicas: _curve(service, replicas, affinity) for replicas in DRAWN},
            [(replicas, rate) for replicas, rate, _ in found[affinity]],
        )
        for affinity in (True, False)
    ]


def _curve(service: Service, replicas: int, affinity: bool) -> list[tuple[float, float]]:
    load = Load(0.0)
    mean = (float(service.miss.mean()) + (load.questions - 1) * float(service.hit.mean())) / load.questions
    return [
        (share / mean, simulate(Load(share * replicas / mean), service, Fleet(replicas, affinity)).percentile(95))
        for share in SHARES
    ]


def _print_bounds(service: Service) -> None:
    print("simulated, 8 replicas, by image: how much a replica may hold before a known image goes elsewhere\n")
    print(f"| `ONGOING` | `SPILL` | questions/s, 95 % within {WITHIN:g} s | image known |\n|---:|---:|---:|---:|")
    for ongoing, spill in BOUNDS:
        rate, outcome = capacity(service, Fleet(8, True, ongoing=ongoing, spill=spill), WITHIN)
        print(f"| {ongoing} | {'never' if spill > ongoing else spill} | {rate:.0f} | {outcome.hits:.0%} |", flush=True)
    print()


def _print_day(service: Service) -> None:
    print(f"simulated, {DAY:,} images a day, {PEAK:g} times the average at the peak: replicas that are enough\n")
    print("| | questions of an image | questions/s at the peak | by image | by load alone |\n|---|---:|---:|---:|---:|")
    for name, times, within, images in (
        ("the default model", service, WITHIN, Fleet.images),
        ("7B's shape, H100", LARGE, LARGE_WITHIN, LARGE_IMAGES),
    ):
        for questions in (1, 4):
            rate = PEAK * DAY * questions / 86_400
            image, alone = (
                _enough(rate, questions, times, Fleet(1, affinity, images=images), within) for affinity in (True, False)
            )
            print(f"| {name}, 95 % within {within:g} s | {questions} | {rate:.0f} | {image} | {alone} |", flush=True)
    print()


def _enough(rate: float, questions: int, service: Service, fleet: Fleet, within: float) -> int:
    """The fewest replicas, by halving; more always are enough, too."""

    def enough(replicas: int) -> bool:
        outcome = simulate(Load(rate, questions), service, replace(fleet, replicas=replicas))
        return outcome.percentile(95) <= within

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


if __name__ == "__main__":
    main()
