"""What ends an answer and begins a prompt: generation_config.json, and the settings beside a tokenizer."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engines.bundle.folder import Bundle
from engines.errors import ConfigError, TokenizerError
from export.build import BuildOptions, build
from export.checkpoint.config import read_config
from export.checkpoint.special_tokens import disagreements
from export.checkpoint.tokenizer import CheckpointTokenizer, read_tokenizer
from export.checkpoint.write_config import write_config
from tests.export.checkpoint.sentences import train
from tests.geometries import tiny
from tests.paths import ROOT

DEFAULT = ROOT / "checkpoints" / "default"
VOCAB = 215  # of that


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The settings of a checkpoint, without weights."""
    write_config(tmp_path / "model", tiny())
    return tmp_path / "model"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A folder with the default model's tokenizer.json, which has <unk>, <s> and </s>."""
    shutil.copy(DEFAULT / "tokenizer.json", tmp_path)
    return tmp_path


def edit(folder: Path, change, vocab: int = VOCAB) -> CheckpointTokenizer | None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw)
    write(folder / "tokenizer.json", raw)
    return read_tokenizer(folder, vocab)


@pytest.mark.parametrize(
    ("generation", "ids"),
    [
        (None, (2,)),
        ({"eos_token_id": [2, 7]}, (2, 7)),
        ({"eos_token_id": 9, "bos_token_id": 1}, (9,)),
        ({"eos_token_id": [7, 7, 2]}, (7, 2)),
        ({"eos_token_id": None}, (2,)),
        ({"max_length": 4096}, (2,)),  # it says nothing of it
        ({}, (2,)),
    ],
)
def test_eos_of_generation_config(folder, generation, ids):
    if generation is not None:
        write(folder / "generation_config.json", generation)
    found = read_config(folder)
    assert found.eos_token_ids == ids and found.notes == () and found.unknown == ()


def test_generate_of_transformers_ends_there_too(folder):
    """Its generation config, made as from_pretrained makes it: of the file, of config.json where there is none."""
    pytest.importorskip("transformers")
    from transformers.generation.configuration_utils import GenerationConfig
    from transformers.models.llama.configuration_llama import LlamaConfig

    for eos in (5, [5, 6]):
        write(folder / "generation_config.json", {"eos_token_id": eos, "bos_token_id": 1})
        theirs = GenerationConfig.from_pretrained(str(folder)).eos_token_id
        assert read_config(folder).eos_token_ids == tuple(theirs if isinstance(theirs, list) else [theirs])
    (folder / "generation_config.json").unlink()
    theirs = GenerationConfig.from_model_config(LlamaConfig(**json.loads((folder / "config.json").read_text())))
    assert read_config(folder).eos_token_ids == (theirs.eos_token_id,) == (2,)


