"""Geometries the tests share."""

from __future__ import annotations

from dataclasses import replace

from engines.bundle.geometry import Geometry, Vision

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def official(**changes) -> Geometry:
    """LLaVA-1.5-7B-FlexAttention."""
    vision = Vision(1024, 4096, 23, 16, 14, 1e-5, "quick_gelu")
    geometry = Geometry(
        hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocab=32000, rms_eps=1e-5,
        rope_theta=10000.0, attention_bias=False, tied_embeddings=False, projector_depth=2, context=2048, lowres=336,
        zoom=3, cells=9, start_layer=8, threshold=48, image_mean=CLIP_MEAN, image_std=CLIP_STD, vision=vision,
    )  # fmt: skip
    return replace(geometry, **changes)


def tiny(**changes) -> Geometry:
    """Every mechanism in a model that runs in milliseconds: 8x8 grid, 24x24 hi-res tokens, 16 pages of 36."""
    vision = Vision(16, 32, 2, 2, 14, 1e-5, "quick_gelu")
    geometry = Geometry(
        hidden=32, intermediate=48, layers=5, heads=4, kv_heads=4, head_dim=8, vocab=64, rms_eps=1e-5,
        rope_theta=10000.0, attention_bias=False, tied_embeddings=False, projector_depth=2, context=160, lowres=112,
        zoom=3, cells=4, start_layer=1, threshold=48, image_mean=CLIP_MEAN, image_std=CLIP_STD, vision=vision,
    )  # fmt: skip
    return replace(geometry, **changes)
