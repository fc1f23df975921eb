"""How much memory a configuration needs and how fast memory lets it decode: from shapes, before any work.

Every number that is not a shape is a named constant below, with where it comes from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod

from engines.backend import MAX_SLOTS, Opening
from engines.bundle.geometry import Geometry, pieces_of
from engines.bundle.kinds import BACKENDS, ONNXRUNTIME, TENSORRT, layers_of
from engines.bundle.manifest import Manifest
from engines.bundle.pages import page_size
from engines.bundle.precision import DEFAULT, PRECISIONS, Precision
from engines.bundle.tensors import APART, EMBEDDINGS, HEAD, MODEL, Coding, coding_of, sizes_of_blocks, tensors_of_parts
from engines.checks import require_integer
from engines.errors import OptionError
from engines.residency import RESIDENCIES, SHARED
from plugins.op import padded

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
TABLE_ENTRY = 8  # bytes of a number in a table of page slots, which has two for each page
TOKEN_SCALE = 4  # bytes of the float32 scale of a head of a token in an int8 page or cache
MAX_BATCH = 64

# Measured. Activations: what TensorRT-RTX 1.7 reports for a 7B slice is `_activations` to the byte for vision and
# pages; the decoder has 28 MB more, 34 with two rows, small models 10.
SCRATCH = 40_000_000
# Codes of the decoder's layers are unpacked inside their products; those of the projection of pages before the first
# product, all of an engine's. 7B's 46 matrices in one engine work in 4,613 MB, 6 bytes a weight, those of two layers in
# 479 MB (TensorRT-RTX 1.7 on the CPU machine, for SM 86, 89 and 120: docs/figures.md): so with codes every two layers
# are an engine.
PAGE_LAYERS = 2
# It works in what it would without codes, and in 0.7 to 1.4 bytes more for a weight: measured there, of three shapes.
UNPACKED = 1.5
ENGINE_CODE = 50_000_000  # of all parts: plans were 12 MB larger than their weights; plugins' kernels, and slack
HOST_PROCESS = 200_000_000  # Python, numpy, TensorRT's libraries: 152 MB resident
# ONNX Runtime 1.32 on an x86 CPU, random model of 59M weights: memory of its sessions over the bytes of the weights.
ORT_COPIES, ORT_COPIES_WIDENED, ORT_COPIES_QUANTISED = 1.2, 4.1, 2.0
ORT_PROCESS = 150_000_000  # 64 MB after its import, and arenas that grow in large steps
ORT_SCORES = 4  # float32 copies of the scores that attention holds at once: 3, and one for growing arenas

# Whole decode steps of 7B's shape on an H100 (docs/figures.md: products by cuBLAS, our kernels, one CUDA graph; 1,200
# tokens cached) with 0, 22 and 81 pages a layer read step_bytes at 63, 62 and 63 % of the bandwidth of its data sheet.
# Measured on no other board, nor in an engine.
SHARE_OF_BANDWIDTH = 0.62

# Assumed: no engine has run through TensorRT on a GPU yet. On the high side of what such programs usually take.
CUDA_CONTEXT = 400_000_000


@dataclass(frozen=True)
class Configuration:
    """What is to be built and asked. The geometry holds the context, how pages are projected, and how pages and cache
    are kept.

    block: one of the precision's block sizes, or of those of an int4 head or vision, None = the default; head, vision,
    embeddings: names of the precisions these are stored in, or MODEL; floats: weights that are not quantised though
    others of their kind are. batch: rows of a request, which engines of TensorRT are built for. slots:
    requests that share decode steps, a row each; more than one take engines of that batch. page_budget: None = every
    page. fixed: the checkpoint comes quantised, in no other precision. layers_per_engine: of the decoder's layers those
    that TensorRT builds an engine of, None = all. residency: that the bundle opens with, see engines.backend.Opening.
    """

    geometry: Geometry
    precision: Precision = DEFAULT
    block: int | None = None
    head: str = MODEL
    vision: str = MODEL
    embeddings: str = MODEL
    batch: int = 1
    slots: int = Opening.slots
    page_budget: int | None = None
    backend: str = TENSORRT
    plugins: bool = True
    floats: tuple[str, ...] = ()
    fixed: bool = False
    layers_per_engine: int | None = None
    residency: str = Manifest.residency

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise OptionError(f"backend {self.backend!r}", expected=f"one of {', '.join(BACKENDS)}")
        if self.residency not in RESIDENCIES:
            raise OptionError(f"residency {self.residency!r}", expected=f"one of {', '.join(RESIDENCIES)}")
        for kind in APART:
            if (named := getattr(self, kind)) != MODEL and named not in PRECISIONS:
                raise OptionError(f"{kind} {named!r}", expected=f"one of {', '.join(APART[kind])}")
        sizes = sizes_of_blocks(self.precision, self.head, self.vision)
        if self.block is not None and self.block not in sizes:
            raise OptionError(
                f"block {self.block!r} with {self.precision}", expected=f"one of {sizes}" if sizes else "None"
            )
        g, keep = self.geometry, partial(object.__setattr__, self)
        keep("batch", require_integer(self.batch, f"batch {self.batch!r}", 1, MAX_BATCH))
        most = MAX_SLOTS if self.backend == ONNXRUNTIME else MAX_BATCH
        keep("slots", require_integer(self.slots, f"slots {self.slots!r}", 1, most))
        if 1 < self.batch < self.slots:
            raise OptionError(
                f"--batch {self.batch} with --slots {self.slots}",
                expected="a row for each slot",
                fix=f"--batch {self.slots}, or leave --batch out",
            )
        budget = require_integer(self.page_budget, f"page budget {self.page_budget!r}", 0, g.pages, none="every page")
        keep("page_budget", budget)
        size = self.layers_per_engine
        keep("layers_per_engine", require_integer(size, f"layers per engine {size!r}", 1, none="all"))
        keep("geometry", replace(g, context=require_integer(g.context, f"context {g.context!r}", g.image_tokens + 1)))

    @property
    def coding(self) -> Coding:
        """Which weights are stored in codes, and how."""
        return coding_of(
            self.precision,
            self.block,
            self.backend,
            head=self.head,
            vision=self.vision,
            embeddings=self.embeddings,
            floats=self.floats,
        )

    @property
    def pages_read(self) -> int:
        """Pages a layer may read at most."""
        stored = self.geometry.stored_pages
        return stored if self.page_budget is None else min(self.page_budget, stored)

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return self.slots if self.slots > 1 else self.batch

    @property
    def views(self) -> int:
        """Images that are kept beside the rows of slots, which have copies: each request may be about its own."""
        return self.slots if self.slots > 1 else 0

    @property
    def takes_turns(self) -> bool:
        """Whether the parts that encode an image are closed before there is a cache. With several rows, which
        are slots at run time, others decode meanwhile."""
        return self.residency == SHARED and self.rows == 1

    @property
    def item(self) -> int:
        """Bytes of a value of the cache, the pages and the activations."""
        return 4 if self.backend == ONNXRUNTIME and self.precision.widened else self.precision.itemsize


@dataclass(frozen=True)
class Need:
    """Bytes something takes, and how they are counted."""

    name: str
    bytes: int
    how: str


def weight_bytes(c: Configuration) -> dict[str, int]:
    """Bytes of the file of weights of each part."""
    sizes: dict[str, int] = {}
    for part, tensors in _stored(c).items():
        offset = end = 0
        for _, pieces in sorted(tensors.items()):
            for piece in pieces:
                end = offset + piece
                offset = padded(end)
        sizes[part] = end
    return sizes


def engine_layers(c: Configuration, part: str) -> int | None:
    """Of how many layers of a part TensorRT builds an engine; None: the part is one engine."""
    if part == "decoder":
        return c.layers_per_engine
    coded = part == "pages" and any(len(pieces) > 1 for pieces in _stored(c)[part].values())
    return PAGE_LAYERS if coded else None


def engines_of(c: Configuration, part: str) -> tuple[tuple[int, int], ...]:
    """Layers, and bytes of weights, of each engine of a part: a decoder's first has the table of embeddings, too, its
    last what follows the layers."""
    layers = layers_of(part, c.geometry)
    if not layers:
        return ((0, weight_bytes(c)[part]),)
    bounds = pieces_of(layers, engine_layers(c, part))
    sizes, last = [0] * len(bounds), len(bounds) - 1
    for name, pieces in _stored(c)[part].items():
        layer = _LAYER.match(name)
        users = {(int(layer[1]) - layers.start) // (bounds[0][1] - layers.start)} if layer else {last}
        if name == EMBEDDINGS:
            users = {0, last} if c.geometry.tied_embeddings else {0}
        for index in users:
            sizes[index] += sum(map(padded, pieces))
    return tuple((end - begin, size) for (begin, end), size in zip(bounds, sizes, strict=True))


def handed_bytes(c: Configuration) -> int:
    """Bytes of the hidden states between the engines of a decoder, which take turns in two places."""
    g, rows = c.geometry, max(c.batch, c.slots)
    return min(len(engines_of(c, "decoder")) - 1, 2) * rows * g.context * g.hidden * c.item


def cache_bytes(c: Configuration) -> int:
    """Bytes of the key/value cache at the full context."""
    g = c.geometry
    return c.rows * g.layers * g.context * _token_bytes(c, g.int8_cache)


def store_bytes(c: Configuration) -> int:
    """Bytes of the keys and values of the hi-res pages: all of them, whatever the page budget, lazily projected or
    not, since any may be selected (TrtModel.project, OrtModel.project); or of as many as there are page slots, and
    their tables."""
    g = c.geometry
    layer = g.stored_pages * page_size(g) * _token_bytes(c, g.int8_pages)
    layer += 0 if g.page_slots is None else 2 * g.pages * TABLE_ENTRY
    return (c.rows + c.views) * len(g.reading_layers) * layer


def needs(c: Configuration, *, integrated: bool) -> tuple[Need, ...]:
    """What a request at the full context takes, or as many as there are slots, each about an image of its own; on a
    card (not `integrated`) of the card's own memory."""
    g, item, rows, views = c.geometry, c.item, c.rows, c.views
    weights = weight_bytes(c)
    ort = c.backend == ONNXRUNTIME
    held = _held(c) if ort else weights
    taken = g.image_tokens * g.hidden * item  # what a decoder takes of an image, beside the pages
    if g.lazy_pages:
        taken += g.pages * page_size(g) * (g.hidden * item + g.head_dim * 4)
    hires, pixels = g.hires_side**2 * g.hidden * item, (1 + g.zoom**2) * 3 * g.lowres**2 * 4
    image = (rows + views) * taken + rows * (hires + pixels + g.vocab * 4)
    scratch = _activations(c)
    if not ort:
        scratch["decoder"] += handed_bytes(c)
    own = 0 if ort else SCRATCH
    opened = _opened(c, held, scratch) if c.takes_turns else None
    if opened is not None:
        held, scratch = {"decoder": held["decoder"]}, {"decoder": scratch["decoder"]}
    work = (sum(scratch.values()) if ort else max(scratch.values())) + own
    if ort:
        runtime = Need("runtime", ORT_PROCESS, "Python, ONNX Runtime")
    else:
        what = "CUDA context (assumed), kernels" + (", Python, TensorRT" if integrated else "")
        runtime = Need("runtime", CUDA_CONTEXT + ENGINE_CODE + (HOST_PROCESS if integrated else 0), what)
    cached, kept = (", int8 and scales" if int8 else "" for int8 in (g.int8_cache, g.int8_pages))
    lazy = ", features by page (lazy)" if g.lazy_pages else ""
    projecting = " with the projection of pages" if g.lazy_pages else ""  # of the decoder, which is named last
    stored = f"all {g.pages} pages" if g.page_slots is None else f"{g.page_slots} page slots for {g.pages} pages"
    whose = f"{rows} slots and {views} images" if views else f"{rows}"
    return (
        Need(
            "weights",
            sum(held.values()),
            _list({part: weights[part] for part in held}) + projecting + (", and copies" if ort else ""),
        ),
        Need("KV cache", cache_bytes(c), f"{rows} x {g.context} tokens in {g.layers} layers{cached}"),
        Need("hi-res pages", store_bytes(c), f"{whose} x {stored} in {len(g.reading_layers)} layers{kept}"),
        Need("image, logits", image, f"{whose} x pixels, features{lazy}, logits"),
        Need("activations", work, ("" if ort or opened is not None else "largest of ") + _list(scratch)),
        runtime,
        *([opened] if opened is not None else []),
    )


