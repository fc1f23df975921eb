"""What goes wrong is said with what helps, and the page stays usable."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from tests.runtime.serve.browser.visit import ANSWER, QUESTION
from tests.runtime.serve.command import Server

KEY = "0123456789abcdef-of-a-test"


def test_a_wrong_key_then_the_right_one(visit, own_server):
    server = own_server(FLEX_API_KEY=KEY)
    at = visit(f"{server.url}/")
    at.may_fail = True
    problem, key = at.page.get_by_role("alert"), at.page.get_by_label("API key")
    expect(problem).to_contain_text("This server asks for a key.")
    expect(key).to_be_focused()
    for wrong in ("wrong", "\N{LEFT SINGLE QUOTATION MARK}pasted"):  # no header can hold the second
        key.fill(wrong)
        key.press("Enter")
        expect(problem).to_contain_text("This key is not the right one.")
        expect(key).to_have_value("")
    key.fill(KEY)
    problem.get_by_role("button", name="Use this key").click()
    expect(problem).to_be_hidden()
    at.page.get_by_role("button", name="Example picture: poster").click()
    assert at.ask(QUESTION) == ANSWER
    at.page.reload()  # it is kept as long as the tab
    at.page.get_by_role("button", name="Example picture: poster").click()
    assert at.ask(QUESTION) == ANSWER
    assert KEY not in at.page.content() and not at.page.evaluate("JSON.stringify(localStorage)").count(KEY)


class Cut:
    """Passes one connection after the other on to a server; once a response has so many tokens, the server is killed
    and everybody hears no more."""

    def __init__(self, server: Server, tokens: int) -> None:
        self._server, self._tokens = server, tokens
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.create_connection((urlsplit(self._server.url).hostname, urlsplit(self._server.url).port))
            for source, target in ((client, upstream), (upstream, client)):
                threading.Thread(target=self._pass_on, args=(source, target, source is upstream), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        seen = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                lines = data.splitlines(keepends=True)
                for line in lines if answers else [data]:
                    seen += answers and b'"flex":{"token":' in line
                    if seen > self._tokens:
                        time.sleep(0.3)  # a browser forgets what it has not handed on when a connection ends
                        self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for the next
                        self._listener.close()
                        self._server.process.kill()
                        break
                    target.sendall(line)
                if seen > self._tokens:
                    break
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def test_the_server_is_gone_in_the_middle(visit, own_server):
    server = own_server()
    cut = Cut(server, tokens=3)
    at = visit(cut.url)
    at.may_fail = True
    at.page.get_by_role("button", name="Example picture: poster").click()
    at.page.get_by_role("button", name="Ask", exact=True).click()
    problem = at.page.get_by_role("alert")
    expect(problem).to_contain_text("The connection ended in the middle of the answer.")
    expect(problem).to_contain_text("See whether the server still runs")
    assert at.answer() == "30 and"
    expect(at.page.get_by_text("Not answered to its end.")).to_be_visible()
    at.tokens().first.click()  # what came can be looked at
    assert at.caption() == "“3” read 1 page per layer, row 4, column 6"
    expect(at.page.get_by_label("Ask about this picture")).to_have_value(QUESTION)
    problem.get_by_role("button", name="Try again").click()
    expect(problem).to_contain_text("The server does not answer.")
    expect(at.page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()


def test_an_answer_is_stopped(visit, own_server):
    """One that does not come, for the server stands still; then it goes on."""
    server = own_server()
    at = visit(f"{server.url}/")
    at.page.get_by_role("button", name="Example picture: poster").click()
    os.kill(server.process.pid, signal.SIGSTOP)
    at.page.get_by_role("button", name="Ask", exact=True).click()
    at.page.get_by_role("button", name="Stop").click()
    expect(at.page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    expect(at.page.locator(".turn")).to_have_count(0)
    expect(at.page.get_by_label("Ask about this picture")).to_have_value(QUESTION)
    os.kill(server.process.pid, signal.SIGCONT)
    assert at.ask(QUESTION) == ANSWER


def test_a_full_queue_is_waited_for(visit, url):
    at = visit(url)
    at.may_fail = True
    at.page.get_by_role("button", name="Example picture: poster").click()
    error = {
        "message": "32 requests wait already",
        "type": "rate_limit_error",
        "code": "queue_full",
        "fix": "ask later",
    }
    at.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, headers={"Retry-After": "2"}, json={"error": error}),
    )
    at.page.get_by_role("button", name="Ask", exact=True).click()
    problem = at.page.get_by_role("alert")
    expect(problem).to_contain_text("32 requests wait already")
    expect(problem.get_by_role("button", name="Try again in 2 s")).to_be_disabled()
    at.page.unroute("**/v1/chat/completions")
    again = problem.get_by_role("button", name="Try again", exact=True)
    expect(again).to_be_enabled()
    again.click()
    at.page.locator(".figures:not(:empty)").wait_for()
    assert at.answer() == ANSWER


@pytest.mark.parametrize(
    "stream, says",
    [
        (
            b'data: {"error": {"message": "no answer within 3 s; expected one", "fix": "ask for less"}}\n\n',
            "ask for less",
        ),
        (b"data: {\n\n", "The connection ended in the middle"),
        (b"", "The connection ended in the middle"),
    ],
)
def test_a_stream_that_breaks_is_told(visit, url, stream, says):
    at = visit(url)
    at.page.get_by_role("button", name="Example picture: poster").click()
    at.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=stream),
    )
    at.page.get_by_role("button", name="Ask", exact=True).click()
    expect(at.page.get_by_role("alert")).to_contain_text(says)
    expect(at.page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def test_a_browser_that_keeps_nothing(visit, url):
    """With cookies and site data blocked, whoever looks for a storage gets an exception."""
    at = visit("about:blank")
    at.page.add_init_script(
        """for (const name of ["localStorage", "sessionStorage"]) {
            Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
        }"""
    )
    at.url = url
    at.open()
    at.page.get_by_role("button", name="Example picture: poster").click()
    assert at.ask(QUESTION) == ANSWER
    at.page.get_by_role("button", name="Theme: auto").click()
    expect(at.page.get_by_role("button", name="Theme: light")).to_be_visible()


def test_a_question_that_waits_for_the_server_is_asked_once(visit, url):
    at = visit("about:blank")
    at.may_fail, held, first = True, [], []

    def models(route) -> None:
        if first:
            held.append(route)
        else:
            first.append(route.abort())

    at.page.route("**/v1/models", models)
    at.url = url
    at.open()
    expect(at.page.get_by_role("alert")).to_contain_text("The server does not answer.")
    at.drop_poster()
    question = at.page.get_by_label("Ask about this picture")
    question.fill(QUESTION)
    for _ in range(3):
        question.press("Enter")
    held[0].continue_()
    at.page.locator(".figures:not(:empty)").wait_for()
    assert len(held) == 1 and at.answer() == ANSWER
    expect(at.page.locator(".turn")).to_have_count(1)
