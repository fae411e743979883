"""Compiled kernels on disk: in the user's cache directory, or where FASTOPT_CACHE_DIR says.

Every kernel is a file of its own. Its name is a digest of all that decides about its machine code: the sources
(`fastopt.kernels.bind`), the signature and the options, the processor, and the versions of numba and LLVM. So a file is
never out of date, processes need no lock, and kernels for several processors lie side by side.

A file begins with a checksum. Behind it is what numba keeps of a function: a pickle, which may run any code when it is
read. So nobody but the user and root may be able to write to the directory.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import secrets
import stat
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
from numba.core import compiler, registry, serialize
from numba.core.runtime import rtsys

VARIABLE = "FASTOPT_CACHE_DIR"
OFF = "0"
SUFFIX = ".kernel"
MOST_BYTES = 256 * 2**20
"""The size of all files together. The kernels that were not used for the longest time go first."""
FRESH = 86_400.0
"""Seconds within which a kernel counts as just used: a file is marked as used once a day."""
STALE = 3_600.0
"""Seconds after which a temporary file belongs to a process that was killed."""

TEMPORARY = f".{'[0-9a-f]' * 16}.tmp"
"""The pattern of the names of temporary files, so that those of another program stay."""

NO_WORD = r"[^A-Za-z0-9_]+"
MAGIC = b"fastopt kernel 1\n"
SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "DISABLE_INTEL_SVML")
"""The settings of numba that change machine code."""

_reported: set[str | None] = set()
"""The settings of FASTOPT_CACHE_DIR whose failure was reported."""


class SharedCacheError(PermissionError):
    """Other users may write to the directory: its files are pickles, and run any code here."""


class Kept(NamedTuple):
    """A file of the cache."""

    path: Path
    bytes: int
    used: float
    """When it was last used, to a day; in seconds since 1970."""


# --- the directory ----------------------------------------------------------------------------------------------------


def chosen_directory() -> Path | None:
    """Return the directory named by FASTOPT_CACHE_DIR, or the user's; None where the variable is 0.

    Raises RuntimeError where it names an unknown user or a loop of links, and where the user has no home.
    """
    name = os.environ.get(VARIABLE)
    if name == OFF:
        return None
    if name:
        return Path(name).expanduser().resolve()
    import platformdirs  # 5 ms

    path = Path(platformdirs.user_cache_dir("fastopt", appauthor=False)) / "kernels"
    if not path.is_absolute():  # "~" where nobody knows it
        raise RuntimeError("the home directory of this user is not known")
    return path


def checked_directory(*, make: bool = True) -> Path | None:
    """Return the directory, made if absent unless `make` is False; None where there is no cache.

    Raises OSError where it cannot be made or read, RuntimeError as `chosen_directory`, and SharedCacheError where other
    users may write to it.
    """
    path = chosen_directory()
    if path is None:
        return None
    if make:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SharedCacheError(
                f"{VARIABLE}: must be a directory that belongs to you or to root and that nobody else can write to, "
                f"because cache files are executable code, got {str(path)!r}; run: chmod 700 {path}"
            )
    return path


def directory() -> Path | None:
    """As `checked_directory`; None also, after one warning, where the directory cannot be used.

    Raises SharedCacheError where the variable names a directory that others may write to: somebody relies on it.
    """
    try:
        return checked_directory()
    except SharedCacheError as error:
        if os.environ.get(VARIABLE):
            raise
        _go_on_without(error)
    except (OSError, RuntimeError) as error:
        _go_on_without(error)
    return None


def _go_on_without(error: Exception) -> None:
    """Warn, once in a process, that the cache cannot be read or written, and that kernels are compiled without it."""
    name = os.environ.get(VARIABLE)
    if name not in _reported:
        _reported.add(name)
        where = repr(name) if name else "the user's cache directory"
        warnings.warn(
            f"{VARIABLE}: must be a directory that can be read and written, got {where}: {error}; kernels are compiled "
            f"without it, again in every process; {VARIABLE}=0 does so without this warning",
            RuntimeWarning,
            stacklevel=2,
        )


# --- kernels ----------------------------------------------------------------------------------------------------------


@cache
def _machine() -> str:
    """What decides about machine code, and is the same for all kernels of this process."""
    codegen = registry.cpu_target.target_context.codegen()
    settings = [(name, getattr(numba.config, name, None)) for name in SETTINGS]
    return repr((codegen.magic_tuple(), numba.__version__, llvmlite.__version__, settings))


def name_of(label: str, signature: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Return the name of the file of a function. `label` holds the digest of its sources."""
    told = sorted((name, sorted(value) if isinstance(value, set) else value) for name, value in options.items())
    key = hashlib.sha256(f"{_machine()}|{label}|{signature}|{told!r}".encode()).hexdigest()
    return f"{re.sub(NO_WORD, '_', label.rpartition('_')[0])[:100]}-{key[:32]}{SUFFIX}"


