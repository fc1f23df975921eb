"""Who is let in, how much they may send, and what browsers and logs are told."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import pytest

from engines.errors import OptionError
from runtime.serve import Settings
from tests.runtime.questions import PHOTO, QUESTION
from tests.runtime.serve.asgi import COMPLETIONS, JSON, data_url, get, png, post, post_request, send_request, user

NAME = "serve-fp32"
KEY = "a-key-of-24-characters-x"
ASKED = {"model": NAME, "messages": [user("hello")], "max_tokens": 2}
CLOSED = ["/v1/models", f"/v1/models/{NAME}", "/metrics", "/flex/examples", "/flex/examples/poster.png", "/flex/scene"]
OPEN = ["/health", "/health/ready", "/", "/page/main.js"]


def test_the_key(made):
    app = made(api_key=KEY)
    right = {"authorization": f"Bearer {KEY}"}
    assert post(app, ASKED, headers=right).status == 200
    assert post(app, ASKED, headers={"authorization": f"bearer  {KEY} "}).status == 200
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY} {KEY}",
    ]
    wrong += ["Bearer \xff\xfe", f"Bearer {KEY.upper()}", "Bearer " + "a" * 5000]
    for each in wrong:
        reply = post(app, ASKED, headers={"authorization": each} if each else {})
        assert reply.status == 401, each
        assert reply.headers["www-authenticate"] == "Bearer" and reply.error["code"] == "invalid_api_key"
        assert KEY not in reply.body.decode() and reply.error["fix"]
    for path in CLOSED:
        assert get(app, path).status == 401, path
        assert get(app, path, **right).status in (200, 404), path
    for path in OPEN:
        assert get(app, path).status == 200, path


def test_a_body_is_not_read_before_the_key(made):
    """Nor is a client waited for that never sends one."""
    app = made(api_key=KEY, body_timeout=60)
    reply = asyncio.run(asyncio.wait_for(post_request(app, b"{", endless=True), 5))
    assert reply.status == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("localhost:8000.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_names_of_others(made, host, status):
    """A page of somebody else whose name was pointed at this machine asks under its own name."""
    reply = get(made(), "/v1/models", host=host)
    assert reply.status == status
    assert status == 200 or reply.error["code"] == "unknown_host"


def test_hosts_are_free_where_a_key_is_asked_for_or_somebody_says_so(made):
    assert get(made(api_key=KEY), "/v1/models", host="x.example", authorization=f"Bearer {KEY}").status == 200
    assert get(made(no_auth=True), "/v1/models", host="x.example").status == 200
    assert get(made(hosts=("X.example",)), "/v1/models", host="x.example:80").status == 200
    assert get(made(hosts=("x.example",)), "/v1/models").status == 421
    assert get(made(hosts=("*",)), "/v1/models", host="anything").status == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_a_body_that_a_foreign_page_can_send_without_asking(made, kind):
    reply = asyncio.run(send_request(made(), "POST", COMPLETIONS, b"{}", {"content-type": kind} if kind else {}))
    assert reply.status == 415 and reply.error["code"] == "unsupported_media_type"


def test_a_foreign_page_is_not_let_in(made):
    """What it asks first is refused, and no answer of ours says otherwise."""
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    asked = asyncio.run(send_request(made(), "OPTIONS", COMPLETIONS, headers=headers))
    assert asked.status == 405
    for reply in (asked, post(made(), ASKED, headers={"origin": "https://evil.example"})):
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_what_a_browser_says_of_a_foreign_page(made):
    """A picture or a script of such a page costs nothing here; a link to ours may be followed."""
    app, site = made(), {"sec-fetch-site": "cross-site"}
    assert get(app, "/flex/scene?seed=1", **site, **{"sec-fetch-mode": "no-cors"}).error["code"] == "cross_site"
    assert get(app, "/", **site, **{"sec-fetch-mode": "navigate"}).status == 200
    assert get(app, "/v1/models", **{"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}).status == 200


def test_what_browsers_are_told(made):
    app = made()
    for reply in (
        get(app, "/"),
        get(app, "/nowhere"),
        get(app, "/v1/models", host="x"),
        post(app, ASKED),
        post(app, b""),
    ):
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "*" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY" and "frame-ancestors 'none'" in policy
        assert reply.headers["referrer-policy"] == "no-referrer"
    assert post(app, ASKED).headers["cache-control"] == "no-store"


@pytest.mark.parametrize("said", [True, False], ids=["said", "unsaid"])
def test_a_body_that_is_too_long(made, said):
    app = made(body_bytes=2000)
    body = json.dumps(ASKED | {"messages": [user("x" * 3000)]}).encode()
    pieces = [body[at : at + 500] for at in range(0, len(body), 500)]
    headers = {**JSON, **({"content-length": str(len(body))} if said else {})}
    reply = asyncio.run(send_request(app, "POST", COMPLETIONS, pieces, headers))
    assert reply.status == 413 and reply.error["code"] == "too_large" and reply.error["fix"]
    assert app.state.service.bodies._held == 0
    assert post(app, ASKED).status == 200


def test_a_body_that_never_ends(made):
    """A little more than allowed is read away, so that the client hears why; not all there is."""
    app, sent = made(body_bytes=2000), []

    async def endless() -> int:
        async def receive():
            sent.append(1)
            return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

        scope = {
            "type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": b"", "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "http_version": "1.1",
            "client": None, "server": None, "scheme": "http",
        }  # fmt: skip
        statuses = []

        async def send(message):
            statuses.append(message.get("status"))

        await app(scope, receive, send)
        return statuses[0]

    assert asyncio.run(endless()) == 413 and len(sent) < 20
    huge = {**JSON, "content-length": str(10**15)}
    assert asyncio.run(send_request(app, "POST", COMPLETIONS, b"x", huge, endless=True)).status == 413


def test_a_body_that_does_not_come(made):
    app = made(body_timeout=0.2)
    begun = time.monotonic()
    reply = asyncio.run(post_request(app, b'{"model"', endless=True))
    assert reply.status == 408 and time.monotonic() - begun < 5 and reply.headers["connection"] == "close"
    assert app.state.service.bodies._held == 0


def test_bodies_of_all_together(made):
    app = made(body_bytes=10_000, all_bodies_bytes=15_000)

    async def crowd() -> None:
        leave = asyncio.Event()
        first = asyncio.create_task(post_request(app, b"x" * 9000, endless=True, leave=leave))
        await asyncio.sleep(0.05)
        second = await post_request(app, b"x" * 9000)
        assert second.status == 503 and second.error["code"] == "busy" and second.headers["retry-after"]
        leave.set()
        await first

    asyncio.run(crowd())
    assert app.state.service.bodies._held == 0 and post(app, ASKED).status == 200


def test_headers_that_are_too_long(made):
    assert get(made(header_bytes=2048), "/health", cookie="x" * 3000).status == 431


def test_pixels(made):
    app = made(pixels=PHOTO.shape[0] * PHOTO.shape[1] - 1)
    reply = post(app, ASKED | {"messages": [user("x", data_url(png(PHOTO)))]})
    assert reply.status == 413 and reply.error["code"] == "too_many_pixels" and reply.error["fix"]
    image = made(pixels=PHOTO.shape[0] * PHOTO.shape[1])
    assert post(image, ASKED | {"messages": [user("x", data_url(png(PHOTO)))]}).status == 200


def test_what_is_no_image(made):
    for data in (b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, png(PHOTO)[:-400]):
        reply = post(made(), ASKED | {"messages": [user("x", data_url(data))]})
        assert reply.status == 422 and reply.error["code"] == "invalid_image", reply.body


def test_other_paths_and_methods(made):
    app = made()
    reply = get(app, "/v1/nothing")
    assert reply.status == 404 and reply.error["code"] == "not_found"
    assert get(app, COMPLETIONS).status == 405 and get(app, COMPLETIONS).error["code"] == "method_not_allowed"
    assert asyncio.run(send_request(app, "DELETE", "/v1/models")).status == 405
    reply = post(app, ASKED | {"model": "gpt-4o"})
    assert reply.status == 404 and reply.error["code"] == "model_not_found" and NAME in reply.error["fix"]
    for path in ("/page/../settings.py", "/page/%2e%2e/settings.py", "/page//etc/passwd", "/flex/examples/../x"):
        assert get(app, path).status == 404, path


def test_nothing_of_a_request_is_logged(made, caplog):
    """Neither what was asked, nor the image, nor the key, whatever becomes of it."""
    caplog.set_level(logging.DEBUG)
    app, secret = made(api_key=KEY), "the-secret-of-the-prompt"
    image = data_url(png(PHOTO))
    headers = {"authorization": f"Bearer {KEY}"}
    asked = {"model": NAME, "messages": [user(secret, image)], "max_tokens": 2}
    more = [{}, {"stream": True}, {"n": 3}, {"max_tokens": 10**6}, {"temperature": -5}, {secret: 1}, {"model": secret}]
    for each in more:
        post(app, asked | each, headers=headers)
    post(app, asked | {"messages": [user(secret, data_url(b"no image"))]}, headers=headers)
    post(app, asked, headers={"authorization": f"Bearer {secret}"})
    get(app, f"/v1/models/{secret}?{secret}", **headers)
    get(app, f"/{secret}?key={KEY}")
    assert "/v1/chat/completions 200" in caplog.text and " 401 " in caplog.text
    for word in (secret, KEY, image[40:80], QUESTION):
        assert word not in caplog.text
    metrics = get(app, "/metrics", **headers).body.decode()
    assert secret not in metrics


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key": "short"},
        {"api_key": "with a space and long enough"},
        {"api_key": "ключ" * 8},
        {"api_key": KEY, "no_auth": True},
        {"hosts": "localhost"},
        {"hosts": ("",)},
        {"queue": 0},
        {"queue": True},
        {"queue": 1.5},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": "5"},
        {"pixels": 65_000_000},
        {"view_bytes": -1},
        {"no_auth": 1},
        {"media": "/nowhere/at/all"},
        {"media": __file__},
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(OptionError) as caught:
        Settings(**wrong)
    assert caught.value.expected
    assert KEY not in str(caught.value) and KEY not in repr(Settings(api_key=KEY))
