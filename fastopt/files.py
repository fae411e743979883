"""Files that are written whole or not at all: the one writer of checkpoints, and of what the command writes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fastopt.signals import deferred_signals

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

OPEN_FILES = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
"""Names of files that are open already, and have to stay the same files."""


def file_at(path: str | os.PathLike[str]) -> Path:
    """Return the file at `path`; for a symbolic link, the file that the link points to."""
    target = Path(os.path.realpath(os.fsdecode(path)))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory; give the name of a file in it", str(target))
    return target


def replace_file(
    target: Path, write: Callable[[BinaryIO], object], check: Callable[[BinaryIO], object] | None = None
) -> None:
    """Replace a file atomically by the output of `write`; on any error the old file stays.

    Args:
        target: as `file_at` returned it.
        write: writes the content to a file open for writing, a temporary one beside the target.
        check: reads this file back, from its beginning, and raises an error where it is not as it should be.

    Raises:
        OSError: it names the target; the file could not be written.
        ValueError: the target is a device, a pipe or a socket.
    """
    temporary: Path | None = None
    file: BinaryIO | None = None
    lock = -1
    try:
        try:
            old = target.stat()
        except FileNotFoundError:
            old = None
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise ValueError(
                f"{target}: must be a regular file, which can be replaced, got another kind; choose another name"
            )
        with deferred_signals:  # a file that is made is known here, and removed
            _remove_left_behind(target)
            temporary, file, lock = _new_file(target)
        with file:
            write(file)
            file.flush()
            if old is not None:
                temporary.chmod(stat.S_IMODE(old.st_mode))
            os.fsync(file.fileno())
        if check is not None:
            with deferred_signals:  # it is closed, whatever comes
                file = temporary.open("rb")
            with file:
                check(file)
        os.replace(temporary, target)  # noqa: PTH105 what a test makes fail
        _sync_folder(target.parent)
    except BaseException as error:
        if temporary is not None and file is not None:
            file.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:  # it names the temporary file, or no file
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def _new_file(target: Path) -> tuple[Path, BinaryIO, int]:
    """Create a file beside `target`, open for writing, with a unique name and the default mode.

    The last result is a handle by which the file is locked, as long as it is open: see `_remove_left_behind`.
    """
    while True:
        # A name has at most 255 bytes, and a character at most 4.
        temporary = target.with_name(f".{_stem(target)}.{secrets.token_hex(8)}.tmp")
        with contextlib.suppress(FileExistsError):
            file = temporary.open("xb")
            lock = os.dup(file.fileno())
            if _locked(lock) and not temporary.exists():  # removed before it was locked
                file.close()
                os.close(lock)
                continue
            return temporary, file, lock


def _stem(target: Path) -> str:
    return target.name[:56]


def _locked(handle: int) -> bool:
    """Lock an open file; return whether it is. Windows and some file systems have no such locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_left_behind(target: Path) -> None:
    """Remove the temporary files of processes that were killed, which nobody locks any more."""
    if fcntl is None:
        return
    try:
        names = os.listdir(target.parent)  # noqa: PTH208 all at once
    except OSError:
        return
    for name in filter(re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{16}}\.tmp").fullmatch, names):
        with contextlib.suppress(OSError):
            handle = os.open(target.with_name(name), os.O_RDWR)
            try:
                if _locked(handle):
                    target.with_name(name).unlink()
            finally:
                os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Wait until the new name is on the disk."""
    if os.name != "nt":  # Windows cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a device or a pipe cannot be replaced, and is written directly.

    Raises OSError, which names `path`; an old file is then as it was.
    """
    if is_stream(path):
        try:
            path.write_bytes(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    else:
        replace_file(file_at(path), lambda file: file.write(content))


def is_stream(path: Path) -> bool:
    """Return whether `path` is a device or a pipe; so is ``/dev/stdout``, wherever it leads."""
    return str(path).startswith(OPEN_FILES) or (path.exists() and not path.is_file() and not path.is_dir())


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths are of one file, also by links, and also where there is no file yet."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return False
