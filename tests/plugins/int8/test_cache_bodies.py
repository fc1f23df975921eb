"""Attention over an int8 cache: the ONNX bodies against the references, and those against first principles; what the
kernels must show, too."""

from __future__ import annotations

import numpy as np
import pytest

from plugins.cached_attention import LEAST, STEPS
from plugins.cached_attention import onnx_int8 as cached
from plugins.hierarchical_attention import onnx_body, onnx_cuda, onnx_int8
from tests.emulator.interpreter import call
from tests.plugins.checks import ATTENTION_BOUND, compare_int8_cache, dequantised
from tests.plugins.harness import by_body, by_reference
from tests.plugins.inputs import ATTENTION_CASES, Arrays, Sizes, on_int8_cache

CASES = {
    name: ATTENTION_CASES[name]
    for name in (
        "decode", "no page", "all pages", "short pages", "first token", "no room left", "grouped heads", "six heads",
        "head size 96", "batch", "prefill", "prefill from nothing", "prefill, batch, grouped",
    )
}  # fmt: skip
CASES |= {
    "many heads, batch": Sizes(heads=24, kv_heads=12, past=(41, 0), counts=(2, 0), begin=(3, 0)),  # 4 at a time
    "large pages": Sizes(heads=12, kv_heads=12, head_dim=64, page_size=200, past=(41,), steps=2, short_pages=True),
}
BODIES = {  # without pages, with pages of floats, with int8 pages
    "cpu": (cached.FUNCTIONS, onnx_body.INT8_CACHE, onnx_int8.INT8_CACHE),
    "cuda": (cached.CUDA_FUNCTIONS, onnx_cuda.INT8_CACHE, onnx_cuda.INT8_BOTH),
}


IN_FLOAT16 = "decode", "batch", "prefill, batch, grouped", "many heads, batch"


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, "float32") for case in CASES] + [(case, "float16") for case in IN_FLOAT16]
)
@pytest.mark.parametrize("body", BODIES)
def test_bodies_equal_reference(case, body, dtype):
    for (op, arrays), functions in zip(on_int8_cache(CASES[case], dtype), BODIES[body], strict=True):
        expected, found = by_reference(op, dtype, arrays), by_body(functions)(op, dtype, arrays)
        compare_int8_cache(CASES[case], arrays, expected, found, ATTENTION_BOUND[dtype])


RUNS = {"reference": (by_reference,) * 3, "kernels": (call,) * 3} | {
    name: tuple(map(by_body, body)) for name, body in BODIES.items()
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_ties_and_zeros(runs):
    """A token whose numbers are ties, one of zeros."""
    sizes = Sizes(heads=2, kv_heads=2, past=(5,), steps=2)
    pattern = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3] * 2, np.float32)
    for (op, arrays), run in zip(on_int8_cache(sizes, "float32"), runs, strict=True):
        arrays |= {"cos": np.ones_like(arrays["cos"]), "sin": np.zeros_like(arrays["sin"])}  # no rotation
        for name in ("key", "value"):
            arrays[name] = np.stack([np.tile(pattern, 2), np.zeros(32, np.float32)])[None]
        found = run(op, "float32", arrays)
        for name in ("present_key", "present_value"):
            whole, step = found[name][0], found[f"{name}_scale"][0]
            assert (whole[:, 5] == pattern.round()).all() and (step[:, 5] == 1).all()
            assert not whole[:, 6].any() and np.allclose(step[:, 6], LEAST / STEPS, rtol=1e-5, atol=0)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_float16_products_with_large_keys_do_not_overflow(runs):
    """Small keys have small steps: in steps they are 127, and products with them beyond what float16 holds."""
    sizes = Sizes(head_dim=128)
    for (op, arrays), run in zip(on_int8_cache(sizes, "float16"), runs, strict=True):
        arrays["query"] = (300 * np.sign(arrays["query"])).astype(np.float16)
        arrays["past_key"][:] = np.where(np.arange(128) % 2, 127, -127)
        arrays["past_key_scale"][:] = 1e-6
        expected = by_reference(op, "float16", arrays)["context"].astype(np.float32)
        found = run(op, "float16", arrays)["context"].astype(np.float32)
        assert np.isfinite(found).all() and np.abs(found - expected).max() <= ATTENTION_BOUND["float16"]


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_a_prompt_at_once_is_the_prompt_token_by_token(runs):
    """Every query reads what is stored, the new tokens' own keys and values too."""
    steps, past = 6, 20
    whole = Sizes(heads=8, kv_heads=2, past=(past,), steps=steps, counts=(0,))
    for (op, arrays), run in zip(on_int8_cache(whole, "float32"), runs, strict=True):
        at_once = run(op, "float32", arrays)
        cache = {name: arrays[name] for name in arrays if name.startswith("past_")}
        for step in range(steps):
            new = {name: arrays[name][:, step : step + 1] for name in ("query", "key", "value", "positions")}
            found = run(op, "float32", arrays | new | cache)
            cache = {name: found[name.replace("past", "present")] for name in cache}
            error = np.abs(found["context"][:, 0] - at_once["context"][:, step]).max()
            assert error <= ATTENTION_BOUND["float32"]
        assert np.abs(found["map"] - at_once["map"]).max() <= ATTENTION_BOUND["float32"]
        for name, array in cache.items():
            assert np.array_equal(array, at_once[name.replace("past", "present")]), name


