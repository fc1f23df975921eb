"""Bundles from object storage: whole and checked, once for a machine, whoever asks at the same time."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="fsspec is not installed: pip install '.[ray]'")
pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

import fsspec

from engines.bundle.folder import Bundle
from engines.bundle.manifest import MANIFEST
from engines.errors import BundleError, OptionError
from runtime.serve.ray.bundles import default_cache, local_bundle


@pytest.fixture(scope="module")
def digest(chat_bundle) -> str:
    return Bundle(chat_bundle).digest


@pytest.fixture
def stored(chat_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(chat_bundle, tmp_path / "bucket/name"))


def kept(cache: Path) -> list[Path]:
    """What is in the cache, locks apart."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"] if cache.is_dir() else []


def test_a_path_stays_where_it_is(chat_bundle, tmp_path):
    assert local_bundle(str(chat_bundle), None, tmp_path) == chat_bundle and not kept(tmp_path)


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "flexattention/bundles"


def test_a_bundle_comes_once(stored, digest, tmp_path):
    cache = tmp_path / "cache"
    found = local_bundle(f"file://{stored}", digest, cache)
    assert Bundle(found, expect=digest).digest == digest and kept(cache) == [found]
    shutil.rmtree(stored)
    assert local_bundle(f"file://{stored}", digest, cache) == found


def test_from_a_store_that_is_no_disk(chat_bundle, digest, tmp_path):
    store = fsspec.filesystem("memory")
    store.put(str(chat_bundle), "/bundles/name", recursive=True)
    assert Bundle(local_bundle("memory://bundles/name", digest, tmp_path / "cache"), expect=digest)


def _fetch(where: str, digest: str, cache: Path) -> None:
    local_bundle(where, digest, cache)


def test_several_processes_wait_for_one(stored, digest, tmp_path):
    cache = tmp_path / "cache"
    new = multiprocessing.get_context("spawn")
    processes = [new.Process(target=_fetch, args=(f"file://{stored}", digest, cache)) for _ in range(3)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(60)
    assert [each.exitcode for each in processes] == [0] * 3
    (found,) = kept(cache)
    Bundle(found, expect=digest)


def test_a_digest_is_needed(stored, tmp_path):
    with pytest.raises(OptionError, match="without a digest"):
        local_bundle(f"file://{stored}", None, tmp_path)


def test_another_bundle_is_refused_before_its_weights_are_read(stored, digest, tmp_path):
    content = json.loads((stored / MANIFEST).read_text())
    del content["digest"]
    content["page_budget"] -= 1
    (stored / MANIFEST).write_text(json.dumps(content))
    for name in content["files"]:
        (stored / name).unlink()
    with pytest.raises(BundleError, match="has the digest sha256") as caught:
        local_bundle(f"file://{stored}", digest, tmp_path / "cache")
    assert caught.value.expected == digest and not kept(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["byte", "longer", "missing"])
def test_nothing_half_or_changed_is_kept(damage, stored, digest, tmp_path):
    name = max(json.loads((stored / MANIFEST).read_text())["files"])
    data = (stored / name).read_bytes()
    if damage == "missing":
        (stored / name).unlink()
    else:
        (stored / name).write_bytes(bytes([data[0] ^ 1]) + data[1:] + b"x" * (damage == "longer"))
    with pytest.raises(BundleError):
        local_bundle(f"file://{stored}", digest, tmp_path / "cache")
    assert not kept(tmp_path / "cache")
    (stored / name).write_bytes(data)
    assert Bundle(local_bundle(f"file://{stored}", digest, tmp_path / "cache"), expect=digest)


def test_a_store_that_is_not_there(digest, tmp_path):
    for where in (f"file://{tmp_path}/nothing", "nosuchstore://bucket/name"):
        with pytest.raises(BundleError, match="cannot be read") as caught:
            local_bundle(where, digest, tmp_path / "cache")
        assert "credentials" in caught.value.fix and not kept(tmp_path / "cache")
