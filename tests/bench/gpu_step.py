"""A whole decode step of 7B's shape on a GPU, and its kernels beside what libraries take: `python -m
tests.bench.gpu_step`.

Our compiled kernels in a step written by hand, whose products are torch's (cuBLAS), with random float16 weights; each
step recorded as one CUDA graph. It shows what an engine has to aim at, and is none. Before anything is timed, attention
is held against the official way of computing it, on the same numbers. `--emulated` does the same at a tiny size on the
CPU, over the emulated driver: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from engines.cuda import Cuda
from engines.errors import BackendError, FlexError
from plugins.artifacts import Artifacts
from plugins.command import run
from plugins.compiler.kernels import compile_kernels
from plugins.compiler.ptxas import SMS
from plugins.op import named
from plugins.registry import kernels_of_model, ops_of_model
from tests.geometries import official, tiny
from tests.shapes import sizes

BOUND = 8e-3  # of values of size one in float16, as the tests of the kernels on a GPU have it
REPLAYS = 20
COPIED = 1 << 30  # bytes, for the ceilings: far more than any cache holds
SQUARE = 8192  # side of the product


class Gpu:
    """A GPU that torch and the kernels share."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError("torch finds no GPU", expected="an NVIDIA GPU and torch for CUDA", fix="--emulated")
        torch.zeros(1, device=self.device)  # makes the context, which the driver's side then shares
        torch.backends.cuda.matmul.allow_tf32 = False
        self.cuda = Cuda()

    def artifacts(self, g: Geometry, packed: Path | None) -> Artifacts:
        """The kernels of a model of this size: those of the file `packed`, else compiled now."""
        if packed is not None:
            return Artifacts.read(packed)
        sms = (self.cuda.sm,) if self.cuda.sm in SMS else SMS[:1]  # the driver compiles the PTX for others
        return compile_kernels(kernels_of_model(sizes(g), "float16"), sms)

    def launch(self, artifacts: Artifacts, make: Callable[[], list], tensors: Sequence[Tensor]) -> None:
        """Launch what `make` returns, in the order of torch's stream."""
        self.cuda.run(artifacts, make(), torch.cuda.current_stream().cuda_stream)

    def milliseconds(self, work: Callable[[], object], *, graph: bool = True, replays: int = REPLAYS) -> float:
        """The median of what `work` takes: recorded as a CUDA graph, or asked anew each time."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # what allocates or chooses algorithms does it here
            work()
            work()
        torch.cuda.synchronize()
        if not graph:
            times = []
            for _ in range(replays):
                started = perf_counter()
                work()
                torch.cuda.synchronize()
                times.append(1000 * (perf_counter() - started))
            return statistics.median(times)
        recorded, times = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(recorded):
            work()
        for _ in range(3):
            recorded.replay()
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            recorded.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)


class Emulated(Gpu):
    """The CPU, and the emulated driver over torch's own memory."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        from tests.emulator.driver import Driver  # Triton's interpreter, which no GPU needs

        self.driver = Driver()
        self.cuda = Cuda(self.driver)
        self.stream = self.cuda.stream()

    def artifacts(self, g: Geometry, packed: Path | None) -> Artifacts:
        from tests.emulator.driver import emulated_artifacts

        return emulated_artifacts(kernels_of_model(sizes(g), "float16"))

    def launch(self, artifacts: Artifacts, make: Callable[[], list], tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self.driver.memory.add(tensor.detach().numpy().reshape(-1))
        self.cuda.run(artifacts, make(), int(self.stream))
        self.stream.wait()
        for start in {tensor.data_ptr() for tensor in tensors}:
            self.driver.memory.remove(start)

    def milliseconds(self, work: Callable[[], object], *, graph: bool = True, replays: int = REPLAYS) -> float:
        started = perf_counter()
        work()
        return 1000 * (perf_counter() - started)


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
        self.begin = torch.tensor([3], **long)
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
        self.features = self._random(1, g.pages, page_size(g), g.hidden)
        turned = torch.arange(rows, device=d).float()[:, None] * inverse / 8
        self.page_cos, self.page_sin = (
            half.reshape(1, g.pages, page_size(g), hd // 2).contiguous() for half in (turned.cos(), turned.sin())
        )
        self.layers = [self._layer(index) for index in range(g.layers)]
        self.reading = [layer for layer in self.layers if layer.page_key is not None]
        self.head = self._random(g.vocab, g.hidden) / 16
        self.ones = torch.ones(g.hidden, device=d, dtype=torch.float16)
        self.input = self._random(1, 1, g.hidden)

    def _random(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, device=self.gpu.device) / 4).half()

    def _scratch(self) -> int:
        """Bytes of the largest workspace of a call here."""
        from tests.shapes import input_shapes

        shapes = [input_shapes(self.g, steps=steps) for steps in (1, self.cached)]
        return max(1, *(op.workspace(each[name]) for each in shapes for name, op in self.ops.items()))

    def _layer(self, index: int) -> Layer:
        g, kv = self.g, self.g.kv_heads * self.g.head_dim
        shapes = {"q": (kv, g.hidden), "k": (kv, g.hidden), "v": (kv, g.hidden), "o": (g.hidden, kv)}
        shapes |= {name: (g.intermediate, g.hidden) for name in ("gate", "up")} | {"down": (g.hidden, g.intermediate)}
        products = {name: self._random(*shape) / 16 for name, shape in shapes.items()}
        key, value = (self._random(1, g.kv_heads, g.context, g.head_dim) for _ in range(2))
        layer = Layer(products, key, value, None, None, None, index in g.selecting_layers)
        if index in g.reading_layers:
            layer.hires = self._random(2, kv, g.hidden) / (g.hidden**0.5 / 4)
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
        first = int(3)  # `begin`, known on the host as the official code knows it
        self.map.copy_(scores.softmax(-1)[..., first : first + g.image_tokens].sum(1).view_as(self.map))
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

        def launches() -> list:
            return op.launches("float16", shapes, addresses, self.workspace.data_ptr())

        self.gpu.launch(self._artifacts, launches, tensors)

    def attention(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, count: Tensor, positions: Tensor | None = None
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
        """The pages of the next layer; where they are written nobody reads them, so that a step reads as many as asked."""
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
