"""`python export/build.py --plan`, and boards as targets of builds."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

import export.build
from engines.bundle.kinds import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from engines.errors import CheckpointError, ConfigError, OptionError
from engines.sizing.fit import Room
from export.build import BuildOptions, SizingRequest, build, parse_arguments
from tests.checkpoints import write_checkpoint
from tests.export.plans import printed
from tests.geometries import tiny
from tests.paths import ROOT


def test_the_command(config_alone):
    for board, status, words in (("agx-orin-64", 0, "\nfits: needs 19.8 GB"), ("orin-nx-16", 1, "\ndoes not fit")):
        line = [sys.executable, "export/build.py", "--plan", "--target", board, "--model", config_alone]
        result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == status and words in result.stdout and not result.stderr
    assert [path.name for path in config_alone.iterdir()] == ["config.json"]


def test_what_is_printed(config_alone):
    fits, text = printed("--target", "orin-nx-16", "--model", config_alone)
    assert not fits and "fix: add --int4 (in place of --fp16); or as it is, it fits agx-orin-64" in text
    for words in ("13.5 GB", "KV cache", "has 14.5 GB, 16.0 GB less 1.5 GB", "not measured", "builder", "tensorrt"):
        assert words in text
    fits, text = printed("--target", "orin-nx-16", "--model", config_alone, "--int4")
    assert fits and "decoder 3.9 GB" in text
    assert (
        "decoder 4.0 GB" in printed("--target", "orin-nx-16", "--model", config_alone, "--int4", "--block-size", 64)[1]
    )
    fits, text = printed("--target", "rtx-4090", "--model", config_alone, "--batch", 4)
    assert not fits and "add --batch 2" in text and "4 x 2048 tokens" in text
    text = printed("--target", "rtx-4090", "--model", config_alone, "--page-budget", 4, "--batch", 4)[1]
    assert "4 pages" in text and "not memory" in text
    fits, text = printed("--target", "rtx-4090", "--model", config_alone, "--context", 1024)
    assert fits and "1 x 1024 tokens" in text and "on any machine" in text


def test_nothing_is_said_of_parts_that_take_nothing(config_alone):
    """Projected lazily, pages have no weights: those of their projection are the decoder's."""
    board = "--target", "orin-nx-16", "--model", config_alone, "--int4", "--projection", "lazy"
    for more in ((), ("--residency", "shared"), ("--kv", "int8")):
        text = " ".join(printed(*board, *more)[1].split())
        assert " 0.0 kB" not in text and "decoder 5.4 GB with the projection of pages KV cache" in text
        assert ("vision 624 MB, decoder" in text) == ("shared" not in more)
        assert ("none one after the other, before the cache, in whose memory they fit: vision" in text) == (
            "shared" in more
        )
    assert "projection of pages" not in printed(*board[:-2])[1]


def test_what_is_stored_apart(config_alone):
    board = "--target", "orin-nano-8", "--model", config_alone, "--int4"
    apart = "--head", "int4", "--vision", "int8"
    plain, text = (" ".join(printed(*board, *options)[1].split()) for options in ((), apart))
    assert "4.9 GB vision 624 MB, pages 398 MB, decoder 3.9 GB" in plain
    assert "head" not in plain.partition("KV cache")[0]
    assert "4.4 GB vision 314 MB, pages 398 MB, decoder 3.7 GB" in text
    assert "int4, head int4, vision int8, tensorrt" in text
    with pytest.raises(OptionError, match="embeddings in int8 with tensorrt") as caught:
        printed(*board, "--embeddings", "int8")
    assert caught.value.fix == "add --embeddings model"


def test_requests_at_once(config_alone):
    """As many requests at once as there are slots, each about an image of its own."""
    board = "--target", "agx-orin-64", "--model", config_alone
    fits, text = printed(*board, "--slots", 4)
    assert fits and "4 x 2048 tokens" in text and "4 slots and 4 images x all 81 pages" in text
    assert "slots: the engines must be built with --batch 4" in text and "of all 4 rows together predicted" in text
    one = printed(*board)[1]
    assert "slots" not in one and "together" not in one
    fits, text = printed(*board, "--slots", 16)
    assert not fits and "fix: add --slots 8" in text
    assert "slots:" not in printed("--model", config_alone, "--slots", 3)[1]  # ONNX Runtime's graphs take any batch
    with pytest.raises(OptionError, match="--slots 4 without --plan") as caught:
        parse_arguments(["--slots", "4"])
    assert "--batch 4" in caught.value.fix


