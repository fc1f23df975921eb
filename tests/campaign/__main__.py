"""Try everything that could be wrong, for as long as you like: `python -m tests.campaign --long`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from export.build import BuildOptions, build
from tests.campaign import soak
from tests.campaign.campaign import TARGETS, Result, Seeds, markdown, run

SHORT, LONG = 2.0, 60.0  # minutes


def main(arguments: list[str] | None = None) -> int:
    """Run the targets in turn; 1 if there was a fault."""
    parser = argparse.ArgumentParser(
        "python -m tests.campaign", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=SHORT, help="of all targets together")
    parser.add_argument("--long", action="store_const", dest="minutes", const=LONG, help=f"{LONG:.0f} minutes")
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="a target; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="the same seed tries the same examples in the same order")
    parser.add_argument("--soak", action="store_true", help="use one engine for long instead, and many")
    parser.add_argument("--folder", type=Path, help="where what is damaged is made and kept; None = a temporary one")
    given = parser.parse_args(arguments)
    if given.soak:
        return soaked()
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        made, chosen = Seeds(given.folder or Path(temporary)), given.only or list(TARGETS)
        with made.ending:
            results = [_told(run(name, made, 60 * given.minutes / len(chosen), given.seed)) for name in chosen]
    print(markdown(results))
    return 1 if any(result.faults for result in results) else 0


def soaked() -> int:
    """Print what long use of the default model's bundle costs; 1 if an answer was wrong."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        bundle = build(BuildOptions(out=Path(temporary) / "default-fp16", check="none")).path
        found = [soak.requests(bundle), soak.opens(bundle), soak.threads(bundle)]
        made = Seeds(Path(temporary))
        with made.ending:
            found += soak.served(made.target)
        print(soak.HEAD, *(figures.row() for figures in found), sep="\n")
        print(f"\nforked after it was opened: {soak.forked(bundle)}")
    return int(any(figures.wrong for figures in found))


def _told(result: Result) -> Result:
    """The same result, after its faults were printed."""
    print(f"{result.name}: {dict(result.counts)}", file=sys.stderr)
    for value, outcome in result.faults:
        print(
            f"\n{outcome.kind.upper()} after {outcome.seconds:.1f} s: {outcome.detail}\n  {value[:1500]}",
            file=sys.stderr,
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
