"""`save` and `load`: an optimizer with its parameters in one safetensors file, which is written whole or not at all.

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
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from fastopt.files import file_at, replace_file
from fastopt.hyper import EMA
from fastopt.kernels import get_backend
from fastopt.kernels.contract import BFLOAT16
from fastopt.state import (
    NO_PLACE,
    STATE_FORMAT,
    LoadReport,
    OptimizerState,
    Snapshot,
    check_keep,
    fit,
    misfit,
    other_options,
    try_step,
)
from fastopt.step.ranks import Scattered
from fastopt.storage.conversion import STORAGE, converted
from fastopt.storage.formats import dtype_of
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

NAMES = {
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "I8",
    "uint8": "U8",
}
"""The names of dtypes in safetensors."""

MOST_STEPS = 2**53
LONGEST_HEADER = 100_000_000  # bytes; the longest that safetensors reads
BLOCK = 2**16  # bytes that are read back at once


class Loaded(NamedTuple):
    """The content of a file, checked against the optimizer that will continue from it."""

    snapshot: Snapshot
    params: list[Any]
    report: LoadReport
    digest: str
    """Of the description, which holds those of the arrays."""


def save(
    state: OptimizerState,
    optimizer: str,
    path: str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
    *,
    writes: bool = True,
) -> None:
    """Write an optimizer to a file: see `Optimizer.save`. optimizer : the name of its class.

    Where several processes hold its states, all of them call this; `writes` is for the one that writes.
    """
    # The widest dtype comes first, so that every array is aligned in the file.
    arrays = dict(sorted(_arrays_of(state).items(), key=lambda item: -item[1].itemsize))
    windows = (window for array in arrays.values() if isinstance(array, Scattered) for window in array.windows())
    try:
        if writes:
            _write(state, optimizer, path, extra, arrays, windows)
    finally:
        for _ in windows:  # which the others go through, also where this process cannot write them
            pass


def _write(
    state: OptimizerState,
    optimizer: str,
    path: str | os.PathLike[str],
    extra: Mapping[str, Any] | None,
    arrays: Mapping[str, Any],
    windows: Iterator[np.ndarray],
) -> None:
    """windows : those of the arrays of which others hold a part, one after the other."""
    target = file_at(path)
    host = get_backend(state.flat.backend).host
    parts = {key for key, array in arrays.items() if isinstance(array, Scattered)}
    own: dict[str, Any] = {
        key: array if key in parts else np.require(host(array), requirements="C") for key, array in arrays.items()
    }
    digests = {
        key: _digest(b"")
        if key in parts
        else _digest(_bytes_of(own[key]))  # of parts, to be known once they are written
        for key in _arrays_of(state)
    }
    document = {
        "format": CHECKPOINT_FORMAT,
        "fastopt": __version__,
        "optimizer": optimizer,
        "rule": state.rule.name,
        "dtype": state.flat.dtype.name,
        "paths": list(state.flat.paths),
        "state_format": STATE_FORMAT,
        **state.described(),
        "sha256": digests,
        "extra": _checked_extra(extra),
    }

    def described() -> bytes:
        # Only `extra` could fail to be JSON, and `_checked_extra` has checked it.
        text = json.dumps(document, allow_nan=False)
        return _header(own, {DOCUMENT: text, DIGEST: _digest(text.encode())})

    header = described()

    def write(file: BinaryIO) -> None:
        nonlocal header
        file.write(header)
        for key, array in own.items():
            if key in parts:
                digest = hashlib.sha256()
                for _ in range(array.count):
                    content = _bytes_of(next(windows))
                    digest.update(content)
                    file.write(content)
                digests[key] = digest.hexdigest()
            else:
                file.write(_bytes_of(array))
        if parts:
            header = described()  # of the same length
            file.seek(0)
            file.write(header)

    def check(file: BinaryIO) -> None:
        _check_written(file, header, own, digests)

    replace_file(target, write, check)


def load(
    here: OptimizerState,
    optimizer: str,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    keep: Collection[str] = (),
    convert: bool = False,
) -> Loaded:
    """Read a file and check all of it: see `Optimizer.load`. optimizer : the name of its class."""
    paths, keep = here.flat.paths, check_keep(keep, here)
    if convert:
        keep |= STORAGE
    with _opened(path) as (where, file):
        document, digest = _document_of(where, file), file.metadata()[DIGEST]
        own = _arrays_of(here.expecting(document, keep))
        _check_kind(where, document, here, optimizer, strict=strict, convert=convert)
        if strict:
            for _, wrong in other_options(document["options"], here, keep):
                raise ValueError(f"{where}: {wrong}")
            _check_tree(where, document["paths"], paths)
            if not convert:
                _check_arrays(where, file, own)
        there, mine = _places(set(file.keys()), document["paths"]), _places(set(own), paths)
        if set(file.keys()) != set(there):
            key = sorted(set(file.keys()) ^ set(there))[0]
            raise ValueError(f"{where}: array {key!r}: must be that of a parameter in 'paths'; the file is damaged")
        fitting = [
            key
            for key, place in there.items()
            if convert or (mine.get(key) == place and _kind(file, key) == (NAMES[own[key].dtype.name], own[key].shape))
        ]
        if any(_kind(file, key)[0] == NAMES[BFLOAT16] for key in fitting):
            dtype_of(BFLOAT16, where)  # makes the dtype known to NumPy
        parts = [key for key in fitting if isinstance(own.get(key), Scattered)]
        if parts and (convert or not strict):
            name = "convert: must be False" if convert else "strict: must be True"
            raise ValueError(
                f"{name} where processes hold a part of the states each; load with shard=False, and save that"
            )
        # Copies, so that nothing can change them between the check and the use; of parts, only these are read.
        arrays = {key: file.get_tensor(key) for key in fitting if key not in parts}
        arrays.update(_mapped(where, {key: own[key] for key in parts}, document["sha256"]))
        held: dict[str, dict[str, np.ndarray]] = {"": {}}
        for key, (name, of) in there.items():
            held.setdefault(name, {})[of] = arrays[key] if key in arrays else _stand_in(*_kind(file, key))
    for key, array in arrays.items():
        if key not in parts and document["sha256"].get(key) != _digest(_bytes_of(np.require(array, requirements="C"))):
            raise _damaged(where, key)
    if convert:
        own_arrays: dict[str, dict[str, np.ndarray]] = {}
        for key, (name, of) in mine.items():
            own_arrays.setdefault(name, {})[of] = own[key]
        try:
            held = converted(held, own_arrays, paths)
        except KeyError as error:
            raise ValueError(f"{where}: must hold {error} for every parameter of this optimizer") from None
        arrays = dict(held[""])
    saved = held.pop("")
    params = {path: arrays[path] for path in paths if path in arrays}
    if not params and paths:
        raise ValueError(
            f"{where}: must share a parameter with this optimizer ({_listed(list(paths))}), got {_listed(list(saved))}"
        )
    state = {
        **{key: document[key] for key in ("rule", "step", "missed", "hyper", "overrides", "nonfinite", "options")},
        "format": document["state_format"],
        "state": {name: of_path for name, of_path in held.items() if name != EMA},
        "ema": held.get(EMA),
    }
    try:
        fitted, report = fit(state, here, strict=strict, keep=keep, params=params)
        snapshot = Snapshot.of(fitted, here)
        try_step(here, snapshot)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
    except Exception as error:  # a schedule and `prepare` are user code, and may raise anything
        raise ValueError(f"{where}: {error}") from error
    views = dict(zip(paths, here.flat.arrays, strict=True))
    lacking = {path: misfit(saved.get(path), view) for path, view in views.items() if path not in params}
    unexpected = dict.fromkeys((path for path in saved if path not in views), NO_PLACE)
    report = LoadReport(
        (*params, *report.loaded),
        {**lacking, **report.missing},
        {**unexpected, **report.unexpected},
        report.kept,
        document["extra"],
    )
    return Loaded(snapshot, [params.get(path, view) for path, view in views.items()], report, digest)


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


def _check_written(file: BinaryIO, header: bytes, arrays: Mapping[str, np.ndarray], digests: Mapping[str, str]) -> None:
    """Read a file back that was just written, and raise RuntimeError unless it holds what it should."""
    wrong = "the description" if file.read(len(header)) != header else ""
    for key, array in arrays.items():
        digest = _digest_of_next(file, array.nbytes)
        if not wrong and digest != digests[key]:
            wrong = repr(key)
    if wrong:
        raise RuntimeError(
            f"{wrong}: must be in the new file as it was given, got other bytes: another thread wrote into the arrays "
            f"during save(), or the disk is damaged. The old file was kept; save again, or save copy.deepcopy(opt)"
        )


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


def _damaged(where: str, key: str) -> ValueError:
    return ValueError(f"{where}: {key!r}: must have the SHA-256 stored in the file, got another; it is damaged")


def _mapped(where: str, arrays: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return arrays of a file as memory maps, after a look at every byte. arrays : of these shapes and dtypes."""
    found: dict[str, np.ndarray] = {}
    if not arrays:
        return found
    with Path(where).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        for key, array in arrays.items():
            start, stop = (8 + length + offset for offset in entries[key]["data_offsets"])
            file.seek(start)
            if _digest_of_next(file, stop - start) != digests.get(key):
                raise _damaged(where, key)
            stored = array.dtype.newbyteorder("<")
            found[key] = (
                np.memmap(where, stored, "r", start, array.shape) if array.size else np.empty(array.shape, stored)
            )
    return found


