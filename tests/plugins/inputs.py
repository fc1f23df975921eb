"""Inputs of the ops at any size, by name, with poison wherever an op must not look; and the cases that tests try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from plugins.cached_attention.launch import CachedAttention
from plugins.cached_attention.reference import quantise
from plugins.hierarchical_attention.launch import HierarchicalAttention
from plugins.op import CACHE_SCALES, Op
from plugins.project_pages.launch import ProjectPages

Arrays = dict[str, np.ndarray]
CACHE = "past_key", "past_value"


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    """As numpy holds it; bfloat16 as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The inverse of `to_bits`."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def rounded(op: Op, dtype: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Those of float32 `arrays` that are inputs of the op, in order; what the model has in its own dtype, as that."""
    return {
        tensor.name: to_bits(torch.from_numpy(arrays[tensor.name]).to(getattr(torch, dtype)))
        if tensor.dtype == "model"
        else arrays[tensor.name]
        for tensor in op.inputs
    }


@dataclass(frozen=True)
class Sizes:
    """Of the attention ops: rows of `steps` new tokens after `past` cached ones; `counts` pages listed of `pages` of
    `page_size` tokens."""

    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    grid: int = 6
    pages: int = 9
    page_size: int = 4
    capacity: int = 60
    steps: int = 1
    past: tuple[int, ...] = (41,)
    counts: tuple[int, ...] = (2,)
    begin: tuple[int, ...] = (3,)
    short_pages: bool = False

    def cached(self, int8_cache: int = 0) -> CachedAttention:
        """The op without pages."""
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "grid": self.grid}
        return CachedAttention(**sizes, int8_cache=int8_cache)

    def hierarchical(self, int8_pages: int = 0, int8_cache: int = 0) -> HierarchicalAttention:
        """The op with pages."""
        attributes = self.cached(int8_cache).attributes
        return HierarchicalAttention(**attributes, page_size=self.page_size, int8_pages=int8_pages)


ATTENTION_CASES = {
    "decode": Sizes(),
    "no page": Sizes(counts=(0,)),
    "all pages": Sizes(counts=(9,)),
    "short pages": Sizes(counts=(5,), short_pages=True),
    "pages of more than a tile": Sizes(page_size=70, pages=4, counts=(3,), short_pages=True),
    "first token": Sizes(past=(0,), begin=(0,)),
    "no room left": Sizes(past=(59,), counts=(1,)),
    "split boundary": Sizes(capacity=300, past=(256,), counts=(3,)),
    "ragged last split": Sizes(capacity=300, past=(257,), counts=(9,), begin=(120,)),
    "image at the end": Sizes(past=(41,), begin=(24,)),
    "grouped heads": Sizes(heads=8, kv_heads=2),
    "six heads": Sizes(heads=6, kv_heads=6, past=(41, 17), counts=(2, 4), begin=(3, 1)),
    "head size 96": Sizes(head_dim=96),
    "batch": Sizes(past=(41, 0, 17), counts=(2, 0, 9), begin=(3, 0, 1), kv_heads=2, short_pages=True),
    "prefill": Sizes(past=(20,), steps=7),
    "prefill from nothing": Sizes(past=(0,), steps=5, counts=(0,)),
    "prefill of several tiles": Sizes(capacity=170, past=(3,), steps=150, begin=(90,), counts=(4,)),
    "prefill, batch, grouped": Sizes(heads=8, kv_heads=2, past=(4, 30), steps=9, counts=(0, 3), begin=(0, 2)),
    "prefill, head size 96": Sizes(head_dim=96, past=(5,), steps=6),
}
INT8_ATTENTION_CASES = {
    name: ATTENTION_CASES[name]
    for name in (
        "decode", "no page", "all pages", "short pages", "pages of more than a tile", "grouped heads", "six heads",
        "head size 96", "batch", "prefill, batch, grouped",
    )
}  # fmt: skip
INT8_CACHE_CASES = {
    name: ATTENTION_CASES[name]
    for name in (
        "decode", "no page", "first token", "no room left", "ragged last split", "six heads", "head size 96", "batch",
        "prefill", "prefill from nothing", "prefill of several tiles", "prefill, batch, grouped",
        "prefill, head size 96",
    )
}  # fmt: skip
INT8_CACHE_CASES |= {
    "head size 64, group of 4": Sizes(heads=8, kv_heads=2, head_dim=64),
    "prefill, head size 128, group of 8": Sizes(heads=8, kv_heads=1, head_dim=128, past=(20,), steps=8),
}


