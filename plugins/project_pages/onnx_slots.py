"""flex::ProjectPages of a store with fewer page slots than pages as an ONNX function for ONNX Runtime.

Inputs and outputs: see the package docstring. ScatterND writes in place, and with no new page little is computed: see
onnx_body.py.
"""

from __future__ import annotations

from onnxscript import OnnxFunction, script

from plugins.cached_attention.onnx_body import flex, op
from plugins.cached_attention.onnx_int8 import InSteps
from plugins.project_pages.onnx_body import SHARED, NewHalves, Stored


@script(flex, default_opset=op)
def InSlots(where, slots):
    """(row, head, page) of each head of each new page [n*Hkv, 3], with its page slot in place of the page."""
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    slot = op.GatherND(slots, op.Gather(where, op.Constant(value_ints=[0, 2]), axis=1))
    return op.Concat(op.Slice(where, op.Constant(value_ints=[0]), two, one), op.Unsqueeze(slot, one), axis=1)


def of_floats() -> OnnxFunction:
    """The op where pages are not int8."""

    @script(flex, default_opset=op)
    def ProjectPages(
        features, key_weight, value_weight, cos, sin, page_key, page_value, projected, pages, page_count, slots,
        hidden: int, kv_heads: int, head_dim: int, page_size: int, cells: int,
    ):  # fmt: skip
        halves, where, present = NewHalves(
            features, key_weight, value_weight, cos, sin, projected, pages, page_count, page_key,
            kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, cells=cells,
        )  # fmt: skip
        place = InSlots(where, slots)
        present_key, present_value = Stored(page_key, page_value, halves, place)
        return present_key, present_value, present

    return ProjectPages


def of_int8() -> OnnxFunction:
    """The op where they are."""

    @script(flex, default_opset=op)
    def ProjectPages(
        features, key_weight, value_weight, cos, sin, page_key, page_value, projected, pages, page_count,
        page_key_scale, page_value_scale, slots,
        hidden: int, kv_heads: int, head_dim: int, page_size: int, cells: int,
    ):  # fmt: skip
        halves, where, present = NewHalves(
            features, key_weight, value_weight, cos, sin, projected, pages, page_count, page_key_scale,
            kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, cells=cells,
        )  # fmt: skip
        whole, step = InSteps(halves)
        place = InSlots(where, slots)
        present_key, present_value = Stored(page_key, page_value, whole, place)
        present_key_scale, present_value_scale = Stored(page_key_scale, page_value_scale, step, place)
        return present_key, present_value, present_key_scale, present_value_scale, present

    return ProjectPages


FUNCTIONS = (*SHARED, InSlots, of_floats())
INT8_FUNCTIONS = (*SHARED, InSlots, InSteps, of_int8())
