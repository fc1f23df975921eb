"""Two models that ask for everything a config can, exported once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines.bundle.geometry import Geometry
from tests.geometries import tiny


@pytest.fixture(autouse=True)
def one_thread():
    """These products are so small that threads cost far more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def everything() -> Geometry:
    """What the plain model has not: grouped heads, biases, tied embeddings, another rotary base, the exact gelu."""
    g = tiny(kv_heads=2, attention_bias=True, tied_embeddings=True, rope_theta=5000.0)
    return replace(g, vision=replace(g.vision, activation="gelu"))


@pytest.fixture(params=["plain", "everything"])
def exported(request, random_model):
    """(checkpoint folder, bundle folder, geometry); the plain one is that of other tests."""
    g = tiny() if request.param == "plain" else everything()
    return *random_model("tiny" if request.param == "plain" else "oracle", g), g
