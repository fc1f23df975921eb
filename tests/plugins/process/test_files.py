"""Files that are no files, JSON that is no JSON: each a typed error, none a wait."""

import os

import pytest

from engines.errors import BundleError, CheckpointError
from plugins.files import open_file, parse_json, read_file, read_json


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("gone", lambda path: None, "is missing"),
        ("link", lambda path: path.symlink_to("nowhere"), "a link to nowhere, which is not there"),
        ("loop", lambda path: path.symlink_to(path), "cannot be read"),
        ("folder", lambda path: path.mkdir(), "is a folder"),
        ("pipe", os.mkfifo, "is a pipe"),
        ("zero", lambda path: path.symlink_to("/dev/zero"), "is a device"),
        ("x" * 5000, lambda path: None, "cannot be read: File name too long"),
        ("a\0b", lambda path: None, "cannot be read"),
    ],
)
def test_what_is_no_ordinary_file_is_a_typed_error(tmp_path, name, make, said):
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=said):
        open_file(tmp_path / name, CheckpointError)
    with pytest.raises(CheckpointError, match="do this"):
        open_file(tmp_path / name, CheckpointError, fix="do this")


def test_a_file_is_read_up_to_its_limit_and_no_further(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", BundleError, limit=5) == b"12345"
    with pytest.raises(BundleError, match=r"has 5 bytes\n  expected: at most 4"):
        read_file(tmp_path / "file", BundleError, limit=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("[NaN]", "NaN is no JSON number"),
        ("-Infinity", "-Infinity is no JSON number"),
        ("[1e999]", "1e999 is too large a number"),
        ("9" * 5000, "is no JSON"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' comes twice"),
        ("{", "is no JSON"),
        ("", "is no JSON"),
    ],
)
def test_what_is_no_json_is_a_typed_error(tmp_path, text, said):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(BundleError, match=said):
        read_json(tmp_path / "file.json", BundleError)


def test_json_in_other_bytes_than_utf8_is_a_typed_error():
    with pytest.raises(BundleError, match="header is no JSON"):
        parse_json(b'{"a": "\xff"}', "header", BundleError)
    assert parse_json('\ufeff{"ü": [1, 2.5, null, true]}'.encode(), "header", BundleError) == {
        "ü": [1, 2.5, None, True]
    }
