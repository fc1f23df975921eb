"""`python -m runtime.serve`, in a process of its own: how it starts, ends, and treats hostile connections."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
import uvicorn

from engines.errors import OptionError
from runtime.serve import Settings
from runtime.serve.__main__ import _Server, listen_at, parse_arguments, settings_of
from tests.paths import ROOT
from tests.runtime.serve.asgi import JSON, user
from tests.runtime.serve.command import serving

KEY = "a-key-of-24-characters-x"
ASKED = {"model": "serve-fp32", "messages": [user("hello")], "max_tokens": 3}
LONG = {**ASKED, "max_tokens": 600, "stream": True}


def ask(url: str, asked: dict = ASKED, **headers: str):
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(asked).encode(), {**JSON, **headers})
    return urllib.request.urlopen(request, timeout=30)


def status_of(url: str, **headers: str) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def connected(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def test_sigterm_lets_an_answer_end(chat_bundle, tmp_path):
    """Who reads gets all of it; nobody else is let in meanwhile; the status is 0."""
    with serving(chat_bundle, "--grace", 30, "--log-level", "info", log=tmp_path / "log") as server:
        response = ask(server.url, LONG)
        first = response.readline()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        refused = status_of(f"{server.url}/health/ready")
        rest = response.read()
        assert first.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")
        assert server.process.wait(30) == 0
        assert refused == 503 or b'"finish_reason":"length"' in rest[:200], "it was over before the signal"
        said = server.log.read_text()
        assert "Traceback" not in said and "hello" not in said and "POST /v1/chat/completions 200" in said


def test_sigterm_does_not_wait_for_ever(chat_bundle, tmp_path):
    with serving(chat_bundle, "--grace", "0.05", log=tmp_path / "log") as server:
        response = ask(server.url, LONG | {"max_tokens": 620})
        assert response.readline()
        assert server.end(signal.SIGTERM, 20) == 0
        assert b"data: [DONE]" not in (rest := response.read()) and b'"code":"ending"' in rest


def test_sigterm_while_a_body_is_on_its_way(chat_bundle, tmp_path):
    """Its client is told; nothing of it is a failure of the server, which the log would show."""
    with serving(chat_bundle, "--grace", 1, log=tmp_path / "log") as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=20) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            while status_of(f"{server.url}/health") != 200:  # behind it in the order of events
                pass
            assert server.end() == 0
            head = client.recv(65536)
        assert head.startswith(b"HTTP/1.1 503 ") and (tmp_path / "log").read_text().count("Traceback") == 0


def test_a_second_signal_ends_it_at_once(chat_bundle, tmp_path):
    with serving(chat_bundle, "--grace", 60, log=tmp_path / "log") as server:
        response = ask(server.url, LONG)
        assert response.readline()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        ended = server.process.wait(10)
        assert ended == -signal.SIGTERM or (ended == 0 and response.read().endswith(b"[DONE]\n\n")), "it was quicker"


def test_ctrl_c(chat_bundle, tmp_path):
    """As of any command; and it prints one line, the address to open."""
    with serving(chat_bundle, log=tmp_path / "log") as server:
        assert ask(server.url).status == 200
        assert server.end(signal.SIGINT) == 130
        assert server.process.stdout.read() == "" and "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_who_can_be_reached_by_others_needs_a_key(host, tmp_path):
    """Or says that everybody may ask. The fix works."""
    if host == "::" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with pytest.raises(OptionError, match="no API key") as caught:
        listen_at(host, 0, Settings())
    assert "--api-key-file" in caught.value.fix and "--no-auth" in caught.value.fix
    (tmp_path / "key.txt").write_text(KEY + "\n")
    for arguments in (["--api-key-file", str(tmp_path / "key.txt")], ["--no-auth"]):
        settings = settings_of(parse_arguments(["bundle", *arguments]))
        listen_at(host, 0, settings).close()
    for other in ("127.0.0.1", "localhost", "127.0.0.7"):
        listen_at(other, 0, Settings()).close()


def test_addresses_that_cannot_be_had():
    with listen_at("127.0.0.1", 0, Settings()) as taken:
        taken.listen()
        for host, port in [("127.0.0.1", taken.getsockname()[1]), ("203.0.113.7", 0), ("127.0.0.1", 70_000),
                           ("127.0.0.1", -1), ("no such host", 0), ("x" * 300, 0)]:  # fmt: skip
            with pytest.raises(OptionError):
                listen_at(host, port, Settings(no_auth=True))


def test_an_address_that_another_was_quicker_to_take():
    async def nothing(scope, receive, send):
        pass

    with (
        listen_at("127.0.0.1", 0, Settings()) as first,
        listen_at("127.0.0.1", first.getsockname()[1], Settings()) as second,  # nobody listens there yet
    ):
        first.listen()
        server = _Server(uvicorn.Config(nothing, lifespan="off", log_config=None), None, 1.0, "http://127.0.0.1/")
        with pytest.raises(OptionError, match="in use"):
            asyncio.run(server.serve(sockets=[second]))


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("FLEX_API_KEY", raising=False)
    key = tmp_path / "key.txt"
    key.write_text(f"{KEY}\n")
    read = lambda *arguments: settings_of(parse_arguments(["bundle", *arguments])).api_key  # noqa: E731
    assert read() is None and read("--api-key-file", str(key)) == KEY
    key.write_text("")
    with pytest.raises(OptionError, match="too short"):
        read("--api-key-file", str(key))
    with pytest.raises(OptionError, match="is missing"):
        read("--api-key-file", str(tmp_path / "nothing"))
    monkeypatch.setenv("FLEX_API_KEY", KEY)
    assert read() == KEY
    with pytest.raises(OptionError, match="one of them"):
        read("--api-key-file", str(key))


def test_defaults_are_the_settings(capsys):
    assert settings_of(parse_arguments(["bundle"])) == Settings()
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{Settings().timeout}" in shown and f"{Settings().view_bytes}" in shown and "--no-auth" in shown


def test_errors_are_messages(chat_bundle):
    for arguments in (["/nowhere"], [chat_bundle, "--host", "0.0.0.0"], [chat_bundle, "--queue", "0"]):
        line = [sys.executable, "-m", "runtime.serve", *map(str, arguments), "--port", "0"]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
        assert done.stdout == ""


def closed_by_server(connection: socket.socket, seconds: float = 10.0) -> float:
    """Seconds until the other side is gone, whatever it says before."""
    begun = time.monotonic()
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def impatient(serve, chat_bundle) -> str:
    """A server that waits for nothing for long."""
    waits = ("--head-timeout", "0.5", "--body-timeout", "0.5", "--read-timeout", "0.7")
    return serve(chat_bundle, *waits, "--header-bytes", "2048", "--connections", "40")


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"GET /heal", b""),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: y", b""),
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"HTTP/1.1 408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx", b"HTTP/1.1 200"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea", b"HTTP/1.1 200"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 5000, b"HTTP/1.1 400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b""),
        (b"hello\r\n\r\n", b"HTTP/1.1 400"),
    ],
)
def test_half_requests_do_not_stay(impatient, sent, answered):
    with connected(impatient) as connection:
        connection.sendall(sent)
        connection.settimeout(10)
        begun, said = time.monotonic(), b""
        try:
            while piece := connection.recv(1 << 16):
                said += piece
        except ConnectionError:
            pass
        assert time.monotonic() - begun < 8
        assert said.startswith(answered)
    assert ask(impatient).status == 200


def test_a_head_that_comes_a_byte_at_a_time(impatient):
    with connected(impatient) as connection:
        begun = time.monotonic()
        with pytest.raises(ConnectionError):
            for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"y" * 200:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - begun < 5


def test_a_client_that_does_not_read_is_cut_off(impatient):
    """The pipe is full, nobody reads: it is not kept for ever, and others are served meanwhile."""
    body = json.dumps({**LONG, "flex": {"selection": True}}).encode()
    picture = b"GET /flex/examples/poster.png HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        address = urlsplit(impatient)
        connection.connect((address.hostname, address.port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.sendall(40 * picture)  # 14 MB behind the answer: more than what lies between can hold
        assert ask(impatient).status == 200
        with pytest.raises(ConnectionError):
            for _ in range(200):  # asks again and again, and reads nothing, until there is nobody to ask
                connection.sendall(picture)
                time.sleep(0.05)


def test_too_many_connections(serve, chat_bundle):
    url = serve(chat_bundle, "--connections", "3")
    idle = [connected(url) for _ in range(3)]
    try:
        assert status_of(f"{url}/health") == 503
    finally:
        for each in idle:
            each.close()
    deadline = time.monotonic() + 10
    while status_of(f"{url}/health") != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_disconnect_is_noticed(impatient):
    """Through a real socket, in the middle of a stream."""
    before = answers(impatient, "cancelled")
    for _ in range(3):
        response = ask(impatient, LONG)
        assert response.readline()
        response.close()
    deadline = time.monotonic() + 20
    while answers(impatient, "cancelled") < before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(url: str, end: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f'flex_answers_total{{end="{end}"}}')]
    return float(lines[0].split()[-1]) if lines else 0.0
