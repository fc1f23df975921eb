"""Many questions about one picture: python examples/many_questions.py [PICTURE] [QUESTION ...] [--bundle FOLDER]."""

import argparse
from time import perf_counter

from runtime import Engine, FlexError

QUESTIONS = "what number is in the red star?", "what number is in the cyan circle?", "is there a pink circle?"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?", default="examples/poster.png")
parser.add_argument("questions", nargs="*", default=QUESTIONS)
parser.add_argument("--bundle", default="build/default-fp16", help="made by scripts/quickstart.sh")
given = parser.parse_args()

try:
    engine = Engine(given.bundle)
    with engine.image(given.picture) as view:  # the view keeps what belongs to the image; leaving it frees that
        for question in given.questions:
            start = perf_counter()
            answer = view.ask(question, page_budget=8)  # fewer pages, less to read: each layer takes its best 8 of 81
            spent, stats = 1000 * (perf_counter() - start), answer.stats
            # From the second question on vision and page projection take 0 ms, and the image's tokens are cached.
            print(f"{question} {answer}")
            print(
                f"  {spent:.0f} ms: vision {stats.vision_ms:.0f}, pages {stats.projection_ms:.0f}, "
                f"{stats.reused_tokens} of {stats.prompt_tokens} prompt tokens reused"
            )
except FlexError as error:
    raise SystemExit(f"error: {error}") from None
