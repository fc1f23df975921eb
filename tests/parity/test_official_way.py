"""The whole answer computed as the official code does, in float64 and with none of this project's model code.

Every step projects the hi-res tokens of a row-major mask again, appends them to the ordinary keys and takes one
softmax. The recordings (test_ladder.py) show this for the official grid; here pages have different lengths.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.ort import OrtModel
from tests.geometries import tiny
from tests.parity.test_variants import LOGITS, VARIANTS, encode, load, request, steps

NAMES = ["zoom 2, pages of different length", "three cells", "first layer selects"]
FORCED = [5, 9, 11, 30]
SIZE = 140, 90  # width, height: int((50 // 2) / 140 * 8) = 1 row of padding above and below


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


@pytest.mark.parametrize("variant", NAMES)
def test_reference_and_graph_equal_the_official_way(variant, random_model):
    g = tiny(**VARIANTS[variant])
    checkpoint, bundle = random_model(f"variant-{list(VARIANTS).index(variant)}", g)
    models = load(checkpoint), OrtModel(Bundle(bundle))
    tiles, ids, begin = request(g, seed=7)
    features = models[0].vision(tiles)
    side, zoom = g.grid, g.zoom  # tiles of one row lie side by side
    hires = features[1:].view(zoom, zoom, side, side, -1).transpose(1, 2).reshape(g.hires_side**2, -1)
    official = Official(load_file(checkpoint / "model.safetensors"), g, features[0], hires, int(begin[0]), SIZE)
    official.run(ids[0, :-1].tolist())
    runs = [steps(model, encode(model, tiles, begin, (1, 0)), ids, FORCED, g.pages) for model in models]
    selected = 0
    for index, token in enumerate([int(ids[0, -1]), *FORCED]):
        logits, cells = official.run([token])
        selected += int(cells[:-1].sum())
        for run in runs:
            assert np.array_equal(run[index].cells()[0], cells.flatten(1).numpy())
            assert np.abs(run[index].logits[0] - logits.numpy()).max() <= LOGITS
    assert 0 < selected < len(runs[0]) * len(g.reading_layers) * g.pages  # some pages are read, some are not
