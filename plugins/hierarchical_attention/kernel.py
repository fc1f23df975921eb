"""flex::HierarchicalAttention as Triton kernels: `attend` of flex::CachedAttention with further programs for pages."""

import triton
import triton.language as tl

from plugins.cached_attention.kernel import EMPTY, attend_cache, load_last_query, read_tile, store_part


@triton.jit
def read_int8_tile(
    q, keys, values, key_scale, value_scale, slot, inside, largest, total, read,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`read_tile` of int8 keys and values: each token's step multiplies its score, and its weight on the value."""
    dim = tl.arange(0, WIDTH)[None, :]
    real = inside[:, None] & (dim < HEAD_DIM)
    tile = slot[:, None] * HEAD_DIM + dim
    k = tl.load(keys + tile, mask=real, other=0).to(tl.float32)
    step = tl.load(key_scale + slot, mask=inside, other=0.0)
    score = tl.where(inside, tl.sum(k * q[None, :], 1) * step, EMPTY)
    highest = tl.maximum(largest, tl.max(score, 0))
    weight = tl.where(inside, tl.exp(score - highest), 0.0)
    keep = tl.exp(largest - highest)
    v = tl.load(values + tile, mask=real, other=0).to(tl.float32)
    share = weight * tl.load(value_scale + slot, mask=inside, other=0.0)
    return highest, total * keep + tl.sum(weight, 0), read * keep + tl.sum(share[:, None] * v, 0)


@triton.jit
def attend_listed(
    query, cos, sin, page_key, page_value, page_lengths, pages, page_count, page_key_scale, page_value_scale,
    page_total, part, part_max, part_sum, position, row, head, split, splits, page_split, steps, kind: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGES_PER_SPLIT: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One program of `attend_pages`: the last query on its pages of the list, read in place. kind: dtype of the model.
    Without INT8 the scales are not looked at."""
    begin = page_split * PAGES_PER_SPLIT
    end = tl.minimum(begin + PAGES_PER_SPLIT, tl.load(page_count + row).to(tl.int32))
    if begin < end:
        q_at = ((row * steps + steps - 1) * HEADS + head) * HEAD_DIM
        q = load_last_query(query, cos, sin, position, q_at, HEAD_DIM, WIDTH, kind)
        store = (row * (HEADS // GROUP) + head // GROUP) * page_total
        largest = tl.full([], EMPTY, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        read = tl.zeros([WIDTH], tl.float32)
        for index in range(begin, end):
            page = tl.load(pages + row * page_total + index)
            length = tl.load(page_lengths + page).to(tl.int32)
            first = (store + page) * PAGE_SIZE * HEAD_DIM
            for start in range(0, PAGE_SIZE, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                if INT8:
                    first_scale = (store + page) * PAGE_SIZE
                    largest, total, read = read_int8_tile(
                        q, page_key + first, page_value + first, page_key_scale + first_scale,
                        page_value_scale + first_scale, slot, slot < length, largest, total, read, HEAD_DIM, WIDTH,
                    )  # fmt: skip
                else:
                    _, largest, total, read = read_tile(
                        q, page_key + first, page_value + first, slot, slot < length, largest, total, read,
                        HEAD_DIM, WIDTH,
                    )  # fmt: skip
        store_part(part, part_max, part_sum, row, head, split, splits, largest, total, read, HEADS, HEAD_DIM, WIDTH)


@triton.jit
def attend_pages(
    query,  # [B, S, H*hd]
    key,  # [B, S, Hkv*hd]
    value,
    cache_key,  # [B, Hkv, L, hd], the slot of the last token written
    cache_value,
    positions,  # [B, S] int64
    cos,  # [context, hd/2] float32
    sin,
    image_begin,  # [B] int64
    page_key,  # [B, Hkv, page_total, P, hd]
    page_value,
    page_lengths,  # [page_total] int64
    pages,  # [B, page_total] int64
    page_count,  # [B] int64
    page_total,
    part,  # as in plugins.cached_attention.kernel.attend, page splits after those of the cache
    part_max,
    part_sum,
    scores,
    steps,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    IMAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_SPLIT: tl.constexpr,
):
    """The last query on the cache and on the listed pages, read in place.

    Programs: (splits of the capacity, then of the page list; H; B); those past the position or the count do nothing.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(positions + row * steps + steps - 1).to(tl.int32)
    splits = tl.num_programs(0)
    cache_splits = (capacity + SPLIT - 1) // SPLIT
    if split < cache_splits:
        attend_cache(
            query, key, value, cache_key, cache_value, position, cos, sin, image_begin,
            part, part_max, part_sum, scores, row, head, split, splits, steps, capacity,
            HEADS, GROUP, HEAD_DIM, WIDTH, IMAGE_TOKENS, BLOCK, SPLIT,
        )  # fmt: skip
    else:
        attend_listed(
            query, cos, sin, page_key, page_value, page_lengths, pages, page_count, page_key, page_value,
            page_total, part, part_max, part_sum, position, row, head, split, splits, split - cache_splits, steps,
            cache_key.dtype.element_ty, HEADS, GROUP, HEAD_DIM, WIDTH, BLOCK, PAGE_SIZE, PAGES_PER_SPLIT, False,
        )  # fmt: skip


@triton.jit
def attend_int8_pages(
    query,  # as in attend_pages
    key,
    value,
    cache_key,
    cache_value,
    positions,
    cos,
    sin,
    image_begin,
    page_key,  # [B, Hkv, page_total, P, hd] int8
    page_value,
    page_lengths,
    pages,
    page_count,
    page_key_scale,  # [B, Hkv, page_total, P] float32
    page_value_scale,
    page_total,
    part,
    part_max,
    part_sum,
    scores,
    steps,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    IMAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_SPLIT: tl.constexpr,
):
    """`attend_pages` of int8 pages."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(positions + row * steps + steps - 1).to(tl.int32)
    splits = tl.num_programs(0)
    cache_splits = (capacity + SPLIT - 1) // SPLIT
    if split < cache_splits:
        attend_cache(
            query, key, value, cache_key, cache_value, position, cos, sin, image_begin,
            part, part_max, part_sum, scores, row, head, split, splits, steps, capacity,
            HEADS, GROUP, HEAD_DIM, WIDTH, IMAGE_TOKENS, BLOCK, SPLIT,
        )  # fmt: skip
    else:
        attend_listed(
            query, cos, sin, page_key, page_value, page_lengths, pages, page_count,
            page_key_scale, page_value_scale,
            page_total, part, part_max, part_sum, position, row, head, split, splits, split - cache_splits, steps,
            cache_key.dtype.element_ty, HEADS, GROUP, HEAD_DIM, WIDTH, BLOCK, PAGE_SIZE, PAGES_PER_SPLIT, True,
        )  # fmt: skip
