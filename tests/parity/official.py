"""What the official code does: its recorded runs (tests/parity/data), and its way of computing, in float64.

`Official` has none of this project's model code: every step projects the hi-res tokens of a row-major mask again,
appends them to the ordinary keys and takes one softmax.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.backend import Image
from engines.bundle.geometry import Geometry
from engines.bundle.pages import margins
from tests.paths import OFFICIAL

CASES = sorted(path.stem for path in (OFFICIAL / "cases").glob("*.json"))
IMAGE_TOKEN = -200
BLOCK = 8  # hi-res tokens along a cell's side in the recordings


@dataclass(frozen=True)
class Case:
    """One official end-to-end run; `golden` holds the arrays its README describes."""

    name: str
    golden: dict[str, np.ndarray]
    overrides: dict[str, str]

    @property
    def image(self) -> Path:
        return OFFICIAL / "images" / f"{self.name}.png"

    @property
    def weights(self) -> str:
        """Name of the checkpoint this case needs."""
        return "degenerate" if self.overrides else "plain"

    def ids(self, g: Geometry) -> np.ndarray:
        """The embedded prompt: [1, n], -1-j for image feature j."""
        row: list[int] = []
        for token in self.golden["input_ids"].tolist():
            row += (-1 - np.arange(g.image_tokens)).tolist() if token == IMAGE_TOKEN else [token]
        return np.array([row], np.int64)

    def begin(self) -> np.ndarray:
        return self.golden["image_range"][:1]

    def margins(self, g: Geometry) -> np.ndarray:
        return np.array([margins(*self.golden["ori_size"].tolist(), g.grid)], np.int64)

    def tiles(self, g: Geometry) -> np.ndarray:
        """[10, 3, 336, 336] from the golden pixels, so that each rung stands on its own."""
        z, side = g.zoom, g.lowres
        hires = self.golden["pixel_values_1008"].reshape(3, z, side, z, side).transpose(1, 3, 0, 2, 4)
        return np.concatenate((self.golden["pixel_values_336"][None], hires.reshape(z * z, 3, side, side)))

    def cells(self, step: int) -> np.ndarray:
        """The selected cells, bool [M, cells * cells]: the recorded mask has a block of hi-res tokens for each."""
        mask = self.golden["select_mask"][step]
        return mask[:, ::BLOCK, ::BLOCK].reshape(len(mask), -1)

    def encode(self, model, g: Geometry) -> Image:
        """The case's image on a backend, or on the reference."""
        tiles = self.tiles(g)
        low, high = model.vision(tiles[:1]), model.vision(tiles[1:])
        return Image(low, model.project(high, self.begin()), self.begin(), self.margins(g))

    def replay(self, model, g: Geometry, budget: int = 81):
        """Prefill, then the official decoding steps with the official tokens; yields (step, decoder, result)."""
        ids = self.ids(g)
        decoder = model.decoder(self.encode(model, g), ids.shape[1] + len(self.golden["logits"]))
        decoder.run(ids[:, :-1])
        for step in range(len(self.golden["logits"])):
            token = ids[:, -1:] if step == 0 else self.golden["output_ids"][step].reshape(1, 1)
            yield step, decoder, decoder.run(token, budget)


def recorded(name: str) -> Case:
    """One of CASES, read from its files."""
    meta = json.loads((OFFICIAL / "cases" / f"{name}.json").read_text())
    with np.load(OFFICIAL / "cases" / f"{name}.npz") as arrays:
        return Case(name, dict(arrays), meta.get("overrides", {}))


