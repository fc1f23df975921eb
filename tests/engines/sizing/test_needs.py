"""What a configuration needs, against numbers worked out by hand, files of bundles, TensorRT-RTX's reports, a run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from engines.backend import Opening
from engines.bundle.geometry import Geometry
from engines.bundle.kinds import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from engines.bundle.precision import BF16, COLUMN, FP8, FP16, FP32, INT4, INT8
from engines.errors import OptionError
from engines.sizing.needs import (
    SCRATCH,
    Configuration,
    _activations,
    _held,
    cache_bytes,
    engines_of,
    handed_bytes,
    needs,
    size,
    speed,
    step_bytes,
    store_bytes,
    weight_bytes,
)
from engines.targets import target
from export.build import BuildOptions, build
from tests.bench.contenders.cost import cost
from tests.checkpoints import write_checkpoint
from tests.geometries import official, tiny
from tests.paths import ROOT

LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # weights of 7B's decoder layers
HIRES = 23 * 2 * 4096**2
TABLE = 32000 * 4096
NORMS = 65 * 4096


def weights(g: Geometry, *knobs: object, **named: object) -> dict[str, int]:
    return weight_bytes(Configuration(g, *knobs, **named))


def test_weights_of_7b_by_hand():
    full = weights(official(), FP16)
    assert full["decoder"] == 2 * (LINEAR + 2 * TABLE + NORMS)
    assert 13.4e9 < full["decoder"] < 13.5e9
    assert full["pages"] == 2 * HIRES and 0.60e9 < full["vision"] < 0.63e9
    assert weights(official(), BF16) == full
    assert weights(official(), FP32)["decoder"] == 2 * full["decoder"]
    lazy = weights(official(lazy_pages=True), FP16)
    assert lazy["pages"] == 0 and lazy["decoder"] == full["decoder"] + full["pages"]


@pytest.mark.parametrize(("precision", "bits"), [(INT8, 8), (INT4, 4)], ids=["int8", "int4"])
@pytest.mark.parametrize("block", [32, 128])
def test_quantised_weights_by_hand(precision, bits, block):
    found = weights(official(), precision, block)
    kept = 2 * (2 * TABLE + NORMS)
    assert found["decoder"] == LINEAR * bits // 8 + LINEAR // block * 2 + kept
    assert found["pages"] == HIRES * bits // 8 + HIRES // block * 2
    assert found["vision"] == weights(official(), FP16)["vision"]
    lazy = weights(official(lazy_pages=True), precision, block)  # the kernel that projects multiplies in float16
    assert lazy["decoder"] == found["decoder"] + 2 * HIRES
    head = weights(official(), precision, block, head=precision.name)
    assert found["decoder"] - head["decoder"] == 2 * TABLE - TABLE * bits // 8 - TABLE // block * 2


@pytest.mark.parametrize("precision", [INT8, FP8], ids=str)
def test_columns_by_hand(precision):
    found = weights(official(), precision, COLUMN)
    rows = 32 * (6 * 4096 + 2 * 11008 - 4096)  # outputs of a layer's seven products
    assert found["decoder"] == LINEAR + 2 * rows + 2 * (2 * TABLE + NORMS)
    assert found["pages"] == HIRES + 2 * 23 * 2 * 4096
    assert weights(official(), FP8) == weights(official(), FP8, COLUMN)


def test_blocks_nobody_knows():
    for precision, block in ((INT4, COLUMN), (FP8, 128), (FP16, 128), (INT8, 48)):
        with pytest.raises(OptionError, match=f"block {block} with {precision}"):
            Configuration(official(), precision, block)


ODD = tiny(kv_heads=2, tied_embeddings=True, projector_depth=1, attention_bias=True)


@pytest.mark.parametrize(
    ("name", "g", "precision"), [("tiny", tiny(), FP32), ("tiny", tiny(), FP16), ("odd", ODD, BF16)]
)
def test_weights_are_the_files_of_a_bundle(random_model, name, g, precision):
    _, bundle = random_model(name, g, precision.name)
    found = {part: (bundle / f"{part}.weights").stat().st_size for part in ("vision", "pages", "decoder")}
    assert weights(g, precision) == found


@pytest.mark.parametrize("head", [False, True])
def test_quantised_weights_are_the_files_of_a_bundle(tmp_path, head):
    checkpoint, out = write_checkpoint(tmp_path / "checkpoint", tiny()), tmp_path / "bundle"
    options = {"precision": "int4", "block_size": 16, "quantize_head": head, "check": "none"}
    build(BuildOptions(model=checkpoint, out=out, **options))
    found = {part: (out / f"{part}.weights").stat().st_size for part in ("vision", "pages", "decoder")}
    assert weights(tiny(), INT4, 16, "int4" if head else "model") == found


def test_cache_and_pages_of_7b_by_hand():
    c = Configuration(official())
    token = 2 * 32 * 128 * 2
    assert cache_bytes(c) == 32 * 2048 * token == 1 << 30
    assert store_bytes(c) == 23 * 5184 * token  # 1.95 GB, as the official model's hi-res cache would take
    assert cache_bytes(replace(c, batch=3)) == 3 << 30
    grouped = replace(c, geometry=official(kv_heads=8))
    assert store_bytes(grouped) * 4 == store_bytes(c)


def test_int8_pages_of_7b_by_hand():
    c = Configuration(official(int8_pages=True))
    token = 2 * 32 * (128 + 4)  # key and value: a byte for each value, a float32 scale for each head
    assert store_bytes(c) == 23 * 5184 * token
    assert store_bytes(replace(c, backend=ONNXRUNTIME, precision=INT4)) == store_bytes(c)
    assert cache_bytes(c) == cache_bytes(Configuration(official()))
    saved = step_bytes(Configuration(official()), 2048, 81) - step_bytes(c, 2048, 81)
    assert saved == 23 * 5184 * (2 * 32 * 128 * 2 - token)
    assert step_bytes(Configuration(official()), 2048, 0) == step_bytes(c, 2048, 0)
    named = {need.name: need for need in needs(c, integrated=True)}
    assert named["hi-res pages"].bytes == store_bytes(c) and "int8" in named["hi-res pages"].how


def test_an_int8_cache_of_7b_by_hand():
    plain, c = Configuration(official()), Configuration(official(int8_cache=True))
    token = 2 * 32 * (128 + 4)  # as in a page: a byte for each value, a float32 scale for each head
    assert cache_bytes(c) == 32 * 2048 * token
    assert cache_bytes(replace(c, slots=3)) == 3 * cache_bytes(c)
    assert cache_bytes(replace(c, backend=ONNXRUNTIME, precision=INT4)) == cache_bytes(c)
    assert store_bytes(c) == store_bytes(plain)
    for pages in (0, 81):
        assert step_bytes(plain, 2048, pages) - step_bytes(c, 2048, pages) == 32 * 2048 * (2 * 32 * 128 * 2 - token)
    both = Configuration(official(int8_cache=True, int8_pages=True))
    assert cache_bytes(both) == cache_bytes(c) and store_bytes(both) == 23 * 5184 * token
    named, others = ({need.name: need for need in needs(each, integrated=True)} for each in (c, plain))
    assert named["KV cache"].bytes == cache_bytes(c) and named["KV cache"].how.endswith("32 layers, int8 and scales")
    assert [name for name in named if named[name] != others[name]] == ["KV cache"]


def test_neither_page_budget_nor_lazy_projection_saves_memory():
    c = Configuration(official())
    few, lazy = replace(c, page_budget=1), replace(c, geometry=official(lazy_pages=True))
    assert needs(few, integrated=True) == needs(c, integrated=True)
    assert store_bytes(lazy) == store_bytes(c)
    named = {need.name: need.bytes for need in needs(lazy, integrated=True)}
    assert named["image, logits"] > {need.name: need.bytes for need in needs(c, integrated=True)}["image, logits"]


def test_page_slots_do():
    c = Configuration(official())
    lazy, slots = (replace(c, geometry=official(lazy_pages=True, page_slots=count)) for count in (None, 24))
    tables = 23 * 2 * 81 * 8
    assert store_bytes(slots) == store_bytes(lazy) * 24 // 81 + tables
    named, others = ({need.name: need for need in needs(each, integrated=True)} for each in (slots, lazy))
    assert named["hi-res pages"].how == "1 x 24 page slots for 81 pages in 23 layers"
    assert [name for name in named if named[name] != others[name]] == ["hi-res pages"]
    assert (slots.pages_read, lazy.pages_read, replace(slots, page_budget=7).pages_read) == (24, 81, 7)
    int8 = replace(c, geometry=official(lazy_pages=True, page_slots=24, int8_pages=True))
    assert store_bytes(int8) == 23 * 24 * 64 * 2 * 32 * 132 + tables


def test_pages_that_do_not_divide_are_padded():
    g = tiny(zoom=2, cells=3)  # 16 rows in 3 cells: pages of 6 x 6 at most
    assert store_bytes(Configuration(g, FP32)) == 3 * 9 * 36 * 2 * 4 * 8 * 4


SLICE = official(layers=4, start_layer=1)


# Total Activation Memory in TensorRT-RTX 1.7.1's logs of that slice of 7B, float16.
@pytest.mark.parametrize(
    ("changes", "batch", "vision", "pages", "decoder"),
    [
        ({}, 1, 127_623_168, 345_047_040, 216_337_920),
        ({"context": 1024}, 1, 127_623_168, 345_047_040, 123_530_752),
        ({}, 2, 255_246_336, 690_094_080, 404_790_784),
        ({"lazy_pages": True}, 1, 127_623_168, 19_922_944, 216_339_968),
        ({"int8_pages": True}, 1, 127_623_168, 429_981_696, 216_337_920),  # vision and decoder: as without
    ],
)
def test_activations_are_what_tensorrt_rtx_reports(changes, batch, vision, pages, decoder):
    found = _activations(Configuration(replace(SLICE, **changes), backend=TENSORRT_RTX, batch=batch))
    assert found["vision"] == vision
    assert found["pages"] == pages or (changes.get("lazy_pages") and pages <= found["pages"] < 1.1 * pages)
    assert decoder - SCRATCH < found["decoder"] < decoder
    plain = Configuration(SLICE, backend=TENSORRT_RTX, plugins=False)
    assert 209_904_640 < _activations(plain)["decoder"] + SCRATCH < 1.4 * 209_904_640


# The same with weights in codes, an engine of two layers that read pages.
@pytest.mark.parametrize(
    ("changes", "batch", "reported"),
    [
        ({}, 1, 401_195_008),
        ({}, 2, 786_104_320),
        ({"int8_pages": True}, 1, 479_264_768),
        ({"int8_pages": True}, 2, 854_654_976),
        ({"int8_pages": True, "kv_heads": 8}, 1, 166_264_832),
        ({"int8_pages": True, "hidden": 5120, "heads": 40, "kv_heads": 40}, 1, 639_696_896),
    ],
)
def test_activations_of_codes_are_no_more_than_counted(changes, batch, reported):
    c = Configuration(replace(SLICE, **changes), INT4, backend=TENSORRT_RTX, batch=batch)
    assert reported < _activations(c)["pages"] < 1.13 * reported
    whole = replace(c, geometry=official(**changes))  # more engines, none of them larger
    assert _activations(whole)["pages"] == _activations(c)["pages"]


def test_a_head_in_codes_is_unpacked_beside_the_rest():
    """Reported: 403 MB for the last engine of 7B at a context of 1280, 141 for one without a head (docs/figures.md)."""
    plain, coded = (Configuration(official(context=1280), INT4, head=head) for head in ("model", "int8"))
    found = [_activations(each)["decoder"] for each in (plain, coded)]
    assert found[1] - found[0] == 2 * TABLE
    assert all(most - SCRATCH < each < most for each, most in zip(found, (141e6, 403e6), strict=True))
    ort = [_activations(replace(each, backend=ONNXRUNTIME))["decoder"] for each in (plain, coded)]
    assert ort[0] == ort[1]


def test_pages_from_codes_are_engines_of_two_layers():
    """23 layers: eleven engines of two and one of one; in float16 they are one."""
    c = Configuration(official(), INT4)
    layer = 2 * (4096**2 // 2 + 4096**2 // 128 * 2)
    assert engines_of(c, "pages") == ((2, 2 * layer),) * 11 + ((1, layer),)
    assert engines_of(replace(c, precision=FP16), "pages") == ((23, 2 * HIRES),)
    floats = tuple(f"model.layers.{layer}.self_attn.{half}_proj_hd.weight" for layer in range(9, 32) for half in "kv")
    assert len(engines_of(replace(c, floats=floats), "pages")) == 1  # none is in codes
    assert engines_of(c, "vision") == ((0, weight_bytes(c)["vision"]),)


def test_the_table_of_embeddings_is_in_each_engine_that_reads_it():
    table = 32_000 * 4096 * 2
    for tied in (False, True):
        c = Configuration(official(tied_embeddings=tied), FP16)
        one, some = (engines_of(each, "decoder") for each in (c, replace(c, layers_per_engine=12)))
        assert [layers for layers, _ in some] == [12, 12, 8] and len(one) == 1
        assert sum(size for _, size in some) - one[0][1] == (table if tied else 0)


def test_hidden_states_between_engines_are_scratch_memory():
    """Two of them, which take turns; one between two engines."""
    c = Configuration(official(), FP16, batch=2)
    one = 2 * 2048 * 4096 * 2
    found = [handed_bytes(replace(c, layers_per_engine=size)) for size in (None, 32, 16, 8, 1)]
    assert found == [0, 0, one, 2 * one, 2 * one]


def test_a_step_reads_what_the_benchmark_counts():
    c = Configuration(official())
    for tokens, pages in ((640, 0), (1200, 10), (2048, 81)):
        assert step_bytes(c, tokens, pages) == pytest.approx(
            cost(official(), tokens, pages * 64, itemsize=2).bytes, rel=1e-4
        )
    assert step_bytes(replace(c, geometry=official(lazy_pages=True)), 640, 0) == step_bytes(c, 640, 0)
    tied = official(tied_embeddings=True)  # the table is the head
    assert step_bytes(replace(c, geometry=tied), 0, 0) == pytest.approx(step_bytes(c, 0, 0), rel=1e-4)


def test_ceilings_are_those_people_know():
    """Published weights-only ceilings of 7B: 7.6 tokens/s in float16 on 102 GB/s, 27 in int4; batches share weights."""
    board = target("orin-nx-16").bandwidth
    full, four = Configuration(official()), Configuration(official(), INT4)
    assert board * 1e9 / step_bytes(full, 0, 0) == pytest.approx(7.6, rel=0.03)
    assert board * 1e9 / step_bytes(four, 0, 0) == pytest.approx(27, rel=0.06)
    slow, fast = speed(full, board)
    assert slow < fast < 7.6
    assert speed(replace(full, page_budget=4), board)[0] > slow
    together = speed(replace(full, batch=4), board)
    assert fast < together[1] < 4 * fast


def test_onnxruntime_computes_some_precisions_in_float32():
    named = {p: Configuration(official(), p, backend=ONNXRUNTIME) for p in (FP32, FP16, BF16, INT4)}
    assert cache_bytes(named[BF16]) == cache_bytes(named[INT4]) == cache_bytes(named[FP32])
    assert cache_bytes(named[FP16]) * 2 == cache_bytes(named[FP32])
    assert cache_bytes(replace(named[INT4], backend=TENSORRT)) == cache_bytes(named[FP16])


@pytest.mark.parametrize(("precision", "slots"), [(FP16, 1), (BF16, 1), (FP16, 6)], ids=str)
def test_a_run_takes_what_is_estimated(random_model, precision, slots):
    """The largest memory of a process that opens a bundle and fills its context, or that of every slot, twice, each
    time for another image."""
    g = tiny(hidden=256, heads=8, kv_heads=8, head_dim=32, intermediate=704, vocab=30_000, context=640)
    _, bundle = random_model("sizing-run", g, precision.name)
    program = f"""
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from engines.memory import peak_rss
from runtime import Engine
engine = Engine({str(bundle)!r}, slots={slots})
images = np.random.default_rng(0).integers(0, 255, ({2 * slots if slots > 1 else 1}, 99, 99, 3), dtype=np.uint8)
asked = dict(input_ids=[1, -200] + [5] * 570, max_new_tokens=4, stop_at_eos=False)
with ThreadPoolExecutor({slots}) as threads:
    list(threads.map(lambda image: engine.generate(image, **asked), images))
