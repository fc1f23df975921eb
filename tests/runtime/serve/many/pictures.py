"""As many images as a test needs, whose answer is known."""

from __future__ import annotations

import io

from PIL import Image

from tests.paths import ROOT

QUESTION, ANSWER = "what numbers are in the red star and the cyan circle?", "30 and 98"


def picture(number: int) -> bytes:
    """The poster with another pixel in its corner, as a PNG: the same answer, another image for each number below
    2**24."""
    image = Image.open(ROOT / "examples/poster.png").convert("RGB")
    image.putpixel((0, 0), (number & 255, number >> 8 & 255, number >> 16))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
