"""Kernels of version 0.1.0 that today's are launched otherwise than: what code in files of formats 1 and 2 does."""

import triton
import triton.language as tl

from plugins.cached_attention import LEAST, STEPS

SMALLEST, TOP = tl.constexpr(LEAST), tl.constexpr(float(STEPS))
# Added to a number below 2^22 and taken off again, it leaves a float32 without a fraction, rounded to nearest even.
TO_WHOLE = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def project_pages(
    features,  # [B, N, P, hidden]
    key_weight,  # [Hkv*hd, hidden]
    value_weight,
    cos,  # [B, N, P, hd/2] float32
    sin,
    page_key,  # [B, Hkv, N, P, hd], new pages written; with INT8_PAGES int8
    page_value,
    projected,  # [B, N] int64
    pages,  # [B, N] int64
    page_count,  # [B] int64
    page_key_scale,  # [B, Hkv, N, P] float32, of new pages written; absent without INT8_PAGES
    page_value_scale,
    slots,  # absent
    present_projected,  # [B, N] int64, written
    page_total,  # N
    slot_total,  # absent
    HIDDEN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # power of two, at least hd/2
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of one tile, a power of two
    WIDTH: tl.constexpr,  # of `hidden` in one tile
    PAGE_BLOCK: tl.constexpr,  # power of two, at least N
    LANES: tl.constexpr,  # programs that share the new pages
    INT8_PAGES: tl.constexpr,  # whether the pages are stored in 8 bits
    PAGE_SLOTS: tl.constexpr,  # 0
):
    """Programs: (LANES; Hkv for the keys, then Hkv for the values; B). With nothing new they end after three loads.

    `projected` is read by every program and must not change while this runs: the result goes elsewhere. A program holds
    whole heads of its tokens, and so finds the steps of an int8 store.
    """
    lane, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) % KV_HEADS
    is_key = tl.program_id(1) < KV_HEADS

    place = tl.arange(0, PAGE_BLOCK)
    real = place < page_total
    listed = real & (place < tl.load(page_count + row))
    page_at = tl.load(pages + row * page_total + place, mask=real, other=0)
    done = tl.load(projected + row * page_total + page_at, mask=real, other=1)
    new = listed & (done == 0)
    if (lane == 0) & (tl.program_id(1) == 0):
        tl.store(present_projected + row * page_total + page_at, tl.where(listed, 1, done), mask=real)

    order = tl.cumsum(new.to(tl.int32), 0)  # 1, 2, ... at the new pages
    total = tl.sum(new.to(tl.int32), 0)
    half: tl.constexpr = HEAD_DIM // 2
    kind: tl.constexpr = features.dtype.element_ty
    weight = key_weight if is_key else value_weight
    store = page_key if is_key else page_value
    column = tl.arange(0, HALF)
    depth = tl.arange(0, WIDTH)
    weight_row = weight + (head * HEAD_DIM + column).to(tl.int64)[None, :] * HIDDEN
    for index in range(lane, total, LANES):
        page = tl.sum(tl.where(new & (order == index + 1), page_at, 0), 0)
        for start in range(0, PAGE_SIZE, ROWS):
            slot = start + tl.arange(0, ROWS)
            inside = (slot < PAGE_SIZE)[:, None] & (column < half)[None, :]
            token = ((row * page_total + page) * PAGE_SIZE + slot)[:, None]
            left = tl.zeros([ROWS, HALF], tl.float32)
            right = tl.zeros([ROWS, HALF], tl.float32)
            for at in range(0, HIDDEN, WIDTH):
                there = at + depth < HIDDEN
                x = tl.load(
                    features + token * HIDDEN + at + depth[None, :],
                    mask=(slot < PAGE_SIZE)[:, None] & there[None, :],
                    other=0.0,
                )
                used = there[:, None] & (column < half)[None, :]
                first = tl.load(weight_row + at + depth[:, None], mask=used, other=0.0)
                second = tl.load(weight_row + half * HIDDEN + at + depth[:, None], mask=used, other=0.0)
                left = tl.dot(x, first, left, input_precision="ieee")
                right = tl.dot(x, second, right, input_precision="ieee")
            left, right = left.to(kind).to(tl.float32), right.to(kind).to(tl.float32)  # as the projection rounds
            if is_key:
                c = tl.load(cos + token * half + column[None, :], mask=inside, other=0.0)
                s = tl.load(sin + token * half + column[None, :], mask=inside, other=0.0)
                left, right = left * c - right * s, right * c + left * s
            out = (((row * KV_HEADS + head) * page_total + page) * PAGE_SIZE + slot)[:, None] * HEAD_DIM + column[
                None, :
            ]
            if INT8_PAGES:
                largest = tl.max(tl.maximum(tl.abs(left), tl.abs(right)), 1)  # 0 past the head's columns
                step = tl.maximum(largest, SMALLEST) / TOP
                left = (left / step[:, None] + TO_WHOLE) - TO_WHOLE
                right = (right / step[:, None] + TO_WHOLE) - TO_WHOLE
                scale = page_key_scale if is_key else page_value_scale
                at_step = ((row * KV_HEADS + head) * page_total + page) * PAGE_SIZE + slot
                tl.store(scale + at_step, step, mask=slot < PAGE_SIZE)
                kept: tl.constexpr = tl.int8
            else:
                kept: tl.constexpr = kind
            tl.store(store + out, left.to(kept), mask=inside)
            tl.store(store + out + half, right.to(kept), mask=inside)
