"""CLIP vision tower and projector, cut at the selected layer. Parameter names are the official state-dict names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.bundle.geometry import Geometry, Vision


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    """Full self-attention, softmax in float32."""

    def __init__(self, config: Vision) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.hidden // config.heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(config.hidden, config.hidden))

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], self.heads, self.head_dim).transpose(1, 2)

        query = heads(self.q_proj(x) / math.sqrt(self.head_dim))
        weights = (query @ heads(self.k_proj(x)).transpose(2, 3)).float().softmax(-1).to(x.dtype)
        return self.out_proj((weights @ heads(self.v_proj(x))).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), with CLIP's quick gelu or the exact one."""

    def __init__(self, config: Vision) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden, config.intermediate)
        self.fc2 = nn.Linear(config.intermediate, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: Vision) -> None:
        super().__init__()
        self.layer_norm1 = Float32LayerNorm(config.hidden, config.eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = Float32LayerNorm(config.hidden, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class PatchEmbedding(nn.Module):
    """Each patch's pixels times the filters: what a convolution does whose windows do not overlap. Written as one
    product, since for a Conv ONNX Runtime's CUDA provider searches for an algorithm, again for every batch."""

    def __init__(self, config: Vision, grid: int) -> None:
        super().__init__()
        self.grid, self.patch = grid, config.patch
        self.weight = nn.Parameter(torch.empty(config.hidden, 3, config.patch, config.patch))

    def forward(self, tiles: Tensor) -> Tensor:
        """[N, 3, lowres, lowres] -> [N, grid*grid, width]; like the official convolution, pixels that make no whole
        patch at the right and at the bottom are left out."""
        side, patch = self.grid, self.patch
        pixels = tiles[:, :, : side * patch, : side * patch].reshape(-1, 3, side, patch, side, patch)
        return F.linear(
            pixels.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, 3 * patch * patch), self.weight.flatten(1)
        )


class Embeddings(nn.Module):
    """Pixels -> class token and patches, positions added: [N, 1 + grid*grid, width]."""

    def __init__(self, config: Vision, grid: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden))
        self.patch_embedding = PatchEmbedding(config, grid)
        self.position_embedding = nn.Embedding(grid * grid + 1, config.hidden)

    def forward(self, tiles: Tensor) -> Tensor:
        patches = self.patch_embedding(tiles)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class Encoder(nn.Module):
    """tiles [N, 3, lowres, lowres] float32 -> features [N, grid*grid, hidden], model dtype: tower, then projector.

    Official: `hidden_states[mm_vision_select_layer]` without the class token, no post norm, each tile encoded alone.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        config = geometry.vision
        tower = nn.Module()
        tower.embeddings = Embeddings(config, geometry.grid)
        tower.pre_layrnorm = Float32LayerNorm(config.hidden, config.eps)  # the official name is misspelt
        tower.encoder = nn.Module()
        tower.encoder.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.model = nn.Module()
        self.model.vision_tower = nn.Module()
        self.model.vision_tower.vision_tower = nn.Module()
        self.model.vision_tower.vision_tower.vision_model = tower
        self.model.mm_projector = projector(config.hidden, geometry)

    def forward(self, tiles: Tensor) -> Tensor:
        tower = self.model.vision_tower.vision_tower.vision_model
        x = tower.pre_layrnorm(tower.embeddings(tiles.to(tower.embeddings.class_embedding.dtype)))
        for block in tower.encoder.layers:
            x = block(x)
        return self.model.mm_projector(x[:, 1:])


def projector(width: int, geometry: Geometry) -> nn.Module:
    """Official `linear` (depth 1) or `mlpNx_gelu` (depth N) projector from the tower's width to the decoder's."""
    layers: list[nn.Module] = [nn.Linear(width, geometry.hidden)]
    for _ in range(geometry.projector_depth - 1):
        layers += [nn.GELU(), nn.Linear(geometry.hidden, geometry.hidden)]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
