"""Names and shapes of a model's weights, which part of a bundle each is in, and which can be quantised: from the
geometry alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from engines.bundle.geometry import Geometry
from engines.bundle.kinds import PARTS
from engines.bundle.precision import BLOCK_SIZES

TOWER_PREFIX = "model.vision_tower.vision_tower."
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
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


def quantised_tensors(
    geometry: Geometry, head: bool = False, floats: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name and shape [N, K] of every weight that is quantised (see is_quantised), in model order; `floats`: names of
    those that are not all the same."""
    shapes = expected_tensors(geometry).items()
    return {name: shape for name, shape in shapes if is_quantised(name, geometry, head) and name not in floats}


def fitting_blocks(shapes: Iterable[tuple[int, ...]]) -> list[int]:
    """The BLOCK_SIZES that divide the inputs K of every weight [N, K], smallest first."""
    inputs = {shape[1] for shape in shapes}
    return [size for size in BLOCK_SIZES if not any(k % size for k in inputs)]
