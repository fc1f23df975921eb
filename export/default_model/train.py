"""Trains the default model from scratch: `python -m export.default_model.train --out checkpoints/default`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engines.bundle.pages import tile_order
from export.default_model.model import GEOMETRY, official_names, write_checkpoint
from export.default_model.pool import Pool, lowres, margins_of, normalised
from export.default_model.questions import build_tokenizer
from export.default_model.train_decoder import Whitening
from export.default_model.train_decoder import train as train_decoder
from export.default_model.train_vision import Tower, directions, tiles_of
from export.default_model.train_vision import train as train_vision
from plugins import command


@dataclass(frozen=True)
class Schedule:
    """Scenes and steps of each stage, and the seed of everything."""

    vision_scenes: int = 4000
    vision_steps: int = 6000
    decoder_scenes: int = 5000
    decoder_steps: int = 2500
    lowres_only_steps: int = 1250  # the baseline that never sees a page; it stops improving long before
    validation_scenes: int = 160
    seed: int = 0


SMOKE = Schedule(16, 6, 16, 4, 2, 8)


@torch.no_grad()
def features(tower: Tower, pool: Pool, whitening: Whitening | None) -> tuple[Tensor, Tensor, Whitening]:
    """Tower features of a pool, whitened: low-res [N, 144, W] and hi-res [N, 1296, W], row-major, bfloat16.

    Without a `whitening` it is taken from the first scenes.
    """
    low, high, order = [], [], torch.from_numpy(tile_order(GEOMETRY))
    for part in pool.pixels.split(16):
        near = tower.features(normalised(lowres(part)))
        far = tower.features(normalised(tiles_of(part))).unflatten(0, (len(part), -1)).flatten(1, 2)[:, order]
        low.append(near.half())
        high.append(far.half())
    if whitening is None:
        sample = [each.float().flatten(0, 1) for each in (*low[:8], *(each[:, ::3] for each in high[:8]))]
        whitening = Whitening.of(torch.cat(sample))
    white = [torch.cat([whitening(part.float()).bfloat16() for part in parts]) for parts in (low, high)]
    return white[0], white[1], whitening


def run(schedule: Schedule, out: Path, baseline: Path) -> None:
    """Train tower, decoder and low-res baseline; write both checkpoints, and training.json beside the first."""
    started = time.perf_counter()
    log: dict[str, object] = {"recipe": asdict(schedule)}
    validation = Pool(schedule.validation_scenes, schedule.seed + 900, "validation")
    pool = Pool(schedule.vision_scenes, schedule.seed + 1)
    tower, log["vision"] = train_vision(pool, schedule.vision_steps, validation, schedule.seed)
    log["vision_seconds"] = round(time.perf_counter() - started)
    pool = Pool(schedule.decoder_scenes, schedule.seed + 2)
    low, high, whitening = features(tower, pool, None)
    scenes = low, high, pool.things, margins_of(pool.sizes)
    del pool
    held_out = *features(tower, validation, whitening)[:2], validation.things, margins_of(validation.sizes)
    for folder, reads, steps in ((out, True, schedule.decoder_steps), (baseline, False, schedule.lowres_only_steps)):
        begun, name = time.perf_counter(), "decoder" if reads else "lowres_only"
        student, log[name] = train_decoder(
            *scenes,
            build_tokenizer(),
            steps,
            whitening=whitening,
            directions=directions(tower),
            validation=held_out,
            reads=reads,
            seed=schedule.seed,
        )
        log[f"{name}_seconds"] = round(time.perf_counter() - begun)
        write_checkpoint(folder, official_names(tower.state_dict(), student.state_dict()))
    log["seconds"] = round(time.perf_counter() - started)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/default"), help="folder of the model")
    parser.add_argument("--baseline", type=Path, default=Path("checkpoints/lowres-only"), help="folder of the baseline")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run(SMOKE if given.smoke else Schedule(), given.out, given.baseline)


if __name__ == "__main__":
    sys.exit(command.run(main))
