"""The FlexAttention decoder and its hi-res page projection in plain PyTorch: what is traced, and the parity oracle.

Parameter names are the official state-dict names. B = batch, S = new tokens, T = grid*grid image tokens, L = cache
capacity, M = selecting layers, R = reading layers, P = page size, hd = head_dim. Floats are in the model dtype unless
the text says float32. The semantics of one step are in docs/model.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.bundle import pages as layout
from engines.bundle.geometry import Geometry
from export.network.page_slots import assign
from plugins.cached_attention.reference import cached_attention, cached_attention_int8_cache, quantise, rotary
from plugins.hierarchical_attention.reference import (
    hierarchical_attention,
    hierarchical_attention_int8,
    hierarchical_attention_int8_both,
    hierarchical_attention_int8_cache,
)
from plugins.project_pages.reference import (
    project_pages,
    project_pages_int8,
    project_pages_int8_slots,
    project_pages_slots,
)
from plugins.select_pages.reference import select_pages

CACHED = {False: cached_attention, True: cached_attention_int8_cache}  # by Geometry.int8_cache
HIERARCHICAL = {
    (False, False): hierarchical_attention,
    (True, False): hierarchical_attention_int8,
    (False, True): hierarchical_attention_int8_cache,
    (True, True): hierarchical_attention_int8_both,
}  # by Geometry.int8_pages, int8_cache
PROJECT = {
    (False, False): project_pages,
    (True, False): project_pages_int8,
    (False, True): project_pages_slots,
    (True, True): project_pages_int8_slots,
}  # by Geometry.int8_pages, and whether it has page_slots


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)  # in this form ONNX Runtime fuses it
        return self.weight * y.to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(g.hidden, g.intermediate, bias=False)
        self.up_proj = nn.Linear(g.hidden, g.intermediate, bias=False)
        self.down_proj = nn.Linear(g.intermediate, g.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer; `reads` tells whether it attends to pages."""

    def __init__(self, g: Geometry, reads: bool) -> None:
        super().__init__()
        self.geometry, self.reads = g, reads
        self.input_layernorm = RMSNorm(g.hidden, g.rms_eps)
        self.self_attn = nn.Module()
        for name, width in (("q_proj", g.heads), ("k_proj", g.kv_heads), ("v_proj", g.kv_heads)):
            self.self_attn.add_module(name, nn.Linear(g.hidden, width * g.head_dim, bias=g.attention_bias))
        self.self_attn.o_proj = nn.Linear(g.heads * g.head_dim, g.hidden, bias=g.attention_bias)
        if reads and g.lazy_pages:
            for name in ("k_proj_hd", "v_proj_hd"):
                self.self_attn.add_module(name, nn.Linear(g.hidden, g.kv_heads * g.head_dim, bias=False))
        self.post_attention_layernorm = RMSNorm(g.hidden, g.rms_eps)
        self.mlp = MLP(g)

    def project(
        self, hires: tuple[Tensor, ...], store: tuple[Tensor, ...], done: Tensor, listed: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        """The store with those of the `listed` pages that it lacks. hires: features, cos, sin of all pages; store: keys
        and values, then their scales if it has any; done: which pages it holds, or with page slots the table of them.

        Returns the store, `done` and `listed`, now; with page slots the list is one of these, and their turnover
        follows.
        """
        g = self.geometry
        if g.page_slots is None:
            *present, done = self._projected(hires, store, done, *listed)
            return tuple(present), done, listed, ()
        pages, page_count = listed
        given = assign(done, pages, page_count, g.page_slots)
        *present, _ = self._projected(hires, store, given.held, pages, given.count, given.slots)
        return tuple(present), given.table, (given.listed, given.count), (given.turnover,)

    def _projected(self, hires: tuple[Tensor, ...], store: tuple[Tensor, ...], *which: Tensor) -> tuple[Tensor, ...]:
        """What the op makes of the store; which: projected, pages, page_count, and page slots where there are such."""
        g, (features, cos, sin) = self.geometry, hires
        weights = self.self_attn.k_proj_hd.weight, self.self_attn.v_proj_hd.weight
        sizes = g.hidden, g.kv_heads, g.head_dim, layout.page_size(g), g.cells
        project = PROJECT[g.int8_pages, g.page_slots is not None]
        return project(features, *weights, cos, sin, *store[:2], *which[:3], *store[2:], *which[3:], *sizes)

    def forward(
        self,
        x: Tensor,
        cache: tuple[Tensor, ...],
        shared: tuple[Tensor, ...],
        pages: tuple[Tensor, ...],
        scales: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Returns x, the present cache as `cache` and then `scales` have it, map; `cache`, `shared`, `pages` and
        `scales` are inputs of the attention op."""
        attend, y = self.self_attn, self.input_layernorm(x)
        projected = attend.q_proj(y), attend.k_proj(y), attend.v_proj(y)
        g, inputs = self.geometry, (*projected, *cache, *shared, *pages, *scales)
        sizes = g.heads, g.kv_heads, g.head_dim
        if self.reads:
            attention = HIERARCHICAL[g.int8_pages, g.int8_cache]
            context, key, value, map, *changed = attention(*inputs, *sizes, layout.page_size(g), g.grid)
        else:
            context, key, value, map, *changed = CACHED[g.int8_cache](*inputs, *sizes, g.grid)
        x = x + attend.o_proj(context)
        return x + self.mlp(self.post_attention_layernorm(x)), (key, value, *changed), map


class FlexDecoder(nn.Module):
    """Embedding, decoder layers, lm_head; serves the plain prefill (page_budget 0) and the decode step (S = 1)."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.geometry = g
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(g.vocab, g.hidden)
        self.model.layers = nn.ModuleList(Layer(g, index in g.reading_layers) for index in range(g.layers))
        self.model.norm = RMSNorm(g.hidden, g.rms_eps)
        self.lm_head = None if g.tied_embeddings else nn.Linear(g.hidden, g.vocab, bias=False)
        cos, sin = rotary_tables(g)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        lengths = layout.page_lengths(g)[: g.stored_pages]  # page slots hold pages that are all equally long
        self.register_buffer("page_lengths", torch.from_numpy(lengths), persistent=False)

    def forward(
        self,
        input_ids: Tensor,  # [B, S] int64; -1-j stands for image feature j
        past_length: Tensor,  # [B] int64: tokens already in the cache
        features: Tensor,  # [B, T, hidden]: projected low-res features; anything when no id is negative
        image_begin: Tensor,  # [B] int64: position of image token 0
        margins: Tensor,  # [B, 2] int64: rows, columns of the map zeroed at each end
        page_budget: Tensor,  # [B] int64: 0 = the last token sees no pages
        past_key: list[Tensor],  # layers x [B, kv_heads, L, hd]; int8 cache: and layers x their scales, without hd
        past_value: list[Tensor],
        page_key: list[Tensor],  # R x [B, kv_heads, pages, P, hd]; int8 pages: and R x their scales, without hd; with
        # page slots as many pages as there are of these
        page_value: list[Tensor],
        page_features: Tensor | None = None,  # [B, pages, P, hidden]: with lazy pages alone, as all that follows
        page_cos: Tensor | None = None,  # [B, pages, P, hd/2] float32
        page_sin: Tensor | None = None,
        projected: Tensor | None = None,  # [B, R, pages] int64: 1 where page_key and page_value hold the page; with
        # page slots the table of each layer's, [B, R, 2, pages] int64
    ) -> tuple[Tensor | list[Tensor], ...]:
        """Returns, for the last token: logits [B, vocab] float32, the greedy next token [B] int64 (ties: the lowest),
        pages [B, M, pages] int64, page_count [B, M] int64; present_key, present_value (layers x the cache after the
        update); with lazy pages also present_page_key, present_page_value (as page_key, after the update) and
        present_projected; with page slots turnover [B, R, 2] int64 (see page_slots.py); and for debugging map (M x
        [B, G, G] float32) and hidden (layers+1 x [B, hidden]: the output of each layer, then of the final norm).
        """
        g = self.geometry
        is_image = input_ids < 0
        index = torch.where(is_image, -1 - input_ids, 0)  # not clamp: TensorRT 10.3 lists no integers for ONNX's Clip
        image = features.gather(1, index[..., None].expand(-1, -1, g.hidden))
        x = torch.where(is_image[..., None], image, self.model.embed_tokens(torch.where(is_image, 0, input_ids)))
        positions = past_length[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        shared = (positions, self.cos, self.sin, image_begin)
        selected: list[tuple[Tensor, Tensor]] = []
        present, maps, hidden = [], [], []
        lazy: list[tuple[Tensor, ...]] = []  # what each reading layer's projection changed
        turnover: list[Tensor] = []
        layers, reading = g.layers, len(g.reading_layers)
        for index, layer in enumerate(self.model.layers):
            pages: tuple[Tensor, ...] = ()
            if layer.reads:
                store = index - g.reading_layers.start
                kept = page_key[store], page_value[store]
                if g.int8_pages:
                    kept = (*kept, page_key[reading + store], page_value[reading + store])
                listed = selected[-1]
                if g.lazy_pages:
                    hires = page_features, page_cos, page_sin
                    kept, done, listed, turns = layer.project(hires, kept, projected[:, store], listed)
                    lazy.append((*kept, done))
                    turnover += turns
                pages = (*kept[:2], self.page_lengths, *listed, *kept[2:])
            cache = past_key[index], past_value[index]
            steps = (past_key[layers + index], past_value[layers + index]) if g.int8_cache else ()
            x, changed, map = layer(x, cache, shared, pages, steps)
            present.append(changed)
            hidden.append(x[:, -1])
            if index in g.selecting_layers:
                maps.append(map)
                selected.append(select_pages(map, margins, page_budget, g.grid, g.cells, g.threshold))
        hidden.append(self.model.norm(hidden[-1]))
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(hidden[-1], head).float()
        chosen, count = (torch.stack(tensors, 1) for tensors in zip(*selected, strict=True))
        projected_pages: tuple[Tensor | list[Tensor], ...] = ()
        if g.lazy_pages:
            *stores, done = zip(*lazy, strict=True)
            projected_pages = (*_by_half(stores), torch.stack(done, 1))
        if g.page_slots is not None:
            projected_pages = (*projected_pages, torch.stack(turnover, 1))
        present_key, present_value = _by_half([*zip(*present, strict=True)])
        return logits, logits.argmax(-1), chosen, count, present_key, present_value, *projected_pages, maps, hidden


def _by_half(stores: list[tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    """Of every layer the keys, then the values; where they are int8, then the scales of the keys, of the values: to
    all keys and then their scales, and the same of values."""
    return [*sum(stores[::2], ())], [*sum(stores[1::2], ())]


class PageLayout(nn.Module):
    """Hi-res features and their rotary tables, page by page; run once per image (and image position)."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.geometry = g
        cos, sin = rotary_tables(g)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # The official resize of the identity gives its weights; as a matrix it is the same in every backend.
        identity = torch.eye(g.grid, dtype=torch.float32, device="cpu")[None, None]
        bicubic = F.interpolate(identity, size=(g.hires_side, g.grid), mode="bicubic", align_corners=False)
        self.register_buffer("bicubic", bicubic[0, 0], persistent=False)  # [hires_side, grid]
        order = layout.page_order(g)
        self.register_buffer("page_order", torch.from_numpy(order), persistent=False)
        self.register_buffer("tile_order", torch.from_numpy(layout.tile_order(g)[order]), persistent=False)

    def hires_rotary(self, image_begin: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [B, hires_side**2, hd/2] float32, row-major; official: bicubic zoom of the low-res tables, cos and
        sin apart (so cos^2 + sin^2 != 1)."""
        g = self.geometry
        position = image_begin[:, None] + torch.arange(g.image_tokens, device=image_begin.device)

        def zoomed(table: Tensor) -> Tensor:
            plane = table[position].transpose(1, 2).unflatten(2, (g.grid, g.grid))
            return (self.bicubic @ plane @ self.bicubic.T).flatten(2).transpose(1, 2)

        return zoomed(self.cos), zoomed(self.sin)

    def forward(self, tiles: Tensor, image_begin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tiles [B * zoom*zoom, T, hidden]: projected features tile by tile; image_begin [B] int64.

        Returns features [B, pages, P, hidden] and cos, sin [B, pages, P, hd/2] float32; the padding of a short page
        repeats token 0.
        """
        g = self.geometry
        features = tiles.reshape(image_begin.shape[0], g.hires_side**2, g.hidden)[:, self.tile_order]
        cos, sin = (table[:, self.page_order] for table in self.hires_rotary(image_begin))
        return tuple(x.unflatten(1, (g.pages, -1)) for x in (features, cos, sin))


class PageProjector(PageLayout):
    """Hi-res features -> the K/V pages of every reading layer; run once per image (and image position)."""

    def __init__(self, g: Geometry) -> None:
        super().__init__(g)
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict()
        for index in g.reading_layers:
            layer = nn.Module()
            layer.self_attn = nn.Module()
            for name in ("k_proj_hd", "v_proj_hd"):
                width = g.kv_heads * g.head_dim
                layer.self_attn.add_module(name, nn.Linear(g.hidden, width, bias=g.attention_bias))
            self.model.layers[str(index)] = layer

    def forward(  # type: ignore[override]  # it goes on where PageLayout ends; nobody takes one for the other
        self, tiles: Tensor, image_begin: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Arguments as for PageLayout.

        Returns page_key, page_value: R x [B, kv_heads, pages, P, hd], then for int8 pages their scales, R x
        [B, kv_heads, pages, P] float32. Features go in raw, without a norm (official).
        """
        g, batch = self.geometry, image_begin.shape[0]
        features, cos, sin = (x.flatten(1, 2) for x in super().forward(tiles, image_begin))

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, -1, g.kv_heads, g.head_dim).transpose(1, 2)

        def kept(x: Tensor) -> list[Tensor]:
            if g.int8_pages:
                return [*quantise(x.unflatten(2, (g.pages, -1)))]  # last: TensorRT lists few operators of int8
            return [x.to(features.dtype).unflatten(2, (g.pages, -1))]

        stores: list[list[Tensor]] = []  # of each layer keys and values, each with its scales after it if it has any
        for layer in self.model.layers.values():
            keys = kept(rotary(heads(layer.self_attn.k_proj_hd(features)), cos[:, None], sin[:, None]))
            stores.append(keys + kept(heads(layer.self_attn.v_proj_hd(features))))
        by_kind = [*zip(*stores, strict=True)]
        half = len(by_kind) // 2
        return [*sum(by_kind[:half], ())], [*sum(by_kind[half:], ())]


def rotary_tables(g: Geometry) -> tuple[Tensor, Tensor]:
    """cos, sin [context, hd/2] float32 by position (official: LlamaRotaryEmbedding, first half of its last axis)."""
    frequency = 1.0 / (g.rope_theta ** (torch.arange(0, g.head_dim, 2, device="cpu").float() / g.head_dim))
    angle = torch.outer(torch.arange(g.context, device="cpu").float(), frequency)
    return angle.cos(), angle.sin()
