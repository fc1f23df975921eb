"""flex::CachedAttention as a plugin, and what both attention plugins share. Tensors: see the package docstring.

The last query goes through `attend` (one program per head and split of its keys) and `combine` (merges the splits, sums
the map); in a decode step it is the only one. The queries before it go through `append` and `prefill` first, over an
int8 cache with `dequantise` between, which makes a cache of floats in scratch memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from plugins.op import (
    ALIGNMENT,
    CACHE_SCALES,
    ITEMSIZE,
    TRITON_TYPES,
    Kernel,
    Launch,
    Op,
    Shapes,
    Tensor,
    blocks,
    in_int8,
    power_of_two,
)
from plugins.tiles import dtype_of, tiled

# How `attend` shares its work out, the same on every SM: `combine` must know it, and scratch memory depends on it. One
# tile of keys a program, by two warps, was measured on an H100: 9.5 us, where 128 keys by four warps took 10.3. On few
# multiprocessors as many warps are at work as before: there are twice as many programs, of half the warps.
SPLIT = 64  # keys of one program
PAGES_PER_SPLIT = 1
PARTS = "part", "part_max", "part_sum", "scores"  # what `attend` hands to `combine`
FLOATS = "float_key", "float_value"  # what `dequantise` hands to `prefill`
FOLDER = "plugins.cached_attention.kernel"


class CachedAttention(Op):
    name = "CachedAttention"
    attribute_names: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim", "grid", "int8_cache")
    defaults: ClassVar[dict[str, int]] = {"int8_cache": 0}
    # What an attribute keeps in 8 bits: inputs of this prefix, whose scales follow the others in this order.
    int8_stores: ClassVar[dict[str, str]] = {"int8_cache": "past"}
    inputs: tuple[Tensor, ...] = (
        Tensor("query", "model"),
        Tensor("key", "model"),
        Tensor("value", "model"),
        Tensor("past_key", "model"),
        Tensor("past_value", "model"),
        Tensor("positions", "int64"),
        Tensor("cos", "float32"),
        Tensor("sin", "float32"),
        Tensor("image_begin", "int64"),
    )
    outputs: tuple[Tensor, ...] = (
        Tensor("context", "model"),
        Tensor("present_key", "model"),
        Tensor("present_value", "model"),
        Tensor("map", "float32"),
    )
    in_place: Mapping[str, str] = {"present_key": "past_key", "present_value": "past_value"}

    # What flex::HierarchicalAttention changes: the kernel and its function; what it takes and is compiled for beside,
    # and what of that it does without.
    attend: ClassVar[tuple[str, str]] = ("attend", f"{FOLDER}:attend")
    page_parameters: tuple[str, ...] = ()
    page_constants: tuple[tuple[str, int], ...] = ()
    page_absent: tuple[str, ...] = ()

    def __init__(self, **attributes: int) -> None:
        super().__init__(**attributes)
        for attribute, prefix in self.int8_stores.items():
            if self.attributes[attribute]:
                inputs, scales = in_int8(self.inputs, prefix)
                self.inputs = *inputs, *scales
        if self.attributes["int8_cache"]:
            outputs, scales = in_int8(self.outputs, "present")
            self.outputs = *outputs, *scales
            scales_in_place = {f"{output}_scale": f"{store}_scale" for output, store in self.in_place.items()}
            self.in_place = {**self.in_place, **scales_in_place}

    def output_shapes(self, shapes: Shapes[Any]) -> dict[str, tuple[Any, ...]]:
        query, side = tuple(shapes["query"]), self.attributes["grid"]
        updated = {output: tuple(shapes[source]) for output, source in self.in_place.items()}
        return {"context": query, "map": (query[0], side, side), **updated}

    def make_kernels(self, dtype: str) -> tuple[Kernel, ...]:
        a = self.attributes
        heads, group = ("HEADS", a["heads"]), ("GROUP", a["heads"] // a["kv_heads"])
        width = ("HEAD_DIM", a["head_dim"]), ("WIDTH", max(16, power_of_two(a["head_dim"])))  # tensor cores take 16
        image = ("IMAGE_TOKENS", a["grid"] ** 2)
        splits = ("SPLIT", SPLIT), ("PAGES_PER_SPLIT", PAGES_PER_SPLIT)

        types = {tensor.name: f"*{TRITON_TYPES[tensor.kind(dtype)]}" for tensor in (*self.inputs, *self.outputs)}
        types |= {"cache_key": types["past_key"], "cache_value": types["past_value"], "page_count": "*i64"}
        types |= dict.fromkeys((*PARTS, *CACHE_SCALES), "*fp32") | dict.fromkeys(FLOATS, types["query"])
        types |= dict.fromkeys(("steps", "capacity", "page_total", "page_splits"), "i32")

        def kernel(
            name: str,
            function: str,
            parameters: tuple[str, ...],
            constants: tuple[tuple[str, int], ...],
            tile: tuple[str, ...],
            absent: tuple[str, ...] = (),
            types: Mapping[str, str] = types,
        ) -> Kernel:
            typed = tuple((each, types[each]) for each in parameters)
            return tiled(Kernel(name, function, typed, constants, absent=absent, tile=tile))

        int8 = a["int8_cache"]
        scales, absent = (CACHE_SCALES, ()) if int8 else ((), CACHE_SCALES)
        new, cache, turn = ("key", "value"), ("cache_key", "cache_value"), ("positions", "cos", "sin")
        int8_cache, kv_heads = ("INT8_CACHE", int8), ("KV_HEADS", a["kv_heads"])
        sizes = "steps", "capacity"
        append = kernel(
            "append",
            f"{FOLDER}:append",
            (*new, *cache, *scales, *turn, *sizes),
            (kv_heads, *width, int8_cache),
            ("ROWS",),
            absent,
        )
        dequantise = kernel(
            "dequantise",
            "plugins.cached_attention.int8_kernel:dequantise",
            (*cache, *CACHE_SCALES, "positions", *FLOATS, *sizes),
            (kv_heads, *width),
            ("ROWS",),
        )
        prefill = kernel(
            "prefill",
            f"{FOLDER}:prefill",
            ("query", *cache, *turn, "context", *sizes),
            (heads, group, *width),
            ("ROWS", "BLOCK"),
            types=types | dict.fromkeys(cache, types["query"]),  # an int8 cache as `dequantise` leaves it
        )
        return (
            *((append, dequantise, prefill) if int8 else (append, prefill)),
            kernel(
                *self.attend,
                ("query", *new, *cache, *scales, *turn, "image_begin", *self.page_parameters, *PARTS, *sizes),
                (heads, group, *width, image, splits[0], *self.page_constants, int8_cache),
                ("BLOCK", "SPLIT", "PAGES_PER_SPLIT"),
                (*self.page_absent, *absent),
            ),
            kernel(
                "combine",
                f"{FOLDER}:combine",
                (*PARTS, "positions", "image_begin", "page_count", "context", "map", *sizes, "page_splits"),
                (heads, *width, image, *splits, ("HEAD_BLOCK", min(32, power_of_two(a["heads"])))),
                ("SPLIT", "PAGES_PER_SPLIT", "HEAD_BLOCK", "MAP_BLOCK"),
            ),
        )

    # Scratch: for every row, head and split the unnormalised context, its maximum and sum; the scores of image tokens;
    # for a prompt over an int8 cache, that cache in the model's dtype.

    @staticmethod
    def _splits(combine: Kernel, shapes: Shapes[int]) -> tuple[int, int]:
        """Programs of `attend` per row and head: for the cache, for the pages."""
        page_total = shapes["page_lengths"][0] if "page_lengths" in shapes else 0
        keys, pages = combine.constant("SPLIT"), combine.constant("PAGES_PER_SPLIT")
        return blocks(shapes["past_key"][2], keys), blocks(page_total, pages)

    def _scratch(self, dtype: str, splits: int, shapes: Shapes[int]) -> dict[str, int]:
        """Bytes of each of PARTS, and of FLOATS where a launch needs them, rounded up to ALIGNMENT."""
        (batch, steps, _), heads = shapes["query"], self.attributes["heads"]
        partial = batch * heads * splits
        counts = partial * self.attributes["head_dim"], partial, partial, batch * heads * self.attributes["grid"] ** 2
        sizes = {name: 4 * count for name, count in zip(PARTS, counts, strict=True)}
        if self.attributes["int8_cache"] and steps > 1:
            sizes |= dict.fromkeys(FLOATS, ITEMSIZE[dtype] * math.prod(shapes["past_key"]))
        return {name: blocks(size, ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}

    def workspace(self, dtype: str, shapes: Shapes[int]) -> int:
        combine = self.kernels(dtype)[-1]
        return sum(self._scratch(dtype, sum(self._splits(combine, shapes)), shapes).values())

    def launches_of(
        self, kernels: Sequence[Kernel], shapes: Shapes[int], addresses: Mapping[str, int], workspace: int
    ) -> list[Launch]:
        a = self.attributes
        append, *dequantise, prefill, attend, combine = kernels
        (batch, steps, _), capacity = shapes["query"], shapes["past_key"][2]
        low, high = self._splits(combine, shapes)
        values = {
            "page_count": 0,  # which `combine` does not read without pages
            **addresses,
            "cache_key": addresses["past_key"],  # and present_key, see in_place
            "cache_value": addresses["past_value"],
            "steps": steps,
            "capacity": capacity,
            "page_splits": high,
        }
        if "page_lengths" in shapes:
            values["page_total"] = shapes["page_lengths"][0]
        at = workspace
        for name, size in self._scratch(dtype_of(append), low + high, shapes).items():
            values[name] = at
            at += size

        launches, before = [], steps - 1
        if before:
            launches.append(append.launch((blocks(before, append.constant("ROWS")), a["kv_heads"], batch), values))
            floats = values
            for kernel in dequantise:
                launches.append(
                    kernel.launch((blocks(capacity, kernel.constant("ROWS")), a["kv_heads"], batch), values)
                )
                floats = {**values, "cache_key": values["float_key"], "cache_value": values["float_value"]}
            launches.append(prefill.launch((blocks(before, prefill.constant("ROWS")), a["heads"], batch), floats))
        programs = a["heads"] + blocks(a["grid"] ** 2, combine.constant("MAP_BLOCK"))
        return [
            *launches,
            attend.launch((low + high, a["heads"], batch), values),
            combine.launch((programs, batch, 1), values),
        ]
