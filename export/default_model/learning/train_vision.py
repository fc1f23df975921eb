"""Trains the vision tower on what stands on each patch, at both scales."""

from __future__ import annotations

import logging
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.default_model.learning.bfloat16 import Bfloat16
from export.default_model.learning.damage import damaged
from export.default_model.learning.pool import LOWRES, NOTHING, WHOLE, Pool, lowres, normalised
from export.default_model.learning.sheets import write_numbers
from export.default_model.model import GEOMETRY
from export.default_model.scenes import COLOURS, SHAPES
from export.network.vision import Encoder

logger = logging.getLogger(__name__)
TILE = GEOMETRY.lowres
PATCH = GEOMETRY.vision.patch
HIRES_HEADS, LOWRES_HEADS = ("digit", "place", "hires_colour", "hires_shape"), ("colour", "shape", "centre")
CLASSES = {
    "digit": 11, "place": 4, "hires_colour": len(COLOURS) + 1, "hires_shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "centre": 2,
}  # fmt: skip
NONE = {"place": 0}  # the class that stands for nothing, where it is not the last
WEIGHTS = {"digit": 2.0, "place": 2.0, "centre": 3.0}  # of the heads' losses; 1 where there is none here
MIDDLES = 5.0  # weight of what neighbouring patches see of middles together
SHEETS, SCENES = 20, 4  # tiles of each kind in a step
AGAIN, KEPT = 0.5, 200  # share of steps that show sheets again, and of how many earlier ones: writing takes a third
LEARNING_RATE, DECAY = 1e-2, 0.05
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


def tiles_of(pixels: Tensor) -> Tensor:
    """[N, 504, 504, 3] -> [N * 9, 168, 168, 3], row by row."""
    count = len(pixels)
    grid = pixels.view(count, 3, TILE, 3, TILE, 3)
    return grid.transpose(2, 3).reshape(count * 9, TILE, TILE, 3)


def label_tiles(label: Tensor) -> Tensor:
    """[N, 36, 36] -> [N * 9, 144]."""
    grid = label.view(len(label), 3, LOWRES, 3, LOWRES)
    return grid.transpose(2, 3).reshape(len(label) * 9, LOWRES * LOWRES)


def train(
    pool: Pool, steps: int, validation: Pool, seed: int = 0, device: str = "cpu", log: int = 500
) -> tuple[Tower, dict[str, float]]:
    """A trained tower, in float32, and its accuracies on `validation`; both pools on `device`."""
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    tower = Tower().to(device)
    trainer = Bfloat16(tower, LEARNING_RATE, steps, DECAY)
    small = torch.cat([lowres(part).half() for part in pool.pixels.split(64)])
    sheets: list[tuple[Tensor, dict[str, Tensor]]] = []
    started = time.perf_counter()
    for step in range(steps):
        if len(sheets) == KEPT and torch.rand(1, generator=generator, device=device) < AGAIN:
            lot = int(torch.randint(0, KEPT, (1,), generator=generator, device=device))
        else:
            lot = step % KEPT
            sheets[lot : lot + 1] = [_sheets_batch(pool, generator)]
        tiles, wanted = _noisy(sheets[lot][0], generator), sheets[lot][1]
        few, asked = _scenes_batch(pool, small, generator)
        batch = normalised(torch.cat((tiles, few))).bfloat16()
        features = tower.features(batch)
        x = tower.norm(features)
        loss = (
            SIZE * features.float().pow(2).mean() + _loss(tower, x[:SHEETS], wanted) + _loss(tower, x[SHEETS:], asked)
            + MIDDLES * _together(tower, x[SHEETS:], asked["centre"]).pow(2).mean()
        )  # fmt: skip
        trainer.update(loss)
        if (step + 1) % log == 0 or step + 1 == steps:
            found = evaluate(tower, validation)
            shown = " ".join(f"{name} {value:.4f}" for name, value in found.items())
            seconds = time.perf_counter() - started
            logger.info("vision %d loss %.3f %s %.0f s", step + 1, float(loss.detach()), shown, seconds)
    trainer.restore()
    return tower, evaluate(tower, validation)