def test_a_builder_that_does_not_fit(config_alone, monkeypatch):
    monkeypatch.setattr("export.fit_report.room_of", lambda board: Room(board.name, 21 * 10**9))
    fits, text = printed("--target", "agx-orin-64", "--model", config_alone)
    assert not fits and "the engines fit, their builder does not: the builder needs 29.8 GB, has 21.0 GB" in text
    assert "fix: add --layers-per-engine 16, or add 9 GB of swap" in text
    fits, text = printed("--target", "agx-orin-64", "--model", config_alone, "--layers-per-engine", 16)
    assert fits and "part by part, 16 layers an engine, mapped weights apart" in text


def test_this_machine_is_the_target_when_none_is_named():
    fits, text = printed("--batch", 2)
    assert fits and "this machine" in text and "2 x 512 tokens" in text and "not known" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "orin"], "unknown target 'orin'"),
        (["--target", "sm_87"], "--plan for compute capabilities"),
        (["--target", "orin-nx-16,rtx-4090"], "--plan for the boards orin-nx-16, rtx-4090"),
        (["--target", "orin-nx-16", "--batch", "0"], "batch 0"),
        (["--batch", "65"], "batch 65"),
        (["--target", "orin-nx-16", "--context", "9999"], "a context of 9999"),
        (["--context", "100"], "a context of 100"),
        (["--page-budget", "82"], "--page-budget 82"),
        (["--target", "orin-nx-16", "--backend", "onnxruntime"], "--target with --backend onnxruntime"),
    ],
)
def test_what_is_refused(config_alone, arguments, message):
    with pytest.raises(OptionError, match=message) as caught:
        printed("--model", config_alone, *arguments)
    if message.startswith(("unknown", "--plan")):
        assert "orin-nano-8, " in caught.value.expected and "h100-80" in caught.value.expected


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        printed("--model", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json"):
        printed("--model", tmp_path)


def test_a_board_brings_its_backend_and_its_sm():
    options = parse_arguments(["--target", "orin-nx-16,agx-orin-64"])
    assert options.backend == TENSORRT and options.engines.targets == (87,)
    assert options.engines.boards == ("orin-nx-16", "agx-orin-64")
    options = parse_arguments(["--target", "rtx-4090,rtx-5090"])
    assert options.backend == TENSORRT_RTX and options.engines.targets == (89, 120)
    assert parse_arguments(["--target", "rtx-4090", "--backend", "tensorrt"]).backend == TENSORRT
    assert parse_arguments(["--plan"]) == SizingRequest() and BuildOptions().backend == ONNXRUNTIME
    assert parse_arguments(["--plan", "--target", "rtx-4090", "--batch", "3"]).batch == 3
    with pytest.raises(OptionError, match="--batch with --backend onnxruntime"):
        parse_arguments(["--batch", "2"])  # of a build it would be ignored


def test_a_build_for_a_board_it_does_not_fit_does_not_start(config_alone, tmp_path):
    options = parse_arguments(["--target", "orin-nx-16", "--model", str(config_alone), "--out", str(tmp_path / "out")])
    with pytest.raises(OptionError, match=r"orin-nx-16 needs 19\.8 GB, has 14\.5 GB") as caught:
        build(options)
    assert "--int4" in caught.value.fix and not (tmp_path / "out").exists()


def test_a_builder_that_does_not_fit_is_no_reason_not_to_prepare(tmp_path, monkeypatch):
    checkpoint, out = write_checkpoint(tmp_path / "checkpoint", tiny()), tmp_path / "bundle"
    said = "orin-nx-16: the builder needs more; add swap"
    monkeypatch.setattr(export.build, "require_boards", lambda c, boards: [said] * len(boards))

    class GotToWork(Exception):
        pass

    def compile_kernels(*_):
        raise GotToWork

    monkeypatch.setattr(export.build, "compile_kernels", compile_kernels)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(GotToWork):
        build(parse_arguments(["--target", "orin-nx-16", "--model", str(checkpoint), "--out", str(out)]), console)
    assert said in console.file.getvalue()