def _digest_of_next(file: BinaryIO, size: int) -> str:
    """The digest of the next bytes of a file, or of those there are."""
    digest = hashlib.sha256()
    while size and (part := file.read(min(size, BLOCK))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()


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


def _check_kind(
    where: str, document: Mapping[str, Any], state: OptimizerState, optimizer: str, *, strict: bool, convert: bool
) -> None:
    """Refuse another dtype, but to `convert` it, and, where `strict`, another rule."""
    there, here = (document["optimizer"], document["rule"]), (optimizer, state.rule.name)
    if strict and there[1] != here[1]:
        raise ValueError(
            f"{where}: must be saved by {here[0]} (rule {here[1]!r}), as this optimizer, got {there[0]} (rule "
            f"{there[1]!r})"
        )
    if document["dtype"] != state.flat.dtype.name and not convert:
        raise ValueError(
            f"{where}: must hold {state.flat.dtype.name} parameters, as this optimizer, got {document['dtype']}; "
            f"construct the optimizer with fastopt.pack(params, dtype={document['dtype']!r}), or load with convert=True"
        )


def _check_tree(where: str, there: Iterable[str], here: Iterable[str]) -> None:
    missing, unexpected = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    if missing or unexpected:
        got = [f"{what} {_listed(paths)}" for what, paths in (("lacks", missing), ("also has", unexpected)) if paths]
        raise ValueError(
            f"{where}: must hold the parameters of this optimizer, got a file that {' and '.join(got)}; construct the "
            f"tree it was saved from, or load with strict=False"
        )


def _listed(paths: list[str], most: int = 20) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(repr, paths[:most])) + more