class Official:
    """One request at batch 1."""

    def __init__(
        self, weights: dict[str, Tensor], g: Geometry, low: Tensor, hires: Tensor, begin: int, size: tuple[int, int]
    ) -> None:
        """`low` [T, hidden] and `hires` [hires_side**2, hidden], row-major: projected features. `size`: the image's."""
        self.size = size
        self.weights, self.g, self.begin = {name: tensor.double() for name, tensor in weights.items()}, g, begin
        self.low, self.hires = low.double(), hires.double()
        self.cache: list[tuple[Tensor, Tensor]] = [(torch.zeros(g.heads, 0, g.head_dim).double(),) * 2] * g.layers
        frequency = g.rope_theta ** -(torch.arange(0, g.head_dim, 2).double() / g.head_dim)
        angles = torch.outer(torch.arange(g.context).double(), frequency).repeat(1, 2)
        self.tables = angles.cos(), angles.sin()  # [context, hd]
        image = [table[begin : begin + g.image_tokens].T.reshape(1, -1, g.grid, g.grid) for table in self.tables]
        zoomed = [F.interpolate(plane, size=(g.hires_side,) * 2, mode="bicubic") for plane in image]
        self.hires_tables = [plane[0].flatten(1).T for plane in zoomed]  # [hires_side**2, hd]

    def run(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Feed tokens (-1-j = image feature j); hi-res only for a single one. Returns logits, cells [M, C, C]."""
        g = self.g
        x = torch.stack([self.low[-1 - i] if i < 0 else self.weights["model.embed_tokens.weight"][i] for i in ids])
        mask, selections = None, []
        for layer in range(g.layers):
            name = f"model.layers.{layer}"
            context, map = self.attend(f"{name}.self_attn", layer, self.norm(x, f"{name}.input_layernorm"), mask)
            x = x + self.linear(context, f"{name}.self_attn.o_proj")
            y = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(y, f"{name}.mlp.{half}_proj") for half in ("gate", "up"))
            x = x + self.linear(F.silu(gate) * up, f"{name}.mlp.down_proj")
            if len(ids) == 1 and layer >= g.start_layer:
                selections.append(self.select(map))
                cells = selections[-1][None, None].double()
                mask = F.interpolate(cells, size=(g.hires_side,) * 2, mode="nearest").bool().flatten()
        logits = self.linear(self.norm(x[-1], "model.norm"), "lm_head")
        return logits, torch.stack(selections) if selections else torch.zeros(0)

    def attend(self, name: str, layer: int, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        g, steps = self.g, len(x)
        past = self.cache[layer][0].shape[1]
        turn = [table[past : past + steps] for table in self.tables]
        query, key = (self.turned(self.heads(x, f"{name}.{half}_proj"), *turn) for half in "qk")
        key = torch.cat((self.cache[layer][0], key), 1)
        value = torch.cat((self.cache[layer][1], self.heads(x, f"{name}.v_proj")), 1)
        self.cache[layer] = key, value
        causal = torch.arange(past + steps) <= past + torch.arange(steps)[:, None]
        weights = self.weigh(query, key).masked_fill(~causal, -torch.inf).softmax(-1)
        map = weights[:, -1, self.begin : self.begin + g.image_tokens].sum(0).view(g.grid, g.grid)
        if mask is not None and mask.any():  # a single query, the last one
            turn = [table[mask] for table in self.hires_tables]
            key = torch.cat((key, self.turned(self.heads(self.hires[mask], f"{name}.k_proj_hd"), *turn)), 1)
            value = torch.cat((value, self.heads(self.hires[mask], f"{name}.v_proj_hd")), 1)
            weights = self.weigh(query, key).softmax(-1)
        return (weights @ value).transpose(0, 1).flatten(1), map

    def select(self, map: Tensor) -> Tensor:
        g, map = self.g, map.clone()
        width, height = self.size
        padding = int((abs(width - height) // 2) / max(width, height) * g.grid)
        band = map if width > height else map.T
        band[:padding], band[g.grid - padding :] = 0, 0
        passed = (map - map.min()) / (map.max() - map.min()) * 255 > g.threshold
        return F.adaptive_max_pool2d(passed[None].double(), g.cells)[0].bool()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def heads(self, x: Tensor, name: str) -> Tensor:
        return self.linear(x, name).view(len(x), self.g.heads, self.g.head_dim).transpose(0, 1)

    def weigh(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.transpose(1, 2) / self.g.head_dim**0.5

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.g.rms_eps) * self.weights[f"{name}.weight"]

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin
