"""flex::ProjectPages as an ONNX function for ONNX Runtime. Inputs and outputs: see the package docstring.

With no new page every tensor of `n` pages has zero rows, and the products cost nothing. ScatterND writes in place when
page_* and present_* are bound to one buffer.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention.onnx_body import flex, op


@script(flex, default_opset=op)
def ProjectPages(
    features, key_weight, value_weight, cos, sin, page_key, page_value, projected, pages, page_count,
    hidden: int, kv_heads: int, head_dim: int, page_size: int, cells: int,
):  # fmt: skip
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    heads = op.Constant(value_int=kv_heads)
    every_head = op.Unsqueeze(heads, keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)

    # (row, page) of every new page.
    total = op.Squeeze(op.Shape(pages, start=1, end=2))
    first = op.Less(op.Range(zero, total, step), op.Unsqueeze(page_count, one))
    wanted = op.ScatterElements(op.Sub(projected, projected), pages, op.Cast(first, to=7), axis=1)
    new = op.Transpose(op.NonZero(op.Greater(wanted, projected)), perm=[1, 0])  # [n, 2]

    some = op.GatherND(features, new)  # [n, P, hidden]
    to_heads = op.Concat(keep, keep, every_head, width, axis=0)
    key = op.Reshape(op.MatMul(some, op.Transpose(key_weight, perm=[1, 0])), to_heads, allowzero=0)
    value = op.Reshape(op.MatMul(some, op.Transpose(value_weight, perm=[1, 0])), to_heads, allowzero=0)
    c = op.Unsqueeze(op.GatherND(cos, new), op.Constant(value_ints=[2]))  # [n, P, 1, hd/2]
    s = op.Unsqueeze(op.GatherND(sin, new), op.Constant(value_ints=[2]))
    left, right = op.Split(op.Cast(key, to=1), axis=3, num_outputs=2)
    turned = op.Concat(op.Sub(op.Mul(left, c), op.Mul(right, s)), op.Add(op.Mul(right, c), op.Mul(left, s)), axis=3)

    # Where each head of each new page goes: [n, Hkv, 3] of (row, head, page).
    per_head = op.Concat(op.Shape(new, start=0, end=1), every_head, one, axis=0)
    row = op.Expand(op.Unsqueeze(op.Slice(new, keep, one, one), one), per_head)
    page = op.Expand(op.Unsqueeze(op.Slice(new, one, op.Constant(value_ints=[2]), one), one), per_head)
    head = op.Expand(op.Reshape(op.Range(zero, heads, step), op.Concat(one, rest, one, axis=0)), per_head)
    where = op.Concat(row, head, page, axis=2)
    by_head = op.Transpose(op.CastLike(turned, page_key), perm=[0, 2, 1, 3])
    present_key = op.ScatterND(page_key, where, by_head)
    present_value = op.ScatterND(page_value, where, op.Transpose(value, perm=[0, 2, 1, 3]))
    return present_key, present_value, op.Max(projected, wanted)


FUNCTIONS = (ProjectPages,)
