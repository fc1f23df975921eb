"""Which files and tensors of a folder count, and what a folder or a path is when it is no model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from engines.errors import CheckpointError
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.checkpoint.leftovers import dropped_tensors
from export.checkpoint.model_folder import require_model_folder
from export.checkpoint.packed import open_checkpoint
from export.outline import outline
from export.recipe import settle
from tests.checkpoints import write_checkpoint
from tests.geometries import tiny

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write_index(folder: Path, files: object, name: str = INDEX, **more: object) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": files, **more}))


# The index.


def test_the_index_alone_places_tensors(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / FIRST)
    save_file({"a": torch.zeros(2), "c": torch.ones(4), "ghost": torch.ones(1)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == ["a", "b", "c"] and checkpoint.tensor("a").tolist() == [1, 1]
    assert checkpoint.unread == {
        f"{SECOND}: a": f"stale: {INDEX} places it in {FIRST}",
        f"{SECOND}: ghost": f"stale: {INDEX} does not name it",
    }


def test_stale_tensors_are_told_and_not_built(tmp_path):
    """A superseded lm_head in another shard made a wrong model."""
    folder = write_checkpoint(tmp_path / "checkpoint", tiny())
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    head = tensors["lm_head.weight"]
    save_file({"lm_head.weight": head}, folder / FIRST)
    save_file({**tensors, "lm_head.weight": head.flip(0).contiguous()}, folder / SECOND)
    write_index(folder, {name: FIRST if name == "lm_head.weight" else SECOND for name in tensors})
    config = read_config(folder)
    checkpoint = open_checkpoint(folder, config)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), head)
    why = f"stale: {INDEX} places it in {FIRST}"
    assert dropped_tensors(checkpoint, config.geometry) == {f"{SECOND}: lm_head.weight": why}
    console = Console(record=True, width=200)
    outline(console, settle(BuildOptions(folder), config), checkpoint)
    assert f"1 x {why}: {SECOND}: lm_head.weight" in console.export_text()


def test_names_are_printed_as_they_are(tmp_path):
    """Square brackets are markup where builds print."""
    folder = write_checkpoint(tmp_path / "checkpoint", tiny(), overrides={"[/red]x[bold]": torch.ones(1)})
    config, console = read_config(folder), Console(record=True, width=200)
    outline(console, settle(BuildOptions(folder), config), open_checkpoint(folder, config))
    assert "no part of it has this name: [/red]x[bold]" in console.export_text()


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "C:\\a.safetensors", "a\\b", "a:b",
     "x" * 5000, "a\0b", "a\nb", "\ud800", 7, None, ["a"], {"a": 1}],
)  # fmt: skip
def test_an_index_stays_in_its_folder(tmp_path, file):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    write_index(folder, {"a": file})
    with pytest.raises(CheckpointError, match="not a shard index: it places 'a' in"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "a"}',
     '{"weight_map": {"a": "x", "a": "y"}}', '{"weight_map": {"a": "x"}, "weight_map": {"a": "y"}}',
     '{"weight_map":' + "[" * 100_000, '{"weight_map": {"a": Infinity}}', '{"n": 1e999, "weight_map": {"a": "x"}}'],
)  # fmt: skip
def test_what_is_no_index(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="not a shard index"):
        Checkpoint.open(tmp_path)


def test_an_index_of_absurd_size_is_not_read(tmp_path):
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"not a shard index: .* has 1099511627776 bytes"):
        Checkpoint.open(tmp_path)


def test_total_size_is_no_reason_to_refuse(tmp_path):
    """It changes nothing of what is read, and tools that merge leave it as it was."""
    save_file({"a": torch.ones(2)}, tmp_path / FIRST)
    write_index(tmp_path, {"a": FIRST}, metadata={"total_size": 1})
    assert Checkpoint.open(tmp_path).names == ["a"]


def test_a_cache_of_links(tmp_path):
    """As huggingface_hub makes it: a snapshot of links into blobs, outside the folder."""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "1")
    write_index(tmp_path / "blobs", {"a": FIRST}, "2")
    (snapshot / FIRST).symlink_to("../../blobs/1")
    (snapshot / INDEX).symlink_to("../../blobs/2")
    assert Checkpoint.open(snapshot).tensor("a").tolist() == [1, 1]
    (tmp_path / "snapshots" / "aaa").mkdir()  # an earlier revision
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("abc")
    with pytest.raises(CheckpointError, match=re.escape(f"--model {snapshot}")):
        require_model_folder(tmp_path)
    (tmp_path / "blobs" / "1").unlink()
    with pytest.raises(CheckpointError, match=r"link to ../../blobs/1, which is not there[\s\S]*complete the download"):
        Checkpoint.open(snapshot)


# Which files count.


@pytest.mark.parametrize("layout", range(4))
def test_files_count_in_the_order_of_transformers(tmp_path, layout):
    """And transformers itself agrees on which file that is."""
    utils = pytest.importorskip("transformers.modeling_utils")
    names = ["model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"][layout:]
    for value, name in enumerate(names):
        file = name if not name.endswith(".json") else f"{name.partition('.')[0]}-1.{name.split('.')[1]}"
        if name.endswith(".json"):
            write_index(tmp_path, {"a": file}, name)
        tensor = torch.full((2,), float(value))
        save_file({"a": tensor}, tmp_path / file) if file.endswith("safetensors") else torch.save(
            {"a": tensor}, tmp_path / file
        )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensor("a").tolist() == [0, 0]
    theirs, _ = utils._get_resolved_checkpoint_files(
        str(tmp_path), variant=None, gguf_file=None, use_safetensors=None, user_agent=None, is_remote_code=False
    )
    assert [Path(file).name for file in theirs] == [checkpoint.info("a").file.name]
    assert set(checkpoint.unread) == {path.name for path in tmp_path.iterdir()} - {names[0], Path(theirs[0]).name}
    assert all(why.startswith("file not read: ") for why in checkpoint.unread.values())


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "device", "loop"])
def test_what_cannot_be_read_is_not_passed_over(tmp_path, name, kind):
    """A file of lower rank beside it is another model, as a rule an older one."""
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    write_index(tmp_path, {"a": "pytorch_model-00001-of-00001.bin"}, "pytorch_model.bin.index.json")
    path = tmp_path / name
    match kind:
        case "link":
            path.symlink_to("../blobs/gone")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(name)
    said = {"link": "gone", "folder": "is a folder", "pipe": "is a pipe", "device": "is a device", "loop": "cannot"}
    with pytest.raises(CheckpointError, match=said[kind]):
        Checkpoint.open(tmp_path)


def test_every_weight_file_that_is_not_read_is_named(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / FIRST)
    write_index(tmp_path, {"a": FIRST})
    for name in ("model-00009-of-00009.safetensors", "consolidated.00.pth", "x.gguf", "mm_projector.bin"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    why = f"file not read: {INDEX} does not name it"
    names = ["consolidated.00.pth", "mm_projector.bin", "model-00009-of-00009.safetensors", "x.gguf"]
    assert Checkpoint.open(tmp_path).unread == dict.fromkeys(names, why)


def test_names_that_are_no_text(tmp_path):
    """Linux takes any bytes for a name; manifests and terminals do not."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    odd = os.fsdecode(b"\xff.safetensors")
    (tmp_path / odd).write_bytes(b"")
    assert list(Checkpoint.open(tmp_path).unread) == [ascii(odd)]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a file is called") as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).isascii()


