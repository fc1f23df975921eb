"""What a score is worth, and what it takes: `python -m tests.parity.score`, two tables in Markdown.

How far log-probabilities of the recorded official runs are from the official ones, their tokens forced, for each
precision, with bundles built for the purpose; and the time of scoring four answers of the default model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

from engines.errors import OptionError
from export.build import BuildOptions, build
from runtime import Engine, ImageView
from tests.parity.report import ROWS, calibration_data, official_cases
from tests.parity.score.forced import compare, scored, together
from tests.paths import OFFICIAL, ROOT

HEAD = ("precision", "before a flip", "official cells", "all tokens", "mean of a run, worst", "mean of a run, mean")
IMAGE, QUESTION = "plaza.png", "what numbers are in the red star and the cyan circle?"
ANSWERS = ["90 and 67", "90 and 76", "67 and 90", "12 and 34"]
LONGEST = 8  # tokens of a generated answer


def line(cells: tuple[str, ...]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def parity() -> list[str]:
    """The first table. Block sizes that do not divide the small model's weights have no row."""
    cases, lines = official_cases(), [line(HEAD), "| --- |" + " ---: |" * (len(HEAD) - 1)]
    with tempfile.TemporaryDirectory() as folder:
        data, _ = calibration_data(Path(folder), 2026)
        for index, row in enumerate(ROWS):
            calibrate = data if row.calibrated else None
            options = BuildOptions(
                OFFICIAL / "weights", Path(folder) / str(index), row.precision, row.block, calibrate=calibrate,
                kv=row.kv, kv_cache=row.kv_cache, check="none",
            )  # fmt: skip
            try:
                with Engine(build(options).path) as engine:
                    runs = [compare(case, scored(engine, case)) for case in cases]
            except OptionError:
                continue
            worst, mean = together(runs), sum(run.mean for run in runs) / len(runs)
            before, agreeing = (
                "no such step" if value is None else f"{value:.2g}" for value in (worst.before, worst.agreeing)
            )
            lines.append(line((row.label, before, agreeing, f"{worst.always:.2g}", f"{worst.mean:.2g}", f"{mean:.2g}")))
    return lines


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The median, after one run that does not count."""
    taken = []
    for _ in range(repeats + 1):
        started = perf_counter()
        work()
        taken.append(1000 * (perf_counter() - started))
    return median(taken[1:])


def times(bundle: Path, repeats: int) -> list[str]:
    """The second table: from the picture's file on, and with a view that has encoded it and prefilled the question."""
    image, asked = ROOT / "examples" / IMAGE, {"max_new_tokens": LONGEST}
    lines = [line(("four answers", "from the file, ms", "encoded, ms")), "| --- | ---: | ---: |"]
    with Engine(bundle) as one, Engine(bundle, slots=4) as four:
        rows: dict[str, tuple[Engine, Callable[[ImageView], object]]] = {
            "4 x ask": (one, lambda view: [view.ask(QUESTION, **asked) for _ in ANSWERS]),
            "4 x score": (one, lambda view: [view.score(QUESTION, [answer]) for answer in ANSWERS]),
            "score": (one, lambda view: view.score(QUESTION, ANSWERS)),
            "score, 4 slots": (four, lambda view: view.score(QUESTION, ANSWERS)),
        }
        separate = milliseconds(lambda: [one.generate(image, QUESTION, **asked) for _ in ANSWERS], repeats)
        lines.append(line(("4 x generate", f"{separate:.0f}", "-")))
        for name, (engine, work) in rows.items():
            fresh = milliseconds(lambda engine=engine, work=work: work(engine.image(image)), repeats)
            with engine.image(image) as view:
                encoded = milliseconds(lambda work=work, view=view: work(view), repeats)
            lines.append(line((name, f"{fresh:.0f}", f"{encoded:.0f}")))
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="of each time, whose median is told")
    given = parser.parse_args()
    print("\n".join(parity()), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        options = BuildOptions(out=Path(folder) / "default", precision="fp16", check="none")
        print("\n".join(times(build(options).path, given.repeats)))


if __name__ == "__main__":
    main()
