"""What is trained of the decoder side, and one pass that computes what inference does step by step.

Only the positions that predict a token of the last answer read pages, each those its own attention map selects, and the
keys and values they leave behind carry what they have read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.default_model.learning import aids
from export.default_model.learning.packing import Batch
from export.default_model.model import GEOMETRY
from export.network.decoder import FlexDecoder, PageProjector
from export.network.vision import projector
from plugins.cached_attention.reference import rotary
from plugins.select_pages.reference import scores as scores_of_cells

G = GEOMETRY
MODES = ("none", "own", "all", "helped")  # pages an answer token sees: its own selection, or that and the right ones


class Student(nn.Module):
    """The part of the model that is trained here; parameter names below `decoder` and `pages` are the official ones."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = projector(G.vision.hidden, G)
        self.decoder, self.pages = FlexDecoder(G), PageProjector(G)
        self.probes = aids.probes(G.hidden)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    parameter, std=0.04 if last else 0.02 if "embed" in name else parameter.shape[1] ** -0.5 * 0.8
                )
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)


@dataclass(frozen=True)
class Whitening:
    """Features made uncorrelated with variance 1, in which every direction learns at the same pace."""

    mean: Tensor  # [W]
    matrix: Tensor  # [W, W]

    @classmethod
    def of(cls, features: Tensor) -> Whitening:
        """From float32 features [N, W]."""
        mean = features.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((features - mean).T))
        return cls(mean, vectors @ torch.diag((values + 1e-6 * values.sum()).rsqrt()) @ vectors.T)

    def __call__(self, features: Tensor) -> Tensor:
        """[..., W] float32 -> the same, whitened."""
        return (features - self.mean) @ self.matrix

    def begin(self, student: Student, directions: Tensor, seed: int) -> None:
        """Let the projector start from `directions` [D, W] of the raw features, mixed at random."""
        rows = torch.linalg.solve(self.matrix, directions.T).T
        rows = rows / rows.norm(dim=1, keepdim=True)
        generator = torch.Generator().manual_seed(seed)
        mix = torch.linalg.qr(torch.randn(G.hidden, len(rows), generator=generator))[0].to(rows.device)
        with torch.no_grad():
            student.projector[0].weight.copy_(1.5 * mix @ rows)

    def fold_into(self, student: Student) -> None:
        """Make a projector that was trained on whitened features take raw ones."""
        first = student.projector[0]
        with torch.no_grad():
            weight = first.weight @ self.matrix
            first.bias.sub_(weight @ self.mean)
            first.weight.copy_(weight)


def run(
    student: Student, low: Tensor, high: Tensor, sides: Tensor, batch: Batch, prefix: Tensor, modes: Tensor,
    threshold: Tensor | int, gap: Tensor | int = 0,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:  # fmt: skip
    """Whitened features low [S, 144, W] and high [S, 1296, W] (row-major), margins [S, 2], modes [S, Q, R] (index
    into MODES). `gap`: so many positions lie between image and conversation, as if more had been said. Returns logits
    [S, Q, R, vocab], the losses of the aids, and the mean of pages selected per layer.
    """
    decoder, pages = student.decoder, student.pages
    scenes, questions, length = batch.ids.shape
    kind, device = low.dtype, low.device
    image = student.projector(low)
    begin = len(prefix)
    first = torch.cat((decoder.model.embed_tokens(prefix).expand(scenes, -1, -1), image), 1)
    x, y = first, decoder.model.embed_tokens(batch.ids)  # prefix [S, P, D], conversations [S, Q, L, D]
    span = first.shape[1]
    ahead = decoder.cos[:span], decoder.sin[:span]
    said_at = span + gap + torch.arange(length, device=device)
    after = decoder.cos[said_at], decoder.sin[said_at]
    features = student.projector(high)
    hires_turn = tuple(table[:, None] for table in pages.hires_rotary(torch.full((1,), begin, device=device)))
    row = torch.arange(G.hires_side, device=device) * G.cells // G.hires_side
    page_of = (row[:, None] * G.cells + row).flatten()  # [1296]
    causal = torch.ones(span, span, dtype=torch.bool, device=device).tril()
    own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    at = batch.where[..., None]  # [S, Q, R, 1]
    counted = (batch.answer >= 0) & (modes == MODES.index("own"))
    losses = aids.Losses(student.probes, batch)
    counts: list[Tensor] = []
    visible: Tensor | None = None  # [S, Q, R, 81] pages each reading position sees

    for index, layer in enumerate(decoder.model.layers):
        attend = layer.self_attn
        nx, ny = layer.input_layernorm(x), layer.input_layernorm(y)
        losses.hidden(index, nx[:, begin:], ny)
        scale = 1 / math.sqrt(G.head_dim)
        qx, kx = (rotary(_heads(part(nx)), *ahead).to(kind) for part in (attend.q_proj, attend.k_proj))
        qy, ky = (rotary(_heads(part(ny)), *after).to(kind) for part in (attend.q_proj, attend.k_proj))
        vx, vy = _heads(attend.v_proj(nx)), _heads(attend.v_proj(ny))
        cx = F.scaled_dot_product_attention(qx, kx, vx, attn_mask=causal)
        x = x + attend.o_proj(cx.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))

        # All conversations of a scene at once against its image: one product for all heads.
        to_prefix = (qy.transpose(1, 2).flatten(2, 3) @ kx.transpose(-1, -2)).unflatten(2, (questions, length))
        to_prefix = to_prefix.transpose(1, 2).float() * scale  # [S, Q, H, L, P]
        to_own = ((qy @ ky.transpose(-1, -2)).float() * scale).masked_fill(~own, -1e4)
        scores = torch.cat((to_prefix, to_own), -1)  # [S, Q, H, L, P + L]
        weights = scores.softmax(-1)
        near, said = weights.to(kind).split([span, length], -1)
        cy = (near.transpose(1, 2).flatten(2, 3) @ vx).unflatten(2, (questions, length)).transpose(1, 2) + said @ vy
        losses.attention(index, weights, span, begin)
        reading = weights.transpose(2, 3).gather(2, at[..., None].expand(-1, -1, -1, G.heads, span + length))
        if layer.reads:
            far = pages.model.layers[str(index)].self_attn
            store = rotary(_heads(far.k_proj_hd(features)), *hires_turn).to(kind), _heads(far.v_proj_hd(features))
            assert visible is not None
            cy, high_weights = _read_pages(cy, qy, scores, store, visible[..., page_of], batch)
            if index < G.layers - 1:
                losses.reading(high_weights, visible, page_of)
        y = y + attend.o_proj(cy.transpose(2, 3).flatten(3))
        y = y + layer.mlp(layer.post_attention_layernorm(y))

        if G.start_layer <= index < G.layers - 1:
            map = reading[..., begin : begin + G.image_tokens].sum(-2)  # [S, Q, R, 144]
            losses.map(map)
            visible, count = _visible(map.detach(), sides, batch, modes, threshold, page_of)
            counts.append((count * counted).sum() / counted.sum())
    y = decoder.model.norm(y.gather(2, at.expand(-1, -1, -1, G.hidden)))
    logits = decoder.lm_head(y).float()
    return logits, losses.means(), torch.stack(counts).mean()


