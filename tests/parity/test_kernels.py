"""The official runs with the Triton kernels in place of the ops' references: same selections, same tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import export.model
from engines.pages import cell_of_row
from plugins.cached_attention.plugin import CachedAttention
from plugins.hierarchical_attention.plugin import HierarchicalAttention
from plugins.op import Op
from plugins.select_pages.plugin import SelectPages
from tests.emulator.interpreter import call


def by_kernels(op: type[Op]) -> Callable[..., tuple[Tensor, ...]]:
    """The op as its reference is called: tensors, then attributes in order."""

    def run(*arguments: Tensor | int) -> tuple[Tensor, ...]:
        count = len(op.inputs)
        attributes = dict(zip(op.attribute_names, arguments[count:], strict=True))
        arrays = [tensor.numpy() for tensor in arguments[:count]]
        return tuple(map(torch.from_numpy, call(op(**attributes), "float32", arrays)))

    return run


STEPS = 2  # of the official 13: an interpreted step takes seconds


@pytest.mark.parametrize("case", ["landscape", "degenerate_square"], indirect=True)
def test_official_tokens_and_masks(case, reference, monkeypatch):
    model, golden = reference(case.weights), case.golden
    g, ids = model.geometry, case.ids(model.geometry)
    cell = cell_of_row(g)
    decoder = model.decoder(case.encode(model, g), ids.shape[1] + STEPS)
    decoder.run(ids[:, :-1])  # by the reference: an interpreted prefill takes minutes
    monkeypatch.setattr(export.model, "select_pages", by_kernels(SelectPages))
    monkeypatch.setattr(export.model, "cached_attention", by_kernels(CachedAttention))
    monkeypatch.setattr(export.model, "hierarchical_attention", by_kernels(HierarchicalAttention))
    token = ids[:, -1:]
    for step in range(STEPS):
        result = decoder.run(token, g.pages)
        assert np.isfinite(result.logits).all()
        mask = result.cells()[0].reshape(-1, g.cells, g.cells)[:, cell][:, :, cell]
        assert (mask == golden["select_mask"][step]).all(), step
        assert np.abs(result.logits[0] - golden["logits"][step]).max() <= 2e-4, step
        assert result.token[0] == golden["output_ids"][step + 1], step
        token = result.token[None]
