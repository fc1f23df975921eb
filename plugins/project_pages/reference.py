"""flex::project_pages in PyTorch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.cached_attention.reference import quantise, rotary


def _new_pages(
    features: Tensor, weights: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor,
    projected: Tensor, pages: Tensor, page_count: Tensor, kv_heads: int, head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The official projection of selected hi-res features, each page once (official: every page in every step).

    Returns keys [n, Hkv, P, hd] float32 and values T of the n new pages, the row and the page of each, `projected`.
    """
    first = torch.arange(pages.shape[1], device=pages.device) < page_count[:, None]
    wanted = torch.zeros_like(projected).scatter(1, pages, first.to(projected.dtype))
    row, page = (wanted > projected).nonzero(as_tuple=True)
    new = features[row, page]  # [n, P, hidden]

    def heads(weight: Tensor) -> Tensor:
        return F.linear(new, weight).unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)

    key = rotary(heads(weights[0]), cos[row, page][:, None], sin[row, page][:, None])
    return key, heads(weights[1]), row, page, torch.maximum(projected, wanted)


@torch.library.custom_op("flex::project_pages", mutates_args=())
def project_pages(
    features: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_key: Tensor,
    page_value: Tensor,
    projected: Tensor,
    pages: Tensor,
    page_count: Tensor,
    hidden: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    cells: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The store with the pages it lacks."""
    key, value, row, page, present = _new_pages(
        features, (key_weight, value_weight), cos, sin, projected, pages, page_count, kv_heads, head_dim
    )
    present_key, present_value = page_key.clone(), page_value.clone()
    present_key[row, :, page] = key.to(page_key.dtype)
    present_value[row, :, page] = value
    return present_key, present_value, present


@torch.library.custom_op("flex::project_pages_int8", mutates_args=())
def project_pages_int8(
    features: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_key: Tensor,
    page_value: Tensor,
    projected: Tensor,
    pages: Tensor,
    page_count: Tensor,
    page_key_scale: Tensor,
    page_value_scale: Tensor,
    hidden: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    cells: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The int8 store and its steps with the pages they lack."""
    key, value, row, page, present = _new_pages(
        features, (key_weight, value_weight), cos, sin, projected, pages, page_count, kv_heads, head_dim
    )
    stores = page_key.clone(), page_value.clone(), page_key_scale.clone(), page_value_scale.clone()
    (key, key_step), (value, value_step) = quantise(key), quantise(value)
    for store, new in zip(stores, (key, value, key_step, value_step), strict=True):
        store[row, :, page] = new
    return (*stores, present)


@project_pages.register_fake
def _(
    features: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_key: Tensor,
    page_value: Tensor,
    projected: Tensor,
    pages: Tensor,
    page_count: Tensor,
    hidden: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    cells: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(page_key), torch.empty_like(page_value), torch.empty_like(projected)


@project_pages_int8.register_fake
def _(
    features: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_key: Tensor,
    page_value: Tensor,
    projected: Tensor,
    pages: Tensor,
    page_count: Tensor,
    page_key_scale: Tensor,
    page_value_scale: Tensor,
    hidden: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    cells: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(page_key), like(page_value), like(page_key_scale), like(page_value_scale), like(projected)
