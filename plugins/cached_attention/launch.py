"""flex::CachedAttention as a plugin, and what both attention plugins share. Tensors: see the package docstring.

The last query goes through `attend` (one program per head and split of its keys) and `combine` (merges the splits, sums
the map); in a decode step it is the only one. The queries before it go through `append` and `prefill` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from plugins.op import ALIGNMENT, TRITON_TYPES, Kernel, Launch, Op, Shapes, Tensor, blocks, power_of_two

BLOCK = 64  # keys of one tile
SPLIT = 128  # keys of one program of `attend`
PAGES_PER_SPLIT = 2
MAP_BLOCK = 64  # image tokens of one program of `combine`
APPEND_ROWS = 32  # tokens of one program of `append`
PARTS = "part", "part_max", "part_sum", "scores"  # what `attend` hands to `combine`
FOLDER = "plugins.cached_attention.kernel"


def prefill_tile(dtype: str, width: int) -> tuple[int, int]:
    """Queries and keys of one tile of `prefill`: what keeps it in registers, and its shared memory under 48 KB."""
    if dtype == "float32":  # no tensor cores: the products are unrolled
        return 16, 16
    return 64, 64 if width <= 64 else 32


class CachedAttention(Op):
    name = "CachedAttention"
    attribute_names: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim", "grid")
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

    # What flex::HierarchicalAttention changes: the kernel and its function; what it takes and is compiled for beside.
    attend: ClassVar[tuple[str, str]] = ("attend", f"{FOLDER}:attend")
    page_parameters: tuple[str, ...] = ()
    page_constants: tuple[tuple[str, int], ...] = ()
    absent: tuple[str, ...] = ()

    def output_shapes(self, shapes: Shapes[Any]) -> dict[str, tuple[Any, ...]]:
        query, cache, side = tuple(shapes["query"]), tuple(shapes["past_key"]), self.attributes["grid"]
        return {"context": query, "present_key": cache, "present_value": cache, "map": (query[0], side, side)}

    def kernels(self, dtype: str) -> tuple[Kernel, ...]:
        a = self.attributes
        heads, group = ("HEADS", a["heads"]), ("GROUP", a["heads"] // a["kv_heads"])
        width = ("HEAD_DIM", a["head_dim"]), ("WIDTH", max(16, power_of_two(a["head_dim"])))  # tensor cores take 16
        image = ("IMAGE_TOKENS", a["grid"] ** 2)
        rows, keys = prefill_tile(dtype, width[1][1])

        types = {tensor.name: f"*{TRITON_TYPES[tensor.kind(dtype)]}" for tensor in (*self.inputs, *self.outputs)}
        types |= {"cache_key": types["past_key"], "cache_value": types["past_value"], "page_count": "*i64"}
        types |= dict.fromkeys(PARTS, "*fp32")
        types |= dict.fromkeys(("steps", "capacity", "page_total", "page_splits"), "i32")

        def kernel(
            name: str,
            function: str,
            parameters: tuple[str, ...],
            constants: tuple[tuple[str, int], ...],
            absent: tuple[str, ...] = (),
        ) -> Kernel:
            return Kernel(name, function, tuple((each, types[each]) for each in parameters), constants, absent=absent)

        new, cache, turn = ("key", "value"), ("cache_key", "cache_value"), ("positions", "cos", "sin")
        sizes = "steps", "capacity"
        return (
            kernel(
                "append",
                f"{FOLDER}:append",
                (*new, *cache, *turn, *sizes),
                (("KV_HEADS", a["kv_heads"]), *width, ("ROWS", APPEND_ROWS)),
            ),
            kernel(
                "prefill",
                f"{FOLDER}:prefill",
                ("query", *cache, *turn, "context", *sizes),
                (heads, group, *width, ("ROWS", rows), ("BLOCK", keys)),
            ),
            kernel(
                *self.attend,
                ("query", *new, *cache, *turn, "image_begin", *self.page_parameters, *PARTS, *sizes),
                (heads, group, *width, image, ("BLOCK", BLOCK), ("SPLIT", SPLIT), *self.page_constants),
                self.absent,
            ),
            kernel(
                "combine",
                f"{FOLDER}:combine",
                (*PARTS, "positions", "image_begin", "page_count", "context", "map", *sizes, "page_splits"),
                (
                    heads,
                    *width,
                    image,
                    ("SPLIT", SPLIT),
                    ("PAGES_PER_SPLIT", PAGES_PER_SPLIT),
                    ("HEAD_BLOCK", min(32, power_of_two(a["heads"]))),
                    ("MAP_BLOCK", MAP_BLOCK),
                ),
            ),
        )

    # Scratch: for every row, head and split the unnormalised context, its maximum and sum; the scores of image tokens.

    def _splits(self, shapes: Shapes[int]) -> tuple[int, int]:
        """Programs of `attend` per row and head: for the cache, for the pages."""
        page_total = shapes["page_lengths"][0] if "page_lengths" in shapes else 0
        return blocks(shapes["past_key"][2], SPLIT), blocks(page_total, PAGES_PER_SPLIT)

    def _scratch(self, shapes: Shapes[int]) -> dict[str, int]:
        """Bytes of each of PARTS, rounded up to ALIGNMENT."""
        batch, heads = shapes["query"][0], self.attributes["heads"]
        partial = batch * heads * sum(self._splits(shapes))
        counts = partial * self.attributes["head_dim"], partial, partial, batch * heads * self.attributes["grid"] ** 2
        return {name: blocks(4 * count, ALIGNMENT) * ALIGNMENT for name, count in zip(PARTS, counts, strict=True)}

    def workspace(self, shapes: Shapes[int]) -> int:
        return sum(self._scratch(shapes).values())

    def launches(self, dtype: str, shapes: Shapes[int], addresses: Mapping[str, int], workspace: int) -> list[Launch]:
        a = self.attributes
        append, prefill, attend, combine = self.kernels(dtype)
        (batch, steps, _), capacity = shapes["query"], shapes["past_key"][2]
        low, high = self._splits(shapes)
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
        for name, size in self._scratch(shapes).items():
            values[name] = at
            at += size

        launches, before = [], steps - 1
        if before:
            prefill_rows = dict(prefill.constants)["ROWS"]
            launches = [
                append.launch((blocks(before, APPEND_ROWS), a["kv_heads"], batch), values),
                prefill.launch((blocks(before, prefill_rows), a["heads"], batch), values),
            ]
        programs = a["heads"] + blocks(a["grid"] ** 2, MAP_BLOCK)
        return [
            *launches,
            attend.launch((low + high, a["heads"], batch), values),
            combine.launch((programs, batch, 1), values),
        ]
