"""The one writer of files: whole or not at all, and the old one stays until then."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from fastopt.files import file_at, is_stream, replace_file, same_file, write_file

posix = pytest.mark.skipif(os.name == "nt", reason="of POSIX systems")


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
@pytest.mark.parametrize("moment", ["write", "fsync", "check", "replace"])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, old, error, moment):
    path = tmp_path / "x"
    if old is not None:
        path.write_bytes(old)

    def fail(*arguments: Any) -> None:
        raise error

    if moment in ("fsync", "replace"):
        monkeypatch.setattr(os, moment, fail)
    write = fail if moment == "write" else lambda file: file.write(b"new")
    check = fail if moment == "check" else lambda file: None
    with pytest.raises(type(error)) as caught:
        replace_file(path, write, check)
    if isinstance(error, OSError):
        assert str(caught.value) == f"[Errno 28] No space left on device: '{path}'"
    assert listing(tmp_path) == ([] if old is None else ["x"])
    assert old is None or path.read_bytes() == old


def test_the_check_reads_what_was_written_before_it_replaces(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    seen = []

    def check(file: Any) -> None:
        seen.append((file.read(), path.read_bytes()))

    replace_file(path, lambda file: file.write(b"new"), check)
    assert seen == [(b"new", b"old")]
    assert path.read_bytes() == b"new"
    assert listing(tmp_path) == ["x"]


@posix
def test_files_that_killed_processes_left_behind_are_removed(tmp_path):
    import fcntl

    left, written, other = (tmp_path / f".{name}.{'0a' * 8}.tmp" for name in ("x", "x[1]", "xy"))
    foreign = tmp_path / ".x.notes.tmp"
    for path in (left, written, other, foreign):
        path.write_bytes(b"half")
    with written.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the process does that writes it
        write_file(tmp_path / "x", b"new")
        write_file(tmp_path / "x[1]", b"new")
        assert listing(tmp_path) == sorted(["x", "x[1]", written.name, other.name, foreign.name])
    write_file(tmp_path / "x[1]", b"newer")
    assert listing(tmp_path) == sorted(["x", "x[1]", other.name, foreign.name])


@posix
def test_a_file_is_locked_until_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        write_file(tmp_path / "x", b"other") if not seen.append(source) and len(seen) == 1 else None
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_file(tmp_path / "x", b"first")  # while it is written, another one is: that does not remove this one
    assert (tmp_path / "x").read_bytes() == b"first"
    assert len(seen) == 2
    assert listing(tmp_path) == ["x"]


@posix
def test_modes_and_links_stay(tmp_path):
    path, link = tmp_path / "x", tmp_path / "link"
    link.symlink_to(path)
    write_file(link, b"1")
    assert link.is_symlink()
    path.chmod(0o600)
    write_file(link, b"2")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"2", 0o600)
    with pytest.raises(IsADirectoryError, match="give the name of a file in it"):
        write_file(tmp_path, b"")
    assert file_at(link) == path


@posix
def test_pipes_and_devices_are_written_directly(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    assert is_stream(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_file(pipe, b"new")
    reader.join(60.0)
    assert found == [b"new"]
    assert listing(tmp_path) == ["pipe"]
    write_file(Path("/dev/null"), b"new")
    assert not Path("/dev/null").is_file()
    for name in ("/dev/stdout", "/dev/fd/63", "/proc/self/fd/1"):
        assert is_stream(Path(name))
    for path in (tmp_path, tmp_path / "new", Path("/dev/shm/x")):
        assert not is_stream(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")
def test_a_full_device_is_named():
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/dev/full'$"):
        write_file(Path("/dev/full"), b"new")


@posix
def test_one_file_under_two_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "way").symlink_to("folder")
    names = [Path("x"), Path("./x"), Path("folder/../x"), tmp_path / "x", Path("link")]
    for there in (False, True):
        for one in names:
            assert all(same_file(one, other) for other in names), one
            assert not same_file(one, Path("y"))
        assert same_file(Path("way/x"), Path("folder/x"))
        (tmp_path / "x").touch()
        if there:
            os.link("x", "hard")
            assert same_file(Path("hard"), Path("link"))