print(peak_rss())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    estimated = sum(
        n.bytes for n in needs(Configuration(g, precision, slots=slots, backend=ONNXRUNTIME), integrated=True)
    )
    print(f"{slots} slots: {int(found.stdout) / 1e6:.0f} MB, estimated {estimated / 1e6:.0f} MB")
    assert int(found.stdout) < estimated < 2 * int(found.stdout)


@pytest.mark.parametrize(
    "knobs",
    [
        {"backend": "tensorflow"},
        {"block": 48},
        {"batch": 0},
        {"batch": 65},
        {"batch": True},
        {"batch": 1.5},
        {"page_budget": 82},
        {"page_budget": -1},
        {"geometry": official(context=576)},
    ],
)
def test_knobs_out_of_range(knobs):
    knob = {"page_budget": "page budget", "geometry": "context"}.get(next(iter(knobs)), next(iter(knobs)))
    with pytest.raises(OptionError, match=knob) as caught:
        Configuration(**{"geometry": official(), **knobs})
    assert caught.value.expected


def test_numbers_of_numpy_are_kept_as_pythons():
    """Two rows in NumPy's eight bits: their cache is no remainder of 256."""
    given = {"batch": np.uint8(2), "page_budget": np.uint8(81), "geometry": official(context=np.int16(2048))}
    kept, plain = Configuration(**given), Configuration(official(), batch=2, page_budget=81)
    assert {type(value) for value in (kept.batch, kept.page_budget, kept.geometry.context)} == {int}
    assert needs(kept, integrated=True) == needs(plain, integrated=True)


