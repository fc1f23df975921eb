"""Renders the drawings beside it, each .svg to its .png, in Chromium: `python -m tests.parity.drawn.draw`.

Nothing of them comes from the default model's generator: other outlines, gradients, shadows, patterns, numbers in
fonts (DejaVu) and in strokes of their own. `questions.json` has the layout of runtime/evaluate/scenes.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"  # Debian's; nothing is downloaded


def main() -> None:
    """Write the pictures, as large as the drawings say."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        for drawing in sorted(FOLDER.glob("*.svg")):
            width, height = re.search(r'width="(\d+)" height="(\d+)"', drawing.read_text()).groups()
            page.set_viewport_size({"width": int(width), "height": int(height)})
            page.goto(drawing.as_uri())
            page.screenshot(path=drawing.with_suffix(".png"))
        browser.close()


if __name__ == "__main__":
    main()