def _opened(c: Configuration, held: dict[str, int], scratch: dict[str, int]) -> Need:
    """What an image takes while vision or the projection of its pages is open, beyond the cache that is made after it.
    A part that works in more than the decoder does has memory of its own. Of several engines that project pages one is
    open at a time (TrtModel.project)."""
    ort, store = c.backend == ONNXRUNTIME, {"vision": 0, "pages": store_bytes(c)}
    later, taken = store_bytes(c) + cache_bytes(c), {}
    for part in store:
        own = scratch[part] if ort else scratch[part] + SCRATCH if scratch[part] > scratch["decoder"] else 0
        taken[part] = (held[part] if ort else max(size for _, size in engines_of(c, part))) + own
    beyond = max(0, max(taken[part] + store[part] for part in store) - later)
    within = "" if beyond else ", in whose memory they fit"
    return Need("image parts", beyond, f"one after the other, before the cache{within}: {_list(taken)}")


def step_bytes(c: Configuration, tokens: int, pages: int) -> int:
    """Bytes a decode step of all rows must read at least: weights once, and of each row the cached tokens and the
    pages of every reading layer."""
    g, item = c.geometry, c.precision.itemsize
    decoder = weight_bytes(c)["decoder"]
    if not g.tied_embeddings:  # of the table, a step reads its tokens' rows
        table = sum(_stored(c)["decoder"][EMBEDDINGS])
        decoder -= table * (g.vocab - c.rows) // g.vocab
    if g.lazy_pages:  # read when a page is new, not in every step
        decoder -= 2 * len(g.reading_layers) * g.hidden * g.kv_heads * g.head_dim * item
    read = g.layers * tokens * _token_bytes(c, g.int8_cache)
    read += len(g.reading_layers) * pages * page_size(g) * _token_bytes(c, g.int8_pages)
    return decoder + c.rows * read


