"""Ask the same of every new frame: python examples/camera.py FOLDER QUESTION [--bundle FOLDER] [--frames N]."""

import argparse
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep

from runtime import Engine, FlexError, ImageError

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="where a camera program writes .png or .jpg files")
parser.add_argument("question")
parser.add_argument("--bundle", default="build/default-fp16", help="made by scripts/quickstart.sh")
parser.add_argument("--frames", type=int, help="end after so many; never when not given")
given = parser.parse_args()

try:
    engine = Engine(given.bundle)  # once: no frame waits for it
except FlexError as error:  # found, expected, fix
    raise SystemExit(f"error: {error}") from None

seen, answered = (0, given.folder), 0
while answered != given.frames:
    sleep(0.01)
    latest = seen
    with suppress(FileNotFoundError):  # camera programs delete old frames
        latest = max([seen, *((path.stat().st_mtime_ns, path) for path in given.folder.glob("*.[jp][pn]g"))])
    if latest == seen:
        continue
    seen, answered, start = latest, answered + 1, perf_counter()  # what came in meanwhile is skipped: the newest counts
    frame = latest[1]
    try:
        answer = engine.generate(frame, given.question, max_new_tokens=16)
        print(f"{frame.name}: {answer} ({1000 * (perf_counter() - start):.0f} ms)", flush=True)
    except ImageError as error:  # half written, or deleted again; the engine is as usable as before
        print(f"{frame.name}: {error.found}", flush=True)
