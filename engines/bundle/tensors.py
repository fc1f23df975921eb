"""Names and shapes of a model's weights, which part of a bundle each is in, and which are stored in codes: from the
geometry and the choices of a build alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engines.bundle.geometry import Geometry
from engines.bundle.kinds import PARTS
from engines.bundle.precision import BLOCK_SIZES, COLUMN, INT4, INT8, PRECISIONS, Precision, Scheme

TOWER_PREFIX = "model.vision_tower.vision_tower."
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"
MODEL = "model"  # of what is not stored apart: in the dtype of activations
# What may be stored apart: weights beside the decoder's linear layers in codes of their own, by the option that says
# so, and the codes there are.
APART = {
    "head": (MODEL, INT8.name, INT4.name),
    "vision": (MODEL, INT8.name, INT4.name),
    "embeddings": (MODEL, INT8.name),
}
_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
_VISION = re.compile(
    re.escape(TOWER_PREFIX)
    + r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"
    + r"|model\.mm_projector\.(\d+\.)?weight"
)  # the patch embedding, whose filters are a thousandth of the tower, stays as it is
_HIRES = re.compile(r"model\.layers\.\d+\.self_attn\.[kv]_proj_hd\.(weight|bias)")


def expected_tensors(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the export needs, under its official name, in model order."""
    return {**_tower_tensors(geometry), **_projector_tensors(geometry), **_decoder_tensors(geometry)}


def _linear(name: str, out: int, inner: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inner)} | ({f"{name}.bias": (out,)} if bias else {})


def _tower_tensors(g: Geometry) -> dict[str, tuple[int, ...]]:
    vision, base = g.vision, TOWER_PREFIX + "vision_model."
    width = (vision.hidden,)
    shapes: dict[str, tuple[int, ...]] = {
        f"{base}embeddings.class_embedding": width,
        f"{base}embeddings.patch_embedding.weight": (vision.hidden, 3, vision.patch, vision.patch),
        f"{base}embeddings.position_embedding.weight": (g.image_tokens + 1, vision.hidden),
        f"{base}pre_layrnorm.weight": width,  # the official name is misspelt
        f"{base}pre_layrnorm.bias": width,
    }
    for index in range(vision.layers):
        block = f"{base}encoder.layers.{index}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}{norm}.weight": width, f"{block}{norm}.bias": width}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{block}self_attn.{name}", vision.hidden, vision.hidden)
        shapes |= _linear(f"{block}mlp.fc1", vision.intermediate, vision.hidden)
        shapes |= _linear(f"{block}mlp.fc2", vision.hidden, vision.intermediate)
    return shapes


def _projector_tensors(g: Geometry) -> dict[str, tuple[int, ...]]:
    if g.projector_depth == 1:
        return _linear("model.mm_projector", g.hidden, g.vision.hidden)
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(g.projector_depth):
        inner = g.hidden if index else g.vision.hidden
        shapes |= _linear(f"model.mm_projector.{2 * index}", g.hidden, inner)  # GELUs take the odd places
    return shapes


def _decoder_tensors(g: Geometry) -> dict[str, tuple[int, ...]]:
    query, key = g.heads * g.head_dim, g.kv_heads * g.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (g.vocab, g.hidden)}
    for index in range(g.layers):
        layer = f"model.layers.{index}."
        attend = layer + "self_attn."
        shapes[f"{layer}input_layernorm.weight"] = (g.hidden,)
        shapes |= _linear(f"{attend}q_proj", query, g.hidden, g.attention_bias)
        names = ["k_proj", "v_proj"] + (["k_proj_hd", "v_proj_hd"] if index in g.reading_layers else [])
        for name in names:
            shapes |= _linear(attend + name, key, g.hidden, g.attention_bias)
        shapes |= _linear(f"{attend}o_proj", g.hidden, query, g.attention_bias)
        shapes[f"{layer}post_attention_layernorm.weight"] = (g.hidden,)
        shapes |= _linear(f"{layer}mlp.gate_proj", g.intermediate, g.hidden, bias=False)
        shapes |= _linear(f"{layer}mlp.up_proj", g.intermediate, g.hidden, bias=False)
        shapes |= _linear(f"{layer}mlp.down_proj", g.hidden, g.intermediate, bias=False)
    shapes["model.norm.weight"] = (g.hidden,)
    if not g.tied_embeddings:
        shapes["lm_head.weight"] = (g.vocab, g.hidden)
    return shapes


def tensors_of_parts(geometry: Geometry) -> dict[str, dict[str, tuple[int, ...]]]:
    """`expected_tensors` by the part of the bundle that holds them."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {part: {} for part in PARTS}
    for name, shape in expected_tensors(geometry).items():
        vision = name.startswith((TOWER_PREFIX, "model.mm_projector."))
        pages = _HIRES.fullmatch(name) and not geometry.lazy_pages
        parts["vision" if vision else "pages" if pages else "decoder"][name] = shape
    return parts


def is_quantised(name: str, geometry: Geometry, head: bool = False) -> bool:
    """Whether precisions that quantise do so with this tensor: the weights of the decoder's linear layers; `head`:
    lm_head's, too.

    Lazy bundles hand k_proj_hd and v_proj_hd to the op flex::ProjectPages, whose kernels multiply in the model dtype:
    there they stay as they are.
    """
    hires = _HIRES.fullmatch(name) and name.endswith("weight") and not geometry.lazy_pages
    return bool(_LINEAR.fullmatch(name) or hires or (head and name == HEAD))


def in_vision(name: str) -> bool:
    """Whether this is the weight of a linear layer of the vision tower or the projector."""
    return _VISION.fullmatch(name) is not None


def quantised_tensors(geometry: Geometry, head: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape [N, K] of every weight that is quantised (see is_quantised), in model order."""
    shapes = expected_tensors(geometry).items()
    return {name: shape for name, shape in shapes if is_quantised(name, geometry, head)}


