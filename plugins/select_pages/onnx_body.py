"""flex::SelectPages as an ONNX function. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from onnxscript import script
from onnxscript.values import Opset

op = Opset("", 24)
flex = Opset("flex", 1)


@script(flex, default_opset=op)
def PageScores(map, margins, page_budget, grid: int, cells: int, threshold: int):
    """The pooled score of each page [B, C*C] float32, and page_count.

    What depends on the margins alone is the same in every layer, and ONNX Runtime computes it once; what depends on the
    attributes alone is folded into constants.
    """
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    rest = op.Constant(value_ints=[-1])
    to_list = op.Constant(value_ints=[0, -1])
    side = op.Constant(value_int=grid)
    count = op.Constant(value_int=cells)

    # Zero the padding.
    index = op.Range(zero, side, step)
    margin = op.Unsqueeze(margins, two)
    inside = op.And(op.GreaterOrEqual(index, margin), op.Less(index, op.Sub(side, margin)))  # [B, 2, G]
    rows = op.Unsqueeze(op.Gather(inside, zero, axis=1), two)
    columns = op.Unsqueeze(op.Gather(inside, step, axis=1), one)
    kept = op.Reshape(op.And(rows, columns), to_list)
    clean = op.Where(kept, op.Reshape(map, to_list), op.Constant(value_float=0.0))  # [B, G*G]

    # Adaptive max-pool: cell i covers rows floor(G*i/C) .. ceil(G*(i+1)/C)-1; shorter windows repeat their end. Scaling
    # keeps the order, so the largest scaled value is the largest value, scaled.
    cell = op.Range(zero, count, step)
    begin = op.Div(op.Mul(cell, side), count)
    last = op.Div(op.Sub(op.Mul(op.Add(cell, step), side), step), count)
    widest = op.Add(op.ReduceMax(op.Sub(last, begin), keepdims=0), step)
    reach = op.Add(op.Unsqueeze(begin, one), op.Range(zero, widest, step))
    window = op.Min(reach, op.Unsqueeze(last, one))  # [C, widest]
    down = op.Unsqueeze(op.Mul(window, side), op.Constant(value_ints=[1, 3]))
    right = op.Unsqueeze(window, op.Constant(value_ints=[0, 2]))
    by_cell = op.Concat(op.Unsqueeze(op.Mul(count, count), op.Constant(value_ints=[0])), rest, axis=0)
    square = op.Reshape(op.Add(down, right), by_cell)  # [C*C, widest*widest]
    pooled = op.ReduceMax(op.Gather(clean, square, axis=1), two, keepdims=0)  # [B, C*C]

    # Scale to 0..1; a constant map selects nothing (official: 0/0 = NaN).
    low = op.ReduceMin(clean, one, keepdims=1)
    high = op.ReduceMax(pooled, one, keepdims=1)
    uneven = op.Greater(high, low)
    score = op.Div(op.Sub(pooled, low), op.Where(uneven, op.Sub(high, low), op.Constant(value_float=1.0)))

    # Eligibility grows with the score: the selected pages are the first of the order by score.
    limit = op.Cast(op.Constant(value_int=threshold), to=1)
    passes = op.Greater(op.Mul(score, op.Constant(value_float=255.0)), limit)
    total = op.ReduceSum(op.Cast(op.And(passes, uneven), to=7), one, keepdims=0)
    return score, op.Min(total, page_budget)


@script(flex, default_opset=op)
def SelectPages(map, margins, page_budget, grid: int, cells: int, threshold: int):
    score, count = PageScores(map, margins, page_budget, grid=grid, cells=cells, threshold=threshold)
    # Every page, best first; ONNX's TopK keeps the lower index first where scores are equal.
    side = op.Constant(value_int=cells)
    _, pages = op.TopK(score, op.Unsqueeze(op.Mul(side, side), op.Constant(value_ints=[0])), axis=1)
    return pages, count


FUNCTIONS = (PageScores, SelectPages)
