"""RGB image -> pixel tiles, equal to the official preprocessing (hi-res bit for bit), in numpy and Pillow."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import PIL.Image

from engines.bundle.geometry import Geometry

_BICUBIC = PIL.Image.Resampling.BICUBIC
_BAND = 64  # rows padded at a time: 1 MB of a 4000-pixel side, which stays in the processor's cache


def preprocess(image: PIL.Image.Image, geometry: Geometry) -> np.ndarray:
    """RGB image -> tiles [1 + zoom**2, 3, lowres, lowres] float32: the low-res image, then the hi-res tiles by row."""
    zoom, side = geometry.zoom, geometry.lowres
    hires = hires_pixels(image, geometry)
    tiles = np.empty((1 + zoom * zoom, 3, side, side), np.float32)
    tiles[0] = lowres_pixels(hires, geometry)
    grid = hires.reshape(3, zoom, side, zoom, side).transpose(1, 3, 0, 2, 4)  # [row, column, 3, side, side]
    tiles[1:].reshape(zoom, zoom, 3, side, side)[...] = grid
    return tiles


def hires_pixels(image: PIL.Image.Image, geometry: Geometry) -> np.ndarray:
    """RGB image -> normalised pixels [3, highres, highres] float32.

    Official: pad to a square with the mean colour, bicubic resize of uint8, * 1/255 in float64, normalise in float32.
    """
    square = _padded_and_resized(image, tuple(int(channel * 255) for channel in geometry.image_mean), geometry.highres)
    # A byte has 256 values: look up what each becomes instead of computing it for three million.
    values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (geometry.image_mean, geometry.image_std))
    table = (values - mean) / std  # [3, 256]
    pixels = np.asarray(square)
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])


def lowres_pixels(hires: np.ndarray, geometry: Geometry) -> np.ndarray:
    """[3, highres, highres] -> [3, lowres, lowres] float32 (official: F.interpolate, bilinear, antialias=True)."""
    weights = _antialiased_bilinear(geometry.highres, geometry.lowres)
    lowres: np.ndarray = weights @ hires @ weights.T
    return lowres.astype(np.float32)


def _padded_and_resized(image: PIL.Image.Image, background: tuple[int, ...], out: int) -> PIL.Image.Image:
    """Pad to a square, resize to out x out: bit for bit, but without the padded square, 1 GB for the longest side.

    Pillow resizes rows first, each on its own, rounds to bytes, then columns. So rows can be narrowed before the
    background goes above and below them, and where it goes left and right, a band of rows can be padded at a time.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = PIL.Image.new("RGB", (out, side), background)
    if width == side:
        narrow.paste(image.resize((out, height), _BICUBIC), (0, top))
    else:
        for row in range(0, height, _BAND):
            rows = min(_BAND, height - row)
            band = PIL.Image.new("RGB", (side, rows), background)
            band.paste(image.crop((0, row, width, row + rows)), (left, 0))
            narrow.paste(band.resize((out, rows), _BICUBIC), (0, row))
    return narrow.resize((out, out), _BICUBIC)


@lru_cache(maxsize=4)
def _antialiased_bilinear(size: int, out: int) -> np.ndarray:
    """[out, size] float32: a triangle as wide as the reduction, centred on each output pixel, rows summing to 1."""
    scale = size / out
    support = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centre[:, None]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    whole: np.ndarray = weights / weights.sum(1, keepdims=True)
    return whole.astype(np.float32)
