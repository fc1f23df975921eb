"""What a score is worth, and what it takes: `python -m tests.parity.score`, two tables in Markdown.

How far log-probabilities of the recorded official runs of the checkpoint as it is are from the official ones, their
tokens forced, for each precision, with bundles built for the purpose; and the time of scoring four answers of the
default model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from engines.errors import OptionError
from export.build import BuildOptions, build
from runtime import Engine, ImageView
from runtime.evaluate.report import table
from tests.parity.report import ROWS, calibration_data
from tests.parity.score.forced import cells, runs_of, together
from tests.paths import ROOT

HEAD = ("precision", "before a flip", "official cells", "all tokens", "mean of a run, worst", "mean of a run, mean")
IMAGE, QUESTION = "plaza.png", "what numbers are in the cyan star and the blue circle?"
ANSWERS = ["29 and 68", "29 and 86", "68 and 29", "12 and 34"]
LONGEST = 8  # tokens of a generated answer


def parity(folder: Path) -> list[str]:
    """The first table; `folder`: for bundles. Block sizes that do not divide the small model's weights have no row."""
    lines = []
    data, _ = calibration_data(folder, 2026)
    for index, row in enumerate(ROWS):
        try:
            runs = runs_of(row, folder / str(index), data)
        except OptionError:
            continue
        lines.append((row.label, *cells(together(runs)), f"{sum(run.mean for run in runs) / len(runs):.2g}"))
    return table(HEAD, lines)


@dataclass(frozen=True)
class Way:
    """One way to four answers: `work`, given the view of a picture. `start`: what it is given. kept: whether that view
    has been asked before."""

    name: str
    kept: bool
    start: Callable[[], ImageView]
    work: Callable[[ImageView], object]


def milliseconds(ways: Sequence[Way], repeats: int) -> list[list[float]]:
    """Of each way its times. They take turns, so that all of them meet what else the machine does; a first turn does
    not count."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats + 1):
        for times_of, way in zip(taken, ways, strict=True):
            if way.kept:
                view = way.start()
                started = perf_counter()
            else:
                started = perf_counter()
                view = way.start()
            way.work(view)
            times_of.append(1000 * (perf_counter() - started))
    return [times_of[1:] for times_of in taken]


def spread(taken: Sequence[float]) -> str:
    """The median, and the quartiles."""
    low, middle, high = np.percentile(taken, (25, 50, 75))
    return f"{middle:.0f} ({low:.0f} .. {high:.0f})"


def times(bundle: Path, repeats: int) -> list[str]:
    """The second table: from the picture's file on, and with a view that has encoded it and prefilled the question."""
    image, asked = ROOT / "examples" / IMAGE, {"max_new_tokens": LONGEST}
    with Engine(bundle) as one, Engine(bundle, slots=4) as four:

        def generate(view: ImageView) -> None:
            """Each from the file on: the first by the view, which has encoded nothing yet."""
            view.ask(QUESTION, **asked)
            for _ in ANSWERS[1:]:
                one.generate(image, QUESTION, **asked)

        ways = [Way("4 x generate", False, partial(one.image, image), generate)]
        for name, engine, work in (
            ("4 x ask", one, lambda view: [view.ask(QUESTION, **asked) for _ in ANSWERS]),
            ("4 x score", one, lambda view: [view.score(QUESTION, [answer]) for answer in ANSWERS]),
            ("score", one, lambda view: view.score(QUESTION, ANSWERS)),
            ("score, 4 slots", four, lambda view: view.score(QUESTION, ANSWERS)),
        ):
            view = engine.image(image)
            ways.append(Way(name, False, partial(engine.image, image), work))
            ways.append(Way(name, True, lambda view=view: view, work))
        found = list(zip(ways, map(spread, milliseconds(ways, repeats)), strict=True))
    rows: dict[str, dict[bool, str]] = {}
    for way, text in found:
        rows.setdefault(way.name, {})[way.kept] = text
    head = ("four answers", "from the file, ms", "encoded, ms")
    return table(head, [(name, row[False], row.get(True, "-")) for name, row in rows.items()])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="of each time; median and quartiles are told")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(parity(Path(folder))), end="\n\n")
        options = BuildOptions(out=Path(folder) / "default", precision="fp16", check="none")
        print("\n".join(times(build(options).path, given.repeats)))


if __name__ == "__main__":
    main()
