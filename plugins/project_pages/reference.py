"""flex::project_pages in PyTorch. Inputs and outputs: see the package docstring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.cached_attention.reference import rotary


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
    """The official projection of selected hi-res features, each page once (official: every page in every step)."""
    first = torch.arange(pages.shape[1], device=pages.device) < page_count[:, None]
    wanted = torch.zeros_like(projected).scatter(1, pages, first.to(projected.dtype))
    row, page = (wanted > projected).nonzero(as_tuple=True)
    new = features[row, page]  # [n, P, hidden]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)

    turn = cos[row, page][:, None], sin[row, page][:, None]
    key = rotary(heads(F.linear(new, key_weight)), *turn).to(page_key.dtype)
    present_key, present_value = page_key.clone(), page_value.clone()
    present_key[row, :, page] = key
    present_value[row, :, page] = heads(F.linear(new, value_weight))
    return present_key, present_value, torch.maximum(projected, wanted)


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
