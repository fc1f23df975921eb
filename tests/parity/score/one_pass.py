"""The official V* script's way, in float64: one pass over prompt and answer, as in training, for the losses.

There the rows that predict a token of the answer read pages, each its own, chosen by its own map in the layer before,
and what later rows see of them has that in it. All others are plain.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.official import Official


class OnePass(Official):
    """One prompt with one answer; a new object for each."""

    def log_likelihoods(self, prompt: list[int], answer: list[int]) -> Tensor:
        """[T] of each of the answer's tokens. `prompt`: -1-j is image feature j."""
        g, first, ids = self.g, len(prompt) - 1, [*prompt, *answer[:-1]]
        x = torch.stack([self.low[-1 - i] if i < 0 else self.weights["model.embed_tokens.weight"][i] for i in ids])
        masks: dict[int, Tensor] = {}
        for layer in range(g.layers):
            name = f"model.layers.{layer}"
            context, maps = self._all_rows(f"{name}.self_attn", self.norm(x, f"{name}.input_layernorm"), first, masks)
            x = x + self.linear(context, f"{name}.self_attn.o_proj")
            y = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(y, f"{name}.mlp.{half}_proj") for half in ("gate", "up"))
            x = x + self.linear(F.silu(gate) * up, f"{name}.mlp.down_proj")
            if layer >= g.start_layer:
                masks = {row: self._hires(self.select(map)) for row, map in maps.items()}
        logits = self.linear(self.norm(x[first:], "model.norm"), "lm_head")
        return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]

    def _hires(self, cells: Tensor) -> Tensor:
        side = (self.g.hires_side,) * 2
        return F.interpolate(cells[None, None].double(), size=side, mode="nearest").bool().flatten()

    def _all_rows(self, name: str, x: Tensor, first: int, masks: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """What attention gives each row, and the maps of those from `first` on."""
        g, rows = self.g, len(x)
        turn = [table[:rows] for table in self.tables]
        query, key = (self.turned(self.heads(x, f"{name}.{half}_proj"), *turn) for half in "qk")
        value = self.heads(x, f"{name}.v_proj")
        scores = self.weigh(query, key).masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf)
        weights = scores.softmax(-1)
        context, image = weights @ value, slice(self.begin, self.begin + g.image_tokens)
        maps = {row: weights[:, row, image].sum(0).view(g.grid, g.grid) for row in range(first, rows)}
        for row, mask in masks.items():
            if mask.any():
                hires = self.hires[mask]
                turn = [table[mask] for table in self.hires_tables]
                more = self.turned(self.heads(hires, f"{name}.k_proj_hd"), *turn)
                keys = torch.cat((key[:, : row + 1], more), 1)
                values = torch.cat((value[:, : row + 1], self.heads(hires, f"{name}.v_proj_hd")), 1)
                context[:, row] = (self.weigh(query[:, row : row + 1], keys).softmax(-1) @ values)[:, 0]
        return context.transpose(0, 1).flatten(1), maps
