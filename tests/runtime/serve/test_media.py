"""Images by name: those in one folder, and nothing else of this machine or any other."""

from __future__ import annotations

import os
import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.questions import OTHER, PHOTO
from tests.runtime.serve.asgi import data_url, png, post, user

NAME = "serve-fp32"
OPEN = Path("/proc/self/fd")


@pytest.fixture
def media(tmp_path) -> Path:
    """A folder with an image, and what must not be reached from it."""
    folder = tmp_path / "media"
    (folder / "inside").mkdir(parents=True)
    (folder / "a.png").write_bytes(png(PHOTO))
    (folder / "inside/b c.png").write_bytes(png(PHOTO))
    (tmp_path / "secret.png").write_bytes(png(OTHER))
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2/secret.png").write_bytes(png(OTHER))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inner.png").symlink_to(folder / "a.png")
    (folder / "away").symlink_to(tmp_path)
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    return folder


def ask(app, url: str):
    return post(app, {"model": NAME, "messages": [user("what number is it?", url)], "max_tokens": 6, "flex": {}})


def test_images_of_the_folder(made, media):
    app = made(media=media)
    expected = ask(app, data_url(png(PHOTO))).json
    for url in ("media:a.png", "MEDIA:a.png", "media:inside/b%20c.png", f"file://{media}/a.png", f"file:{media}/a.png",
                f"file://localhost{media}/a.png"):  # fmt: skip
        content = ask(app, url).json
        assert content["choices"] == expected["choices"], url
        assert content["flex"]["stats"]["view_cached"] is True, "found by its content, not by its name"


@pytest.mark.parametrize(
    "url",
    [
        "media:../secret.png",
        "media:inside/../../secret.png",
        "media:inside/../a.png",
        "media:./a.png",
        "media:%2e%2e/secret.png",
        "media:..%2fsecret.png",
        "media:/a.png",
        "media://a.png",
        "media:/etc/passwd",
        "media:",
        "media:inside",
        "media:inside/",
        "media:link.png",
        "media:inner.png",
        "media:away/secret.png",
        "media:device",
        "media:pipe",
        "media:a.png%00.png",
        "media:a.png\0",
        "media:nothing.png",
        "media:" + "x" * 300,
        "media:" + "x/" * 3000 + "a.png",
        "media:a\ud800.png",
        "file:///etc/passwd",
        "file:///dev/zero",
        "file://{media}/../secret.png",
        "file://{media}2/secret.png",
        "file://{media}/link.png",
        "file://{media}/away/secret.png",
        "file://{media}",
        "file://{media}/",
        "file://evil.example{media}/a.png",
        "file:a.png",
        "file:",
    ],
)
def test_nothing_else_is_reached(made, media, url):
    """One error for all: nobody learns what there is."""
    reply = ask(made(media=media), url.replace("{media}", str(media)))
    assert reply.status == 400 and reply.error["code"] == "invalid_image_url"
    assert reply.error["param"] == "messages[0].content[1].image_url.url"
    assert reply.error["message"].endswith("names no image in the media folder")


@pytest.mark.skipif(not OPEN.exists(), reason="no list of open files here")
def test_no_descriptor_is_left_open(made, media):
    app = made(media=media)
    ask(app, "media:a.png")
    before = len(list(OPEN.iterdir()))
    for url in (
        "media:inside/b%20c.png",
        "media:inside",
        "media:pipe",
        "media:nothing",
        "media:inside/x/y",
        "media:a.png",
    ):
        ask(app, url)
    assert before == len(list(OPEN.iterdir()))


def test_a_folder_that_is_named_through_a_link(made, media, tmp_path):
    """Whoever starts the server may name it as they like."""
    (tmp_path / "named").symlink_to(media)
    assert ask(made(media=tmp_path / "named"), "media:a.png").status == 200


def test_without_a_folder_no_file_is_read(made, media):
    for url in ("media:a.png", f"file://{media}/a.png"):
        reply = ask(made(), url)
        assert reply.status == 400 and "--media" in reply.error["fix"]


def test_a_file_that_is_too_large(made, media):
    (media / "large.png").write_bytes(b"x" * 3000)
    reply = ask(made(media=media, body_bytes=2000), "media:large.png")
    assert reply.status == 413 and reply.error["code"] == "too_large"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a.png", "https://example.org/a.png", "HTTPS://example.org/a.png", "ftp://example.org/a.png",
        "//example.org/a.png", "a.png", "/etc/passwd", "../a.png", "", "javascript:1", "data", "blob:x", "gopher:x",
    ],
)  # fmt: skip
def test_nothing_is_fetched(made, monkeypatch, url):
    def refuse(*arguments, **options):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    reply = ask(made(), url)
    assert reply.status == 400 and reply.error["code"] == "invalid_image_url" and "data:" in reply.error["fix"]


@pytest.mark.parametrize(
    "url",
    ["data:", "data:,", "data:image/png,abc", "data:image/png;base64,", "data:image/png;base64,###",
     "data:image/png;base64,abcde", "data:image/png;base64,é", "data:" + "x" * 1000 + ";base64,AAAA"],
)  # fmt: skip
def test_data_urls_that_hold_nothing(made, url):
    reply = ask(made(), url)
    assert reply.status == 400 and reply.error["code"] == "invalid_image_url"


def test_the_bytes_say_what_an_image_is(made):
    """Not the media type of its URL."""
    app = made()
    right = data_url(png(np.ascontiguousarray(PHOTO)))
    for kind in ("data:image/jpeg;base64", "data:;base64", "DATA:image/png;charset=x;BASE64", "data:text/html;base64"):
        assert ask(app, kind + "," + right.partition(",")[2]).status == 200


def test_base64_as_the_engine_reads_it(made):
    """Of either alphabet, with line ends or without padding: the same image, which is not encoded again."""
    app, (head, _, text) = made(), data_url(png(PHOTO)).partition(",")
    assert ask(app, f"{head},{text}").status == 200
    for other in ("\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
                  text.translate({ord("+"): "-", ord("/"): "_"}), text.rstrip("=")):  # fmt: skip
        assert ask(app, f"{head},{other}").json["flex"]["stats"]["view_cached"]
