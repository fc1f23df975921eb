"""Hostile requests to a real server on the loopback. It lives over many trials, and must answer rightly after each."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
from hypothesis import strategies as st

from engines.errors import FlexError, ImageError
from runtime import Engine
from runtime.image import load_image
from tests.campaign import images
from tests.campaign.bundles import PROMPT
from tests.campaign.mutate import ODD, damaged_bytes, damaged_text
from tests.campaign.trial import Wrong
from tests.runtime.serve.command import Server, start

KEY = "a-key-of-this-campaign-alone"
SECRET = "this-text-lies-outside-of-every-folder-that-is-served"
COMPLETIONS = "/v1/chat/completions"
WAIT = 20.0  # seconds for a response; the server waits 2 for what a client does not send or read
WAITS = ("--head-timeout", "2", "--body-timeout", "2", "--read-timeout", "2")
TOKENS = 6  # of a right answer


class Refused(FlexError):
    """A request that was answered with an error of OpenAI's shape, or that its sender broke off."""


@dataclass(frozen=True)
class Target:
    """A server that runs. address: its host and port. model: its name. right: a request that it answers with `answer`.
    pid: of its process."""

    address: tuple[str, int]
    model: str
    right: dict[str, Any]
    answer: str
    pid: int


@dataclass(frozen=True)
class Attack:
    """Bytes to send, and what to do then: "read" the response; "end" what is sent first, and read; "drop" the
    connection at once; or read the begin of the response and "leave".

    http: whether the bytes are a request of HTTP/1.1, so that the response must be of the API. judge: whether what was
    answered is right, beyond its form.
    """

    kind: str
    data: bytes
    then: str = "read"
    http: bool = True
    judge: Callable[[int, bytes], None] = lambda status, body: None

    def __repr__(self) -> str:
        return f"{self.kind}, then {self.then}: {self.data[:700]!r}"


