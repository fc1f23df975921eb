"""Which images are read, how, and what the others get."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import os
import random
import struct
import tempfile
import textwrap
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from PIL import Image, ImageOps

from runtime import ImageError, OptionError
from runtime.image import _LONGEST_TEXT, MAX_BYTES, MAX_SIDE, load_image

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
        load_image("a." * 2500)
    with pytest.raises(ImageError, match="no file and was read as base64, is not an image"):
        load_image("a" * 5000)
    with pytest.raises(ImageError, match="does not exist") as caught:
        load_image("https://example.com/photo.jpg")
    assert "download it first" in caught.value.fix
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


class Upload:
    """What web frameworks hand over: no file, but read like one."""

    def __init__(self, data: bytes, step: int) -> None:
        self.data, self.step = io.BytesIO(data), step

    def read(self, size: int) -> bytes:
        return self.data.read(min(size, self.step))


def test_file_objects(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    with open(path, "rb") as opened, open(path, "rb", buffering=0) as raw, tempfile.NamedTemporaryFile() as temporary:
        temporary.write(PNG)
        temporary.seek(0)
        for file in (opened, raw, io.BytesIO(PNG), Upload(PNG, 7), temporary):
            assert np.array_equal(np.asarray(load_image(file)), RGB)
        assert not opened.closed and not opened.read()  # read to its end, and still the caller's
        behind = io.BytesIO(b"head" + PNG)
        behind.seek(4)
        assert np.array_equal(np.asarray(load_image(behind)), RGB)
    reading, writing = os.pipe()
    os.write(writing, PNG)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert np.array_equal(np.asarray(load_image(pipe)), RGB)


class Later:
    async def read(self, size: int) -> bytes:
        return PNG


class Endless:
    given = 0

    def read(self, size: int) -> bytes:
        self.given += 1 << 24
        return bytes(1 << 24)


def at_end() -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG")
    return file


@pytest.mark.parametrize(
    ("make", "found", "fix"),
    [
        (lambda path: path.open(), "TextIOWrapper comes as text", 'open(path, "rb")'),
        (lambda path: io.StringIO("text"), "comes as text", 'open(path, "rb")'),
        (lambda path: path.open("ab"), "cannot be read", 'open(path, "rb")'),
        (lambda path: Later(), "has to be awaited", "await file.read()"),
        (lambda path: at_end(), "gave no bytes", "file.seek(0)"),
        (lambda path: io.BytesIO(b"hello"), "is not an image", "PNG"),
        (lambda path: type("Odd", (), {"read": lambda self, size: 7})(), "Odd comes as int", 'open(path, "rb")'),
        (lambda path: type("Odd", (), {"read": lambda self: b""})(), "cannot be read", 'open(path, "rb")'),
    ],
)
def test_file_objects_that_are_none(make, found, fix, tmp_path):
    (tmp_path / "image.png").write_bytes(PNG)
    file = make(tmp_path / "image.png")
    with warnings.catch_warnings(), pytest.raises(ImageError) as caught:
        warnings.simplefilter("error")  # a coroutine that nobody awaited is one
        load_image(file)
    assert found in caught.value.found and fix in caught.value.fix and caught.value.expected
    if hasattr(file, "close"):
        file.close()


def test_the_fixes_of_file_objects_work(tmp_path):
    (tmp_path / "image.png").write_bytes(PNG)
    with open(tmp_path / "image.png", "rb") as file:
        assert load_image(file).size == (30, 20)
    written = at_end()
    written.seek(0)
    assert load_image(written).size == (30, 20)

    async def ask() -> Image.Image:
        return load_image(await Later().read(-1))

    assert asyncio.run(ask()).size == (30, 20)


def test_a_file_without_end_is_read_to_a_limit():
    endless = Endless()
    with pytest.raises(ImageError, match="more than 260 MB") as caught:
        load_image(endless)
    assert endless.given <= MAX_BYTES + (2 << 24) and "PNG or JPEG" in caught.value.fix


BASE64 = base64.b64encode(PNG).decode()
URL_SAFE = base64.urlsafe_b64encode(PNG).decode()


def test_images_as_text():
    """base64 and data: URLs, of every way to write them."""
    assert {"+", "/"} & set(BASE64) and {"-", "_"} & set(URL_SAFE)
    for text in (
        *(BASE64, URL_SAFE, BASE64.rstrip("="), f"  {BASE64}\n", "\r\n".join(textwrap.wrap(BASE64, 76))),
        *(f"data:image/png;base64,{BASE64}", f"data:;base64,{URL_SAFE}", f"DATA:IMAGE/PNG;BASE64,{BASE64}"),
        f"data:image/png;name=a.png;charset=utf-8;base64,{BASE64.rstrip('=')}",
        f"data:text/html;base64,{BASE64}",  # what it is, is decided by what it holds
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        f"data:,{quote_from_bytes(PNG)}",
        f"data:image/png,{quote_from_bytes(PNG, safe='')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    ):
        assert np.array_equal(np.asarray(load_image(text)), RGB), text[:60]
    for length in range(len(PNG), len(PNG) + 3):  # every length of the last group
        padded = base64.b64encode(PNG.ljust(length, b"\0")).decode()
        for text in (padded, padded.rstrip("=")):
            assert load_image(text).size == (30, 20)
    large = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 300, 3), dtype=np.uint8)))
    for lines in (base64.encodebytes(large).decode(), "data:;base64," + quote_from_bytes(base64.encodebytes(large))):
        assert load_image(lines).size == (300, 300)  # more than one piece, cut anywhere
    assert load_image("data:," + "".join(f"%{byte:02x}" for byte in large)).size == (300, 300)


def test_an_existing_file_wins_over_base64(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "iVBORw0KGgoAAAANSUhEUgAAAB4AAAAUCAIAAAA"
    (tmp_path / name).write_bytes(PNG)
    assert load_image(name).size == (30, 20)
    (tmp_path / "data:,").write_bytes(PNG)  # a URL is never a file, whatever the current folder holds
    with pytest.raises(ImageError, match="data: URL"):
        load_image("data:,")
    assert load_image("./data:,").size == (30, 20)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("data:image/png;base64", "has no comma"),
        ("data:" + "a" * 2000 + ",", "has no comma"),
        ("data:image/png;base64,!!!!", "not in base64"),
        (f"data:image/png;base64,{BASE64[:41]}", "not in base64"),  # one more than four times ten
        (f"data:image/png;base64,{BASE64}====", "not in base64"),
        (f"data:image/png;base64,{BASE64[:8]}={BASE64[8:]}", "not in base64"),
        (f"data:image/png;base64,{BASE64}\u00e9", "not in base64"),
        (f"data:image/png;base64,{BASE64}\ud800", "not in base64"),
        (f"data:image/png;base64,{BASE64[:60]}", "cannot be decoded"),
        ("data:image/png;base64,", "not an image"),
        ("data:image/png;base64,====", "not in base64"),
        ("data:image/png,%zz%", "not an image"),
        ("data:text/html,<script>alert(1)</script>", "not an image"),
        ("data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (f"data:image/x-eps;base64,{base64.b64encode(encoded(Image.fromarray(RGB), 'EPS')).decode()}", "not an image"),
        (BASE64[:60], "read as base64, cannot be decoded"),
        (base64.b64encode(b"hello " * 20).decode(), "read as base64, is not an image"),
        ("aGVsbG8=", "does not exist"),  # too short for any image
        ("photos/of/a/place/that/is/not/there/at/all.png", "does not exist"),
        ("x\ud800" * 40, "does not exist"),
        ("?" * 40_000, "as text of 40000 characters"),
    ],
)
def test_text_that_is_no_image(text, found):
    with pytest.raises(ImageError, match=found) as caught:
        load_image(text)
    assert caught.value.expected and len(str(caught.value)) < 1000


@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "data:,"])
@pytest.mark.parametrize("fill", ["A", "=", "%", "%41", "%4", " ", "/", "\u00e9"])
def test_long_hostile_text_costs_little(head, fill):
    """Ten million characters: refused at once, within a few times their own memory."""
    text = head + fill * (10_000_000 // len(fill))
    tracemalloc.start()
    begun = time.perf_counter()
    with pytest.raises(ImageError):
        load_image(text)
    took, (_, peak) = time.perf_counter() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 5 and peak < 5 * len(text), (took, peak)


def test_text_past_the_limit_is_not_read(monkeypatch):
    assert _LONGEST_TEXT < 400_000_000
    monkeypatch.setattr("runtime.image._LONGEST_TEXT", 100_000)
    monkeypatch.setattr("runtime.image._pieces", lambda *_, **__: pytest.fail("read"))
    for text in ("A" * 100_001, "data:;base64," + "A" * 100_000):
        with pytest.raises(ImageError, match="characters") as caught:
            load_image(text)
        assert "260 MB" in caught.value.expected and "PNG or JPEG" in caught.value.fix
