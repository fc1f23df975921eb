"""flex::SelectPages as a plugin: one launch, one program per row. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plugins.op import Kernel, Launch, Op, Tensor, power_of_two


class SelectPages(Op):
    name = "SelectPages"
    attribute_names = ("grid", "cells", "threshold")
    inputs = (Tensor("map", "float32"), Tensor("margins", "int64"), Tensor("page_budget", "int64"))
    outputs = (Tensor("pages", "int64"), Tensor("page_count", "int64"))

    def output_shapes(self, shapes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        batch = shapes[0][0]
        return [(batch, self.attributes["cells"] ** 2), (batch,)]

    def kernels(self, dtype: str) -> tuple[Kernel, ...]:
        a = self.attributes
        cell_block = power_of_two(a["cells"] ** 2)
        kernel = Kernel(
            "select_pages",
            "plugins.select_pages.kernel:select_pages",
            (("map", "*fp32"), ("margins", "*i64"), ("budget", "*i64"), ("pages", "*i64"), ("count", "*i64")),
            (
                ("GRID", a["grid"]),
                ("CELLS", a["cells"]),
                ("THRESHOLD", a["threshold"]),
                ("TOKEN_BLOCK", power_of_two(a["grid"] ** 2)),
                ("CELL_BLOCK", cell_block),
                ("RANK_BLOCK", min(32, cell_block)),
            ),
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
        return [Launch(kernel, (shapes[0][0], 1, 1), (*inputs, *outputs))]
