"""flex::ProjectPages as a plugin: one launch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from plugins.op import TRITON_TYPES, Kernel, Launch, Op, Tensor, power_of_two

LANES = 8  # programs per head that share the new pages of a row


class ProjectPages(Op):
    name = "ProjectPages"
    attribute_names = ("hidden", "kv_heads", "head_dim", "page_size", "cells", "int8_pages")
    defaults: ClassVar[dict[str, int]] = {"int8_pages": 0}
    inputs = (
        Tensor("features", "model"),
        Tensor("key_weight", "model"),
        Tensor("value_weight", "model"),
        Tensor("cos", "float32"),
        Tensor("sin", "float32"),
        Tensor("page_key", "model"),
        Tensor("page_value", "model"),
        Tensor("projected", "int64"),
        Tensor("pages", "int64"),
        Tensor("page_count", "int64"),
    )
    outputs = (Tensor("present_key", "model"), Tensor("present_value", "model"), Tensor("present_projected", "int64"))
    in_place: ClassVar[dict[int, int]] = {0: 5, 1: 6}

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
            *stores, projected = self.outputs
            self.outputs = (
                *(replace(store, dtype="int8") for store in stores),
                Tensor("present_key_scale", "float32"),
                Tensor("present_value_scale", "float32"),
                projected,
            )
            self.in_place = self.in_place | {2: 10, 3: 11}

    def output_shapes(self, shapes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        sources = (5, 6, 10, 11, 7) if self.attributes["int8_pages"] else (5, 6, 7)
        return [tuple(shapes[source]) for source in sources]

    def kernels(self, dtype: str) -> tuple[Kernel, ...]:
        a, model = self.attributes, f"*{TRITON_TYPES[dtype]}"
        wide = dtype != "float32"  # without tensor cores the products are unrolled
        name, store, scales = "project_pages", model, ()
        if a["int8_pages"]:
            name, store = "project_int8_pages", "*i8"
            scales = ("page_key_scale", "*fp32"), ("page_value_scale", "*fp32")
        kernel = Kernel(
            name,
            f"plugins.project_pages.kernel:{name}",
            (
                *((name, model) for name in ("features", "key_weight", "value_weight")),
                ("cos", "*fp32"),
                ("sin", "*fp32"),
                ("page_key", store),
                ("page_value", store),
                *((name, "*i64") for name in ("projected", "pages", "page_count")),
                *scales,
                ("present_projected", "*i64"),
                ("page_total", "i32"),
            ),
            (
                ("HIDDEN", a["hidden"]),
                ("KV_HEADS", a["kv_heads"]),
                ("HEAD_DIM", a["head_dim"]),
                ("HALF", max(16, power_of_two(a["head_dim"] // 2))),
                ("PAGE_SIZE", a["page_size"]),
                ("ROWS", min(64 if wide else 16, max(16, power_of_two(a["page_size"])))),
                ("WIDTH", 32 if wide else 16),
                ("PAGE_BLOCK", power_of_two(a["cells"] ** 2)),
                ("LANES", LANES),
            ),
            stages=3 if wide else 2,
        )
        return (kernel,)

    def workspace(self, shapes: Sequence[Sequence[int]]) -> int:
        return 0

    def launches(
        self,
        dtype: str,
        shapes: Sequence[Sequence[int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
    ) -> list[Launch]:
        (kernel,) = self.kernels(dtype)
        batch, page_total = shapes[0][:2]
        grid = LANES, 2 * self.attributes["kv_heads"], batch
        return [Launch(kernel, grid, (*inputs, outputs[-1], page_total))]
