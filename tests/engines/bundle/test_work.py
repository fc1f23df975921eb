"""Work folders: never left behind by what ends, swept up after what was killed, never taken from what lives."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.bundle import work
from engines.bundle.work import LOCK, OLD, locked, sweep, work_folder, write_whole
from engines.bundle.writer import write_bundle
from engines.errors import ExportError
from tests.geometries import tiny
from tests.paths import ROOT

KILLED = """
import sys, time
from pathlib import Path
from engines.bundle.work import work_folder
with work_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(bytes(1000))
    {more}
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def builder():
    """builder(place, more) -> a process that works in a work folder for `place`, and the folder."""
    started = []

    def start(place: Path, more: str = "") -> tuple[subprocess.Popen, Path]:
        program = [sys.executable, "-c", KILLED.format(more=more), str(place)]
        started.append(subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        return started[-1], Path(started[-1].stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.wait()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_what_a_killed_build_left_goes_with_the_next(builder, tmp_path):
    process, folder = builder(tmp_path / "b")
    assert folder.is_dir() and hidden(tmp_path) == [folder.name]
    process.kill()
    process.wait()
    with write_bundle(tmp_path / "b") as writer:
        assert not folder.exists()
        writer.write("part", iter([b"new"]))
    assert hidden(tmp_path) == [] and (tmp_path / "b" / "part").read_bytes() == b"new"


def test_the_folder_of_a_build_that_lives_is_never_touched(builder, tmp_path):
    _, folder = builder(tmp_path / "b")
    with write_bundle(tmp_path / "b") as writer:
        writer.write("part", iter([b"new"]))
    assert (folder / "weights").stat().st_size == 1000


def test_a_stopped_build_lives(builder, tmp_path):
    process, folder = builder(tmp_path / "b")
    process.send_signal(signal.SIGSTOP)
    sweep(tmp_path / "b")
    assert (folder / "weights").exists()
    process.send_signal(signal.SIGCONT)


def test_a_process_that_a_build_started_does_not_keep_its_folder(builder, tmp_path):
    """The lock belongs to the builder alone: what it started, and left behind, does not hold it."""
    more = "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])"
    process, folder = builder(tmp_path / "b", f"{more}; print(child.pid, flush=True)")
    child, folder = int(str(folder)), Path(process.stdout.readline().strip())
    try:
        process.kill()
        process.wait()
        sweep(tmp_path / "b")
        assert not folder.exists()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("stranger", ["photos", "a lock of another kind", "no lock", "a pipe", "a link", "other place"])
def test_what_is_not_certainly_ours_stays(builder, tmp_path, stranger):
    folder = tmp_path / ".b-0123abcd"
    folder.mkdir()
    (folder / "thesis").write_text("mine")
    match stranger:
        case "photos":
            folder = folder.rename(tmp_path / ".b-holidays")
            (folder / LOCK).write_bytes(work._MARK)
        case "a lock of another kind":
            (folder / LOCK).write_text("apt")
        case "a pipe":
            os.mkfifo(folder / LOCK)
        case "a link":
            elsewhere = folder.rename(tmp_path / "elsewhere")
            (elsewhere / LOCK).write_bytes(work._MARK)
            folder.symlink_to(elsewhere)
        case "other place":
            folder = folder.rename(tmp_path / ".c-0123abcd")
            (folder / LOCK).write_bytes(work._MARK)
    sweep(tmp_path / "b")
    assert (folder / "thesis").read_text() == "mine"


def test_a_lock_that_is_a_link_is_not_ours(tmp_path):
    folder = tmp_path / ".b-0123abcd"
    folder.mkdir()
    (tmp_path / "mark").write_bytes(work._MARK)
    (folder / LOCK).symlink_to(tmp_path / "mark")
    sweep(tmp_path / "b")
    assert folder.exists()


def test_without_locks_nothing_is_abandoned(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    folder = tmp_path / ".b-0123abcd"
    folder.mkdir()
    (folder / LOCK).write_bytes(work._MARK)
    monkeypatch.setattr(work.fcntl, "flock", refuse)
    sweep(tmp_path / "b")
    assert folder.exists()
    with write_bundle(tmp_path / "b") as writer:  # and builds go on without
        writer.write("part", iter([b"new"]))
    assert (tmp_path / "b" / "part").exists()


@pytest.mark.parametrize("came", [False, True])
def test_a_bundle_that_was_set_aside_comes_back_unless_its_successor_came(builder, tmp_path, came):
    place = tmp_path / "b"
    place.mkdir()
    (place / "old").write_text("old")
    process, folder = builder(place, f"Path(sys.argv[1]).rename(folder / {OLD!r})")
    process.kill()
    process.wait()
    if came:
        place.mkdir()
        (place / "new").write_text("new")
    sweep(place)
    assert [path.name for path in place.iterdir()] == (["new"] if came else ["old"]) and not folder.exists()


def test_an_interruption_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    place = tmp_path / "b"
    place.mkdir()
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), write_bundle(place) as writer:
        writer.write("part", iter([b"new"]))
    assert place.is_dir() and not hidden(tmp_path)


def test_a_name_that_is_taken_is_left_alone(tmp_path, monkeypatch):
    names = iter(["00000000", "00000001"])
    monkeypatch.setattr(work.secrets, "token_hex", lambda count: next(names))
    (tmp_path / ".b-00000000").mkdir()
    (tmp_path / ".b-00000000" / "thesis").write_text("mine")
    with work_folder(tmp_path / "b") as folder:
        assert folder.name == ".b-00000001"
    assert (tmp_path / ".b-00000000" / "thesis").read_text() == "mine" and not folder.exists()


def test_a_folder_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    flock, others = work.fcntl.flock, []

    def slow(descriptor, kind):
        if not others:  # between its marking and its locking, another build sweeps
            others.append(descriptor)
            sweep(tmp_path / "b")
        return flock(descriptor, kind)

    monkeypatch.setattr(work.fcntl, "flock", slow)
    with work_folder(tmp_path / "b") as folder:
        assert folder.is_dir() and hidden(tmp_path) == [folder.name]
    assert hidden(tmp_path) == []


def test_an_interruption_as_the_folder_is_made_leaves_nothing(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def interrupted(self, *arguments, **named):
        mkdir(self, *arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "b"):
        pytest.fail("not reached")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_of_engines_left_in_a_bundle_does_not_keep_it_from_being_replaced(random_model, tmp_path):
    bundle = Path(shutil.copytree(random_model("tiny", tiny())[1], tmp_path / "b"))
    (bundle / "vision.tensorrt-rtx-0123abcd.plan").write_bytes(b"unlisted")
    (bundle / ".bundle.json-x8_abc").write_bytes(b"half")
    with write_bundle(bundle) as writer:
        writer.write("part", iter([b"new"]))
    assert [path.name for path in bundle.iterdir()] == ["part"]


def test_a_file_is_written_whole_and_over_no_link(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "target").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "target"]


def test_a_lock_is_one_at_a_time_and_no_link(tmp_path):
    program = (
        "import sys; from pathlib import Path; from engines.bundle.work import locked\n"
        "print('asks', flush=True)\n"
        "with locked(Path(sys.argv[1])): Path(sys.argv[2]).touch()"
    )
    with locked(tmp_path / "lock"):
        line = [sys.executable, "-c", program, str(tmp_path / "lock"), str(tmp_path / "in")]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout.readline() == "asks\n"
        time.sleep(0.3)
        assert not (tmp_path / "in").exists()
    assert process.wait() == 0 and (tmp_path / "in").exists()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"), locked(tmp_path / "link"):
        pytest.fail("not reached")
    assert not (tmp_path / "elsewhere").exists()


def test_a_place_that_cannot_be_written_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot write"), write_bundle(tmp_path / "file" / "b"):
        pytest.fail("not reached")