def _sheets_batch(pool: Pool, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    device = generator.device
    scene = torch.randint(0, len(pool), (SHEETS,), generator=generator, device=device)
    row, column = (torch.randint(0, 3, (SHEETS, 1, 1), generator=generator, device=device) for _ in range(2))

    def crop(plane: Tensor, side: int) -> Tensor:
        line = torch.arange(side, device=device)
        return plane[scene[:, None, None], side * row + line[:, None], side * column + line]

    wanted = {name: crop(pool.labels[name], LOWRES).flatten(1) for name in HIRES_HEADS}
    tiles = write_numbers(crop(pool.pixels, TILE).float(), wanted["digit"], wanted["place"], generator)
    return damaged(tiles, generator).clamp(0, 255).to(torch.uint8), wanted


def _noisy(tiles: Tensor, generator: torch.Generator) -> Tensor:
    device = generator.device
    noise = torch.randn(tiles.shape, generator=generator, device=device)
    amount = 3 * torch.rand(len(tiles), 1, 1, 1, generator=generator, device=device)
    return _varied(tiles + amount * noise, generator)


def _scenes_batch(pool: Pool, small: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    device = generator.device
    scene = torch.randint(0, len(pool), (SCENES,), generator=generator, device=device)
    tiles = small[scene].float()
    wanted = {name: pool.labels[name][scene] for name in LOWRES_HEADS}
    flip = torch.rand(SCENES, generator=generator, device=device) < 0.5
    tiles = torch.where(flip[:, None, None, None], tiles.flip(2), tiles)
    wanted = {name: torch.where(flip[:, None, None], p.flip(2), p).flatten(1) for name, p in wanted.items()}
    tiles = tiles + 1.5 * torch.randn(tiles.shape, generator=generator, device=device)
    return _varied(tiles, generator), wanted


def _varied(tiles: Tensor, generator: torch.Generator) -> Tensor:
    gain = 1 + 0.1 * (torch.rand(len(tiles), 1, 1, 3, generator=generator, device=tiles.device) - 0.5)
    return (tiles * gain).clamp(0, 255)


def _loss(tower: Tower, x: Tensor, wanted: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), device=x.device)
    for name, label in wanted.items():
        logits = tower.heads[name](x).float().flatten(0, 1)
        total = total + WEIGHTS.get(name, 1.0) * _loss_of(name, logits, label.flatten())
    return total


def _loss_of(name: str, logits: Tensor, label: Tensor) -> Tensor:
    if name == "centre":  # the label is a share
        there = label.float() / WHOLE
        return F.cross_entropy(logits, torch.stack((1 - there, there), -1), label_smoothing=0.02)
    target = label.long()
    target = torch.where(target == NOTHING, -100, target)
    if name not in ("digit", "place"):
        return F.cross_entropy(logits, target, ignore_index=-100, label_smoothing=0.02)
    weight = torch.where(target == NONE.get(name, CLASSES[name] - 1), 0.3, 1.0) * (target >= 0)  # most patches: none
    each = F.cross_entropy(logits, target, ignore_index=-100, reduction="none", label_smoothing=0.02)
    return (each * weight).sum() / weight.sum().clamp(min=1)


def _together(tower: Tower, x: Tensor, label: Tensor) -> Tensor:
    """How much more of middles any 2 x 2 low-res patches see than there is: [N, 144, width], labels [N, 144] ->
    [N, 11, 11]. A middle where patches meet is shared by them, and each being a little wrong must not add up."""
    there = tower.heads["centre"](x).float().softmax(-1)[..., 1] - label.float() / WHOLE
    return _in_windows(there)


def _in_windows(shares: Tensor) -> Tensor:
    """What any 2 x 2 low-res patches have together: float [N, 144] -> [N, 11, 11]."""
    return 4 * F.avg_pool2d(shares.unflatten(1, (LOWRES, LOWRES)), 2, 1)


def directions(tower: Tower) -> Tensor:
    """[classes of all heads, width]: what each head looks for in a feature, roughly (its norm taken as linear, its bias
    left out)."""
    rows = torch.cat([head.weight - head.weight.mean(0) for head in tower.heads.values()]) * tower.norm.weight
    return (rows - rows.mean(1, keepdim=True)).detach()


@torch.no_grad()
def evaluate(tower: Tower, pool: Pool) -> dict[str, float]:
    """Share of right labels: digits where digits are, colour and shape where shapes are, middles of things overall; and
    `off`: what 2 x 2 patches that have a whole middle miss of it, or see too much, root mean square."""
    kind = tower.norm.weight.dtype
    found: dict[str, list[Tensor]] = {name: [] for name in CLASSES}
    off: list[Tensor] = []
    for index in range(0, len(pool), 16):
        pixels = pool.pixels[index : index + 16]
        for tiles, names, labels in (
            (tiles_of(pixels), HIRES_HEADS, label_tiles),
            (lowres(pixels), LOWRES_HEADS, lambda label: label.flatten(1)),
        ):
            x = tower.norm(tower.features(normalised(tiles).to(kind)))
            for name in names:
                target, likely = labels(pool.labels[name][index : index + 16]).long(), tower.heads[name](x).argmax(-1)
                if name == "centre":  # a share; all patches count
                    off.append(_together(tower, x, target)[_in_windows(target / WHOLE) > 0.99])
                    target, counts = (target > WHOLE // 2).long(), torch.ones_like(target, dtype=torch.bool)
                else:
                    counts = (target != NONE.get(name, CLASSES[name] - 1)) & (target != NOTHING)
                found[name].append((likely == target)[counts])
    shares = {name: float(torch.cat(parts).float().mean()) for name, parts in found.items()}
    return shares | {"off": float(torch.cat(off).pow(2).mean().sqrt())}