def _places(keys: set[str], paths: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return, by its name in the file, which state of which parameter an array is; "" stands for the parameter itself.

    keys : the names in the file. A state has an array for every parameter.
    """
    others = keys - set(paths)
    places = {path: ("", path) for path in paths}
    for first in list(paths)[:1]:
        for key in sorted(others):
            name = key.removesuffix(f"/{first}")
            of_name = {f"{name}/{path}": (name, path) for path in paths}
            if name != key and of_name.keys() <= others:
                places.update(of_name)
    return places


def _kind(file: Any, key: str) -> tuple[str, tuple[int, ...]]:
    """Return the dtype, by its name in safetensors, and the shape of an array, without reading it."""
    found = file.get_slice(key)
    return found.get_dtype(), tuple(found.get_shape())


def _stand_in(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of this shape and dtype that takes no memory, for an array that is not read."""
    known = {name: numpys for numpys, name in NAMES.items() if numpys != BFLOAT16}  # which NumPy may not know
    return np.broadcast_to(np.zeros((), np.dtype(known.get(dtype, "V1"))), shape)


def _check_arrays(where: str, file: Any, own: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays whose names, dtypes or shapes differ from the optimizer's, before any is read."""
    there = set(file.keys())
    if there != set(own):
        key = sorted(there ^ set(own))[0]
        expected, got = ("be in the file", "none") if key in own else ("not be in the file", "one")
        raise ValueError(f"{where}: array {key!r}: must {expected}, got {got}; the file is damaged")
    for key, array in own.items():
        dtype, shape = _kind(file, key)
        if shape != array.shape:
            raise ValueError(f"{where}: {key!r}: must have shape {array.shape} as in this optimizer, got {shape}")
        if dtype != NAMES[array.dtype.name]:
            raise ValueError(f"{where}: {key!r}: must be {NAMES[array.dtype.name]} as in this optimizer, got {dtype}")
