"""The official small model as engines for RTX 30, 40 and 50, in both flavours, by NVIDIA's builder on the CPU."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import PARTS, TENSORRT_RTX
from engines.trt.options import EngineOptions
from export.build import BuildOptions, build
from export.options import KV
from tests.conftest import once
from tests.engines.trt.rtx_layers import ATTENTION, layers_of, log_of, plugins_of

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
SMS = (86, 89, 120)


@pytest.fixture
def engines(shared, checkpoint):
    """engines(projection, plugins, kv="model", kv_cache="model", page_slots=None) -> bundle in float16; the builder's
    logs lie beside it."""

    def get(projection: str, plugins: bool, kv: str = "model", kv_cache: str = "model", page_slots: int | None = None):
        knobs = EngineOptions(TENSORRT_RTX, plugins=plugins, targets=SMS, keep_log=True, timing_cache=False)

        def make(folder):
            model = checkpoint("plain")
            how = {"projection": projection, "kv": kv, "kv_cache": kv_cache, "page_slots": page_slots, "check": "none"}
            build(BuildOptions(model, folder, backend=TENSORRT_RTX, engines=knobs, **how))

        flavour = "plugins" if plugins else "free"
        return once(shared / f"official-{projection}-{kv}-{kv_cache}-{page_slots}-{flavour}", make)

    return get


# The tracer's names of the nodes, which tell what is kept in 8 bits, and in slots; the plugins are the same.
@pytest.mark.parametrize(
    ("projection", "kv", "kv_cache", "page_slots", "cached", "hierarchical", "project"),
    [
        ("eager", "model", "model", None, "", "", None),
        ("lazy", "model", "model", None, "", "", ""),
        ("lazy", "model", "model", 24, "", "", "_slots"),
        ("lazy", "int8", "model", None, "", "_int8", "_int8"),
        ("eager", "model", "int8", None, "_int8_cache", "_int8_cache", None),
        ("lazy", "int8", "int8", None, "_int8_cache", "_int8_both", "_int8"),
        ("lazy", "int8", "int8", 24, "_int8_cache", "_int8_both", "_int8_slots"),
    ],
)
def test_every_op_is_a_plugin(engines, projection, kv, kv_cache, page_slots, cached, hierarchical, project):
    folder = engines(projection, plugins=True, kv=kv, kv_cache=kv_cache, page_slots=page_slots)
    manifest = Bundle(folder).manifest
    g = manifest.geometry
    expected = {
        f"cached_attention{cached}": g.start_layer + 1,
        f"hierarchical_attention{hierarchical}": len(g.reading_layers),
        "select_pages": len(g.selecting_layers),
    }
    expected |= {} if project is None else {f"project_pages{project}": len(g.reading_layers)}
    assert Counter(plugins_of(log_of(folder, "decoder"))) == expected
    for part in PARTS:
        plan = manifest.parts[part].plans[TENSORRT_RTX]
        assert plan.sms == SMS and plan.plugins == (part == "decoder")
        assert not plugins_of(log_of(folder, part)) or part == "decoder"


@pytest.mark.parametrize("kv", KV)
def test_without_plugins_attention_is_fused_by_tensorrt(engines, kv):
    folder = engines("eager", plugins=False, kv=kv)
    g, log = Bundle(folder).manifest.geometry, log_of(folder, "decoder")
    assert not plugins_of(log)
    kernels = Counter(re.sub(r"_0x\w+$|_myl\d+_\d+$", "", layer.name) for layer in layers_of(log))
    print("\n".join(f"{count:4} {name}" for name, count in kernels.most_common() if name.startswith("_")))
    assert kernels["_gemm_mha_v2"] == sum(count for name, count in kernels.items() if name.startswith(ATTENTION))
    assert kernels["_gemm_mha_v2"] == g.layers
    assert kernels["__myl_SiluMul"] == g.layers
