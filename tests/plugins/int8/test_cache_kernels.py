"""Attention over an int8 cache by the Triton kernels: in the interpreter, and through the emulated driver."""

from __future__ import annotations

import numpy as np
import pytest

from engines.cuda import Cuda
from plugins.cached_attention.launch import FLOATS
from tests.emulator.driver import Driver, emulated_artifacts
from tests.emulator.interpreter import call
from tests.plugins.checks import ATTENTION_BOUND, check_int8_cache
from tests.plugins.harness import Launcher, by_reference
from tests.plugins.inputs import INT8_CACHE_CASES, Sizes, on_int8_cache

CASES = (
    "decode", "first token", "no room left", "ragged last split", "batch", "prefill", "prefill of several tiles",
    "prefill, batch, grouped", "prefill, head size 96", "prefill, head size 128, group of 8",
)  # fmt: skip
IN_HALVES = "decode", "prefill, batch, grouped"


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES] + [(case, half) for half in ("float16", "bfloat16") for case in IN_HALVES],
)
def test_in_the_interpreter(case, dtype):
    check_int8_cache(INT8_CACHE_CASES[case], dtype, call)


def test_through_the_driver():
    driver = Driver()
    check_int8_cache(INT8_CACHE_CASES["prefill, batch, grouped"], "float16", Launcher(Cuda(driver), emulated_artifacts))
    assert {"append", "dequantise", "prefill", "attend", "attend_pages", "combine"} == set(driver.launches)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_token_that_is_no_number_stays_none(steps):
    """Its step is NaN, and so is what reads it: it does not turn into some other number. `append` stores the first of
    several new tokens, `attend` the last."""
    sizes = Sizes(heads=2, kv_heads=2, steps=steps)
    for op, arrays in on_int8_cache(sizes, "float32"):
        new = sizes.past[0]
        arrays["key"][0, 0, 5] = arrays["value"][0, 0, 5] = np.nan  # of the first head
        found = call(op, "float32", arrays)
        for half in ("key", "value"):
            steps_of = found[f"present_{half}_scale"][0, :, new]
            assert np.isnan(steps_of[0]) and np.isfinite(steps_of[1])
        assert np.isnan(found["context"][0, -1, : sizes.head_dim]).all()
        assert np.isfinite(found["context"][0, -1, sizes.head_dim :]).all()


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_small_and_large_values_keep_their_digits_in_float16(scale):
    """Weights times steps of 1e-6 would be below what float16 holds."""
    sizes = Sizes(past=(20,), steps=9)
    for op, arrays in on_int8_cache(sizes, "float16", poison=0.0):
        pages = "page_value_scale" if "page_value_scale" in arrays else "page_value"
        for name in arrays.keys() & {"value", "past_value_scale", pages}:
            arrays[name] = (arrays[name] * scale).astype(arrays[name].dtype)
        expected = by_reference(op, "float16", arrays)["context"].astype(np.float32)
        found = call(op, "float16", arrays)["context"].astype(np.float32)
        assert np.abs(found - expected).max() <= ATTENTION_BOUND["float16"] * scale


def test_scratch_memory_for_a_prompt_alone():
    """A decode step reads the int8 cache as it is; a prompt makes it float, in the model's dtype."""
    for op, _ in on_int8_cache(Sizes(), "float32"):
        shapes = {"query": (2, 1, 64), "past_key": (2, 4, 60, 16), "page_lengths": (9,)}
        if op.name == "CachedAttention":
            del shapes["page_lengths"]
        prompt = shapes | {"query": (2, 7, 64)}
        cache = 2 * 4 * 60 * 16
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            rounded_up = -(-cache * size // 256) * 256
            assert op.workspace(dtype, prompt) - op.workspace(dtype, shapes) == len(FLOATS) * rounded_up
        assert op.workspace("float32", shapes) == type(op)(**op.attributes | {"int8_cache": 0}).workspace(
            "float32", prompt
        )
