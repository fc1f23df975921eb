"""Trains the vision tower on what stands on each patch, at both scales."""

from __future__ import annotations

import logging
import math
import time
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.default_model import digits
from export.default_model.model import GEOMETRY
from export.default_model.pool import FIRST, LOWRES, NOTHING, SECOND, SINGLE, Pool, lowres, normalised
from export.default_model.scenes import INK, PLATE
from export.network.vision import Encoder

logger = logging.getLogger(__name__)
TILE = GEOMETRY.lowres
PATCH = GEOMETRY.vision.patch
CLASSES = {"digit": 11, "place": 4, "hires_colour": 9, "colour": 9, "shape": 6, "plate": 2}
SHEETS, SCENES = 16, 8  # tiles of each kind in a step
LEARNING_RATE, DECAY = 2e-3, 0.05
SIZE = 3e-3  # weight of the features' mean square: heads behind a norm do not care, float16 does


class Tower(nn.Module):
    """The encoder without its projector, and one linear head per question about a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(GEOMETRY)
        del self.encoder.model.mm_projector
        width = GEOMETRY.vision.hidden
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in CLASSES.items()})
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
        vision = self.encoder.model.vision_tower.vision_tower.vision_model
        nn.init.normal_(vision.embeddings.class_embedding, std=0.02)
        nn.init.normal_(vision.embeddings.patch_embedding.weight, std=0.03)

    def features(self, tiles: Tensor) -> Tensor:
        """[N, 3, 168, 168] -> [N, 144, width]; what the encoder computes, arranged for training in bfloat16.

        Fewer passes over memory: patches and projections as single products, scales inside the weights.
        """
        vision = self.encoder.model.vision_tower.vision_tower.vision_model
        embed, heads = vision.embeddings, GEOMETRY.vision.heads
        side = tiles.shape[-1] // PATCH
        patches = tiles.unflatten(3, (side, PATCH)).unflatten(2, (side, PATCH)).permute(0, 2, 4, 1, 3, 5)
        x = patches.reshape(len(tiles), side * side, -1) @ embed.patch_embedding.weight.flatten(1).T
        x = torch.cat((embed.class_embedding.expand(len(x), 1, -1), x), 1) + embed.position_embedding.weight
        x = _norm(vision.pre_layrnorm, x)
        for block in vision.encoder.layers:
            attend, y = block.self_attn, _norm(block.layer_norm1, x)
            parts, scale = (attend.q_proj, attend.k_proj, attend.v_proj), attend.head_dim**-0.5
            weight = torch.cat([part.weight * (scale if part is attend.q_proj else 1) for part in parts])
            bias = torch.cat([part.bias * (scale if part is attend.q_proj else 1) for part in parts])
            query, key, value = F.linear(y, weight, bias).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            context = (query @ key.transpose(2, 3)).softmax(-1) @ value
            x = x + attend.out_proj(context.transpose(1, 2).flatten(2))
            y = _norm(block.layer_norm2, x)
            # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702
            y = F.silu(F.linear(y, 1.702 * block.mlp.fc1.weight, 1.702 * block.mlp.fc1.bias))
            x = x + F.linear(y, block.mlp.fc2.weight / 1.702, block.mlp.fc2.bias)
        return x[:, 1:]


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class Bfloat16:
    """Lets a module compute in bfloat16, and trains float32 masters of its weights with AdamW."""

    def __init__(self, module: nn.Module, rate: float, steps: int, decay: float = DECAY) -> None:
        self.module = module
        for parameter in module.parameters():  # buffers stay: rotary tables are float32 in every precision
            parameter.data = parameter.data.bfloat16()
        self.masters = [parameter.detach().float() for parameter in module.parameters()]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        large = [master for master in self.masters if master.dim() > 1]
        small = [master for master in self.masters if master.dim() <= 1]
        groups = [{"params": large, "weight_decay": decay}, {"params": small, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
        warm = min(200, steps // 10 + 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(step + 1, warm) / warm * (0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))),
        )

    def step(self, loss: Tensor) -> None:
        loss.backward()
        for parameter, master in zip(self.module.parameters(), self.masters, strict=True):
            if parameter.grad is None:
                master.grad.zero_()
            else:
                master.grad.copy_(parameter.grad)
                parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for parameter, master in zip(self.module.parameters(), self.masters, strict=True):
                parameter.copy_(master)

    def restore(self) -> None:
        """Give the module its float32 weights when training is over."""
        for parameter, master in zip(self.module.parameters(), self.masters, strict=True):
            parameter.data = master.detach()


def tiles_of(pixels: Tensor) -> Tensor:
    """[N, 504, 504, 3] -> [N * 9, 168, 168, 3], row by row."""
    count = len(pixels)
    grid = pixels.view(count, 3, TILE, 3, TILE, 3)
    return grid.transpose(2, 3).reshape(count * 9, TILE, TILE, 3)


def label_tiles(label: Tensor) -> Tensor:
    """[N, 36, 36] -> [N * 9, 144]."""
    grid = label.view(len(label), 3, LOWRES, 3, LOWRES)
    return grid.transpose(2, 3).reshape(len(label) * 9, LOWRES * LOWRES)


@lru_cache(maxsize=1)
def plates() -> Tensor:
    """[4, 14, 14]: how opaque the plate is under a digit of each place (0 = no plate)."""
    from PIL import Image, ImageDraw

    masks = torch.zeros(4, PATCH, PATCH)
    for place, count, part in ((SINGLE, 1, 0), (FIRST, 2, 0), (SECOND, 2, 1)):
        image = Image.new("L", (2 * count * PATCH, 2 * PATCH), 0)
        box = [3, 1, 2 * count * PATCH - 3, 2 * PATCH - 1]
        ImageDraw.Draw(image).rounded_rectangle(box, 6, 255)
        alpha = torch.frombuffer(bytearray(image.reduce(2).tobytes()), dtype=torch.uint8).view(PATCH, count * PATCH)
        masks[place] = alpha[:, part * PATCH : (part + 1) * PATCH].float() / 255
    return masks


def sheets(tiles: Tensor, digit: Tensor, place: Tensor, generator: torch.Generator, warp: float) -> Tensor:
    """Write many more numbers on hi-res tiles [N, 168, 168, 3] float; changes `digit`, `place` [N, 144] in place."""
    count = len(tiles)
    grid = torch.zeros(count, LOWRES, LOWRES, dtype=torch.uint8)
    lucky = torch.rand(count, LOWRES, LOWRES, generator=generator)
    grid[lucky < 0.2] = SINGLE
    pairs = torch.rand(count, LOWRES, LOWRES // 2 - 1, generator=generator) < 0.4
    shift = int(torch.randint(0, 2, (1,), generator=generator))
    first = pairs.nonzero()
    column = 2 * first[:, 2] + shift
    grid[first[:, 0], first[:, 1], column] = FIRST
    grid[first[:, 0], first[:, 1], column + 1] = SECOND
    grid.view(count, -1)[place > 0] = 0  # what stands there already stays
    busy = (grid > 0).nonzero()
    images, classes = digits.samples("train")
    chosen = torch.randint(0, len(images), (len(busy),), generator=generator)
    ink = INK * digits.draw(images[chosen], busy[:, 1:] * PATCH, generator, warp=warp)[..., None]
    patches = tiles.view(count, LOWRES, PATCH, LOWRES, PATCH, 3).transpose(2, 3)  # a view
    index = tuple(busy.T)
    alpha = plates()[grid[index].long()][..., None]
    patches[index] = (1 - alpha) * patches[index] + alpha * PLATE + ink
    digit[busy[:, 0], busy[:, 1] * LOWRES + busy[:, 2]] = classes[chosen].to(torch.uint8)
    place[busy[:, 0], busy[:, 1] * LOWRES + busy[:, 2]] = grid[index]
    return tiles


def train(pool: Pool, steps: int, validation: Pool, seed: int = 0, log: int = 500) -> tuple[Tower, dict[str, float]]:
    """A trained tower, in float32, and its accuracies on `validation`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tower = Tower()
    trainer = Bfloat16(tower, LEARNING_RATE, steps)
    small = torch.cat([lowres(part) for part in pool.pixels.split(64)]).half()
    started = time.perf_counter()
    for step in range(steps):
        warp = 0.4 if step < steps // 4 else 0.7 if step < steps * 0.85 else 0.35
        tiles, wanted = _sheets_batch(pool, generator, warp)
        few, asked = _scenes_batch(pool, small, generator)
        batch = normalised(torch.cat((tiles, few))).bfloat16()
        features = tower.features(batch)
        x = tower.norm(features)
        loss = (
            SIZE * features.float().pow(2).mean() + _loss(tower, x[:SHEETS], wanted) + _loss(tower, x[SHEETS:], asked)
        )
        trainer.step(loss)
        if (step + 1) % log == 0 or step + 1 == steps:
            found = evaluate(tower, validation)
            shown = " ".join(f"{name} {value:.4f}" for name, value in found.items())
            seconds = time.perf_counter() - started
            logger.info("vision %d loss %.3f %s %.0f s", step + 1, float(loss.detach()), shown, seconds)
    trainer.restore()
    return tower, evaluate(tower, validation)


