"""Reading an image the way the official scripts do: whatever it is, `convert("RGB")`, if that is faithful."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import PIL.Image

from engines.errors import ImageError

MAX_PIXELS = 64_000_000  # as decoded; more than any phone's default, less than a decompression bomb
MAX_SIDE = 16_384  # pixels: padding makes a square of the long side
EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}

ImageSource = str | os.PathLike[str] | bytes | PIL.Image.Image | np.ndarray


def load_image(source: ImageSource) -> PIL.Image.Image:
    """An RGB image from a path, encoded bytes, a PIL image, or a uint8 array [H, W, 3] in RGB order.

    Alpha is dropped, palettes are resolved and CMYK is converted (official: `Image.convert("RGB")`); EXIF rotation is
    not applied. Raises ImageError for what cannot be read or has no faithful 8-bit RGB reading.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, PIL.Image.Image):
        with _typed_errors("the image"):  # an image from Image.open is decoded only now
            return _checked(source, "the image").convert("RGB")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), "the image bytes")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:  # looking is enough for an OSError: a name too long, a parent folder without permission
            if not path.is_file():
                what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
                raise ImageError(f"image {path} {what}", expected="an image file")
            with open(path, "rb") as file:
                return _decode(file, str(path))
        except OSError as error:
            raise ImageError(
                f"cannot read {path!s:.200}: {error.strerror or error}",
                expected="a readable file",
                fix="check the path and its permissions",
            ) from error
    raise ImageError(
        f"an image of type {type(source).__name__}", expected="path, bytes, PIL.Image or uint8 array [H, W, 3]"
    )


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    """Of uint8 [H, W, 3]; ImageError for any other array, with the line that makes it one."""
    if array.ndim != 3 or array.shape[2] != 3:
        fix = (
            "array[..., :3]" if array.ndim == 3 and array.shape[2] == 4 else "np.stack([grey] * 3, -1) for a grey image"
        )
        raise ImageError(f"an array of shape {list(array.shape)}", expected="[height, width, 3], RGB", fix=fix)
    if array.dtype != np.uint8:
        scaled = "(255 * array).astype(np.uint8) for values 0..1" if array.dtype.kind == "f" else None
        raise ImageError(f"an array of {array.dtype}", expected="uint8, 0..255", fix=scaled)
    _check_size(array.shape[1], array.shape[0], "the array")
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def _decode(file: IO[bytes], name: str) -> PIL.Image.Image:
    """Of an encoded image in `file`, which messages call `name`."""
    with _typed_errors(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit is lower
        with PIL.Image.open(file) as image:
            return _checked(image, name).convert("RGB")


@contextmanager
def _typed_errors(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageError; a lack of memory is not the image's fault and passes."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image Pillow knows", expected="PNG, JPEG, WebP, BMP, TIFF, ...") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged data
        raise ImageError(
            f"{name} cannot be decoded: {error}",
            expected="a complete image, and an open file behind an image from Image.open",
            fix="save or download it again",
        ) from error


def _checked(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Judged by the header, before any pixel is decoded."""
    _check_size(*image.size, name)
    # A phone's MPO is one photo with previews behind it; anything else with several frames has no one image.
    frames = getattr(image, "n_frames", 1)
    if image.format != "MPO" and frames > 1:
        raise ImageError(
            f"{name} has {frames} frames", expected="one", fix="pick one: image.seek(0); image.convert('RGB')"
        )
    if image.mode not in EIGHT_BIT:
        raise ImageError(
            f"{name} has mode {image.mode}: more than 8 bits per channel, which RGB would clip",
            expected="8 bits per channel",
            fix="scale it to 8 bits first, for 16-bit: Image.fromarray((np.asarray(image) >> 8).astype('uint8'))",
        )
    return image


def _check_size(width: int, height: int, name: str) -> None:
    """ImageError for an image of no pixels, or of too many."""
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels", expected="at least 1 x 1")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"{width} x {height} pixels")


def _too_large(name: str, what: str) -> ImageError:
    return ImageError(
        f"{name} is too large: {what}",
        expected=f"at most {MAX_PIXELS / 1e6:.0f} megapixels and {MAX_SIDE} pixels per side",
        fix="shrink it first, the model sees it at its own resolution anyway: image.thumbnail((4096, 4096))",
    )
