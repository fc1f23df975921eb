"""The PyTorch reference as a backend (engines.backend): the oracle that parity checks compare against."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engines.backend import Image, Step
from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from engines.errors import BackendError
from export.network.parts import module_of


class Weights(Protocol):
    """Where a reference gets its weights: a checkpoint, or what a bundle stores."""

    def tensor(self, name: str) -> Tensor:
        """The tensor of this official name."""


class ReferenceModel:
    """engines.backend.Model in PyTorch on the CPU. All pages are projected at once and kept as they are, whatever the
    geometry says; the cache is kept as it says."""

    def __init__(self, geometry: Geometry, checkpoint: Weights, dtype: torch.dtype = torch.float32) -> None:
        """Load every tensor the model needs, converted to `dtype`."""
        self.geometry, self.dtype = replace(geometry, lazy_pages=False, int8_pages=False, page_slots=None), dtype
        self._vision, self._pages, self._decoder = (
            load(module_of(part, self.geometry, dtype), checkpoint, dtype) for part in ("vision", "pages", "decoder")
        )

    @torch.no_grad()
    def vision(self, tiles: np.ndarray) -> Tensor:
        """See Model.vision."""
        return self._vision(torch.from_numpy(tiles))

    @torch.no_grad()
    def project(self, hires: Tensor, begin: np.ndarray) -> dict[str, Tensor]:
        """See Model.project."""
        return self._named(*self._pages(hires, torch.from_numpy(begin)))

    def hires_rotary(self, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos, sin [B, hires tokens, hd/2] float32, row-major."""
        cos, sin = self._pages.hires_rotary(torch.from_numpy(begin))
        return cos.numpy(), sin.numpy()

    def nbytes(self, array: Tensor) -> int:
        """See Model.nbytes."""
        return array.nbytes

    def no_image(self, batch: int) -> Image[Tensor]:
        """See Model.no_image."""
        g = self.geometry
        store = [torch.zeros(batch, g.kv_heads, g.pages, page_size(g), g.head_dim, dtype=self.dtype)]
        features = torch.zeros(batch, g.image_tokens, g.hidden, dtype=self.dtype)
        stores = store * len(g.reading_layers)
        return Image(features, self._named(stores, stores), np.zeros(batch, np.int64), np.zeros((batch, 2), np.int64))

    def decoder(self, image: Image[Tensor], capacity: int) -> ReferenceDecoder:
        """See Model.decoder."""
        return ReferenceDecoder(self, image, max(capacity, self.geometry.image_tokens))

    def slots(self, count: int) -> ReferenceSlots:
        """See Model.slots."""
        return ReferenceSlots(self, count)

    def require_unchanged(self) -> None:
        """See Model.require_unchanged: nothing of the checkpoint is read any more."""

    def device_ms(self) -> float:
        """See Model.device_ms: the CPU is no device, nobody measures."""
        return 0.0

    def _named(self, keys: list[Tensor], values: list[Tensor]) -> dict[str, Tensor]:
        halves, layers = (("page_key", keys), ("page_value", values)), self.geometry.reading_layers
        return {
            f"{half}.{layer}": store for half, stores in halves for layer, store in zip(layers, stores, strict=True)
        }


