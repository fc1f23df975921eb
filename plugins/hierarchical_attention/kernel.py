"""flex::HierarchicalAttention as a Triton kernel: `attend` of flex::CachedAttention with further programs for pages."""

import triton
import triton.language as tl

from plugins.cached_attention.kernel import EMPTY, attend_cache, load_last_query, read_tile, store_part


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
        begin = (split - cache_splits) * PAGES_PER_SPLIT
        end = tl.minimum(begin + PAGES_PER_SPLIT, tl.load(page_count + row).to(tl.int32))
        if begin < end:
            kind: tl.constexpr = cache_key.dtype.element_ty
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
                    _, largest, total, read = read_tile(
                        q, page_key + first, page_value + first, slot, slot < length, largest, total, read,
                        HEAD_DIM, WIDTH,
                    )  # fmt: skip
            store_part(part, part_max, part_sum, row, head, split, splits, largest, total, read, HEADS, HEAD_DIM, WIDTH)
