"""What is trained of the decoder side, and one pass that computes what inference does step by step.

Only the positions that predict a token of the last answer read pages, each those its own attention map selects, and the
keys and values they leave behind carry what they have read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from engines.bundle.pages import page_of_token
from export.default_model.learning import aids
from export.default_model.learning.packing import Batch, Reads
from export.default_model.model import GEOMETRY
from export.network.decoder import FlexDecoder, PageProjector
from export.network.vision import projector
from plugins.cached_attention.reference import rotary
from plugins.select_pages.reference import scores as scores_of_cells

G = GEOMETRY
SCALE, EMPTY = 1 / math.sqrt(G.head_dim), -1e4  # of scores; a score of what is not seen
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
    page_of = torch.from_numpy(page_of_token(G)).to(device)
    later = torch.ones(span, span, dtype=torch.bool, device=device).triu(1)  # keys that a row does not see
    later_said = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    reads = Reads.of(batch)
    modes = reads.of_entries(modes)
    counted = reads.there & (modes == MODES.index("own"))
    right = _right_pages(reads.of_entries(batch.parts), page_of)
    losses = aids.Losses(student.probes, batch, reads)
    counts: list[Tensor] = []
    visible: Tensor | None = None  # [S, V, 81] pages each reading position sees

    for index, layer in enumerate(decoder.model.layers):
        attend = layer.self_attn
        nx, ny = layer.input_layernorm(x), layer.input_layernorm(y)
        losses.hidden(index, nx[:, begin:], ny)
        qx, kx = (rotary(_heads(part(nx)), *ahead).to(kind) for part in (attend.q_proj, attend.k_proj))
        qy, ky = (rotary(_heads(part(ny)), *after).to(kind) for part in (attend.q_proj, attend.k_proj))
        qx, qy = qx * SCALE, qy * SCALE
        vx, vy = _heads(attend.v_proj(nx)), _heads(attend.v_proj(ny))
        cx = (qx @ kx.transpose(-1, -2)).masked_fill(later, EMPTY).softmax(-1) @ vx
        x = x + attend.o_proj(cx.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))

        # All conversations of a scene at once against its image: one product for all heads.
        near = (qy.transpose(1, 2).flatten(2, 3) @ kx.transpose(-1, -2)).unflatten(2, (questions, length))
        said = (qy @ ky.transpose(-1, -2)).masked_fill(later_said, EMPTY)
        near, said = torch.cat((near.transpose(1, 2), said), -1).softmax(-1).split([span, length], -1)
        cy = (near.transpose(1, 2).flatten(2, 3) @ vx).unflatten(2, (questions, length)).transpose(1, 2) + said @ vy
        cy = cy.transpose(2, 3)  # [S, Q, L, H, hd]
        losses.attention(index, partial(_rows, qy, kx, ky), span, begin)
        if index >= G.start_layer:
            query = reads.of_positions(qy.transpose(2, 3))[..., None, :]  # [S, V, H, 1, hd]
            scores = _scores(query, kx, reads.of_conversations(ky), reads.at[..., None])[..., 0, :]
        if layer.reads:
            far = pages.model.layers[str(index)].self_attn
            store = rotary(_heads(far.k_proj_hd(features)), *hires_turn).to(kind), _heads(far.v_proj_hd(features))
            assert visible is not None
            merged, high_weights = _read_pages(
                reads.of_positions(cy), query[..., 0, :], scores, store, visible[..., page_of]
            )
            cy = reads.put(cy, merged)
            if index < G.layers - 1:
                losses.reading(high_weights, visible, page_of)
        y = y + attend.o_proj(cy.flatten(3))
        y = y + layer.mlp(layer.post_attention_layernorm(y))

        if G.start_layer <= index < G.layers - 1:
            map = scores.softmax(-1)[..., begin : begin + G.image_tokens].sum(-2)  # [S, V, 144]
            losses.map(map)
            page_scores, flat = _page_scores(map, sides)
            losses.selection(page_scores, page_of)
            chosen = (page_scores * 255 > threshold) & ~flat
            visible = _visible(chosen, right, modes)
            counts.append((chosen.sum(-1) * counted).sum() / counted.sum())
    at = batch.where[..., None].expand(-1, -1, -1, G.hidden)
    logits = decoder.lm_head(decoder.model.norm(y.gather(2, at))).float()
    return logits, losses.means(), torch.stack(counts).mean()


def _heads(z: Tensor) -> Tensor:
    """[..., T, D] -> [..., H, T, hd]."""
    return z.unflatten(-1, (-1, G.head_dim)).transpose(-2, -3)


def _scores(query: Tensor, kx: Tensor, ky: Tensor, at: Tensor) -> Tensor:
    """Attention scores of rows before the softmax: query [S, Q, H, N, hd], scaled, which stands at `at` [S, Q, N] of
    its conversation, to keys of the prefix [S, H, P, hd] and of its conversation [S, Q, H, L, hd]. Float32
    [S, Q, H, N, P + L]."""
    questions, count = at.shape[1:]
    near = (query.transpose(1, 2).flatten(2, 3) @ kx.transpose(-1, -2)).unflatten(2, (questions, count))
    later = torch.arange(ky.shape[3], device=at.device) > at[..., None]
    said = (query @ ky.transpose(-1, -2)).masked_fill(later[:, :, None], EMPTY)
    return torch.cat((near.transpose(1, 2), said), -1).float()


def _rows(qy: Tensor, kx: Tensor, ky: Tensor, positions: Tensor) -> Tensor:
    """Attention of the rows at `positions` [S, Q, N] of each conversation: float32 [S, Q, H, N, P + L]."""
    index = positions[:, :, None, :, None].expand(-1, -1, G.heads, -1, G.head_dim)
    return _scores(qy.gather(3, index), kx, ky, positions).softmax(-1)


def _read_pages(
    context: Tensor, query: Tensor, scores: Tensor, store: tuple[Tensor, Tensor], visible: Tensor
) -> tuple[Tensor, Tensor]:
    """The context of the reading positions by one softmax over ordinary and visible hi-res keys.

    context: that of the ordinary keys; query, scaled: both [S, V, H, hd]; scores [S, V, H, keys]: those of the ordinary
    keys; store: hi-res keys and values [S, H, 1296, hd]; visible [S, V, 1296]. Returns the context, and the hi-res
    weights [S, H, V, 1296].
    """
    high = (query.transpose(1, 2) @ store[0].transpose(-1, -2)).masked_fill(~visible[:, None], EMPTY)
    ordinary = scores.logsumexp(-1).transpose(1, 2)[..., None]  # all ordinary keys as one
    share, weights = torch.cat((ordinary, high), -1).softmax(-1).split([1, high.shape[-1]], -1)  # float32
    merged = (share * context.transpose(1, 2).float()).to(context.dtype) + weights.to(context.dtype) @ store[1]
    return merged.transpose(1, 2), weights


def _page_scores(map: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the pages [S, V, 81] by maps [S, V, 144], and whether a map is flat [S, V, 1]."""
    margins = sides[:, None].expand(-1, map.shape[1], -1).flatten(0, 1)
    scores, flat = scores_of_cells(map.reshape(-1, G.grid, G.grid).float(), margins, G.grid, G.cells)
    return scores.unflatten(0, map.shape[:2]), flat.unflatten(0, map.shape[:2])


def _right_pages(parts: Tensor, page_of: Tensor) -> Tensor:
    """Pages where what is to be read stands: parts [S, V, PARTS] -> bool [S, V, 81]."""
    none = torch.zeros(*parts.shape[:2], G.pages, dtype=torch.bool, device=parts.device)
    right = none.scatter(-1, page_of[parts.clamp(min=0)], torch.ones_like(parts, dtype=torch.bool))
    return right & (parts[..., :1] >= 0)


def _visible(chosen: Tensor, right: Tensor, modes: Tensor) -> Tensor:
    """What the next layer's reading positions see, of the pages that their maps chose and the right ones: all bool
    [S, V, 81]; modes [S, V]."""
    mode = modes[..., None]
    return (chosen & (mode == 1)) | (mode == 2) | ((chosen | right) & (mode == 3))