@pytest.mark.parametrize("eos", [64, -1, 10**12, [2, 64], True, "2", [True], 2.0, [[2]], [2] * 1000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_eos_outside_the_vocabulary(folder, name, eos):
    path = folder / name
    write(path, (json.loads(path.read_text()) if path.exists() else {}) | {"eos_token_id": eos})
    with pytest.raises(ConfigError, match=rf"{name}: eos_token_id") as caught:
        read_config(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("bos", [64, -1])
def test_bos_outside_the_vocabulary(folder, bos):
    write(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"bos_token_id": bos})
    with pytest.raises(ConfigError, match=f"bos_token_id is {bos}"):
        read_config(folder)


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, None),  # without do_sample they do nothing
        ({"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "bad_words_ids": None}, None),
        ({"do_sample": True, "temperature": 0.9}, "do_sample True, temperature 0.9"),
        ({"repetition_penalty": 1.2, "suppress_tokens": [3]}, "repetition_penalty 1.2, suppress_tokens [3]"),
        ({"num_beams": 5}, "num_beams 5"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_a_request_decides_is_noted(folder, name, generation, said):
    """Older transformers kept the same in config.json."""
    path = folder / name
    write(path, (json.loads(path.read_text()) if path.exists() else {}) | generation)
    notes = read_config(folder).notes
    assert len(notes) == (said is not None) and all(note.startswith(f"{name}: not obeyed: ") for note in notes)
    assert said is None or set(said.split(", ")) <= set(notes[0].removeprefix(f"{name}: not obeyed: ")
                                                        .split("; ")[0].split(", "))  # fmt: skip


def test_a_file_that_is_there_but_cannot_be_read(folder):
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(ConfigError, match=r"generation_config\.json is a pipe"):
        read_config(folder)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("../blobs/gone")
    with pytest.raises(ConfigError, match="is not there"):
        read_config(folder)


@pytest.mark.parametrize(("said", "bos"), [({}, 1), ({"add_bos_token": True}, 1), ({"add_bos_token": False}, None)])
def test_add_bos_token(tokens, said, bos):
    write(tokens / "tokenizer_config.json", said)
    found = read_tokenizer(tokens, VOCAB)
    assert (found.bos_id, found.eos_ids, found.notes) == (bos, (2,), ())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"add_eos_token": True}, "add_eos_token True is not supported"),
        ({"add_bos_token": "false"}, "add_bos_token is 'false'"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs"),
        ({"do_lower_case": True}, "do_lower_case"),
        ({"bos_token": 1}, "bos_token is 1"),
        ({"bos_token": "<begin>"}, "bos_token is '<begin>', which the tokenizer does not have"),
        ({"eos_token": {"content": "<end>"}}, "eos_token is '<end>', which the tokenizer does not have"),
        ({"added_tokens_decoder": {"7": {"content": 3}}}, "malformed added tokens"),
    ],
)
def test_settings_that_are_refused(tokens, settings, text):
    write(tokens / "tokenizer_config.json", settings)
    if "added_tokens_decoder" in settings:
        (tokens / "tokenizer.json").unlink()
        (tokens / "tokenizer.model").write_bytes(train())
        with pytest.raises(TokenizerError, match=text):
            read_tokenizer(tokens, 400)
        return
    with pytest.raises(TokenizerError, match=text):
        read_tokenizer(tokens, VOCAB)


def test_files_that_contradict_each_other(tokens):
    write(tokens / "tokenizer_config.json", {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "pad_token": None})
    write(tokens / "special_tokens_map.json", {"eos_token": {"content": "</s>"}, "pad_token": "<unk>"})
    assert read_tokenizer(tokens, VOCAB).notes == ()
    write(tokens / "special_tokens_map.json", {"eos_token": "<unk>"})
    with pytest.raises(TokenizerError, match=r"eos_token is '</s>' in tokenizer_config\.json and '<unk>' in spec"):
        read_tokenizer(tokens, VOCAB)


def test_notes_of_tokenizer_settings(tokens):
    write(tokens / "tokenizer_config.json", {"clean_up_tokenization_spaces": True, "new_setting": 1, "legacy": False})
    unknown, spaces = read_tokenizer(tokens, VOCAB).notes
    assert "new_setting" in unknown and "legacy" not in unknown and "clean_up_tokenization_spaces" in spaces


def test_ids_that_disagree_are_told():
    assert disagreements(1, (2,), 1, 2) == [] == disagreements(1, (), None, None) == disagreements(None, (2, 7), 1, 7)
    (bos,) = disagreements(1, (2,), 3, 2)
    (eos,) = disagreements(1, (5, 6), 1, 2)
    assert "bos_token_id is 1" in bos and "3" in bos and "5 or 6, not at 2" in eos


def test_a_pad_token_behind_the_vocabulary(tokens):
    """The official code makes a row for it: `resize_token_embeddings(len(tokenizer))`."""

    def add(content: str, index: int, also: str | None = None):
        def change(raw: dict) -> None:
            token = raw["added_tokens"][0] | {"id": index, "content": content}
            raw["added_tokens"] = [*raw["added_tokens"][:3], token]
            raw["added_tokens"] += [token | {"id": index + 1, "content": also}] if also else []

        return change

    plain, size = read_tokenizer(tokens, VOCAB), Tokenizer.from_file(str(tokens / "tokenizer.json")).get_vocab_size()
    found = edit(tokens, add("<pad>", size), size)
    assert found.notes == (f"token '<pad>', id {size}, is left out: it pads batches, and the model has no row for it",)
    assert found.content == plain.content
    for content, index, also in (("<im_patch>", size, None), ("<pad>", size, "<im_patch>")):
        with pytest.raises(TokenizerError, match=f"<im_patch>' has id {size + (also is not None)}"):
            edit(tokens, add(content, index, also), size)
    with pytest.raises(
        TokenizerError, match=f"'<pad>' has id {size + 3}"
    ) as caught:  # whatever the library makes of it
        edit(tokens, add("<pad>", size + 3), size + 9)
    assert f"id {size}:" in caught.value.expected
    write(tokens / "special_tokens_map.json", {"pad_token": "<filler>"})
    assert "<filler>" in edit(tokens, add("<filler>", size), size).notes[0]
    write(tokens / "special_tokens_map.json", {"pad_token": "<pad>", "eos_token": "<pad>"})  # then it is no pad alone
    with pytest.raises(TokenizerError, match=f"has id {size}"):
        edit(tokens, add("<pad>", size), size)


@pytest.mark.parametrize(
    "damage",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # a panic at opening
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # a panic at the first text
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"added_tokens": 7},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}],
                            "pair": [], "special_tokens": {}}},
    ],
    ids=lambda damage: ",".join(damage),
)  # fmt: skip
def test_whatever_the_library_throws(tokens, damage, capfd):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be used") as caught:
        edit(tokens, lambda raw: raw.update(damage))
    assert "tokenizer.model" not in caught.value.fix  # there is none