@pytest.mark.parametrize("case", ["decode", "grouped heads", "batch", "prefill, batch, grouped"])
def test_reference_is_attention_to_the_values_that_are_stored(case):
    """Plain attention in float64, a query at a time, over integers times steps; what is stored is rounded right."""
    sizes = CASES[case]
    for op, arrays in on_int8_cache(sizes, "float32"):
        found = by_reference(op, "float32", arrays)
        present = {
            half: dequantised(found[f"present_{half}"], found[f"present_{half}_scale"]).double().numpy()
            for half in ("key", "value")
        }
        pages = {half: np.array(arrays[f"page_{half}"], np.float64) for half in ("key", "value")}
        if op.attributes.get("int8_pages"):
            pages = {half: pages[half] * arrays[f"page_{half}_scale"][..., None] for half in pages}
        for row, past in enumerate(sizes.past):
            _require_rounded(sizes, arrays, found, row)
            map = np.zeros(sizes.grid**2)
            for step in range(sizes.steps):
                position, last = past + step, step == sizes.steps - 1
                for head in range(sizes.heads):
                    shared = head // (sizes.heads // sizes.kv_heads)
                    query = _turned(sizes, arrays, "query", row, step, head) / np.sqrt(sizes.head_dim)
                    keys, values = (present[half][row, shared, : position + 1] for half in ("key", "value"))
                    if last:
                        begin = arrays["image_begin"][row]
                        weights = np.zeros(sizes.capacity)
                        weights[: position + 1] = _softmax(keys @ query)
                        map += weights[begin : begin + sizes.grid**2]
                    if last and op.name == "HierarchicalAttention":
                        for page in arrays["pages"][row, : sizes.counts[row]]:
                            of = arrays["page_lengths"][page]
                            keys = np.concatenate([keys, pages["key"][row, shared, page, :of]])
                            values = np.concatenate([values, pages["value"][row, shared, page, :of]])
                    expected = _softmax(keys @ query) @ values
                    context = found["context"][row, step, head * sizes.head_dim :][: sizes.head_dim]
                    assert np.abs(context - expected).max() <= ATTENTION_BOUND["float32"]
            assert np.abs(found["map"][row].ravel() - map).max() <= ATTENTION_BOUND["float32"]


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _turned(sizes: Sizes, arrays: Arrays, name: str, row: int, step: int, head: int) -> np.ndarray:
    """A query or a key after the rotation, float64."""
    x = arrays[name][row, step, head * sizes.head_dim :][: sizes.head_dim].astype(np.float64)
    first, second = np.split(x, 2)
    position = arrays["positions"][row, step]
    cos, sin = arrays["cos"][position].astype(np.float64), arrays["sin"][position].astype(np.float64)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def _require_rounded(sizes: Sizes, arrays: Arrays, found: Arrays, row: int) -> None:
    """Each new key and value is within half a step of what it was, its largest number 127 steps."""
    for step in range(sizes.steps):
        for head in range(sizes.kv_heads):
            key = _turned(sizes, arrays, "key", row, step, head)
            value = arrays["value"][row, step, head * sizes.head_dim :][: sizes.head_dim]
            for half, exact in (("key", key), ("value", value)):
                whole = found[f"present_{half}"][row, head, sizes.past[row] + step].astype(np.float64)
                size = found[f"present_{half}_scale"][row, head, sizes.past[row] + step]
                assert size == pytest.approx(np.abs(exact).max() / STEPS, rel=1e-6)
                assert np.abs(whole).max() == STEPS and np.abs(whole * size - exact).max() <= 0.5001 * size
