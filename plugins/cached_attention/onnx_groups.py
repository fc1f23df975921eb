"""Heads a few at a time: what a Scan over groups of heads takes and gives, in ONNX. `0` in a Reshape keeps the
dimension.

What is read next is still in the processor's cache then, and a copy of a few heads is all that is ever made.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention.onnx_body import flex, op

HEADS = 8  # at a time: 5.8 MB of keys for 22 pages of 64 tokens, head size 128, float32


@script(flex, default_opset=op)
def HeadGroups(kv_heads: int):
    """How many key/value heads go together [1], the largest power of two up to HEADS that divides them, and how many
    groups that makes [1]."""
    heads = op.Constant(value_int=kv_heads)
    several = op.BitwiseOr(heads, op.Constant(value_int=HEADS))
    group = op.Unsqueeze(op.BitwiseAnd(several, op.Neg(several)), op.Constant(value_ints=[0]))
    return group, op.Div(heads, group)


@script(flex, default_opset=op)
def ByGroup(each, group):
    """What each head has, [B, Hkv, X, Y], by groups of heads: [B*Hkv/group, 1, group, X, Y]."""
    to_groups = op.Concat(op.Constant(value_ints=[-1, 1]), group, op.Constant(value_ints=[0, 0]), axis=0)
    return op.Reshape(op.Unsqueeze(each, op.Constant(value_ints=[1])), to_groups)


@script(flex, default_opset=op)
def ForGroups(once, groups):
    """What a row of the batch has once, [B, 1, X, Y], for each of its groups of heads: [B*groups, 1, X, Y]."""
    one = op.Constant(value_ints=[1])
    repeated = op.Expand(once, op.Concat(one, groups, one, one, axis=0))
    return op.Reshape(repeated, op.Constant(value_ints=[-1, 1, 0, 0]))


@script(flex, default_opset=op)
def JoinGroups(each, kv_heads: int):
    """[B*groups, 1, group, X, Y] -> [B, Hkv, X, Y]."""
    heads = op.Unsqueeze(op.Constant(value_int=kv_heads), op.Constant(value_ints=[0]))
    to_heads = op.Concat(op.Constant(value_ints=[-1]), heads, op.Constant(value_ints=[0, 0]), axis=0)
    return op.Reshape(op.Squeeze(each, op.Constant(value_ints=[1])), to_heads)


GROUPS = HeadGroups, ByGroup, ForGroups, JoinGroups
