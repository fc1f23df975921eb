"""What the tower is told of middles that several patches share."""

from __future__ import annotations

import torch

from export.default_model.learning.pool import LOWRES, WHOLE
from export.default_model.learning.train_vision import Tower, _together


def test_patches_that_share_a_middle_may_be_wrong_each_but_not_together():
    """A quarter of a middle on each of four patches: seen as shares that add up to one, then to more."""
    tower, width = Tower(), 128
    head = tower.heads["centre"]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.weight[1, 0] = 1.0
    label = torch.zeros(1, LOWRES, LOWRES)
    label[0, 3:5, 6:8] = WHOLE / 4

    def off(shares: list[float]) -> torch.Tensor:
        x = torch.zeros(1, LOWRES, LOWRES, width)
        x[..., 0] = -30.0
        x[0, 3:5, 6:8, 0] = torch.tensor(shares).logit().view(2, 2)
        return _together(tower, x.flatten(1, 2), label.flatten(1)).detach()

    right = off([0.4, 0.1, 0.2, 0.3])
    assert right.shape == (1, 11, 11)
    assert abs(float(right[0, 3, 6])) < 1e-5
    assert abs(float(off([0.4, 0.3, 0.25, 0.3])[0, 3, 6]) - 0.25) < 1e-5
    assert abs(float(off([0.1, 0.1, 0.2, 0.2])[0, 3, 6]) + 0.4) < 1e-5
    assert float(right[0, 8:].abs().max()) < 1e-5  # nothing where nothing is
