"""The comparison of whole requests on a small model, and its count of FLOPs and bytes. Times are not judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from engines.bundle.folder import Bundle
from engines.bundle.kinds import TRACED
from engines.bundle.pages import page_size
from tests.bench import compare
from tests.bench.contenders.cost import cost
from tests.bench.contenders.graphs import Graph, Run
from tests.bench.contenders.requests import Graphs, work
from tests.checkpoints import write_checkpoint
from tests.geometries import tiny

PROMPT = 600


@pytest.fixture(scope="module")
def counted() -> Graphs:
    return compare.graphs_of_geometry(tiny(), torch.float32)


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory) -> Path:
    """A checkpoint whose every page passes the threshold, with room for all hi-res tokens."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", tiny(threshold=-1, context=1024))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_small_run(open_to_all, tmp_path, monkeypatch, device):
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu: pip uninstall onnxruntime && pip install onnxruntime-gpu")
    monkeypatch.setattr(compare, "BUDGETS", (4, 16))
    monkeypatch.setattr(compare, "AGAIN", (4,))
    monkeypatch.setattr(compare, "ANSWERS", (1, 2, 4))
    monkeypatch.setattr(compare, "SHORT", 2)
    g, rows = compare.compare(open_to_all, tmp_path, rounds=1, device=device, threads=None, memory=False)
    assert [(row.way, row.pages) for row in rows] == compare.ways(device)
    assert all(row.step > 0 and 0 < row.first < row.long for row in rows)
    found, reading = {(row.way, row.pages): row for row in rows}, len(g.reading_layers)
    assert found["low", 0].projected == found["exhaustive", 0].projected == 0
    assert found["eager", 4].projected == found["lazy", 16].projected == reading * 16
    assert reading * 4 <= found["lazy", 4].projected <= reading * 4 * 4
    lines = compare.measured_table(rows)
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines) == len(rows) + 1
    assert compare.markdown(lines).count("\n") == len(rows) + 1


def test_peak_memory_is_that_of_a_process(open_to_all, tmp_path):
    bundle = tmp_path / "bundle"
    compare.build(compare.BuildOptions(open_to_all, bundle, "fp32", check="none"))
    folders = {"model": open_to_all, "eager": bundle, "lazy": bundle}
    assert 5e7 < compare.peak("low", 0, folders, "cpu", None) < 2e9
    with pytest.raises(AssertionError, match="BundleError"):
        compare.peak("eager", 4, folders | {"eager": tmp_path / "nowhere"}, "cpu", None)


def test_a_wrong_answer_is_not_timed():
    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def answer(self, asked: object, tokens: int) -> compare.Timing:
            return compare.Timing(logits=np.full((tokens, 7), self.value))

    class Models:
        def way(self, name: str, budget: int) -> Fixed:
            return Fixed(1.0 if name == "lazy" else 0.0)

        def reference(self, name: str) -> Fixed:
            return Fixed(2.0 if name == "exhaustive" else 0.0)

    compare.check(Models(), [("low", 0), ("eager", 4), ("lazy", 8)], None)
    for wrong in (("lazy", 4), ("exhaustive", 0)):
        with pytest.raises(AssertionError, match=f"{wrong[0]} with {wrong[1]} pages differs by"):
            compare.check(Models(), [("eager", 4), wrong], None)


@pytest.mark.parametrize(("read", "new"), [(0, 0), (5, 0), (5, 5)])
def test_the_graph_counts_as_its_shapes_do(counted, read, new):
    """The count of a step from the graph, and the one from the geometry alone (tests/bench/cost.py)."""
    g = counted.geometry
    found = counted.decoder.work(Run(past=PROMPT - 1, read=read, new=new))
    expected = cost(g, PROMPT, read * page_size(g), itemsize=4, project_again=new > 0)
    assert found.flops == expected.flops
    assert expected.bytes < found.bytes < 2 * expected.bytes  # activations on top, which are small in large models only


def test_the_counted_graphs_are_those_of_bundles(random_model, counted):
    bundle = Bundle(random_model("tiny", tiny())[1])
    eager = Graph(ir.load(bundle.graph("decoder", TRACED)))
    for run in (Run(steps=PROMPT), Run(past=PROMPT, read=3)):
        assert eager.work(run).flops == counted.decoder.work(run).flops
    assert Graph(ir.load(bundle.graph("vision", TRACED))).work(Run(tiles=3)) == counted.vision.work(Run(tiles=3))
    assert eager.weights() == counted.decoder.weights(hires=False) < counted.decoder.weights()


@pytest.mark.parametrize("budget", [1, 4, 8, 16])
def test_projecting_lazily_never_costs_more_than_the_official_way_or_all_at_once(counted, budget):
    """Even if every step selects pages that none before it did. `tiny` has 16 pages."""

    def flops(way: str, answer: int) -> int:
        return work(counted, way, budget, prompt=PROMPT, answer=answer).flops

    for answer in (1, 2, 3, 4, 8, 16, 17, 64):
        assert flops("lazy", answer) <= flops("eager", answer)
        assert flops("lazy", answer) <= flops("official", answer)
        assert flops("low", answer) < flops("lazy", answer)
    assert flops("lazy", 64) < flops("official", 64)


def test_plot(tmp_path, counted):
    pytest.importorskip("matplotlib", reason="the extra bench")
    from PIL import Image

    from tests.bench.plot import plot

    rows = [compare.Row(way, pages, first=1.0, long=3.0) for way, pages in compare.ways("cpu")]
    plot(rows, counted, tmp_path / "picture.png", ["measured", "computed"], 24)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 20
