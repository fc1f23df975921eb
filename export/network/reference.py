"""The PyTorch reference behind the interface of a backend: the oracle that parity checks compare against."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engines.backend import Image, Step
from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from export.network.parts import module_of


class Weights(Protocol):
    """Where a reference gets its weights: a checkpoint, or what a bundle stores."""

    def tensor(self, name: str) -> Tensor:
        """The tensor of this official name."""


class ReferenceModel:
    """The whole model in PyTorch on the CPU, all pages projected at once and kept as they are, whatever the geometry
    says. Same methods as engines.ort.OrtModel."""

    def __init__(self, geometry: Geometry, checkpoint: Weights, dtype: torch.dtype = torch.float32) -> None:
        """Load every tensor the model needs, converted to `dtype`."""
        self.geometry, self.dtype = replace(geometry, lazy_pages=False, int8_pages=False), dtype
        self._vision, self._pages, self._decoder = (
            load(module_of(part, self.geometry, dtype), checkpoint, dtype) for part in ("vision", "pages", "decoder")
        )

    @torch.no_grad()
    def vision(self, tiles: np.ndarray) -> Tensor:
        """tiles [N, 3, lowres, lowres] float32 -> projected features [N, T, hidden]."""
        return self._vision(torch.from_numpy(tiles))

    @torch.no_grad()
    def project(self, hires: Tensor, begin: np.ndarray) -> dict[str, Tensor]:
        """Features of the hi-res tiles [B * zoom*zoom, T, hidden] and image positions [B] -> `Image.pages`."""
        return self._named(*self._pages(hires, torch.from_numpy(begin)))

    def _named(self, keys: list[Tensor], values: list[Tensor]) -> dict[str, Tensor]:
        halves, layers = (("page_key", keys), ("page_value", values)), self.geometry.reading_layers
        return {
            f"{half}.{layer}": store for half, stores in halves for layer, store in zip(layers, stores, strict=True)
        }

    def hires_rotary(self, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos, sin [B, hires tokens, hd/2] float32, row-major."""
        cos, sin = self._pages.hires_rotary(torch.from_numpy(begin))
        return cos.numpy(), sin.numpy()

    def no_image(self, batch: int) -> Image[Tensor]:
        """Stand-in for rows without an image."""
        g = self.geometry
        store = [torch.zeros(batch, g.kv_heads, g.pages, page_size(g), g.head_dim, dtype=self.dtype)]
        features = torch.zeros(batch, g.image_tokens, g.hidden, dtype=self.dtype)
        stores = store * len(g.reading_layers)
        return Image(features, self._named(stores, stores), np.zeros(batch, np.int64), np.zeros((batch, 2), np.int64))

    def decoder(self, image: Image[Tensor], capacity: int) -> ReferenceDecoder:
        """A decoder with an empty cache of at least `capacity` tokens, one row per image."""
        return ReferenceDecoder(self, image, max(capacity, self.geometry.image_tokens))


class ReferenceDecoder:
    """One request. Same methods as engines.ort.OrtDecoder; `maps` and `hidden` show the inside of the last run."""

    def __init__(self, model: ReferenceModel, image: Image[Tensor], capacity: int) -> None:
        g, batch = model.geometry, len(image.begin)
        self.length = np.zeros(batch, np.int64)
        self.maps: list[np.ndarray] = []  # selecting layers x [B, G, G]
        self.hidden: list[np.ndarray] = []  # layers + 1 x [B, hidden]
        self.image = image
        self._module, self._reading = model._decoder, g.reading_layers
        shape = (batch, g.kv_heads, capacity, g.head_dim)
        self._key, self._value = ([torch.zeros(shape, dtype=model.dtype)] * g.layers for _ in range(2))

    @torch.no_grad()
    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See engines.ort.OrtDecoder.run."""
        image, budget = self.image, np.broadcast_to(np.asarray(page_budget, np.int64), self.length.shape)
        logits, token, pages, count, self._key, self._value, maps, hidden = self._module(
            torch.from_numpy(np.ascontiguousarray(ids)),
            torch.from_numpy(self.length),
            image.features,
            torch.from_numpy(image.begin),
            torch.from_numpy(image.margins),
            torch.from_numpy(budget.copy()),
            *(self._key, self._value),
            *([image.pages[f"{half}.{layer}"] for layer in self._reading] for half in ("page_key", "page_value")),
        )
        self.maps = [map.numpy() for map in maps]
        self.hidden = [state.float().numpy() for state in hidden]
        self.length = self.length + (ids.shape[1] if lengths is None else lengths)
        return Step(logits.numpy, token.numpy(), pages.numpy(), count.numpy())


def load(module: nn.Module, checkpoint: Weights, dtype: torch.dtype, base: str = "") -> nn.Module:
    """Give a module built on the meta device its tensors, by name; `base`: where in the model it is, dot included."""
    for prefix, child in module.named_modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                tensor = checkpoint.tensor(f"{base}{prefix}{'.' if prefix else ''}{name}").to(dtype)
                child._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return module
