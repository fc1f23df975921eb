"""The tracer, and the tests' store of what it made."""

from __future__ import annotations

import pytest
import torch

from tests import traces
from tests.geometries import tiny


@pytest.mark.parametrize("part", ["vision", "pages", "decoder"])
def test_a_kept_trace_is_the_trace(tmp_path, part):
    fresh = traces.trace(part, tiny(), torch.float16)
    empty = {name for name, value in fresh.graph.initializers.items() if value.const_value is None}
    traces.write(fresh, tmp_path / "first.onnx")
    kept = traces.read(tmp_path / "first.onnx")
    assert {name for name, value in kept.graph.initializers.items() if value.const_value is None} == empty
    assert [value.name for value in kept.graph.outputs] == [value.name for value in fresh.graph.outputs]
    traces.write(kept, tmp_path / "second.onnx")
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_only_the_vision_graph_is_shared_between_models():
    def keys(part: str, **changes: object) -> set[str]:
        return {traces.key(part, g, torch.float32) for g in (tiny(), tiny(**changes))}

    assert len(keys("vision", zoom=2, kv_heads=2)) == 1
    assert len(keys("vision", hidden=128)) == len(keys("pages", zoom=2)) == len(keys("decoder", threshold=7)) == 2