def test_the_advice_to_use_the_other_file(tokens):
    (tokens / "tokenizer.model").write_bytes(train())
    raw = json.loads((tokens / "tokenizer.json").read_text())
    write(tokens / "tokenizer.json", raw | {"added_tokens": 7})
    with pytest.raises(TokenizerError, match="cannot be used") as caught:
        read_tokenizer(tokens, 400)
    assert "remove it to use tokenizer.model" in caught.value.fix
    (tokens / "tokenizer.json").unlink()
    assert read_tokenizer(tokens, 400) is not None


def made(model: models.Model, tmp_path: Path) -> CheckpointTokenizer:
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    return read_tokenizer(tmp_path, 400)


def test_a_tokenizer_without_an_unknown_token_is_told(tmp_path, tokens):
    (note,) = edit(tokens, lambda raw: raw["model"].update(unk_id=None)).notes
    assert "no unknown token" in note and "is refused" in note
    (note,) = made(models.WordLevel({"a": 0}, unk_token="<unk>"), tmp_path).notes
    assert "is refused" in note
    (note,) = made(models.BPE({"a": 0, "b": 7}, []), tmp_path).notes  # ids with holes are fine
    assert "are left out" in note
    assert made(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"), tmp_path).notes == ()


def test_bytes_need_no_unknown_token(tmp_path):
    tokenizer = Tokenizer(
        models.BPE({each: n for n, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path, 400).notes == ()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_no_ordinary_file(tokens, name):
    path = tokens / name
    path.unlink(missing_ok=True)
    for make, text in (
        (lambda: os.mkfifo(path), "is a pipe"),
        (path.mkdir, "is a folder"),
        (lambda: path.symlink_to("../blobs/gone"), "is a link to ../blobs/gone"),
        (lambda: path.symlink_to("/dev/zero"), "is a device"),
    ):
        make()
        with pytest.raises(TokenizerError, match=f"{name} {text}"):
            read_tokenizer(tokens, VOCAB)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_build_asks_for_the_tokenizer_first(tmp_path, monkeypatch):
    """Before a weight is opened, and so before anything is written."""
    folder = tmp_path / "model"
    shutil.copytree(DEFAULT, folder)
    write(folder / "tokenizer_config.json", {"add_eos_token": True})
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(TokenizerError, match="add_eos_token"):
        build(BuildOptions(folder, tmp_path / "bundle"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_the_bundle_has_of_it(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEFAULT, folder)
    write(folder / "tokenizer_config.json", {"add_bos_token": False})
    write(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"brand_new": 1, "num_beams": 5})
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 30], "do_sample": true, "temperature": 0.5}')
    console = Console(file=io.StringIO(), width=200)
    manifest = build(BuildOptions(folder, tmp_path / "bundle", check="none"), console).manifest
    said = console.file.getvalue()
    assert "config.json: unknown to this project, not obeyed: brand_new\n" in said
    assert "generation_config.json: not obeyed: do_sample True, temperature 0.5; answers are greedy" in said
    assert "num_beams" not in said  # generation_config.json has the say
    assert manifest.prompt.eos_token_ids == (2, 30) and manifest.prompt.bos_token_id is None
    assert manifest.options["not_obeyed"] == ["brand_new"]
    assert Bundle(tmp_path / "bundle").manifest.prompt.tokenizer == "tokenizer.json"
