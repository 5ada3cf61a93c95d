"""A directory appears whole, whoever is killed while writing it."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_jax.errors import DataError, StorageError
from gspo_jax.files.appearing import appearing


def test_a_directory_appears_with_modes_of_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        with appearing(tmp_path / "deep" / "out") as partial:
            (partial / "x").write_text("whole")
            assert not (tmp_path / "deep" / "out").exists()
    finally:
        os.umask(old)
    out = tmp_path / "deep" / "out"
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert stat.S_IMODE((out / "x").stat().st_mode) == 0o644
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_files_and_directories_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    events = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    with appearing(tmp_path / "out") as partial:
        (partial / "x").write_text("x")
    assert events == [f"{partial}/x", str(partial), "rename", str(tmp_path)]


def test_an_existing_directory_is_refused_and_an_empty_one_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with appearing(tmp_path / "out") as partial:
        (partial / "x").write_text("new")
    with (
        pytest.raises(DataError, match="out exists already; choose a new directory"),
        appearing(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    with (
        pytest.raises(StorageError, match="out cannot be written: No space left on device"),
        appearing(tmp_path / "out") as partial,
    ):
        (partial / "x").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


WRITER = """
import os, signal, sys, time
from pathlib import Path
from gspo_jax.files.appearing import appearing
renames, rename = [], Path.rename
def counted(a, b):
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    renames.append(b)
    return rename(a, b)
Path.rename = counted
with appearing(sys.argv[1], replace=True) as partial:
    (partial / "x").write_text("new")
    if sys.argv[3] == "waits":
        print("writing", flush=True)
        time.sleep(60)
"""


def writer(target, killed_at, then="goes on"):
    """A process that writes `target`, and is killed just before this rename (the first is 0)."""
    command = [sys.executable, "-c", WRITER, str(target), str(killed_at), then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def write_anew(target, text):
    with appearing(target, replace=True) as partial:
        (partial / "x").write_text(text)


def test_an_export_that_is_killed_leaves_no_half_directory(tmp_path):
    """SIGKILL between the first file and the rename: the target must be absent."""
    with writer(tmp_path / "out", 9, "waits") as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    with appearing(tmp_path / "out") as partial:  # the next attempt is not in its way
        (partial / "x").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # and has cleared it away
    assert (tmp_path / "out" / "x").read_text() == "whole"


def test_what_is_left_is_cleared_away_only_where_its_writer_is_dead_and_the_name_is_ours(tmp_path):
    others = [".out.partial-", ".out.partial-0123456z", ".out2.partial-01234567", ".out.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial-0123abcd").symlink_to(tmp_path / "elsewhere")
    before = set(tmp_path.iterdir())
    with writer(tmp_path / "out", 9, "waits") as process:
        assert process.stdout.readline() == "writing\n"
        (alive,) = set(tmp_path.iterdir()) - before
        write_anew(tmp_path / "out", "ours")
        assert (alive / "x").read_text() == "new"
        process.kill()
    write_anew(tmp_path / "out", "ours")
    kept = {*others, "elsewhere", "out", ".out.partial-0123abcd"}
    assert {p.name for p in tmp_path.iterdir()} == kept


@pytest.mark.long
def test_a_replaced_directory_is_there_whole_whenever_the_writer_is_killed(tmp_path):
    """Renames: the old one aside, the new one in its place."""
    for killed_at, expected in [(0, "old"), (1, None), (2, "new")]:
        target = tmp_path / str(killed_at) / "out"
        write_anew(target, "old")
        with writer(target, killed_at) as process:
            process.wait(30)
        assert process.returncode == (0 if killed_at == 2 else -signal.SIGKILL)
        left = {p.name[:9]: (p / "x").read_text() for p in target.parent.iterdir()}
        if expected is None:  # between the two: both are there, under their other names
            assert left == {".out.old-": "old", ".out.part": "new"}
        else:
            assert left["out"] == expected
        write_anew(target, "next")
        assert [p.name for p in target.parent.iterdir()] == ["out"]
        assert (target / "x").read_text() == "next"


def test_a_replacement_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    write_anew(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), appearing(tmp_path / "out", replace=True) as partial:
        (partial / "x").write_text("new")
        raise RuntimeError
    rename, calls = Path.rename, []

    def second_fails(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(a, b)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(StorageError, match="out cannot be written: Input/output error"):
        write_anew(tmp_path / "out", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "x").read_text() == "old"


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="out is a file; choose a new directory"):
        write_anew(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_file_system_without_locks_is_written_to_and_nothing_removed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.partial-01234567").mkdir()
    write_anew(tmp_path / "out", "new")
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.partial-01234567"}
