"""What one run of a traced graph must compute and move, counted from the graph itself: its nodes and their shapes.

Matrix products count two FLOPs per multiply-add; they read their operands and write their result once. The flex:: ops
count by their definitions (plugins/<op>/__init__.py): attention is two products over the keys that a query may see.
Everything else, elementwise work mostly, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes read and written."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Run:
    """How a graph is run, at batch 1."""

    steps: int = 1  # new tokens
    past: int = 0  # cached tokens
    tiles: int = 1
    read: int = 0  # pages that the last token reads in each reading layer
    new: int = 0  # of them, projected in this run


class Graph:
    """A traced graph, counted."""

    def __init__(self, model: ir.Model) -> None:
        ShapeInferencePass()(model)  # of what was an output while it was traced
        self._products = [node for node in model.graph if node.op_type in PRODUCTS and not node.domain]
        self._ops = [node for node in model.graph if node.domain == "flex"]
        self._count = lru_cache(None)(self._counted)
        self._weights = {name: _stored(value) for name, value in model.graph.initializers.items()}

    def work(self, run: Run) -> Work:
        """What this run costs."""
        sizes = {"batch": 1, "steps": run.steps, "tiles": run.tiles}
        return sum((_op(node, run) for node in self._ops), self._count(tuple(sizes.items())))

    def weights(self, hires: bool = True) -> int:
        """Bytes of the weights; `hires`: with what projects hi-res pages."""
        return sum(size for name, size in self._weights.items() if hires or "_proj_hd." not in name)

    def _counted(self, sizes: tuple[tuple[str, int], ...]) -> Work:
        return sum((_product(node, dict(sizes)) for node in self._products), Work())


def _stored(value: ir.Value) -> int:
    return math.prod(value.shape) * value.dtype.itemsize if "." in value.name else 0  # others: tables, constants


def _product(node: ir.Node, sizes: dict[str, int]) -> Work:
    left, right = (_shape(value, sizes) for value in node.inputs[:2])
    result = _shape(node.outputs[0], sizes)
    assert not (node.op_type == "Gemm" and node.attributes.get_int("transA", 0)), node.name
    depth = left[-1]  # multiply-adds behind one result
    moved = math.prod(left) + math.prod(right) + math.prod(result)
    return Work(2 * depth * math.prod(result), moved * node.outputs[0].dtype.itemsize)


def _op(node: ir.Node, run: Run) -> Work:
    size = {name: attribute.as_int() for name, attribute in node.attributes.items() if attribute.type.name == "INT"}
    if node.op_type == "SelectPages":
        return Work(0, 4 * size["grid"] ** 2 + 8 * size["cells"] ** 2)
    item = node.inputs[0].dtype.itemsize
    key_value = 2 * size["kv_heads"] * size["head_dim"]  # of one token
    if node.op_type == "ProjectPages":
        tokens = run.new * size["page_size"]
        weights = key_value * size["hidden"] if run.new else 0
        moved = weights + tokens * (size["hidden"] + key_value)
        return Work(2 * tokens * size["hidden"] * key_value, moved * item)
    query = size["heads"] * size["head_dim"]
    pages = run.read * size["page_size"] if node.op_type == "HierarchicalAttention" else 0
    seen = run.steps * run.past + run.steps * (run.steps + 1) // 2 + pages  # keys, summed over the queries
    moved = 2 * run.steps * (query + key_value) + (run.past + pages) * key_value
    return Work(4 * query * seen, moved * item)


def _shape(value: ir.Value, sizes: dict[str, int]) -> tuple[int, ...]:
    assert value.shape is not None, value.name
    return tuple(size if isinstance(size, int) else _size(str(size), sizes) for size in value.shape)


def _size(text: str, sizes: dict[str, int]) -> int:
    """A symbol, or a product of symbols and numbers as the tracer writes it."""
    return math.prod(sizes[part] if part in sizes else int(part) for part in text.replace(" ", "").split("*"))
