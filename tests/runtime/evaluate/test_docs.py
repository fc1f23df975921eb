"""The page on evaluation: its commands can be read, and its board table is what is predicted."""

from __future__ import annotations

import re
import subprocess

import pytest

from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.bundle.precision import precision_named
from engines.sizing.fit import assess, room_of
from engines.sizing.needs import SHARE_OF_BANDWIDTH, Configuration
from engines.targets import target
from export.checkpoint.config import read_config
from export.options import parse_arguments as build_options
from export.recipe import settle
from runtime.evaluate import __main__ as command
from runtime.evaluate.__main__ import TASKS, parse_arguments
from runtime.evaluate.compare import CHANGES
from runtime.evaluate.report import INTERVAL
from tests.geometries import official
from tests.paths import ROOT
from tests.runtime.evaluate.datasets import write_vstar

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


def commands() -> list[list[str]]:
    """The commands of the page, as the shell takes them."""
    lines = [line.split(" #")[0] for line in PAGE.splitlines() if line.startswith("python ")]
    shell = [["bash", "-c", f"printf '%s\\0' {line}"] for line in lines]
    return [subprocess.run(each, capture_output=True, text=True, check=True).stdout.split("\0")[:-1] for each in shell]


def test_commands_can_be_read():
    evaluations = [words[3:] for words in commands() if words[1:3] == ["-m", "runtime.evaluate"]]
    assert {words[0] for words in evaluations} >= {"vstar", "merge", "scenes"}
    for words in evaluations:
        parse_arguments(words)
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set(TASKS) <= listed


def test_shards_are_merged_as_they_are_named(monkeypatch, tmp_path):
    """The files of the merge command are those that the shards' commands write."""
    shard, merge = (next(w for w in commands() if wanted in w) for wanted in ("--shard", "merge"))
    written = []
    monkeypatch.setattr(command, "_evaluated", lambda task, items, bundle, out, given: written.append(str(out)))
    monkeypatch.setattr(command, "_tell", lambda *told: None)
    data = write_vstar(tmp_path)
    for index in range(1, 5):
        given = parse_arguments([word.replace("1/4", f"{index}/4") for word in shard[3:]])
        given.data = data
        command.run(given)
    assert list(map(str, parse_arguments(merge[3:]).results)) == written and len(written) == 4


def test_the_precision_table_is_made_by_its_commands():
    """Its bundles are what the builds before it write, its rows and columns what the comparison prints."""
    built = [words for words in commands() if words[1] == "export/build.py" and "--model" not in words]
    (given,) = [parse_arguments(w[3:]) for w in commands() if "--compare" in w]
    asked = [build_options(words[2:]) for words in built]
    outs = [settle(options, read_config(options.model)).folder for options in asked]
    assert given.compare == outs
    head = f"| against {given.compare[0].name} | score | {INTERVAL} | {' | '.join(CHANGES)} |"
    rows = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [path.name for path in given.compare]
