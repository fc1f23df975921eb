"""The decode benchmark on a small model: its checks pass, its table is whole. Times are not judged."""

from __future__ import annotations

import torch

from engines.bundle.pages import page_size
from export.build import BuildOptions, build
from tests.bench.contenders.cost import cost
from tests.bench.decode import measure, table
from tests.bench.random_checkpoint import write
from tests.geometries import official


def test_small_run(tmp_path):
    model = write("small", tmp_path / "checkpoint", torch.float32, threshold=-1, context=8192)
    bundle = build(BuildOptions(model, tmp_path / "bundle", precision="fp32", check="none")).path
    options = BuildOptions(model, tmp_path / "int4", precision="int4", block_size=16, check="none")
    _, rows = measure(model, bundle, build(options).path, rounds=1, steps=2, threads=None)
    assert [row.pages for row in rows] == [0, 0, 22, 81, 22, 0, 22, 22, 81, 0]
    assert all(row.milliseconds > 0 for row in rows) and rows[0].ratio == 1
    assert rows[0].cost == rows[5].cost and rows[2].cost == rows[6].cost and rows[7].cost.flops > rows[6].cost.flops
    assert rows[4].cost.flops == rows[2].cost.flops and rows[4].cost.bytes < rows[2].cost.bytes
    assert len(table(rows)) == 11


def test_cost_of_the_official_7b():
    g = official()
    plain = cost(g, 600, 0, itemsize=2)
    assert plain.flops == 2 * (6_476_005_376 + 131_072_000 + 2 * 4096 * 32 * 600)  # weights, lm_head, attention
    assert plain.bytes == plain.flops
    pages = cost(g, 600, 10 * page_size(g), itemsize=2)
    assert pages.bytes - plain.bytes == 2 * 2 * 4096 * 23 * 640
    packed = cost(g, 600, 0, itemsize=2, layer_itemsize=0.5 + 2 / 128)
    assert plain.bytes - packed.bytes == round(6_476_005_376 * (1.5 - 2 / 128))
    again = cost(g, 600, 640, itemsize=2, project_again=True)
    assert again.flops - pages.flops == 2 * 23 * 640 * 2 * 4096 * 4096
