"""flex::SelectPages as a Triton kernel. Inputs and outputs: see the package docstring."""

import triton
import triton.language as tl


@triton.jit
def cell_values(map, top, left, cell, GRID: tl.constexpr, CELLS: tl.constexpr):
    """The largest value of the map under each cell, margins zeroed: cell i covers floor(G*i/C) .. ceil(G*(i+1)/C)-1."""
    first_row = (cell // CELLS) * GRID // CELLS
    last_row = ((cell // CELLS + 1) * GRID - 1) // CELLS
    first_column = (cell % CELLS) * GRID // CELLS
    last_column = ((cell % CELLS + 1) * GRID - 1) // CELLS
    largest = tl.full(cell.shape, float("-inf"), tl.float32)
    for down in range(0, (GRID + CELLS - 1) // CELLS + 1):
        row = tl.minimum(first_row + down, last_row)
        for right in range(0, (GRID + CELLS - 1) // CELLS + 1):
            column = tl.minimum(first_column + right, last_column)
            kept = (row >= top) & (row < GRID - top) & (column >= left) & (column < GRID - left)
            value = tl.load(map + row * GRID + column, mask=kept & (cell < CELLS * CELLS), other=0.0)
            # A NaN is no score, and the ranks below need an order: an unranked page would be read at a stray address.
            value = tl.where(value == value, value, 0.0)
            largest = tl.maximum(largest, value)
    return tl.where(cell < CELLS * CELLS, largest, float("-inf"))


@triton.jit
def select_pages(
    map,  # [B, G, G] float32
    margins,  # [B, 2] int64
    page_budget,  # [B] int64
    pages,  # [B, C*C] int64, written
    page_count,  # [B] int64, written
    GRID: tl.constexpr,
    CELLS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,  # powers of two: at least G*G,
    CELL_BLOCK: tl.constexpr,  # at least C*C,
    RANK_BLOCK: tl.constexpr,  # at most that
):
    """One program per row of the batch."""
    batch_row = tl.program_id(0).to(tl.int64)
    map += batch_row * GRID * GRID
    top = tl.load(margins + batch_row * 2)
    left = tl.load(margins + batch_row * 2 + 1)

    token = tl.arange(0, TOKEN_BLOCK)
    row, column = token // GRID, token % GRID
    kept = (row >= top) & (row < GRID - top) & (column >= left) & (column < GRID - left)
    value = tl.load(map + token, mask=kept & (token < GRID * GRID), other=0.0)
    value = tl.where(value == value, value, 0.0)
    inside = token < GRID * GRID
    low = tl.min(tl.where(inside, value, float("inf")), 0)
    high = tl.max(tl.where(inside, value, float("-inf")), 0)

    # Scaling is monotone, so the largest scaled value is the scaled largest. Division rounded as IEEE says: the
    # threshold is strict, and the plain operator is an approximation.
    span = tl.where(high == low, 1.0, high - low)
    cell = tl.arange(0, CELL_BLOCK)
    real = cell < CELLS * CELLS
    largest = cell_values(map, top, left, cell, GRID, CELLS)
    score = tl.div_rn(largest - low, tl.zeros_like(largest) + span)

    # A page's place in the list: the pages with a higher score, and with the same score and a lower index.
    rank = tl.zeros([CELL_BLOCK], tl.int32)
    for start in range(0, CELL_BLOCK, RANK_BLOCK):
        other = start + tl.arange(0, RANK_BLOCK)
        rival = tl.div_rn(
            cell_values(map, top, left, other, GRID, CELLS) - low, tl.zeros([RANK_BLOCK], tl.float32) + span
        )
        higher = rival[None, :] > score[:, None]
        earlier = (rival[None, :] == score[:, None]) & (other[None, :] < cell[:, None])
        rank += tl.sum((higher | earlier).to(tl.int32), 1)
    tl.store(pages + batch_row * CELLS * CELLS + rank, cell.to(tl.int64), mask=real)
    eligible = real & (score * 255.0 > THRESHOLD) & (high != low)
    total = tl.sum(eligible.to(tl.int64), 0)
    tl.store(page_count + batch_row, tl.minimum(total, tl.load(page_budget + batch_row)))
