"""Ask a bundle about an image: `python -m runtime build/NAME photo.jpg "What does the sign say?"`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

import PIL.Image

from engines.backend import Opening
from engines.bundle.kinds import BACKENDS
from engines.errors import OptionError
from engines.open import DEVICES
from plugins import command
from runtime.engine import Engine
from runtime.image import EXIF, load_image
from runtime.request import Options
from runtime.show import draw_selection


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; --help shows every default."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m runtime", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("bundle", type=Path, help="folder written by export/build.py")
    add("image", help='image file, or "none" for a question without one')
    add("question")
    add("--max-new-tokens", type=int, default=default.max_new_tokens, help="answer tokens at most")
    add("--temperature", type=float, default=default.temperature, help="0 = greedy")
    add("--top-k", type=int, default=default.top_k, help="sample from so many of the likeliest tokens; 0 = all")
    add("--top-p", type=float, default=default.top_p, help="sample from the likeliest tokens up to this probability")
    add("--seed", type=int, default=default.seed, help="of the sampling")
    add("--stop", action="append", default=[], help="text that ends the answer; may be repeated")
    add(
        "--special-tokens",
        action="store_true",
        default=default.special_tokens,
        help="read </s>, <image> and the like in the question as control tokens, as the official code does",
    )
    add("--page-budget", type=int, default=default.page_budget, help="pages each layer reads at most; None = bundle's")
    add("--no-exif", dest="exif", action="store_false", default=EXIF, help="leave a photo as stored, not upright")
    add("--show", type=Path, metavar="PNG", help="write the image with the pages each answer token looked at")
    add("--backend", choices=BACKENDS, default=Opening.backend, help="None = what the bundle was built for")
    add("--device", choices=DEVICES, default=Opening.device, help="None = cpu for onnxruntime, cuda for TensorRT")
    add("--threads", type=int, default=Opening.threads, help="of one operator; None = every core")
    add("--no-verify", dest="verify", action="store_false", help="skip the SHA-256 of each file")
    add("--expect", metavar="DIGEST", help="of the bundle, as python -m engines.doctor BUNDLE prints it; or an error")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Stream the answer to stdout, then its cost to stderr. Raises a FlexError."""
    image = None if given.image == "none" else load_image(given.image, exif=given.exif)
    if given.show is not None and image is None:
        raise OptionError("--show without an image", fix="name an image, or leave --show out")
    if given.show is not None:
        _require_writable(given.show)
    opening = {field.name: getattr(given, field.name) for field in fields(Opening) if hasattr(given, field.name)}
    engine = Engine(given.bundle, verify=given.verify, expect=given.expect, **opening)
    options = {field.name: getattr(given, field.name) for field in fields(Options) if hasattr(given, field.name)}
    stream = engine.stream(image, given.question, **{**options, "trace": given.show is not None})
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    answer = stream.answer()
    print(answer.stats, file=sys.stderr)
    if image is not None and answer.trace is not None:  # as --show asks for
        captions = [engine.prompter.decode([token]) for token in answer.token_ids]
        try:
            draw_selection(image, answer.trace.cells, captions).save(given.show)
        except (OSError, ValueError) as error:  # ValueError: more pixels than the format has room for
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OptionError(f"--show {given.show}: cannot be written: {why}") from error
        print(f"wrote {given.show}", file=sys.stderr)


def _require_writable(picture: Path) -> None:
    """OptionError now for what would go wrong only after the answer."""
    folder = picture.absolute().parent
    if not folder.is_dir():
        raise OptionError(f"--show {picture}: no such folder", fix=f"mkdir -p {picture.parent}")
    ordinary = picture.is_file() or not os.path.lexists(picture)  # a pipe would wait for who reads it
    if not ordinary or not os.access(picture if picture.exists() else folder, os.W_OK):
        raise OptionError(f"--show {picture}: cannot be written", expected="a file name in a folder of yours")
    if PIL.Image.registered_extensions().get(picture.suffix.lower()) not in PIL.Image.SAVE:
        raise OptionError(f"--show {picture}: {picture.suffix or 'no suffix'}", expected="a picture: .png, .jpg, .webp")


def main() -> int:
    """Entry of the command line; returns the exit status."""
    return command.run(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
