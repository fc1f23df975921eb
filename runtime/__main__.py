"""Ask a bundle about an image: `python -m runtime build/NAME photo.jpg "What does the sign say?"`; without a question
it is a conversation."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

import PIL.Image

from engines.errors import ImageError, OptionError
from engines.open import add_opening_options, opening_options
from plugins import command
from runtime.engine import Engine
from runtime.image import EXIF, load_image
from runtime.request import Options
from runtime.terminal import conversation
from runtime.terminal.show import draw_selection, require_writable, write_picture

OUTPUT = """One question about one image: the answer alone. Several questions, or a pattern: a line for each answer,
IMAGE, tab, QUESTION, tab, ANSWER, in which \\t, \\n and \\\\ stand for a tab, a line's end and a backslash. An image
of a pattern that cannot be read is an error on standard error; the others go on, and the exit status is 1."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; --help shows every default."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m runtime",
        description=__doc__,
        epilog=OUTPUT,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", type=Path, help="folder written by export/build.py")
    add(
        "image",
        help='image file; - for standard input; a data: URL; a quoted pattern for several files ("photos/*.jpg", ** '
        'for folders in folders); "none" for questions without an image',
    )
    add("question", nargs="*", help="none: a conversation, of lines that are typed, or come through standard input")
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
    add("--exif", action=argparse.BooleanOptionalAction, default=EXIF, help="turn a photo upright; no: as it is stored")
    add("--show", type=Path, metavar="PNG", help="write the image with the pages each answer token looked at")
    add_opening_options(parser)
    return parser.parse_intermixed_args(arguments)  # a question may stand behind options


def run(given: argparse.Namespace) -> int:
    """Do what the command line says; the exit status. Raises a FlexError."""
    sources, pattern = _sources(given.image)
    if not given.question:
        return _converse(given, sources)
    if pattern or len(given.question) > 1:
        return _answer_all(given, sources)
    _answer_one(given)
    return 0


def _sources(text: str) -> tuple[list[str], bool]:
    """The images that IMAGE stands for, and whether it is a pattern. ImageError for a pattern that nothing matches."""
    if text in ("none", "-") or text[:5].lower() == "data:" or os.path.lexists(text) or glob.escape(text) == text:
        return [text], False
    # Not Path.glob: * of a shell leaves hidden files out.
    found = sorted(path for path in glob.glob(text, recursive=True) if not Path(path).is_dir())  # noqa: PTH207
    if not found:
        raise ImageError(f"no file matches {text:.200}", expected="a file, or a pattern: * ? [a-z] **")
    return found, True


def _load(source: str, exif: bool) -> PIL.Image.Image | None:
    """One of `_sources`; None for "none"."""
    if source == "none":
        return None
    if source != "-":
        return load_image(source, exif=exif)
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError("no image comes through standard input", expected="cat photo.jpg | python -m runtime ... -")
    try:
        return load_image(sys.stdin.buffer, exif=exif)
    except ImageError as error:
        raise error.within("standard input") from None


def _open(given: argparse.Namespace) -> Engine:
    return Engine(given.bundle, **opening_options(given))


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {field.name: getattr(given, field.name) for field in fields(Options) if hasattr(given, field.name)}


def _answer_one(given: argparse.Namespace) -> None:
    """Stream the answer to stdout, then its cost to stderr."""
    image = _load(given.image, given.exif)
    if given.show is not None and image is None:
        raise OptionError("--show without an image", fix="name an image, or leave --show out")
    if given.show is not None:
        require_writable(given.show, "--show")
    engine = _open(given)
    stream = engine.stream(image, given.question[0], **{**_options(given), "trace": given.show is not None})
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    answer = stream.answer()
    print(answer.stats, file=sys.stderr)
    if image is not None and answer.trace is not None:  # as --show asks for
        captions = engine.prompter.captions(answer.token_ids)
        write_picture(draw_selection(image, answer.trace.cells, captions), given.show, "--show")
        print(f"wrote {given.show}", file=sys.stderr)


def _answer_all(given: argparse.Namespace, sources: list[str]) -> int:
    """A line for each question about each image, in OUTPUT's form; 1 if an image could not be read."""
    if given.show is not None:
        raise OptionError("--show with several answers", expected="one image and one QUESTION", fix="leave --show out")
    engine, unread, started = _open(given), 0, perf_counter()
    for source in sources:
        try:
            view = engine.image(_load(source, given.exif))
        except ImageError as error:
            print(f"error: {error}", file=sys.stderr)
            unread += 1
            continue
        with view:
            for question in given.question:
                answer = view.ask(question, **_options(given))
                print(*map(_column, (_shortened(source), question, str(answer))), sep="\t", flush=True)
    answers = (len(sources) - unread) * len(given.question)
    print(f"{answers} answers in {perf_counter() - started:.1f} s, {unread} images not read", file=sys.stderr)
    return int(unread > 0)


def _shortened(source: str) -> str:
    """An image's name; of an image that is all in the command line its begin."""
    return source if len(source) < 80 or os.path.lexists(source) else f"{source[:40]}..."


def _column(text: str) -> str:
    """`text` without what would end a column or a line."""
    return text.translate({ord("\\"): "\\\\", ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"})


def _converse(given: argparse.Namespace, sources: list[str]) -> int:
    """A conversation about the one image there is."""
    if len(sources) > 1:
        raise OptionError(f"{len(sources)} images and no QUESTION", expected="one image to talk about, or a QUESTION")
    if sources == ["-"]:
        raise OptionError("an image from standard input and no QUESTION", fix="save it to a file, or add a QUESTION")
    if given.show is not None:
        raise OptionError("--show without a QUESTION", fix="leave it out, and type /show after an answer")
    lines = conversation.open_lines()  # first: what is missing is told before the bundle is opened
    image = _load(sources[0], given.exif)
    with _open(given) as engine:
        talk = conversation.Conversation(engine, image, sources[0], exif=given.exif, options=_options(given))
        return talk.run(lines)


def main() -> int:
    """Entry of the command line; returns the exit status."""
    return command.run(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
