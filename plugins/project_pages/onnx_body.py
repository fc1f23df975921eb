"""flex::ProjectPages as an ONNX function for ONNX Runtime. Inputs and outputs: see the package docstring.

ScatterND writes in place when page_* and present_* are bound to one buffer; with no new page it writes nothing, and
little else is computed.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention.onnx_body import flex, op


@script(flex, default_opset=op)
def NewPages(projected, pages, page_count, kv_heads: int, cells: int):
    """`projected` with the wanted pages, which of those are new [B, N] bool, and (row, head, page) of each head of each
    new page, by row, page, head: [n*Hkv, 3]."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    side = op.Constant(value_int=cells)
    heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    every = op.Range(op.Constant(value_int=0), op.Mul(side, side), op.Constant(value_int=1))
    wanted = op.Less(every, op.Unsqueeze(page_count, one))
    present = op.ScatterElements(projected, pages, op.Cast(wanted, to=7), axis=1, reduction="max")
    new = op.Greater(present, projected)
    by_head = op.NonZero(op.Expand(op.Unsqueeze(new, op.Constant(value_ints=[2])), op.Concat(one, one, heads, axis=0)))
    return present, new, op.Transpose(op.Gather(by_head, op.Constant(value_ints=[0, 2, 1]), axis=0), perm=[1, 0])


@script(flex, default_opset=op)
def Projected(features, key_weight, value_weight, cos, sin, new, kv_heads: int, head_dim: int):
    """Keys, rotated, float32, and values T of the new pages: [n, P, Hkv, hd]."""
    keep = op.Constant(value_ints=[0])
    two = op.Constant(value_ints=[2])
    heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_heads = op.Concat(keep, keep, heads, width, axis=0)
    which = op.Transpose(op.NonZero(new), perm=[1, 0])  # [n, 2]
    some = op.GatherND(features, which)  # [n, P, hidden]
    key = op.Reshape(op.MatMul(some, op.Transpose(key_weight, perm=[1, 0])), to_heads)
    value = op.Reshape(op.MatMul(some, op.Transpose(value_weight, perm=[1, 0])), to_heads)
    c = op.Unsqueeze(op.GatherND(cos, which), two)  # [n, P, 1, hd/2]
    s = op.Unsqueeze(op.GatherND(sin, which), two)
    left, right = op.Split(op.Cast(key, to=1), axis=3, num_outputs=2)
    turned = op.Concat(op.Sub(op.Mul(left, c), op.Mul(right, s)), op.Add(op.Mul(right, c), op.Mul(left, s)), axis=3)
    return turned, value


@script(flex, default_opset=op)
def NewHalves(
    features, key_weight, value_weight, cos, sin, projected, pages, page_count, like,
    kv_heads: int, head_dim: int, page_size: int, cells: int,
):  # fmt: skip
    """Keys and values of the new pages [2, n, Hkv, P, hd] in the dtype of `like`; where they belong [n*Hkv, 3]; and
    `projected` with the wanted pages."""
    keep = op.Constant(value_ints=[0])
    two = op.Constant(value_ints=[2])
    heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    size = op.Unsqueeze(op.Constant(value_int=page_size), keep)
    present, new, where = NewPages(projected, pages, page_count, kv_heads=kv_heads, cells=cells)
    # The halves of one value, as a branch assigns one.
    if op.Greater(op.Shape(where, start=0, end=1), op.Constant(value_int=0)):
        turned, value = Projected(
            features, key_weight, value_weight, cos, sin, new, kv_heads=kv_heads, head_dim=head_dim
        )
        both = op.Concat(
            op.Unsqueeze(op.CastLike(turned, like), keep), op.Unsqueeze(op.CastLike(value, like), keep), axis=0
        )
        halves = op.Transpose(both, perm=[0, 1, 3, 2, 4])
    else:
        halves = op.CastLike(op.ConstantOfShape(op.Concat(two, keep, heads, size, width, axis=0)), like)
    return halves, where, present


@script(flex, default_opset=op)
def Stored(page_key, page_value, halves, where):
    """The stores with the new `halves`."""
    to_rows = op.Concat(op.Constant(value_ints=[-1]), op.Shape(page_key, start=3), axis=0)  # [n*Hkv, ...]
    keys = op.Reshape(op.Gather(halves, op.Constant(value_int=0), axis=0), to_rows)
    values = op.Reshape(op.Gather(halves, op.Constant(value_int=1), axis=0), to_rows)
    return op.ScatterND(page_key, where, keys), op.ScatterND(page_value, where, values)


@script(flex, default_opset=op)
def ProjectPages(
    features, key_weight, value_weight, cos, sin, page_key, page_value, projected, pages, page_count,
    hidden: int, kv_heads: int, head_dim: int, page_size: int, cells: int,
):  # fmt: skip
    halves, where, present = NewHalves(
        features, key_weight, value_weight, cos, sin, projected, pages, page_count, page_key,
        kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, cells=cells,
    )  # fmt: skip
    present_key, present_value = Stored(page_key, page_value, halves, where)
    return present_key, present_value, present


SHARED = NewPages, Projected, NewHalves, Stored
FUNCTIONS = (*SHARED, ProjectPages)
