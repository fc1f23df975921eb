"""The ONNX Runtime backend: devices, the cache in place, room."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines import ort
from engines.bundle.folder import Bundle
from engines.errors import BackendError, BundleError
from engines.ort import MAX_THREADS, OrtModel, installed, library
from tests.engines.manifests import edit
from tests.geometries import tiny
from tests.parity.requests import encode, request
from tests.paths import ROOT
from tests.runtime.questions import GEOMETRY


@pytest.fixture(scope="module")
def model(random_model) -> OrtModel:
    return OrtModel(Bundle(random_model("tiny", tiny())[1]))


def test_unknown_or_absent_devices(random_model):
    bundle = Bundle(random_model("tiny", tiny())[1])
    with pytest.raises(BackendError, match="tpu"):
        OrtModel(bundle, device="tpu")
    if "CUDAExecutionProvider" not in installed()[1]:
        with pytest.raises(BackendError, match="CUDAExecutionProvider") as caught:
            OrtModel(bundle, device="cuda")
        assert "onnxruntime-gpu" in caught.value.fix


@pytest.mark.parametrize("threads", [0, -3, "2", 1.5, True, MAX_THREADS + 1, 5000, 100_000, 10**30, np.uint64(2**63)])
def test_bad_threads(threads, random_model):
    with pytest.raises(BackendError, match="threads=") as caught:
        OrtModel(Bundle(random_model("tiny", tiny())[1]), threads=threads)
    assert f"1 .. {MAX_THREADS}" in caught.value.expected


def test_threads_may_be_numpys(random_model):
    OrtModel(Bundle(random_model("tiny", tiny())[1]), threads=np.uint8(1))


# Of a version that is too old, or none, or broken: what is missing is told before any graph is opened.


@pytest.mark.parametrize("version", ["1.24.4", "1.9.0", "0.5", "", "main", None])
@pytest.mark.parametrize("package", ["onnxruntime", "onnxruntime-gpu"])
def test_an_onnxruntime_that_is_too_old(monkeypatch, random_model, version, package):
    found = SimpleNamespace(__version__=version) if version is not None else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "onnxruntime", found)
    monkeypatch.setattr("engines.ort.library.packages_distributions", lambda: {"onnxruntime": [package]})
    for ask in (installed, lambda: OrtModel(Bundle(random_model("tiny", tiny())[1]))):
        with pytest.raises(BackendError, match="onnxruntime ") as caught:
            ask()
        assert caught.value.expected.startswith("1.25 or newer")
        assert caught.value.fix == f"upgrade it: pip install --upgrade '{package}>=1.25'"


@pytest.mark.parametrize("version", ["1.25.0", "1.32.0", "1.100.1", "2.0.0", "1.26.0.dev20261101"])
def test_one_that_is_new_enough(monkeypatch, version):
    there = SimpleNamespace(__version__=version, get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", there)
    assert installed() == (version, ["CPUExecutionProvider"])


# Graphs that are others than the manifest says, and weights that lie elsewhere.


@pytest.fixture
def copy(random_model, tmp_path) -> Path:
    return Path(shutil.copytree(random_model("tiny", tiny())[1], tmp_path / "bundle"))


@pytest.mark.parametrize(("one", "other"), [("vision", "pages"), ("pages", "decoder"), ("vision", "decoder")])
def test_graphs_of_parts_that_were_exchanged(copy, one, other):
    """Each file is whole, and used once; it is the graph of another part."""

    def exchange(manifest):
        first, second = (manifest["parts"][part]["graphs"]["onnxruntime"] for part in (one, other))
        first["file"], second["file"] = second["file"], first["file"]

    edit(copy, exchange)
    with pytest.raises(BundleError, match="is not the graph of") as caught:
        OrtModel(Bundle(copy), threads=1)
    assert "export/build.py" in caught.value.fix


def test_weights_that_are_links_to_elsewhere(copy, tmp_path):
    (tmp_path / "disk").mkdir()
    for path in copy.glob("*.weights"):
        path.rename(tmp_path / "disk" / path.name)
        path.symlink_to(tmp_path / "disk" / path.name)
    with pytest.raises(BundleError, match=r"vision\.weights is a link to .*disk") as caught:
        OrtModel(Bundle(copy), threads=1)
    command = caught.value.fix.partition(",")[0]
    assert command == f"cp -rL {copy} OTHER"
    subprocess.run([*shlex.split(command)[:-1], str(tmp_path / "other")], check=True)
    assert OrtModel(Bundle(tmp_path / "other"), threads=1)


def test_a_folder_of_links_alone_opens(copy, tmp_path):
    """As the local cache of the Hugging Face Hub has them: all into one folder, under other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for path in copy.iterdir():
        path.rename(tmp_path / "blobs" / f"0{path.name}")
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/0{path.name}")
    assert OrtModel(Bundle(tmp_path / "snapshot"), threads=1)


