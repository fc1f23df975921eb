"""flex::SelectPages: PyTorch reference and ONNX bodies against the official masks, and the page budget."""

from functools import partial

import numpy as np
import pytest

from engines.bundle.pages import cell_of_row, margins
from plugins.select_pages import onnx_body, onnx_static
from plugins.select_pages.launch import SelectPages
from tests.geometries import official
from tests.paths import OFFICIAL
from tests.plugins.harness import by_body, by_reference

GOLDEN = OFFICIAL / "selection.npz"


def by(run, maps, sides, budget, cells, threshold):
    op = SelectPages(grid=maps.shape[1], cells=cells, threshold=threshold)
    found = run(op, "float32", {"map": maps, "margins": sides, "page_budget": budget})
    return found["pages"], found["page_count"]


BY_ONNX = {
    "dynamic body": partial(by, by_body(onnx_body.FUNCTIONS)),
    "static body": partial(by, by_body(onnx_static.FUNCTIONS)),
}
SELECT = {"reference": partial(by, by_reference), **BY_ONNX}


def selected(pages, count):
    """bool [B, C*C] from page lists."""
    mask = np.zeros(pages.shape, bool)
    for row, listed, number in zip(mask, pages, count, strict=True):
        row[listed[:number]] = True
    return mask


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("select", SELECT.values(), ids=SELECT)
@pytest.mark.parametrize(("threshold", "side"), [(48, 72), (64, 72), (-1, 72), (48, 24), (48, 48)])
def test_official_masks(select, golden, threshold, side):
    maps, sizes = golden["maps"], golden["ori_sizes_wh"]
    sides = np.array([margins(int(w), int(h), 24) for w, h in sizes], np.int64)
    assert (sides.max(1) == golden["margin_patches"]).all()
    pages, count = select(maps, sides, np.full(len(maps), 81, np.int64), 9, threshold)
    cell = cell_of_row(official(zoom=side // 24))
    found = selected(pages, count).reshape(-1, 9, 9)[:, cell][:, :, cell]
    expected = golden[f"mask_thr{threshold if threshold >= 0 else 'm1'}_hd{side}"]
    flipped = (found != expected).sum((1, 2))
    assert not flipped.any(), dict(zip(golden["names"][flipped > 0], flipped[flipped > 0], strict=True))


@pytest.mark.parametrize("select", SELECT.values(), ids=SELECT)
def test_budget_keeps_the_best_and_is_monotone(select, golden):
    maps = golden["maps"][:8]
    sides = np.zeros((8, 2), np.int64)
    everything = selected(*select(maps, sides, np.full(8, 81, np.int64), 9, 48))
    previous = np.zeros_like(everything)
    for budget in range(82):
        mask = selected(*select(maps, sides, np.full(8, budget, np.int64), 9, 48))
        assert (mask.sum(1) == np.minimum(budget, everything.sum(1))).all()
        assert (previous <= mask).all() and (mask <= everything).all()
        previous = mask
    assert (previous == everything).all()


@pytest.mark.parametrize("select", SELECT.values(), ids=SELECT)
def test_equal_scores_keep_the_lower_index_and_a_flat_map_selects_nothing(select):
    maps = np.zeros((2, 9, 9), np.float32)
    maps[0, 2, 5] = maps[0, 6, 1] = maps[0, 0, 7] = 0.5
    maps[1] = 0.25
    pages, count = select(maps, np.zeros((2, 2), np.int64), np.array([2, 9], np.int64), 9, -1)
    assert count.tolist() == [2, 0]
    assert pages[0, :2].tolist() == [7, 2 * 9 + 5]


@pytest.mark.parametrize("grid", [9, 10, 12, 24])
@pytest.mark.parametrize("cells", [3, 9])
@pytest.mark.parametrize("select", BY_ONNX.values(), ids=BY_ONNX)
def test_other_grids(grid, cells, select):
    rng = np.random.default_rng(grid * cells)
    maps = rng.random((3, grid, grid), np.float32) ** 4
    arguments = maps, np.array([[0, 1], [2, 0], [0, 0]]), np.array([4, 81, 0]), cells, 48
    left, right = SELECT["reference"](*arguments), select(*arguments)
    assert (left[0] == right[0]).all() and (left[1] == right[1]).all()
