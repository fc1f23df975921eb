"""What a process that answers holds in memory, stage by stage: `python -m tests.bench.memory --folder DIR`.

Makes a random checkpoint (kept for the next time), builds it in each precision, and lets a process of its own open the
bundle, encode a 1008-pixel image and answer, once for each residency. Printed as Markdown, in MB: memory of the
process's own (copies of weights, scratch memory, caches) and, after the +, file pages that are mapped, which the system
takes back when it needs them; then the largest sum so far.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from engines.residency import RESIDENCIES

ROOT = Path(__file__).resolve().parents[3]
STAGES = "imported", "opened", "image encoded", "prefilled", "answered", "asked again"
ANSWER = """
import json, sys
from pathlib import Path
import numpy as np

def held(stage):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([stage, *(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM"))]))

from runtime import Engine
import onnxruntime
bundle, residency, tokens, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
held("imported")
engine = Engine(bundle, threads=threads, residency=residency)
held("opened")
photo = np.random.default_rng(0).integers(0, 256, (1008, 1008, 3), dtype=np.uint8)
with engine.image(photo) as view:
    view.encode("What does the sign say?")
    held("image encoded")
    stream = view.stream("What does the sign say?", max_new_tokens=tokens, stop_at_eos=False)
    next(stream.steps())
    held("prefilled")
    stats = stream.answer().stats
    held("answered")
    again = view.ask("And what is beside it?", max_new_tokens=tokens, stop_at_eos=False)
    held("asked again")
print(json.dumps([float(np.median(stats.decode_ms[1:])), stats.prefill_ms]))
"""


def measure(bundle: Path, residency: str, tokens: int, threads: int) -> tuple[dict[str, list[int]], float, float]:
    """Bytes by stage (own, mapped, peak), milliseconds of a decode step and of the prefill."""
    asked = [sys.executable, "-c", ANSWER, str(bundle), residency, str(tokens), str(threads)]
    output = subprocess.run(asked, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    *stages, (step, prefill) = map(json.loads, output)
    return {name: sizes for name, *sizes in stages}, step, prefill


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint and the bundles")
    parser.add_argument("--shape", default="tables", help="of tests/bench/random_checkpoint.py (tables)")
    parser.add_argument(
        "--build",
        nargs="+",
        default=["fp16", "int4"],
        help='each: options of export/build.py, without the first --, such as "int4 --kv int8" (fp16 int4)',
    )
    parser.add_argument("--residency", nargs="+", choices=RESIDENCIES, default=RESIDENCIES)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    folder = given.folder.resolve()
    checkpoint = folder / given.shape
    if not checkpoint.exists():
        run("tests/bench/random_checkpoint.py", "--shape", given.shape, "--out", str(checkpoint))
    print(f"| bundle | residency | {' | '.join(STAGES)} | peak | ms a step | prefill, ms |")
    print("|---|---|" + "---:|" * (len(STAGES) + 3))
    for options in (f"--{each}".split() for each in given.build):
        bundle = folder / f"{given.shape}{''.join(options)}"
        if not bundle.exists():
            export = "export/build.py", "--model", str(checkpoint), "--out", str(bundle), "--check", "weights"
            run(*export, *options)
        for residency in given.residency:
            stages, step, prefill = measure(bundle, residency, given.tokens, given.threads)
            cells = [f"{own / 1e6:.0f} + {mapped / 1e6:.0f}" for own, mapped, _ in map(stages.__getitem__, STAGES)]
            peak = f"{stages[STAGES[-1]][2] / 1e6:.0f}"
            row = [f"`{' '.join(options)}`", residency, *cells, peak, f"{step:.1f}", f"{prefill:.0f}"]
            print(f"| {' | '.join(row)} |", flush=True)


def run(*arguments: str) -> None:
    """A Python process, which must not fail."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
