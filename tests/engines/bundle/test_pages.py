"""Where hi-res tokens live: pages, tiles, and grids that do not divide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engines.bundle.pages import cell_of_row, page_lengths, page_order, page_size, page_tokens, tile_order
from tests.geometries import official, tiny


@pytest.mark.parametrize("zoom", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cells", [3, 7, 9])
def test_cells_are_torchs_nearest(zoom, cells):
    g = official(zoom=zoom, cells=cells)
    grid = torch.arange(cells, dtype=torch.float32)[None, None]
    expected = F.interpolate(grid, size=g.hires_side, mode="nearest")[0, 0].long().numpy()
    assert np.array_equal(cell_of_row(g), expected)


def test_official_pages_are_8_by_8_blocks():
    g = official()
    assert g.pages == 81 and page_size(g) == 64 and set(page_lengths(g)) == {64}
    tokens = page_tokens(g)[10]  # second row, second column
    assert tokens.tolist() == [72 * row + column for row in range(8, 16) for column in range(8, 16)]


@pytest.mark.parametrize("g", [official(), official(zoom=2), official(zoom=1), tiny(cells=3)])
def test_every_token_is_in_one_page(g):
    lengths, size = page_lengths(g), page_size(g)
    order = page_order(g).reshape(g.pages, size)
    used = np.concatenate([row[:length] for row, length in zip(order, lengths, strict=True)])
    assert np.array_equal(np.sort(used), np.arange(g.hires_side**2))


def test_pages_of_different_length():
    assert set(page_lengths(official(zoom=2))) == {25, 30, 36}


def test_tile_order_puts_tiles_side_by_side():
    g = tiny(zoom=2)
    tiles = np.zeros((4, g.grid, g.grid), int)
    tiles += np.arange(4)[:, None, None]
    image = tiles.ravel()[tile_order(g)].reshape(g.hires_side, g.hires_side)
    assert np.array_equal(image, np.kron([[0, 1], [2, 3]], np.ones((g.grid, g.grid), int)))
