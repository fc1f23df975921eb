"""transformers' CLIP preprocessing against ours, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from engines.bundle.geometry import Geometry
from runtime.preprocess import hires_pixels
from tests.geometries import CLIP_MEAN, CLIP_STD, official, tiny

SIZES = [(64, 64), (1008, 1008), (336, 336), (1500, 1500), (7, 7), (140, 90), (90, 141), (1, 40), (1200, 17)]


def photo(width: int, height: int) -> PIL.Image.Image:
    """Smooth shapes with noise: bicubic overshoots on both."""
    rng = np.random.default_rng([width, height])
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 9 + k) + np.cos(columns / (5 + k)) for k in range(3)], -1)
    noisy = 128 + 60 * waves + rng.normal(0, 25, waves.shape)
    return PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def expand2square(image: PIL.Image.Image, mean: tuple[float, ...]) -> PIL.Image.Image:
    """The official padding (LLaVA's mm_utils): the image in the middle of a square of the mean colour."""
    side = max(image.size)
    square = PIL.Image.new(image.mode, (side, side), tuple(int(x * 255) for x in mean))
    square.paste(image, tuple((side - length) // 2 for length in image.size))
    return square


def pixels_of(image: PIL.Image.Image, g: Geometry) -> np.ndarray:
    """[3, highres, highres] float32, as the official code asks for them: another size, the rest as CLIP has it."""
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": g.highres, "width": g.highres}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": g.highres}, crop_size=size, image_mean=g.image_mean, image_std=g.image_std
    )
    return processor(expand2square(image, g.image_mean), return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels(size):
    image = photo(*size)
    expected, found = pixels_of(image, official()), hires_pixels(image, official())
    assert expected.shape == found.shape == (3, 1008, 1008) and found.dtype == expected.dtype == np.float32
    assert np.array_equal(found, expected)


def test_another_side_and_another_mean():
    g = replace(tiny(), image_mean=(0.5, 0.25, 0.4), image_std=(0.5, 0.3, 0.2))
    image = photo(123, 77)
    assert np.array_equal(hires_pixels(image, g), pixels_of(image, g))


def test_the_numbers_are_those_of_clip():
    """What geometries in these tests take for CLIP's mean and deviation is what transformers does."""
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    assert tuple(processor.image_mean) == CLIP_MEAN and tuple(processor.image_std) == CLIP_STD
    assert processor.resample == PIL.Image.Resampling.BICUBIC
