"""How much memory a configuration needs and how fast memory lets it decode: from shapes, before any work.

Every number that is not a shape is a named constant below, with where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod

from engines.backend import MAX_SLOTS, Opening
from engines.bundle.geometry import Geometry
from engines.bundle.kinds import BACKENDS, ONNXRUNTIME, TENSORRT
from engines.bundle.pages import page_size
from engines.bundle.precision import COLUMN, DEFAULT, Precision
from engines.bundle.tensors import is_quantised, tensors_of_parts
from engines.checks import require_integer
from engines.errors import OptionError
from plugins.op import ALIGNMENT

SCALE = 2  # bytes of the float16 scale of a block of quantised weights
TABLE_ENTRY = 8  # bytes of a number in a table of page slots, which has two for each page
TOKEN_SCALE = 4  # bytes of the float32 scale of a head of a token in an int8 page or cache
MAX_BATCH = 64

# Measured. Builders: TensorRT-RTX 1.7 on this project's engines and on chains of int8 and int4 products, anonymous
# memory beside the mapped weights: at most 2.15 times the weights of the part, and what it takes without any.
BUILDER_FACTOR, BUILDER_BASE = 2.15, 400_000_000
# Read in the parser's source: that of TensorRT before 10.13 copies weights that lie beside a graph.
MAPS_WEIGHTS = (10, 13)
# Activations: what TensorRT-RTX 1.7 reports for a 7B slice is `_activations` to the byte for vision and pages; the
# decoder has 28 MB more, 34 with two rows, small models 10.
SCRATCH = 40_000_000
ENGINE_CODE = 50_000_000  # of all parts: plans were 12 MB larger than their weights; plugins' kernels, and slack
HOST_PROCESS = 200_000_000  # Python, numpy, TensorRT's libraries: 152 MB resident
# ONNX Runtime 1.32 on an x86 CPU, random model of 59M weights: memory of its sessions over the bytes of the weights.
ORT_COPIES, ORT_COPIES_WIDENED, ORT_COPIES_QUANTISED = 1.2, 4.1, 2.0
ORT_TABLE = 26  # bytes for each value of a vocabulary table in float16, which is turned and widened in every run
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

    block: one of the precision's block sizes, None = the backend's default; head: lm_head is quantised, too; floats:
    weights of linear layers that are not. batch: rows of a request, which engines of TensorRT are built for. slots:
    requests that share decode steps, a row each; more than one take engines of that batch. page_budget: None = every
    page. fixed: the checkpoint comes quantised, in no other precision.
    """

    geometry: Geometry
    precision: Precision = DEFAULT
    block: int | None = None
    head: bool = False
    batch: int = 1
    slots: int = Opening.slots
    page_budget: int | None = None
    backend: str = TENSORRT
    plugins: bool = True
    floats: tuple[str, ...] = ()
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise OptionError(f"backend {self.backend!r}", expected=f"one of {', '.join(BACKENDS)}")
        sizes = self.precision.block_sizes
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
        keep("geometry", replace(g, context=require_integer(g.context, f"context {g.context!r}", g.image_tokens + 1)))

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
    for part, tensors in tensors_of_parts(c.geometry).items():
        offset = end = 0
        for name, shape in sorted(tensors.items()):
            for piece in _pieces(c, name, shape):
                end = offset + piece
                offset = -(-end // ALIGNMENT) * ALIGNMENT
        sizes[part] = end
    return sizes


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


def builder_bytes(weights: int, *, copied: bool = False) -> int:
    """Bytes of memory a TensorRT build of a part with these bytes of weights takes, the mapped weights not counted.

    copied: they are not mapped but read (see MAPS_WEIGHTS).
    """
    return int(BUILDER_FACTOR * weights) + BUILDER_BASE + (weights if copied else 0)


def needs(c: Configuration, *, integrated: bool) -> tuple[Need, ...]:
    """What a request at the full context takes, or as many as there are slots, each about an image of its own; on a
    card (not `integrated`) of the card's own memory."""
    g, item, rows, views = c.geometry, c.item, c.rows, c.views
    weights = weight_bytes(c)
    ort = c.backend == ONNXRUNTIME
    held = _held(c) if ort else sum(weights.values())
    taken = g.image_tokens * g.hidden * item  # what a decoder takes of an image, beside the pages
    if g.lazy_pages:
        taken += g.pages * page_size(g) * (g.hidden * item + g.head_dim * 4)
    hires, pixels = g.hires_side**2 * g.hidden * item, (1 + g.zoom**2) * 3 * g.lowres**2 * 4
    image = (rows + views) * taken + rows * (hires + pixels + g.vocab * 4)
    scratch = _activations(c)
    work = sum(scratch.values()) if ort else max(scratch.values()) + SCRATCH
    if ort:
        runtime = Need("runtime", ORT_PROCESS, "Python, ONNX Runtime")
    else:
        what = "CUDA context (assumed), kernels" + (", Python, TensorRT" if integrated else "")
        runtime = Need("runtime", CUDA_CONTEXT + ENGINE_CODE + (HOST_PROCESS if integrated else 0), what)
    cached, kept = (", int8 and scales" if int8 else "" for int8 in (g.int8_cache, g.int8_pages))
    lazy = ", features by page (lazy)" if g.lazy_pages else ""
    stored = f"all {g.pages} pages" if g.page_slots is None else f"{g.page_slots} slots of {g.pages} pages"
    whose = f"{rows} slots and {views} images" if views else f"{rows}"
    return (
        Need("weights", held, _list(weights) + (", and copies" if ort else "")),
        Need("KV cache", cache_bytes(c), f"{rows} x {g.context} tokens in {g.layers} layers{cached}"),
        Need("hi-res pages", store_bytes(c), f"{whose} x {stored} in {len(g.reading_layers)} layers{kept}"),
        Need("image, logits", image, f"{whose} x pixels, features{lazy}, logits"),
        Need("activations", work, ("" if ort else "largest of ") + _list(scratch)),
        runtime,
    )


def step_bytes(c: Configuration, tokens: int, pages: int) -> int:
    """Bytes a decode step of all rows must read at least: weights once, and of each row the cached tokens and the
    pages of every reading layer."""
    g, item = c.geometry, c.precision.itemsize
    decoder = weight_bytes(c)["decoder"]
    if not g.tied_embeddings:  # of the table, a step reads its tokens' rows
        decoder -= (g.vocab - c.rows) * g.hidden * item
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


def _pieces(c: Configuration, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes of a tensor as it is stored: of its values, and of their scales if it is quantised."""
    p = c.precision
    if p.bits is not None and is_quantised(name, c.geometry, c.head) and name not in c.floats:
        block = p.block_size(c.block, c.backend)
        blocks = 1 if block is None or block == COLUMN else -(-shape[-1] // block)
        return prod(shape) * p.bits // 8, prod(shape[:-1]) * blocks * SCALE
    return (prod(shape) * p.itemsize,)


def _held(c: Configuration) -> int:
    """Bytes of the weights as ONNX Runtime holds them."""
    total = 0.0
    for tensors in tensors_of_parts(c.geometry).values():
        for name, shape in tensors.items():
            pieces = _pieces(c, name, shape)
            others = ORT_COPIES_WIDENED if c.precision.widened else ORT_COPIES
            total += sum(pieces) * (ORT_COPIES_QUANTISED if len(pieces) > 1 else others)
    return int(total)


def _activations(c: Configuration) -> dict[str, int]:
    """Bytes of work space of each part at its largest: every hi-res tile at once, every page, a prefill of the full
    context. Engines reserve it for all rows they are built for. On ONNX Runtime requests of several slots are encoded
    side by side, each by its own thread; what is prefilled together is no more than one full context."""
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
    decoder = rows * g.context * 3 * (g.intermediate + g.hidden) * item
    if ort or not c.plugins:  # no kernel of ours: keys and values laid out again, the last query in float32
        decoder += rows * g.context * g.heads * g.head_dim * (2 * item + 4)
    if ort:
        vision += ORT_SCORES * tiles * v.heads * tokens**2 * 4
        decoder += ORT_SCORES * rows * g.heads * g.context**2 * 4
        decoder += ORT_TABLE * g.vocab * g.hidden if c.precision.ort_dtype == "float16" else 0
    return {"vision": vision, "pages": pages, "decoder": decoder}


def _token_bytes(c: Configuration, int8: bool) -> int:
    """Bytes of a token's key and value in one layer, in 8 bits or not."""
    g = c.geometry
    return 2 * g.kv_heads * (g.head_dim + TOKEN_SCALE if int8 else g.head_dim * c.item)


def _list(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in sizes.items())