def test_sizes_for_people():
    assert [size(count) for count in (0, 999, 1_500, 99_940_000, 186e6, 13.48e9)] == [
        "0.0 kB", "1.0 kB", "1.5 kB", "99.9 MB", "186 MB", "13.5 GB",
    ]  # fmt: skip


@pytest.mark.parametrize("backend", [ONNXRUNTIME, TENSORRT])
@pytest.mark.parametrize("changes", [{}, {"lazy_pages": True}, {"int8_pages": True}], ids=["eager", "lazy", "int8"])
def test_slots_by_hand(backend, changes):
    """Four slots: four caches; pages, features and their sources for four rows and for four images beside them."""
    one = Configuration(official(**changes), FP16, backend=backend)
    four, g, item = replace(one, slots=4), one.geometry, one.item
    assert cache_bytes(four) == 4 * cache_bytes(one) and store_bytes(four) == 8 * store_bytes(one)
    assert weight_bytes(four) == weight_bytes(one)
    single, shared = ({need.name: need for need in needs(c, integrated=True)} for c in (one, four))
    taken = 576 * 4096 * item + (81 * 64 * (4096 * item + 128 * 4) if g.lazy_pages else 0)
    assert shared["image, logits"].bytes == 4 * single["image, logits"].bytes + 4 * taken
    assert shared["weights"] == single["weights"] and shared["runtime"] == single["runtime"]
    assert shared["KV cache"].how.startswith("4 x 2048 tokens")
    assert shared["hi-res pages"].how.startswith("4 slots and 4 images x all 81 pages")
    # Engines reserve what their batch would take; threads that ask ONNX Runtime encode side by side.
    work, rows = _activations(replace(one, batch=4)), 1 if backend == ONNXRUNTIME else 4
    assert _activations(four) == work | {"decoder": _activations(replace(one, batch=rows))["decoder"]}
    assert step_bytes(four, 700, 20) == step_bytes(replace(one, batch=4), 700, 20)
    assert speed(four, 100) == speed(replace(one, batch=4), 100)


