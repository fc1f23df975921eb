"""Pixels against the official ones: hi-res bit for bit, low-res within 1e-5."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engines.bundle.pages import margins
from runtime.image import load_image
from runtime.preprocess import hires_pixels, lowres_pixels, preprocess
from tests.geometries import official, tiny
from tests.paths import OFFICIAL

DATA = OFFICIAL / "preprocess"
NAMES = ["pp_rgb", "pp_rgba", "pp_grey", "pp_palette", "pp_rgb_1500"]


@pytest.mark.parametrize("name", NAMES)
def test_official_pixels(name):
    g = official()
    hires = hires_pixels(load_image(DATA / f"{name}.png", exif=False), g)
    with np.load(DATA / "preprocess.npz") as golden:
        whole = f"{name}_1008"
        if whole in golden:
            assert np.array_equal(hires, golden[whole])
        else:
            assert np.array_equal(hires[:, 100:116], golden[f"{whole}_rows_100_116"])
        assert np.abs(lowres_pixels(hires, g) - golden[f"{name}_336"]).max() <= 1e-5


@pytest.mark.parametrize(
    "size",
    [(640, 427), (427, 640), (333, 1), (1, 333), (1200, 3), (1009, 1008), (1007, 1008), (1008, 700), (700, 1008)],
)
def test_padding_by_bands_is_padding_the_whole_image(size):
    g = official()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    whole = square.resize((g.highres, g.highres), Image.Resampling.BICUBIC)
    assert np.array_equal(hires_pixels(image, g), hires_pixels(whole, g))


@pytest.mark.parametrize("g", [official(), official(zoom=2), official(zoom=1), tiny(), tiny(zoom=5)])
def test_low_res_is_torchs_antialiased_bilinear(g):
    hires = np.random.default_rng(0).standard_normal((3, g.highres, g.highres), dtype=np.float32)
    size = (g.lowres, g.lowres)
    expected = F.interpolate(torch.from_numpy(hires)[None], size, mode="bilinear", antialias=True)[0].numpy()
    assert np.abs(lowres_pixels(hires, g) - expected).max() <= 1e-5


def test_tiles_are_the_image_row_by_row():
    g = tiny()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    tiles, hires = preprocess(image, g), hires_pixels(image, g)
    assert tiles.shape == (10, 3, 112, 112) and tiles.dtype == np.float32
    assert np.array_equal(tiles[0], lowres_pixels(hires, g))
    assert np.array_equal(tiles[1 + 3 * 1 + 2], hires[:, 112:224, 224:336])


def test_margins():
    with np.load(DATA.parent / "selection.npz") as golden:
        sizes, expected = golden["ori_sizes_wh"].tolist(), golden["margin_patches"].tolist()
    for (width, height), patches in zip(sizes, expected, strict=True):
        assert margins(width, height, 24) == ((patches, 0) if width > height else (0, patches))
