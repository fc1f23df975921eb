"""Aids of the decoder's training: what attention should find, and what linear probes must be able to read where.

Answers alone teach too little for thousands of steps. Each aid asks for a piece of the way to them; at inference
nothing of this is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.default_model.asking.patterns import RELATIONS
from export.default_model.learning.packing import ABSENT, DIGITS, Batch, Reads
from export.default_model.model import GEOMETRY
from export.default_model.scenes import COLOURS, SHAPES

G = GEOMETRY
# `map`: selecting layers look at what the token is about; `selects`: so that no page is left out that has a part of the
# digit; `read`: page attention at all patches of the digit alike; `words`, `joined`: a head of layer 1 at the words
# that name it, or say what is compared, `found`: a head at the thing where its name ends; `asked`, `placed`, `seated`,
# `apart`, `tally`: colour and shape asked for, a named thing's place, an image token's place, on which side the second
# thing lies, how many there are; `counter`: two heads' weights on what is counted say how many there are, `even`: each
# thing has the same; `larger`: whether the first number is the larger one, `aligned`: heads at tens and units of both;
# `holds`: whether what is asked of sides or numbers is so, `relation`, `more`: what is asked, and which thing has more
# of it, which say nothing alone; `picked`: a head at the name of the thing that wins a comparison; `spread`: maps stay
# narrow.
WEIGHTS = {
    "map": 0.15, "selects": 0.6, "read": 0.25, "words": 0.1, "joined": 0.05, "found": 0.1, "asked": 0.2, "placed": 0.25,
    "seated": 0.15, "apart": 0.15, "tally": 0.15, "counter": 0.15, "even": 0.4, "holds": 0.15, "relation": 0.1,
    "more": 0.15, "picked": 0.1, "larger": 0.15, "aligned": 0.1, "spread": 0.3,
}  # fmt: skip
LOWRES_AIDS = tuple(name for name in WEIGHTS if name not in ("selects", "read", "spread"))
THRESHOLDS = 56, 150  # of the selection, of 255: training draws one from the first to before the second
WORDS, SEATED, ASKED, FOUND, COUNTER, ALIGNED = 1, 1, G.start_layer, (2, 3), 3, 3  # layers
PLACED, TALLY, APART, RELATION, LARGER, PICKED = 4, 5, 5, 5, 5, 6
HOLDS, SETTLED = 6, 4  # SETTLED: of comparisons, which may still have a name to find then
FINDER = 3  # the head of FOUND
# Heads of COUNTER, and for how many things, m, the first token of all counts there: of n things each has 1 / (n + m).
COUNTING = {1: 8, 2: 3}
# How far logarithms that should be equal may be apart before only which is larger counts, not how much; for totals so
# many things: half a thing too much is miscounted, however many there are.
EXACT, EXACT_TOTAL = 0.15, 0.3


def probes(width: int) -> nn.ModuleDict:
    """One linear map per question a probe asks."""
    sizes = {
        "colour": len(COLOURS), "shape": len(SHAPES), "row": G.grid, "column": G.grid, "there": 2,
        "own_row": G.grid, "own_column": G.grid, "right": 2, "below": 2, "count": 10, "holds": 2, "settled": 2,
        "larger": 2, "relation": len(RELATIONS), "more": 2,
    }  # fmt: skip
    return nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})


class Losses:
    """Collects the losses of one pass, layer by layer; each method has nothing to say in most layers."""

    def __init__(self, heads: nn.ModuleDict, batch: Batch, reads: Reads) -> None:
        self.probes, self.batch = heads, batch
        self.parts_of, self.goals = reads.of_entries(batch.parts), reads.of_entries(batch.goals)
        self.there = reads.there
        self.parts: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}

    def means(self) -> dict[str, Tensor]:
        """Each aid's mean over its layers."""
        return {name: sum(parts[1:], parts[0]) / len(parts) for name, parts in self.parts.items() if parts}

    def hidden(self, layer: int, image: Tensor, text: Tensor) -> None:
        """Normed inputs of a layer: image [S, 144, D], text [S, Q, L, D]."""
        batch = self.batch

        def at(positions: Tensor) -> Tensor:  # [S, Q, N] -> [S * Q * N, D]
            return text.gather(2, positions.clamp(min=0)[..., None].expand(-1, -1, -1, text.shape[-1])).flatten(0, 2)

        def deciding() -> Tensor:
            return at(batch.where.gather(2, batch.decided[..., None]))

        def ask(aid: str, name: str, hidden: Tensor, label: Tensor) -> None:
            self.parts[aid].append(_cross_entropy(self.probes[name](hidden).float(), label.flatten()))

        if layer == SEATED:
            place = torch.arange(G.image_tokens, device=image.device).expand(len(image), -1)
            ask("seated", "own_row", image.flatten(0, 1), place // G.grid)
            ask("seated", "own_column", image.flatten(0, 1), place % G.grid)
        if layer == ASKED:
            here = at(batch.where)
            ask("asked", "colour", here, batch.named[..., 0])
            ask("asked", "shape", here, batch.named[..., 1])
        if layer == PLACED:
            here = at(batch.ends)
            known = batch.ends >= 0
            there = known & (batch.places < ABSENT)
            ask("placed", "there", here, there.long().where(known, -1))
            ask("placed", "row", here, (batch.places // G.grid).where(there, -1))
            ask("placed", "column", here, (batch.places % G.grid).where(there, -1))
        if layer == TALLY:
            ask("tally", "count", at(batch.where.gather(2, batch.counted[..., None])), batch.count)
        if layer == APART:
            here = at(batch.ends[..., 1:])
            ask("apart", "right", here, batch.apart[..., 0])
            ask("apart", "below", here, batch.apart[..., 1])
        if layer == HOLDS:
            here = deciding()
            ask("holds", "holds", here, batch.holds)
            ask("more", "more", here, batch.more)
        if layer == SETTLED:
            ask("holds", "settled", deciding(), batch.holds.where(batch.larger >= 0, -1))
        if layer == RELATION:
            ask("relation", "relation", deciding(), batch.relation)
        if layer == LARGER:
            ask("larger", "larger", at(batch.where.gather(2, batch.compared[..., None])), batch.larger)

    def attention(self, layer: int, rows: Callable[[Tensor], Tensor], span: int, begin: int) -> None:
        """Ordinary attention. `rows`: positions [S, Q, N] -> [S, Q, H, N, span + L]; image token 0 is key `begin`."""
        batch = self.batch

        def mass(row: Tensor, keys: Tensor) -> Tensor:  # [S, Q, N, keys], [S, Q, N] -> [S, Q, N]
            return row.gather(-1, keys.clamp(min=0)[..., None])[..., 0]

        if layer == WORDS:  # one head finds the colour, another the shape the answer is about
            weights = rows(batch.where)
            for head in range(2):
                place = batch.words[..., head]
                found = mass(weights[:, :, head], span + place.clamp(min=0))
                self.parts["words"].append(_mean(-(found + 1e-5).log(), place >= 0))
            found = mass(rows(batch.ends.clamp(min=0))[:, :, 0], span + batch.joined.clamp(min=0))
            self.parts["joined"].append(_mean(-(found + 1e-5).log(), batch.joined >= 0))
        if layer in FOUND:  # what is not there is looked for at the first token of all
            key = torch.where(batch.places == ABSENT, 0, begin + batch.places)
            found = mass(rows(batch.ends.clamp(min=0))[:, :, FINDER], key)
            self.parts["found"].append(_mean(-(found + 1e-5).log(), batch.ends >= 0))

        if layer == ALIGNED:  # one head for each digit of two numbers
            weights = rows(batch.where.gather(2, batch.compared[..., None]))[:, :, :DIGITS, 0]  # [S, Q, DIGITS, keys]
            found = mass(weights, span + batch.digits.clamp(min=0))
            self.parts["aligned"].append(_mean(-(found + 1e-5).log(), batch.digits >= 0))

        if layer == PICKED:
            found = mass(rows(batch.where)[:, :, 0], span + batch.picked.clamp(min=0))
            self.parts["picked"].append(_mean(-(found + 1e-5).log(), batch.picked >= 0))

        if layer == COUNTER:
            index = batch.counted[..., None]
            weights = rows(batch.where.gather(2, index))[:, :, :, 0]  # [S, Q, H, keys]
            asked, there = batch.count >= 0, batch.near[..., 0] >= 0
            many = there.sum(-1)
            some = many.clamp(min=1)
            for head, rest_counts in COUNTING.items():
                row = weights[:, :, head]
                # A middle on the border of tokens is on either: what they have together is what the thing has.
                near = row.gather(-1, begin + batch.near.clamp(min=0).flatten(2)).view(batch.near.shape)
                each = ((near * (batch.near >= 0)).sum(-1) + 1e-5).log()  # [S, Q, GOALS]
                rest = (row[..., 0] + 1e-5).log()  # [S, Q]
                found = ((each * there).sum(-1) + rest_counts * rest) / (many + rest_counts)
                self.parts["counter"].append(_mean(-found, asked))
                # Cross entropy hardly minds a thing that weighs half as much again as others; who counts to nine must.
                share = rest - math.log(rest_counts)
                total = (row[..., begin:span].sum(-1) + 1e-5).log() - share - some.log()
                self.parts["even"].append(
                    _mean(_off(each - share[..., None], EXACT), there)
                    + 2 * _mean(_off(total, EXACT_TOTAL / some), many > 0)
                )

    def reading(self, weights: Tensor, visible: Tensor, page_of: Tensor) -> None:
        """Weights of hi-res keys [S, H, V, 1296], pages in view [S, V, 81]."""
        parts = self.parts_of.clamp(min=0)
        seen = visible.gather(-1, page_of[parts]) & (self.parts_of >= 0)  # [S, V, PARTS]
        mass = weights.gather(-1, parts[:, None].expand(-1, weights.shape[1], -1, -1)).mean(1)
        each = _mean(-(mass + 1e-4).log(), seen, -1)  # all alike: what two tiles saw of a digit tells more together
        self.parts["read"].append(_mean(each, seen.any(-1)))

    def selection(self, scores: Tensor, page_of: Tensor) -> None:
        """Scores of the pages in a selecting layer [S, V, 81]."""
        there = self.parts_of >= 0
        reached = scores.gather(-1, page_of[self.parts_of.clamp(min=0)]) + 1e-3
        # Nothing beyond the largest threshold: what lies there costs no page more. The page that is furthest from it
        # counts alone: attention that is unsure between two places has no reason of its own to select both.
        missing = (math.log(THRESHOLDS[1] / 255) - reached.log()).clamp(min=0) * there
        self.parts["selects"].append(_mean(missing.amax(-1), there[..., 0]))

    def map(self, map: Tensor) -> None:
        """Maps of a selecting layer [S, V, 144]."""
        share = map / map.sum(-1, keepdim=True)
        goals = self.goals >= 0
        found = share.gather(-1, self.goals.clamp(min=0))
        each = _mean(-(found + 1e-5).log(), goals, -1)
        self.parts["map"].append(_mean(each, goals[..., 0]))
        top = map.amax(-1, keepdim=True).detach()
        spread = torch.sigmoid((map / (top + 1e-6) * 255 - 80) / 20).sum(-1)
        few = self.goals[..., 1] < 0  # what is about many things may look at many
        self.parts["spread"].append(_mean(spread / G.image_tokens, self.there & few))


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over labels that are not -1; 0 if all are."""
    each = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
    return each / (label >= 0).sum().clamp(min=1)


def _off(difference: Tensor, exact: Tensor | float) -> Tensor:
    """Of logarithms of weights that should be equal: their squares, above `exact` (broadcast) no more than linear."""
    # `beta` of PyTorch's is one number for all.
    return exact * F.smooth_l1_loss(difference / exact, torch.zeros_like(difference), reduction="none")


def _mean(values: Tensor, where: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `where` holds; 0 if nowhere."""
    if dim is None:
        return (values * where).sum() / where.sum().clamp(min=1)
    return (values * where).sum(dim) / where.sum(dim).clamp(min=1)
