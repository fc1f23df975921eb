"""Where things lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
OFFICIAL = ROOT / "tests" / "parity" / "data"  # recordings of the official code
# Only in an archive that tests/on_gpu/pack.py has made: bundles, traced graphs and compiled kernels of the tests.
BUILT = ROOT / "built"
