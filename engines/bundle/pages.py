"""Which hi-res tokens form a page, where every token lives, and which rows of the map are padding."""

from __future__ import annotations

import numpy as np

from engines.bundle.geometry import Geometry


def cell_of_row(geometry: Geometry) -> np.ndarray:
    """The selection row (or column) above each hi-res row: int64 [hires_side], values 0 .. cells-1.

    Official: `interpolate(mask, size=hires_side, mode="nearest")`, whose scale is computed in float32.
    """
    side, cells = geometry.hires_side, geometry.cells
    scale = np.float32(cells) / np.float32(side)
    rows: np.ndarray = np.floor(np.arange(side, dtype=np.float32) * scale).astype(np.int64)
    return rows.clip(max=cells - 1)


def page_of_token(geometry: Geometry) -> np.ndarray:
    """The page of each row-major hi-res token, pages counted row-major over the cells: int64 [hires_side ** 2]."""
    cell = cell_of_row(geometry)
    page: np.ndarray = (cell[:, None] * geometry.cells + cell[None, :]).ravel()
    return page


def page_tokens(geometry: Geometry) -> list[np.ndarray]:
    """Row-major hi-res token indices of each page, in page order."""
    page = page_of_token(geometry)
    return [np.flatnonzero(page == index) for index in range(geometry.pages)]


def page_lengths(geometry: Geometry) -> np.ndarray:
    """Valid tokens of each page: int64 [pages]. All equal when `cells` divides the hi-res side (official: 64)."""
    return np.array([len(tokens) for tokens in page_tokens(geometry)], dtype=np.int64)


def page_size(geometry: Geometry) -> int:
    """Tokens a page has room for (official: 64); shorter pages are padded at their end."""
    return int(np.bincount(cell_of_row(geometry)).max()) ** 2  # rows times columns, which are cut alike


def equally_long(geometry: Geometry) -> bool:
    """Whether all pages have as many tokens: what a page slot needs, which holds now this one and now that."""
    return geometry.hires_side % geometry.cells == 0


def page_order(geometry: Geometry) -> np.ndarray:
    """Row-major hi-res token index of every place in pages: int64 [pages * page_size]; padding points at token 0."""
    order = np.zeros((geometry.pages, page_size(geometry)), dtype=np.int64)
    for row, tokens in zip(order, page_tokens(geometry), strict=True):
        row[: len(tokens)] = tokens
    return order.ravel()


def tile_order(geometry: Geometry) -> np.ndarray:
    """Index into the tile-major features ([zoom*zoom tiles, grid*grid tokens]) of each row-major hi-res token.

    int64 [hires_side ** 2]. Tile (r, c) covers rows grid*r .. grid*(r+1)-1 and columns grid*c .. grid*(c+1)-1.
    """
    grid, zoom = geometry.grid, geometry.zoom
    tiles = np.arange(zoom * zoom * grid * grid).reshape(zoom, zoom, grid, grid)
    order: np.ndarray = tiles.transpose(0, 2, 1, 3).ravel()
    return order


def margins(width: int, height: int, grid: int) -> tuple[int, int]:
    """(rows, columns) of the low-res grid that the selection zeroes at each end: the padding of a non-square image.

    Official: p = int((|w - h| // 2) / max(w, h) * grid); rows if w > h, else columns.
    """
    padding = int((abs(width - height) // 2) / max(width, height) * grid)
    return (padding, 0) if width > height else (0, padding)
