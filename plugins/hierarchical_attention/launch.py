"""flex::HierarchicalAttention as a plugin: its `attend` has further programs, which read the listed pages in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from plugins.cached_attention.launch import PAGES_PER_SPLIT, CachedAttention
from plugins.op import Tensor

FOLDER = "plugins.hierarchical_attention.kernel"


class HierarchicalAttention(CachedAttention):
    name = "HierarchicalAttention"
    attribute_names = ("heads", "kv_heads", "head_dim", "page_size", "grid", "int8_pages")
    defaults: ClassVar[dict[str, int]] = {"int8_pages": 0}
    inputs = (
        *CachedAttention.inputs,
        Tensor("page_key", "model"),
        Tensor("page_value", "model"),
        Tensor("page_lengths", "int64"),
        Tensor("pages", "int64"),
        Tensor("page_count", "int64"),
    )
    attend: ClassVar[tuple[str, str]] = ("attend_pages", f"{FOLDER}:attend_pages")

    def __init__(self, **attributes: int) -> None:
        super().__init__(**attributes)
        if self.attributes["int8_pages"]:
            self.inputs = (
                *(
                    replace(each, dtype="int8") if each.name in ("page_key", "page_value") else each
                    for each in self.inputs
                ),
                Tensor("page_key_scale", "float32"),
                Tensor("page_value_scale", "float32"),
            )
            self.attend = "attend_int8_pages", f"{FOLDER}:attend_int8_pages"

    def _page_parameters(self, model: str) -> tuple[tuple[str, str], ...]:
        listed = ("page_lengths", "*i64"), ("pages", "*i64"), ("page_count", "*i64")
        if self.attributes["int8_pages"]:
            stores = ("page_key", "*i8"), ("page_value", "*i8")
            listed += ("page_key_scale", "*fp32"), ("page_value_scale", "*fp32")
        else:
            stores = ("page_key", model), ("page_value", model)
        return (*stores, *listed, ("page_total", "i32"))

    def _page_constants(self) -> tuple[tuple[str, int], ...]:
        return ("PAGE_SIZE", self.attributes["page_size"]), ("PAGES_PER_SPLIT", PAGES_PER_SPLIT)

    def _page_total(self, shapes: Sequence[Sequence[int]]) -> int:
        return shapes[11][0]
