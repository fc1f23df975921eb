"""A picture of where the model looked: for each answer token, the pages its layers read."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from engines.errors import OptionError

PANEL, SMALL, MANY = 320, 160, 24  # pixels of a panel's long side; and when there are more than MANY of them
GAP, CAPTION = 10, 24  # pixels
PAGE = np.array([255, 96, 0], np.float32)  # colour laid over a page
DIM = 0.45  # brightness of what no layer read


def draw_selection(image: PIL.Image.Image, cells: np.ndarray, captions: list[str]) -> PIL.Image.Image:
    """One panel per answer token beside the original.

    image: RGB, as given to the engine. cells: bool [T, M, C, C], `answer.trace.cells`. captions: T texts, one for each
    token. A page's opacity is the share of reading layers that read it; the last layer's selection is never read.
    """
    width, height = image.size
    scale = (PANEL if len(cells) <= MANY else SMALL) / max(width, height)
    small = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), PIL.Image.Resampling.LANCZOS)
    read = cells[:, :-1]
    panels = [small] + [_overlay(small, step.mean(0)) for step in read]
    titles = ["image"] + [f"{index + 1}: {text}" for index, text in enumerate(captions)]

    columns = min(len(panels), max(1, math.ceil(math.sqrt(len(panels) * small.height / small.width))))
    rows = math.ceil(len(panels) / columns)
    step_x, step_y = small.width + GAP, small.height + CAPTION + GAP
    sheet = PIL.Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        x, y = GAP + index % columns * step_x, GAP + index // columns * step_y
        draw.text((x, y), _fitting(title, font, small.width), "black", font)
        sheet.paste(panel, (x, y + CAPTION))
    return sheet


def require_writable(picture: Path, option: str) -> None:
    """OptionError, which names the `option`, for what would go wrong when a picture is written to this path."""
    folder = picture.absolute().parent
    try:
        if not folder.is_dir():
            raise OptionError(f"{option} {picture}: no such folder", fix=f"mkdir -p {picture.parent}")
        ordinary = picture.is_file() or not os.path.lexists(picture)  # a pipe would wait for who reads it
        writable = ordinary and os.access(picture if picture.exists() else folder, os.W_OK)
    except OSError:  # too long a name
        writable = False
    if not writable:
        raise OptionError(f"{option} {picture!s:.200}: cannot be written", expected="a file name in a folder of yours")
    if PIL.Image.registered_extensions().get(picture.suffix.lower()) not in PIL.Image.SAVE:
        raise OptionError(
            f"{option} {picture}: {picture.suffix or 'no suffix'}", expected="a picture: .png, .jpg, .webp"
        )


def write_picture(drawn: PIL.Image.Image, picture: Path, option: str) -> None:
    """Write it to a path that `require_writable` found fit. OptionError, which names the `option`, where that fails."""
    try:
        drawn.save(picture)
    except (OSError, ValueError) as error:  # ValueError: more pixels than the format has room for
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OptionError(f"{option} {picture}: cannot be written: {why}") from error


def _overlay(image: PIL.Image.Image, share: np.ndarray) -> PIL.Image.Image:
    """`share` [C, C] 0..1 of the padded square laid over the image inside it."""
    pixels = np.asarray(image, np.float32)
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    rows, columns = (
        (np.arange(count) + offset) * len(share) // side for count, offset in ((image.height, top), (image.width, left))
    )
    alpha = share[rows[:, None], columns][..., None]
    lit = pixels * (DIM + (1 - DIM) * (alpha > 0))
    opacity = 0.6 * alpha
    return PIL.Image.fromarray((lit * (1 - opacity) + PAGE * opacity).astype(np.uint8))


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` without what cannot be printed, cut to `width` pixels."""
    text = "".join(character if character.isprintable() else "·" for character in text)
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
