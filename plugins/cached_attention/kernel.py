"""flex::CachedAttention as Triton kernels; which runs when: launch.py. Tensors: see the package docstring.

B rows, S = `steps` new tokens each, L = `capacity`; hd = HEAD_DIM, WIDTH the power of two above it. All arithmetic is
in float32; rotated queries and keys are rounded to the model dtype, as in the reference. Addresses are 64-bit, indices
inside one row's cache or output 32-bit. INT8_CACHE: whether the cache is stored in 8 bits; without it the two
parameters that hold its steps are absent.
"""

import triton
import triton.language as tl

from plugins.cached_attention.int8_kernel import quantise

EMPTY = tl.constexpr(-1e30)  # maximum of no scores: finite, so that no difference is NaN
LOG2_E = tl.constexpr(1.4426950408889634)  # e^x is 2^(x * LOG2_E)


@triton.jit
def load_rotated(x, cos, sin, token, position, inside, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """One head of `x` for each of `token`, rotated to `position` (half-split layout): [tokens, WIDTH] float32.

    token: offsets of the head's first value; inside: which tokens are real (the others are 0).
    """
    dim = tl.arange(0, WIDTH)[None, :]
    half: tl.constexpr = HEAD_DIM // 2
    real = inside[:, None] & (dim < HEAD_DIM)
    partner = tl.where(dim < half, dim + half, dim - half)
    value = tl.load(x + token[:, None] + dim, mask=real, other=0.0).to(tl.float32)
    other = tl.load(x + token[:, None] + partner, mask=real, other=0.0).to(tl.float32)
    angle = position[:, None] * half + dim % half
    c = tl.load(cos + angle, mask=real, other=0.0)
    s = tl.load(sin + angle, mask=real, other=0.0)
    return value * c + tl.where(dim < half, -other, other) * s


@triton.jit
def append(
    key,  # [B, S, Hkv*hd]
    value,
    cache_key,  # [B, Hkv, L, hd], slots of all new tokens but the last written
    cache_value,
    past_key_scale,  # [B, Hkv, L] float32, of the same slots written
    past_value_scale,
    positions,  # [B, S] int64
    cos,  # [context, hd/2] float32
    sin,
    steps,
    capacity,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    INT8_CACHE: tl.constexpr,
):
    """Rotate and store the keys, store the values. Programs: (blocks of ROWS tokens, Hkv, B)."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    step = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = step < steps - 1
    position = tl.load(positions + row * steps + step, mask=inside, other=0).to(tl.int32)
    token = (step * KV_HEADS + head) * HEAD_DIM
    new = row * steps * KV_HEADS * HEAD_DIM
    turned = load_rotated(key + new, cos, sin, token, position, inside, HEAD_DIM, WIDTH)

    dim = tl.arange(0, WIDTH)[None, :]
    real = inside[:, None] & (dim < HEAD_DIM)
    first = (row * KV_HEADS + head) * capacity
    cache = first * HEAD_DIM
    slot = position[:, None] * HEAD_DIM + dim
    room = position < capacity
    stored = real & room[:, None]
    kept: tl.constexpr = cache_key.dtype.element_ty
    if INT8_CACHE:
        turned, key_step = quantise(turned)
        tl.store(past_key_scale + first + position, key_step, mask=inside & room)
    tl.store(cache_key + cache + slot, turned.to(kept), mask=stored)
    copied = tl.load(value + new + token[:, None] + dim, mask=real, other=0.0)
    if INT8_CACHE:
        copied, value_step = quantise(copied.to(tl.float32))
        tl.store(past_value_scale + first + position, value_step, mask=inside & room)
    tl.store(cache_value + cache + slot, copied.to(kept), mask=stored)


@triton.jit
def load_tile(store, tile, real, dim, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Keys or values at the offsets `tile` of one head: all of them with WHOLE, else the `real` ones, and 0."""
    if not WHOLE:
        return tl.load(store + tile, mask=real[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == WIDTH:
        return tl.load(store + tile)
    return tl.load(store + tile, mask=(dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def prefill_tile(
    q, keys, values, slot, position, last, largest, total, read,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Attend queries to the keys in `slot`: the running maximum, sum and weighted values. WHOLE: all see all of them.

    The exponent's base is 2: GPUs have no other, and its factor is multiplied in the same instruction that subtracts.
    """
    dim = tl.arange(0, WIDTH)
    tile = slot[:, None] * HEAD_DIM + dim[None, :]
    k = load_tile(keys, tile, slot <= last, dim, HEAD_DIM, WIDTH, WHOLE)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if not WHOLE:
        score = tl.where(slot[None, :] <= position[:, None], score, EMPTY)
    highest = tl.maximum(largest, tl.max(score, 1))
    weight = tl.exp2(score * LOG2_E - (highest * LOG2_E)[:, None])
    keep = tl.exp2((largest - highest) * LOG2_E)
    v = load_tile(values, tile, slot <= last, dim, HEAD_DIM, WIDTH, WHOLE)
    total = total * keep + tl.sum(weight, 1)
    read = tl.dot(weight.to(v.dtype), v, read * keep[:, None], input_precision="ieee")
    return highest, total, read


@triton.jit
def prefill(
    query,  # [B, S, H*hd]
    cache_key,  # [B, Hkv, L, hd]; of an int8 cache what `dequantise` made of it
    cache_value,
    positions,  # [B, S] int64
    cos,  # [context, hd/2] float32
    sin,
    context,  # [B, S, H*hd], all rows but the last of each batch row written
    steps,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Causal attention of ROWS queries, tile by tile (FlashAttention). Programs: (blocks of ROWS tokens, H, B).

    The last tokens, whose programs take longest, go first. Tiles that all queries see whole come before those that only
    some see, or see a part of.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    step = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    inside = step < steps - 1
    position = tl.load(positions + row * steps + step, mask=inside, other=0).to(tl.int32)
    token = (step * HEADS + head) * HEAD_DIM
    new = row * steps * HEADS * HEAD_DIM
    kind: tl.constexpr = cache_key.dtype.element_ty
    q = load_rotated(query + new, cos, sin, token, position, inside, HEAD_DIM, WIDTH)
    q = (q * (HEAD_DIM**-0.5)).to(kind)

    cache = (row * (HEADS // GROUP) + head // GROUP) * capacity * HEAD_DIM
    keys, values = cache_key + cache, cache_value + cache
    last = tl.minimum(tl.max(position, 0), capacity - 1)
    whole = (tl.min(tl.where(inside, position, last), 0) + 1) // BLOCK * BLOCK
    column = tl.arange(0, BLOCK)
    largest = tl.full([ROWS], EMPTY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    read = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, whole, BLOCK):
        largest, total, read = prefill_tile(
            q, keys, values, start + column, position, last, largest, total, read, HEAD_DIM, WIDTH, True
        )
    for start in range(whole, last + 1, BLOCK):
        largest, total, read = prefill_tile(
            q, keys, values, start + column, position, last, largest, total, read, HEAD_DIM, WIDTH, False
        )
    dim = tl.arange(0, WIDTH)
    result = (read / total[:, None]).to(kind)
    tl.store(context + new + token[:, None] + dim[None, :], result, mask=inside[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def load_last_query(query, cos, sin, position, offset, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, kind: tl.constexpr):
    """The rotated and scaled query at `offset`, rounded to the model dtype: [WIDTH] float32."""
    one = tl.full([1], 0, tl.int32)
    q = load_rotated(query + offset, cos, sin, one, one + position, one == 0, HEAD_DIM, WIDTH) * (HEAD_DIM**-0.5)
    return tl.sum(q.to(kind).to(tl.float32), 0)


@triton.jit
def read_tile(
    q, store, slot, inside, largest, total, read, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, INT8: tl.constexpr
):
    """Attend one query to the keys in `slot`: their scores, and the running maximum, sum and weighted values.

    store: where keys and values of one head begin, and with INT8 the steps of both: each token's step multiplies its
    score, and its weight on the value.
    """
    keys, values, key_scale, value_scale = store
    dim = tl.arange(0, WIDTH)[None, :]
    real = inside[:, None] & (dim < HEAD_DIM)
    tile = slot[:, None] * HEAD_DIM + dim
    k = tl.load(keys + tile, mask=real, other=0).to(tl.float32)
    if INT8:  # loaded here, it is on its way while the products are summed
        key_step = tl.load(key_scale + slot, mask=inside, other=0.0)
    product = tl.sum(k * q[None, :], 1)
    if INT8:
        product *= key_step
    score = tl.where(inside, product, EMPTY)
    highest = tl.maximum(largest, tl.max(score, 0))
    weight = tl.where(inside, tl.exp(score - highest), 0.0)
    keep = tl.exp(largest - highest)
    v = tl.load(values + tile, mask=real, other=0).to(tl.float32)
    share = weight
    if INT8:
        share = weight * tl.load(value_scale + slot, mask=inside, other=0.0)
    return score, highest, total * keep + tl.sum(weight, 0), read * keep + tl.sum(share[:, None] * v, 0)


@triton.jit
def store_part(
    parts, row, head, split, splits, largest, total, read,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What one program of `attend` found, for `combine`. parts: its part, part_max and part_sum."""
    part, part_max, part_sum = parts
    dim = tl.arange(0, WIDTH)
    index = (row * HEADS + head) * splits + split
    tl.store(part + index * HEAD_DIM + dim, read, mask=dim < HEAD_DIM)
    tl.store(part_max + index, largest)
    tl.store(part_sum + index, total)


@triton.jit
def attend_cache(
    query, new, cache, position, turn, image_begin, parts, scores, row, head, split, splits, steps, capacity,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    IMAGE_TOKENS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One program of `attend`: the last query on its split of the keys cached before it.

    new: (key, value); cache: (cache_key, cache_value, past_key_scale, past_value_scale), the scales None without INT8;
    turn: (cos, sin); parts: (part, part_max, part_sum). The first split also takes the last token's own key and value,
    straight from the inputs, and stores them: nobody reads that slot in this launch. With INT8 each head of a group
    takes them as they are stored.
    """
    key, value = new
    cache_key, cache_value, key_scale, value_scale = cache
    cos, sin = turn
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, position)
    if (begin < end) | (split == 0):
        kind: tl.constexpr = query.dtype.element_ty
        kv_heads: tl.constexpr = HEADS // GROUP
        q_at = ((row * steps + steps - 1) * HEADS + head) * HEAD_DIM
        q = load_last_query(query, cos, sin, position, q_at, HEAD_DIM, WIDTH, kind)
        dim = tl.arange(0, WIDTH)
        first = (row * kv_heads + head // GROUP) * capacity
        keys, values = cache_key + first * HEAD_DIM, cache_value + first * HEAD_DIM
        store = keys, values, None, None
        if INT8:
            store = keys, values, key_scale + first, value_scale + first
        image = scores + (row * HEADS + head) * IMAGE_TOKENS
        first_image = tl.load(image_begin + row).to(tl.int32)
        largest = tl.full([], EMPTY, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        read = tl.zeros([WIDTH], tl.float32)

        if split == 0:
            one = tl.full([1], 0, tl.int32)
            own = ((row * steps + steps - 1) * kv_heads + head // GROUP) * HEAD_DIM
            turned = load_rotated(key + own, cos, sin, one, one + position, one == 0, HEAD_DIM, WIDTH)
            own_value = tl.load(value + own + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
            stored = (head % GROUP == 0) & (position < capacity)  # one head of the group stores for all
            if INT8:
                turned, key_steps = quantise(turned)
                copied, value_steps = quantise(own_value[None, :])
                own_key, key_step = tl.sum(turned, 0), tl.sum(key_steps, 0)
                own_value, value_step = tl.sum(copied, 0), tl.sum(value_steps, 0)
                largest = tl.sum(own_key * q, 0) * key_step
                read = own_value * value_step
                if stored:
                    tl.store(key_scale + first + position, key_step)
                    tl.store(value_scale + first + position, value_step)
            else:
                own_key = tl.sum(turned.to(kind).to(tl.float32), 0)
                largest = tl.sum(own_key * q, 0)
                read = own_value
            total = tl.full([], 1.0, tl.float32)
            if stored:
                slot = position * HEAD_DIM + dim
                kept: tl.constexpr = cache_key.dtype.element_ty
                tl.store(keys + slot, own_key.to(kept), mask=dim < HEAD_DIM)
                tl.store(values + slot, own_value.to(kept), mask=dim < HEAD_DIM)
            token = position - first_image
            if (token >= 0) & (token < IMAGE_TOKENS):
                tl.store(image + token, largest)

        for start in range(begin, end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            score, largest, total, read = read_tile(
                q, store, slot, slot < end, largest, total, read, HEAD_DIM, WIDTH, INT8
            )
            token = slot - first_image
            tl.store(image + token, score, mask=(slot < end) & (token >= 0) & (token < IMAGE_TOKENS))
        store_part(parts, row, head, split, splits, largest, total, read, HEADS, HEAD_DIM, WIDTH)


@triton.jit
def attend(
    query,  # [B, S, H*hd]
    key,  # [B, S, Hkv*hd]
    value,
    cache_key,  # [B, Hkv, L, hd], the slot of the last token written
    cache_value,
    past_key_scale,  # [B, Hkv, L] float32, of the same slot written
    past_value_scale,
    positions,  # [B, S] int64
    cos,  # [context, hd/2] float32
    sin,
    image_begin,  # [B] int64
    part,  # [B, H, splits, hd] float32, written: weighted values of each split, its maximum its own
    part_max,  # [B, H, splits] float32, written
    part_sum,  # [B, H, splits] float32, written
    scores,  # [B, H, G*G] float32, written: of the image tokens up to the last token
    steps,
    capacity,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    IMAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    INT8_CACHE: tl.constexpr,
):
    """The last query on the cache. Programs: (splits of the capacity, H, B); those past the position do nothing."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(positions + row * steps + steps - 1).to(tl.int32)
    attend_cache(
        query, (key, value), (cache_key, cache_value, past_key_scale, past_value_scale), position, (cos, sin),
        image_begin, (part, part_max, part_sum), scores, row, head, split, tl.num_programs(0), steps, capacity,
        HEADS, GROUP, HEAD_DIM, WIDTH, IMAGE_TOKENS, BLOCK, SPLIT, INT8_CACHE,
    )  # fmt: skip


@triton.jit
def combine(
    part,  # as `attend` left them
    part_max,
    part_sum,
    scores,
    positions,  # [B, S] int64
    image_begin,  # [B] int64
    page_count,  # [B] int64; not read when there are no page splits
    context,  # [B, S, H*hd], the last row of each batch row written
    map,  # [B, G, G] float32, written
    steps,
    capacity,
    page_splits,  # splits after those of the cache
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    IMAGE_TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGES_PER_SPLIT: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    MAP_BLOCK: tl.constexpr,
):
    """Merge the splits. Programs: (H, then blocks of MAP_BLOCK image tokens; B)."""
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(positions + row * steps + steps - 1).to(tl.int32)
    cache_splits = (capacity + SPLIT - 1) // SPLIT
    splits = cache_splits + page_splits
    used = tl.maximum((position + SPLIT - 1) // SPLIT, 1)
    many = tl.arange(0, 16)

    if program < HEADS:  # one softmax over the cache and the pages
        used_pages = 0
        if page_splits > 0:
            listed = tl.load(page_count + row).to(tl.int32)
            used_pages = (listed + PAGES_PER_SPLIT - 1) // PAGES_PER_SPLIT
        first = (row * HEADS + program) * splits
        dim = tl.arange(0, WIDTH)
        largest = tl.full([], EMPTY, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        read = tl.zeros([WIDTH], tl.float32)
        for start in range(0, used + used_pages, 16):
            split = start + many
            there = split < used + used_pages
            index = first + tl.where(split < used, split, cache_splits + split - used)
            highs = tl.load(part_max + index, mask=there, other=EMPTY)
            highest = tl.maximum(largest, tl.max(highs, 0))
            weight = tl.where(there, tl.exp(highs - highest), 0.0)
            sums = tl.load(part_sum + index, mask=there, other=0.0)
            real = there[:, None] & (dim < HEAD_DIM)[None, :]
            values = tl.load(part + index[:, None] * HEAD_DIM + dim[None, :], mask=real, other=0.0)
            keep = tl.exp(largest - highest)
            total = total * keep + tl.sum(weight * sums, 0)
            read = read * keep + tl.sum(weight[:, None] * values, 0)
            largest = highest
        out = ((row * steps + steps - 1) * HEADS + program) * HEAD_DIM + dim
        tl.store(context + out, (read / total).to(context.dtype.element_ty), mask=dim < HEAD_DIM)
    else:  # the map: softmax weights over the cache alone, summed over heads
        token = (program - HEADS) * MAP_BLOCK + tl.arange(0, MAP_BLOCK)
        slot = tl.load(image_begin + row).to(tl.int32) + token
        seen = (token < IMAGE_TOKENS) & (slot <= position)
        weights = tl.zeros([MAP_BLOCK], tl.float32)
        for start in range(0, HEADS, HEAD_BLOCK):
            head = start + tl.arange(0, HEAD_BLOCK)
            first = (row * HEADS + head) * splits
            largest = tl.full([HEAD_BLOCK], EMPTY, tl.float32)
            total = tl.zeros([HEAD_BLOCK], tl.float32)
            for begin in range(0, used, 16):
                there = (head < HEADS)[:, None] & (begin + many < used)[None, :]
                index = first[:, None] + begin + many[None, :]
                highs = tl.load(part_max + index, mask=there, other=EMPTY)
                sums = tl.load(part_sum + index, mask=there, other=0.0)
                highest = tl.maximum(largest, tl.max(highs, 1))
                total = total * tl.exp(largest - highest) + tl.sum(tl.exp(highs - highest[:, None]) * sums, 1)
                largest = highest
            both = (head < HEADS)[:, None] & seen[None, :]
            score = tl.load(
                scores + (row * HEADS + head)[:, None] * IMAGE_TOKENS + token[None, :], mask=both, other=0.0
            )
            share = tl.exp(score - largest[:, None]) / total[:, None]
            weights += tl.sum(tl.where(both, share, 0.0), 0)
        tl.store(map + row * IMAGE_TOKENS + token, weights, mask=token < IMAGE_TOKENS)
