"""Checkpoints: both file formats, shards, towers, bounded reads, the key table, and every refusal."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.bundle.tensors import TOWER_PREFIX, expected_tensors
from engines.errors import CheckpointError
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.checkpoint.leftovers import dropped_tensors
from export.network.decoder import FlexDecoder, PageProjector
from export.network.vision import Encoder
from tests.geometries import official, tiny


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7, generator=generator),
        "b.weight": torch.randn(3, 4, generator=generator).half(),
        "c.weight": torch.randn(9, generator=generator).bfloat16(),
        "d.weight": torch.randn(2, 2, generator=generator).double(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
    }


def save_index(folder: Path, name: str, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    for file, tensors in shards.items():
        if file.endswith(".safetensors"):
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
    weight_map = {key: file for file, tensors in shards.items() for key in tensors}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save(folder: Path, layout: str, tensors: dict[str, torch.Tensor]) -> Path:
    """Write `tensors` in one of the four layouts; sharded ones in two files."""
    kind, count = layout.split()
    if count == "single":
        if kind == "safetensors":
            save_file(tensors, folder / "model.safetensors")
        else:
            torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    keys = list(tensors)
    halves = [{key: tensors[key] for key in part} for part in (keys[:3], keys[3:])]
    shards = {f"{stem}-{i + 1:05}-of-00002.{suffix}": half for i, half in enumerate(halves)}
    save_index(folder, f"{stem}.{suffix}", shards)
    return folder


LAYOUTS = ["safetensors single", "safetensors sharded", "torch single", "torch sharded"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_what_was_saved(tmp_path: Path, layout: str) -> None:
    tensors = some_tensors()
    checkpoint = Checkpoint.open(save(tmp_path, layout, tensors))
    assert checkpoint.names == sorted(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.info(name)
        assert (info.name, info.dtype, info.shape) == (name, tensor.dtype, tuple(tensor.shape))
        assert info.nbytes == tensor.numel() * tensor.itemsize
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
        pieces = list(checkpoint.chunks(name, max_bytes=16))
        assert b"".join(pieces) == raw
        assert all(len(piece) == 16 for piece in pieces[:-1])
        assert b"".join(checkpoint.chunks(name)) == raw


@pytest.mark.parametrize("layout", ["safetensors sharded", "torch sharded"])
def test_shards_without_an_index(tmp_path: Path, layout: str) -> None:
    tensors = some_tensors()
    save(tmp_path, layout, tensors)
    next(tmp_path.glob("*.index.json")).unlink()
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == sorted(tensors)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
    first, second = sorted(tmp_path.iterdir())
    copy = tmp_path / f"pytorch_model-copy{first.suffix}"
    copy.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="every key once"):
        Checkpoint.open(tmp_path)
    copy.unlink()
    second.unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards"):
        Checkpoint.open(tmp_path)


def test_safetensors_of_any_name(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "flexattention.safetensors")
    assert Checkpoint.open(tmp_path).names == ["x"]


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, "safetensors single", {"x": torch.ones(2)}))
    (tmp_path / "model.safetensors").unlink()
    for read in (checkpoint.tensor, lambda name: next(checkpoint.chunks(name))):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing[\s\S]*has gone"):
            read("x")


def test_prefers_safetensors(tmp_path: Path) -> None:
    save(tmp_path, "safetensors single", {"a": torch.ones(2)})
    save(tmp_path, "torch single", {"a": torch.zeros(2)})
    assert Checkpoint.open(tmp_path).tensor("a").tolist() == [1, 1]


def test_torch_views_share_a_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(6, 4)
    state = {"whole": base, "rows": base[2:5], "parameter": torch.nn.Parameter(torch.ones(3))}
    checkpoint = Checkpoint.open(save(tmp_path, "torch single", state))
    assert torch.equal(checkpoint.tensor("rows"), base[2:5])
    assert torch.equal(checkpoint.tensor("whole"), base)
    assert checkpoint.info("rows").offset == checkpoint.info("whole").offset + 2 * 4 * 4
    assert checkpoint.tensor("parameter").tolist() == [1, 1, 1]


def test_tensor_owns_its_memory(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, "safetensors single", {"a": torch.ones(2)}))
    checkpoint.tensor("a").zero_()
    assert checkpoint.tensor("a").tolist() == [1, 1]


@pytest.mark.parametrize("layout", ["safetensors single", "torch single"])
def test_memory_is_bounded(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, {"a": torch.zeros(16 << 20)})
    checkpoint = Checkpoint.open(tmp_path)
    tracemalloc.start()
    total = 0
    for piece in checkpoint.chunks("a", max_bytes=1 << 20):
        total += len(piece)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 64 << 20
    assert peak < 4 << 20


def test_parity_weights(weights: Path) -> None:
    geometry = read_config(weights).geometry
    checkpoint = Checkpoint.open(weights, weights / "clip")
    needed = expected_tensors(geometry)
    checkpoint.require(needed)
    dropped = dropped_tensors(checkpoint, geometry)
    assert sorted(set(dropped) - {"clip/model.safetensors"}) == sorted(set(checkpoint.names) - set(needed))
    assert dropped["clip/model.safetensors"] == "file not read: the checkpoint has a vision tower of its own"
    reasons = list(dropped.values())
    assert sum("reads no pages" in reason for reason in reasons) == 2 * 9
    assert sum("after the selected" in reason for reason in reasons) == 16
    assert sum("post_layernorm" in name and "norm after" in reason for name, reason in dropped.items()) == 2
    assert not any("unknown" in reason for reason in reasons)


def test_tower_from_its_own_folder(weights: Path, tmp_path: Path) -> None:
    own = {key: value for key, value in load_file(weights / "model.safetensors").items() if "vision_tower" not in key}
    save_file(own, tmp_path / "model.safetensors")
    clip = tmp_path / "clip"
    clip.mkdir()
    tower = load_file(weights / "clip" / "model.safetensors")
    extras = {"vision_model.embeddings.position_ids": torch.arange(577), "text_model.x": torch.ones(1)}
    torch.save({**tower, **extras}, clip / "pytorch_model.bin")
    geometry = read_config(weights).geometry
    with pytest.raises(CheckpointError, match="neither the checkpoint nor a vision tower folder"):
        Checkpoint.open(tmp_path).require(expected_tensors(geometry))
    checkpoint = Checkpoint.open(tmp_path, clip)
    checkpoint.require(expected_tensors(geometry))
    assert not any("text_model" in name for name in checkpoint.names)
    constant = f"{TOWER_PREFIX}vision_model.embeddings.position_ids"
    assert dropped_tensors(checkpoint, geometry)[constant] == "constant table, equal to what is computed instead"
    assert dropped_tensors(checkpoint, geometry)["clip/pytorch_model.bin: text_model.x"] == "not of the vision model"
    name = "vision_model.embeddings.class_embedding"
    assert torch.equal(checkpoint.tensor(TOWER_PREFIX + name), tower[name])
    assert set(checkpoint.identity()["files"]) == {"model.safetensors", "clip/pytorch_model.bin"}


def test_expected_names_are_those_of_the_modules() -> None:
    plain = tiny()
    variants = [
        plain,
        official(),
        replace(plain, projector_depth=1, attention_bias=True, kv_heads=2),
        replace(plain, projector_depth=3, tied_embeddings=True, vision=replace(plain.vision, layers=0)),
    ]
    for geometry in variants:
        with torch.device("meta"):
            states = [module(geometry).state_dict() for module in (Encoder, FlexDecoder, PageProjector)]
        shapes = {name: tuple(value.shape) for state in states for name, value in state.items()}
        assert expected_tensors(geometry) == shapes


def test_require_lists_every_problem(tmp_path: Path) -> None:
    state = {"x.3.weigth": torch.ones(2), "y": torch.ones(2, 3), "z": torch.ones(2, dtype=torch.int32)}
    checkpoint = Checkpoint.open(save(tmp_path, "safetensors single", state))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.require({"x.3.weight": (2,), "y": (3, 2), "z": (2,), "q": (1,)})
    message = str(caught.value)
    assert "4 of 4 keys" in message
    assert "x.3.weight: missing, expected [2]; similar key: x.3.weigth" in message
    assert "y: shape [2, 3] in model.safetensors, expected [3, 2]" in message
    assert "z: dtype torch.int32 in model.safetensors, expected torch.float64 or" in message
    assert "q: missing, expected [1]; no similar key" in message


def test_require_caps_its_list(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, "safetensors single", {"a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"\.\.\. and 15 more"):
        checkpoint.require({f"missing.{index}": (1,) for index in range(25)})


def test_unknown_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, "safetensors single", {"a.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"key a\.weigh is missing[\s\S]*a\.weight"):
        checkpoint.info("a.weigh")


def test_identity(tmp_path: Path) -> None:
    def identity(name: str, value: float, config: str = "{}") -> dict:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        state = {key: torch.tensor(value) for key in "abcd"}
        return Checkpoint.open(save(folder, "safetensors sharded", state)).identity()

    one = identity("one", 1.0)
    assert one["folder"] == "one"
    assert list(one["files"]) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, size in one["files"].items():
        assert size == (tmp_path / "one" / file).stat().st_size
    assert identity("moved", 1.0)["sha256"] == one["sha256"]
    assert identity("tuned", 2.0)["sha256"] != one["sha256"]
    assert identity("reconfigured", 1.0, "{ }")["sha256"] != one["sha256"]
    json.dumps(one)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weight files"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"LoRA adapter[\s\S]*merge"):
        Checkpoint.open(tmp_path)
    save(tmp_path, "safetensors single", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no weight files of the vision tower"):
        Checkpoint.open(tmp_path, tmp_path / "clip")


@pytest.mark.parametrize("layout", ["safetensors sharded", "torch sharded"])
def test_bad_index(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, some_tensors())
    (index,) = tmp_path.glob("*.index.json")
    content = json.loads(index.read_text())
    first = content["weight_map"]["a.weight"]
    content["weight_map"]["ghost"] = first
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{first}: key ghost is missing"):
        Checkpoint.open(tmp_path)
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first}: shard is missing, with 4 keys"):
        Checkpoint.open(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not a shard index"):
        Checkpoint.open(tmp_path)


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], "corrupt safetensors header"),
        ({"a": {"dtype": "F32"}}, "corrupt safetensors header"),
        ({"a": entry([1], [0, 4], "F7")}, "corrupt safetensors header"),
        ({"a": entry([1], [4, 0])}, "corrupt safetensors header"),
        ({"a": entry([2], [0, 4])}, r"a has 4 bytes[\s\S]*8 for torch.float32"),
        ({"a": entry([4], [0, 16])}, r"truncated[\s\S]*at least"),
    ],
)
def test_bad_safetensors_header(tmp_path: Path, header: object, message: str) -> None:
    write_header(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors header"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors single", "torch single"])
def test_truncated(tmp_path: Path, layout: str) -> None:
    save(tmp_path, layout, {"a": torch.ones(1000)})
    checkpoint = Checkpoint.open(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(tmp_path)
    for read in (lambda: list(checkpoint.chunks("a")), lambda: checkpoint.tensor("a")):
        with pytest.raises(CheckpointError, match="ended inside a"):
            read()


def test_unsafe_pickles_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Marked:
        def __reduce__(self) -> tuple:
            return (exec, (f"open({str(mark)!r}, 'w')",))

    save(tmp_path, "torch single", {"a": Marked()})
    with pytest.raises(CheckpointError, match="exec, which is no part of a plain tensor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Marked()}))
    with pytest.raises(CheckpointError, match="not a zip archive"):
        Checkpoint.open(tmp_path)
    assert not mark.exists()


def test_legacy_torch_format(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"legacy format[\s\S]*safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(3, 2).t()}, "a is not contiguous"),
        ({"a": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor|_get_layout"),
        ({"a": {"b": torch.ones(2)}}, "a is a dict"),
        (torch.ones(2), "holds a Tensor"),
    ],
)
def test_unusual_torch_content(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def repacked(source: Path, target: Path, compression: int, replaced: dict[str, bytes], dropped: tuple = ()) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            key = record.filename.rpartition("/")[2]
            if key in dropped:
                continue
            new.writestr(record.filename, replaced.get(key, old.read(record)))


def test_archive_of_an_older_torch(tmp_path: Path) -> None:
    state = {"a": torch.rand(100), "b": torch.rand(7)}
    torch.save(state, tmp_path / "saved.pt")
    newer = (".format_version", ".storage_alignment", "byteorder")
    repacked(tmp_path / "saved.pt", tmp_path / "pytorch_model.bin", zipfile.ZIP_STORED, {}, newer)
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in state.items())


@pytest.mark.parametrize(
    ("compression", "replaced", "message"),
    [
        (zipfile.ZIP_DEFLATED, {}, "compressed"),
        (zipfile.ZIP_STORED, {"byteorder": b"big"}, "big-endian"),
        (zipfile.ZIP_STORED, {"0": b"short"}, "storage is 5 bytes[\\s\\S]*400 bytes"),
        (zipfile.ZIP_STORED, {"data.pkl": b"junk"}, "not a state dict"),
    ],
)
def test_repacked_archives(tmp_path: Path, compression: int, replaced: dict[str, bytes], message: str) -> None:
    torch.save({"a": torch.zeros(100), "b": torch.ones(100)}, tmp_path / "saved.pt")
    repacked(tmp_path / "saved.pt", tmp_path / "pytorch_model.bin", compression, replaced)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)