def _heads(z: Tensor) -> Tensor:
    """[..., T, D] -> [..., H, T, hd]."""
    return z.unflatten(-1, (-1, G.head_dim)).transpose(-2, -3)


def _read_pages(
    context: Tensor, query: Tensor, scores: Tensor, store: tuple[Tensor, Tensor], visible: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Replace the context of the reading positions by that of one softmax over ordinary and visible hi-res keys.

    context, query [S, Q, H, L, hd]; scores [S, Q, H, L, keys]: those of the ordinary keys; store: hi-res keys and
    values [S, H, 1296, hd]; visible [S, Q, R, 1296]. Returns the context, and the hi-res weights
    [S, H, Q * R, 1296].
    """
    questions, length = batch.ids.shape[1:]
    reads = batch.where.shape[2]

    def at_reads(z: Tensor) -> Tensor:  # [S, Q, H, L, X] -> [S, H, Q * R, X]
        where = batch.where[..., None, None].expand(-1, -1, -1, G.heads, z.shape[-1])
        return z.transpose(2, 3).gather(2, where).flatten(1, 2).transpose(1, 2)

    high = (at_reads(query) @ store[0].transpose(-1, -2)).float() / math.sqrt(G.head_dim)
    high = high.masked_fill(~visible.flatten(1, 2)[:, None], -1e4)
    ordinary = at_reads(scores).logsumexp(-1, keepdim=True)  # all ordinary keys as one
    share, weights = torch.cat((ordinary, high), -1).softmax(-1).split([1, high.shape[-1]], -1)
    merged = (share * at_reads(context).float()).to(context.dtype) + weights.to(context.dtype) @ store[1]
    merged = merged.transpose(1, 2).unflatten(1, (questions, reads))  # [S, Q, R, H, hd]
    # What lies behind the end of an answer is written to the last position, which nothing reads.
    where = batch.where.where(batch.answer >= 0, length - 1)[..., None, None].expand_as(merged)
    return context.transpose(2, 3).scatter(2, where, merged).transpose(2, 3), weights


def _visible(
    map: Tensor, sides: Tensor, batch: Batch, modes: Tensor, threshold: Tensor | int, page_of: Tensor
) -> tuple[Tensor, Tensor]:
    """What the next layer's reading positions see: bool [S, Q, R, pages], and how many pages their maps select."""
    each = map.shape[1] * map.shape[2]
    flat = map.reshape(-1, G.grid, G.grid).float()
    score, nothing = scores_of_cells(flat, sides[:, None].expand(-1, each, -1).flatten(0, 1), G.grid, G.cells)
    chosen = ((score * 255 > threshold) & ~nothing).unflatten(0, map.shape[:3])
    right = torch.zeros_like(chosen).scatter(
        -1, page_of[batch.parts.clamp(min=0)], torch.ones_like(batch.parts, dtype=torch.bool)
    )
    right = right & (batch.parts[..., :1] >= 0)
    mode = modes[..., None]
    visible = (chosen & (mode == 1)) | (mode == 2) | ((chosen | right) & (mode == 3))
    return visible, chosen.sum(-1)
