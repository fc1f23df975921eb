"""A whole decode step of 7B's shape on a GPU, and its kernels beside what libraries take: `python -m
tests.bench.gpu_step`.

Our compiled kernels in a step written by hand, whose products are torch's (cuBLAS), with random float16 weights; each
step recorded as one CUDA graph. It shows what an engine has to aim at, and is none. Before anything is timed, attention
is held against the official way of computing it, on the same numbers. `--emulated` does the same at a tiny size on the
CPU, over the emulated driver: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundle.geometry import Geometry
from engines.bundle.pages import page_size
from plugins.command import run
from tests.bench.contenders.gpu_layers import Layer, Model
from tests.geometries import official, tiny
from tests.on_gpu.device import Emulated, Gpu
from tests.paths import ROOT

PACKED = ROOT / "kernels-7b-float16.zip"  # of an archive: tests/on_gpu/pack.py
BOUND = 8e-3  # of values of size one in float16, as the tests of the kernels on a GPU have it
COPIED = 1 << 30  # bytes, for the ceilings: far more than any cache holds
SQUARE = 8192  # side of the product


def ceilings(gpu: Gpu, copied: int = COPIED, square: int = SQUARE) -> dict[str, float]:
    """What this card does at most, measured now: GB/s of copying (read and written) and of reading, TFLOP/s."""
    one, two = (torch.ones(copied // 2, device=gpu.device, dtype=torch.float16) for _ in range(2))
    left, right = ((torch.randn(square, square, device=gpu.device) / 4).half() for _ in range(2))
    return {
        "copying, GB/s": 2 * copied / gpu.milliseconds(lambda: two.copy_(one)) / 1e6,
        "reading, GB/s": copied / gpu.milliseconds(lambda: one.sum()) / 1e6,
        "product, TFLOP/s": 2 * square**3 / gpu.milliseconds(lambda: left @ right) / 1e9,
    }


def check(m: Model, count: int) -> float:
    """The largest difference between ours and the official way in one layer of each kind, on the same numbers, as a
    share of the largest value. AssertionError when it is more than float16 explains."""
    worst = 0.0
    pages, number = m.listed(count)
    for layer in (m.layers[0], m.reading[0]):
        q, k, v = (m.random(1, 1, m.g.heads * m.g.head_dim) for _ in range(3))
        expected = m.officially(layer, q, k, v, pages[0, :count])
        seen = m.map.clone()
        found = m.attention(layer, q, k, v, pages, number)
        for name, ours, theirs in (("context", found, expected), ("map", m.map, seen)):
            size = theirs.float().abs().max().item()
            error = (ours.float() - theirs.float()).abs().max().item() / size
            assert error <= BOUND, f"{name}: {error:.2g} of {size:.2g} from the official way, {BOUND:g} is allowed"
            worst = max(worst, error)
    return worst


def steps(m: Model, counts: Sequence[int]) -> dict[str, float]:
    """Milliseconds of a whole step, by name; the numbers are pages that each reading layer reads."""
    took = {"no attention at all": m.gpu.milliseconds(lambda: m.step(lambda layer, q, k, v: q))}
    took["plain, ours, nothing selected"] = m.gpu.milliseconds(lambda: m.step(m.plain))
    for count in (0, *counts):
        pages, number = m.listed(count)

        def ours(layer, q, k, v, pages=pages, number=number) -> Tensor:
            return m.attention(layer, q, k, v, pages, number)

        took[f"flex, ours, {count} pages"] = m.gpu.milliseconds(lambda ours=ours: m.step(ours, select=True))
    took["plain, torch's SDPA"] = m.gpu.milliseconds(lambda: m.step(m.by_sdpa))
    for count in counts:
        pages = m.listed(count)[0][0, :count]

        def official(layer, q, k, v, pages=pages) -> Tensor:
            return m.officially(layer, q, k, v, pages)

        took[f"flex, the official way, torch in a graph, {count} pages"] = m.gpu.milliseconds(
            lambda official=official: m.step(official), replays=5
        )
    took["plain, torch's SDPA without a graph"] = m.gpu.milliseconds(lambda: m.step(m.by_sdpa), graph=False, replays=5)
    return took


def kernels(m: Model, counts: Sequence[int], prompts: Sequence[int]) -> list[tuple[str, float, str, float]]:
    """Microseconds of each op and of what libraries take for the same, rotating over the layers so that nothing stays
    in a cache: (op, ours, beside it, theirs)."""
    g, width = m.g, m.g.heads * m.g.head_dim

    def each(layers: Sequence[Layer], work: Callable[[Layer], object]) -> float:
        return 1000 * m.gpu.milliseconds(lambda: [work(layer) for layer in layers]) / len(layers)

    q, k, v = (m.random(1, 1, width) for _ in range(3))
    query = m.random(1, g.heads, 1, g.head_dim)
    sdpa = each(
        m.layers,
        lambda layer: F.scaled_dot_product_attention(query, layer.key[:, :, : m.cached], layer.value[:, :, : m.cached]),
    )
    beside = "SDPA without rotary, cache write and map"
    rows = [("CachedAttention, decode", each(m.layers, lambda layer: m.plain(layer, q, k, v)), beside, sdpa)]
    for count in counts:
        pages, number = m.listed(count)
        took = each(m.reading, lambda layer, p=pages, n=number: m.attention(layer, q, k, v, p, n))
        rows.append((f"HierarchicalAttention, {count} pages", took, beside + ", no page", sdpa))
    rows.append(("SelectPages", each(m.layers, lambda layer: m.select()), "", 0.0))
    new = torch.zeros(1, g.pages, dtype=torch.int64, device=m.gpu.device)
    none = torch.ones_like(new)
    some = m.reading[:8]
    pages, number = m.listed(counts[0])
    rows.append(("ProjectPages, nothing new", each(some, lambda layer: m.project(layer, none, pages, number)), "", 0.0))
    for count in counts:
        pages, number = m.listed(count)
        took = each(some, lambda layer, p=pages, n=number: m.project(layer, new, p, n))
        x = m.features.view(-1, g.hidden)[: count * page_size(g)]
        theirs = each(some, lambda layer, x=x: [F.linear(x, weight) for weight in layer.hires])
        rows.append((f"ProjectPages, {count} new pages", took, "cuBLAS, two products", theirs))
    for length in prompts:
        q, k, v = (m.random(1, length, width) for _ in range(3))
        positions = torch.arange(length, device=m.gpu.device)[None].contiguous()
        took = each(m.layers[:8], lambda layer, a=(q, k, v, positions): m.plain(layer, *a))
        qh, kh, vh = (m.split(x) for x in (q, k, v))
        theirs = each(some, lambda layer, a=(qh, kh, vh): F.scaled_dot_product_attention(*a, is_causal=True))
        rows.append((f"prefill of {length} tokens, the whole op", took, "SDPA, causal", theirs))
    return rows


def markdown(name: str, m: Model, found: dict) -> str:
    """What was measured, for people."""
    base = found["steps, ms"]["plain, ours, nothing selected"]
    tops = ", ".join(f"{what} {value:,.0f}" for what, value in found["ceilings"].items())
    lines = [f"{name}; {m.g.layers} layers, hidden {m.g.hidden}, float16, {m.cached} tokens cached.", ""]
    lines += [
        f"Ours is {found['difference']:.1g} of the largest value from the official way. Ceilings in this run: {tops}.",
        "",
    ]
    lines += ["| step | ms | against plain |", "|---|---:|---:|"]
    lines += [f"| {what} | {took:.2f} | {took / base:.2f} |" for what, took in found["steps, ms"].items()]
    lines += ["", "| op | us | beside it | us |", "|---|---:|---|---:|"]
    for what, ours, beside, theirs in found["kernels, us"]:
        lines.append(f"| {what} | {ours:.1f} | {beside} | {f'{theirs:.1f}' if beside else ''} |")
    return "\n".join(lines)


def measure(gpu: Gpu, g: Geometry, cached: int, counts: Sequence[int], prompts: Sequence[int], **small: int) -> tuple:
    """(model, figures by name). `small`: of `ceilings`, for a machine that is none."""
    packed = PACKED if PACKED.is_file() else None
    found: dict = {"ceilings": ceilings(gpu, **small)}
    with torch.no_grad():
        model = Model(gpu, g, cached, gpu.artifacts(g, packed))
        found["difference"] = check(model, counts[0])
        found["steps, ms"] = steps(model, counts)
        found["kernels, us"] = kernels(model, counts, prompts)
    return model, found


def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser("python -m tests.bench.gpu_step", description="A decode step of 7B on a GPU.")
    parser.add_argument("--emulated", action="store_true", help="at a tiny size, over the emulated driver")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(given)

    def work() -> None:
        if options.emulated:
            model, found = measure(Emulated(), tiny(layers=3), 70, (2,), (9,), copied=1 << 16, square=16)
        else:
            model, found = measure(Gpu(), official(), 1200, (10, 22, 81), (717, 1199))
        if options.json:
            options.json.write_text(json.dumps(found | {"gpu": model.gpu.cuda.name}, indent=1))
        print(markdown(model.gpu.cuda.name, model, found))

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
