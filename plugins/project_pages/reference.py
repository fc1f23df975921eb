"""flex::project_pages in PyTorch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.cached_attention.reference import quantise, rotary
from plugins.op import PAGE_SCALES

TENSORS = (
    "features", "key_weight", "value_weight", "cos", "sin",
    "page_key", "page_value", "projected", "pages", "page_count",
)  # fmt: skip
SIZES = "hidden", "kv_heads", "head_dim", "page_size", "cells"


def _project(given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The store with the pages it lacks: the official projection of selected hi-res features, each page once (official:
    every page in every step)."""
    projected, pages = given["projected"], given["pages"]
    first = torch.arange(pages.shape[1], device=pages.device) < given["page_count"][:, None]
    wanted = torch.zeros_like(projected).scatter(1, pages, first.to(projected.dtype))
    row, page = (wanted > projected).nonzero(as_tuple=True)
    new = given["features"][row, page]  # [n, P, hidden]

    def heads(weight: Tensor) -> Tensor:
        return F.linear(new, weight).unflatten(-1, (given["kv_heads"], given["head_dim"])).transpose(1, 2)

    key = rotary(heads(given["key_weight"]), given["cos"][row, page][:, None], given["sin"][row, page][:, None])
    halves = key, heads(given["value_weight"])
    place = given["slots"][row, page] if "slots" in given else page
    stores = [name for name in ("page_key", "page_value", *PAGE_SCALES) if name in given]
    if len(stores) > 2:
        (keys, key_steps), (values, value_steps) = map(quantise, halves)
        halves = keys, values, key_steps, value_steps
    present = [given[name].clone() for name in stores]
    for store, half in zip(present, halves, strict=True):
        store[row, :, place] = half.to(store.dtype)
    return *present, torch.maximum(projected, wanted)


def _variant(name: str, *, int8_pages: bool = False, page_slots: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """The torch op for one kind of store: the scales of int8 pages follow the other tensors, then the page slots."""
    scales = PAGE_SCALES if int8_pages else ()
    names = *TENSORS, *scales, *(("slots",) if page_slots else ()), *SIZES
    stores = "page_key", "page_value", *scales

    def body(*inputs: Any) -> tuple[Tensor, ...]:
        return _project(dict(zip(names, inputs, strict=True)))

    arguments = ", ".join(f"{'int' if each in SIZES else 'Tensor'} {each}" for each in names)
    results = ", ".join(["Tensor"] * (len(stores) + 1))
    op = torch.library.custom_op(f"flex::{name}", body, mutates_args=(), schema=f"({arguments}) -> ({results})")

    @op.register_fake
    def _(*inputs: Any) -> tuple[Tensor, ...]:
        given = dict(zip(names, inputs, strict=True))
        return tuple(torch.empty_like(given[each]) for each in (*stores, "projected"))

    return op


project_pages = _variant("project_pages")
project_pages_int8 = _variant("project_pages_int8", int8_pages=True)
project_pages_slots = _variant("project_pages_slots", page_slots=True)
project_pages_int8_slots = _variant("project_pages_int8_slots", int8_pages=True, page_slots=True)
