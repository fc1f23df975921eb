"""The attention ops: ONNX bodies, dynamic and static, against the references, and those against first principles."""

import numpy as np
import pytest
import torch

from plugins.cached_attention import onnx_body as cached_body
from plugins.cached_attention import onnx_static as cached_static
from plugins.cached_attention.reference import cached_attention
from plugins.hierarchical_attention import onnx_body as hierarchical_body
from plugins.hierarchical_attention import onnx_static as hierarchical_static
from plugins.hierarchical_attention.reference import hierarchical_attention
from tests.plugins.harness import run_body

GRID, CELLS, SIZE, HEAD_DIM, CAPACITY, CONTEXT = 6, 3, 4, 8, 60, 100
BOUND = {np.float32: 2e-6, np.float16: 4e-3}


def inputs(rng, dtype, *, batch=1, steps=1, heads=4, kv_heads=4, past=None, counts=None, short_pages=False):
    """Inputs of flex::HierarchicalAttention in order; unused cache slots and unlisted pages hold junk."""

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    past = np.array([41, 37, 50][:batch] if past is None else past, np.int64)
    angle = np.outer(np.arange(CONTEXT), 1 / 10000 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cache = [normal(batch, kv_heads, CAPACITY, HEAD_DIM) for _ in range(2)]
    for half in cache:
        for row, length in enumerate(past):
            half[row, :, length + steps :] = 1e3  # beyond what any query may see
    lengths = np.full(CELLS**2, SIZE, np.int64)
    if short_pages:
        lengths[::2] = SIZE - 1
    counts = np.array([2, 0, 9][:batch] if counts is None else counts, np.int64)
    pages = np.stack([rng.permutation(CELLS**2) for _ in range(batch)]).astype(np.int64)
    store = [normal(batch, kv_heads, CELLS**2, SIZE, HEAD_DIM) for _ in range(2)]
    for half in store:
        for page, length in enumerate(lengths):
            half[:, :, page, length:] = 1e3
        for row in range(batch):
            half[row, :, pages[row, counts[row] :]] = 1e3
    return [
        normal(batch, steps, heads * HEAD_DIM),
        normal(batch, steps, kv_heads * HEAD_DIM),
        normal(batch, steps, kv_heads * HEAD_DIM),
        *cache,
        past[:, None] + np.arange(steps),
        np.cos(angle).astype(np.float32),
        np.sin(angle).astype(np.float32),
        np.array([3, 1, 0][:batch], np.int64),
        *store,
        lengths,
        pages,
        counts,
    ]


def attributes(arrays) -> dict[str, int]:
    """Those of the op that takes these inputs, in order."""
    kv_heads = arrays[3].shape[1]
    sizes = {"heads": arrays[0].shape[-1] // HEAD_DIM, "kv_heads": kv_heads, "head_dim": HEAD_DIM}
    return sizes | ({"page_size": SIZE} if len(arrays) > 9 else {}) | {"grid": GRID}


def run_reference(op, arrays):
    return op(*(torch.from_numpy(array) for array in arrays), *attributes(arrays).values())


def compare(op, functions, arrays, dtype):
    expected = run_reference(op, arrays)
    found = run_body(functions, arrays, [dtype, dtype, dtype, np.float32], **attributes(arrays))
    for name, left, right in zip(("context", "present_key", "present_value", "map"), expected, found, strict=True):
        assert np.isfinite(right).all(), name
        assert right.shape == tuple(left.shape), name
        np.testing.assert_allclose(right, left.numpy(), rtol=BOUND[dtype], atol=BOUND[dtype], err_msg=name)


CASES = {
    "decode": {},
    "prefill": {"steps": 7},
    "first tokens": {"past": [0], "steps": 5},
    "grouped heads": {"kv_heads": 2},
    "no page": {"counts": [0]},
    "all pages": {"counts": [9]},
    "short pages": {"counts": [5], "short_pages": True},
    "batch": {"batch": 3, "kv_heads": 1, "short_pages": True},
    "batch prefill": {"batch": 3, "steps": 4, "counts": [0, 0, 0]},
}


BODIES = {"dynamic": (cached_body, hierarchical_body), "static": (cached_static, hierarchical_static)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("case", CASES)
def test_onnx_bodies_equal_reference(case, body, dtype):
    arrays = inputs(np.random.default_rng(7), dtype, **CASES[case])
    cached, hierarchical = BODIES[body]
    compare(hierarchical_attention, hierarchical.FUNCTIONS, arrays, dtype)
    compare(cached_attention, cached.FUNCTIONS, arrays[:9], dtype)


def test_reference_is_one_softmax_over_tokens_and_pages():
    arrays = inputs(np.random.default_rng(1), np.float32, counts=[4])
    query, key, value, past_key, past_value, positions, cos, sin, _, page_key, page_value, _, pages, count = arrays
    context, _, _, map = run_reference(hierarchical_attention, arrays)

    def turn(x):
        first, second = np.split(x.reshape(4, HEAD_DIM), 2, axis=-1)
        c, s = cos[positions[0, 0]], sin[positions[0, 0]]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    length = positions[0, 0]
    for head in range(4):
        keys = np.concatenate([past_key[0, head, :length], turn(key)[head][None]])
        values = np.concatenate([past_value[0, head, :length], value.reshape(4, HEAD_DIM)[head][None]])
        listed = pages[0, : count[0]]
        joint = np.concatenate([keys, page_key[0, head, listed].reshape(-1, HEAD_DIM)])
        scores = joint @ turn(query)[head] / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        expected = weights @ np.concatenate([values, page_value[0, head, listed].reshape(-1, HEAD_DIM)])
        np.testing.assert_allclose(context[0, 0, head * HEAD_DIM :][:HEAD_DIM], expected, atol=1e-6)

    assert map.shape == (1, GRID, GRID)
    assert 0 < float(map.sum()) < 4  # four heads, part of whose weight lies outside the image


def test_only_the_last_query_sees_pages():
    arrays = inputs(np.random.default_rng(2), np.float32, steps=5, counts=[9])
    with_pages = run_reference(hierarchical_attention, arrays)
    plain = run_reference(cached_attention, arrays[:9])
    assert torch.equal(with_pages[0][:, :-1], plain[0][:, :-1])
    assert not torch.allclose(with_pages[0][:, -1], plain[0][:, -1], atol=1e-3)
    assert torch.equal(with_pages[3], plain[3])
