"""A 7B-shaped model on this machine, from nothing to an answer: `python -m tests.bench.real_size --folder DIR`.

Makes a random checkpoint of LLaVA-1.5-7B-FlexAttention's shape (16.2 GB, kept for the next time), exports it, opens it
in ONNX Runtime and asks about a 1008-pixel image. Every stage is a process of its own; its wall time and its largest
resident memory are printed as Markdown. Needs 25 GB of disk.

`--limit`: every stage but the checkpoint's runs under a hard limit, in a control group of its own (version 1, which
takes root), and is killed if it needs more; what the group held at most is printed, too. That counts pages of files
that were read or mapped, which the system takes back when others need the memory: it comes near the limit where
files are large.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.backend import Opening

ROOT = Path(__file__).resolve().parents[2]
KNOBS = "kv", "kv_cache", "head", "embeddings", "vision", "context", "projection", "page_slots"
GROUPS = Path("/sys/fs/cgroup/memory")
OPEN = """
import sys
from runtime import Engine
engine = Engine(sys.argv[1], residency=sys.argv[2], prefill_chunk=int(sys.argv[3]))
"""
ANSWER = f"""{OPEN}
import numpy as np
photo = np.random.default_rng(0).integers(0, 256, (1008, 1008, 3), dtype=np.uint8)
answer = engine.generate(photo, "What does the sign say?", max_new_tokens=int(sys.argv[4]), stop_at_eos=False)
print(answer.stats)
"""


def stage(name: str, *arguments: str, limit: float | None = None) -> tuple[str, float, float, float | None, str]:
    """Run a Python process, under a `limit` in gigabytes; its name, seconds, gigabytes of its largest resident memory,
    and of what its control group held at most (None without a limit), and last line of output."""
    with group(limit) as folder:
        enter = None if folder is None else lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=enter
        )
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds, lines = time.perf_counter() - started, output.strip().splitlines()
        if status:
            killed = "killed, which the limit does, " if limit is not None and status == 9 else ""
            sys.exit(f"{name} failed after {seconds:.0f} s: {killed}status {status}\n{output}")
        most = None if folder is None else int((folder / "memory.max_usage_in_bytes").read_text()) / 1e9
        return name, seconds, usage.ru_maxrss * 1024 / 1e9, most, lines[-1] if lines else ""


@contextmanager
def group(limit: float | None) -> Iterator[Path | None]:
    """The folder of a control group whose processes have `limit` gigabytes together; None without a limit."""
    if limit is None:
        yield None
        return
    folder = GROUPS / f"flex-real-size-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(int(limit * 1e9)))
    except OSError as error:
        sys.exit(f"--limit: no control group of version 1 in {GROUPS}: {error}")
    try:
        yield folder
    finally:
        folder.rmdir()


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
    parser.add_argument("--projection", default="model", help="of export/build.py")
    parser.add_argument("--page-slots", default="model", help="of export/build.py: pages that a layer has room for")
    parser.add_argument("--limit", type=float, help="GB that export, open and answer may take each, or are killed")
    parser.add_argument("--residency", default="all", choices=("all", "shared"), help="of the engine")
    parser.add_argument("--prefill-chunk", type=int, default=Opening.prefill_chunk, help="of the engine, if shared")
    parser.add_argument("--tokens", type=int, default=16, help="of the answer")
    given = parser.parse_args()
    folder = given.folder.resolve()
    chosen = {name: value for name in KNOBS if (value := getattr(given, name)) != "model"}
    named = (f"{name}-{value}" for name, value in chosen.items())
    checkpoint, bundle = folder / "7b", folder / "-".join(("7b", given.precision, *named))
    rows = []
    if not checkpoint.exists():
        rows.append(stage("checkpoint", "tests/bench/random_checkpoint.py", "--shape", "7b", "--out", str(checkpoint)))
    export = "export/build.py", "--model", str(checkpoint), "--out", str(bundle), "--check", "weights"
    options = [(f"--{name.replace('_', '-')}", value) for name, value in chosen.items()]
    knobs = f"--{given.precision}", *(word for option in options for word in option)
    rows.append(stage(f"export `{' '.join(knobs)}`", *export, *knobs, limit=given.limit))
    opened = str(bundle), given.residency, str(given.prefill_chunk)
    rows.append(stage("open", "-c", OPEN, *opened, limit=given.limit))
    answered = f"open, answer {given.tokens} tokens"
    rows.append(stage(answered, "-c", ANSWER, *opened, str(given.tokens), limit=given.limit))
    size = sum(path.stat().st_size for path in bundle.iterdir()) / 1e9
    print("| stage | wall | peak memory | control group |\n|---|---:|---:|---:|")
    print("\n".join(_row(*row[:4]) for row in rows))
    print(f"\nBundle: {size:.1f} GB. {rows[-1][4]}")


def _row(name: str, seconds: float, gigabytes: float, group: float | None) -> str:
    return f"| {name} | {seconds:.0f} s | {gigabytes:.2f} GB | {'' if group is None else f'{group:.2f} GB'} |"


if __name__ == "__main__":
    main()
