"""The likeliest of several answers: python examples/score.py [PICTURE] [QUESTION] [ANSWER ...] [--bundle FOLDER]."""

import argparse

from runtime import Engine, FlexError

ANSWERS = "30 and 98", "30 and 96", "98 and 30", "yes"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?", default="examples/poster.png")
parser.add_argument("question", nargs="?", default="what numbers are in the red star and the cyan circle?")
parser.add_argument("answers", nargs="*", default=ANSWERS)
parser.add_argument("--bundle", default="build/default-fp16", help="made by scripts/quickstart.sh")
given = parser.parse_args()

try:
    engine = Engine(given.bundle)
    with engine.image(given.picture) as view:
        scores = view.score(given.question, given.answers)  # one pass of vision, one prefill for all of them
    for answer, score in sorted(zip(given.answers, scores, strict=True), key=lambda each: -each[1].mean):
        pages = score.pages_read.mean()
        print(f"{score.mean:7.3f} per token, {len(score.token_ids)} tokens, {pages:4.1f} pages read: {answer}")
except FlexError as error:
    raise SystemExit(f"error: {error}") from None
