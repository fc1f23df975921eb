"""Tokenizer conversion against SentencePiece, on a small LLaMA-style model trained here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer, models

from engines.errors import TokenizerError
from export.checkpoint.tokenizer import BATTERY, CheckpointTokenizer, difference, read_tokenizer
from tests.export.checkpoint.sentences import train


@pytest.fixture(scope="session")
def llama_model() -> bytes:
    return train()


@pytest.fixture
def folder(tmp_path: Path, llama_model: bytes) -> Path:
    """A checkpoint folder with nothing but a tokenizer.model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(llama_model)
    return folder


def read(folder: Path, vocab: int = 500) -> CheckpointTokenizer:
    found = read_tokenizer(folder, vocab)
    assert found is not None
    return found


def load(found: CheckpointTokenizer) -> Tokenizer:
    return Tokenizer.from_buffer(found.content)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def test_battery_covers_what_matters() -> None:
    assert len(BATTERY) == len(set(BATTERY)) >= 40
    assert {"", " ", "\n"} <= set(BATTERY)
    assert any(ord(letter) > 0xFFFF for text in BATTERY for letter in text)


def test_conversion_agrees_with_sentencepiece(folder: Path, llama_model: bytes) -> None:
    found = read(folder)
    assert (found.bos_id, found.eos_ids, found.notes) == (1, (2,), ())
    tokenizer, truth = load(found), SentencePieceProcessor(model_proto=llama_model)
    assert tokenizer.get_vocab_size() == 400
    assert difference(tokenizer, truth, legacy=True) is None
    random.seed(1)
    for _ in range(1000):
        text = "".join(random.choices("theimagqusnwcd  \n\té😀▁12", k=random.randint(0, 40)))
        expected = truth.encode(text)
        assert ids(tokenizer, text) == expected
        assert tokenizer.decode(expected) == truth.decode(expected)


def test_decodes_any_pieces(folder: Path, llama_model: bytes) -> None:
    tokenizer, truth = load(read(folder)), SentencePieceProcessor(model_proto=llama_model)
    random.seed(2)
    for _ in range(500):
        pieces = random.choices(range(3 + 256, 400), k=random.randint(0, 12))  # bytes alone need not be valid text
        assert tokenizer.decode(pieces) == truth.decode(pieces)


def test_special_tokens_are_single_and_adds_no_bos(folder: Path, llama_model: bytes) -> None:
    tokenizer, truth = load(read(folder)), SentencePieceProcessor(model_proto=llama_model)
    expected = [*truth.encode("cat"), 2, *truth.encode("hello"), 1, *truth.encode(" is")]
    assert ids(tokenizer, "cat</s>hello<s> is") == expected
    assert tokenizer.encode("cat").ids == truth.encode("cat")
    assert tokenizer.decode([1, *truth.encode("cat"), 2]) == "cat"


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path, 400) is None


def test_added_tokens(folder: Path) -> None:
    write(folder / "added_tokens.json", {"<pad>": 400, "<s>": 1})
    added = {"401": {"content": "<extra>", "special": False}, "2": {"content": "</s>", "special": True}}
    write(folder / "tokenizer_config.json", {"added_tokens_decoder": added, "eos_token": {"content": "<pad>"}})
    found = read(folder)
    assert (load(found).get_vocab_size(), found.bos_id, found.eos_ids) == (402, 1, (400,))
    assert ids(load(found), "<pad><extra>") == [400, 401]
    assert load(found).decode([400, 401]) == "<extra>"


@pytest.mark.parametrize("added", [{"<pad>": 401}, {"cat": 400, "<s>": 401}, {"<pad>": "x"}, {"<pad>": None}])
def test_bad_added_tokens(folder: Path, added: dict) -> None:
    write(folder / "added_tokens.json", added)
    with pytest.raises(TokenizerError, match="added token"):
        read(folder)


def test_takes_over_a_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    ready = load(read(folder))
    ready.enable_truncation(2)
    ready.enable_padding(length=50)
    ready.add_tokens(["<only here>"])
    ready.save(str(folder / "tokenizer.json"))
    found = read(folder)
    assert ids(load(found), "<only here>") == [400]  # it was taken: it agrees with tokenizer.model
    (folder / "tokenizer.model").unlink()
    assert read(folder) == found
    length = len(ids(load(found), "the cat is curious of the question"))
    assert 2 < length < 50


