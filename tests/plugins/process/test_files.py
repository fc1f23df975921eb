"""Files that are no files, JSON that is no JSON: each a typed error, none a wait."""

import os
import subprocess
import sys

import pytest

from engines.errors import BundleError, CheckpointError
from plugins.files import open_file, parse_json, read_file, read_json
from tests.paths import ROOT


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


def test_a_file_that_says_no_size_is_read_up_to_its_limit():
    """As those are that the kernel makes while they are read."""
    assert b"python" in read_file("/proc/self/cmdline", BundleError, limit=1 << 20)
    with pytest.raises(BundleError, match=r"has more than 4 bytes\n  expected: at most 4"):
        read_file("/proc/self/cmdline", BundleError, limit=4)


def test_reading_takes_memory_for_the_file_not_for_its_limit(tmp_path):
    """Data sets may have gigabytes. And what memory has no room for is a typed error."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"12345")
    with open(large, "wb") as file:
        file.truncate(1 << 30)  # takes no room on the disk
    script = f"""
import resource
from engines.errors import DataError
from plugins.files import read_file
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
assert read_file({str(small)!r}, DataError, limit=4 << 30) == b"12345"
try:
    read_file({str(large)!r}, DataError, limit=4 << 30)
except DataError as error:
    assert "1073741824 bytes, more than memory has room for" in str(error), error
else:
    raise SystemExit("it was read")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


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
