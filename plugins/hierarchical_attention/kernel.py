"""flex::HierarchicalAttention as a Triton kernel: `attend` of flex::CachedAttention with further programs for pages."""

import triton
import triton.language as tl

from plugins.cached_attention.kernel import EMPTY, attend_cache, load_last_query, read_tile, store_part


@triton.jit
def attend_listed(
    query, turn, store, page_lengths, pages, page_count, page_total, parts, position, row, head, split, splits,
    page_split, steps, kind: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGES_PER_SPLIT: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One program of `attend_pages`: the last query on its pages of the list, read in place.

    turn: (cos, sin); store: (page_key, page_value, page_key_scale, page_value_scale), the scales None without INT8;
    parts: (part, part_max, part_sum); kind: dtype of the model.
    """
    page_key, page_value, page_key_scale, page_value_scale = store
    cos, sin = turn
    begin = page_split * PAGES_PER_SPLIT
    end = tl.minimum(begin + PAGES_PER_SPLIT, tl.load(page_count + row).to(tl.int32))
    if begin < end:
        q_at = ((row * steps + steps - 1) * HEADS + head) * HEAD_DIM
        q = load_last_query(query, cos, sin, position, q_at, HEAD_DIM, WIDTH, kind)
        head_pages = (row * (HEADS // GROUP) + head // GROUP) * page_total
        largest = tl.full([], EMPTY, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        read = tl.zeros([WIDTH], tl.float32)
        for index in range(begin, end):
            page = tl.load(pages + row * page_total + index)
            length = tl.load(page_lengths + page).to(tl.int32)
            first = (head_pages + page) * PAGE_SIZE
            here = page_key + first * HEAD_DIM, page_value + first * HEAD_DIM, None, None
            if INT8:
                here = here[0], here[1], page_key_scale + first, page_value_scale + first
            for start in range(0, PAGE_SIZE, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                _, largest, total, read = read_tile(
                    q, here, slot, slot < length, largest, total, read, HEAD_DIM, WIDTH, INT8
                )
        store_part(parts, row, head, split, splits, largest, total, read, HEADS, HEAD_DIM, WIDTH)


@triton.jit
def attend_pages(
    query,  # [B, S, H*hd]
    key,  # [B, S, Hkv*hd]
    value,
    cache_key,  # [B, Hkv, L, hd], the slot of the last token written
    cache_value,
    past_key_scale,  # [B, Hkv, L] float32, of the same slot written; absent without INT8_CACHE
    past_value_scale,
    positions,  # [B, S] int64
    cos,  # [context, hd/2] float32
    sin,
    image_begin,  # [B] int64
    page_key,  # [B, Hkv, page_total, P, hd]; with INT8_PAGES int8
    page_value,
    page_lengths,  # [page_total] int64
    pages,  # [B, page_total] int64
    page_count,  # [B] int64
    page_key_scale,  # [B, Hkv, page_total, P] float32; absent without INT8_PAGES
    page_value_scale,
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
    INT8_PAGES: tl.constexpr,  # whether the pages are stored in 8 bits
    INT8_CACHE: tl.constexpr,  # whether the cache is
):
    """The last query on the cache and on the listed pages, read in place.

    Programs: (splits of the capacity, then of the page list; H; B); those past the position or the count do nothing.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(positions + row * steps + steps - 1).to(tl.int32)
    splits = tl.num_programs(0)
    cache_splits = (capacity + SPLIT - 1) // SPLIT
    turn = cos, sin
    parts = part, part_max, part_sum
    if split < cache_splits:
        attend_cache(
            query, (key, value), (cache_key, cache_value, past_key_scale, past_value_scale), position, turn,
            image_begin, parts, scores, row, head, split, splits, steps, capacity,
            HEADS, GROUP, HEAD_DIM, WIDTH, IMAGE_TOKENS, BLOCK, SPLIT, INT8_CACHE,
        )  # fmt: skip
    else:
        attend_listed(
            query, turn, (page_key, page_value, page_key_scale, page_value_scale), page_lengths, pages, page_count,
            page_total, parts, position, row, head, split, splits, split - cache_splits, steps,
            query.dtype.element_ty, HEADS, GROUP, HEAD_DIM, WIDTH, BLOCK, PAGE_SIZE, PAGES_PER_SPLIT, INT8_PAGES,
        )  # fmt: skip
