"""Trains projector, decoder and hi-res projections on features of the frozen tower.

One pass computes what inference does step by step: only the positions that predict an answer token read pages, each
those its own attention map selects, and the keys and values they leave behind carry what they have read.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from export.default_model.model import GEOMETRY
from export.default_model.packing import READS, Batch, Encoded, pack, prefix_ids
from export.default_model.questions import KINDS
from export.default_model.scenes import COLOURS, SHAPES
from export.default_model.train_vision import Bfloat16
from export.network.decoder import FlexDecoder, PageProjector
from export.network.vision import projector
from plugins.cached_attention.reference import rotary
from plugins.select_pages.reference import select_pages

logger = logging.getLogger(__name__)
HeldOut = tuple[Tensor, Tensor, list[Any], Tensor]  # low, high, things, sizes, as `check` takes them
G = GEOMETRY
SCENES, QUESTIONS = 8, 9  # of a step
LEARNING_RATE, DECAY = 1.5e-3, 0.02
# How often an answer token reads no pages, those its maps select, all, or its own and the right one.
MODES = {"none": 0.05, "own": 0.50, "all": 0.30, "helped": 0.15}
WEIGHTS = {"answer": 1.0, "map": 0.15, "read": 0.15, "words": 0.1, "asked": 0.2, "spread": 0.3}


class Student(nn.Module):
    """The part of the model that is trained here; parameter names below `decoder` and `pages` are the official ones."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = projector(G.vision.hidden, G)
        self.decoder, self.pages = FlexDecoder(G), PageProjector(G)
        # Training aids: what the question asks for must be readable where the first selection is made.
        self.asked = nn.ModuleList([nn.Linear(G.hidden, len(COLOURS)), nn.Linear(G.hidden, len(SHAPES))])
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
        mix = torch.linalg.qr(torch.randn(G.hidden, len(rows), generator=generator))[0]
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
    student: Student,
    low: Tensor,
    high: Tensor,
    sides: Tensor,
    batch: Batch,
    prefix: Tensor,
    modes: Tensor,
    threshold: int,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Whitened features low [S, 144, W] and high [S, 1296, W] (row-major), margins [S, 2], modes [S, Q, READS] (index
    into MODES). Returns logits [S, Q, READS, vocab], auxiliary losses, and the mean of pages selected per layer.
    """
    decoder, pages = student.decoder, student.pages
    scenes, questions, length = batch.ids.shape
    kind = low.dtype
    image = student.projector(low)
    begin = len(prefix)
    first = torch.cat((decoder.model.embed_tokens(prefix).expand(scenes, -1, -1), image), 1)
    x, y = first, decoder.model.embed_tokens(batch.ids)  # prefix [S, P, D], questions [S, Q, L, D]
    span = first.shape[1]
    cos, sin = decoder.cos, decoder.sin
    ahead, after = (cos[:span], sin[:span]), (cos[span : span + length], sin[span : span + length])
    features = student.projector(high)
    hires_turn = tuple(table[:, None] for table in pages.hires_rotary(torch.tensor([begin])))
    row = torch.arange(G.hires_side) * G.cells // G.hires_side
    page_of = (row[:, None] * G.cells + row).flatten()  # [1296]
    causal = torch.ones(span, span, dtype=torch.bool).tril()
    own = torch.ones(length, length, dtype=torch.bool).tril()
    at = batch.where[..., None]  # [S, Q, R, 1]
    asked = batch.target >= 0
    token = (batch.target.clamp(min=0) // 36 // 3) * 12 + batch.target.clamp(min=0) % 36 // 3
    live = batch.answer >= 0
    losses: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS if name != "answer"}
    counts: list[Tensor] = []
    visible: Tensor | None = None  # [S, Q, R, 81] pages each reading position sees

    for index, layer in enumerate(decoder.model.layers):
        attend = layer.self_attn
        nx, ny = layer.input_layernorm(x), layer.input_layernorm(y)
        scale = 1 / math.sqrt(G.head_dim)
        if index == G.start_layer:
            here = ny.gather(2, at.expand(-1, -1, -1, G.hidden)).flatten(0, 2)
            for probe, label in zip(student.asked, batch.named.flatten(0, 2).T, strict=True):
                losses["asked"].append(F.cross_entropy(probe(here).float(), label, ignore_index=-1))
        qx, kx = (rotary(_heads(part(nx)), *ahead).to(kind) for part in (attend.q_proj, attend.k_proj))
        qy, ky = (rotary(_heads(part(ny)), *after).to(kind) for part in (attend.q_proj, attend.k_proj))
        vx, vy = _heads(attend.v_proj(nx)), _heads(attend.v_proj(ny))
        cx = F.scaled_dot_product_attention(qx, kx, vx, attn_mask=causal)
        x = x + attend.o_proj(cx.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))

        to_prefix = torch.einsum("sqhld,shpd->sqhlp", qy, kx).float() * scale
        to_own = (torch.einsum("sqhld,sqhmd->sqhlm", qy, ky).float() * scale).masked_fill(~own, -1e4)
        scores = torch.cat((to_prefix, to_own), -1)  # [S, Q, H, L, P + L]
        weights = scores.softmax(-1)
        parts = weights.to(kind).split([span, length], -1)
        cy = torch.einsum("sqhlp,shpd->sqhld", parts[0], vx) + torch.einsum("sqhlm,sqhmd->sqhld", parts[1], vy)
        reading = weights.transpose(2, 3).gather(2, at[..., None].expand(-1, -1, -1, G.heads, span + length))

        if index == 1:  # one head finds the colour, another the shape the answer is about
            for head in range(2):
                place = batch.words[..., head]
                mass = reading[..., head, span:].gather(-1, place.clamp(min=0)[..., None])[..., 0]
                losses["words"].append(_mean(-(mass + 1e-5).log(), place >= 0))
        if layer.reads:
            far = pages.model.layers[str(index)].self_attn
            store = rotary(_heads(far.k_proj_hd(features)), *hires_turn).to(kind), _heads(far.v_proj_hd(features))
            cy, high_weights = _read_pages(cy, qy, scores, store, visible[..., page_of], batch)
            if index < G.layers - 1:
                goal = batch.target.clamp(min=0).flatten(1)[:, None, :, None].expand(-1, G.heads, -1, 1)
                mass = high_weights.gather(-1, goal)[..., 0].mean(1).unflatten(1, (questions, READS))
                seen = visible.gather(-1, page_of[batch.target.clamp(min=0)][..., None])[..., 0]
                losses["read"].append(_mean(-(mass + 1e-4).log(), asked & seen))
        y = y + attend.o_proj(cy.transpose(2, 3).flatten(3))
        y = y + layer.mlp(layer.post_attention_layernorm(y))

        if G.start_layer <= index < G.layers - 1:
            map = reading[..., begin : begin + G.image_tokens].sum(-2)  # [S, Q, R, 144]
            share = map / map.sum(-1, keepdim=True)
            losses["map"].append(_mean(-(share.gather(-1, token[..., None])[..., 0] + 1e-5).log(), asked))
            top = map.amax(-1, keepdim=True).detach()
            spread = torch.sigmoid((map / (top + 1e-6) * 255 - 80) / 20).sum(-1)
            losses["spread"].append(_mean(spread / G.image_tokens, live))
            visible, count = _visible(map.detach(), sides, batch, modes, threshold, page_of)
            counts.append(count[live & (modes == 1)].float())
    y = decoder.model.norm(y.gather(2, at.expand(-1, -1, -1, G.hidden)))
    logits = decoder.lm_head(y).float()
    return logits, {name: sum(parts) / len(parts) for name, parts in losses.items()}, torch.cat(counts).mean()


def _heads(z: Tensor) -> Tensor:
    """[..., T, D] -> [..., H, T, hd]."""
    return z.unflatten(-1, (-1, G.head_dim)).transpose(-2, -3)


def _read_pages(
    context: Tensor, query: Tensor, scores: Tensor, store: tuple[Tensor, Tensor], visible: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Replace the context of the reading positions by that of one softmax over ordinary and visible hi-res keys.

    context, query [S, Q, H, L, hd]; scores [S, Q, H, L, keys]: those of the ordinary keys; store: hi-res keys and
    values [S, H, 1296, hd]; visible [S, Q, READS, 1296]. Returns the context, and the hi-res weights
    [S, H, Q * READS, 1296].
    """
    questions, length = batch.ids.shape[1:]

    def at_reads(z: Tensor) -> Tensor:  # [S, Q, H, L, X] -> [S, H, Q * READS, X]
        where = batch.where[..., None, None].expand(-1, -1, -1, G.heads, z.shape[-1])
        return z.transpose(2, 3).gather(2, where).flatten(1, 2).transpose(1, 2)

    high = (at_reads(query) @ store[0].transpose(-1, -2)).float() / math.sqrt(G.head_dim)
    high = high.masked_fill(~visible.flatten(1, 2)[:, None], -1e4)
    ordinary = at_reads(scores).logsumexp(-1, keepdim=True)  # all ordinary keys as one
    share, weights = torch.cat((ordinary, high), -1).softmax(-1).split([1, high.shape[-1]], -1)
    merged = (share * at_reads(context).float()).to(context.dtype) + weights.to(context.dtype) @ store[1]
    merged = merged.transpose(1, 2).unflatten(1, (questions, READS))  # [S, Q, READS, H, hd]
    # What lies behind the end of an answer is written to the last position, which nothing reads.
    where = batch.where.where(batch.answer >= 0, length - 1)[..., None, None].expand_as(merged)
    return context.transpose(2, 3).scatter(2, where, merged).transpose(2, 3), weights


