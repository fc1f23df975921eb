"""What TensorRT's builder takes, against what builds have taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines.bundle.precision import FP16, INT4
from engines.sizing.builder import builder_bytes, largest_build
from engines.sizing.needs import Configuration, engines_of, weight_bytes
from tests.geometries import official

SLICE = official(layers=4, start_layer=1)


# Largest memory of the builds of that slice's parts, without the mapped weights.
@pytest.mark.parametrize(
    ("part", "lazy", "peak"),
    [("vision", False, 2.34e9), ("pages", False, 0.65e9), ("decoder", False, 6.74e9), ("decoder", True, 7.14e9)],
)
def test_builders_take_no_more_than_estimated(part, lazy, peak):
    held = weight_bytes(Configuration(replace(SLICE, lazy_pages=lazy), FP16))[part]
    assert peak - held < builder_bytes(part, held) < 1.4 * (peak - held)


# docs/figures.md: of each engine its layers, the bytes of its weights, and the largest memory of its build.
@pytest.mark.parametrize(
    ("layers", "held", "peak"),
    [(16, 459_343_872, 2.012e9), (8, 229_672_960, 1.085e9), (4, 128_468_992, 0.720e9), (2, 77_867_008, 0.538e9)],
)
def test_builders_of_some_layers_take_no_more_than_estimated(layers, held, peak):
    g = official(hidden=1024, intermediate=2752, layers=16, heads=8, kv_heads=8, vocab=13312, start_layer=3)
    engines = engines_of(Configuration(g, FP16, layers_per_engine=layers), "decoder")
    assert sum(size for _, size in engines) == 459_343_872 and max(engines, key=lambda each: each[1]) == (layers, held)
    estimate = builder_bytes("decoder", held, layers=layers)
    assert peak - held < estimate < 1.4 * (peak - held)
    assert largest_build(Configuration(g, FP16, layers_per_engine=layers), copied=False) >= estimate


def test_what_the_documentation_says_of_7b():
    """docs/tensorrt.md: int4 in one engine, two, four and eight."""
    for copied, expected in ((True, "13.0 6.7 4.0 2.6"), (False, "9.1 4.7 2.9 1.9")):
        sizes = [
            largest_build(Configuration(official(), INT4, layers_per_engine=n), copied=copied) for n in (32, 16, 8, 4)
        ]
        assert " ".join(f"{size / 1e9:.1f}" for size in sizes) == expected
