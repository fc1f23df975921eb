"""Steps that compute with other weights than those they change."""

from __future__ import annotations

import torch
from torch import nn

from export.default_model.learning.bfloat16 import Bfloat16
from export.default_model.learning.train_decoder import CODED
from export.weights.awq import rounded


def test_a_step_with_changed_weights_changes_the_weights_themselves():
    torch.manual_seed(0)
    layers = nn.ModuleDict({"first": nn.Linear(32, 4, bias=False), "second": nn.Linear(4, 1, bias=False)})
    inner = nn.ModuleDict({"layers": layers, "names": nn.Embedding(2, 2)})
    trainer = Bfloat16(nn.ModuleDict({"decoder": inner}), 1e-2, 10, 0.0)
    before = [master.clone() for master in trainer.masters]
    trainer.compute_with(torch.zeros_like, {"decoder.layers.first.weight"})
    first, second = layers["first"].weight, layers["second"].weight
    assert (first == 0).all() and torch.equal(second, before[1].bfloat16())
    trainer.update(layers["second"](layers["first"](torch.ones(1, 32).bfloat16())).sum().float())
    moved = [(master - old).abs() for master, old in zip(trainer.masters, before, strict=True)]
    assert (moved[0] > 0).all()  # its gradient is that of the weights that were computed with
    assert (moved[0] < 0.1).all()  # and they did not become those
    assert (moved[1] == 0).all()  # nothing came in but zeros
    assert torch.equal(first, trainer.masters[0].bfloat16())


def test_weights_are_as_int4_stores_them():
    """At most sixteen values in each block, evenly spaced, none further from the weight than half of that."""
    torch.manual_seed(0)
    weight = torch.randn(6, 96)
    stored = rounded(weight, CODED)
    blocks = stored.view(6, 3, CODED.block)
    assert (stored != weight).any()
    for row, block in ((row, block) for row in range(6) for block in range(3)):
        levels = blocks[row, block].unique()
        step = float(levels.diff().min())
        assert len(levels) <= 16
        assert torch.allclose(levels / step, (levels / step).round(), atol=1e-3)
        own = weight.view(6, 3, CODED.block)[row, block]
        assert float((own - blocks[row, block]).abs().max()) <= 0.501 * step