# The decoder's graph on a GPU is another, if the bundle has it.


@pytest.mark.parametrize(("device", "made_before", "expected"), [
    ("cpu", False, "decoder.onnxruntime.onnx"),
    ("cuda", False, "decoder.onnxruntime-cuda.onnx"),
    ("cuda", True, "decoder.onnxruntime.onnx"),
])  # fmt: skip
def test_which_graph_a_device_gets(monkeypatch, copy, device, made_before, expected):
    if made_before:  # there were any
        edit(copy, lambda manifest: manifest["parts"]["decoder"]["graphs"].pop("onnxruntime-cuda"))
    opened = []
    session = OrtModel.session
    monkeypatch.setattr(
        OrtModel, "session", lambda self, path, *_, **how: opened.append(path.name) or session(self, path, **how)
    )
    monkeypatch.setitem(library.PROVIDERS, "cuda", "CPUExecutionProvider")  # no GPU here: the CPU opens it, too
    monkeypatch.setitem(library.PROVIDER_OPTIONS, "cuda", {})
    OrtModel(Bundle(copy), threads=1, device=device)
    assert opened == ["vision.onnxruntime.onnx", "pages.onnxruntime.onnx", expected]


# Nothing behind the user's back.


def home(folder: Path) -> dict[str, str]:
    """An environment whose home, caches and temporary files lie in `folder`, which is new."""
    places = "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR", "TMPDIR"
    for name in places:
        (folder / name).mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    return {**kept, **{name: str(folder / name) for name in places}, "OMP_NUM_THREADS": "1"}


