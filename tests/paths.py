"""Where things lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
OFFICIAL = ROOT / "tests" / "parity" / "data"  # recordings of the official code
