"""All custom ops by name, and the ones a model uses."""

from __future__ import annotations

from collections.abc import Mapping

from plugins.cached_attention.launch import CachedAttention
from plugins.hierarchical_attention.launch import HierarchicalAttention
from plugins.op import Kernel, Op
from plugins.project_pages.launch import ProjectPages
from plugins.select_pages.launch import SelectPages

OPS: dict[str, type[Op]] = {op.name: op for op in (SelectPages, CachedAttention, ProjectPages, HierarchicalAttention)}


def ops_of_model(sizes: Mapping[str, int]) -> list[Op]:
    """One op of each kind; `sizes` holds their attributes: heads, kv_heads, head_dim, page_size, grid, cells, ..."""
    return [op(**{name: sizes[name] for name in op.attribute_names if name in sizes}) for op in OPS.values()]


def kernels_of_model(sizes: Mapping[str, int], dtype: str) -> list[Kernel]:
    """Every kernel of a model, each once, in the order of first use."""
    return list(dict.fromkeys(kernel for op in ops_of_model(sizes) for kernel in op.kernels(dtype)))
