"""Where a request's image comes from: the request itself, or one folder of this machine; never a network."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote

from engines.errors import ImageError
from runtime.image import data_of_url
from runtime.serve.errors import ApiError
from runtime.serve.schema import ImageUrl

_IN_REQUEST = "send the image itself: data:image/png;base64,..."


def read_image(image: ImageUrl, media: Path | None, limit: int) -> bytes:
    """The encoded image that a request names, at most `limit` bytes. `media`: the folder that "file:" and "media:" URLs
    may name files of; None = none may. ApiError (400) for every other URL, 413 for a larger file."""
    scheme, colon, rest = image.url.partition(":")
    scheme = scheme.lower() if colon else ""
    if scheme == "data":
        return _decoded(image.url, image.param)
    if scheme in ("file", "media") and media is not None:
        return _of_folder(_path_inside(scheme, rest, media, image.param), media, limit, image.param)
    if scheme in ("file", "media"):
        raise _refused("names a local file", image.param, f"{_IN_REQUEST}; or start the server with --media FOLDER")
    if scheme in ("http", "https", "ftp"):
        raise _refused("is remote, and this server fetches nothing", image.param, _IN_REQUEST)
    raise _refused("is no data: URL", image.param, _IN_REQUEST)


def _refused(what: str, param: str, fix: str) -> ApiError:
    return ApiError(400, f"{param} {what}", code="invalid_image_url", param=param, fix=fix)


def _decoded(url: str, param: str) -> bytes:
    """Of a "data:" URL; what kind of image it is, its bytes say."""
    if not url[:256].partition(",")[0].lower().endswith(";base64"):
        raise _refused("is a data: URL without ;base64,", param, _IN_REQUEST)
    try:
        data = data_of_url(url)
    except ImageError as error:
        raise _refused(f"cannot be read; expected {error.expected}", param, error.fix or _IN_REQUEST) from None
    if not data:
        raise _refused("is empty", param, _IN_REQUEST)
    return data


def _path_inside(scheme: str, rest: str, media: Path, param: str) -> list[str]:
    """The names of the folders, and of the file, from `media` on."""
    text = unquote(rest)
    if scheme == "file":
        text = text.removeprefix("//localhost") if text.startswith("//localhost/") else text.removeprefix("//")
        inside = os.path.normpath(media) + os.sep
        if not text.startswith(inside):
            raise _no_such_image(param)
        text = text[len(inside) :]
    names = text.split("/")
    if any(name in ("", ".", "..") or "\0" in name or os.sep in name for name in names):
        raise _no_such_image(param)
    return names


def _of_folder(names: list[str], media: Path, limit: int, param: str) -> bytes:
    """The content of a file below `media`. Every step of the way is opened from the one before, and none may be a link:
    what is looked at is what is read, whoever moves files meanwhile."""
    plain = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with ExitStack() as opened:
            place = os.open(media, plain | os.O_DIRECTORY)
            opened.callback(os.close, place)
            for name in names[:-1]:
                place = os.open(name, plain | os.O_DIRECTORY, dir_fd=place)
                opened.callback(os.close, place)
            number = os.open(names[-1], plain | os.O_NONBLOCK, dir_fd=place)  # of a pipe nobody waits for its writer
            opened.callback(os.close, number)
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                raise _no_such_image(param)
            if status.st_size > limit:
                raise ApiError(
                    413, f"{param} names a file of {status.st_size} bytes; expected at most {limit}", code="too_large",
                    param=param, fix="a smaller file",
                )  # fmt: skip
            with os.fdopen(number, "rb", closefd=False) as file:
                return file.read(limit)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise _no_such_image(param) from None


def _no_such_image(param: str) -> ApiError:
    """The same for whatever is outside, a link, no file, or not there: nobody learns which."""
    return _refused("names no image in the media folder", param, "a name below it, without links: media:folder/a.png")