def _visible(
    map: Tensor, sides: Tensor, batch: Batch, modes: Tensor, threshold: int, page_of: Tensor
) -> tuple[Tensor, Tensor]:
    """What the next layer's reading positions see: bool [S, Q, READS, pages], and how many pages their maps select."""
    each = map.shape[1] * map.shape[2]
    flat = map.reshape(-1, G.grid, G.grid).float()
    everything = torch.full((len(flat),), G.pages)
    order, count = select_pages(flat, sides.repeat_interleave(each, 0), everything, G.grid, G.cells, threshold)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(G.pages).expand_as(order))
    chosen = (rank < count[:, None]).unflatten(0, map.shape[:3])
    right = F.one_hot(page_of[batch.target.clamp(min=0)], G.pages).bool() & (batch.target >= 0)[..., None]
    mode = modes[..., None]
    visible = (chosen & (mode == 1)) | (mode == 2) | ((chosen | right) & (mode == 3))
    return visible, count.unflatten(0, map.shape[:3])


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` where `where` holds; 0 if nowhere."""
    return (values * where).sum() / where.sum().clamp(min=1)


def train(
    low: Tensor, high: Tensor, things: list, sizes: Tensor, tokenizer: Tokenizer, steps: int, *, whitening: Whitening,
    directions: Tensor, validation: HeldOut, reads: bool = True, seed: int = 0, log: int = 200,
) -> tuple[Student, dict[str, float]]:  # fmt: skip
    """A trained student, in float32 and for raw features, and what `check` says of it.

    `low`, `high` (also those of `validation`) are whitened. `reads=False`: the low-res baseline, which sees no page.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    student = Student()
    whitening.begin(student, directions, seed)
    trainer = Bfloat16(student, LEARNING_RATE, steps, DECAY)
    prefix = torch.tensor(prefix_ids(tokenizer))
    encoded: Encoded = {}
    started, recent = time.perf_counter(), []
    for step in range(steps):
        chosen = rng.integers(len(things), size=SCENES)
        batch = pack(rng, [things[index] for index in chosen], QUESTIONS, tokenizer, encoded)
        shares = list(MODES.values()) if reads else [1, 0, 0, 0]
        modes = torch.from_numpy(rng.choice(4, size=(SCENES, QUESTIONS, READS), p=shares))
        threshold = int(rng.integers(56, 150))
        index = torch.from_numpy(chosen)
        logits, losses, pages = run(
            student, low[index].bfloat16(), high[index].bfloat16(), sizes[index], batch, prefix, modes, threshold
        )
        answer = F.cross_entropy(logits.flatten(0, 2), batch.answer.flatten(), ignore_index=-100, label_smoothing=0.01)
        fade = 1.0 if step < 0.5 * steps else 0.5
        total = WEIGHTS["answer"] * answer
        if reads:
            total = total + fade * sum(WEIGHTS[name] * loss for name, loss in losses.items())
        else:
            total = total + fade * sum(WEIGHTS[name] * losses[name] for name in ("map", "words", "asked"))
        trainer.step(total)
        recent.append([float(answer.detach()), *(float(loss.detach()) for loss in losses.values()), float(pages)])
        if (step + 1) % log == 0 or step + 1 == steps:
            means = np.mean(recent[-log:], 0)
            names = ["answer", *losses, "pages"]
            text = " ".join(f"{name} {value:.3f}" for name, value in zip(names, means, strict=True))
            found = check(student, *validation, tokenizer, mode=1 if reads else 0)
            text += " | " + " ".join(f"{name} {value:.3f}" for name, value in found.items())
            logger.info("decoder %d %s %.0f s", step + 1, text, time.perf_counter() - started)
    trainer.restore()
    found = check(student, *validation, tokenizer, mode=1 if reads else 0)
    whitening.fold_into(student)
    return student, found


@torch.no_grad()
def check(
    student: Student, low: Tensor, high: Tensor, things: list, sizes: Tensor, tokenizer: Tokenizer, *, mode: int,
    threshold: int = GEOMETRY.threshold,
) -> dict[str, float]:  # fmt: skip
    """Exact match per kind of question, and pages selected per reading layer and answer token.

    Answer tokens are forced, which equals greedy decoding where all are right.
    """
    rng = np.random.default_rng(0)
    encoded: Encoded = {}
    prefix = torch.tensor(prefix_ids(tokenizer))
    right: dict[int, list[bool]] = {}
    pages = []
    kind = student.decoder.lm_head.weight.dtype
    for start in range(0, len(things), SCENES):
        part = slice(start, start + SCENES)
        batch = pack(rng, things[part], QUESTIONS, tokenizer, encoded)
        modes = torch.full(batch.where.shape, mode)
        logits, _, count = run(
            student, low[part].to(kind), high[part].to(kind), sizes[part], batch, prefix, modes, threshold
        )
        good = ((logits.argmax(-1) == batch.answer) | (batch.answer < 0)).all(-1).flatten().tolist()
        for key, ok in zip(batch.kind.flatten().tolist(), good, strict=True):
            right.setdefault(key, []).append(ok)
        pages.append(float(count))
    found = {KINDS[key]: float(np.mean(values)) for key, values in sorted(right.items())}
    return found | ({"pages": float(np.mean(pages))} if mode == 1 else {})
