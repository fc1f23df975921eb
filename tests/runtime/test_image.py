"""Which images are read, how, and what the others get."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from runtime import ImageError, OptionError
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


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"x.png"


def oriented(orientation: object, kind: str, image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_viewers_do(kind, orientation, tmp_path):
    """For every way to hold a camera, however the image is given; exif=False is Pillow's own convert("RGB")."""
    data = oriented(orientation, kind, Image.fromarray(RGB))
    path = tmp_path / "photo"
    path.write_bytes(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert expected.shape == ((30, 20, 3) if orientation > 4 else (20, 30, 3))
    lazy, loaded, converted = (Image.open(io.BytesIO(data)) for _ in range(3))
    loaded.load()
    for source in (path, str(path), data, bytearray(data), lazy, loaded, converted.convert("RGB")):
        upright = load_image(source)
        assert np.array_equal(np.asarray(upright), expected)
        assert np.array_equal(np.asarray(load_image(upright)), expected)  # once is enough
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (path, data, Image.open(io.BytesIO(data))):
        assert np.array_equal(np.asarray(load_image(source, exif=False)), stored)


def test_a_phones_upright_photo_is_the_plain_one():
    """Not only as Pillow says: the top of the scene is what lies to the right in what the sensor stored (6)."""
    top = np.zeros((20, 30, 3), np.uint8)
    top[:10] = 255
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(top)))  # counter-clockwise; the viewer turns it clockwise
    assert np.array_equal(np.asarray(load_image(oriented(6, "PNG", stored))), top)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_says_nothing(orientation):
    data = oriented(orientation, "PNG", Image.fromarray(RGB))
    assert np.array_equal(np.asarray(load_image(data)), RGB)


def with_exif(block: bytes) -> bytes:
    """A JPEG with this block, whatever it is."""
    data = encoded(Image.fromarray(RGB), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + data[2:]


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"garbage",
        b"II*\0" + struct.pack("<IH", 8, 65535),  # a directory of entries that are not there
        b"II*\0" + struct.pack("<I", 2**32 - 1),  # a directory far behind the end
        b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 3, 2**31, 0),  # two billion orientations
        b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 2, 4, 6, 0),  # an orientation that is text
        b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 0, 6, 0),  # none at all
        b"MM\0*" + random.Random(0).randbytes(5000),
        b"II*\0" + struct.pack("<IH", 8, 5000) + b"".join(struct.pack("<HHII", n, 7, 60_000, 0) for n in range(5000)),
    ],
)
def test_a_damaged_exif_block_is_no_reason_to_refuse_an_image(block):
    """Nor to fill the terminal: of the last one Pillow warns 5000 times."""
    data = with_exif(block)
    stored = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(RGB), "JPEG"))).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(load_image(data)), stored)


def test_threads_leave_the_filters_of_warnings_alone():
    before = list(warnings.filters)
    photos = [encoded(Image.fromarray(RGB).resize((200 + 50 * n, 150)), "PNG") for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for image in pool.map(load_image, photos * 20):
            assert image.height == 150
    assert list(warnings.filters) == before


def test_orientation_only_of_an_image():
    with pytest.raises(OptionError, match="exif=1"):
        load_image(RGB, exif=1)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "ICO", "SGI", "MSP"])
def test_other_formats_are_refused(kind, tmp_path):
    """EPS is a program for Ghostscript; the others are decoders that no photo needs."""
    data = encoded(Image.fromarray(RGB).convert("1" if kind == "MSP" else "RGB"), kind)
    with pytest.raises(ImageError, match="not an image that is read here"):
        load_image(data)
    opened = Image.open(io.BytesIO(data))
    with pytest.raises(ImageError, match=f"format {kind}") as caught:
        load_image(opened)
    assert "image.convert('RGB')" in caught.value.fix
    if kind != "EPS":  # which may need Ghostscript; then nothing is done without being asked for
        load_image(opened.convert("RGB"))


def test_ghostscript_is_never_started(tmp_path, monkeypatch):
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "photo.png"  # whatever its name says
    path.write_bytes(encoded(Image.fromarray(RGB), "EPS"))
    for source in (path, path.read_bytes(), Image.open(path)):
        with pytest.raises(ImageError):
            load_image(source)
    assert not started.exists()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP", "AVIF"])
def test_several_frames_are_refused_without_counting_them(kind, monkeypatch):
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    data, single = frames(kind), encoded(Image.fromarray(RGB), kind)
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    if kind in ("GIF", "TIFF"):  # the others have the number in their header
        monkeypatch.setattr(type(opened), "n_frames", property(lambda _: pytest.fail("counted")))
    for source in (data, opened):
        with pytest.raises(ImageError, match="2 frames or more"):
            load_image(source)
    assert load_image(single).size == (30, 20)


