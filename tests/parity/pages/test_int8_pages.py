"""Hi-res pages in 8 bits: what it costs on the official runs, and that pages are all that changes.

Measured over all seven cases (13 steps, 81 cells x 4 layers each), float32 beside that, ONNX Runtime on the CPU, in the
worst case: 0.12 % of the cells flipped, logits 0.092 before any flip and 0.14 in all, all 91 tokens the official ones.
The bounds are about twice that. Nothing rounded is read before the start layer has selected for the first time.
"""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle.folder import Bundle
from engines.bundle.precision import FP32
from engines.errors import OptionError
from engines.ort import OrtModel
from engines.sizing.needs import Configuration, store_bytes
from export.build import BuildOptions, build
from runtime import Engine
from tests.conftest import once
from tests.parity.gates import INT8_PAGES, failures, measure, replayed


@pytest.fixture(scope="session")
def int8_pages(shared, checkpoint):
    """int8_pages(name, projection="eager") -> float32 bundle with int8 pages, "plain" ones checked by the build."""

    def get(name: str, projection: str = "eager"):
        out, check = shared / f"{name}-int8-pages-{projection}", "parity" if name == "plain" else "none"
        options = BuildOptions(checkpoint(name), out, precision="fp32", projection=projection, kv="int8", check=check)
        return once(out, lambda _: build(options))

    return get


def test_bounds(case, int8_pages):
    model = OrtModel(Bundle(int8_pages(case.weights)))
    steps = replayed(case, model, model.geometry)
    found = measure(case, steps)
    print(case.name, found)
    assert failures(found, INT8_PAGES) == []
    assert np.array_equal(steps[0].cells[0], case.cells(0)[0]) and found.other == 0


@pytest.mark.parametrize("case", ["small_150x200"], indirect=True)
def test_the_store_is_a_quarter_and_a_lazy_one_fills_as_the_eager_one(case, int8_pages):
    eager, lazy = (OrtModel(Bundle(int8_pages(case.weights, how))) for how in ("eager", "lazy"))
    g = eager.geometry
    image = case.encode(eager, g)
    stored = {name: value.numpy() for name, value in image.pages.items()}
    floats = 2 * len(g.reading_layers) * g.kv_heads * g.hires_side**2 * g.head_dim * 4
    assert sum(array.nbytes for array in stored.values()) == floats * (g.head_dim + 4) / (4 * g.head_dim)
    assert sum(array.nbytes for array in stored.values()) == store_bytes(Configuration(g, FP32))
    steps = list(zip(case.replay(lazy, g), case.replay(eager, g), strict=True))
    for (step, _, result), (_, _, other) in steps:
        assert np.array_equal(result.cells(), other.cells()), step
        error = np.abs(result.logits - other.logits).max()
        print(step, error)
        assert error <= 2e-3, step  # ties that are rounded to the other side
    decoder = steps[-1][0][1]
    done = decoder._inputs["projected"].numpy()[0].astype(bool)
    assert 0 < done.mean() < 1
    for index, layer in enumerate(g.reading_layers):
        for half in ("key", "value"):
            ours, theirs = decoder._inputs[f"page_{half}.{layer}"].numpy()[0], stored[f"page_{half}.{layer}"][0]
            moved = np.abs(ours[:, done[index]].astype(int) - theirs[:, done[index]])
            assert not ours[:, ~done[index]].any()
            assert moved.max(initial=0) <= 1 and (moved.size == 0 or moved.mean() < 1e-3)
            scale, other = (pages[f"page_{half}_scale.{layer}"] for pages in (decoder._inputs, image.pages))
            np.testing.assert_allclose(scale.numpy()[0, :, done[index]], other.numpy()[0, :, done[index]], rtol=1e-5)


@pytest.mark.parametrize("projection", ["eager", "lazy"])
def test_engine(int8_pages, projection):
    """The public interface: an image asked twice, and text alone, whose stand-in for pages is int8, too."""
    engine = Engine(int8_pages("plain", projection))
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    options = {"input_ids": [1, -200, 7, 9, 11], "max_new_tokens": 4, "stop_at_eos": False}
    with engine.image(photo) as view:
        first, again = view.ask(**options), view.ask(**options)
    assert first.token_ids == again.token_ids and max(map(max, first.stats.pages_read)) > 0
    assert len(engine.generate(None, input_ids=[1, 5, 9], max_new_tokens=3, stop_at_eos=False).token_ids) == 3


@pytest.mark.parametrize("case", ["small_150x200"], indirect=True)
def test_beside_float16_weights(case, checkpoint, int8_pages, tmp_path):
    """Their graphs compute in float32 on ONNX Runtime, those of a few heads within them, too."""
    out = build(BuildOptions(checkpoint(case.weights), tmp_path, precision="fp16", kv="int8", check="none")).path
    wide, narrow = (OrtModel(Bundle(path)) for path in (int8_pages(case.weights), out))
    pairs = zip(replayed(case, wide, wide.geometry), replayed(case, narrow, narrow.geometry), strict=True)
    assert max(np.abs(left.logits - right.logits).max() for left, right in pairs) < 0.3


def test_options():
    assert BuildOptions().kv == "model"
    with pytest.raises(OptionError, match="kv 'int4'") as caught:
        BuildOptions(kv="int4")
    assert "int8" in caught.value.expected