# What a folder is instead.

LORA = r"LoRA adapter[\s\S]*merge_lora_weights.py --model-path .* --model-base {}"
FOLDERS = {
    "PEFT": ({"adapter_config.json": '{"base_model_name_or_path": "a/b"}', "adapter_model.safetensors": ""},
             LORA.format("a/b")),
    "PEFT, no settings": ({"adapter_model.bin": ""}, LORA.format("BASE")),
    "PEFT, damaged settings": ({"adapter_config.json": "[" * 5000}, LORA.format("BASE")),
    "LLaVA LoRA": ({"non_lora_trainables.bin": "", "config.json": "{}"}, LORA.format("BASE")),
    "both": ({"adapter_model.safetensors": "", "model.safetensors": ""},
             r"adapter_model.safetensors beside model.safetensors[\s\S]*move adapter_model"),
    "both, shards": ({"adapter_model.bin": "", INDEX: ""}, "beside model.safetensors.index.json"),
    "projector": ({"mm_projector.bin": ""}, "only a projector"),
    "ZeRO": ({"zero_to_fp32.py": "parser.add_argument('output_file')", "global_step9/": "", "latest": ""},
             r"DeepSpeed[\s\S]*cd .* && python zero_to_fp32.py \. pytorch_model.bin"),
    "ZeRO, newer": ({"zero_to_fp32.py": "parser.add_argument('output_dir')", "global_step9/": ""},
                    r"python zero_to_fp32.py \. merged, then copy config.json"),
    "ZeRO's own": ({"mp_rank_00_model_states.pt": ""}, "DeepSpeed"),
    "FSDP": ({"__0_0.distcp": "", ".metadata": ""}, r"accelerate merge-weights .* MERGED[\s\S]*dcp_to_torch"),
    "FSDP of Accelerate": ({"pytorch_model_fsdp_0/": ""}, r"accelerate merge-weights .*/pytorch_model_fsdp_0 MERGED"),
    "GGUF": ({"model.Q4_K_M.gguf": ""}, r"llama.cpp \(GGUF\)"),
    "Meta": ({"consolidated.00.pth": ""}, "another layout"),
    "Flax": ({"flax_model.msgpack": ""}, "TensorFlow or Flax"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_hold_something_else(tmp_path, kind):
    files, text = FOLDERS[kind]
    for name, content in files.items():
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text(content)
    for ask in (require_model_folder, Checkpoint.open, lambda folder: build(BuildOptions(folder, tmp_path / "out"))):
        with pytest.raises(CheckpointError, match=text):
            ask(tmp_path)


def test_states_inside_a_run_name_the_folder_above(tmp_path):
    step = tmp_path / "global_step500"
    step.mkdir()
    (tmp_path / "zero_to_fp32.py").write_text("")
    (step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text("")
    with pytest.raises(CheckpointError, match=f"name the folder above, {tmp_path}"):
        require_model_folder(step)


def test_what_a_training_run_leaves_beside_whole_weights_is_no_reason(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("zero_to_fp32.py", "adapter_config.json", "mm_projector.bin", "training_args.bin"):
        (tmp_path / name).write_text("")  # the public checkpoint has the first, a merged one may have the second
    (tmp_path / "global_step9").mkdir()
    require_model_folder(tmp_path)
    assert Checkpoint.open(tmp_path).names == ["a"]


def test_a_folder_without_weights_has_sizes(tmp_path):
    """--plan reads nothing but config.json; a download that goes on may have brought more of the public repository."""
    for name in ("config.json", "zero_to_fp32.py", "generation_config.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
    require_model_folder(tmp_path)


# What a path is instead.


def test_the_default_model_seen_from_another_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="run this in the project's folder") as caught:
        require_model_folder(Path("checkpoints/default"))
    assert "Hub" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("senfu/llava-v1.5-7b-flexattn",
         r"Hub[\s\S]*hf download senfu/llava-v1.5-7b-flexattn --local-dir checkpoints/llava-v1.5-7b-flexattn"),
        ("https://huggingface.co/a/b/tree/main", r"Hub[\s\S]*hf download a/b --local-dir"),
        ("hf://a/b", r"hf download a/b"),
        (r"C:\models\x", "path of Windows"),
        ("C:/models/x", "path of Windows"),
        (r"models\x", "path of Windows"),
        ("nowhere", "no checkpoint folder nowhere\n"),
        ("checkpoints/defualt", "no checkpoint folder checkpoints/defualt\n"),
        ("/a/b", "no checkpoint folder /a/b\n"),
        ("./a/b/c", "no checkpoint folder a/b/c\n"),
        ("x" * 5000, "no checkpoint folder x.*: File name too long"),
        ("a\0b", "no checkpoint folder"),
        ("/dev/null", "neither a folder nor a file"),
    ],
)  # fmt: skip
def test_paths_that_are_no_folder(path, text):
    with pytest.raises(CheckpointError, match=text) as caught:
        build(BuildOptions(Path(path)))
    assert len(str(caught.value)) < 1000


def test_files_and_links_in_place_of_a_folder(tmp_path):
    for name, text in (("x.gguf", "GGUF"), ("model.safetensors", f"name the folder it is in: --model {tmp_path}")):
        (tmp_path / name).write_text("")
        with pytest.raises(CheckpointError, match=text):
            require_model_folder(tmp_path / name)
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(CheckpointError, match="link to gone, which is not there"):
        require_model_folder(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_nobody_may_read(tmp_path):
    tmp_path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        require_model_folder(tmp_path)


# Names of a wrapper.


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model."])
def test_prefixes_are_named(tmp_path, prefix):
    save_file({f"{prefix}model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 of 1 keys begin with '{prefix}'"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "layout"), [("module.", "single"), ("base_model.model.", "shards"), ("_orig_mod.", "bin")]
)
def test_the_fix_takes_prefixes_away(tmp_path, prefix, layout):
    names = {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}
    wrapped = {prefix + name: tensor for name, tensor in names.items()}
    match layout:
        case "single":
            save_file(wrapped, tmp_path / "model.safetensors")
        case "shards":
            save_file(wrapped, tmp_path / FIRST)
            write_index(tmp_path, dict.fromkeys(wrapped, FIRST))
        case "bin":
            torch.save(wrapped, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"2 of 2 keys begin with '{prefix}'") as caught:
        Checkpoint.open(tmp_path)
    line = caught.value.fix[caught.value.fix.index("cd ") :].replace("python -c", f"{shlex.quote(sys.executable)} -c")
    assert subprocess.run(line, shell=True).returncode == 0
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == sorted(names)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in names.items())


def test_a_wrapped_tower(tmp_path):
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "clip").mkdir()
    save_file({"module.vision_model.x": torch.ones(2)}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"clip: 1 of 1 keys begin with 'module\.'"):
        Checkpoint.open(tmp_path, tmp_path / "clip")


@pytest.mark.parametrize(
    "name",
    ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
     "model.layers.0.mlp.up_proj.lora_B.default.weight",
     "model.layers.0.self_attn.k_proj.ia3_l", "model.layers.0.self_attn.q_proj.base_layer.weight",
     "model.layers.0.self_attn.q_proj.lora_magnitude_vector"],
)  # fmt: skip
def test_adapters_among_the_weights(tmp_path, name):
    save_file({name: torch.ones(2), "model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 tensors of an adapter such as {name}"):
        Checkpoint.open(tmp_path)


def test_the_port_of_transformers(tmp_path):
    save_file({"language_model.model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="transformers' own port of LLaVA"):
        Checkpoint.open(tmp_path)
