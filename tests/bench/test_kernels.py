"""The estimate counts every launch of the plugins, and what it must agree with elsewhere."""

from __future__ import annotations

import pytest

from engines.bundle.pages import page_size
from engines.bundle.precision import FP16
from engines.cuda import Cuda
from engines.errors import OptionError
from engines.sizing.needs import SHARE_OF_BANDWIDTH, Configuration, step_bytes
from engines.targets import TARGETS, target
from plugins.compiler.ptxas import SMS
from tests.bench.contenders.cost import cost
from tests.bench.kernels import (
    STEP,
    Case,
    attend,
    attend_pages,
    bandwidth,
    launches,
    main,
    measured,
    microseconds,
    project_pages,
    roofline,
    table,
)
from tests.emulator.driver import Driver, emulated_artifacts
from tests.geometries import official, tiny
from tests.paths import ROOT
from tests.plugins.harness import Launcher


def test_every_launch_is_counted():
    assert launches(official()) == {
        ("SelectPages", "select_pages"): 24,
        ("CachedAttention", "attend"): 9,
        ("CachedAttention", "combine"): 9,
        ("ProjectPages", "project_pages"): 23,
        ("HierarchicalAttention", "attend_pages"): 23,
        ("HierarchicalAttention", "combine"): 23,
    }
    assert set(launches(official())) == set(STEP)


def test_bytes_agree_with_the_cost_of_a_step():
    """What attention reads of cache and pages is nearly all that its kernels move."""
    case = Case(official())
    keys = cost(case.geometry, 1200, 10 * 64, itemsize=2).bytes - cost(case.geometry, 0, 0, itemsize=2).bytes
    counted = 9 * attend(case) + 23 * attend_pages(case)
    assert keys < counted < 1.05 * keys


def test_a_launch_by_hand():
    case = Case(official(), tokens=128, pages=2)
    token = 32 * 128 * 2
    own = token + 2 * 2 * token + 128 * 4  # query, key and value read and written, cos and sin
    parts, scores = 2 * 32 * (128 + 2) * 4, 32 * 576 * 4  # splits of 64 keys, or of one page: two of each
    assert attend(case) == own + 128 * 2 * token + parts + scores
    assert attend_pages(case) == attend(case) + 2 * (64 * 2 * token + 16) + parts
    assert project_pages(case, 0) == 3 * 81 * 8
    assert project_pages(case, 1) - project_pages(case, 0) == 2 * 4096 * 4096 * 2 + 64 * (4096 * 2 + 512 + 2 * token)


def test_table(capsys):
    case = Case(official())
    rows = {row[0]: row for row in table(case)}
    assert len({len(row) for row in rows.values()}) == 1
    count, orin = (rows["HierarchicalAttention: attend_pages"][column] for column in (2, 3))
    assert float(orin.replace(",", "")) == pytest.approx(int(count.replace(",", "")) / 68e3, abs=0.06)
    weights = rows["**weights of a token**"]
    assert weights[3:5] == ["does not fit"] * 2 and float(weights[-1].replace(",", "")) == pytest.approx(3944, abs=1)
    main([])
    assert "An estimate, not a measurement: no figure of this table was taken on a GPU" in capsys.readouterr().out


def test_the_kernels_of_a_step_are_timed():
    """On the emulated driver, whose times mean nothing: that every kernel of a step is launched as often as asked."""
    driver = Driver()
    case, launcher = Case(tiny(), tokens=20, pages=2), Launcher(Cuda(driver), emulated_artifacts)
    rows = measured(case, launcher, bandwidth(launcher.cuda, 1 << 16), rounds=2, repeats=3)
    assert [row[0] for row in rows[1:]] == [f"{op}: {kernel}" for op, kernel in launches(tiny())]
    assert {row[0] for row in rows[1:]} == {f"{op}: {kernel}" for op, kernel in STEP}
    assert len(driver.launches) == len(STEP) * (1 + 2 * 3)


def test_a_step_on_a_board_by_hand():
    """H100, float16: four square products and three of the MLP in 32 layers, the head, 1,200 cached tokens, 22 pages of
    64 tokens in 23 layers; two bytes each, 3,350 GB/s."""
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
    keys = 2 * 4096 * (32 * 1200 + 23 * 22 * 64)
    least = 2 * (weights + keys) / 3350e9 * 1000
    rows = roofline(1200, 22)
    (row,) = (row for row in rows if row[0] == "h100-80" and row[2] == "fp16")
    assert float(row[4]) == pytest.approx(least, abs=0.01) == 4.29
    assert float(row[6]) == pytest.approx(least / 0.62, abs=0.01) and float(row[7]) == pytest.approx(144.5, abs=0.1)
    assert {row[0] for row in rows[1:]} == set(TARGETS)
    assert [row[4] for row in rows if row[0] == "orin-nano-8"] == ["does not fit", "does not fit"]


@pytest.mark.parametrize(("pages", "measured_ms"), [(0, 6.74), (10, 6.83), (22, 6.96), (81, 7.46)])
def test_the_share_is_what_an_h100_reached(pages, measured_ms):
    """The steps of docs/figures.md, each predicted within a fiftieth."""
    count = step_bytes(Configuration(official(), FP16), 1200, pages)
    predicted = microseconds(count, TARGETS["h100-80"]) / SHARE_OF_BANDWIDTH / 1000
    assert predicted == pytest.approx(measured_ms, rel=0.02)


def test_roofline_is_in_the_figures(capsys):
    main(["--roofline"])
    printed = capsys.readouterr().out.split("\n\n")
    text = (ROOT / "docs/figures.md").read_text()
    assert printed[1].strip() in text and " ".join(printed[0].split()) in " ".join(text.split())


def test_targets():
    assert all(name == t.name and t.sm in SMS and t.bandwidth and t.software for name, t in TARGETS.items())
    assert target("orin-nx-16").sm == 87 and page_size(official()) == 64
    with pytest.raises(OptionError, match=r"unknown target 'orin'(.|\n)*orin-nano-8, "):
        target("orin")
