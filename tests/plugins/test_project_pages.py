"""flex::ProjectPages: ONNX body and kernel against the reference, and the reference against the plain product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plugins.cached_attention.reference import rotary
from plugins.project_pages.launch import ProjectPages
from plugins.project_pages.onnx_body import FUNCTIONS
from plugins.project_pages.reference import project_pages
from tests.emulator.interpreter import call
from tests.plugins.harness import run_body
from tests.plugins.test_kernels import to_bits, to_torch

CASES = {
    "some": {"counts": (4,), "done": (1,)},
    "nothing listed": {"counts": (0,), "done": (3,)},
    "nothing new": {"counts": (3,), "done": (9,)},
    "all": {"counts": (9,), "done": (0,)},
    "batch": {"counts": (2, 0, 9), "done": (0, 4, 5)},
    "grouped heads, odd sizes": {"counts": (5,), "done": (0,), "head_dim": 24, "kv_heads": 1, "page_size": 5},
    "long pages": {"counts": (2,), "done": (0,), "page_size": 70, "hidden": 40},
}
BOUND = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2}


def inputs(counts, done, head_dim=16, kv_heads=2, page_size=4, hidden=48, pages=9, poison=np.nan):
    """Inputs of the op, float32; of each row a random `done` pages are projected, all others hold `poison`."""
    rng, batch = np.random.default_rng(3), len(counts)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    angle = rng.random((batch, pages, page_size, head_dim // 2), np.float32) * 6
    stores = [normal(batch, kv_heads, pages, page_size, head_dim) for _ in range(2)]
    projected = np.zeros((batch, pages), np.int64)
    for row, number in enumerate(done):
        projected[row, rng.permutation(pages)[:number]] = 1
        for store in stores:
            store[row, :, projected[row] == 0] = poison
    listed = np.stack([rng.permutation(pages) for _ in range(batch)]).astype(np.int64)
    weights = [normal(kv_heads * head_dim, hidden) / hidden**0.5 for _ in range(2)]
    turn = np.cos(angle), np.sin(angle)
    return [normal(batch, pages, page_size, hidden), *weights, *turn, *stores, projected, listed, np.array(counts)]


def typed(arrays, dtype):
    kinds = [tensor.dtype for tensor in ProjectPages.inputs]
    return [
        to_bits(torch.from_numpy(array).to(getattr(torch, dtype))) if kind == "model" else array
        for array, kind in zip(arrays, kinds, strict=True)
    ]


def attributes(arrays):
    _, kv_heads, _, page_size, head_dim = arrays[5].shape
    hidden = arrays[0].shape[-1]
    return {"hidden": hidden, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size, "cells": 3}


def by_onnx(dtype, arrays):
    kinds = [getattr(np, dtype)] * 2 + [np.int64]
    return run_body(FUNCTIONS, arrays, kinds, **attributes(arrays))


def by_kernel(dtype, arrays):
    return call(ProjectPages(**attributes(arrays)), dtype, arrays)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        (by_onnx, "float32"),
        (by_onnx, "float16"),
        (by_kernel, "float32"),
        (by_kernel, "float16"),
        (by_kernel, "bfloat16"),
    ],
)
def test_equals_the_reference(case, run, dtype):
    """Unprojected pages are NaN before and, where nobody wants them, after."""
    arrays = typed(inputs(**CASES[case]), dtype)
    expected = project_pages(*map(to_torch, arrays), **attributes(arrays))
    found = [to_torch(array) for array in run(dtype, arrays)]
    assert torch.equal(found[2], expected[2])
    for name, left, right in zip(("key", "value"), expected, found, strict=False):
        left, right = left.float(), right.float()
        assert torch.equal(left.isnan(), right.isnan()), name
        assert not right[:, :, :][expected[2][:, None].expand(right.shape[:3]) == 1].isnan().any(), name
        assert (left - right).nan_to_num().abs().max() <= BOUND[dtype], name


def test_reference_projects_what_is_wanted_and_nothing_else():
    arrays = list(map(torch.from_numpy, inputs(counts=(4,), done=(2,))))
    features, key_weight, value_weight, cos, sin, page_key, page_value, projected, pages, _ = arrays
    key, value, present = project_pages(*arrays, 48, 2, 16, 4, 3)
    wanted = set(pages[0, :4].tolist())
    for page in range(9):
        held = bool(projected[0, page])
        assert bool(present[0, page]) == (held or page in wanted)
        if held:
            assert torch.equal(key[0, :, page], page_key[0, :, page])
            assert torch.equal(value[0, :, page], page_value[0, :, page])
        elif page in wanted:
            plain = (features[0, page] @ key_weight.T).view(1, 4, 2, 16).transpose(1, 2)
            turned = rotary(plain, cos[0, page][None, None], sin[0, page][None, None])[0]
            torch.testing.assert_close(key[0, :, page], turned)
            torch.testing.assert_close(
                value[0, :, page], (features[0, page] @ value_weight.T).view(4, 2, 16).mT.mT.transpose(0, 1)
            )
        else:
            assert key[0, :, page].isnan().all()
