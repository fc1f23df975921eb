"""A decode step the official way: hi-res keys and values are projected again in every layer of every step."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from engines.backend import Image, Step
from engines.bundle.pages import page_tokens, tile_order
from export.network.reference import ReferenceDecoder, ReferenceModel
from plugins.cached_attention.reference import rotary
from plugins.select_pages.reference import select_pages


class OfficialDecoder(ReferenceDecoder):
    """A reference decoder whose single steps follow modeling_llama.py: token mask, projection, concatenated softmax."""

    def __init__(self, model: ReferenceModel, image: Image[Tensor], hires: Tensor, capacity: int) -> None:
        """`hires`: features of the hi-res tiles [zoom*zoom, T, hidden]."""
        super().__init__(model, image, capacity)
        g = model.geometry
        self.geometry, self._projector = g, model._pages.model.layers
        self._hires = hires.reshape(-1, g.hidden)[torch.from_numpy(tile_order(g))]  # row-major, raw
        self._cos, self._sin = (torch.from_numpy(table[0]) for table in model.hires_rotary(image.begin))
        self._tokens = [torch.from_numpy(tokens) for tokens in page_tokens(g)]

    @torch.no_grad()
    def run(self, ids: np.ndarray, page_budget: np.ndarray | int = 0, *, lengths: np.ndarray | None = None) -> Step:
        """See Decoder.run."""
        if ids.shape[1] > 1:
            return super().run(ids, page_budget, lengths=lengths)
        g, module, position = self.geometry, self._module, int(self.length[0])
        x = module.model.embed_tokens(torch.from_numpy(ids))[0]  # [1, hidden]
        turn = module.cos[position], module.sin[position]
        margins, budget = torch.from_numpy(self.image.margins), torch.full((1,), int(page_budget))
        begin, chosen = int(self.image.begin[0]), []
        for index, layer in enumerate(module.model.layers):
            attend, y = layer.self_attn, layer.input_layernorm(x)
            query, key, value = (
                project(y).view(-1, 1, g.head_dim) for project in (attend.q_proj, attend.k_proj, attend.v_proj)
            )
            self._key[index][0, :, position : position + 1] = rotary(key, *turn)
            self._value[index][0, :, position : position + 1] = value
            keys, values = (cache[index][0, :, : position + 1] for cache in (self._key, self._value))
            query = rotary(query, *turn)
            scores = (query @ keys.transpose(1, 2)) / math.sqrt(g.head_dim)
            weights = scores.softmax(-1)
            listed: list[int] = []
            if layer.reads:
                pages, count = chosen[-1]
                listed = pages[0, : int(count[0])].tolist()
            if listed:
                tokens = torch.cat([self._tokens[page] for page in listed])
                high_key, high_value = self._project(index, tokens)
                high = (query @ high_key.transpose(1, 2)) / math.sqrt(g.head_dim)
                joint = torch.cat((scores, high), -1).softmax(-1)
                context = joint @ torch.cat((values, high_value), 1)
            else:
                context = weights @ values
            x = x + attend.o_proj(context.reshape(1, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if index in g.selecting_layers:
                map = weights[:, 0, begin : begin + g.image_tokens].sum(0).view(1, g.grid, g.grid)
                chosen.append(select_pages(map, margins, budget, g.grid, g.cells, g.threshold))
        logits = module.lm_head(module.model.norm(x)).float()
        self.length = self.length + 1
        pages, count = (torch.stack(tensors, 1).numpy() for tensors in zip(*chosen, strict=True))
        return Step(logits.numpy, logits.argmax(-1).numpy(), pages, count)

    def _project(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attend, features = self._projector[str(layer)].self_attn, self._hires[tokens]
        key, value = (
            project(features).view(len(tokens), -1, self.geometry.head_dim).transpose(0, 1)
            for project in (attend.k_proj_hd, attend.v_proj_hd)
        )
        return rotary(key, self._cos[tokens], self._sin[tokens]), value