def _sheets_batch(pool: Pool, generator: torch.Generator, warp: float) -> tuple[Tensor, dict[str, Tensor]]:
    scene = torch.randint(0, len(pool), (SHEETS,), generator=generator)
    row, column = (torch.randint(0, 3, (SHEETS,), generator=generator).tolist() for _ in range(2))
    where = list(zip(scene.tolist(), row, column, strict=True))

    def crop(name: str) -> Tensor:
        planes = pool.labels[name]
        parts = [planes[s, LOWRES * r : LOWRES * (r + 1), LOWRES * c : LOWRES * (c + 1)] for s, r, c in where]
        return torch.stack(parts).flatten(1)

    tiles = torch.stack([pool.pixels[s, TILE * r : TILE * (r + 1), TILE * c : TILE * (c + 1)] for s, r, c in where])
    wanted = {name: crop(name) for name in ("digit", "place", "hires_colour")}
    tiles = sheets(tiles.float(), wanted["digit"], wanted["place"], generator, warp)
    tiles += 3 * torch.rand(SHEETS, 1, 1, 1, generator=generator) * torch.randn(tiles.shape, generator=generator)
    return _varied(tiles, generator), wanted


def _scenes_batch(pool: Pool, small: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    scene = torch.randint(0, len(pool), (SCENES,), generator=generator)
    tiles = small[scene].float()
    wanted = {name: pool.labels[name][scene] for name in ("colour", "shape", "plate")}
    if torch.rand(1, generator=generator) < 0.5:
        tiles, wanted = tiles.flip(2), {name: plane.flip(2) for name, plane in wanted.items()}
    tiles = tiles + 1.5 * torch.randn(tiles.shape, generator=generator)
    return _varied(tiles, generator), {name: plane.flatten(1) for name, plane in wanted.items()}


def _varied(tiles: Tensor, generator: torch.Generator) -> Tensor:
    gain = 1 + 0.06 * (torch.rand(len(tiles), 1, 1, 3, generator=generator) - 0.5)
    return (tiles * gain).clamp(0, 255)


def _loss(tower: Tower, x: Tensor, wanted: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for name, label in wanted.items():
        target = label.long().flatten()
        target = torch.where(target == NOTHING, -100, target)
        total = total + F.cross_entropy(tower.heads[name](x).float().flatten(0, 1), target, label_smoothing=0.02)
    return total


def directions(tower: Tower) -> Tensor:
    """[41, width]: what each head looks for in a feature, roughly (its norm taken as linear, its bias left out)."""
    rows = torch.cat([head.weight - head.weight.mean(0) for head in tower.heads.values()]) * tower.norm.weight
    return (rows - rows.mean(1, keepdim=True)).detach()


@torch.no_grad()
def evaluate(tower: Tower, pool: Pool) -> dict[str, float]:
    """Share of right labels: digits where digits stand, colour and shape where shapes are, plates overall."""
    kind = tower.norm.weight.dtype
    found: dict[str, list[Tensor]] = {name: [] for name in CLASSES}
    for index in range(0, len(pool), 16):
        pixels = pool.pixels[index : index + 16]
        for tiles, names, labels in (
            (tiles_of(pixels), ("digit", "place", "hires_colour"), label_tiles),
            (lowres(pixels), ("colour", "shape", "plate"), lambda label: label.flatten(1)),
        ):
            x = tower.norm(tower.features(normalised(tiles).to(kind)))
            for name in names:
                target = labels(pool.labels[name][index : index + 16]).long()
                right = tower.heads[name](x).argmax(-1) == target
                nothing = {"place": 0, "plate": -1}.get(name, CLASSES[name] - 1)
                found[name].append(right[(target != nothing) & (target != NOTHING)])
    return {name: float(torch.cat(parts).float().mean()) for name, parts in found.items()}
