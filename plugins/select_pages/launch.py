"""flex::SelectPages as a plugin: one launch, one program per row. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plugins.op import TRITON_TYPES, Kernel, Launch, Op, Shapes, Tensor, power_of_two


class SelectPages(Op):
    name = "SelectPages"
    attribute_names = ("grid", "cells", "threshold")
    inputs = (Tensor("map", "float32"), Tensor("margins", "int64"), Tensor("page_budget", "int64"))
    outputs = (Tensor("pages", "int64"), Tensor("page_count", "int64"))

    def output_shapes(self, shapes: Shapes[Any]) -> dict[str, tuple[Any, ...]]:
        batch = shapes["map"][0]
        return {"pages": (batch, self.attributes["cells"] ** 2), "page_count": (batch,)}

    def make_kernels(self, dtype: str) -> tuple[Kernel, ...]:
        a = self.attributes
        cell_block = power_of_two(a["cells"] ** 2)
        kernel = Kernel(
            "select_pages",
            "plugins.select_pages.kernel:select_pages",
            tuple((tensor.name, f"*{TRITON_TYPES[tensor.dtype]}") for tensor in (*self.inputs, *self.outputs)),
            (
                ("GRID", a["grid"]),
                ("CELLS", a["cells"]),
                ("THRESHOLD", a["threshold"]),
                ("TOKEN_BLOCK", power_of_two(a["grid"] ** 2)),
                ("CELL_BLOCK", cell_block),
                ("RANK_BLOCK", min(32, cell_block)),
            ),
            tile=("RANK_BLOCK",),
        )
        return (kernel,)

    def workspace(self, dtype: str, shapes: Shapes[int]) -> int:
        return 0

    def launches_of(
        self, kernels: Sequence[Kernel], shapes: Shapes[int], addresses: Mapping[str, int], workspace: int
    ) -> list[Launch]:
        (kernel,) = kernels
        return [kernel.launch((shapes["map"][0], 1, 1), addresses)]
