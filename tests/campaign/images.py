"""Damaged images. What is accepted is held against Pillow's own reading, turned upright as a viewer shows it."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import PIL.Image
import PIL.ImageOps
from hypothesis import strategies as st

from runtime.image import FORMATS as ALLOWED
from runtime.image import load_image
from tests.campaign.mutate import damaged_bytes
from tests.campaign.trial import Unjudged, Wrong

FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "ICO",
    "TGA",
    "PCX",
    "SGI",
    "DIB",
    "JPEG2000",
    "MPO",
    "AVIF",
    "EPS",
)
MODES = ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA", "I;16")


def seeds() -> dict[str, bytes]:
    """A small image in every format and mode that Pillow writes, some with EXIF, some with several frames."""
    rng, found = np.random.default_rng(0), {}
    picture = PIL.Image.fromarray(rng.integers(0, 255, (24, 33, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    for form in FORMATS:
        for mode in MODES:
            for turn in (0, 6):
                exif[0x0112] = turn
                options = {"exif": exif} if turn and form in ("PNG", "JPEG", "WEBP", "TIFF", "MPO") else {}
                if turn and not options:
                    continue
                file = io.BytesIO()
                try:
                    picture.convert(mode).save(file, form, **options)
                except (OSError, ValueError, KeyError):  # not every format has every mode, or is built in
                    continue
                found[f"{form} {mode} {turn}"] = file.getvalue()
    for form in ("GIF", "TIFF", "WEBP", "PNG", "MPO"):
        file = io.BytesIO()
        picture.save(file, form, save_all=True, append_images=[picture.rotate(180)])
        found[f"{form} of two frames"] = file.getvalue()
    return found


def damages() -> st.SearchStrategy[bytes]:
    """Encoded images, most of them damaged."""
    whole = seeds()
    return st.sampled_from(sorted(whole)).flatmap(
        lambda name: st.one_of(st.just(whole[name]), damaged_bytes(whole[name]), damaged_bytes(whole[name]))
    )


def run(data: bytes, scratch: Path) -> str:
    """Read it however people have it; Wrong when two ways differ, or from Pillow."""
    found = np.asarray(load_image(data))
    (scratch / "image").write_bytes(data)
    text = base64.b64encode(data).decode()
    for name, source in {
        "file": scratch / "image",
        "file object": io.BytesIO(data),
        "data: URL": f"data:image/png;base64,{text}",
        "percent-encoded URL": f"data:,{quote_from_bytes(data)}",
        "base64 text": text.rstrip("="),
    }.items():
        if not np.array_equal(np.asarray(load_image(source)), found):
            raise Wrong(f"the {name} is read otherwise than its bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with PIL.Image.open(io.BytesIO(data)) as image:
            if image.format not in ALLOWED:
                raise Wrong(f"an image of the format {image.format} was read")
            try:
                image = PIL.ImageOps.exif_transpose(image)
            except Exception:  # viewers show an image whose EXIF is broken
                raise Unjudged("Pillow cannot read its EXIF") from None
            if not np.array_equal(np.asarray(image.convert("RGB")), found):
                raise Wrong("read otherwise than Pillow does")
    return f"accepted: {found.shape}"
