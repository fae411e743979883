"""`save` and `load`: an optimizer with its parameters in one safetensors file, which is written atomically.

Any program that reads safetensors can read the arrays: parameters under their own path (``"bn.gamma"``), states under
``"<state>/<path>"`` (``"m/bn.gamma"``), the moving average under ``"ema/<path>"``. The metadata hold two texts:
``"fastopt"``, a JSON document of everything else, with the SHA-256 of every array; and ``"sha256"``, the SHA-256 of the
document.
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
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from fastopt.hyper import EMA
from fastopt.kernels import get_backend
from fastopt.signals import deferred_signals
from fastopt.state import STATE_FORMAT, OptimizerState, Snapshot, try_step
from fastopt.version import __version__

__all__ = ["describe"]

CHECKPOINT_FORMAT = 1
"""The format of the file. Every format keeps the digest of the document in the same place."""

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
"""The fields of a document. ``state_format`` is the format of the fields shared with `Optimizer.state_dict`."""

SAME = {"ema": "ema", "maximize": "maximize", "decoupled": "decoupled_weight_decay"}
"""The options that must be the same to continue a run, and the arguments that set them."""

NAMES = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32"}
"""The names of dtypes in safetensors."""

MOST_STEPS = 2**53
LONGEST_HEADER = 100_000_000  # bytes; the longest that safetensors reads


class Loaded(NamedTuple):
    """The content of a file, checked against the optimizer that will continue from it."""

    snapshot: Snapshot
    params: list[np.ndarray]
    extra: dict[str, Any]


def save(
    state: OptimizerState, optimizer: str, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None
) -> None:
    """Write an optimizer to a file: see `Optimizer.save`. optimizer : the name of its class."""
    target = _target(path)
    host = get_backend(state.flat.backend).host
    own = {key: np.require(host(array), requirements="C") for key, array in _arrays_of(state).items()}
    document = {
        "format": CHECKPOINT_FORMAT,
        "fastopt": __version__,
        "optimizer": optimizer,
        "rule": state.rule.name,
        "dtype": state.flat.dtype.name,
        "paths": list(state.flat.paths),
        "state_format": STATE_FORMAT,
        **state.described(),
        "options": _options(state),
        "sha256": {key: _digest(_bytes_of(array)) for key, array in own.items()},
        "extra": _checked_extra(extra),
    }
    # Only `extra` could fail to be JSON, and `_checked_extra` has checked it.
    text = json.dumps(document, allow_nan=False)
    # The widest dtype comes first, so that every array is aligned in the file.
    arrays = dict(sorted(own.items(), key=lambda item: -item[1].itemsize))
    header = _header(arrays, {DOCUMENT: text, DIGEST: _digest(text.encode())})

    def write(file: BinaryIO) -> None:
        file.write(header)
        for array in arrays.values():
            file.write(_bytes_of(array))

    _replace(target, write)


def load(here: OptimizerState, optimizer: str, path: str | os.PathLike[str]) -> Loaded:
    """Read a file and check all of it: see `Optimizer.load`. optimizer : the name of its class."""
    paths = here.flat.paths
    with _opened(path) as (where, file):
        document = _document_of(where, file)
        own = _arrays_of(here)
        _check_kind(where, document, here, optimizer)
        _check_tree(where, document["paths"], paths)
        _check_arrays(where, file, own)
        # Copies, so that nothing can change them between the check and the use.
        arrays = {key: file.get_tensor(key) for key in own}
    for key, array in arrays.items():
        if document["sha256"].get(key) != _digest(_bytes_of(np.require(array, requirements="C"))):
            raise ValueError(f"{where}: {key!r}: must have the SHA-256 stored in the file, got another; it is damaged")
    states = {name: {path: arrays[f"{name}/{path}"] for path in paths} for name in here.arrays}
    state = {
        **{key: document[key] for key in ("rule", "step", "missed", "hyper", "overrides", "nonfinite")},
        "format": document["state_format"],
        "state": states,
        "ema": states.get(EMA),
    }
    try:
        snapshot = Snapshot.of(state, here)
        try_step(here, snapshot)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
    except Exception as error:  # a schedule and `prepare` are user code, and may raise anything
        raise ValueError(f"{where}: {error}") from error
    return Loaded(snapshot, [arrays[path] for path in paths], document["extra"])


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the description of a checkpoint, without its arrays. No optimizer is needed.

    Args:
        path: the path of the file.

    Returns:
        A dict of ``format``, ``fastopt`` (the version that wrote it), ``optimizer``, ``rule``, ``dtype``, ``paths``,
        ``step``, ``missed``, ``hyper``, ``overrides``, ``nonfinite`` (as in `Optimizer.state_dict`), ``options`` (the
        arguments of `Optimizer`) and ``extra`` (the argument of `Optimizer.save`).

    Raises:
        ValueError: the file is not a checkpoint, has a newer format, or has a damaged description. The arrays are not
            read.
        OSError: the file cannot be read.

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


# --- the content of a file --------------------------------------------------------------------------------------------


def _arrays_of(state: OptimizerState) -> dict[str, Any]:
    """Return the parameters and their states, by their names in the file: views, not copies."""
    paths = state.flat.paths
    named = [(path, array, f"parameter {path!r}") for path, array in zip(paths, state.flat.arrays, strict=True)]
    for name, views in state.arrays.items():
        named += [
            (f"{name}/{path}", view, f"{name!r} of parameter {path!r}") for path, view in zip(paths, views, strict=True)
        ]
    arrays: dict[str, np.ndarray] = {}
    owners: dict[str, str] = {}
    for key, array, owner in named:
        if key in owners:
            raise ValueError(
                f"{owners[key]} and {owner}: must have different names in the file, got {key!r} for both; rename the "
                f"parameter"
            )
        if key == "__metadata__":
            raise ValueError(
                f"{owner}: must have another name, which safetensors does not reserve; rename the parameter"
            )
        try:
            key.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{owner}: must have a name that UTF-8 can encode; rename the parameter") from None
        arrays[key], owners[key] = array, owner
    return arrays


def _options(state: OptimizerState) -> dict[str, Any]:
    return {**asdict(state.options), "decoupled": state.rule.decoupled}


def _checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
        raise TypeError(f"extra: must be a dict with str keys, got {extra!r}"[:500])
    for key, value in extra.items():
        _check_json(f"extra[{key!r}]", value)
    return dict(extra)


def _check_json(name: str, value: Any) -> None:
    try:
        json.loads(json.dumps([[[value]]], allow_nan=False))  # as deeply nested as in the document, and back
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: must be JSON data (finite numbers, text, lists, dicts): {error}") from None


def _bytes_of(array: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array as safetensors stores them, in little-endian order."""
    flat = array.reshape(-1)
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file: its length in 8 bytes, and JSON with the place of every array.

    safetensors' own writer is not used. It writes to a temporary file under its own name, which a killed process leaves
    behind; it does not wait for the disk; and it makes every file readable only by its owner.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[key] = {"dtype": NAMES[array.dtype.name], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"extra: must take at most 100 MB, with the names of the arrays, got {len(text):,} bytes")
    return len(text).to_bytes(8, "little") + text


