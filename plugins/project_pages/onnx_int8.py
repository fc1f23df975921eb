"""flex::ProjectPages of an int8 store as an ONNX function for ONNX Runtime.

Inputs and outputs: see the package docstring. ScatterND writes in place, and with no new page little is computed: see
onnx_body.py.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention.onnx_body import flex, op
from plugins.project_pages import LEAST, STEPS
from plugins.project_pages.onnx_body import NewPages, Projected


@script(flex, default_opset=op)
def ProjectPages(
    features, key_weight, value_weight, cos, sin, page_key, page_value, projected, pages, page_count,
    page_key_scale, page_value_scale,
    hidden: int, kv_heads: int, head_dim: int, page_size: int, cells: int,
):  # fmt: skip
    keep = op.Constant(value_ints=[0])
    two = op.Constant(value_ints=[2])
    rest = op.Constant(value_ints=[-1])
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    size = op.Unsqueeze(op.Constant(value_int=page_size), keep)
    present, new, where = NewPages(projected, pages, page_count, kv_heads=kv_heads, cells=cells)
    # Keys and values of the new pages, the halves of one value [2, n, Hkv, P, hd] float32, as a branch assigns one.
    if op.Greater(op.Shape(where, start=0, end=1), zero):
        turned, value = Projected(
            features, key_weight, value_weight, cos, sin, new, kv_heads=kv_heads, head_dim=head_dim
        )
        both = op.Concat(op.Unsqueeze(turned, keep), op.Unsqueeze(op.Cast(value, to=1), keep), axis=0)
        halves = op.Transpose(both, perm=[0, 1, 3, 2, 4])
    else:
        halves = op.ConstantOfShape(op.Concat(two, keep, heads, size, width, axis=0))
    largest = op.Max(op.ReduceMax(op.Abs(halves), rest, keepdims=1), op.Constant(value_float=LEAST))
    step = op.Div(largest, op.Constant(value_float=float(STEPS)))
    whole = op.Cast(op.Round(op.Div(halves, step)), to=3)  # to the nearest, ties to even
    to_rows = op.Concat(rest, size, width, axis=0)  # [n*Hkv, P, hd]
    to_steps = op.Concat(rest, size, axis=0)
    return (
        op.ScatterND(page_key, where, op.Reshape(op.Gather(whole, zero, axis=0), to_rows)),
        op.ScatterND(page_value, where, op.Reshape(op.Gather(whole, one, axis=0), to_rows)),
        op.ScatterND(page_key_scale, where, op.Reshape(op.Gather(step, zero, axis=0), to_steps)),
        op.ScatterND(page_value_scale, where, op.Reshape(op.Gather(step, one, axis=0), to_steps)),
        present,
    )


FUNCTIONS = (NewPages, Projected, ProjectPages)
