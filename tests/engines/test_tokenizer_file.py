"""Tokenizer files that would fill the memory or end the process, refused before the library reads them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from engines.errors import TokenizerError
from engines.tokenizer_file import GROWTH, read_tokenizer_file
from export.checkpoint.tokenizer import read_tokenizer
from runtime.text.prompter import Prompter
from tests.checkpoints import write_tokenizer

VOCAB = 300


def replaced(*contents: str) -> dict:
    steps = [{"type": "Replace", "pattern": {"Regex": "."}, "content": content} for content in contents]
    return {"type": "Sequence", "normalizers": steps}


HOSTILE: dict[str, tuple[Callable[[dict], object], str]] = {
    "an id that needs a row of 2 GB": (
        lambda raw: raw["model"]["vocab"].update({"!": 2**31}),
        "the token id 2147483648",
    ),
    "an added id": (lambda raw: raw["added_tokens"][0].update(id=2**40), "the token id"),
    "a negative id": (lambda raw: raw["model"]["vocab"].update({"!": -1}), "the token id -1"),
    "dropout": (lambda raw: raw["model"].update(dropout=0.1), "dropout 0.1"),
    "text that multiplies": (lambda raw: raw.update(normalizer=replaced(*["a" * 48] * 5)), "replacements that make"),
    "text that grows": (lambda raw: raw.update(decoder=replaced("a" * (GROWTH + 1))), "replacements that make 65"),
    "text in front": (
        lambda raw: raw.update(normalizer={"type": "Prepend", "prepend": "a" * 10**6}),
        "1000000 characters put before",
    ),
    "no object": (lambda raw: raw.update(model=[]), "is no tokenizer.json"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_by_builds_and_by_the_runtime(what, tmp_path):
    change, said = HOSTILE[what]
    write_tokenizer(tmp_path, VOCAB)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match=said):
        read_tokenizer(tmp_path, VOCAB)
    with pytest.raises(TokenizerError, match=said):
        Prompter(path, template="<image>{prompt}", bos_id=1, vocab=VOCAB, image_tokens=4)


def test_what_llama_has_is_read(tmp_path):
    write_tokenizer(tmp_path, VOCAB)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    path.write_text(json.dumps(raw))
    data, settings = read_tokenizer_file(path, fix="none")
    assert data == path.read_bytes() and settings == raw