# --- writing ----------------------------------------------------------------------------------------------------------


def _target(path: str | os.PathLike[str]) -> Path:
    """Return the file at `path`; for a symbolic link, the file that the link points to."""
    target = Path(os.path.realpath(os.fsdecode(path)))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory; give the name of a file in it", str(target))
    return target


def _replace(target: Path, write: Callable[[BinaryIO], None]) -> None:
    """Replace a file atomically by the output of `write`; on any error the old file stays."""
    temporary: Path | None = None
    file: BinaryIO | None = None
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
        if temporary is not None and file is not None:
            file.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:  # it names the temporary file, or no file
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def _new_file(target: Path) -> tuple[Path, BinaryIO]:
    """Create a file beside `target`, open for writing, with a unique name and the default mode."""
    while True:
        # A name has at most 255 bytes, and a character at most 4.
        temporary = target.with_name(f".{target.name[:56]}.{secrets.token_hex(8)}.tmp")
        with contextlib.suppress(FileExistsError):
            return temporary, temporary.open("xb")


def _sync_folder(folder: Path) -> None:
    """Wait until the new name is on the disk."""
    if os.name != "nt":  # Windows cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield the name of a safetensors file, and the open file; errors of safetensors become ValueError."""
    where = os.fsdecode(path)
    mode = Path(where).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory; give the name of a file in it", where)
    if not stat.S_ISREG(mode):
        raise ValueError(f"{where}: must be a fastopt checkpoint, got a file that is not regular")
    try:
        with safe_open(where, framework="np") as file:
            yield where, file
    except SafetensorError as error:
        raise ValueError(f"{where}: must be a fastopt checkpoint, got another or a damaged file: {error}") from None