def test_a_tiff_of_many_frames_takes_no_time():
    """100,000 directories: walking all of them takes seconds."""
    data, count = bytearray(encoded(Image.fromarray(RGB), "TIFF")), 100_000
    (first,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<I", data, first + 2 + 12 * entries, len(data))
    tags = b"".join(struct.pack("<HHII", tag, 3, 1, 1) for tag in (0x100, 0x101, 0x106, 0x111))
    for _ in range(count):
        data += struct.pack("<H", 4) + tags + struct.pack("<I", len(data) + 54)
    begun = time.perf_counter()
    with pytest.raises(ImageError, match="2 frames or more"):
        load_image(data)
    assert time.perf_counter() - begun < 1


def test_what_errors_advise_works():
    """Each fix, done as it says, with the image that got the error."""
    animated = Image.open(io.BytesIO(frames("GIF")))
    deep = Image.fromarray(np.full((4, 4), 0x1234, np.uint16))
    alpha, grey, real = np.dstack([RGB, RGB[..., 0]]), RGB[..., 0], RGB / np.float32(255)
    for source, fix in (
        (animated, "image.seek(0); image.convert('RGB')"),
        (deep, "Image.fromarray((np.asarray(image) >> 8).astype('uint8'))"),
        (alpha, "array[..., :3]"),
        (grey, "np.stack([grey] * 3, -1)"),
        (RGB.transpose(2, 0, 1), "array.transpose(1, 2, 0)"),
        (real, "(255 * array).astype(np.uint8)"),
        (RGB > 99, "255 * array.astype(np.uint8)"),
        (RGB.astype(np.int64), "array.clip(0, 255).astype(np.uint8)"),
        (Image.fromarray(real[..., 0]), "Image.fromarray((255 * np.asarray(image)).astype('uint8'))"),
        (np.ma.masked_equal(RGB, 0), "array.filled(0)"),
        (Image.new("1", (10_000, 10_000)), "image.thumbnail((4096, 4096))"),
    ):
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert fix in caught.value.fix
        before, _, last = fix.rpartition("; ")
        names = {"image": source, "array": source, "grey": source, "np": np, "Image": Image}
        exec(before, names)
        made = eval(last, names)
        assert load_image(source if made is None else made).mode == "RGB"  # thumbnail changes the image itself


def test_bytes_of_any_kind():
    data = PNG
    twice = np.repeat(np.frombuffer(data, np.uint8), 2)
    for source in (memoryview(data), bytearray(data), memoryview(twice)[::2], memoryview(data).toreadonly()):
        assert np.array_equal(np.asarray(load_image(source)), RGB)
    released = memoryview(data)
    released.release()
    with pytest.raises(ImageError, match="released"):
        load_image(released)


class Kind(np.ndarray):
    pass


def test_arrays_of_any_layout():
    padded = np.zeros((20, 30, 5), np.uint8)
    padded[..., :3] = RGB
    constant = RGB.copy()
    constant.flags.writeable = False
    for source in (padded[..., :3], np.asfortranarray(RGB), constant, RGB.view(Kind), np.ma.masked_array(RGB)):
        assert np.array_equal(np.asarray(load_image(source)), RGB)
    for axes in ((0,), (1,), (2,), (0, 1, 2)):
        flipped = np.flip(RGB, axes)
        assert np.array_equal(np.asarray(load_image(flipped)), flipped)
    turned = RGB.transpose(1, 0, 2)
    assert np.array_equal(np.asarray(load_image(turned)), turned)


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
    "objects": (np.full((4, 4, 3), None), "array of object"),
    "booleans": (np.zeros((4, 4, 3), bool), "array of bool"),
    "masked": (np.ma.masked_equal(np.zeros((4, 4, 3), np.uint8), 0), "masked"),
    "one number": (np.array(7, np.uint8), r"shape \[\]"),
    "a list": ([[[0, 0, 0]]], "type list"),
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
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        load_image("a" * 5000)  # a base64 string, for instance
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is a pipe"):
        load_image(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is a device"):
        load_image("/dev/zero")
    (tmp_path / "loop.png").symlink_to("/dev/zero")
    with pytest.raises(ImageError, match="is a device"):
        load_image(tmp_path / "loop.png")
    with pytest.raises(ImageError, match="a path that is text"):
        load_image(BytesPath())


def test_a_lack_of_memory_is_not_blamed_on_the_image(monkeypatch):
    def convert(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(MemoryError):
        load_image(PNG)
