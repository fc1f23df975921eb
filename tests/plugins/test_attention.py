"""The attention ops: ONNX bodies, dynamic and static, against the references, and those against first principles."""

import numpy as np
import pytest

from plugins.cached_attention import onnx_body as cached_body
from plugins.cached_attention import onnx_static as cached_static
from plugins.hierarchical_attention import onnx_body as hierarchical_body
from plugins.hierarchical_attention import onnx_static as hierarchical_static
from tests.plugins.checks import ATTENTION_BOUND
from tests.plugins.harness import by_body, by_reference
from tests.plugins.inputs import Sizes, attention_inputs, rounded

JUNK = 1e3  # in unused cache slots and unlisted pages
CASES = {
    "decode": Sizes(head_dim=8),
    "prefill": Sizes(head_dim=8, steps=7),
    "first tokens": Sizes(head_dim=8, past=(0,), steps=5),
    "grouped heads": Sizes(head_dim=8, kv_heads=2),
    "no page": Sizes(head_dim=8, counts=(0,)),
    "all pages": Sizes(head_dim=8, counts=(9,)),
    "short pages": Sizes(head_dim=8, counts=(5,), short_pages=True),
    "batch": Sizes(head_dim=8, past=(41, 37, 50), counts=(2, 0, 9), begin=(3, 1, 0), kv_heads=1, short_pages=True),
    "batch prefill": Sizes(head_dim=8, past=(41, 37, 50), counts=(0, 0, 0), begin=(3, 1, 0), steps=4),
}
LARGE = {  # pages so large that a few heads of one row go at a time: 4 of 12
    "large pages": Sizes(heads=24, kv_heads=12, head_dim=64, page_size=200, short_pages=True),
    "large pages, batch": Sizes(
        heads=12, kv_heads=12, head_dim=64, page_size=200, past=(41, 30), counts=(1, 4), begin=(3, 0)
    ),
    "large pages, prefill": Sizes(
        heads=12, kv_heads=12, head_dim=64, page_size=200, past=(41, 30), counts=(3, 0), begin=(3, 0), steps=3
    ),
}
BODIES = {
    "dynamic": (cached_body.FUNCTIONS, hierarchical_body.FUNCTIONS),
    "static": (cached_static.FUNCTIONS, hierarchical_static.FUNCTIONS),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_onnx_bodies_equal_reference(case, body, dtype):
    if body == "static" and case in LARGE:
        pytest.skip("one way for pages of any size")
    sizes, bound = (CASES | LARGE)[case], ATTENTION_BOUND[dtype]
    for op, functions in zip((sizes.cached(), sizes.hierarchical()), BODIES[body], strict=True):
        arrays = rounded(op, dtype, attention_inputs(sizes, seed=7, poison=JUNK))
        expected, found = by_reference(op, dtype, arrays), by_body(functions)(op, dtype, arrays)
        for name, left in expected.items():
            right = found[name]
            assert np.isfinite(right).all(), name
            assert right.shape == left.shape, name
            np.testing.assert_allclose(right, left, rtol=bound, atol=bound, err_msg=name)


def test_reference_is_one_softmax_over_tokens_and_pages():
    sizes = Sizes(head_dim=8, counts=(4,))
    arrays = attention_inputs(sizes, seed=1, poison=JUNK)
    made = by_reference(sizes.hierarchical(), "float32", arrays)
    length, head_dim = arrays["positions"][0, 0], sizes.head_dim

    def turn(x):
        first, second = np.split(x.reshape(4, head_dim), 2, axis=-1)
        c, s = arrays["cos"][length], arrays["sin"][length]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    for head in range(4):
        keys = np.concatenate([arrays["past_key"][0, head, :length], turn(arrays["key"])[head][None]])
        values = np.concatenate(
            [arrays["past_value"][0, head, :length], arrays["value"].reshape(4, head_dim)[head][None]]
        )
        listed = arrays["pages"][0, : arrays["page_count"][0]]
        joint = np.concatenate([keys, arrays["page_key"][0, head, listed].reshape(-1, head_dim)])
        scores = joint @ turn(arrays["query"])[head] / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        expected = weights @ np.concatenate([values, arrays["page_value"][0, head, listed].reshape(-1, head_dim)])
        np.testing.assert_allclose(made["context"][0, 0, head * head_dim :][:head_dim], expected, atol=1e-6)

    assert made["map"].shape == (1, sizes.grid, sizes.grid)
    assert 0 < float(made["map"].sum()) < 4  # four heads, part of whose weight lies outside the image


def test_only_the_last_query_sees_pages():
    sizes = Sizes(head_dim=8, steps=5, counts=(9,))
    arrays = attention_inputs(sizes, seed=2, poison=JUNK)
    with_pages = by_reference(sizes.hierarchical(), "float32", arrays)
    plain = by_reference(sizes.cached(), "float32", arrays)
    assert np.array_equal(with_pages["context"][:, :-1], plain["context"][:, :-1])
    assert not np.allclose(with_pages["context"][:, -1], plain["context"][:, -1], atol=1e-3)
    assert np.array_equal(with_pages["map"], plain["map"])
