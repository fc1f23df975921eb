"""A person at the page: a browser's window, what happens in it, and what its light shows."""

from __future__ import annotations

import base64
from itertools import pairwise
from urllib.parse import urlsplit

import numpy as np
from playwright.sync_api import Locator, Page

from tests.paths import ROOT

POSTER = ROOT / "examples/poster.png"
QUESTION, ANSWER = "what numbers are in the red star and the cyan circle?", "30 and 98"
# Opacity of the light's canvas where cells of the padded square have their centres; null: not over the picture.
_OPACITY = """(canvas, grid) => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height);
    const pen = copy.getContext("2d", { willReadFrequently: true });
    pen.drawImage(canvas, 0, 0);
    const side = Math.max(canvas.width, canvas.height);
    const at = (cell, length) => Math.floor((cell + 0.5) * side / grid - (side - length) / 2);
    return Array.from({ length: grid * grid }, (_, cell) => {
        const [x, y] = [at(cell % grid, canvas.width), at(Math.floor(cell / grid), canvas.height)];
        const inside = x >= 0 && y >= 0 && x < canvas.width && y < canvas.height;
        return inside ? pen.getImageData(x, y, 1, 1).data[3] : null;
    });
}"""


class Visit:
    """One window. What goes wrong in it is kept: `faults`, and the `origins` of all that it asked for."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.faults: list[str] = []
        self.origins: set[str] = set()
        self.may_fail = False  # a test of failures: the browser notes each failed request as an error
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", self._on_request)

    def _on_console(self, message) -> None:
        if message.type not in ("error", "warning"):
            return
        if not (self.may_fail and message.text.startswith("Failed to load resource")):
            self.faults.append(message.text)

    def _on_request(self, request) -> None:
        if not request.url.startswith(("blob:", "data:")):  # a file in the window's own memory: nobody is asked
            self.origins.add(urlsplit(request.url).netloc)

    def open(self) -> Visit:
        self.page.goto(self.url)
        return self

    def check(self) -> None:
        """Nothing went wrong that nobody saw: no error in the console, no breach of the policy, nobody else asked."""
        assert not self.faults, self.faults
        assert self.origins == {urlsplit(self.url).netloc}, self.origins

    def drop(self, data: bytes, name: str, kind: str) -> None:
        """Drop a file on the page, as from a file manager."""
        transfer = self.page.evaluate_handle(
            """([data, name, type]) => {
                const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], name, { type }));
                return transfer;
            }""",
            [base64.b64encode(data).decode(), name, kind],
        )
        for event in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event("body", event, {"dataTransfer": transfer})

    def drop_poster(self) -> None:
        self.drop(POSTER.read_bytes(), "poster.png", "image/png")
        self.page.wait_for_selector("#stage:not([hidden])")

    def ask(self, question: str) -> str:
        """Ask, wait for the whole answer, and return its text."""
        before = self.page.locator(".turn .figures:not(:empty)").count()
        self.page.get_by_label("Ask about this picture").fill(question)
        self.page.get_by_role("button", name="Ask", exact=True).click()
        self.page.locator(".turn .figures:not(:empty)").nth(before).wait_for()
        return self.answer()

    def answer(self) -> str:
        """The text of the last answer, without the mark of its end."""
        return "".join(
            self.page.locator(".turn")
            .last.locator(".answer")
            .evaluate(
                "(answer) => [...answer.childNodes].filter((node) => !node.classList?.contains('mark'))"
                ".map((node) => node.textContent)"
            )
        ).strip()

    def tokens(self) -> Locator:
        """Of the last answer."""
        return self.page.locator(".turn").last.get_by_role("option")

    def opacity(self, grid: int = 9) -> np.ndarray:
        """Of the canvas at the centre of every cell [grid * grid], NaN outside of the picture."""
        return np.array(self.page.locator("#light").evaluate(_OPACITY, grid), dtype=float)

    def caption(self) -> str:
        return self.page.locator("#caption").inner_text()


def require_lit(opacity: np.ndarray, share: np.ndarray) -> None:
    """The light is that of these cells: the larger their share [C * C], the less the veil covers them."""
    inside = ~np.isnan(opacity)
    levels = sorted(set(share[inside].tolist()))
    seen = [set(opacity[inside & (share == level)].tolist()) for level in levels]
    assert all(max(values) - min(values) <= 2 for values in seen), (levels, seen)
    means = [sum(values) / len(values) for values in seen]
    assert all(darker - brighter > 10 for darker, brighter in pairwise(means)), (levels, means)