class ReferenceDecoder:
    """engines.backend.Decoder in PyTorch; `maps` and `hidden` show the inside of the last run."""

    def __init__(
        self, model: ReferenceModel, image: Image[Tensor], capacity: int, *, length: np.ndarray | None = None
    ) -> None:
        """`capacity`: tokens of each row, exactly. `length`: of the rows, to be counted on; None for an empty cache."""
        g, batch = model.geometry, len(image.begin)
        self.capacity = capacity
        self.length = np.zeros(batch, np.int64) if length is None else length
        self.maps: list[np.ndarray] = []  # selecting layers x [B, G, G]
        self.hidden: list[np.ndarray] = []  # layers + 1 x [B, hidden]
        self.image = image
        self._module, self._reading = model._decoder, g.reading_layers
        shape = batch, g.kv_heads, capacity, g.head_dim
        empty = [torch.zeros(shape, dtype=torch.int8 if g.int8_cache else model.dtype)] * g.layers
        empty += [torch.zeros(shape[:-1])] * g.layers if g.int8_cache else []  # the scales
        self._key, self._value = empty, empty  # a run makes new ones

    @property
    def nbytes(self) -> int:
        """See Decoder.nbytes."""
        return sum(cache.nbytes for caches in (self._key, self._value) for cache in caches)

    def take(self, other: ReferenceDecoder) -> None:
        """Hold what another of the same capacity holds in its cache, whatever that does afterwards."""
        self._key, self._value = other._key, other._value

    def enlarged(self, capacity: int) -> ReferenceDecoder:
        """See Decoder.enlarged: this decoder, with empty slots behind those it has."""
        more = capacity - self.capacity
        if more > 0:
            self._key, self._value = (
                [_lengthened(cache, more) for cache in caches] for caches in (self._key, self._value)
            )
            self.capacity = capacity
        return self

    @torch.no_grad()
    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See Decoder.run; the logits stay."""
        require_room(self, ids.shape[1])
        image, budgets = self.image, np.broadcast_to(np.asarray(page_budget, np.int64), self.length.shape)
        logits, token, pages, count, self._key, self._value, maps, hidden = self._module(
            torch.from_numpy(np.ascontiguousarray(ids)),
            torch.from_numpy(self.length),
            image.features,
            torch.from_numpy(image.begin),
            torch.from_numpy(image.margins),
            torch.from_numpy(budgets.copy()),
            *(self._key, self._value),
            *([image.pages[f"{half}.{layer}"] for layer in self._reading] for half in ("page_key", "page_value")),
        )
        self.maps = [map.numpy() for map in maps]
        self.hidden = [state.float().numpy() for state in hidden]
        self.length += ids.shape[1] if lengths is None else lengths
        return Step(logits.numpy, token.numpy(), pages.numpy(), count.numpy())


class ReferenceSlots:
    """engines.backend.Slots in PyTorch: rows run one after the other, so that none can depend on another."""

    def __init__(self, model: ReferenceModel, count: int) -> None:
        """`count`: rows."""
        self.length = np.zeros(count, np.int64)
        empty, context = model.no_image(1), model.geometry.context
        rows = [self.length[row : row + 1] for row in range(count)]
        self._rows = [ReferenceDecoder(model, empty, context, length=length) for length in rows]

    @property
    def nbytes(self) -> int:
        """See Slots.nbytes."""
        images = [(row.image.features, *row.image.pages.values()) for row in self._rows]
        return sum(row.nbytes for row in self._rows) + sum(each.nbytes for image in images for each in image)

    def load(self, row: int, image: Image[Tensor]) -> None:
        """See Slots.load; images do not change, so that there is nothing to copy."""
        self._rows[row].image = image
        self.length[row] = 0

    def copy(self, source: int, target: int, tokens: int, *, image: bool) -> None:
        """See Slots.copy."""
        self._rows[target].take(self._rows[source])
        if image:
            self._rows[target].image = self._rows[source].image
        self.length[target] = tokens

    def keep(self, row: int, tokens: int) -> None:
        """See Slots.keep: nothing."""

    def row(self, row: int) -> ReferenceDecoder:
        """See Slots.row."""
        return self._rows[row]

    def first(self, rows: int) -> ReferenceRows:
        """See Slots.first."""
        return ReferenceRows(self._rows[:rows], self.length[:rows])


class ReferenceRows:
    """engines.backend.Decoder for rows that run one after the other."""

    def __init__(self, rows: list[ReferenceDecoder], length: np.ndarray) -> None:
        """`rows`: each of a batch of one. `length`: what they count their tokens in."""
        self.length, self.capacity = length, rows[0].capacity
        self._rows = rows

    @property
    def nbytes(self) -> int:
        """See Decoder.nbytes."""
        return sum(row.nbytes for row in self._rows)

    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See Decoder.run."""
        batch, steps = ids.shape
        require_room(self, steps)
        budgets = np.broadcast_to(np.asarray(page_budget, np.int64), (batch,))
        valid = np.full(batch, steps) if lengths is None else lengths
        ones = [slice(row, row + 1) for row in range(batch)]
        done = [row.run(ids[one], budgets[one], lengths=valid[one]) for row, one in zip(self._rows, ones, strict=True)]
        token, pages, count = (
            np.concatenate([getattr(step, name) for step in done]) for name in ("token", "pages", "page_count")
        )
        return Step(lambda: np.concatenate([step.logits for step in done]), token, pages, count)

    def enlarged(self, capacity: int) -> ReferenceRows:
        """See Decoder.enlarged: these rows, which have room for the whole context, or an error."""
        require_room(self, capacity - int(self.length.max()))
        return self


def _lengthened(cache: Tensor, more: int) -> Tensor:
    """A cache [B, Hkv, L, ...] with empty slots behind those it has."""
    return torch.cat((cache, cache.new_zeros(*cache.shape[:2], more, *cache.shape[3:])), dim=2)


def require_room(decoder: ReferenceDecoder | ReferenceRows, more: int) -> None:
    """BackendError unless so many tokens fit behind those that a decoder has."""
    if int(decoder.length.max()) + more > decoder.capacity:
        left = decoder.capacity - decoder.length.max()
        raise BackendError(f"{more} more tokens", expected=f"at most {left} fit")


def load(module: nn.Module, checkpoint: Weights, dtype: torch.dtype, base: str = "") -> nn.Module:
    """Give a module built on the meta device its tensors, by name; `base`: where in the model it is, dot included."""
    for prefix, child in module.named_modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                tensor = checkpoint.tensor(f"{base}{prefix}{'.' if prefix else ''}{name}").to(dtype)
                child._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return module
