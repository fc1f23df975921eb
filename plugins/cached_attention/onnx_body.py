"""flex::CachedAttention as an ONNX function for ONNX Runtime. Inputs and outputs: see the package docstring.

Opset 24, for TensorScatter: with past_* and present_* bound to one buffer it writes the new rows in place.
`0` in a Reshape keeps the dimension.
"""

from __future__ import annotations

from onnxscript import OnnxFunction, script
from onnxscript.values import Opset

from plugins.cached_attention import UNSEEN

op = Opset("", 24)
flex = Opset("flex", 1)


@script(flex, default_opset=op)
def Turn(query, key, value, positions, query_cos, query_sin, cos, sin, head_dim: int):
    """Rotary embedding: the rotated query [B, H, S, hd] T and key [B, Hkv, S, hd] float32, the value [B, Hkv, S, hd] T,
    and each row's first position [B]."""
    keep = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    width = op.Unsqueeze(op.Constant(value_int=head_dim), keep)
    to_heads = op.Concat(keep, keep, rest, width, axis=0)  # [B, S, heads, hd]

    # Rotary in float32.
    q = op.Transpose(op.Reshape(op.Cast(query, to=1), to_heads), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(op.Cast(key, to=1), to_heads), perm=[0, 2, 1, 3])
    v = op.Transpose(op.Reshape(value, to_heads), perm=[0, 2, 1, 3])
    turned = op.CastLike(op.RotaryEmbedding(q, query_cos, query_sin, positions), query)
    turned_key = op.RotaryEmbedding(k, cos, sin, positions)
    return turned, turned_key, v, op.Gather(positions, op.Constant(value_int=0), axis=1)


@script(flex, default_opset=op)
def TurnAndStore(
    query, key, value, past_key, past_value, positions, query_cos, query_sin, cos, sin, head_dim: int,
):  # fmt: skip
    """Rotary embedding and cache update: the rotated query [B, H, S, hd], and the present cache."""
    turned, turned_key, v, first = Turn(
        query, key, value, positions, query_cos, query_sin, cos, sin, head_dim=head_dim
    )  # fmt: skip
    present_key = op.TensorScatter(past_key, op.CastLike(turned_key, key), first, axis=2)
    present_value = op.TensorScatter(past_value, v, first, axis=2)
    return turned, present_key, present_value


@script(flex, default_opset=op)
def QueryTables(cos, sin, head_dim: int):
    """Rotary tables of the query, which takes the softmax scale along: ONNX Runtime scales them when it loads them.
    Next to a MatMul the scale would become that operator's factor, with which single rows are multiplied at half the
    speed (on the CPU)."""
    scale = op.Div(op.Constant(value_float=1.0), op.Sqrt(op.Cast(op.Constant(value_int=head_dim), to=1)))
    return op.Mul(cos, scale), op.Mul(sin, scale)


@script(flex, default_opset=op)
def Rows(turned, past_key, positions, heads: int, kv_heads: int):
    """The heads of a group share one key/value head, and their queries `turned` [B, H, S, hd] lie one after the other
    in R = group*S rows. Returns those [B, Hkv, R, hd], and what is added to their scores, so that slots they do not
    see get the softmax weight 0 exactly [B, 1, R, L] float32. (Where on the scores would pass over them four times on
    ONNX Runtime's CPU, of a prompt hundreds of megabytes in each layer.)

    What depends on `positions` alone is the same in every layer, and ONNX Runtime computes it once.
    """
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    rows = op.Reshape(turned, op.Concat(keep, key_heads, op.Constant(value_ints=[-1]), keep, axis=0))
    at = op.Tile(positions, op.Concat(one, op.Div(all_heads, key_heads), axis=0))
    capacity = op.Squeeze(op.Shape(past_key, start=2, end=3))
    slot = op.Range(op.Constant(value_int=0), capacity, op.Constant(value_int=1))
    visible = op.LessOrEqual(slot, op.Unsqueeze(at, op.Constant(value_ints=[1, 3])))
    return rows, op.Where(visible, op.Constant(value_float=0.0), op.Constant(value_float=UNSEEN))


@script(flex, default_opset=op)
def LastOfHeads(each, heads: int):
    """[B, Hkv, R, n] -> what the last query has of it [B, H, n]."""
    keep = op.Constant(value_ints=[0])
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    by_head = op.Reshape(each, op.Concat(keep, all_heads, op.Constant(value_ints=[-1]), keep, axis=0))
    return op.Gather(by_head, op.Constant(value_int=-1), axis=2)


