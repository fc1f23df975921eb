"""flex::SelectPages as an ONNX function. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from onnxscript import script
from onnxscript.values import Opset

op = Opset("", 24)
flex = Opset("flex", 1)


@script(flex, default_opset=op)
def PageScores(map, margins, page_budget, grid: int, cells: int, threshold: int):
    """The pooled score of each page [B, C*C] float32, and page_count."""
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    sides = op.Constant(value_ints=[1, 2])
    side = op.Constant(value_int=grid)
    count = op.Constant(value_int=cells)

    # Zero the padding, then scale to 0..1; a constant map selects nothing (official: 0/0 = NaN).
    index = op.Range(zero, side, step)
    margin = op.Unsqueeze(margins, op.Constant(value_ints=[2]))
    inside = op.And(op.GreaterOrEqual(index, margin), op.Less(index, op.Sub(side, margin)))  # [B, 2, G]
    rows = op.Unsqueeze(op.Gather(inside, zero, axis=1), op.Constant(value_ints=[2]))
    columns = op.Unsqueeze(op.Gather(inside, step, axis=1), op.Constant(value_ints=[1]))
    blank = op.Constant(value_float=0.0)
    clean = op.Where(op.And(rows, columns), map, blank)
    low = op.ReduceMin(clean, sides, keepdims=1)
    high = op.ReduceMax(clean, sides, keepdims=1)
    flat = op.Equal(low, high)
    span = op.Where(flat, op.Constant(value_float=1.0), op.Sub(high, low))
    scaled = op.Div(op.Sub(clean, low), span)

    # Adaptive max-pool: cell i covers rows floor(G*i/C) .. ceil(G*(i+1)/C)-1; shorter windows repeat their end.
    cell = op.Range(zero, count, step)
    begin = op.Div(op.Mul(cell, side), count)
    last = op.Div(op.Sub(op.Mul(op.Add(cell, step), side), step), count)
    widest = op.Add(op.ReduceMax(op.Sub(last, begin), keepdims=0), step)
    reach = op.Add(op.Unsqueeze(begin, op.Constant(value_ints=[1])), op.Range(zero, widest, step))
    window = op.Min(reach, op.Unsqueeze(last, op.Constant(value_ints=[1])))  # [C, widest]
    tall = op.ReduceMax(op.Gather(scaled, window, axis=1), op.Constant(value_ints=[2]), keepdims=0)  # [B, C, G]
    pooled = op.ReduceMax(op.Gather(tall, window, axis=2), op.Constant(value_ints=[3]), keepdims=0)  # [B, C, C]
    score = op.Reshape(pooled, op.Constant(value_ints=[0, -1]))

    # Eligibility grows with the score: the selected pages are the first of the order by score.
    limit = op.Cast(op.Constant(value_int=threshold), to=1)
    passes = op.Greater(op.Mul(score, op.Constant(value_float=255.0)), limit)
    eligible = op.And(passes, op.Not(op.Squeeze(flat, op.Constant(value_ints=[2]))))
    total = op.ReduceSum(op.Cast(eligible, to=7), op.Constant(value_ints=[1]), keepdims=0)
    return score, op.Min(total, page_budget)


@script(flex, default_opset=op)
def SelectPages(map, margins, page_budget, grid: int, cells: int, threshold: int):
    score, count = PageScores(map, margins, page_budget, grid=grid, cells=cells, threshold=threshold)
    # Every page, best first; ONNX's TopK keeps the lower index first where scores are equal.
    _, pages = op.TopK(score, op.Shape(score, start=1, end=2), axis=1, largest=1, sorted=1)
    return pages, count


FUNCTIONS = (PageScores, SelectPages)
