"""int8 pages: how they are rounded, and both ops on them, ONNX bodies and kernels against the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plugins.hierarchical_attention import onnx_int8 as attention_body
from plugins.hierarchical_attention import onnx_static_int8 as attention_static
from plugins.hierarchical_attention.launch import HierarchicalAttention
from plugins.hierarchical_attention.reference import hierarchical_attention, hierarchical_attention_int8
from plugins.project_pages import LEAST, STEPS, onnx_int8
from plugins.project_pages.launch import ProjectPages
from plugins.project_pages.reference import project_pages, project_pages_int8, quantise
from tests.emulator.interpreter import call
from tests.plugins import test_kernels, test_project_pages
from tests.plugins.attention_inputs import Sizes, attention_inputs
from tests.plugins.harness import run_body
from tests.plugins.test_kernels import to_bits, to_torch
from tests.plugins.test_project_pages import inputs as projection_inputs

NAMES = "context", "present_key", "present_value", "map"
ATTENTION_CASES = {
    name: case
    for name, case in test_kernels.CASES.items()
    if name in ("decode", "no page", "all pages", "short pages", "pages of more than a tile", "grouped heads", "batch",
                "prefill, batch, grouped", "head size 96")
}  # fmt: skip
# Largest difference of a value of size one, of values computed in another order.
BOUND = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


def dequantised(whole, step) -> torch.Tensor:
    return torch.as_tensor(whole).float() * torch.as_tensor(step)[..., None]


def attention_on_int8(sizes: Sizes, dtype: str, poison: float = 1e3) -> list[np.ndarray]:
    """Inputs of flex::HierarchicalAttention with int8 pages; `poison`: of whatever an op must not look at."""
    arrays = attention_inputs(sizes, poison=poison)
    stores, steps = zip(*(quantise(torch.from_numpy(array)) for array in arrays[9:11]), strict=True)
    arrays = [*test_kernels.rounded(arrays[:9], dtype), *(store.numpy() for store in stores), *arrays[11:]]
    return [*arrays, *(step.numpy() for step in steps)]


def reference(arrays: list[np.ndarray], sizes: Sizes) -> list[torch.Tensor]:
    return hierarchical_attention_int8(*map(to_torch, arrays), *sizes.attributes(True).values())


def by_onnx(body):
    def run(arrays, sizes, dtype):
        kinds = [*[getattr(np, dtype)] * 3, np.float32]
        return run_body(body.FUNCTIONS, arrays, kinds, **sizes.attributes(True))

    return run


def by_kernel(arrays, sizes, dtype):
    return call(HierarchicalAttention(**sizes.attributes(True), int8_pages=1), dtype, arrays)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("body", [attention_body, attention_static])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_by_onnx(case, body, dtype):
    sizes = ATTENTION_CASES[case]
    arrays = attention_on_int8(sizes, dtype)
    found = by_onnx(body)(arrays, sizes, dtype)
    for name, left, right in zip(NAMES, reference(arrays, sizes), found, strict=True):
        assert np.isfinite(right).all(), name
        np.testing.assert_allclose(right, left.numpy(), rtol=BOUND[dtype], atol=BOUND[dtype], err_msg=name)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_by_kernel(case, dtype):
    """Whatever it must not read is NaN, the scales of unlisted pages and short ends, too."""
    sizes = ATTENTION_CASES[case]
    poisoned = attention_on_int8(sizes, dtype, poison=np.nan)
    assert np.isnan(poisoned[-1]).any() or sizes.counts == (sizes.pages,)
    found = [to_torch(array) for array in by_kernel(poisoned, sizes, dtype)]
    expected = reference(attention_on_int8(sizes, dtype, poison=0.0), sizes)
    for name, left, right in zip(NAMES, expected, found, strict=True):
        if not name.startswith("present"):
            assert torch.isfinite(right).all(), name
            assert (right.float() - left.float()).abs().max() <= BOUND[dtype], name


def test_attention_on_int8_pages_is_attention_on_their_values():
    sizes = ATTENTION_CASES["batch"]
    arrays = attention_on_int8(sizes, "float32")
    floats = [dequantised(*halves).numpy() for halves in zip(arrays[9:11], arrays[14:], strict=True)]
    plain = [*map(torch.from_numpy, [*arrays[:9], *floats, *arrays[11:14]])]
    expected = hierarchical_attention(*plain, *sizes.attributes(True).values())
    for name, left, right in zip(NAMES, expected, reference(arrays, sizes), strict=True):
        assert (left - right).abs().max() <= 1e-6, name


def test_float16_products_of_large_keys_do_not_overflow():
    """Small keys have small steps: in steps they are 127, and products with them beyond what float16 holds."""
    sizes = Sizes(head_dim=128, counts=(9,))
    arrays = attention_on_int8(sizes, "float16")
    arrays[0] = (300 * np.sign(arrays[0])).astype(np.float16)  # the query
    arrays[9][:] = np.where(np.arange(128) % 2, 127, -127)
    arrays[14][:] = 1e-6
    expected = reference(arrays, sizes)[0]
    for run in (by_onnx(attention_body), by_onnx(attention_static), by_kernel):
        found = torch.as_tensor(run(arrays, sizes, "float16")[0])
        assert torch.isfinite(found).all() and (found.float() - expected.float()).abs().max() <= BOUND["float16"]


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


def projection(dtype: str, poison: float = np.nan, **case) -> list[np.ndarray]:
    """Inputs of flex::ProjectPages with an int8 store, whose scales are `poison` where nothing is projected."""
    arrays = test_project_pages.typed(projection_inputs(**case, poison=0.0), dtype)
    stores, steps = zip(*(quantise(to_torch(array)) for array in arrays[5:7]), strict=True)
    for step in steps:
        step.movedim(1, 2)[torch.from_numpy(arrays[7]) == 0] = poison
    arrays[5:7] = (store.numpy() for store in stores)
    return [*arrays, *(step.numpy() for step in steps)]


def project_by_onnx(dtype, arrays):
    kinds = [np.int8, np.int8, np.float32, np.float32, np.int64]
    return run_body(onnx_int8.FUNCTIONS, arrays, kinds, **test_project_pages.attributes(arrays))


def project_by_kernel(dtype, arrays):
    return call(ProjectPages(**test_project_pages.attributes(arrays), int8_pages=1), dtype, arrays)


RUNS = [(project_by_onnx, "float32"), (project_by_onnx, "float16")]
RUNS += [(project_by_kernel, dtype) for dtype in ("float32", "float16", "bfloat16")]


@pytest.mark.parametrize("case", test_project_pages.CASES)
@pytest.mark.parametrize(("run", "dtype"), RUNS)
def test_projection(case, run, dtype):
    """Scales of unprojected pages are NaN before and, where nobody wants them, after; what was there stays."""
    arrays = projection(dtype, **test_project_pages.CASES[case])
    expected = project_pages_int8(*map(to_torch, arrays), **test_project_pages.attributes(arrays))
    found = [torch.as_tensor(array) for array in run(dtype, arrays)]
    assert torch.equal(found[4], expected[4])
    present = expected[4].bool()
    for half in (0, 1):
        there = present[:, None, :, None].expand_as(expected[2 + half])
        assert torch.equal(~found[2 + half].isnan(), there)
        values, others = (dequantised(each[half], each[2 + half]) for each in (expected, found))
        # A product that differs in its last bit may be a tie that is rounded to the other side: one step.
        step = expected[2 + half][..., None]
        error = (values - others).abs()
        assert (error[there] <= (1.01 * step + test_project_pages.BOUND[dtype]).expand_as(error)[there]).all()
        old = (torch.from_numpy(arrays[7]) == 1)[:, None, :, None].expand_as(there)
        assert torch.equal(found[half][old], torch.from_numpy(arrays[5 + half])[old])
    if dtype == "float32":
        moved = (
            (found[0] != expected[0])[present[:, None].expand(found[0].shape[:3])].float().mean()
            if present.any()
            else 0
        )
        assert moved < 1e-3


def test_reference_rounds_what_the_op_on_floats_projects():
    arrays = projection_inputs(counts=(4,), done=(0,), poison=0.0)
    key, value, _ = project_pages(*map(torch.from_numpy, arrays), **test_project_pages.attributes(arrays))
    on_int8 = projection("float32", poison=0.0, counts=(4,), done=(0,))
    found = project_pages_int8(*map(torch.from_numpy, on_int8), **test_project_pages.attributes(on_int8))
    wanted = found[4][0].bool()
    for half, expected in enumerate((key, value)):
        whole, step = quantise(expected)
        assert torch.equal(found[half][0, :, wanted], whole[0, :, wanted])
        assert torch.equal(found[2 + half][0, :, wanted], step[0, :, wanted])


@pytest.mark.parametrize(("run", "dtype"), RUNS)
def test_ties_and_zeros_in_every_face(run, dtype):
    """Projections that are exact: a token's features pick a column of the weights."""
    arrays = projection(dtype, counts=(9,), done=(0,), poison=0.0)
    kv_heads, head_dim = arrays[5].shape[1], arrays[5].shape[-1]
    hidden = arrays[0].shape[-1]
    pattern = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3] * (head_dim // 8), np.float32)
    weight = np.zeros((kv_heads * head_dim, hidden), np.float32)
    weight[:, 0] = np.tile(pattern, kv_heads)  # column 0; the others are zeros
    features = np.zeros(arrays[0].shape, np.float32)
    features[:, :, 0, 0] = 1  # the first token of each page; the others are zeros
    convert = lambda array: to_bits(torch.from_numpy(array).to(getattr(torch, dtype)))  # noqa: E731
    arrays[:3] = convert(features), convert(weight), convert(weight)
    arrays[3:5] = np.ones_like(arrays[3]), np.zeros_like(arrays[4])  # no rotation
    key, value, key_step, value_step, _ = run(dtype, arrays)
    expected = to_torch(convert(pattern)).float().round().numpy()  # bfloat16 has no -126.5
    for whole, step in ((key, key_step), (value, value_step)):
        assert (whole[:, :, :, 0] == expected).all() and (step[:, :, :, 0] == 1).all()
        assert not whole[:, :, :, 1:].any() and np.allclose(step[:, :, :, 1:], LEAST / STEPS, rtol=1e-5, atol=0)
