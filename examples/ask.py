"""Ask about a picture: python examples/ask.py [PICTURE] [QUESTION] [--bundle FOLDER]."""

import argparse

from runtime import Engine, FlexError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?", default="examples/poster.png")
parser.add_argument("question", nargs="?", default="what numbers are in the red star and the cyan circle?")
parser.add_argument("--bundle", default="build/default-fp16", help="made by scripts/quickstart.sh")
given = parser.parse_args()

try:
    engine = Engine(given.bundle)  # opening takes longest: a program keeps its engine
    stream = engine.stream(given.picture, given.question, max_new_tokens=64)
    for piece in stream:  # pieces of text as they are decoded: show them while the rest is still to come
        print(piece, end="", flush=True)
    print()
    print(stream.answer().stats)
except FlexError as error:  # everything this project raises on purpose: found, expected, fix
    raise SystemExit(f"error: {error}") from None
