"""flex::HierarchicalAttention as a plugin: its `attend` has further programs, which read the listed pages in place."""

from __future__ import annotations

from typing import ClassVar

from plugins.cached_attention.launch import PAGES_PER_SPLIT, CachedAttention
from plugins.op import PAGE_SCALES, Tensor

FOLDER = "plugins.hierarchical_attention.kernel"


class HierarchicalAttention(CachedAttention):
    name = "HierarchicalAttention"
    attribute_names: ClassVar[tuple[str, ...]] = (
        "heads", "kv_heads", "head_dim", "page_size", "grid", "int8_pages", "int8_cache",
    )  # fmt: skip
    defaults: ClassVar[dict[str, int]] = {"int8_pages": 0, **CachedAttention.defaults}
    int8_stores: ClassVar[dict[str, str]] = {"int8_pages": "page", **CachedAttention.int8_stores}
    inputs: tuple[Tensor, ...] = (
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
        int8, inputs = self.attributes["int8_pages"], HierarchicalAttention.inputs[len(CachedAttention.inputs) :]
        scales, self.page_absent = (PAGE_SCALES, ()) if int8 else ((), PAGE_SCALES)
        self.page_parameters = *(tensor.name for tensor in inputs), *scales, "page_total"
        self.page_constants = (
            ("PAGE_SIZE", self.attributes["page_size"]),
            ("PAGES_PER_SPLIT", PAGES_PER_SPLIT),
            ("INT8_PAGES", int8),
        )