def picture() -> bytes:
    """A PNG."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def answer(bundle: Path) -> str:
    """What the engine itself says to the right request."""
    with Engine(bundle, threads=1) as engine:
        return engine.generate(picture(), PROMPT, max_new_tokens=TOKENS).text


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def asked(model: str, url: str, **options: object) -> dict[str, Any]:
    """A request that asks `PROMPT` about the image at the URL."""
    content = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, **options}


def serve(bundle: Path, folder: Path, answer: str) -> tuple[Server, Target]:
    """Start a server that needs a key, and serves the images of a media folder, beside which there is a secret. Who
    starts it must end its process."""
    media = folder / "media"
    media.mkdir(parents=True)
    (folder / "secret.png").write_text(SECRET)
    (media / "a.png").write_bytes(picture())
    (media / "link.png").symlink_to(folder / "secret.png")
    server = start(bundle, "--media", media, *WAITS, log=folder / "log", FLEX_API_KEY=KEY)
    found = urlsplit(server.url)
    address = (found.hostname or "", found.port or 0)
    _, body = ask(address, request("/v1/models", method="GET"))
    model = json.loads(body)["data"][0]["id"]
    return server, Target(address, model, asked(model, url_of(picture())), answer, server.process.pid)


def request(
    path: str = COMPLETIONS,
    body: bytes = b"",
    *,
    method: str = "POST",
    key: str | None = f"Bearer {KEY}",
    headers: dict[str, str] | None = None,
) -> bytes:
    """The bytes of a request, with the length of its body unless `headers` say something else of it."""
    lines = {"Host": "127.0.0.1", "Connection": "close", "Content-Type": "application/json"}
    lines |= {} if key is None else {"Authorization": key}
    lines |= headers if headers is not None else {"Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogatepass") + body


def ask(address: tuple[str, int], data: bytes, end: bool = False) -> tuple[int, bytes]:
    """Status and body of the response; 0 where the connection ends without one. Wrong when neither comes."""
    with socket.create_connection(address, timeout=WAIT) as connection:
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it refuses before it has read all
                connection.sendall(data)
                if end:
                    connection.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return response.status, response.read()
        except TimeoutError:
            raise Wrong(f"no response within {WAIT:.0f} s") from None
        except (http.client.HTTPException, OSError):
            return 0, b""


def _leave(address: tuple[str, int], data: bytes) -> None:
    """Read the first bytes of the response, and reset the connection."""
    with socket.create_connection(address, timeout=WAIT) as connection:
        connection.sendall(data)
        with suppress(TimeoutError):
            connection.recv(600)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def run(target: Target, attack: Attack, scratch: Path) -> str:
    """Attack, and ask the right question afterwards. Refused for a request that was, Wrong when the server is."""
    if attack.then == "leave":
        _leave(target.address, attack.data)
        status, body = 0, b""
    elif attack.then == "drop":
        with socket.create_connection(target.address, timeout=WAIT) as connection:
            connection.sendall(attack.data)
        status, body = 0, b""
    else:
        status, body = ask(target.address, attack.data, attack.then == "end")
    said = judged(attack, status, body)
    right = request(body=json.dumps(target.right).encode())
    status, after = ask(target.address, right)
    content = json.loads(after)["choices"][0]["message"]["content"] if status == 200 else after
    if content != target.answer:
        raise Wrong(f"afterwards it answers {status} {content!r:.300} in place of {target.answer!r}")
    if status == 200 and not said.startswith("2"):
        raise Refused(said)
    return said


def judged(attack: Attack, status: int, body: bytes) -> str:
    """What the response was. Wrong when it is no right one."""
    if SECRET.encode() in body or b"from __future__ import" in body:
        raise Wrong(f"{attack.kind}: a file that is not served")
    if attack.then in ("drop", "leave"):
        return "0: left"
    if not status:
        if attack.http and attack.then == "read":
            raise Wrong(f"{attack.kind}: no response")
        return "0: the connection was closed"
    if status >= 500 and status != 503:
        raise Wrong(f"{attack.kind}: {status} {body[:300]!r}")
    if status >= 400:
        if attack.http:
            _require_error(attack, status, body)
        attack.judge(status, body)
        return f"{status}: {body[:200]!r}"
    if status < 200 or status >= 300:
        raise Wrong(f"{attack.kind}: {status}")
    attack.judge(status, body)
    return f"{status}: {body[:100]!r}"


def _require_error(attack: Attack, status: int, body: bytes) -> None:
    try:
        error = json.loads(body)["error"]
        right = set(error) == {"message", "type", "param", "code", "fix"} and error["message"] and error["code"]
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise Wrong(f"{attack.kind}: {status} that is no error of the API: {body[:300]!r}")


def attacks(target: Target) -> st.SearchStrategy[Attack]:
    """Requests of every kind that nobody should send."""
    model, whole = target.model, json.dumps(target.right).encode()
    options = {
        **{"temperature": 0.0, "top_p": 1.0, "seed": 1, "stop": ["zzz"], "stream": True, "user": "somebody"},
        **{"stream_options": {"include_usage": True}, "flex": {"selection": True, "page_budget": 3}},
        **{"max_completion_tokens": TOKENS, "n": 1, "logprobs": False, "tools": []},
    }
    every = {**target.right, **options}
    streamed = json.dumps({**target.right, "stream": True, "max_tokens": 40, "flex": {"selection": True}}).encode()

    def posted(kind: str, then: str = "read") -> Callable[[bytes], Attack]:
        return lambda body: Attack(kind, request(body=body), then, judge=_answered)

    def of(kind: str, then: str = "read", http: bool = False) -> Callable[[bytes], Attack]:
        return lambda data: Attack(kind, data, then, http)

    def with_field(name: str, value: object) -> bytes:
        return json.dumps({**every, name: value}).encode("utf-8", "surrogatepass")

    def about(url: str) -> bytes:
        return json.dumps(asked(model, url)).encode("utf-8", "surrogatepass")

    def image(data: bytes) -> Attack:
        def judge(status: int, body: bytes) -> None:
            """As the engine reads it."""
            try:
                load_image(data)
            except ImageError as error:
                if status == 200:
                    raise Wrong(f"an image was read that is refused: {error}") from None
            else:
                if status != 200:
                    raise Wrong(f"an image was refused that is read: {status} {body[:300]!r}")

        return Attack("image", request(body=about(url_of(data))), judge=judge)

    fields = [*every, *("unknown", "tools", "functions", "response_format", "logit_bias", "n", "top_logprobs")]
    lengths = ["0", "1", "-1", "+5", "0x10", "1e3", "", "9" * 30, str(len(whole) - 5), str(len(whole) + 500), "1, 2"]
    framing = st.one_of(
        st.sampled_from(lengths).map(lambda said: request(body=whole, headers={"Content-Length": said})),
        st.sampled_from(
            ["chunked", "gzip, chunked", "chunked, chunked", "identity", "xchunked", "\x0bchunked"]
        ).flatmap(
            lambda coding: st.sampled_from(
                [whole, b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"-1\r\n", b"9" * 40, b""]
            ).map(lambda body: request(body=body, headers={"Transfer-Encoding": coding}))
        ),
        st.just(request(body=whole, headers={"Content-Length": str(len(whole)), "Transfer-Encoding": "chunked"})),
        damaged_bytes(request(body=whole)[:260]).map(lambda head: head + request(body=whole)[260:]),
        st.binary(min_size=1, max_size=400),
        st.sampled_from(
            [
                *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300)),
                *(b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"\r\n" * 500, b"GET / HTTP/1.1\r\n\r\n", bytes(4000)),
                request(headers={"X-Long": "x" * 200_000}),
                request(headers={f"X-{index}": "x" for index in range(5000)}),
                request("/" + "a" * 100_000, method="GET"),
                request(body=whole, headers={"Expect": "a miracle", "Content-Length": str(len(whole))}),
            ]
        ),
    )
    keys = [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY]
    keyed = st.builds(
        lambda key, path, method: Attack(
            "key", request(path, method=method, key=key), judge=lambda status, _: _require(status, (401, 405))
        ),
        st.sampled_from([*keys, "Bearer \u00e9\u00e9", "bearer\t" + KEY[::-1], "Bearer " + "x" * 5000]),
        st.sampled_from([COMPLETIONS, "/v1/models", f"/v1/models/{model}", "/metrics", "/flex/examples"]),
        st.sampled_from(["GET", "POST"]),
    )
    dots = st.sampled_from(
        ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..\\", "..%5c", "....//", "%252e%252e/", "/", "./"]
    )
    names = st.sampled_from(
        [
            "__init__.py",
            "settings.py",
            "serve/__init__.py",
            "etc/passwd",
            "secret.png",
            "a.png",
            "%00",
            "media/link.png",
        ]
    )
    path = st.builds(lambda steps, name: "".join(steps) + name, st.lists(dots, max_size=6), names)
    schemes = st.sampled_from(
        ["media:", "media:/", "media://", "file:", "file://", "file:///", "", "http://127.0.0.1/"]
    )
    return st.one_of(
        damaged_text(every).map(posted("json")),
        damaged_text(target.right).map(posted("json")),
        st.builds(with_field, st.sampled_from(fields), ODD).map(posted("field")),
        framing.map(of("framing")),
        framing.map(of("framing", "end")),
        images.damages().map(image),
        keyed,
        st.builds(lambda scheme, tail: about(scheme + tail), schemes, path).map(posted("media")),
        st.builds(
            lambda root, tail: request(root + tail, method="GET"),
            st.sampled_from(["/page/", "/flex/examples/", "/", "/v1/models/"]),
            path,
        ).map(of("path", http=True)),
        st.integers(1, len(whole) + 200).map(lambda end: Attack("half", request(body=whole)[:end], "end", http=False)),
        st.integers(1, len(whole) + 200).map(lambda end: Attack("half", request(body=whole)[:end], "drop", http=False)),
        st.just(Attack("left in the middle", request(body=streamed), "leave")),
    )


def disconnect(target: Target) -> Attack:
    """An answer that is left in the middle."""
    body = json.dumps({**target.right, "stream": True, "max_tokens": 40, "flex": {"selection": True}}).encode()
    return Attack("left in the middle", request(body=body), "leave")


def _require(status: int, allowed: tuple[int, ...]) -> None:
    if status not in allowed:
        raise Wrong(f"{status} in place of {allowed}")


def _answered(status: int, body: bytes) -> None:
    """A chat completion, whole or streamed, where it is no error."""
    if status != 200:
        return
    try:
        if not body.startswith(b"data:"):
            made = json.loads(body)
            right = isinstance(made["choices"][0]["message"]["content"], str)
            right = right and made["usage"]["completion_tokens"] >= 1
        else:
            events = body.decode().removesuffix("\n\n").split("\n\n")
            chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
            right = events[-1] == "data: [DONE]" and all("error" in chunk or "choices" in chunk for chunk in chunks)
    except (ValueError, KeyError, IndexError, TypeError):
        right = False
    if not right:
        raise Wrong(f"no chat completion: {body[:300]!r}")
