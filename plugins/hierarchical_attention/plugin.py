"""flex::HierarchicalAttention as a plugin: its `attend` has further programs, which read the listed pages in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from plugins.cached_attention.plugin import PAGES_PER_SPLIT, CachedAttention
from plugins.op import Tensor


class HierarchicalAttention(CachedAttention):
    name = "HierarchicalAttention"
    attribute_names = ("heads", "kv_heads", "head_dim", "page_size", "grid")
    inputs = (
        *CachedAttention.inputs,
        Tensor("page_key", "model"),
        Tensor("page_value", "model"),
        Tensor("page_lengths", "int64"),
        Tensor("pages", "int64"),
        Tensor("page_count", "int64"),
    )
    attend: ClassVar[tuple[str, str]] = ("attend_pages", "plugins.hierarchical_attention.kernel:attend_pages")

    def _page_parameters(self, model: str) -> tuple[tuple[str, str], ...]:
        stores = ("page_key", model), ("page_value", model)
        return (*stores, ("page_lengths", "*i64"), ("pages", "*i64"), ("page_count", "*i64"), ("page_total", "i32"))

    def _page_constants(self) -> tuple[tuple[str, int], ...]:
        return ("PAGE_SIZE", self.attributes["page_size"]), ("PAGES_PER_SPLIT", PAGES_PER_SPLIT)

    def _page_total(self, shapes: Sequence[Sequence[int]]) -> int:
        return shapes[11][0]
