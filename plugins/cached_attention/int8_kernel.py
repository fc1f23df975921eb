"""Numbers kept in 8 bits, in Triton: how they are rounded, and the kernel that makes a cache of them float again."""

import triton
import triton.language as tl

from plugins.cached_attention import LEAST, STEPS

SMALLEST, TOP = tl.constexpr(LEAST), tl.constexpr(float(STEPS))
# Added to a number below 2^22 and taken off again, it leaves a float32 without a fraction, rounded to nearest even.
TO_WHOLE = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def larger(left, right):
    """The larger of two numbers; NaN if one of them is."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitude(x):
    """The largest magnitude of each row of x; NaN where the row has one, so that its step is NaN, too."""
    return tl.reduce(tl.abs(x), 1, larger)


@triton.jit
def step_of(largest):
    """What numbers of which the largest has this magnitude are counted in."""
    return larger(largest, SMALLEST) / TOP


@triton.jit
def whole_steps(x, step):
    """The nearest whole number of steps, float32, within -127 .. 127."""
    return (x / step + TO_WHOLE) - TO_WHOLE


@triton.jit
def quantise(x):
    """Keys or values [tokens, WIDTH] float32, 0 past the head, as an int8 cache keeps them: [tokens, WIDTH] float32
    without a fraction, and the step of each token."""
    step = step_of(magnitude(x))
    return whole_steps(x, step[:, None]), step


@triton.jit
def dequantise(
    cache_key,  # [B, Hkv, L, hd] int8
    cache_value,
    past_key_scale,  # [B, Hkv, L] float32
    past_value_scale,
    positions,  # [B, S] int64
    float_key,  # [B, Hkv, L, hd] in the model dtype, slots of all tokens but the last written
    float_value,
    steps,
    capacity,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The int8 cache as `prefill` reads it. Programs: (blocks of ROWS slots, Hkv, B); those past the end do nothing.

    Each number is rounded to the model dtype once, as that of a cache that is not int8. Within `prefill` it would be
    done again for each block of queries, by every warp, in registers that its tiles have no room for.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * ROWS
    end = tl.minimum(tl.load(positions + row * steps + steps - 1).to(tl.int32), capacity)
    if begin < end:
        slot = begin + tl.arange(0, ROWS)
        inside = slot < end
        dim = tl.arange(0, WIDTH)[None, :]
        real = inside[:, None] & (dim < HEAD_DIM)
        first = (row * KV_HEADS + head) * capacity
        cache, at = first * HEAD_DIM, slot[:, None] * HEAD_DIM + dim
        key = tl.load(cache_key + cache + at, mask=real, other=0).to(tl.float32)
        key *= tl.load(past_key_scale + first + slot, mask=inside, other=0.0)[:, None]
        tl.store(float_key + cache + at, key.to(float_key.dtype.element_ty), mask=real)
        value = tl.load(cache_value + cache + at, mask=real, other=0).to(tl.float32)
        value *= tl.load(past_value_scale + first + slot, mask=inside, other=0.0)[:, None]
        tl.store(float_value + cache + at, value.to(float_value.dtype.element_ty), mask=real)