def test_slots_that_cannot_be():
    for change, message in (
        ({"slots": 0}, "slots 0"),
        ({"slots": 65}, "slots 65"),
        ({"slots": 257, "backend": ONNXRUNTIME}, "slots 257"),
        ({"slots": 4, "batch": 2}, "--batch 2 with --slots 4"),
    ):
        with pytest.raises(OptionError, match=message):
            Configuration(official(), **change)
    assert Configuration(official(), slots=256, backend=ONNXRUNTIME).rows == 256
    assert Configuration(official(), slots=2, batch=4).rows == 2


@pytest.mark.parametrize("context", [2048, 640])
def test_parts_that_take_turns_by_hand(context):
    """Where vision and the projection are closed before there is a cache, the larger counts: either, or what comes
    after them."""
    kept = Configuration(official(context=context, int8_pages=True), INT4, backend=TENSORRT)
    turns = replace(kept, residency="shared")
    found, before = ({need.name: need.bytes for need in needs(each, integrated=True)} for each in (turns, kept))
    parts, work = weight_bytes(kept), _activations(kept)
    assert "image parts" not in before and work["vision"] < work["pages"]
    assert before["weights"] - found["weights"] == parts["vision"] + parts["pages"]
    assert found["activations"] == work["decoder"] + SCRATCH and before["activations"] == work["pages"] + SCRATCH
    one = engines_of(kept, "pages")[0][1]  # of twelve engines, as many as are open at a time
    while_projected = store_bytes(kept) + one + work["pages"] + SCRATCH
    own = SCRATCH + work["vision"] if work["vision"] > work["decoder"] else 0
    while_seen = parts["vision"] + own
    after = store_bytes(kept) + cache_bytes(kept)
    assert found["image parts"] == max(0, max(while_projected, while_seen) - after)
    assert (found["image parts"] == 0) == (context == 2048)
    assert sum(found.values()) < sum(before.values())
    slots = replace(kept, slots=2), replace(turns, slots=2)  # an image is encoded while others decode
    assert needs(slots[0], integrated=True) == needs(slots[1], integrated=True)
    with pytest.raises(OptionError, match="residency 'none'"):
        replace(kept, residency="none")


def test_what_onnxruntime_spares_where_image_parts_take_turns():
    """The tower is not made float32, and no more than a chunk of a prompt is computed at once."""
    kept = Configuration(official(), INT4, backend=ONNXRUNTIME)
    turns, g = replace(kept, residency="shared"), kept.geometry
    whole, chunks = _activations(kept), _activations(turns)
    spared = (g.context - Opening.prefill_chunk) * (3 * (g.intermediate + g.hidden) + 4 * g.heads * g.context) * 4
    assert whole["decoder"] - chunks["decoder"] == spared and whole["vision"] == chunks["vision"]
    all_held, held = _held(kept), _held(turns)
    assert all_held["vision"] == pytest.approx(4.1 / 1.2 * held["vision"])
    assert all_held["decoder"] == held["decoder"] and all_held["pages"] == held["pages"]
    before, after = (sum(need.bytes for need in needs(c, integrated=True)) for c in (kept, turns))
    assert after < before
