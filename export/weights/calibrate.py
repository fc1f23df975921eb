"""Runs the model on calibration data, layer by layer, and finds what to scale and to clip in each before rounding.

The PyTorch modules of the reference, in float32. One decoder layer is in memory at a time: it takes every request a
layer further, then its weights are searched (awq.py), then it goes; calibration_bytes counts what that needs.
Answer tokens are decoding steps, as in a real request: they read the pages that the layer below selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from math import prod
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from engines.bundle.geometry import Geometry
from engines.bundle.tensors import tensors_of_parts
from engines.errors import OptionError
from engines.memory import available_bytes
from engines.progress import progress
from engines.sizing.needs import size
from export.checkpoint.config import ModelConfig
from export.checkpoint.folder import Checkpoint
from export.network.parts import module_of
from export.network.reference import load
from export.weights.awq import Found, Search, best_clips, best_scales
from export.weights.calibration_data import Picture, Request, read_pictures, read_requests
from export.weights.folding import HEAD_GROUP, Folded, spread
from export.weights.scheme import Scheme
from plugins.select_pages.reference import select_pages

F32 = torch.float32
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT, MLP, DOWN = ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
# Linear layers that share an input, by their group of scales. AWQ does not clip q_proj and k_proj either: what counts
# of them is a product of both, in a softmax.
GROUPS = {"attention": ATTENTION, "output": OUTPUT, "mlp": MLP, "down": DOWN}
NOT_CLIPPED = ("q_proj", "k_proj", "k_proj_hd")
SEARCHED = 40_000_000  # floats of pieces of a weight in awq.py, tried with one scale or clip
OVERHEAD = 1_000_000_000  # Python, torch and their work space, bytes


@dataclass(frozen=True)
class Calibration:
    """What was found: scales by group (folding.py), clips by weight (uint8 indices into RATIOS), and the errors of
    each group before and after; `used`: what a manifest says of it."""

    scales: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Found] = field(default_factory=dict)
    used: dict[str, object] = field(default_factory=dict)

    def folded(self, checkpoint: Checkpoint, g: Geometry) -> Folded:
        """The checkpoint with the scales in it."""
        return Folded(checkpoint, g, self.scales)


def calibrate_on(
    data: Path, model: Path, config: ModelConfig, checkpoint: Checkpoint, scheme: Scheme, console: Console
) -> Calibration:
    """Read the data, see that memory suffices, calibrate with the defaults of Search, and print what was gained.

    `model`: the checkpoint's folder, `config`: its own, as the build adjusted it. Raises what read_requests,
    read_pictures and calibrate do, and OptionError where memory is short.
    """
    g, search = config.geometry, Search()
    requests = read_requests(data, model, config)
    images = len({request.image for request in requests})
    lengths = [len(request.ids) + len(request.answer) for request in requests]
    needed, available = calibration_bytes(g, scheme, images, lengths, search.rows), available_bytes()
    if needed > available:
        raise OptionError(
            f"calibration on {len(requests)} questions about {images} images needs {size(needed)} of memory, "
            f"this machine has {size(available)} free",
            fix="fewer images, or leave out --calibrate: rounding to nearest needs none of this",
        )
    pictures = read_pictures(requests, g)
    with progress(f"calibrating on {len(requests)} questions about {images} images", quiet=console.quiet) as advance:
        result = calibrate(checkpoint, g, scheme, requests, pictures, search, advance)
    changes = [found.after / found.before for found in result.found.values() if found.before > 0]
    console.print(
        f"calibrated: scaling leaves {100 * float(np.mean(changes or [1])):.0f} % of the layers' squared errors on "
        "this data, before clipping",
        soft_wrap=True,
    )
    result.used.update(examples=len(requests), images=images, **asdict(search))
    return result


def calibration_bytes(g: Geometry, scheme: Scheme, pictures: int, lengths: Sequence[int], rows: int) -> int:
    """Bytes that calibration on requests of `lengths` tokens about `pictures` images needs: the vision tower, then the
    embedding, then one decoder layer at a time, in float32; and through all of it the requests between two layers, the
    images' tiles and features, `rows` inputs of each linear layer, and how far to clip each block."""
    parts = tensors_of_parts(replace(g, lazy_pages=False, page_slots=None))
    layers: dict[str, int] = {}
    for name, shape in {**parts["pages"], **parts["decoder"]}.items():
        key = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        layers[key] = layers.get(key, 0) + prod(shape)
    vision = sum(map(prod, parts["vision"].values()))
    width = g.heads * g.head_dim
    features = pictures * (1 + g.zoom**2) * (3 * g.lowres**2 + g.image_tokens * g.hidden)
    between = sum(lengths) * g.hidden + rows * (3 * g.hidden + width + g.intermediate)
    inside = 2 * g.kv_heads * g.head_dim * g.hires_side**2 * 2 + 3 * g.heads * max(lengths) ** 2
    clips = sum(map(prod, scheme.tensors(g).values())) // scheme.block
    return 4 * (max(vision, *layers.values()) + features + between + inside + SEARCHED) + clips + OVERHEAD