def test_tokenizer_model_overrules_a_different_json(folder: Path) -> None:
    Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    assert load(read(folder)).get_vocab_size() == 400  # those of tokenizer.model, not the one of tokenizer.json


def test_special_ids_of_a_tokenizer_json(tmp_path: Path) -> None:
    Tokenizer(models.BPE({"a": 0, "<end>": 1, "<s>": 2}, [])).save(str(tmp_path / "tokenizer.json"))
    found = read(tmp_path)
    assert (found.bos_id, found.eos_ids) == (2, ())
    write(tmp_path / "special_tokens_map.json", {"eos_token": "<end>", "bos_token": None})
    found = read(tmp_path)
    assert (found.bos_id, found.eos_ids) == (None, (1,))


def test_vocabulary_must_fit_the_model(folder: Path) -> None:
    assert read_tokenizer(folder, 400) is not None
    with pytest.raises(TokenizerError, match="id 399"):
        read_tokenizer(folder, 399)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"not a tokenizer"])
def test_unreadable(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=f"{name}(: cannot be used| is no )") as caught:
        read(tmp_path)
    assert caught.value.fix == "download the file again"


def test_broken_settings(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is no JSON"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"byte_fallback": False}, "byte fallback is off"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalised"),
        ({"remove_extra_whitespaces": True}, "normalised"),
        ({"user_defined_symbols": ["<image>"]}, "user-defined"),
    ],
)
def test_unlike_llama(tmp_path: Path, changes: dict, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**changes))
    with pytest.raises(TokenizerError, match=message):
        read(tmp_path)


def test_a_conversion_that_differs_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.checkpoint.tokenizer._merges", lambda proto: [])
    with pytest.raises(TokenizerError, match="SentencePiece says"):
        read(folder)


def test_long_pieces_are_refused(tmp_path: Path, llama_model: bytes) -> None:
    proto = ModelProto.FromString(llama_model)
    proto.pieces.add(piece="x" * 5_000, score=-1e6)  # SentencePiece itself takes no longer ones
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match="a piece of more than 1000 characters"):
        read(tmp_path)


def test_without_a_dummy_prefix(tmp_path: Path, llama_model: bytes) -> None:
    proto = ModelProto.FromString(llama_model)
    proto.normalizer_spec.add_dummy_prefix = False
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load(read(tmp_path))
    assert tokenizer.decode(ids(tokenizer, " cat")) == " cat"


@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_decides_on_the_space_behind_a_special_token(folder: Path, legacy: bool) -> None:
    write(folder / "tokenizer_config.json", {"legacy": legacy})
    tokenizer = load(read(folder))
    behind = "\u2581q" if legacy else "q"
    for text in ("cat</s>q", " cat</s>q", "</s>q"):
        alone = tokenizer.encode(text.partition("</s>")[0], add_special_tokens=False).tokens
        assert tokenizer.encode(text, add_special_tokens=False).tokens == [*alone, "</s>", behind]
    truth = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert difference(tokenizer, truth, legacy) is None
    assert "legacy is" in str(difference(tokenizer, truth, not legacy))


def test_a_json_of_another_legacy_is_not_taken(folder: Path) -> None:
    """The official code reads tokenizer.model and legacy alone."""
    (folder / "tokenizer.json").write_bytes(read(folder).content)
    write(folder / "tokenizer_config.json", {"legacy": False})
    assert load(read(folder)).encode("</s>q").tokens == ["</s>", "q"]
    (folder / "tokenizer.model").unlink()
    assert load(read(folder)).encode("</s>q").tokens == ["</s>", "\u2581q"]  # alone, it decides


def test_legacy_that_is_none(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"legacy": "no"})
    with pytest.raises(TokenizerError, match="legacy is 'no'"):
        read(folder)


def test_no_dummy_prefix_and_no_legacy(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(add_dummy_prefix=False))
    write(tmp_path / "tokenizer_config.json", {"legacy": False})
    with pytest.raises(TokenizerError, match="add_dummy_prefix") as caught:
        read(tmp_path)
    assert "remove legacy" in caught.value.fix
    (tmp_path / "tokenizer_config.json").unlink()
    assert read(tmp_path).eos_ids == (2,)
