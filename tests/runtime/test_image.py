"""Which images are read, how, and what the others get."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from runtime import ImageError
from runtime.image import MAX_SIDE, load_image

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_eight_bit_images_are_converted_as_officially(mode):
    image = Image.fromarray(RGB).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(load_image(image)), expected)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert np.array_equal(np.asarray(load_image(encoded(image, kind))), expected)


def test_sources(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(Image.fromarray(RGB)))
    for source in (path, str(path), path.read_bytes(), RGB, RGB[::-1][::-1], Image.fromarray(RGB)):
        image = load_image(source)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), RGB)


def test_no_file_stays_open(tmp_path):
    for name, data in (("good.png", PNG), ("short.png", PNG[: len(PNG) // 2]), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:  # a file that is collected open is a ResourceWarning
        warnings.simplefilter("always")
        for path in sorted(tmp_path.iterdir()):
            with contextlib.suppress(ImageError):
                load_image(path)
        gc.collect()
    assert not [warning for warning in caught if warning.category is ResourceWarning]


def test_exif_rotation_is_not_applied():
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6
    assert load_image(encoded(image, "JPEG", exif=exif)).size == (30, 20)


def test_a_phones_mpo_is_its_main_image():
    photo = Image.fromarray(RGB)
    data = encoded(photo, "MPO", save_all=True, append_images=[photo.resize((9, 6))])
    assert load_image(data).size == (30, 20)


def frames(kind: str) -> bytes:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    return encoded(first, kind, save_all=True, append_images=[second])


def closed(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.close()
    return image


PNG = encoded(Image.fromarray(RGB))
BAD = {
    "empty": (b"", "not an image"),
    "text": (b"hello", "not an image"),
    "truncated png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "truncated jpeg": (encoded(Image.fromarray(RGB).resize((300, 300)), "JPEG")[:2000], "cannot be decoded"),
    "damaged png": (PNG[:60] + bytes(40) + PNG[100:], "cannot be decoded"),
    "animated gif": (frames("GIF"), "2 frames"),
    "animated png": (frames("PNG"), "2 frames"),
    "16-bit png": (encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), "mode I;16"),
    "float tiff": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "mode F"),
    "100 megapixels": (encoded(Image.new("1", (10_000, 10_000))), "too large"),
    "200 megapixels": (encoded(Image.new("1", (20_000, 10_000))), "too large"),
    "long side": (encoded(Image.new("1", (MAX_SIDE + 1, 2))), "too large"),
    "truncated, opened by the caller": (Image.open(io.BytesIO(PNG[: len(PNG) // 2])), "cannot be decoded"),
    "closed": (closed(PNG), "cannot be decoded"),
    "closed gif": (closed(frames("GIF")), "cannot be decoded"),
    "no conversion": (Image.new("La", (4, 4)), "cannot be decoded"),
    "integer image": (Image.new("I", (4, 4)), "mode I"),
    "zero-size image": (Image.new("RGB", (0, 5)), "0 x 5"),
    "zero-size array": (np.zeros((0, 5, 3), np.uint8), "5 x 0"),
    "large array": (np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)), "too large"),
    "float array": (np.zeros((4, 4, 3)), "float64"),
    "grey array": (np.zeros((4, 4), np.uint8), r"shape \[4, 4\]"),
    "rgba array": (np.zeros((4, 4, 4), np.uint8), r"shape \[4, 4, 4\]"),
    "channels first": (np.zeros((3, 4, 4), np.uint8), r"shape \[3, 4, 4\]"),
    "a number": (7, "type int"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_images(bad):
    source, text = BAD[bad]
    with pytest.raises(ImageError, match=text) as caught:
        load_image(source)
    assert caught.value.expected


def test_bad_paths(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="does not exist"):
        load_image("null\0byte")
    with pytest.raises(ImageError, match="cannot read"):
        load_image("a" * 5000)  # a base64 string, for instance
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is no file"):
        load_image(tmp_path / "pipe")


def test_a_lack_of_memory_is_not_blamed_on_the_image(monkeypatch):
    def convert(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(MemoryError):
        load_image(PNG)
