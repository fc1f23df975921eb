"""A 7B-shaped model on this machine, from nothing to an answer: `python -m tests.bench.real_size --folder DIR`.

Makes a random checkpoint of LLaVA-1.5-7B-FlexAttention's shape (16.2 GB, kept for the next time), exports it, opens it
in ONNX Runtime and asks about a 1008-pixel image. Every stage is a process of its own; its wall time and its largest
resident memory are printed as Markdown. Needs 25 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ANSWER = """
import sys, numpy as np
from runtime import Engine
engine = Engine(sys.argv[1], residency=sys.argv[3])
photo = np.random.default_rng(0).integers(0, 256, (1008, 1008, 3), dtype=np.uint8)
answer = engine.generate(photo, "What does the sign say?", max_new_tokens=int(sys.argv[2]), stop_at_eos=False)
print(answer.stats)
"""


def stage(name: str, *arguments: str) -> tuple[str, float, float, str]:
    """Run a Python process; its name, seconds, gigabytes of its largest resident memory, and last line of output."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed: status {status}\n{output}")
    seconds, lines = time.perf_counter() - started, output.strip().splitlines()
    return name, seconds, usage.ru_maxrss * 1024 / 1e9, lines[-1] if lines else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint and the bundle")
    parser.add_argument("--precision", default="int4", help="of export/build.py")
    parser.add_argument("--kv", default="model", help="of export/build.py: int8 keeps the hi-res pages in 8 bits")
    parser.add_argument("--kv-cache", default="model", help="of export/build.py: int8 keeps the cache in 8 bits, too")
    for part in ("head", "embeddings", "vision"):
        parser.add_argument(f"--{part}", default="model", help="of export/build.py")
    parser.add_argument("--context", default="model", help="of export/build.py: tokens")
    parser.add_argument("--residency", default="all", choices=("all", "shared"), help="of the engine")
    parser.add_argument("--tokens", type=int, default=16, help="of the answer")
    given = parser.parse_args()
    folder = given.folder.resolve()
    chosen = {name: getattr(given, name) for name in ("kv", "kv_cache", "head", "embeddings", "vision", "context")}
    checkpoint, bundle = folder / "7b", folder / "-".join(("7b", given.precision, *chosen.values()))
    rows = []
    if not checkpoint.exists():
        rows.append(stage("checkpoint", "tests/bench/random_checkpoint.py", "--shape", "7b", "--out", str(checkpoint)))
    export = "export/build.py", "--model", str(checkpoint), "--out", str(bundle), "--check", "weights"
    options = [(f"--{name.replace('_', '-')}", value) for name, value in chosen.items() if value != "model"]
    knobs = f"--{given.precision}", *(word for option in options for word in option)
    rows.append(stage(f"export `{' '.join(knobs)}`", *export, *knobs))
    opened = "import sys; from runtime import Engine; Engine(sys.argv[1], residency=sys.argv[2])"
    rows.append(stage("open", "-c", opened, str(bundle), given.residency))
    asked = str(bundle), str(given.tokens), given.residency
    rows.append(stage(f"open, answer {given.tokens} tokens", "-c", ANSWER, *asked))
    size = sum(path.stat().st_size for path in bundle.iterdir()) / 1e9
    print(f"| stage | wall | peak memory |\n|---|---:|---:|\n{os.linesep.join(_row(*row[:3]) for row in rows)}")
    print(f"\nBundle: {size:.1f} GB. {rows[-1][3]}")


def _row(name: str, seconds: float, gigabytes: float) -> str:
    return f"| {name} | {seconds:.0f} s | {gigabytes:.2f} GB |"


if __name__ == "__main__":
    main()
