"""The decode benchmark: what it times and checks, and its table on a small model. How long steps take is not judged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engines.bundle.pages import page_size
from export.build import BuildOptions, build
from tests.bench import decode
from tests.bench.contenders.cost import cost
from tests.bench.decode import measure, table
from tests.checkpoints import write_checkpoint
from tests.geometries import official, tiny


def test_small_run(tmp_path):
    model = write_checkpoint(tmp_path / "checkpoint", tiny(threshold=-1, context=1024))  # room for all hi-res tokens
    bundle = build(BuildOptions(model, tmp_path / "bundle", precision="fp32", check="none")).path
    options = BuildOptions(model, tmp_path / "int4", precision="int4", block_size=16, check="none")
    _, rows = measure(model, bundle, build(options).path, rounds=1, steps=2, threads=None)
    assert [row.pages for row in rows] == [0, 0, 4, 16, 4, 0, 4, 4, 16, 0]
    assert all(row.ratio == pytest.approx(row.milliseconds / rows[0].milliseconds) and row.ratio > 0 for row in rows)
    assert rows[0].cost == rows[5].cost and rows[2].cost == rows[6].cost and rows[7].cost.flops > rows[6].cost.flops
    assert rows[4].cost.flops == rows[2].cost.flops and rows[4].cost.bytes < rows[2].cost.bytes
    head, *lines = table(rows)
    assert len(lines) == len(rows) == 10 and {len(line) for line in lines} == {len(head)}
    for row, line in zip(rows, lines, strict=True):
        name, pages, *numbers = line
        assert (name, int(pages)) == (row.name, row.pages)
        shown = row.milliseconds, 1000 / row.milliseconds, row.ratio, row.cost.bytes / 1e6, row.cost.flops / 1e6
        for text, value in zip(numbers, shown, strict=True):
            assert float(text.removesuffix("x")) == pytest.approx(value, abs=0.51 if "." not in text else 0.051)


class Pretended:
    """A decoder that says what it is told to, and takes its time on a clock of the test's own."""

    def __init__(self, clock: list[float], logits: float = 0.0, pages: int = 3, seconds: float = 0.25) -> None:
        self.clock, self.logits, self.pages, self.seconds = clock, logits, pages, seconds
        self.length, self.seen = np.zeros(1, np.int64), []

    def run(self, ids: np.ndarray, page_budget: int = 0) -> SimpleNamespace:
        self.seen.append((ids.tolist(), int(self.length[0]), page_budget))
        self.length = self.length + ids.shape[1]
        self.clock[0] += self.seconds
        count = np.array([[self.pages, self.pages, 0]])  # the last selection is never read
        return SimpleNamespace(logits=np.full((1, 4), self.logits), page_count=count)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(decode, "perf_counter", lambda: time[0])
    return time


def test_a_step_is_timed_from_the_end_of_the_prompt(clock):
    decoder = Pretended(clock)
    runner = decode.Runner("pretended", decoder, 3, np.array([[1, 5, 9, 7]]))
    runner.step(8)
    decoder.seconds = 0.5
    runner.step(2)
    runner.settle()  # does not count
    assert runner.times == [0.25, 0.5]
    assert decoder.seen[:3] == [([[1, 5, 9]], 0, 0), ([[8]], 3, 3), ([[2]], 3, 3)]
    assert {length for _, length, _ in decoder.seen[1:]} == {3}


def test_steps_that_show_nothing_are_refused(clock):
    prompt = np.array([[1, 5]])
    for wrong in (Pretended(clock, pages=2), Pretended(clock, logits=np.nan)):
        with pytest.raises(AssertionError, match="pretended"):
            decode.Runner("pretended", wrong, 3, prompt).step(8)


def test_rows_that_disagree_are_refused(clock):
    def runner(name: str, logits: float, budget: int = 3) -> decode.Runner:
        return decode.Runner(name, Pretended(clock, logits, budget), budget, np.array([[1, 5]]))

    close, other = 0.5 * decode.AGREE, 1.5 * decode.AGREE
    decode._assert_agreement([runner("ours", 0.0), runner("official", close), runner("plain", 1.0, budget=0)])
    with pytest.raises(AssertionError, match="official with 3 pages differs"):
        decode._assert_agreement([runner("ours", 0.0), runner("official", other)])


def test_cost_of_the_official_7b():
    g = official()
    plain = cost(g, 600, 0, itemsize=2)
    assert plain.flops == 2 * (6_476_005_376 + 131_072_000 + 2 * 4096 * 32 * 600)  # weights, lm_head, attention
    assert plain.bytes == plain.flops
    pages = cost(g, 600, 10 * page_size(g), itemsize=2)
    assert pages.bytes - plain.bytes == 2 * 2 * 4096 * 23 * 640
    packed = cost(g, 600, 0, itemsize=2, layer_itemsize=0.5 + 2 / 128)
    assert plain.bytes - packed.bytes == round(6_476_005_376 * (1.5 - 2 / 128))
    again = cost(g, 600, 640, itemsize=2, project_again=True)
    assert again.flops - pages.flops == 2 * 23 * 640 * 2 * 4096 * 4096