def load(name: str) -> Any:
    """Return what numba compiled for this name, in whichever process; None where it has to be compiled."""
    folder = directory()
    if folder is None:
        return None
    path = folder / name
    try:
        with path.open("rb") as file:
            content = file.read()
            used = os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        _go_on_without(error)
        return None
    head = len(MAGIC) + hashlib.sha256().digest_size
    body = content[head:]
    if content[:head] != MAGIC + hashlib.sha256(body).digest():
        return None  # cut off or damaged: it is compiled again, and replaced
    try:
        context = registry.cpu_target.target_context
        rtsys.initialize(context)  # what memory of NumPy's arrays is allocated with
        found = compiler.CompileResult._rebuild(context, *pickle.loads(body))
    except Exception:  # of a module that was moved, for instance: every error means that it has to be compiled
        return None
    if abs(time.time() - used) > FRESH:
        with suppress(OSError):  # of another owner, or on a disk that is read only
            os.utime(path)
    return found


def save(name: str, compiled: Any) -> bool:
    """Keep what numba compiled, and remove what is too much; return whether it was kept."""
    folder = directory()
    if folder is None or compiled.library.has_dynamic_globals:  # addresses, which the next process does not have
        return False
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        body = serialize.dumps(compiled._reduce())
        try:
            temporary.write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(temporary, folder / name)  # noqa: PTH105 what a test makes fail
        finally:
            temporary.unlink(missing_ok=True)
        shrink(folder)
    except Exception as error:  # numba and pickle fail with errors of many types
        _go_on_without(error)
        return False
    return True


# --- all of them ------------------------------------------------------------------------------------------------------


def kept(folder: Path) -> list[Kept]:
    """Return the kernels of a directory, the one used last first."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX) and entry.is_file():
                with suppress(FileNotFoundError):  # another process has removed it
                    status = entry.stat()
                    found.append(Kept(Path(entry.path), status.st_size, status.st_mtime))
    return sorted(found, key=lambda file: (-file.used, file.path))


def shrink(folder: Path, most: int | None = None) -> int:
    """Remove the kernels that were not used for the longest time, until the others have `most` bytes; return how many.

    Temporary files of processes that were killed go as well.
    """
    most = MOST_BYTES if most is None else most
    size = removed = 0
    for file in kept(folder):
        size += file.bytes
        if size > most:
            file.path.unlink(missing_ok=True)
            removed += 1
    _remove_left_over(folder)
    return removed


def clear(folder: Path) -> list[Kept]:
    """Remove the kernels of a directory, and temporary files of processes that were killed; return the kernels.

    Raises OSError where one cannot be removed.
    """
    removed = []
    for file in kept(folder):
        with suppress(FileNotFoundError):  # another process has removed it
            file.path.unlink()
            removed.append(file)
    _remove_left_over(folder)
    return removed


def _remove_left_over(folder: Path) -> None:
    for path in folder.glob(TEMPORARY):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
