"""int8 pages: how they are rounded, and both ops on them, ONNX bodies and kernels against the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plugins.cached_attention import LEAST, STEPS
from plugins.cached_attention.reference import quantise
from plugins.hierarchical_attention import onnx_int8 as attention
from plugins.hierarchical_attention import onnx_static as static_attention
from plugins.project_pages import onnx_int8
from tests.emulator.interpreter import call
from tests.plugins.checks import (
    ATTENTION_BOUND,
    check_int8_attention,
    check_int8_projection,
    dequantised,
)
from tests.plugins.harness import by_body, by_reference
from tests.plugins.inputs import (
    INT8_ATTENTION_CASES,
    PROJECTION_CASES,
    Sizes,
    int8_attention_inputs,
    int8_projection_inputs,
    projection_inputs,
    projection_op,
    to_bits,
    to_torch,
)

BODIES = {"dynamic": attention.FUNCTIONS, "static": static_attention.INT8_FUNCTIONS}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("case", INT8_ATTENTION_CASES)
def test_attention_by_onnx(case, body, dtype):
    sizes, bound = INT8_ATTENTION_CASES[case], ATTENTION_BOUND[dtype]
    op, arrays = sizes.hierarchical(int8_pages=1), int8_attention_inputs(sizes, dtype)
    found = by_body(BODIES[body])(op, dtype, arrays)
    for name, left in by_reference(op, dtype, arrays).items():
        assert np.isfinite(found[name]).all(), name
        np.testing.assert_allclose(found[name], left, rtol=bound, atol=bound, err_msg=name)


@pytest.mark.parametrize("dtype", ATTENTION_BOUND)
@pytest.mark.parametrize("case", INT8_ATTENTION_CASES)
def test_attention_by_kernel(case, dtype):
    check_int8_attention(INT8_ATTENTION_CASES[case], dtype, call)


def test_attention_on_int8_pages_is_attention_on_their_values():
    sizes = INT8_ATTENTION_CASES["batch"]
    arrays = int8_attention_inputs(sizes, "float32")
    floats = {name: dequantised(arrays[name], arrays[f"{name}_scale"]).numpy() for name in ("page_key", "page_value")}
    expected = by_reference(sizes.hierarchical(), "float32", arrays | floats)
    found = by_reference(sizes.hierarchical(int8_pages=1), "float32", arrays)
    for name, left in expected.items():
        assert np.abs(left - found[name]).max() <= 1e-6, name


def test_float16_products_of_large_keys_do_not_overflow():
    """Small keys have small steps: in steps they are 127, and products with them beyond what float16 holds."""
    sizes = Sizes(head_dim=128, counts=(9,))
    op, arrays = sizes.hierarchical(int8_pages=1), int8_attention_inputs(sizes, "float16")
    arrays["query"] = (300 * np.sign(arrays["query"])).astype(np.float16)
    arrays["page_key"][:] = np.where(np.arange(128) % 2, 127, -127)
    arrays["page_key_scale"][:] = 1e-6
    expected = by_reference(op, "float16", arrays)["context"].astype(np.float32)
    for run in (*map(by_body, BODIES.values()), call):
        found = run(op, "float16", arrays)["context"]
        assert np.isfinite(found).all() and np.abs(found - expected).max() <= ATTENTION_BOUND["float16"]


def test_a_value_is_within_half_a_step_and_ties_are_even():
    x = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-25, 25)[:, None]
    whole, step = quantise(x)
    assert whole.dtype == torch.int8 and step.dtype == torch.float32 and step.shape == x.shape[:-1]
    assert whole.abs().amax(-1).eq(STEPS).all()
    assert ((dequantised(whole, step) - x).abs() <= 0.50001 * step[..., None]).all()
    whole, step = quantise(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3.0]]))
    assert step.item() == 1 and whole.tolist() == [[127, 0, 2, 2, 0, -2, -126, 3]]
    whole, step = quantise(torch.zeros(1, 8))
    assert not whole.any() and step.item() == pytest.approx(LEAST / STEPS)
    assert quantise(torch.tensor([1.0, np.nan]))[1].isnan()


RUNS = [(by_body(onnx_int8.FUNCTIONS), dtype) for dtype in ("float32", "float16")]
RUNS += [(call, dtype) for dtype in ("float32", "float16", "bfloat16")]


@pytest.mark.parametrize("case", PROJECTION_CASES)
@pytest.mark.parametrize(("run", "dtype"), RUNS, ids=lambda each: getattr(each, "__name__", each))
def test_projection(case, run, dtype):
    check_int8_projection(PROJECTION_CASES[case], dtype, run)


def test_reference_rounds_what_the_op_on_floats_projects():
    arrays = projection_inputs(counts=(4,), done=(0,), poison=0.0)
    plain = by_reference(projection_op(arrays), "float32", arrays)
    on_int8 = int8_projection_inputs("float32", poison=0.0, counts=(4,), done=(0,))
    found = by_reference(projection_op(on_int8), "float32", on_int8)
    wanted = found["present_projected"][0] == 1
    assert wanted.sum() == 4
    for name in ("present_key", "present_value"):
        whole, step = quantise(torch.from_numpy(plain[name]))
        assert np.array_equal(found[name][0, :, wanted], whole.numpy()[0, :, wanted])
        assert np.array_equal(found[f"{name}_scale"][0, :, wanted], step.numpy()[0, :, wanted])


@pytest.mark.parametrize(("run", "dtype"), RUNS, ids=lambda each: getattr(each, "__name__", each))
def test_ties_and_zeros_in_every_face(run, dtype):
    """Projections that are exact: a token's features pick a column of the weights."""
    arrays = int8_projection_inputs(dtype, counts=(9,), done=(0,), poison=0.0)
    _, kv_heads, _, _, head_dim = arrays["page_key"].shape
    hidden = arrays["features"].shape[-1]
    pattern = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3] * (head_dim // 8), np.float32)
    weight = np.zeros((kv_heads * head_dim, hidden), np.float32)
    weight[:, 0] = np.tile(pattern, kv_heads)  # column 0; the others are zeros
    features = np.zeros(arrays["features"].shape, np.float32)
    features[:, :, 0, 0] = 1  # the first token of each page; the others are zeros
    convert = lambda array: to_bits(torch.from_numpy(array).to(getattr(torch, dtype)))  # noqa: E731
    arrays |= {"features": convert(features), "key_weight": convert(weight), "value_weight": convert(weight)}
    arrays |= {"cos": np.ones_like(arrays["cos"]), "sin": np.zeros_like(arrays["sin"])}  # no rotation
    found = run(projection_op(arrays), dtype, arrays)
    expected = to_torch(convert(pattern)).float().round().numpy()  # bfloat16 has no -126.5
    for name in ("present_key", "present_value"):
        whole, step = found[name], found[f"{name}_scale"]
        assert (whole[:, :, :, 0] == expected).all() and (step[:, :, :, 0] == 1).all()
        assert not whole[:, :, :, 1:].any() and np.allclose(step[:, :, :, 1:], LEAST / STEPS, rtol=1e-5, atol=0)