@dataclass(frozen=True)
class Coding:
    """Which weights are stored in codes, and how: those of the decoder's linear layers and the pages' projections,
    lm_head, the linear layers of vision tower and projector, the embeddings; None: in the dtype of activations.
    floats: names of weights that are not, though others of their kind are."""

    linear: Scheme | None = None
    head: Scheme | None = None
    vision: Scheme | None = None
    embeddings: Scheme | None = None
    floats: tuple[str, ...] = ()

    def of(self, name: str, g: Geometry) -> Scheme | None:
        """How the weight `name` is stored."""
        if name in self.floats:
            return None
        if name == HEAD:
            return self.head
        if name == EMBEDDINGS:
            return self.embeddings
        if in_vision(name):
            return self.vision
        return self.linear if is_quantised(name, g) else None

    def schemes(self, g: Geometry) -> dict[str, Scheme]:
        """Every weight that is stored in codes, in model order."""
        found = {name: self.of(name, g) for name in expected_tensors(g)}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def tensors(self, g: Geometry) -> dict[str, tuple[int, ...]]:
        """The same with their shapes [N, K]."""
        return {name: shape for name, shape in expected_tensors(g).items() if self.of(name, g) is not None}

    def option(self, kind: str) -> str:
        """What the option called `kind`, one of APART, says: the name of a precision, or MODEL."""
        scheme = getattr(self, kind)
        return MODEL if scheme is None else str(scheme.precision)

    @property
    def block(self) -> int | None:
        """The block size that the command line says: of the linear layers, where these have none to choose of an int4
        head or vision; None where nothing has."""
        beside = [each for each in (self.head, self.vision) if each and each.precision == INT4]
        if self.linear and (len(self.linear.precision.block_sizes) > 1 or not beside):
            return self.linear.block
        return beside[0].block if beside else None


def stored_as(precision: Precision, g: Geometry, apart: Mapping[str, str]) -> str:
    """How a bundle stores what it does, for people: "int4, int8 pages, head int8". `apart`: names of precisions, or
    MODEL, by the keys of APART."""
    words = [str(precision), *["int8 pages"] * g.int8_pages, *["int8 cache"] * g.int8_cache]
    return ", ".join(words + [f"{kind} {apart[kind]}" for kind in APART if apart[kind] != MODEL])


def can_be_coded(knob: str, precision: Precision) -> bool:
    """Whether weights of a key of APART can be stored in codes beside the others of a precision: scales are float16,
    and ONNX Runtime 1.32 multiplies with codes rightly in float32 alone (its CPU's MatMulNBits of float16 does not)."""
    return precision.dtype == "float16" and (precision.widened or knob == "embeddings")


def sizes_of_blocks(precision: Precision, *beside: str) -> tuple[int, ...]:
    """The block sizes that may be chosen: of the linear layers, and of what is `beside` them, names of precisions."""
    own = precision.block_sizes
    return own if INT4.name not in beside else tuple(dict.fromkeys((*own, *INT4.block_sizes)))


def coding_of(
    precision: Precision,
    block: int | None,
    backend: str,
    *,
    head: str = MODEL,
    vision: str = MODEL,
    embeddings: str = MODEL,
    floats: tuple[str, ...] = (),
) -> Coding:
    """How weights are stored under the choices of a build. `block`: None where none was chosen. `head`, `vision`,
    `embeddings`: names of precisions, or MODEL.

    A head of the precision of the linear layers has their blocks. Other int4 weights have `block`, or the default of
    int4; other int8 weights a scale for each output, which every backend unpacks inside the product, and embeddings one
    for each token.
    """

    def beside(name: str, rows: bool = False) -> Scheme | None:
        if name == MODEL:
            return None
        own = PRECISIONS[name]
        if rows or own != INT4:
            return Scheme(own, COLUMN, rows)
        return Scheme(own, own.block_size(block if block in own.block_sizes else None, backend))

    linear = None
    if precision.quantises:
        linear = Scheme(precision, precision.block_size(block if block in precision.block_sizes else None, backend))
    same = linear if linear and head == precision.name else beside(head)
    return Coding(linear, same, beside(vision), beside(embeddings, rows=True), floats)


def fitting_blocks(shapes: Iterable[tuple[int, ...]]) -> list[int]:
    """The BLOCK_SIZES that divide the inputs K of every weight [N, K], smallest first."""
    inputs = {shape[1] for shape in shapes}
    return [size for size in BLOCK_SIZES if not any(k % size for k in inputs)]