def test_a_build_and_an_answer_leave_no_file_in_a_new_home(random_model, tmp_path):
    checkpoint, _ = random_model("engine", GEOMETRY, tokenizer=True)
    environment = home(tmp_path / "user")
    build = [
        "export/build.py",
        "--model",
        str(checkpoint),
        "--fp32",
        "--out",
        str(tmp_path / "b"),
        "--check",
        "weights",
    ]
    ask = ["-m", "runtime", str(tmp_path / "b"), "none", "hello", "--max-new-tokens", "2"]
    for line in (build, ask):
        run = subprocess.run(
            [sys.executable, *line], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
    assert [path for path in (tmp_path / "user").rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize(
    ("given", "seen", "first"),
    [
        *((None, "1", first) for first in ("import runtime", "import export.build", "import tests")),
        *((given, given, "import runtime") for given in ("0", "1", "")),
    ],
)
def test_telemetry_is_off_unless_the_user_says_otherwise(given, seen, first):
    """As the library finds it when it is imported, through the runtime and through the export."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    # In the place of the library, one that says what it finds.
    program = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            print(os.environ.get('ORT_DISABLE_TELEMETRY'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "{}\n"
        "from engines.ort import installed; installed()"
    )
    line = [sys.executable, "-c", program.format(first)]
    run = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == f"{seen}\n", run.stderr


def test_the_cache_is_updated_in_place(random_model, capfd):
    """New rows land in the very buffers that are bound, and ONNX Runtime does not report copying the cache."""
    import onnxruntime as ort

    bundle = Bundle(random_model("tiny", tiny())[1])
    model, g = OrtModel(bundle), tiny()
    options = ort.SessionOptions()
    options.log_severity_level = 2  # warnings: TensorScatter warns when it has to copy
    session = ort.InferenceSession(bundle.graph("decoder", "onnxruntime"), options, providers=["CPUExecutionProvider"])
    model.part.session = session
    tiles, ids, begin = request(g, seed=1)
    decoder = model.decoder(encode(model, tiles, begin), ids.shape[1] + 4)
    views = {name: value.numpy() for name, value in decoder._cache.items()}
    decoder.run(ids[:, :-1])
    used = ids.shape[1] - 1
    assert all(view[:, :, :used].any(-1).all() and not view[:, :, used:].any() for view in views.values())
    before = {name: view.copy() for name, view in views.items()}
    decoder.run(ids[:, -1:], g.pages)
    for name, view in views.items():
        assert np.array_equal(view[:, :, :used], before[name][:, :, :used])
        assert view[:, :, used].any(-1).all() and not view[:, :, used + 1 :].any()
    assert "copying past_cache" not in capfd.readouterr().err

    unbound = session.io_binding()  # the same run with outputs elsewhere does copy, and does say so
    for name in (value.name for value in session.get_inputs()):
        desk = decoder._desk
        known = {"input_ids": desk.ids, "past_length": desk.past_length, "page_budget": desk.budget}
        cache = decoder._cache.get(name)
        unbound.bind_ortvalue_input(name, known.get(name) or decoder._inputs.get(name) or cache)
    for value in session.get_outputs():
        unbound.bind_output(value.name, "cpu")
    session.run_with_iobinding(unbound)
    assert "copying past_cache" in capfd.readouterr().err


def test_a_full_cache_is_an_error(model):
    decoder = model.decoder(model.no_image(1), 64)
    decoder.run(np.ones((1, 60), np.int64))
    with pytest.raises(BackendError, match="5 more tokens"):
        decoder.run(np.ones((1, 5), np.int64))
    decoder.run(np.ones((1, 4), np.int64))


def test_forgetting_tokens_brings_the_old_state_back(model):
    decoder = model.decoder(model.no_image(1), 64)
    decoder.run(np.array([[1, 5, 9]]))
    expected = decoder.run(np.array([[7]])).logits
    decoder.run(np.array([[8]]))
    decoder.length[:] = 3
    assert np.array_equal(decoder.run(np.array([[7]])).logits, expected)


def test_enlarged_decoder_goes_on_where_the_other_was(model):
    decoder, other = (model.decoder(model.no_image(1), 64) for _ in range(2))
    for each in (decoder, other):
        each.run(np.array([[1, 5, 9]]))
    larger = other.enlarged(130)
    assert larger.capacity == 192
    difference = larger.run(np.array([[7]])).logits - decoder.run(np.array([[7]])).logits
    assert np.abs(difference).max() <= 1e-5


def test_results_are_copies(model):
    decoder = model.decoder(model.no_image(1), 64)
    first = decoder.run(np.array([[1]]))
    kept = first.logits.copy()
    decoder.run(np.array([[9]]))
    assert np.array_equal(first.logits, kept)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("no", name="onnxruntime"), "is not installed"),
        (ImportError("numpy was interrupted"), "cannot be imported: numpy was interrupted"),
        (ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers"), "cannot be imported: No module"),
    ],
)
def test_an_import_that_fails_is_told_from_a_missing_package(error, told, monkeypatch):
    class Failing:
        def find_spec(self, name, *_):
            if name == "onnxruntime":
                raise error

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    with pytest.raises(BackendError, match=told):
        ort.installed()
