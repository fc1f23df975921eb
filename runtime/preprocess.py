"""RGB image -> pixel tiles, equal to the official preprocessing (hi-res bit for bit), in numpy and Pillow."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import PIL.Image

from engines.geometry import Geometry


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
    square = _pad_to_square(image, tuple(int(channel * 255) for channel in geometry.image_mean))
    if square.size != (geometry.highres, geometry.highres):
        square = square.resize((geometry.highres, geometry.highres), PIL.Image.Resampling.BICUBIC)
    # A byte has 256 values: look up what each becomes instead of computing it for three million.
    values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (geometry.image_mean, geometry.image_std))
    table = (values - mean) / std  # [3, 256]
    pixels = np.asarray(square)
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])


def lowres_pixels(hires: np.ndarray, geometry: Geometry) -> np.ndarray:
    """[3, highres, highres] -> [3, lowres, lowres] float32 (official: F.interpolate, bilinear, antialias=True)."""
    weights = _antialiased_bilinear(geometry.highres, geometry.lowres)
    return (weights @ hires @ weights.T).astype(np.float32)


def margins(width: int, height: int, grid: int) -> tuple[int, int]:
    """(rows, columns) of the low-res grid that the selection zeroes at each end: the padding of a non-square image.

    Official: p = int((|w - h| // 2) / max(w, h) * grid); rows if w > h, else columns.
    """
    padding = int((abs(width - height) // 2) / max(width, height) * grid)
    return (padding, 0) if width > height else (0, padding)


def _pad_to_square(image: PIL.Image.Image, background: tuple[int, ...]) -> PIL.Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = PIL.Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@lru_cache(maxsize=4)
def _antialiased_bilinear(size: int, out: int) -> np.ndarray:
    """[out, size] float32: a triangle as wide as the reduction, centred on each output pixel, rows summing to 1."""
    scale = size / out
    support = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centre[:, None]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
