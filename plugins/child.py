"""Processes of Python that run a module of ours, and nothing that lies about in the current folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # where our packages lie side by side
_HAS_SAFE_PATH = sys.version_info >= (3, 11)
# What -P does, for Python 3.10: nothing is imported before the current folder is off the path.
_SAFELY = """import sys; sys.path[:] = [each for each in sys.path if each]
import runpy; runpy.run_module({!r}, run_name="__main__", alter_sys=True)"""


def python(module: str, *arguments: str, safe_path: bool = _HAS_SAFE_PATH) -> list[str]:
    """The command that runs a module of ours; to be started in `environment`. A checkpoint may hold a folder
    `plugins`, or a `numpy.py`, and builds are started beside it: the current folder is never imported from.

    safe_path: whether this Python has the option -P.
    """
    if safe_path:
        return [sys.executable, "-P", "-m", module, *arguments]
    return [sys.executable, "-c", _SAFELY.format(module), *arguments]


def environment() -> dict[str, str]:
    """This process's environment, with a PYTHONPATH of our own folder and what the user names in full: an empty or
    relative entry would mean the current folder, or one inside it."""
    named = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(each).is_absolute()]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *named])}
