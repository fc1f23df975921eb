"""Reading an image the way the official scripts do: `convert("RGB")`, if that is faithful; and turned upright."""

from __future__ import annotations

import binascii
import inspect
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import PIL.Image

from engines.checks import shown
from engines.errors import ImageError, OptionError
from plugins.files import open_file

# What is opened, of what this Pillow knows. Not EPS: for that Pillow runs Ghostscript, a program, on the file. Nor what
# no camera, phone or web page makes: each is a decoder more that reads what a stranger sends. HEIF is there when an app
# has registered a plugin of Pillow for it.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF")
EXIF = True  # the default: images are turned upright
MAX_PIXELS = 64_000_000  # as decoded; more than any phone's default, less than a decompression bomb
MAX_SIDE = 16_384  # pixels: padding makes a square of the long side
# Bytes read of a file object, or made of text: what an image of MAX_PIXELS takes without compression, four channels
# deep, and as much metadata as nobody has. Some end is needed: a pipe has none.
MAX_BYTES = 4 * MAX_PIXELS + (16 << 20)
EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}

_ORIENTATION = 0x0112  # tag of EXIF
_TURN = {  # orientation -> what makes it upright
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

_CHUNK = 1 << 16  # characters, or bytes, taken at a time: what is made of them on the way stays small
_LONGEST_PATH = 1 << 15  # characters; no system has longer ones (Linux 4096, Windows 32767)
_SHORTEST_BASE64 = 32  # characters; the smallest images there are have 26 bytes, 35 in base64
_LONGEST_TEXT = MAX_BYTES // 3 * 4 // 76 * 78  # characters: base64 of MAX_BYTES, in lines of 76 with two to end each
_BASE64, _STANDARD = re.compile(rb"[A-Za-z0-9+/]*"), bytes.maketrans(b"-_", b"+/")
# Python's own decoder, unquote_to_bytes, takes a minute for 100 MB of %.
_PERCENT = re.compile(rb"%[0-9A-Fa-f]{2}(?:%[0-9A-Fa-f]{2})*")


class Readable(Protocol):
    """A binary file, or anything that is read like one."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Readable | PIL.Image.Image | np.ndarray


def load_image(source: ImageSource, *, exif: bool = EXIF) -> PIL.Image.Image:
    """An RGB image from however people have it.

    source: a path; encoded bytes; a binary file object, read from where it stands to its end, MAX_BYTES at most, and
    left open; a PIL image; a uint8 array [H, W, 3] in RGB order; a "data:" URL, in base64 or percent-encoded, whose
    media type is not believed; base64 text, standard or URL-safe, with or without padding and line ends. Text that
    names an existing file is that file. Nothing is ever fetched from a network.

    Alpha is dropped, palettes are resolved and CMYK is converted (official: `Image.convert("RGB")`). With `exif` the
    image is turned upright, as viewers show it, where its EXIF block says how; a block that is damaged says nothing.
    exif=False leaves it as it is stored, as the official code does, save that Pillow itself turns TIFF. Arrays have no
    EXIF. Raises ImageError for what cannot be read, is none of FORMATS, or has no faithful 8-bit RGB reading.
    """
    if not isinstance(exif, bool):
        raise OptionError(f"exif={shown(exif)}", expected="True or False")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, PIL.Image.Image):
        with _typed_errors("the image"):  # an image from Image.open is decoded only now
            return _converted(source, "the image", exif)
    if isinstance(source, bytes | bytearray | memoryview):
        with _typed_errors("the image bytes"):  # a memoryview may be released
            file = io.BytesIO(source if isinstance(source, bytes) else bytes(source))
        return _decode(file, "the image bytes", exif)
    if isinstance(source, str):
        return _from_text(source, exif)
    if isinstance(source, os.PathLike):
        return _from_path(source, exif)
    if callable(getattr(source, "read", None)):
        name = f"the image of a {type(source).__name__}"
        return _decode(io.BytesIO(_read_all(source, name)), name, exif)
    raise ImageError(f"an image of type {type(source).__name__}", expected=_KINDS)


_KINDS = "path, bytes, binary file, PIL.Image, uint8 array [H, W, 3], data: URL or base64 text"


def _from_path(source: str | os.PathLike[str], exif: bool) -> PIL.Image.Image:
    try:
        path = Path(source)
        missing = not path.exists()
    except OSError:  # a name too long, a parent folder without permission: opening it says which
        missing = False
    except TypeError as error:  # a path of bytes
        raise ImageError(f"image {shown(source)}: {error}", expected="a path that is text") from error
    if missing:
        remote = "nothing is fetched from a network: download it first" if "://" in str(source)[:40] else None
        raise ImageError(f"image {path!s:.200} does not exist", expected="an image file", fix=remote)
    with open_file(path, ImageError, fix="check the path and its permissions") as file:
        return _decode(file, f"{path!s:.200}", exif)


def _from_text(text: str, exif: bool) -> PIL.Image.Image:
    """Of a data: URL, which never names a file; of an existing path; of base64. ImageError for any other text."""
    if text[:5].lower() == "data:":
        return _decode(io.BytesIO(data_of_url(text)), "the data: URL", exif)
    if len(text) <= _LONGEST_PATH and (len(text) < _SHORTEST_BASE64 or _is_there(text)):
        return _from_path(text, exif)
    if len(text) > _LONGEST_TEXT:
        raise _too_long(f"an image as text of {len(text)} characters")
    data = _base64_decoded(_pieces(text, 0))
    if data is not None:
        name = f"{text[:40]!r}..., which is no file and was read as base64,"
        return _decode(io.BytesIO(data), name, exif)
    if len(text) <= _LONGEST_PATH:
        return _from_path(text, exif)  # which says what is wrong with it
    raise ImageError(f"an image as text of {len(text)} characters, {text[:40]!r}...", expected=_KINDS)


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long a name; or behind a folder without permission
        return False


def data_of_url(url: str) -> bytes:
    """The bytes that a "data:[type][;base64],..." URL (RFC 2397) holds. ImageError for one that is broken."""
    if len(url) > _LONGEST_TEXT:
        raise _too_long(f"a data: URL of {len(url)} characters")
    comma = url.find(",", 0, 1024)  # media types are short
    if comma < 0:
        raise ImageError(f"the data: URL {url[:40]!r} has no comma", expected="data:image/png;base64,...")
    pieces = _pieces(url, comma + 1, percent=True)
    if url[5:comma].rpartition(";")[2].strip().lower() != "base64":
        return b"".join(pieces)
    data = _base64_decoded(pieces)
    if data is None:
        raise ImageError(
            f"the data: URL {url[: comma + 9]!r:.80}... is not in base64, as it says it is",
            expected="letters, digits, + and / (or - and _), and up to two = at the end; all of it",
            fix="base64.b64encode(data).decode()",
        )
    return data


def _pieces(text: str, start: int, *, percent: bool = False) -> Iterator[bytes]:
    """`text` from `start` on as bytes, UTF-8, some at a time; with `percent`, what is percent-encoded is decoded."""
    while start < len(text):
        end = start + _CHUNK
        if percent and (cut := text.rfind("%", end - 2, end)) > start:  # not between a % and its two digits
            end = cut
        piece = text[start:end].encode("utf-8", "surrogatepass")
        yield _PERCENT.sub(lambda run: bytes.fromhex(run[0].replace(b"%", b"").decode()), piece) if percent else piece
        start = end


def _base64_decoded(pieces: Iterator[bytes]) -> bytes | None:
    """What base64 `pieces` hold, of either alphabet; None when they are no base64. White space is skipped; the = at the
    end may be missing. Python's own decoders take several times the memory, or skip what is no base64."""
    decoded, rest = io.BytesIO(), b""
    for piece in pieces:
        piece = rest + piece.translate(_STANDARD, b" \t\r\n\f")
        whole = max(0, (len(piece) - 1) // 4 * 4)  # the last four characters may be the ones with =
        if _BASE64.fullmatch(piece, 0, whole) is None:
            return None
        decoded.write(binascii.a2b_base64(piece[:whole]))
        rest = piece[whole:]
    letters = rest.rstrip(b"=")
    padded = letters != rest
    if _BASE64.fullmatch(letters) is None or (padded and len(rest) != 4) or (rest and len(letters) < 2):
        return None
    decoded.write(binascii.a2b_base64(letters + b"=" * (-len(letters) % 4)))
    return decoded.getvalue()


def _read_all(file: Readable, name: str) -> bytes:
    """What `file` gives until its end. ImageError when that is no bytes, none at all, or more than MAX_BYTES."""
    data, binary = io.BytesIO(), 'open it as one: open(path, "rb"); of standard input, sys.stdin.buffer'
    while data.tell() <= MAX_BYTES:
        try:
            more: object = file.read(_CHUNK)
        except MemoryError:
            raise
        except UnicodeError:
            more = ""  # opened as text, which an image is not
        except Exception as error:  # closed, opened for writing, a disk or a connection that fails
            raise ImageError(f"{name} cannot be read: {error}", expected="an open binary file", fix=binary) from error
        if inspect.iscoroutine(more):
            more.close()  # nobody will wait for it
            raise ImageError(f"{name}: its read() has to be awaited", expected="bytes", fix="await file.read() first")
        if not isinstance(more, bytes | bytearray | memoryview):
            what = "text: the file is not opened as binary" if isinstance(more, str) else type(more).__name__
            raise ImageError(f"{name} comes as {what}", expected="a file that gives bytes", fix=binary)
        if not more:
            break
        data.write(more)
    else:
        raise _too_long(f"{name} has more than {MAX_BYTES >> 20} MB")
    if not data.tell():
        raise ImageError(
            f"{name} gave no bytes", expected="an image", fix="file.seek(0), if it was just written or read to its end"
        )
    return data.getvalue()


def _too_long(found: str) -> ImageError:
    return ImageError(
        found, expected=f"at most {MAX_BYTES >> 20} MB of encoded image", fix="save it as a PNG or JPEG first"
    )


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    """Of uint8 [H, W, 3]; ImageError for any other array, with the line that makes it one."""
    if array.ndim != 3 or array.shape[2] != 3:
        fix = "np.stack([grey] * 3, -1) for a grey image" if array.ndim == 2 else None
        if array.ndim == 3 and array.shape[2] == 4:
            fix = "array[..., :3]"
        elif array.ndim == 3 and array.shape[0] == 3:
            fix = "array.transpose(1, 2, 0)"
        raise ImageError(f"an array of shape {list(array.shape)}", expected="[height, width, 3], RGB", fix=fix)
    if array.dtype != np.uint8:
        scaled = {"f": "(255 * array).astype(np.uint8) for values 0..1", "b": "255 * array.astype(np.uint8)"}
        scaled |= dict.fromkeys("iu", "array.clip(0, 255).astype(np.uint8) for values 0..255")
        raise ImageError(f"an array of {array.dtype}", expected="uint8, 0..255", fix=scaled.get(array.dtype.kind))
    if np.ma.is_masked(array):
        raise ImageError("an array with masked pixels", expected="a value for every pixel", fix="array.filled(0)")
    _check_size(array.shape[1], array.shape[0], "the array")
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def _decode(file: IO[bytes], name: str, exif: bool) -> PIL.Image.Image:
    """Of an encoded image in `file`, which messages call `name`."""
    with _typed_errors(name):
        PIL.Image.init()  # registers every format
        with PIL.Image.open(file, formats=[known for known in FORMATS if known in PIL.Image.OPEN]) as image:
            return _converted(image, name, exif)


def _converted(image: PIL.Image.Image, name: str, exif: bool) -> PIL.Image.Image:
    """`image` as RGB, upright with `exif`; nothing that it says of itself goes with it. Raises ImageError."""
    rgb = _checked(image, name).convert("RGB")
    orientation = _orientation(image) if exif else 1  # only now: Pillow turns a TIFF when it decodes it, and says so
    rgb.info.clear()  # whoever reads the result again must not turn it again
    turn = _TURN.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: PIL.Image.Image) -> int:
    """How the pixels lie, 1 .. 8 as EXIF counts; 1, upright, where nothing readable says otherwise."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever Pillow makes of a damaged block: viewers show such an image, too
        return 1
    return found if isinstance(found, int) else 1


@contextmanager
def _typed_errors(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageError; a lack of memory is not the image's fault and passes.

    Pillow's warnings are dropped: our own limit of pixels is lower, and of a damaged block it warns thousands of times.
    """
    try:
        with _quiet:
            yield
    except (ImageError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image that is read here", expected=_READ, fix="save it as a PNG first"
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged data
        raise ImageError(
            f"{name} cannot be decoded: {error}",
            expected="a complete image, and an open file behind an image from Image.open",
            fix="save or download it again",
        ) from error


class _Quiet:
    """Drops warnings while any thread is inside. Python's own way to, one for each thread, puts back the filters of
    whoever went in last, and may leave all warnings of the process dropped."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


_quiet = _Quiet()


def _checked(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Judged by the header, before any pixel is decoded."""
    if image.format not in (None, *FORMATS):
        raise ImageError(
            f"{name} is of the format {image.format}",
            expected=_READ,
            fix="if you trust the file it is from, decode it yourself: image.convert('RGB')",
        )
    _check_size(*image.size, name)
    # A phone's MPO is one photo with previews behind it; anything else with several frames has no one image.
    if image.format != "MPO" and _has_frames(image):
        raise ImageError(
            f"{name} has 2 frames or more", expected="one", fix="pick one: image.seek(0); image.convert('RGB')"
        )
    if image.mode not in EIGHT_BIT:
        raise ImageError(
            f"{name} has mode {image.mode}: more than 8 bits per channel, which RGB would clip",
            expected="8 bits per channel",
            fix="scale it to 8 bits first, for 0..1: Image.fromarray((255 * np.asarray(image)).astype('uint8'))"
            if image.mode == "F"
            else "scale it to 8 bits first, for 16-bit: Image.fromarray((np.asarray(image) >> 8).astype('uint8'))",
        )
    return image


def _has_frames(image: PIL.Image.Image) -> bool:
    """Whether there is a frame beside this one. Counting all of them takes seconds for a TIFF of 2 MB."""
    if image.tell():
        return True
    # Of a TIFF it is known from the first directory on; the others ask their header, a GIF for the next frame.
    return bool(getattr(image, "is_animated", False))


def _check_size(width: int, height: int, name: str) -> None:
    """ImageError for an image of no pixels, or of too many."""
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels", expected="at least 1 x 1")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"{width} x {height} pixels")


_READ = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF"


def _too_large(name: str, what: str) -> ImageError:
    return ImageError(
        f"{name} is too large: {what}",
        expected=f"at most {MAX_PIXELS / 1e6:.0f} megapixels and {MAX_SIDE} pixels per side",
        fix="shrink it first, the model sees it at its own resolution anyway: image.thumbnail((4096, 4096))",
    )
