"""flex::ProjectPages as a Triton kernel. Inputs and outputs: see the package docstring."""

import triton
import triton.language as tl

from plugins.cached_attention.int8_kernel import larger, magnitude, step_of, whole_steps


@triton.jit
def load_operand(at, inside, WHOLE: tl.constexpr):
    """A tile of an operand, 0 outside; with WHOLE all of it is inside, and no load asks."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def project_pages(
    features,  # [B, N, P, hidden]
    key_weight,  # [Hkv*hd, hidden]
    value_weight,
    cos,  # [B, N, P, hd/2] float32
    sin,
    page_key,  # [B, Hkv, N, P, hd], new pages written; with INT8_PAGES int8; with PAGE_SLOTS K in place of N
    page_value,
    projected,  # [B, N] int64
    pages,  # [B, N] int64
    page_count,  # [B] int64
    page_key_scale,  # [B, Hkv, N, P] float32, of new pages written; absent without INT8_PAGES
    page_value_scale,
    slots,  # [B, N] int64: where the store has each new page; absent without PAGE_SLOTS
    present_projected,  # [B, N] int64, written
    page_total,  # N
    slot_total,  # K; absent without PAGE_SLOTS
    HIDDEN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # power of two, at least hd/2
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of one tile, a power of two
    WIDTH: tl.constexpr,  # of `hidden` in one tile
    PAGE_BLOCK: tl.constexpr,  # power of two, at least N
    LANES: tl.constexpr,  # tiles that every head takes before the next ones
    PROGRAMS: tl.constexpr,  # of a row of the batch
    INT8_PAGES: tl.constexpr,  # whether the pages are stored in 8 bits
    PAGE_SLOTS: tl.constexpr,  # whether the store has slots for pages, and not a place for each
):
    """Programs: (PROGRAMS, 1, B). With nothing new they end after three loads.

    The tokens of a row's new pages, one page after the other, are cut into tiles of ROWS; each is projected for each
    head of the keys and each of the values. Programs share these products evenly, and take them in an order that lets
    those at work at one time share what they read: LANES tiles head by head, then the next LANES. `projected` is read
    by every program and must not change while this runs: the result goes elsewhere. A product covers whole heads of its
    tokens, and so finds the steps of an int8 store.
    """
    program, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    place = tl.arange(0, PAGE_BLOCK)
    real = place < page_total
    listed = real & (place < tl.load(page_count + row))
    page_at = tl.load(pages + row * page_total + place, mask=real, other=0)
    done = tl.load(projected + row * page_total + page_at, mask=real, other=1)
    new = listed & (done == 0)
    if program == 0:
        tl.store(present_projected + row * page_total + page_at, tl.where(listed, 1, done), mask=real)

    total = tl.sum(new.to(tl.int32), 0) * PAGE_SIZE
    if total > 0:
        order = tl.where(new, tl.cumsum(new.to(tl.int32), 0), 0)  # 1, 2, ... at the new pages
        index_at = page_at.to(tl.int32)
        half: tl.constexpr = HEAD_DIM // 2
        whole: tl.constexpr = HIDDEN % WIDTH == 0
        kind: tl.constexpr = features.dtype.element_ty
        heads: tl.constexpr = 2 * KV_HEADS
        column = tl.arange(0, HALF)
        depth = tl.arange(0, WIDTH)
        tiles = (total + ROWS - 1) // ROWS
        for index in range(program, tiles * heads, PROGRAMS):
            first_tile = index // (LANES * heads) * LANES
            lanes = tl.minimum(tiles - first_tile, LANES)
            within = index % (LANES * heads)
            head = within // lanes % KV_HEADS
            is_key = within // lanes < KV_HEADS

            token = (first_tile + within % lanes) * ROWS + tl.arange(0, ROWS)
            wanted = order[None, :] == (token // PAGE_SIZE + 1)[:, None]
            page = tl.sum(tl.where(wanted, index_at[None, :], 0), 1)  # past the end: page 0, read for nothing
            slot = token % PAGE_SIZE
            source = ((row * page_total + page) * PAGE_SIZE + slot)[:, None]
            x_at = features + source * HIDDEN + depth[None, :]
            weight = key_weight if is_key else value_weight
            first_at = weight + (head * HEAD_DIM + column).to(tl.int64)[None, :] * HIDDEN + depth[:, None]
            left = tl.zeros([ROWS, HALF], tl.float32)
            right = tl.zeros([ROWS, HALF], tl.float32)
            for at in range(0, HIDDEN, WIDTH):
                there = at + depth < HIDDEN
                used = there[:, None] & (column < half)[None, :]
                x = load_operand(x_at + at, there[None, :], whole)
                first = load_operand(first_at + at, used, whole and half == HALF)
                second = load_operand(first_at + half * HIDDEN + at, used, whole and half == HALF)
                left = tl.dot(x, first, left, input_precision="ieee")
                right = tl.dot(x, second, right, input_precision="ieee")
            left, right = left.to(kind).to(tl.float32), right.to(kind).to(tl.float32)  # as the projection rounds

            inside = (token < total)[:, None] & (column < half)[None, :]
            if is_key:
                c = tl.load(cos + source * half + column[None, :], mask=inside, other=0.0)
                s = tl.load(sin + source * half + column[None, :], mask=inside, other=0.0)
                left, right = left * c - right * s, right * c + left * s
            if PAGE_SLOTS:  # past the end nothing is stored
                held_in = tl.load(slots + row * page_total + page)
                target = ((row * KV_HEADS + head) * slot_total + held_in) * PAGE_SIZE + slot
            else:
                target = ((row * KV_HEADS + head) * page_total + page) * PAGE_SIZE + slot
            if INT8_PAGES:
                step = step_of(larger(magnitude(left), magnitude(right)))  # both 0 past the head's columns
                left, right = whole_steps(left, step[:, None]), whole_steps(right, step[:, None])
                scale = page_key_scale if is_key else page_value_scale
                tl.store(scale + target, step, mask=token < total)
                kept: tl.constexpr = tl.int8
            else:
                kept: tl.constexpr = kind
            store = page_key if is_key else page_value
            out = store + target[:, None] * HEAD_DIM + column[None, :]
            tl.store(out, left.to(kept), mask=inside)
            tl.store(out + half, right.to(kept), mask=inside)
