"""Ask the same of every new frame: python examples/camera.py FOLDER QUESTION [--bundle FOLDER] [--frames N]."""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from time import perf_counter, sleep

from runtime import Engine, FlexError, ImageError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="where a camera program writes .png or .jpg files")
parser.add_argument("question")
parser.add_argument("--bundle", default="build/default-fp16", help="made by scripts/quickstart.sh")
parser.add_argument("--frames", type=int, help="end after so many; never when not given")
given = parser.parse_args()


def newest(folder: Path) -> Iterator[Path]:
    """The latest frame whenever there is a new one; those that came in while it was answered are skipped."""
    latest = seen = 0, folder
    while True:
        with suppress(FileNotFoundError):  # camera programs delete old frames
            latest = max([seen, *((path.stat().st_mtime_ns, path) for path in folder.glob("*.[jp][pn]g"))])
        if latest != seen:
            yield latest[1]
        seen = latest
        sleep(0.01)


try:
    engine = Engine(given.bundle)  # once: no frame waits for it
except FlexError as error:  # found, expected, fix
    raise SystemExit(f"error: {error}") from None
for frame in islice(newest(given.folder), given.frames):
    start = perf_counter()
    try:
        answer = engine.generate(frame, given.question, max_new_tokens=16)
        print(f"{frame.name}: {answer} ({1000 * (perf_counter() - start):.0f} ms)", flush=True)
    except ImageError as error:  # half written, or deleted again; the engine is as usable as before
        print(f"{frame.name}: {error.found}", flush=True)