@script(flex, default_opset=op)
def LastInGroups(each, heads: int, kv_heads: int):
    """[B, Hkv, R, n] -> what the last query has of it, the heads of a group side by side [B, Hkv, group, n]."""
    keep = op.Constant(value_ints=[0])
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    key_heads = op.Unsqueeze(op.Constant(value_int=kv_heads), keep)
    to_groups = op.Concat(keep, key_heads, op.Div(all_heads, key_heads), op.Constant(value_ints=[-1]), axis=0)
    return op.Reshape(LastOfHeads(each, heads=heads), to_groups)


@script(flex, default_opset=op)
def ImageMap(weights, image_begin, grid: int):
    """The map [B, G, G]: `weights` of the last query [B, H, L] on the image tokens, summed over heads."""
    keep = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    side = op.Constant(value_int=grid)
    summed = op.ReduceSum(weights, one, keepdims=0)  # [B, L]
    order = op.Range(op.Constant(value_int=0), op.Mul(side, side), op.Constant(value_int=1))
    token = op.Add(op.Unsqueeze(image_begin, one), order)
    square = op.Unsqueeze(side, keep)
    return op.Reshape(op.GatherElements(summed, token, axis=1), op.Concat(keep, square, square, axis=0))


@script(flex, default_opset=op)
def Scores(rows, keys):
    """Scores [B, Hkv, R, n] float32 of scaled `rows` [B, Hkv, R, hd] and `keys` [B, Hkv, n, hd]."""
    return op.Cast(op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2])), to=1)


@script(flex, default_opset=op)
def LowAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    heads: int, kv_heads: int, head_dim: int, grid: int,
):  # fmt: skip
    """What both attention ops share: causal attention over the whole cache. Returns the last query, rotated and scaled
    [B, Hkv, group, hd], and its masked scores [B, Hkv, group, L] float32; the context of all in rows (Rows)
    [B, Hkv, R, hd]; the present cache; and the map."""
    query_cos, query_sin = QueryTables(cos, sin, head_dim=head_dim)
    turned, present_key, present_value = TurnAndStore(
        query, key, value, past_key, past_value, positions, query_cos, query_sin, cos, sin, head_dim=head_dim
    )
    rows, bias = Rows(turned, past_key, positions, heads=heads, kv_heads=kv_heads)
    scores = op.Add(Scores(rows, present_key), bias)
    weights = op.Softmax(scores, axis=-1)
    context = op.MatMul(op.CastLike(weights, query), present_value)
    map = ImageMap(LastOfHeads(weights, heads=heads), image_begin, grid=grid)
    last_query = LastInGroups(rows, heads=heads, kv_heads=kv_heads)
    last_scores = LastInGroups(scores, heads=heads, kv_heads=kv_heads)
    return last_query, last_scores, context, present_key, present_value, map


@script(flex, default_opset=op)
def JoinHeads(context, heads: int):
    """context [B, Hkv, R, hd] -> [B, S, H*hd]."""
    keep = op.Constant(value_ints=[0])
    all_heads = op.Unsqueeze(op.Constant(value_int=heads), keep)
    by_head = op.Reshape(context, op.Concat(keep, all_heads, op.Constant(value_ints=[-1]), keep, axis=0))
    return op.Reshape(op.Transpose(by_head, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(flex, default_opset=op)
def JoinLast(context, last_context, positions):
    """context [B, H, S, hd] with the row of the last position replaced by last_context -> [B, S, H*hd]."""
    last = op.Equal(positions, op.Slice(positions, [-1], [9223372036854775807], [1]))  # [B, S]
    row = op.Unsqueeze(last, op.Constant(value_ints=[1, 3]))
    joined = op.Where(row, op.CastLike(last_context, context), context)
    return op.Reshape(op.Transpose(joined, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(flex, default_opset=op)
def CachedAttention(
    query, key, value, past_key, past_value, positions, cos, sin, image_begin,
    heads: int, kv_heads: int, head_dim: int, grid: int,
):  # fmt: skip
    last_query, last_scores, context, present_key, present_value, map = LowAttention(
        query, key, value, past_key, past_value, positions, cos, sin, image_begin,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, grid=grid,
    )  # fmt: skip
    return JoinHeads(context, heads=heads), present_key, present_value, map


def once(*functions: OnnxFunction) -> tuple[OnnxFunction, ...]:
    """The functions of a body, each once: steps may share what they call. The op itself comes last."""
    return tuple(dict.fromkeys(functions))


STEPS = Turn, QueryTables, Rows, LastOfHeads, LastInGroups, ImageMap, JoinHeads  # whatever the cache holds
LOW = *STEPS, TurnAndStore, Scores, LowAttention
FUNCTIONS = (*LOW, CachedAttention)
