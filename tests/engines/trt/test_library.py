"""What is said of a TensorRT that is too old for what is asked of it, and of what its parser does not know."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines.bundle.kinds import TENSORRT, TENSORRT_RTX
from engines.errors import BackendError
from engines.trt import library
from engines.trt.build import build_engines
from engines.trt.options import EngineOptions
from tests.geometries import tiny


@pytest.fixture
def version(monkeypatch):
    """version(text): that version of TensorRT is installed, and of TensorRT-RTX."""

    def make(text: str) -> None:
        for name in library.MODULES.values():
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__=text))

    return make


@pytest.mark.parametrize("text", ["10.1.0", "10.3.0", "10.13.3.9", "10.14.1.48.post1"])
def test_a_decoder_without_plugins_needs_operators_of_10_15(version, text):
    version(text)
    with pytest.raises(BackendError, match=f"without plugins with TensorRT {text}") as caught:
        library.require_operators(TENSORRT, plugins=False)
    assert "10.15" in caught.value.expected and caught.value.fix == "leave out --no-plugins"
    library.require_operators(TENSORRT, plugins=True)
    library.require_operators(TENSORRT_RTX, plugins=False)


@pytest.mark.parametrize("text", ["10.15.1.29", "10.16.1.11", "11.0.0.114", "11.4.0.106"])
def test_a_decoder_without_plugins_is_parsed_since(version, text):
    version(text)
    library.require_operators(TENSORRT, plugins=False)


def test_it_is_said_before_anything_is_built(version, monkeypatch, random_model):
    bundle = random_model("tiny", tiny(), "fp16")[1]
    version("10.13.3.9")
    monkeypatch.setattr("engines.trt.build.sms_to_build", lambda options: (110,))
    monkeypatch.setattr("engines.trt.build._run", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(BackendError, match=r"without plugins with TensorRT 10\.13"):
        build_engines(bundle, EngineOptions(TENSORRT, plugins=False), quiet=True)


@pytest.mark.parametrize(
    ("text", "maps"), [("10.3.0", False), ("10.12.0.36", False), ("10.13.0.35", True), ("11.4", True)]
)
def test_which_parser_maps_weights(version, text, maps):
    version(text)
    assert library.maps_weights(TENSORRT) is maps and library.maps_weights(TENSORRT_RTX)


def parser_error(operator: str, words: str) -> SimpleNamespace:
    return SimpleNamespace(
        node=lambda: 7, node_name=lambda: "layer 0", node_operator=lambda: operator, desc=lambda: words,
        func=lambda: "checkFallbackPluginImporter",
    )  # fmt: skip


def test_only_an_operator_of_ours_is_called_a_plugin_of_ours():
    """The parser looks for a plugin whenever it does not know an operator, whosever it is."""
    words = "Plugin not found, are the plugin name, version, and namespace correct?"
    ours = library._parse_error(Path("decoder.onnx"), [parser_error("CachedAttention", words)], [], "REBUILD")
    assert "flex::CachedAttention is one of this project's plugins" in ours.found and "register" in ours.fix
    theirs = library._parse_error(Path("decoder.onnx"), [parser_error("TensorScatter", words)], [], "REBUILD")
    assert "TensorScatter" in theirs.found and "this project" not in theirs.found and theirs.fix == "REBUILD"
