"""The exported graphs themselves: names, operators, lint, and that the flex:: nodes stay bare until they are bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, PARTS, PLUGIN_FREE, TRACED, kinds
from engines.bundle.precision import PRECISIONS
from engines.bundle.tensors import expected_tensors
from export.graph.bind import STABLE_SINCE_20
from tests.geometries import official

SIZES = {"batch": 1, "steps": 2, "capacity": 640, "tiles": 2, "batch_tiles": 9}


@pytest.fixture(scope="module")
def opened(bundle) -> Bundle:
    return Bundle(bundle("fp32"))


def test_state_dict_names_survive(opened):
    stored = set()
    for part in PARTS:
        graph = ir.load(opened.graph(part, TRACED)).graph
        stored |= {
            name for name, value in graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)
        }
    assert stored == set(expected_tensors(opened.manifest.geometry))


@pytest.mark.parametrize("part", PARTS)
def test_traced_graph_is_plain_opset_20_and_bare_flex_nodes(opened, part):
    model = ir.load(opened.graph(part, TRACED))
    g = opened.manifest.geometry
    assert model.opset_imports[""] == 20
    assert not model.functions
    assert {node.op_type for node in model.graph if not node.domain} <= STABLE_SINCE_20
    found = [node.op_type for node in model.graph if node.domain == "flex"]
    if part == "decoder":
        assert found.count("SelectPages") == len(g.selecting_layers)
        assert found.count("HierarchicalAttention") == len(g.reading_layers)
        assert found.count("CachedAttention") == g.layers - len(g.reading_layers)
    else:
        assert not found


@pytest.mark.parametrize(("part", "kind"), [(part, kind) for part in PARTS for kind in kinds(part, official())])
@pytest.mark.parametrize("precision", [name for name, each in PRECISIONS.items() if not each.quantises])
def test_manifest_describes_the_graph(bundle, part, kind, precision):
    opened = Bundle(bundle(precision), verify=False)
    graph, described = ir.load(opened.graph(part, kind)).graph, opened.manifest.parts[part].graphs[kind]
    for values, specs in ((graph.inputs, described.inputs), (graph.outputs, described.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        assert [value.dtype.numpy().name for value in values] == [spec.dtype for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            fixed = [size if isinstance(size, int) else None for size in value.shape]
            assert fixed == [size if isinstance(size, int) else None for size in spec.shape], spec.name
            if kind == PLUGIN_FREE:  # one capacity, and no shape that depends on data
                assert {size.value for size in value.shape if not isinstance(size, int)} <= {"batch", "steps"}


def test_the_plugin_free_graph_holds_no_shape_that_depends_on_data(opened):
    model = ir.load(opened.graph("decoder", PLUGIN_FREE))
    assert not model.functions and not [node for node in model.graph if node.domain]
    found = {node.op_type for node in model.graph}
    assert not found & {"If", "Loop", "Scan", "NonZero", "TopK", "Unique", "Compress"}
    # What every layer needs is computed once: one comparison of positions with cache slots, one sine of each position.
    assert [node.op_type for node in model.graph].count("LessOrEqual") == 1


@pytest.mark.parametrize("part", PARTS)
def test_polygraphy_lint(opened, part):
    path = opened.graph(part, ONNXRUNTIME)
    shapes = []
    for spec in opened.manifest.parts[part].graphs[ONNXRUNTIME].inputs:
        sizes = [SIZES.get(size, size) for size in spec.shape]
        shapes.append(f"{spec.name}:[{','.join(map(str, sizes))}]")
    polygraphy = Path(sys.executable).with_name("polygraphy")
    command = [polygraphy, "check", "lint", path, "--input-shapes", *shapes, "--val-range", "[0,1]", "input_ids:[0,9]"]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if "LINT |" in line]
    problems = [line for line in lines if "TensorScatter: in-place" not in line]  # lint binds no buffers
    assert result.returncode == 0 and not problems, "\n".join(problems) or result.stdout[-2000:] + result.stderr[-2000:]