@dataclass
class _State:
    """A request between two layers."""

    prompt: Tensor  # [1, S - 1, hidden]
    steps: list[Tensor]  # the last prompt token and the answer's: [1, 1, hidden] each
    selected: list[tuple[Tensor, ...]]  # pages [1, pages] and count [1] for each step
    kept: Tensor  # positions of the prompt whose activations are sampled
    kept_steps: Tensor


@dataclass(frozen=True)
class _Features:
    low: Tensor  # [1, T, hidden]
    high: Tensor  # [zoom * zoom, T, hidden]
    margins: Tensor  # [1, 2] int64


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    g: Geometry,
    scheme: Scheme,
    requests: Sequence[Request],
    pictures: Mapping[Path, Picture],
    search: Search,
    advance: Callable[[float], None] = lambda part: None,
) -> Calibration:
    """Scales and clips for rounding `checkpoint` under `scheme`. `advance`: told the part that is done, 0 .. 1.

    `pictures`: those of `requests`, by their files. Deterministic on one machine. Raises a FlexError for a tensor that
    cannot be read.
    """
    result = Calibration()
    requests = sorted(requests, key=lambda request: (str(request.image), request.begin))
    seen = _features(checkpoint, g, pictures)
    states = _states(checkpoint, g, requests, seen, search.rows)
    share = max(1, search.rows // len(seen))
    hires = torch.cat([_sample(each.high.flatten(0, 1), share) for each in seen.values()])
    # Lazy projection is the same network, and keys and values in 8 bits are nearly; the pages part has the projections
    # as linear layers.
    plain = replace(g, lazy_pages=False, int8_pages=False, int8_cache=False, page_slots=None)
    decoder, pages = (module_of(part, plain, F32) for part in ("decoder", "pages"))
    projections = dict(pages.model.layers)
    for index in range(g.layers):
        base, layer = f"model.layers.{index}.", decoder.model.layers[index]
        load(layer, checkpoint, F32, base)
        projection = projections.get(str(index))
        if projection is not None:
            load(projection, checkpoint, F32, base)
            pages.model.layers = nn.ModuleDict({str(index): projection})
        inputs = _advance(layer, pages if projection is not None else None, decoder, g, index, requests, seen, states)
        _search_layer(layer, base, inputs, g, scheme, search, result)
        if projection is not None and not g.lazy_pages:  # lazy bundles store the projections in float16
            weight = projection.self_attn.v_proj_hd.weight
            result.clips[f"{base}self_attn.v_proj_hd.weight"] = best_clips(weight, hires, torch.ones(g.hidden), scheme)
        decoder.model.layers[index] = nn.Identity()
        projections.pop(str(index), None)
        advance((index + 1) / g.layers)
    if scheme.head:
        load(decoder.model.norm, checkpoint, F32, "model.norm.")
        last = torch.cat([torch.cat((state.prompt[0, state.kept], *(x[0] for x in state.steps))) for state in states])
        weight = checkpoint.tensor("lm_head.weight").float()
        found = best_scales([weight], _sample(decoder.model.norm(last), search.rows), scheme, search)
        result.scales[HEAD_GROUP], result.found[HEAD_GROUP] = found.scales, found
    return result


def _search_layer(
    layer: nn.Module,
    base: str,
    inputs: dict[str, Tensor],
    g: Geometry,
    scheme: Scheme,
    search: Search,
    result: Calibration,
) -> None:
    """Add what is found for one layer. `inputs`: a sample [rows, K] of what enters each group."""
    for group, names in GROUPS.items():
        x = inputs[group]
        weights = [layer.get_submodule(name).weight for name in names]
        magnitude = None
        if group == "output":  # heads that share values share their scales
            shared = x.abs().mean(0).view(g.kv_heads, -1, g.head_dim).mean(1).flatten()
            magnitude = spread(shared, g)
        found = best_scales(weights, x, scheme, search, magnitude)
        scales = found.scales
        if group == "output":
            scales = scales.view(g.kv_heads, -1, g.head_dim)[:, 0].flatten()
        result.scales[f"{base}{group}"], result.found[f"{base}{group}"] = scales, found
        for name, weight in zip(names, weights, strict=True):
            if not name.endswith(NOT_CLIPPED):
                result.clips[f"{base}{name}.weight"] = best_clips(weight, x, found.scales, scheme)


def _features(checkpoint: Checkpoint, g: Geometry, pictures: Mapping[Path, Picture]) -> dict[Path, _Features]:
    encoder = load(module_of("vision", g, F32), checkpoint, F32)
    found = {}
    for path, picture in pictures.items():
        features = [encoder(torch.from_numpy(tile[None])) for tile in picture.tiles]  # one by one: less memory
        found[path] = _Features(features[0], torch.cat(features[1:]), torch.tensor([picture.margins]))
    return found


def _states(
    checkpoint: Checkpoint, g: Geometry, requests: Sequence[Request], pictures: dict[Path, _Features], rows: int
) -> list[_State]:
    """Embedded requests, and which of their positions are sampled: of each up to half decoding steps, then as many
    words as image tokens, which are far more."""
    embedding = checkpoint.tensor("model.embed_tokens.weight").float()
    rng, share = np.random.default_rng(0), max(4, rows // len(requests))
    states = []
    for request in requests:
        ids = torch.from_numpy(np.concatenate((request.ids, np.array(request.answer, np.int64))))
        image = pictures[request.image].low[0][(-1 - ids).clamp(min=0)]
        x = torch.where((ids < 0)[:, None], image, embedding[ids.clamp(min=0)])[None]
        split = len(request.ids) - 1
        steps = list(x[:, split:].split(1, dim=1))
        kept_steps = _some(rng, np.arange(len(steps)), share // 2)
        left = share - len(kept_steps)
        words = _some(rng, np.flatnonzero(request.ids[:split] >= 0), left // 2)
        patches = _some(rng, np.flatnonzero(request.ids[:split] < 0), left - len(words))
        kept = torch.cat((words, patches))
        nothing = torch.zeros(1, g.pages, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        states.append(_State(x[:, :split], steps, [nothing] * len(steps), kept, kept_steps))
    return states


def _some(rng: np.random.Generator, positions: np.ndarray, count: int) -> Tensor:
    return torch.from_numpy(np.sort(rng.choice(positions, min(count, len(positions)), replace=False)))


def _sample(x: Tensor, rows: int) -> Tensor:
    """`rows` of [n, K], evenly spaced."""
    return x[torch.linspace(0, len(x) - 1, min(rows, len(x))).long()]


def _advance(
    layer: nn.Module,
    pages: nn.Module | None,
    decoder: nn.Module,
    g: Geometry,
    index: int,
    requests: Sequence[Request],
    pictures: dict[Path, _Features],
    states: Sequence[_State],
) -> dict[str, Tensor]:
    """Take every request through one layer; returns a sample [rows, K] of what entered each group of GROUPS."""
    taken: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    kept = torch.zeros(0, dtype=torch.int64)  # positions that the hooks take

    def hook(group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: taken[group].append(inputs[0][0, kept])

    hooks = [layer.get_submodule(names[0]).register_forward_pre_hook(hook(group)) for group, names in GROUPS.items()]
    for (path, begin), pairs in _by_image(requests, states):
        image_begin, picture = torch.tensor([begin]), pictures[path]
        stored: tuple[Tensor, ...] = ()
        if pages is not None:
            (key,), (value,) = pages(picture.high, image_begin)
            stored = key, value, decoder.page_lengths
        for state in pairs:
            length = state.prompt.shape[1]
            cache = tuple(torch.zeros(1, g.kv_heads, length + len(state.steps), g.head_dim) for _ in range(2))
            positions = torch.arange(length + len(state.steps))[None]
            shared = decoder.cos, decoder.sin, image_begin
            nothing = (torch.zeros_like(state.selected[0][0]), torch.zeros_like(state.selected[0][1]))
            kept = state.kept
            before = (positions[:, :length], *shared)
            state.prompt, cache, _ = layer(state.prompt, cache, before, (*stored, *nothing) if stored else ())
            for step, selected in enumerate(state.selected):
                kept = torch.zeros(int(step in state.kept_steps), dtype=torch.int64)
                at = (positions[:, length + step, None], *shared)
                read = (*stored, *selected) if stored else ()
                state.steps[step], cache, map = layer(state.steps[step], cache, at, read)
                if index in g.selecting_layers:
                    all_pages = torch.tensor([g.pages])
                    state.selected[step] = select_pages(map, picture.margins, all_pages, g.grid, g.cells, g.threshold)
    for handle in hooks:
        handle.remove()
    return {group: torch.cat(rows) for group, rows in taken.items()}


def _by_image(requests: Sequence[Request], states: Iterable[_State]) -> Iterator[tuple[tuple[Path, int], list[_State]]]:
    """Requests whose hi-res pages are the same, one after the other."""
    pairs = zip(requests, states, strict=True)
    for key, group in groupby(pairs, key=lambda pair: (pair[0].image, pair[0].begin)):
        yield key, [state for _, state in group]