def _document_of(where: str, file: Any) -> dict[str, Any]:
    """Return the JSON document of a file; check its digest, its format and the types of its fields."""
    metadata = file.metadata() or {}
    if DOCUMENT not in metadata:
        raise ValueError(
            f"{where}: must be a fastopt checkpoint, got a safetensors file of something else; "
            f"safetensors.numpy.load_file(path) reads its arrays"
        )
    text = metadata[DOCUMENT]
    if metadata.get(DIGEST) != _digest(text.encode()):
        raise ValueError(f"{where}: description: must have the SHA-256 stored in the file, got another; it is damaged")
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: must be a fastopt checkpoint, got a description that is not JSON: {error}"
        ) from None
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise ValueError(f"{where}: must be a fastopt checkpoint, got a description without a format")
    if document["format"] != CHECKPOINT_FORMAT:
        version = str(document.get("fastopt"))[:50]
        raise ValueError(
            f"{where}: must have checkpoint format {CHECKPOINT_FORMAT} for this version ({__version__}), got format "
            f"{document['format']}, written by fastopt {version}; upgrade fastopt"
        )
    for key, kind in FIELDS.items():
        if type(document.get(key)) is not kind:
            found = type(document[key]).__name__ if key in document else "nothing"
            raise ValueError(f"{where}: {key!r}: must be {kind.__name__}, got {found}")
    for path in document["paths"]:
        if not isinstance(path, str):
            raise ValueError(f"{where}: 'paths': must be text, got {type(path).__name__}")
    if not 0 <= document["step"] <= MOST_STEPS:
        raise ValueError(f"{where}: 'step': must be in [0, 2^53], got {str(document['step'])[:50]}")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check_kind(where: str, document: Mapping[str, Any], state: OptimizerState, optimizer: str) -> None:
    """Refuse another rule, another dtype, and options that would change the run."""
    there, here = (document["optimizer"], document["rule"]), (optimizer, state.rule.name)
    if there[1] != here[1]:
        raise ValueError(
            f"{where}: must be saved by {here[0]} (rule {here[1]!r}), as this optimizer, got {there[0]} (rule "
            f"{there[1]!r})"
        )
    if document["dtype"] != state.flat.dtype.name:
        raise ValueError(
            f"{where}: must hold {state.flat.dtype.name} parameters, as this optimizer, got {document['dtype']}; "
            f"construct the optimizer with fastopt.pack(params, dtype={document['dtype']!r})"
        )
    options = _options(state)
    for name, argument in SAME.items():
        if document["options"].get(name) != options[name]:
            raise ValueError(
                f"{where}: must be saved with {argument}={options[name]!r}, as this optimizer, got "
                f"{argument}={document['options'].get(name)!r}; construct the optimizer with the same"
            )


def _check_tree(where: str, there: Iterable[str], here: Iterable[str]) -> None:
    missing, unexpected = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    if missing or unexpected:
        got = [f"{what} {_listed(paths)}" for what, paths in (("lacks", missing), ("also has", unexpected)) if paths]
        raise ValueError(
            f"{where}: must hold the parameters of this optimizer, got a file that {' and '.join(got)}; construct the "
            f"tree it was saved from"
        )


def _listed(paths: list[str], most: int = 20) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(repr, paths[:most])) + more


def _check_arrays(where: str, file: Any, own: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays whose names, dtypes or shapes differ from the optimizer's, before any is read."""
    there = set(file.keys())
    if there != set(own):
        key = sorted(there ^ set(own))[0]
        expected, got = ("be in the file", "none") if key in own else ("not be in the file", "one")
        raise ValueError(f"{where}: array {key!r}: must {expected}, got {got}; the file is damaged")
    for key, array in own.items():
        found = file.get_slice(key)
        dtype, shape = found.get_dtype(), tuple(found.get_shape())
        if shape != array.shape:
            raise ValueError(f"{where}: {key!r}: must have shape {array.shape} as in this optimizer, got {shape}")
        if dtype != NAMES[array.dtype.name]:
            raise ValueError(f"{where}: {key!r}: must be {NAMES[array.dtype.name]} as in this optimizer, got {dtype}")
