"""A decoder of random weights on a GPU, whose decode step is done by our kernels, by torch, and the official way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from engines.errors import BackendError
from plugins.artifacts import Artifacts
from plugins.op import Launch, named
from plugins.registry import ops_of_model
from tests.on_gpu.device import Gpu
from tests.shapes import input_shapes, sizes

BEGIN = 3  # where the image's tokens begin in the cache


@dataclass
class Layer:
    """Weights, cache and pages of a layer. hires: of its reading, [2, Hkv * hd, hidden], keys first."""

    products: dict[str, Tensor]
    key: Tensor
    value: Tensor
    page_key: Tensor | None
    page_value: Tensor | None
    hires: Tensor | None
    selects: bool


class Model:
    """Random weights of the shape `g`, `cached` tokens in the cache, and a decode step done in several ways."""

    def __init__(self, gpu: Gpu, g: Geometry, cached: int, artifacts: Artifacts) -> None:
        self.gpu, self.g, self.cached, self._artifacts = gpu, g, cached, artifacts
        self.ops = {op.name: op for op in ops_of_model(sizes(g))}
        d, heads, hd = gpu.device, g.heads, g.head_dim
        if g.kv_heads != heads:
            raise BackendError("grouped heads", expected="as many key heads as heads: torch's side is written so")
        long = {"dtype": torch.int64, "device": d}
        self.position = torch.tensor([[cached - 1]], **long)
        self.begin = torch.tensor([BEGIN], **long)
        inverse = 1 / g.rope_theta ** (torch.arange(0, hd, 2, device=d).float() / hd)
        angles = torch.arange(g.context, device=d).float()[:, None] * inverse
        self.cos, self.sin = angles.cos().contiguous(), angles.sin().contiguous()
        self.lengths = torch.full((g.pages,), page_size(g), **long)
        self.margins = torch.zeros(1, 2, **long)
        self.budget = torch.tensor([g.pages], **long)
        self.map = torch.zeros(1, g.grid, g.grid, device=d)
        self.chosen, self.chosen_count = torch.zeros(1, g.pages, **long), torch.zeros(1, **long)
        self.workspace = torch.zeros(self._scratch(), dtype=torch.uint8, device=d)
        rows = g.pages * page_size(g)
        self.features = self.random(1, g.pages, page_size(g), g.hidden)
        turned = torch.arange(rows, device=d).float()[:, None] * inverse / 8
        self.page_cos, self.page_sin = (
            half.reshape(1, g.pages, page_size(g), hd // 2).contiguous() for half in (turned.cos(), turned.sin())
        )
        self.layers = [self._layer(index) for index in range(g.layers)]
        self.reading = [layer for layer in self.layers if layer.page_key is not None]
        self.head = self.random(g.vocab, g.hidden) / 16
        self.ones = torch.ones(g.hidden, device=d, dtype=torch.float16)
        self.input = self.random(1, 1, g.hidden)

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, device=self.gpu.device) / 4).half()

    def _scratch(self) -> int:
        """Bytes of the largest workspace of a call here."""
        shapes = [input_shapes(self.g, steps=steps) for steps in (1, self.cached)]
        return max(1, *(op.workspace("float16", each[name]) for each in shapes for name, op in self.ops.items()))

    def _layer(self, index: int) -> Layer:
        g, kv = self.g, self.g.kv_heads * self.g.head_dim
        shapes = {"q": (kv, g.hidden), "k": (kv, g.hidden), "v": (kv, g.hidden), "o": (g.hidden, kv)}
        shapes |= {name: (g.intermediate, g.hidden) for name in ("gate", "up")} | {"down": (g.hidden, g.intermediate)}
        products = {name: self.random(*shape) / 16 for name, shape in shapes.items()}
        key, value = (self.random(1, g.kv_heads, g.context, g.head_dim) for _ in range(2))
        layer = Layer(products, key, value, None, None, None, index in g.selecting_layers)
        if index in g.reading_layers:
            layer.hires = self.random(2, kv, g.hidden) / (g.hidden**0.5 / 4)
            layer.page_key, layer.page_value = self.projected(layer, range(g.pages))
        return layer

    # The official way, in torch.

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of [..., hd] by angles whose cos and sin are [..., hd / 2]."""
        half = x.shape[-1] // 2
        first, second = x[..., :half].float(), x[..., half:].float()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).half()

    def split(self, x: Tensor) -> Tensor:
        """[1, n, H * hd] -> [1, H, n, hd]."""
        return x.view(1, x.shape[1], self.g.heads, self.g.head_dim).transpose(1, 2)

    def projected(self, layer: Layer, pages: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of pages, [1, Hkv, pages, page size, hd], from their features, as the official code has it
        in every step."""
        g, listed = self.g, torch.as_tensor(list(pages) if isinstance(pages, range) else pages)
        listed = listed.to(self.gpu.device)
        assert layer.hires is not None
        both = (F.linear(self.features[0, listed].flatten(0, 1), weight) for weight in layer.hires)
        key, value = (self.split(each[None]).reshape(1, g.heads, len(listed), page_size(g), -1) for each in both)
        cos, sin = self.page_cos[:, None, listed], self.page_sin[:, None, listed]
        return self.turned(key, cos, sin).contiguous(), value.contiguous()

    def _stored(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and all keys and values, once the new token's are in the cache."""
        at = slice(self.cached - 1, self.cached)
        cos, sin = self.cos[at], self.sin[at]
        layer.key[:, :, at] = self.turned(self.split(k), cos, sin)
        layer.value[:, :, at] = self.split(v)
        return self.turned(self.split(q), cos, sin), layer.key[:, :, : self.cached], layer.value[:, :, : self.cached]

    def by_sdpa(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Plain attention, by torch's own kernel: [1, 1, H * hd]."""
        context = F.scaled_dot_product_attention(*self._stored(layer, q, k, v))
        return context.transpose(1, 2).reshape(1, 1, -1)

    def officially(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None) -> Tensor:
        """Attention with the listed pages projected again, one softmax over both, and the map: [1, 1, H * hd]."""
        g = self.g
        query, keys, values = self._stored(layer, q, k, v)
        scores = (query @ keys.transpose(2, 3)).float() * g.head_dim**-0.5
        seen = scores.softmax(-1)[..., BEGIN : BEGIN + g.image_tokens]
        self.map.copy_(seen.sum(1).view_as(self.map))
        if pages is not None and layer.hires is not None:
            page_key, page_value = (each.flatten(2, 3) for each in self.projected(layer, pages))
            scores = torch.cat([scores, (query @ page_key.transpose(2, 3)).float() * g.head_dim**-0.5], -1)
            values = torch.cat([values, page_value], 2)
        context = scores.softmax(-1).half() @ values
        return context.transpose(1, 2).reshape(1, 1, -1)

    # Ours.

    def call(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run an op by its kernels."""
        op = self.ops[name]
        tensors = [*inputs, *outputs, self.workspace]
        shapes = named(op.inputs, (tuple(each.shape) for each in inputs))
        addresses = named((*op.inputs, *op.outputs), (each.data_ptr() for each in (*inputs, *outputs)))

        def launches() -> list[Launch]:
            kernels = self._artifacts.on(op.kernels("float16"), self.gpu.cuda.sm)
            return op.launches("float16", shapes, addresses, self.workspace.data_ptr(), kernels)

        self.gpu.launch(self._artifacts, launches, tensors)

    def attention(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        count: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """By our kernels, with the first `count` of the listed pages where the layer reads any: [1, n, H * hd]."""
        context = torch.empty_like(q)
        at = self.position if positions is None else positions
        inputs = [q, k, v, layer.key, layer.value, at, self.cos, self.sin, self.begin]
        outputs = [context, layer.key, layer.value, self.map]
        if layer.page_key is None or layer.page_value is None:
            self.call("CachedAttention", inputs, outputs)
        else:
            inputs += [layer.page_key, layer.page_value, self.lengths, pages, count]
            self.call("HierarchicalAttention", inputs, outputs)
        return context

    def plain(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> Tensor:
        """By our kernel without pages."""
        context = torch.empty_like(q)
        at = self.position if positions is None else positions
        self.call(
            "CachedAttention",
            [q, k, v, layer.key, layer.value, at, self.cos, self.sin, self.begin],
            [context, layer.key, layer.value, self.map],
        )
        return context

    def select(self) -> None:
        """Selects pages, which nobody reads: a step reads as many as it is asked to."""
        self.call("SelectPages", [self.map, self.margins, self.budget], [self.chosen, self.chosen_count])

    def project(self, layer: Layer, done: Tensor, pages: Tensor, count: Tensor) -> None:
        """Those of the listed pages that are not done."""
        assert layer.hires is not None and layer.page_key is not None and layer.page_value is not None
        result = torch.empty_like(done)
        stores = [layer.page_key, layer.page_value]
        weights = [layer.hires[0], layer.hires[1]]
        inputs = [self.features, *weights, self.page_cos, self.page_sin, *stores, done, pages, count]
        self.call("ProjectPages", inputs, [*stores, result])

    def step(self, attend: Callable[[Layer, Tensor, Tensor, Tensor], Tensor], *, select: bool = False) -> Tensor:
        """A whole step with that attention: the token [1, 1]."""
        x, g = self.input, self.g
        for layer in self.layers:
            p = layer.products
            h = F.rms_norm(x, (g.hidden,), self.ones, g.rms_eps)
            context = attend(layer, F.linear(h, p["q"]), F.linear(h, p["k"]), F.linear(h, p["v"]))
            if select and layer.selects:
                self.select()
            x = x + F.linear(context, p["o"])
            h = F.rms_norm(x, (g.hidden,), self.ones, g.rms_eps)
            x = x + F.linear(F.silu(F.linear(h, p["gate"])) * F.linear(h, p["up"]), p["down"])
        return F.linear(F.rms_norm(x, (g.hidden,), self.ones, g.rms_eps), self.head).argmax(-1)

    def listed(self, count: int) -> tuple[Tensor, Tensor]:
        """A list of pages in some order, and that its first `count` are meant."""
        pages = torch.randperm(self.g.pages, device=self.gpu.device)[None].contiguous()
        return pages, torch.tensor([count], device=self.gpu.device)
