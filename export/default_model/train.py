"""Trains the default model from scratch: `python -m export.default_model.train --out checkpoints/default`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from engines.bundle.pages import tile_order
from engines.errors import OptionError
from export.default_model.learning.pool import Pool, lowres, margins_of, normalised
from export.default_model.learning.student import Whitening
from export.default_model.learning.train_decoder import Features
from export.default_model.learning.train_decoder import train as train_decoder
from export.default_model.learning.train_vision import Tower, directions, tiles_of
from export.default_model.learning.train_vision import train as train_vision
from export.default_model.model import GEOMETRY, official_names, write_checkpoint
from plugins import command

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Scenes and steps of each stage, and the seed of everything."""

    vision_scenes: int = 5000
    vision_steps: int = 14000
    decoder_scenes: int = 16000
    decoder_steps: int = 9500
    lowres_only_steps: int = 500  # the baseline that never sees a page; it stops improving long before
    validation_scenes: int = 160
    seed: int = 0


AT_ONCE = 4000  # scenes drawn at once
SMOKE = Schedule(16, 6, 16, 6, 2, 8)


@torch.no_grad()
def features(tower: Tower, pool: Pool, whitening: Whitening | None) -> tuple[Features, Whitening]:
    """What the decoder sees of a pool. Without a `whitening` it is taken from the first scenes."""
    low, high = [], []
    device = pool.pixels.device
    order = torch.from_numpy(tile_order(GEOMETRY)).to(device)
    for part in pool.pixels.split(16):
        near = tower.features(normalised(lowres(part)))
        far = tower.features(normalised(tiles_of(part))).unflatten(0, (len(part), -1)).flatten(1, 2)[:, order]
        low.append(near.half())
        high.append(far.half())
    if whitening is None:
        sample = [each.float().flatten(0, 1) for each in (*low[:8], *(each[:, ::3] for each in high[:8]))]
        whitening = Whitening.of(torch.cat(sample))

    def white(parts: list[Tensor]) -> Tensor:
        assert whitening is not None
        return torch.cat([whitening(part.float()).bfloat16() for part in parts])

    scenes = list(zip(pool.things, pool.sizes, strict=True))
    return Features(white(low), white(high), margins_of(pool.sizes).to(device), scenes), whitening


def trained_tower(
    schedule: Schedule, validation: Pool, device: str, kept: Path | None
) -> tuple[Tower, dict[str, object]]:
    """A tower on `device`, and what the log says of it; from the file `kept`, or trained and kept there."""
    recipe = {name: value for name, value in asdict(schedule).items() if "decoder" not in name and "lowres" not in name}
    if kept is not None and kept.exists():
        stored = torch.load(kept, map_location=device)
        if stored["recipe"] != recipe:
            raise OptionError(f"a tower trained by {stored['recipe']}", expected=str(recipe), fix=f"remove {kept}")
        tower = Tower().to(device)
        tower.load_state_dict(stored["tower"])
        return tower, stored["log"]
    begun = time.perf_counter()
    pool = Pool(schedule.vision_scenes, schedule.seed + 1).to(device)
    logger.info("scenes of the tower %.0f s", time.perf_counter() - begun)
    tower, found = train_vision(pool, schedule.vision_steps, validation, schedule.seed, device)
    log = {"vision": found, "vision_machine": _machine(device), "vision_seconds": round(time.perf_counter() - begun)}
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"recipe": recipe, "tower": tower.state_dict(), "log": log}, kept)
    return tower, log


def _decoder_scenes(tower: Tower, schedule: Schedule, device: str) -> tuple[Features, Whitening]:
    """What the decoder sees of its scenes; drawn in parts, since pixels take more memory than what is kept of them."""
    count = schedule.decoder_scenes

    def pool(first: int) -> Pool:
        return Pool(min(AT_ONCE, count - first), schedule.seed + 2, first=first).to(device)

    begin, whitening = features(tower, pool(0), None)
    rest = (features(tower, pool(first), whitening)[0] for first in range(AT_ONCE, count, AT_ONCE))
    return Features.gathered(chain([begin], rest), count), whitening


def _machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"


def run(schedule: Schedule, out: Path, baseline: Path, device: str = "cpu", kept: Path | None = None) -> None:
    """Train tower, decoder and low-res baseline; write both checkpoints, and training.json beside the first.

    `kept`: a file for the trained tower, from which a run that was interrupted goes on."""
    started = time.perf_counter()
    log: dict[str, object] = {"recipe": asdict(schedule), "machine": _machine(device), "torch": torch.__version__}
    validation = Pool(schedule.validation_scenes, schedule.seed + 900, "validation", vary=False).to(device)
    tower, found = trained_tower(schedule, validation, device, kept)
    log |= found
    begun = time.perf_counter()
    seen, whitening = _decoder_scenes(tower, schedule, device)
    held_out, _ = features(tower, validation, whitening)
    logger.info("scenes of the decoder %.0f s", time.perf_counter() - begun)
    for folder, reads, steps in ((out, True, schedule.decoder_steps), (baseline, False, schedule.lowres_only_steps)):
        begun, name = time.perf_counter(), "decoder" if reads else "lowres_only"
        student, log[name] = train_decoder(
            seen, steps, whitening=whitening, directions=directions(tower), validation=held_out, reads=reads,
            seed=schedule.seed, workers=1 if device == "cpu" else 12,
        )  # fmt: skip
        log[f"{name}_seconds"] = round(time.perf_counter() - begun)
        write_checkpoint(folder, official_names(tower.state_dict(), student.state_dict()))
        log["seconds"] = round(time.perf_counter() - started)
        (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/default"), help="folder of the model")
    parser.add_argument("--baseline", type=Path, default=Path("checkpoints/lowres-only"), help="folder of the baseline")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="what trains")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="the trained tower, for a run that is interrupted")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(SMOKE if given.smoke else Schedule(), given.out, given.baseline, given.device, given.keep)


if __name__ == "__main__":
    sys.exit(command.run(main))
