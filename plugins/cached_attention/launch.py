"""flex::CachedAttention as a plugin, and what both attention plugins share. Tensors: see the package docstring.

The last query goes through `attend` (one program per head and split of its keys) and `combine` (merges the splits, sums
the map); in a decode step it is the only one. The queries before it go through `append` and `prefill` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from plugins.op import TRITON_TYPES, Kernel, Launch, Op, Tensor, blocks, power_of_two

BLOCK = 64  # keys of one tile
SPLIT = 128  # keys of one program of `attend`
PAGES_PER_SPLIT = 2
MAP_BLOCK = 64  # image tokens of one program of `combine`
APPEND_ROWS = 32  # tokens of one program of `append`
FOLDER = "plugins.cached_attention.kernel"


def prefill_tile(dtype: str, width: int) -> tuple[int, int]:
    """Queries and keys of one tile of `prefill`: what keeps it in registers, and its shared memory under 48 KB."""
    if dtype == "float32":  # no tensor cores: the products are unrolled
        return 16, 16
    return 64, 64 if width <= 64 else 32


class CachedAttention(Op):
    name = "CachedAttention"
    attribute_names = ("heads", "kv_heads", "head_dim", "grid")
    inputs = (
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
    outputs = (
        Tensor("context", "model"),
        Tensor("present_key", "model"),
        Tensor("present_value", "model"),
        Tensor("map", "float32"),
    )
    in_place: ClassVar[dict[int, int]] = {1: 3, 2: 4}

    def output_shapes(self, shapes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        query, cache, side = tuple(shapes[0]), tuple(shapes[3]), self.attributes["grid"]
        return [query, cache, cache, (query[0], side, side)]

    def kernels(self, dtype: str) -> tuple[Kernel, ...]:
        a, model = self.attributes, f"*{TRITON_TYPES[dtype]}"
        heads, group = ("HEADS", a["heads"]), ("GROUP", a["heads"] // a["kv_heads"])
        width = ("HEAD_DIM", a["head_dim"]), ("WIDTH", max(16, power_of_two(a["head_dim"])))  # tensor cores take 16
        image = ("IMAGE_TOKENS", a["grid"] ** 2)
        query, *new = ((name, model) for name in ("query", "key", "value", "cache_key", "cache_value"))
        turn = ("positions", "*i64"), ("cos", "*fp32"), ("sin", "*fp32")
        parts = tuple((name, "*fp32") for name in ("part", "part_max", "part_sum", "scores"))
        sizes = ("steps", "i32"), ("capacity", "i32")
        begin, context = ("image_begin", "*i64"), ("context", model)
        append = Kernel(
            "append",
            f"{FOLDER}:append",
            (*new, *turn, *sizes),
            (("KV_HEADS", a["kv_heads"]), *width, ("ROWS", APPEND_ROWS)),
        )
        rows, keys = prefill_tile(dtype, width[1][1])
        prefill = Kernel(
            "prefill",
            f"{FOLDER}:prefill",
            (query, *new[2:], *turn, context, *sizes),
            (heads, group, *width, ("ROWS", rows), ("BLOCK", keys)),
        )
        attend = Kernel(
            self.attend[0],
            self.attend[1],
            (query, *new, *turn, begin, *self._page_parameters(model), *parts, *sizes),
            (heads, group, *width, image, ("BLOCK", BLOCK), ("SPLIT", SPLIT), *self._page_constants()),
        )
        combine = Kernel(
            "combine",
            f"{FOLDER}:combine",
            (*parts, turn[0], begin, ("page_count", "*i64"), context, ("map", "*fp32"), *sizes, ("page_splits", "i32")),
            (
                heads,
                *width,
                image,
                ("SPLIT", SPLIT),
                ("PAGES_PER_SPLIT", PAGES_PER_SPLIT),
                ("HEAD_BLOCK", min(32, power_of_two(a["heads"]))),
                ("MAP_BLOCK", MAP_BLOCK),
            ),
        )
        return append, prefill, attend, combine

    # What flex::HierarchicalAttention changes.

    attend: ClassVar[tuple[str, str]] = ("attend", f"{FOLDER}:attend")  # the kernel and its function

    def _page_parameters(self, model: str) -> tuple[tuple[str, str], ...]:
        return ()

    def _page_constants(self) -> tuple[tuple[str, int], ...]:
        return ()

    def _page_total(self, shapes: Sequence[Sequence[int]]) -> int:
        return 0

    # Scratch: for every row, head and split the unnormalised context, its maximum and sum; the scores of image tokens.

    def _splits(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Programs of `attend` per row and head: for the cache, for the pages."""
        return blocks(shapes[3][2], SPLIT), blocks(self._page_total(shapes), PAGES_PER_SPLIT)

    def _scratch(self, shapes: Sequence[Sequence[int]]) -> list[int]:
        """Bytes of part, part_max, part_sum and scores, each rounded up to 256."""
        batch, heads = shapes[0][0], self.attributes["heads"]
        partial = batch * heads * sum(self._splits(shapes))
        counts = partial * self.attributes["head_dim"], partial, partial, batch * heads * self.attributes["grid"] ** 2
        return [blocks(4 * count, 256) * 256 for count in counts]

    def workspace(self, shapes: Sequence[Sequence[int]]) -> int:
        return sum(self._scratch(shapes))

    def launches(
        self,
        dtype: str,
        shapes: Sequence[Sequence[int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
    ) -> list[Launch]:
        a = self.attributes
        append, prefill, attend, combine = self.kernels(dtype)
        (batch, steps, _), capacity = shapes[0], shapes[3][2]
        query, key, value, past_key, past_value, positions, cos, sin, begin, *pages = inputs
        context, _, _, map = outputs  # present_key and present_value are past_key and past_value: see in_place
        cache, turn, sizes = (past_key, past_value), (positions, cos, sin), (steps, capacity)
        parts, at = [], workspace
        for size in self._scratch(shapes):
            parts.append(at)
            at += size

        launches, before = [], steps - 1
        if before:
            append_grid = blocks(before, APPEND_ROWS), a["kv_heads"], batch
            prefill_grid = blocks(before, dict(prefill.constants)["ROWS"]), a["heads"], batch
            launches = [
                Launch(append, append_grid, (key, value, *cache, *turn, *sizes)),
                Launch(prefill, prefill_grid, (query, *cache, *turn, context, *sizes)),
            ]
        low, high = self._splits(shapes)
        programs = a["heads"] + blocks(a["grid"] ** 2, MAP_BLOCK)
        page_total, page_count = ([self._page_total(shapes)], pages[4]) if pages else ([], 0)
        return [
            *launches,
            Launch(
                attend,
                (low + high, a["heads"], batch),
                (query, key, value, *cache, *turn, begin, *pages, *page_total, *parts, *sizes),
            ),
            Launch(combine, (programs, batch, 1), (*parts, positions, begin, page_count, context, map, *sizes, high)),
        ]