def speed(c: Configuration, bandwidth: int) -> tuple[float, float]:
    """Tokens per second of all rows, at most, if memory is all that costs time: at the full context with every allowed
    page read, and just after a short prompt with none. `bandwidth`: GB/s."""
    g = c.geometry
    slow, fast = step_bytes(c, g.context, c.pages_read), step_bytes(c, min(g.context, g.image_tokens + 64), 0)
    return c.rows * bandwidth * 1e9 / slow, c.rows * bandwidth * 1e9 / fast


def size(count: float) -> str:
    """Bytes for people: 13.5 GB."""
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= unit or unit == 1e3
    )
    digits = 1 if count < 100 * unit else 0
    return f"{count / unit:.{digits}f} {name}"


def _stored(c: Configuration) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Bytes of the tensors of each part as they are stored: of their values, and of their scales if they are
    quantised."""
    g = replace(
        c.geometry, context=0, page_slots=None, int8_pages=False, int8_cache=False
    )  # what changes nothing of them
    return _pieces(g, c.coding, c.precision.itemsize)


@lru_cache(maxsize=64)  # asked again and again by who looks for what fits
def _pieces(g: Geometry, coding: Coding, item: int) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    def pieces(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        scheme = coding.of(name, g)
        return (prod(shape) * item,) if scheme is None else scheme.pieces(shape)

    parts = tensors_of_parts(g).items()
    return {part: {name: pieces(name, shape) for name, shape in tensors.items()} for part, tensors in parts}


def _held(c: Configuration) -> dict[str, int]:
    """Bytes of the weights of each part as ONNX Runtime holds them."""
    held = {}
    for part, tensors in _stored(c).items():
        cast = part == "vision" and c.residency == SHARED  # where it is read (OrtModel._folds)
        total = 0.0
        for name, pieces in tensors.items():
            rows = name == EMBEDDINGS and not c.geometry.tied_embeddings  # read as they are stored
            others = ORT_COPIES_WIDENED if c.precision.widened and not (rows or cast) else ORT_COPIES
            codes = 1 if rows else ORT_COPIES_QUANTISED
            total += sum(pieces) * (codes if len(pieces) > 1 else others)
        held[part] = int(total)
    return held


def _activations(c: Configuration) -> dict[str, int]:
    """Bytes of work space of each part at its largest: every hi-res tile at once, every page, a prefill of the full
    context. Engines reserve it for all rows they are built for. On ONNX Runtime requests of several slots are encoded
    side by side, each by its own thread; what is prefilled together is no more than one full context, and a chunk
    where image parts take turns (OrtModel)."""
    g, v, ort = c.geometry, c.geometry.vision, c.backend == ONNXRUNTIME
    images = max(c.batch, c.slots)
    rows = c.batch if ort else images
    item = 4 if ort else c.item  # its CPU computes float16 in float32
    tiles, tokens, hires = images * g.zoom**2, g.image_tokens + 1, images * g.hires_side**2
    vision = tiles * tokens * (4 * v.hidden + 2 * v.intermediate) * item
    floats = 4 if g.int8_pages else 3  # of each key or value, in float32: int8 ones are rounded from them
    pages = hires * (g.hidden * item + g.kv_heads * g.head_dim * (item + 4 * floats) + g.head_dim * 8)
    if g.lazy_pages:
        pages = hires * g.head_dim * 32
    # The MLP's, which takes more than attention does, a prompt's over an int8 cache, made float for it, too.
    prompt = min(g.context, Opening.prefill_chunk) if ort and c.residency == SHARED else g.context
    decoder = rows * prompt * 3 * (g.intermediate + g.hidden) * item
    if ort or not c.plugins:  # no kernel of ours: keys and values laid out again, the last query in float32
        decoder += rows * g.context * g.heads * g.head_dim * (2 * item + 4)
    if ort:
        vision += ORT_SCORES * tiles * v.heads * tokens**2 * 4
        decoder += ORT_SCORES * rows * g.heads * prompt * g.context * 4
    else:
        pages += int(UNPACKED * _page_codes(c))
        coded_head = len(_stored(c)["decoder"].get(HEAD, ())) > 1
        decoder += coded_head * g.vocab * g.hidden * item  # unpacked to that, beside the rest: measured, as UNPACKED
    return {"vision": vision, "pages": pages, "decoder": decoder}


def _page_codes(c: Configuration) -> int:
    """Weights in codes of the engine of pages that has most."""
    g, first = c.geometry, c.geometry.reading_layers.start
    engines = Counter(
        (int(layer[1]) - first) // PAGE_LAYERS
        for name, pieces in _stored(c)["pages"].items()
        if len(pieces) > 1 and (layer := _LAYER.match(name))
    )
    return max(engines.values(), default=0) * g.hidden * g.kv_heads * g.head_dim


def _token_bytes(c: Configuration, int8: bool) -> int:
    """Bytes of a token's key and value in one layer, in 8 bits or not."""
    g = c.geometry
    return 2 * g.kv_heads * (g.head_dim + TOKEN_SCALE if int8 else g.head_dim * c.item)


def _list(sizes: dict[str, int]) -> str:
    """Of what takes something: the pages of lazy bundles have no weights of their own."""
    return ", ".join(f"{name} {size(count)}" for name, count in sizes.items() if count)
