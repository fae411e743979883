"""`save` and `load`: an optimizer with its parameters in one safetensors file, which is written whole or not at all.

The arrays are there for every program that reads safetensors: parameters under their own path (``"bn.gamma"``), states
under ``"<state>/<path>"`` (``"m/bn.gamma"``), the moving average under ``"ema/<path>"``. The metadata hold two texts:
``"fastopt"``, a JSON document of everything that is no array, the SHA-256 of every array among it, and ``"sha256"``,
that of the document.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from fastopt.kernels import get_backend
from fastopt.optimizer import Optimizer, Row
from fastopt.state import STATE_FORMAT, Snapshot
from fastopt.step.table import EMA, Table, hyper_of

__all__ = ["describe"]

CHECKPOINT_FORMAT = 1
"""Of the file. In every format the digest of the document is where it is in this one."""

DOCUMENT, DIGEST = "fastopt", "sha256"

FIELDS = {
    "format": int,
    "fastopt": str,
    "optimizer": str,
    "rule": str,
    "dtype": str,
    "paths": list,
    "state_format": int,
    "step": int,
    "missed": dict,
    "hyper": dict,
    "overrides": dict,
    "options": dict,
    "nonfinite": dict,
    "sha256": dict,
    "extra": dict,
}
"""What a document holds. ``state_format`` is that of `Optimizer.state_dict`, for the fields that it has, too."""

SAME = {"ema": "ema", "maximize": "maximize", "decoupled": "decoupled_weight_decay"}
"""The options without which the run would go on as another one, and the arguments that set them."""

NAMES = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32"}
"""Of dtypes in safetensors."""

MOST_STEPS = 2**53
LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer ones


def save(opt: Optimizer, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
    """Write an optimizer to a file: see `Optimizer.save`."""
    target = _target(path)
    host = get_backend(opt.flat.backend).host
    own = {key: np.require(host(array), requirements="C") for key, array in _arrays_of(opt).items()}
    document = {
        "format": CHECKPOINT_FORMAT,
        "fastopt": _version(),
        "optimizer": type(opt).__name__,
        "rule": opt.rule.name,
        "dtype": opt.flat.dtype.name,
        "paths": list(opt.flat.paths),
        "state_format": STATE_FORMAT,
        **opt._described(),
        "options": _options(opt),
        "sha256": {key: _digest(_bytes_of(array)) for key, array in own.items()},
        "extra": _checked_extra(extra),
    }
    # Only what is in `extra` could fail to be JSON, and that was tried.
    text = json.dumps(document, allow_nan=False)
    # The widest first, so that every array is aligned in the file.
    arrays = dict(sorted(own.items(), key=lambda item: -item[1].itemsize))
    header = _header(arrays, {DOCUMENT: text, DIGEST: _digest(text.encode())})

    def write(file: BinaryIO) -> None:
        file.write(header)
        for array in arrays.values():
            file.write(_bytes_of(array))

    _replace(target, write)


def load(opt: Optimizer, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Continue from a file: see `Optimizer.load`."""
    with _opened(path) as (where, file):
        document = _document_of(where, file)
        own = _arrays_of(opt)
        _check_kind(where, document, opt)
        _check_tree(where, document["paths"], opt.flat.paths)
        _check_arrays(where, file, own)
        # Copies, which nobody can change any more between the check and the use.
        arrays = {key: file.get_tensor(key) for key in own}
    for key, array in arrays.items():
        if document["sha256"].get(key) != _digest(_bytes_of(np.require(array, requirements="C"))):
            raise ValueError(f"{where}: damaged: the SHA-256 of {key!r} is not the one it was saved with")
    states = {name: {path: arrays[f"{name}/{path}"] for path in opt.flat.paths} for name in opt._views()}
    state = {
        **{key: document[key] for key in ("rule", "step", "missed", "hyper", "overrides", "nonfinite")},
        "format": document["state_format"],
        "state": states,
        "ema": states.get(EMA),
    }
    try:
        snapshot = Snapshot.of(state, opt.rule, opt.flat.paths, opt._views(), opt._values, opt._changes)
        _try_step(opt, snapshot)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
    except Exception as error:  # a schedule and `prepare` are the user's own, and may raise anything
        raise ValueError(f"{where}: {error}") from error
    opt._restore(snapshot)  # brings the rows of the old parameters up to date, so that nothing of them is left to do
    for path, view in zip(opt.flat.paths, opt.flat.views(opt.flat.data), strict=True):
        get_backend(opt.flat.backend).copy(view, arrays[path])
    extra: dict[str, Any] = document["extra"]
    return extra


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint says of itself, without its arrays: no optimizer is needed.

    Args:
        path: of the file.

    Returns:
        A dict of ``format``, ``fastopt`` (the version that wrote it), ``optimizer``, ``rule``, ``dtype``, ``paths``,
        ``step``, ``missed``, ``hyper``, ``overrides``, ``nonfinite`` (as `Optimizer.state_dict`), ``options`` (as
        `Optimizer` takes them) and ``extra`` (what `Optimizer.save` was given).

    Raises:
        ValueError: it is no checkpoint, of a newer format, or its description is damaged. The arrays are not read.
        OSError: it cannot be read.

    >>> import pathlib, tempfile
    >>> import numpy as np, fastopt
    >>> from fastopt.checkpoint import describe
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "run.safetensors"
    ...     fastopt.Adam({"w": np.ones(2)}, lr=0.5).save(path)
    ...     found = describe(path)
    >>> found["optimizer"], found["step"], found["hyper"]["lr"]
    ('Adam', 0, 0.5)
    """
    with _opened(path) as (where, file):
        document = _document_of(where, file)
    return {key: document[key] for key in FIELDS if key not in ("sha256", "state_format")}


# --- what is written --------------------------------------------------------------------------------------------------


def _version() -> str:
    import fastopt  # which imports the optimizer, and so is not there yet when this module is imported first

    return fastopt.__version__


def _arrays_of(opt: Optimizer) -> dict[str, np.ndarray]:
    """The parameters and all that is kept for each, by their names in the file: views, no copies."""
    paths = opt.flat.paths
    named = [
        (path, view, f"parameter {path!r}") for path, view in zip(paths, opt.flat.views(opt.flat.data), strict=True)
    ]
    for name, views in opt._views().items():
        named += [
            (f"{name}/{path}", view, f"{name!r} of parameter {path!r}") for path, view in zip(paths, views, strict=True)
        ]
    arrays: dict[str, np.ndarray] = {}
    owners: dict[str, str] = {}
    for key, array, owner in named:
        if key in owners:
            raise ValueError(f"{owners[key]} and {owner} would both be {key!r} in the file; rename the parameter")
        if key == "__metadata__":
            raise ValueError(f"{owner}: safetensors files keep this name for their metadata; rename the parameter")
        try:
            key.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{owner}: its name is no text that UTF-8 can hold; rename the parameter") from None
        arrays[key], owners[key] = array, owner
    return arrays


def _options(opt: Optimizer) -> dict[str, Any]:
    return {**asdict(opt._tail), "decoupled": opt.rule.decoupled}


def _checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
        raise TypeError(f"extra: expected a dict with str keys, found {extra!r}"[:500])
    for key, value in extra.items():
        _check_json(f"extra[{key!r}]", value)
    return dict(extra)


def _check_json(name: str, value: Any) -> None:
    try:
        json.loads(json.dumps([[[value]]], allow_nan=False))  # as deep as it will lie in the document, and back
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: expected what JSON can hold (finite numbers, text, lists, dicts): {error}") from None


def _bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array as safetensors keeps them, least significant first."""
    flat = array.reshape(-1)
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: its length in 8 bytes, and JSON that says what is where.

    safetensors' own writer is not used: it writes to a temporary file with a name of its own, which a killed process
    leaves behind, does not wait for the disk, and makes every file readable by its owner only.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[key] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"extra: with the names of the arrays it takes {len(text):,} bytes; safetensors reads 100 MB")
    return len(text).to_bytes(8, "little") + text


