"""The torch module of each part of a model."""

from __future__ import annotations

import torch
from torch import nn

from engines.bundle.geometry import Geometry
from export.network.decoder import FlexDecoder, PageLayout, PageProjector
from export.network.vision import Encoder


def module_of(part: str, geometry: Geometry, dtype: torch.dtype) -> nn.Module:
    """The module of one part with parameters on the meta device (no memory) and real buffers, in evaluation mode."""
    pages = PageLayout if geometry.lazy_pages else PageProjector
    classes = {"vision": Encoder, "pages": pages, "decoder": FlexDecoder}
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return classes[part](geometry).eval()
    finally:
        torch.set_default_dtype(previous)
