"""flex::ProjectPages of an int8 store as an ONNX function for ONNX Runtime.

Inputs and outputs: see the package docstring. ScatterND writes in place, and with no new page little is computed: see
onnx_body.py.
"""

from __future__ import annotations

from onnxscript import script

from plugins.cached_attention.onnx_body import flex, op
from plugins.cached_attention.onnx_int8 import InSteps
from plugins.project_pages.onnx_body import SHARED, NewHalves, Stored


@script(flex, default_opset=op)
def ProjectPages(
    features, key_weight, value_weight, cos, sin, page_key, page_value, projected, pages, page_count,
    page_key_scale, page_value_scale,
    hidden: int, kv_heads: int, head_dim: int, page_size: int, cells: int,
):  # fmt: skip
    halves, where, present = NewHalves(
        features, key_weight, value_weight, cos, sin, projected, pages, page_count, page_key_scale,
        kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, cells=cells,
    )  # fmt: skip
    whole, step = InSteps(halves)
    present_key, present_value = Stored(page_key, page_value, whole, where)
    present_key_scale, present_value_scale = Stored(page_key_scale, page_value_scale, step, where)
    return present_key, present_value, present_key_scale, present_value_scale, present


FUNCTIONS = (*SHARED, InSteps, ProjectPages)