def attention_inputs(sizes: Sizes, seed: int = 0, poison: float = np.nan) -> Arrays:
    """Inputs of flex::HierarchicalAttention, float32, among which are those of flex::CachedAttention.

    `poison` fills cache slots after the new tokens, pages that are not listed, and the ends of short pages.
    """
    rng, s = np.random.default_rng(seed), sizes
    batch, past = len(s.past), np.array(s.past, np.int64)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    cache = [normal(batch, s.kv_heads, s.capacity, s.head_dim) for _ in range(2)]
    store = [normal(batch, s.kv_heads, s.pages, s.page_size, s.head_dim) for _ in range(2)]
    lengths = np.full(s.pages, s.page_size, np.int64)
    if s.short_pages:
        lengths[::2] = s.page_size - 1
    listed = np.stack([rng.permutation(s.pages) for _ in range(batch)]).astype(np.int64)
    for half, pages in zip(cache, store, strict=True):
        for row in range(batch):
            half[row, :, past[row] + s.steps :] = poison
            pages[row, :, listed[row, s.counts[row] :]] = poison
        for page, length in enumerate(lengths):
            pages[:, :, page, length:] = poison
    angle = np.outer(np.arange(s.capacity), 1 / 10000 ** (np.arange(0, s.head_dim, 2) / s.head_dim))
    return {
        "query": normal(batch, s.steps, s.heads * s.head_dim),
        "key": normal(batch, s.steps, s.kv_heads * s.head_dim),
        "value": normal(batch, s.steps, s.kv_heads * s.head_dim),
        "past_key": cache[0],
        "past_value": cache[1],
        "positions": past[:, None] + np.arange(s.steps),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
        "image_begin": np.array(s.begin, np.int64),
        "page_key": store[0],
        "page_value": store[1],
        "page_lengths": lengths,
        "pages": listed,
        "page_count": np.array(s.counts, np.int64),
    }


def int8_attention_inputs(sizes: Sizes, dtype: str, poison: float = 1e3) -> Arrays:
    """Inputs of flex::HierarchicalAttention with int8 pages; `poison`: of whatever an op must not look at."""
    arrays = attention_inputs(sizes, poison=poison)
    whole, steps = in_int8(arrays["page_key"], arrays["page_value"])
    pages = dict(zip(("page_key", "page_value"), whole, strict=True))
    scales = dict(zip(("page_key_scale", "page_value_scale"), steps, strict=True))
    return rounded(sizes.hierarchical(int8_pages=1), dtype, arrays | pages | scales)


def with_int8_cache(arrays: Arrays) -> Arrays:
    """Inputs of an attention op, its pages stored however, as those of the same op on an int8 cache. Poison of the
    cache stays poison: a step is NaN where a value was, and 1 / 127 of it where that was a number."""
    whole, steps = in_int8(*(arrays[name] for name in CACHE))
    return arrays | dict(zip((*CACHE, *CACHE_SCALES), (*whole, *steps), strict=True))


def on_int8_cache(sizes: Sizes, dtype: str, seed: int = 0, poison: float = 1e3) -> Iterator[tuple[Op, Arrays]]:
    """Attention over an int8 cache without pages, with pages of floats and with int8 pages, and inputs of each,
    among which may be more; `poison`: of whatever an op must not look at."""
    for op in sizes.cached(int8_cache=1), sizes.hierarchical(int8_cache=1):
        floats = rounded(sizes.hierarchical(), dtype, attention_inputs(sizes, seed=seed, poison=poison))
        yield op, with_int8_cache(floats)
    int8_pages = int8_attention_inputs(sizes, dtype, poison=poison)
    yield sizes.hierarchical(int8_pages=1, int8_cache=1), with_int8_cache(int8_pages)


