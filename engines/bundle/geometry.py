"""The numbers that define a FlexAttention model, shared by every stage from checkpoint to answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vision:
    """The CLIP tower. `layers` counts the blocks that run; blocks after the selected one are never needed."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    patch: int
    eps: float
    activation: str  # "quick_gelu" or "gelu"


@dataclass(frozen=True)
class Geometry:
    """One FlexAttention vision-language model.

    Terms: a *cell* is one of `cells` x `cells` regions of the image, a *page* the hi-res tokens under one cell.
    Layers `start_layer` .. `layers - 1` produce a selection; layers after `start_layer` read pages.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rms_eps: float
    rope_theta: float
    attention_bias: bool
    tied_embeddings: bool  # lm_head shares embed_tokens
    projector_depth: int  # linear layers between tower and decoder, GELU between them
    context: int  # longest embedded sequence, tokens
    lowres: int  # pixels per side of the low-res image and of one hi-res tile
    zoom: int  # hi-res side / low-res side
    cells: int  # selection grid side
    start_layer: int
    threshold: int  # 0..255 scale, strict
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    vision: Vision
    # A choice of the build, like the context: project a hi-res page when a layer first selects it, instead of all pages
    # when the image is encoded. The answers are the same.
    lazy_pages: bool = False
    # Another: keep keys and values of the pages in 8 bits, with a step for each head of each token. The answers differ
    # as far as rounding reaches.
    int8_pages: bool = False
    # And the same for the cache of ordinary tokens.
    int8_cache: bool = False
    # With lazy pages: how many pages a layer has room for; None: for all. The least recently selected one makes room.
    # The answers are the same, as long as no layer selects more in one step.
    page_slots: int | None = None

    @property
    def highres(self) -> int:
        """Pixels per side of the hi-res image."""
        return self.lowres * self.zoom

    @property
    def grid(self) -> int:
        """Low-res image tokens per side (official: 24)."""
        return self.lowres // self.vision.patch

    @property
    def image_tokens(self) -> int:
        """Low-res image tokens in the sequence (official: 576)."""
        return self.grid * self.grid

    @property
    def hires_side(self) -> int:
        """Hi-res tokens per side (official: 72)."""
        return self.grid * self.zoom

    @property
    def pages(self) -> int:
        """Number of pages, selected or not (official: 81)."""
        return self.cells * self.cells

    @property
    def stored_pages(self) -> int:
        """Pages that a layer's store has room for."""
        return self.pages if self.page_slots is None else self.page_slots

    @property
    def selecting_layers(self) -> range:
        """Layers that produce a selection (official: 8 .. 31)."""
        return range(self.start_layer, self.layers)

    @property
    def reading_layers(self) -> range:
        """Layers that read pages, each those its predecessor selected (official: 9 .. 31)."""
        return range(self.start_layer + 1, self.layers)


def pieces_of(layers: range, size: int | None) -> list[tuple[int, int]]:
    """The first layer of each piece of a part with these layers, and the one after its last, of `size` layers each but
    perhaps the last piece; None: one piece."""
    size = len(layers) if size is None else size
    return [(begin, min(begin + size, layers.stop)) for begin in range(layers.start, layers.stop, size)]
