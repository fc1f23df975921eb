"""The page on evaluation: its commands can be read, and its board table is what is predicted."""

from __future__ import annotations

import re
import shlex

import pytest

from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.bundle.precision import precision_named
from engines.sizing.fit import assess, room_of
from engines.sizing.needs import SHARE_OF_BANDWIDTH, Configuration
from engines.targets import target
from runtime.evaluate.__main__ import TASKS, parse_arguments
from tests.geometries import official
from tests.paths import ROOT

PAGE = (ROOT / "docs/evaluation.md").read_text()
BOARDS = re.findall(r"^\| `([\w-]+)` \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
STEPS = 191 * 20, 5000 * 4  # of V* and TextVQA


def row(board: str, precision: str) -> tuple[str, ...]:
    """Cells of the table, as they are predicted."""
    backend = TENSORRT_RTX if board.startswith("rtx") else TENSORRT
    a = assess(Configuration(official(), precision_named(precision), backend=backend), room_of(target(board)))
    assert a.fits or a.runs
    rate = SHARE_OF_BANDWIDTH * a.speed[0]
    minutes = [f"{steps / rate / 60:.1f}" for steps in STEPS]
    return (board, precision, f"{a.total / 1e9:.1f}", f"{rate:.1f}", *minutes)


@pytest.mark.parametrize("found", BOARDS, ids=lambda found: "-".join(found[:2]))
def test_boards(found):
    assert found == row(*found[:2])


def test_all_boards_are_there():
    assert len(BOARDS) == 7
    for board in ("orin-nano-8", "orin-nano-8-super"):
        a = assess(Configuration(official(), precision_named("int4"), backend=TENSORRT), room_of(target(board)))
        assert not a.runs


def test_commands_can_be_read():
    lines = [line.split("#")[0] for line in PAGE.splitlines() if "python -m runtime.evaluate " in line]
    commands = [line for line in lines if line.startswith("python")]
    assert commands
    for line in commands:
        given = parse_arguments(shlex.split(line)[3:])
        assert given.task in TASKS
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set(TASKS) <= listed
