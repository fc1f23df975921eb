"""flex::ProjectPages as a plugin: one launch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from plugins.op import (
    OF_PAGE_SLOTS,
    PAGE_SCALES,
    TRITON_TYPES,
    Kernel,
    Launch,
    Op,
    Shapes,
    Tensor,
    in_int8,
    power_of_two,
)
from plugins.tiles import tiled


class ProjectPages(Op):
    name = "ProjectPages"
    attribute_names = ("hidden", "kv_heads", "head_dim", "page_size", "cells", "int8_pages", "page_slots")
    defaults: ClassVar[dict[str, int]] = {"int8_pages": 0, "page_slots": 0}
    inputs: tuple[Tensor, ...] = (
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
    outputs: tuple[Tensor, ...] = (
        Tensor("present_key", "model"),
        Tensor("present_value", "model"),
        Tensor("present_projected", "int64"),
    )
    in_place: Mapping[str, str] = {"present_key": "page_key", "present_value": "page_value"}

    def __init__(self, **attributes: int) -> None:
        super().__init__(**attributes)
        if self.attributes["int8_pages"]:
            inputs, scales = in_int8(self.inputs, "page")
            (*stores, projected), present_scales = in_int8(self.outputs, "present")
            self.inputs = *inputs, *scales
            self.outputs = *stores, *present_scales, projected
            scales_in_place = {f"{output}_scale": f"{store}_scale" for output, store in self.in_place.items()}
            self.in_place = {**self.in_place, **scales_in_place}
        if self.attributes["page_slots"]:
            self.inputs = *self.inputs, Tensor("slots", "int64")

    def output_shapes(self, shapes: Shapes[Any]) -> dict[str, tuple[Any, ...]]:
        sources = {**self.in_place, "present_projected": "projected"}
        return {output.name: tuple(shapes[sources[output.name]]) for output in self.outputs}

    def make_kernels(self, dtype: str) -> tuple[Kernel, ...]:
        a = self.attributes
        pointers = *self.inputs, self.outputs[-1]  # the other outputs are inputs: see in_place
        kernel = Kernel(
            "project_pages",
            "plugins.project_pages.kernel:project_pages",
            (
                *((tensor.name, f"*{TRITON_TYPES[tensor.kind(dtype)]}") for tensor in pointers),
                ("page_total", "i32"),
                *((("slot_total", "i32"),) if a["page_slots"] else ()),
            ),
            (
                ("HIDDEN", a["hidden"]),
                ("KV_HEADS", a["kv_heads"]),
                ("HEAD_DIM", a["head_dim"]),
                ("HALF", max(16, power_of_two(a["head_dim"] // 2))),
                ("PAGE_SIZE", a["page_size"]),
                ("PAGE_BLOCK", power_of_two(a["cells"] ** 2)),
                ("INT8_PAGES", a["int8_pages"]),
                ("PAGE_SLOTS", a["page_slots"]),
            ),
            absent=(*(() if a["int8_pages"] else PAGE_SCALES), *(() if a["page_slots"] else OF_PAGE_SLOTS)),
            tile=("ROWS", "WIDTH", "LANES", "PROGRAMS"),
        )
        return (tiled(kernel),)

    def workspace(self, dtype: str, shapes: Shapes[int]) -> int:
        return 0

    def launches_of(
        self, kernels: Sequence[Kernel], shapes: Shapes[int], addresses: Mapping[str, int], workspace: int
    ) -> list[Launch]:
        (kernel,) = kernels
        batch, page_total = shapes["features"][:2]
        tile = dict(kernel.constants)
        # Code of version 0.1.0 has no PROGRAMS: its programs have a head each, of which LANES share the new pages.
        grid = (tile["PROGRAMS"], 1) if "PROGRAMS" in tile else (tile["LANES"], 2 * self.attributes["kv_heads"])
        totals = {"page_total": page_total}
        totals |= {"slot_total": shapes["page_key"][2]} if self.attributes["page_slots"] else {}
        return [kernel.launch((*grid, batch), {**addresses, **totals})]