# --- how it is written ------------------------------------------------------------------------------------------------


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that `path` means: what a symbolic link points to, not the link."""
    target = Path(os.path.realpath(os.fsdecode(path)))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory; give the name of a file in it", str(target))
    return target


def _replace(target: Path, write: Callable[[BinaryIO], None]) -> None:
    """Put what `write` writes in the place of a file at once; on any error the old file stays."""
    temporary: Path | None = None
    try:
        try:
            old = target.stat()
        except FileNotFoundError:
            old = None
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise ValueError(f"{target}: is no regular file, and would be replaced by one; choose another name")
        temporary, file = _new_file(target)
        with file:
            write(file)
            file.flush()
            if old is not None:
                temporary.chmod(stat.S_IMODE(old.st_mode))
            os.fsync(file.fileno())
        os.replace(temporary, target)  # noqa: PTH105 what a test makes fail
        _sync_folder(target.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:  # names the temporary file, or none
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def _new_file(target: Path) -> tuple[Path, BinaryIO]:
    """A file beside `target`, open for writing, that no other process has; its mode is the usual one."""
    while True:
        # A name has 255 bytes at most, and a character 4.
        temporary = target.with_name(f".{target.name[:56]}.{secrets.token_hex(8)}.tmp")
        with contextlib.suppress(FileExistsError):
            return temporary, temporary.open("xb")


def _sync_folder(folder: Path) -> None:
    """Wait until the new name is on the disk."""
    if os.name != "nt":  # which has no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- how it is read ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """The name of a safetensors file, and the file; what safetensors finds wrong becomes a ValueError."""
    where = os.fsdecode(path)
    mode = Path(where).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory; give the name of a file in it", where)
    if not stat.S_ISREG(mode):
        raise ValueError(f"{where}: is no regular file, and thus no fastopt checkpoint")
    try:
        with safe_open(where, framework="np") as file:
            yield where, file
    except SafetensorError as error:
        raise ValueError(f"{where}: no fastopt checkpoint, or a damaged one: {error}") from None


def _document_of(where: str, file: Any) -> dict[str, Any]:
    """The JSON document of a file, after its digest, its format and the types of its fields were checked."""
    metadata = file.metadata() or {}
    if DOCUMENT not in metadata:
        raise ValueError(
            f"{where}: no fastopt checkpoint, but a safetensors file of something else; "
            f"safetensors.numpy.load_file(path) reads its arrays"
        )
    text = metadata[DOCUMENT]
    if metadata.get(DIGEST) != _digest(text.encode()):
        raise ValueError(f"{where}: damaged: the SHA-256 of its description is not the one it was saved with")
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no fastopt checkpoint: its description is no JSON: {error}") from None
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise ValueError(f"{where}: no fastopt checkpoint: its description names no format")
    if document["format"] != CHECKPOINT_FORMAT:
        version = str(document.get("fastopt"))[:50]
        raise ValueError(
            f"{where}: of checkpoint format {document['format']}, written by fastopt {version}; this version "
            f"({_version()}) reads format {CHECKPOINT_FORMAT}; upgrade fastopt"
        )
    for key, kind in FIELDS.items():
        if type(document.get(key)) is not kind:
            found = type(document[key]).__name__ if key in document else "nothing"
            raise ValueError(f"{where}: its {key!r} must be {kind.__name__}, found {found}")
    if not all(isinstance(path, str) for path in document["paths"]):
        raise ValueError(f"{where}: its 'paths' must be text")
    if not 0 <= document["step"] <= MOST_STEPS:
        raise ValueError(f"{where}: its 'step' must be in [0, 2^53], found {str(document['step'])[:50]}")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check_kind(where: str, document: Mapping[str, Any], opt: Optimizer) -> None:
    """Refuse another rule, another dtype, and options that would make another run of it."""
    there, here = (document["optimizer"], document["rule"]), (type(opt).__name__, opt.rule.name)
    if there[1] != here[1]:
        raise ValueError(
            f"{where}: saved by {there[0]} (rule {there[1]!r}), but this optimizer is {here[0]} (rule {here[1]!r})"
        )
    if document["dtype"] != opt.flat.dtype.name:
        raise ValueError(
            f"{where}: of {document['dtype']} parameters, but those of this optimizer are {opt.flat.dtype.name}; "
            f"construct it with fastopt.pack(params, dtype={document['dtype']!r})"
        )
    options = _options(opt)
    for name, argument in SAME.items():
        if document["options"].get(name) != options[name]:
            raise ValueError(
                f"{where}: saved with {argument}={document['options'].get(name)!r}, but this optimizer has "
                f"{argument}={options[name]!r}; construct it with the same"
            )


def _check_tree(where: str, there: Iterable[str], here: Iterable[str]) -> None:
    missing, unexpected = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    if missing or unexpected:
        told = [f"{what} {_listed(paths)}" for what, paths in (("lacks", missing), ("also has", unexpected)) if paths]
        raise ValueError(f"{where}: of other parameters: it {' and '.join(told)}; construct the tree it was saved from")


def _listed(paths: list[str], most: int = 20) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(repr, paths[:most])) + more


def _check_arrays(where: str, file: Any, own: Mapping[str, np.ndarray]) -> None:
    """Refuse other names, dtypes and shapes than the optimizer's, before anything is read."""
    there = set(file.keys())
    if there != set(own):
        raise ValueError(f"{where}: damaged: array {sorted(there ^ set(own))[0]!r} is missing, or one too many")
    for key, array in own.items():
        found = file.get_slice(key)
        dtype, shape = found.get_dtype(), tuple(found.get_shape())
        if shape != array.shape:
            raise ValueError(f"{where}: {key!r} has shape {shape} there, and {array.shape} in this optimizer")
        if dtype != NAMES[array.dtype.name]:
            raise ValueError(f"{where}: {key!r} is {dtype} there, and {NAMES[array.dtype.name]} in this optimizer")


def _try_step(opt: Optimizer, snapshot: Snapshot) -> None:
    """Raise what the next step with these hyperparameters would: once they are in place it is too late."""
    for change, missed in zip(snapshot.changes, snapshot.missed, strict=True):
        point = Row(opt.rule, {**snapshot.values, **change}, missed).at(snapshot.step)
        Table(opt.rule, hyper_of(opt.rule, point), opt.flat.dtype).write(0, snapshot.step + 1 - missed, point, 1.0)
