"""flex::SelectPages as an ONNX function for TensorRT without plugins. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from onnxscript import script

from plugins.select_pages.onnx_body import PageScores, flex, op


@script(flex, default_opset=op)
def SelectPages(map, margins, page_budget, grid: int, cells: int, threshold: int):
    score, count = PageScores(map, margins, page_budget, grid=grid, cells=cells, threshold=threshold)
    # TensorRT documents no order of equal scores for its TopK. So each page is compared with every other: its place in
    # the list is the number of pages before it.
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    side = op.Constant(value_int=cells)
    index = op.Range(op.Constant(value_int=0), op.Mul(side, side), op.Constant(value_int=1))
    own = op.Unsqueeze(score, two)
    other = op.Unsqueeze(score, one)
    tied_before = op.And(op.Equal(other, own), op.Less(index, op.Unsqueeze(index, one)))
    place = op.ReduceSum(op.Cast(op.Or(op.Greater(other, own), tied_before), to=7), two, keepdims=0)  # [B, C*C]
    # The inverse permutation, by comparison too: row p, column i tells whether page i has place p.
    has_place = op.Equal(op.Unsqueeze(place, one), op.Unsqueeze(index, one))
    pages = op.ReduceSum(op.Where(has_place, index, op.Constant(value_int=0)), two, keepdims=0)
    return pages, count


FUNCTIONS = (PageScores, SelectPages)
