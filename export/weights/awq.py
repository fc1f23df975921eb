"""Activation-aware rounding (AWQ, arXiv 2306.00978): which input channels of a linear layer to enlarge before its
weight is rounded to blocks of integers, and how far to clip a block, measured on inputs of that layer.

Own code, 120 lines, and not nvidia-modelopt or llm-compressor: both need the whole model in memory (llm-compressor a
Transformers model, and Transformers, datasets and accelerate with it); neither knows the two projections of hi-res
pages, whose values share a softmax with v_proj's, so that o_proj's scales must go into both; and both hand back a model
in their own format, not the blocks along K with float16 steps that are stored here.

A channel's scale is its mean magnitude to a power between 0 and 1, the same for all channels of an input. (Scales that
are powers of two would fold without a rounding, but those gained the default model nothing before q, k, v and the MLP.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.bundle.precision import Scheme
from export.weights.rounding import RATIOS, quantise, ratios_of, values_of

PIECE = 1 << 22  # values of a weight tried at once
QUIET = 1 / 64  # of the mean magnitude: a channel is taken to be no quieter, it may be louder in other pictures


@dataclass(frozen=True)
class Search:
    """What is tried, and on how much."""

    rows: int = 512  # activations kept of each linear layer's input, over all examples
    alphas: int = 20  # exponents between 0 (rounding to nearest) and 1
    outputs: int = 1024  # of a weight, computed for every exponent; whether the best one is one is told from all


@dataclass(frozen=True)
class Found:
    """Scales of the input channels, and the mean error of the layers' outputs as a share of these, squared."""

    scales: Tensor  # [K] float32
    before: float  # rounded to nearest
    after: float


def best_scales(
    weights: Sequence[Tensor], inputs: Tensor, scheme: Scheme, search: Search, magnitude: Tensor | None = None
) -> Found:
    """The scales [K] under which rounding `weights` (each [N, K], float32) changes their outputs for `inputs` [m, K]
    least. `magnitude` [K]: mean |x| of the channels; of `inputs` when not given."""
    magnitude = inputs.abs().mean(0) if magnitude is None else magnitude
    magnitude = magnitude.clamp(min=float(magnitude.mean()) * QUIET)
    few = [weight[torch.linspace(0, len(weight) - 1, min(search.outputs, len(weight))).long()] for weight in weights]
    none = torch.ones(inputs.shape[1])
    best, least = none, _error(few, inputs, none, scheme)
    for step in range(1, search.alphas + 1 if float(magnitude.max()) > 0 else 1):
        exponents = magnitude.log2() * (step / search.alphas)
        scales = torch.exp2(exponents - (exponents.max() + exponents.min()) / 2)  # around 1
        if (found := _error(few, inputs, scales, scheme)) < least:
            best, least = scales, found
    before = _error(weights, inputs, none, scheme)
    after = before if best is none else _error(weights, inputs, best, scheme)
    return Found(best, before, after) if after < before else Found(none, before, before)


def _error(weights: Sequence[Tensor], inputs: Tensor, scales: Tensor, scheme: Scheme) -> float:
    """Mean over `weights` of their outputs' squared error, as a share of the outputs squared."""
    shares = []
    for weight in weights:
        lost = sum(float(output_errors(piece, inputs, scales, scheme).sum()) for piece in _pieces(weight))
        shares.append(lost / (sum(float((inputs @ piece.t()).square().sum()) for piece in _pieces(weight)) or 1.0))
    return sum(shares) / len(shares)


def output_errors(
    weight: Tensor, inputs: Tensor, scales: Tensor, scheme: Scheme, ratios: Tensor | None = None
) -> Tensor:
    """Squared error [N] of each output of `weight` [N, K], scaled, rounded and scaled back, summed over `inputs`."""
    lost = weight - rounded(weight * scales, scheme, ratios) / scales
    return (inputs @ lost.t()).square().sum(0)


def rounded(values: Tensor, scheme: Scheme, ratios: Tensor | None = None) -> Tensor:
    """[n, K] float32 as it comes back from its integers."""
    return values_of(*quantise(values, scheme, ratios), scheme)


def best_clips(weight: Tensor, inputs: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Index into RATIOS for each block of `weight` [N, K]: uint8 [N, K / block].

    Each block for itself, by what it adds to the output for `inputs` [m, K]; a row whose output is not better for it in
    the end is not clipped at all.
    """
    blocks = (inputs / scales).unflatten(1, (-1, scheme.block)).transpose(0, 1)  # [blocks, m, block]
    gram = blocks.transpose(1, 2) @ blocks
    chosen = []
    for piece in _pieces(weight):
        scaled = piece * scales
        best = torch.zeros(len(piece), len(gram), dtype=torch.uint8)
        least = torch.full(best.shape, torch.inf)
        for index, ratio in enumerate(RATIOS):
            lost = scaled - rounded(scaled, scheme, torch.full(best.shape, ratio))
            lost = lost.unflatten(1, (-1, scheme.block)).transpose(0, 1)  # [blocks, n, block]
            error = ((lost @ gram) * lost).sum(2).t()
            best[error < least] = index
            least = torch.minimum(least, error)
        plain = output_errors(piece, inputs, scales, scheme)
        clipped = output_errors(piece, inputs, scales, scheme, ratios_of(best))
        best[clipped >= plain] = 0
        chosen.append(best)
    return torch.cat(chosen)


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(max(1, PIECE // weight.shape[1]))