def in_int8(*stores: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each store in 8 bits, and the steps of each."""
    whole, steps = zip(*(quantise(to_torch(store)) for store in stores), strict=True)
    return [each.numpy() for each in whole], [each.numpy() for each in steps]


PROJECTION_CASES = {
    "some": {"counts": (4,), "done": (1,)},
    "nothing listed": {"counts": (0,), "done": (3,)},
    "nothing new": {"counts": (3,), "done": (9,)},
    "all": {"counts": (9,), "done": (0,)},
    "batch": {"counts": (2, 0, 9), "done": (0, 4, 5)},
    "grouped heads, odd sizes": {"counts": (5,), "done": (0,), "head_dim": 24, "kv_heads": 1, "page_size": 5},
    "long pages": {"counts": (2,), "done": (0,), "page_size": 70, "hidden": 40},
}


def projection_inputs(
    counts: tuple[int, ...],
    done: tuple[int, ...],
    head_dim: int = 16,
    kv_heads: int = 2,
    page_size: int = 4,
    hidden: int = 48,
    pages: int = 9,
    poison: float = np.nan,
) -> Arrays:
    """Inputs of flex::ProjectPages, float32; of each row a random `done` pages are projected, all others hold
    `poison`."""
    rng, batch = np.random.default_rng(3), len(counts)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    angle = rng.random((batch, pages, page_size, head_dim // 2), np.float32) * 6
    stores = [normal(batch, kv_heads, pages, page_size, head_dim) for _ in range(2)]
    projected = np.zeros((batch, pages), np.int64)
    for row, number in enumerate(done):
        projected[row, rng.permutation(pages)[:number]] = 1
        for store in stores:
            store[row, :, projected[row] == 0] = poison
    listed = np.stack([rng.permutation(pages) for _ in range(batch)]).astype(np.int64)
    weights = [normal(kv_heads * head_dim, hidden) / hidden**0.5 for _ in range(2)]
    return {
        "features": normal(batch, pages, page_size, hidden),
        "key_weight": weights[0],
        "value_weight": weights[1],
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "page_key": stores[0],
        "page_value": stores[1],
        "projected": projected,
        "pages": listed,
        "page_count": np.array(counts),
    }


def projection_op(arrays: Mapping[str, np.ndarray]) -> ProjectPages:
    """The op that takes these inputs."""
    _, kv_heads, _, page_size, head_dim = arrays["page_key"].shape
    return ProjectPages(
        hidden=arrays["features"].shape[-1],
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        cells=round(arrays["pages"].shape[1] ** 0.5),
        int8_pages=int("page_key_scale" in arrays),
        page_slots=int("slots" in arrays),
    )


def in_slots(arrays: Mapping[str, np.ndarray], count: int) -> Arrays:
    """The same store in `count` slots: each page that it holds or is to hold has one, in no order; the rest is NaN, or
    of integers 77. Of other pages the slot is far out of range."""
    rng, pages, projected = np.random.default_rng(5), arrays["pages"], arrays["projected"]
    slots = np.full(pages.shape, 1 << 20, np.int64)
    stores = {
        name: np.full(
            (*store.shape[:2], count, *store.shape[3:]), 77 if store.dtype == np.int8 else np.nan, store.dtype
        )
        for name, store in arrays.items()
        if name.startswith("page_") and store.ndim > 3
    }
    for row, held in enumerate(projected == 1):
        held = held.copy()
        held[pages[row, : arrays["page_count"][row]]] = True
        slots[row, held] = rng.permutation(count)[: held.sum()]
        there = projected[row] == 1
        for name, store in stores.items():
            store[row][:, slots[row, there]] = arrays[name][row][:, there]
    return {**arrays, **stores, "slots": slots}


def int8_projection_inputs(dtype: str, poison: float = np.nan, **case: object) -> Arrays:
    """Inputs of flex::ProjectPages with an int8 store, whose scales are `poison` where nothing is projected."""
    plain = projection_inputs(**case, poison=0.0)
    arrays = rounded(projection_op(plain), dtype, plain)
    whole, steps = in_int8(arrays["page_key"], arrays["page_value"])
    for step in steps:
        np.moveaxis(step, 1, 2)[arrays["projected"] == 0] = poison
    pages = {"page_key": whole[0], "page_value": whole[1]}
    return arrays | pages | {"page_key_scale": steps[0], "page_value_scale": steps[1]}
