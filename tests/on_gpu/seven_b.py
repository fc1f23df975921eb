"""A bundle of 7B's shape with random weights, asked through the public interface: `python -m tests.on_gpu.seven_b`.

The graphs come with an archive (tests/on_gpu/pack.py) or are exported here from the shapes alone; the weights, 16 GB,
are made on the device and written where there is room, preferably in memory. Answers mean nothing; times do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from engines.bundle.geometry import Geometry
from engines.errors import BackendError
from engines.ort.captured import CapturedPart
from plugins.command import run
from runtime import Engine
from tests.geometries import official, tiny
from tests.paths import ROOT

SHAPES = {"7b": official, "tiny": tiny}
PACKED = ROOT / "bundle-7b-float16"  # without weights
MANIFEST = "bundle.json"
CHUNK = 1 << 30  # bytes of weights at a time
SCALE = 64  # of which they are: so small that nothing overflows in 32 layers
IMAGE = -200  # its place among token ids


def make_weights(folder: Path, device: str) -> int:
    """Write the files of weights that the bundle in `folder` lacks, random float16 made on `device`; their bytes."""
    torch.manual_seed(0)
    made = 0
    for name, file in json.loads((folder / MANIFEST).read_text())["files"].items():
        path = folder / name
        if path.exists():
            continue
        with path.open("wb") as out:
            while (left := file["bytes"] - out.tell()) > 0:
                count = min(left, CHUNK)
                values = (torch.randn(-(-count // 2), device=device) / SCALE).half().cpu().numpy()
                out.write(values.tobytes()[:count])
        made += file["bytes"]
    return made


def place(size: int) -> Path:
    """A new folder with room for `size` bytes, in memory if it can be. BackendError when there is none."""
    for parent in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if parent.is_dir() and shutil.disk_usage(parent).free > size:
            return Path(tempfile.mkdtemp(prefix="bundle-", dir=parent))
    raise BackendError(f"no {size / 1e9:.0f} GB for weights", expected="room in /dev/shm or TMPDIR", fix="set TMPDIR")


def graphs(shape: str, folder: Path) -> None:
    """The bundle without its weights: of the archive, or exported here."""
    if shape == "7b" and PACKED.is_dir():
        shutil.copytree(PACKED, folder, dirs_exist_ok=True)
        return
    from tests.on_gpu.unweighted import bundle_without_weights  # needs what builds bundles

    bundle_without_weights(SHAPES[shape](), folder)


def ask(engine: Engine, g: Geometry, budgets: Sequence[int], tokens: int) -> list[str]:
    """The rows of a table: of each page budget, with the image new, with it kept, and without CUDA graphs where decode
    steps are such."""
    side = g.lowres * g.zoom
    photo = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    ids = [1, *range(5, 40), IMAGE, *(range(50, 160) if g.vocab > 160 else range(5, 20))]
    rows = ["| image | page budget | vision | projection | prefill | tokens | decode | tokens/s | pages |"]
    rows += ["|---|" + "---:|" * 8]
    part = engine.model.part
    for turn in ("first", "warm", *(["without CUDA graphs"] if isinstance(part, CapturedPart) else [])):
        if turn == "without CUDA graphs":
            if not part.captures:
                return [*rows, "| CUDA graphs were given up: the log says why |" + " |" * 8]
            part.captures = False
        with engine.image(photo) as view:
            for budget in budgets:
                s = view.ask(input_ids=ids, max_new_tokens=tokens, stop_at_eos=False, page_budget=budget).stats
                step = median(list(s.decode_ms)[2:])
                times = f"{s.vision_ms:.0f} | {s.projection_ms:.0f} | {s.prefill_ms:.0f}"
                rate = f"{s.prompt_tokens - s.reused_tokens} | {step:.2f} | {1000 / step:.0f}"
                rows.append(f"| {turn} | {budget} | {times} | {rate} | {s.pages_read.mean():.1f} |")
    return rows


def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser("python -m tests.on_gpu.seven_b", description="A random 7B bundle, asked.")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=33, help="of each answer, default 33")
    options = parser.parse_args(given)

    def work() -> None:
        g = SHAPES[options.shape]()
        folder = place(int(20e9) if options.shape == "7b" else int(1e8))
        try:
            graphs(options.shape, folder)
            started = perf_counter()
            size = make_weights(folder, options.device)
            made = perf_counter() - started
            if options.device == "cuda":
                torch.cuda.empty_cache()
            started = perf_counter()
            engine = Engine(folder, device=options.device, verify=False)
            opened = perf_counter() - started
            print(f"{size / 1e9:.1f} GB of weights made in {made:.0f} s, opened in {opened:.0f} s; milliseconds:\n")
            print("\n".join(ask(engine, g, (g.pages, g.pages * 22 // 81, 0), options.tokens)))
            if options.device == "cuda":
                free, total = torch.cuda.mem_get_info()
                print(f"\n{(total - free) / 1e9:.1f} GB of the GPU's memory are taken.")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
