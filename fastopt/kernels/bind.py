"""One loop + one rule + compile-time flags -> one named kernel; and the opt-in cache of compiled kernels on disk.

A loop such as ``elementwise`` of the CPU is an ordinary function that reads a few undefined upper-case globals
(``RULE``, ``L2``, ...). `bind` rebuilds the function with these names set. numba treats a global as a constant, prunes
``if FLAG:`` on it and inlines a function behind it. So a loop is written once, and disabled features cost nothing.
"""

from __future__ import annotations

import dis
import hashlib
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, ClassVar

import numba
import numpy as np
from numba.core import caching

CACHE_VARIABLE = "FASTOPT_CACHE_DIR"


def scalar_of(value: object) -> FunctionType | None:
    """Return the plain scalar function behind `value`: a function itself, or a Rule's ``.scalar``; else None."""
    if isinstance(value, FunctionType):
        return value
    inner = getattr(value, "scalar", None)
    return inner if isinstance(inner, FunctionType) else None


def bind(
    function: Callable[..., Any],
    constants: Mapping[str, Any],
    *,
    label: str,
    scalar: Callable[[FunctionType], Any],
) -> FunctionType:
    """Rebuild `function` with `constants` as its globals, and compile every scalar function it reaches with `scalar`.

    `scalar` compiles a scalar function for the target (njit on the CPU, an inlined device function on CUDA). It also
    compiles the scalar functions of `constants`, those they call, and those that a rule finds in its own module or
    closure. So a rule may call another rule or a plain function of its file.

    The result is named ``label_digest``. The digest covers the bytecode and constants of everything that went in. It
    makes numba's on-disk cache safe to use, because numba's own key does not include these.

    Raises TypeError where the function reads an upper-case name that is not among the constants, and that its module
    does not declare (``L2: bool``).
    """
    plain = scalar_of(function)
    if plain is None:
        raise TypeError(f"bind: must be given a plain function, got {function!r}")
    declared = plain.__globals__.get("__annotations__", {})  # what stands in a branch that is pruned is not supplied
    missing = {name for name in _names(plain.__code__) if name.isupper()} - {*constants, *plain.__globals__, *declared}
    if missing:
        raise TypeError(
            f"bind: {plain.__qualname__} reads {', '.join(sorted(missing))}: must be declared in its module"
        )
    return _Binder(scalar).bind(plain, constants, label)


class _Binder:
    """One binding. It compiles each scalar function once, even if several functions call it."""

    def __init__(self, scalar: Callable[[FunctionType], Any]):
        self.scalar = scalar
        self.compiled: dict[FunctionType, Any] = {}
        self.open: set[FunctionType] = set()

    def bind(self, function: FunctionType, constants: Mapping[str, Any], label: str) -> FunctionType:
        names = set(_names(function.__code__))
        own = {name: value for name, value in function.__globals__.items() if name in names}
        namespace = {**own, **constants}
        digest = hashlib.sha256(f"{sys.version}|{numba.__version__}|{_describe_function(function, namespace)}".encode())
        cells = None
        if function.__closure__ is not None:
            cells = tuple(CellType(self.resolve(cell.cell_contents)) for cell in function.__closure__)
        resolved = {name: self.resolve(value) for name, value in namespace.items()}
        bound = FunctionType(
            function.__code__,
            {**function.__globals__, **resolved},
            function.__name__,
            function.__defaults__,
            cells,
        )
        bound.__kwdefaults__ = function.__kwdefaults__
        bound.__name__ = bound.__qualname__ = f"{label}_{digest.hexdigest()[:16]}"
        bound.__module__ = function.__module__
        return bound

    def resolve(self, value: Any) -> Any:
        function = scalar_of(value)
        if function is None:
            return value
        if function not in self.compiled:
            if function in self.open:
                raise TypeError(f"scalar function {function.__qualname__!r}: must not be recursive, got a self-call")
            self.open.add(function)
            self.compiled[function] = self.scalar(self.bind(function, {}, function.__name__))
            self.open.discard(function)
        return self.compiled[function]


# --- the digest: everything that shapes the machine code --------------------------------------------------------------


def _names(code: CodeType) -> Iterator[str]:
    """Yield the globals that `code` reads. co_names also holds attributes, and h.momentum is not the rule momentum."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _describe_code(code: CodeType) -> str:
    parts = [code.co_code.hex(), repr((code.co_names, code.co_varnames, code.co_freevars, code.co_argcount))]
    parts += [_describe_code(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    return "|".join(parts)


def _describe_function(
    function: FunctionType, namespace: Mapping[str, Any] | None = None, seen: frozenset[Any] = frozenset()
) -> str:
    """Return a digest of the bytecode, defaults, closure and globals of a function and of all functions it reaches."""
    if function in seen:
        return "recursion"
    seen |= {function}
    found = function.__globals__ if namespace is None else namespace
    parts = [_describe_code(function.__code__), repr(function.__defaults__), repr(function.__kwdefaults__)]
    for cell in function.__closure__ or ():
        parts.append(_describe(cell.cell_contents, function, seen))
    for name in sorted(set(_names(function.__code__)) | set(namespace or ())):
        if name in found:
            parts.append(f"{name}={_describe(found[name], function, seen)}")
    return hashlib.sha256(";".join(parts).encode()).hexdigest()


def _describe(value: Any, function: FunctionType, seen: frozenset[Any]) -> str:
    """Return the part of the digest for a value that `function` reaches."""
    if isinstance(value, bool | int | float | str | bytes | np.generic | numba.types.Type | None):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, tuple):
        return f"({','.join(_describe(item, function, seen) for item in value)})"
    if isinstance(value, np.ndarray):  # numba compiles a global array into the code, with its contents
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, ModuleType):
        if value in seen:
            return value.__name__
        attributes = [name for name in function.__code__.co_names if hasattr(value, name)]
        inner = (f"{name}={_describe(getattr(value, name), function, seen | {value})}" for name in attributes)
        return f"{value.__name__}({','.join(inner)})"
    plain = scalar_of(value)
    if plain is not None:
        return _describe_function(plain, seen=seen)
    definition = getattr(value, "_defn", None)
    if isinstance(definition, FunctionType):  # a numba intrinsic: its code is part of the kernel
        return _describe_function(definition, seen=seen)
    inside = getattr(value, "py_func", None)
    if isinstance(inside, FunctionType):  # a numba dispatcher: one of ours, or a function that the user compiled
        return f"{sorted(getattr(value, 'targetoptions', {}).items())!r}:{_describe_function(inside, seen=seen)}"
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return f"{name}{getattr(value, '_fields', '')}"


# --- from a function to machine code ----------------------------------------------------------------------------------


def compile_loop(function: FunctionType, signature: tuple[Any, ...], *, nogil: bool = True, **options: Any) -> Any:
    """Compile for exactly one signature; keep the result on disk where FASTOPT_CACHE_DIR is set.

    Pass nogil=False for a function that reads Python objects, so that no other thread changes them meanwhile.
    """
    dispatcher = numba.njit(error_model="numpy", nogil=nogil, **options)(function)
    directory = cache_directory()
    if directory is not None:
        keep_on_disk(dispatcher, directory)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a part of a loop: numba inlines its source, which compiles faster than a function of its own."""
    return numba.njit(error_model="numpy", inline="always")(function)


def entry_of(dispatcher: Any) -> Callable[..., Any]:
    """Return the compiled entry of a function with one signature, which Python calls without numba's type dispatch."""
    (compiled,) = dispatcher.overloads.values()
    entry: Callable[..., Any] = compiled.entry_point
    return entry


def address_of(dispatcher: Any, *, of_c: bool = False) -> int:
    """Return the address of a function with one signature, for calls from numba; with `of_c`, for calls from C."""
    (compiled,) = dispatcher.overloads.values()
    name = compiled.fndesc.llvm_cfunc_wrapper_name if of_c else compiled.fndesc.llvm_func_name
    address: int = compiled.library.get_pointer_to_function(name)
    return address


# --- the opt-in cache -------------------------------------------------------------------------------------------------


FAILED: set[str | None] = set()
"""The settings of FASTOPT_CACHE_DIR whose failure was reported."""


class SharedCacheError(PermissionError):
    """Other users may write to the directory of the cache: numba's cache files are pickles, and run any code here."""


def cache_directory() -> Path | None:
    """Return the directory named by FASTOPT_CACHE_DIR, made if absent; None where the variable is unset or empty.

    None also, after one warning, where the directory cannot be made or read. Raises SharedCacheError.
    """
    try:
        return checked_directory()
    except SharedCacheError:
        raise
    except (OSError, RuntimeError) as error:
        go_on_without_cache(error)
        return None


def go_on_without_cache(error: Exception) -> None:
    """Warn, once in a process, that the cache cannot be read or written, and that kernels are compiled without it."""
    name = os.environ.get(CACHE_VARIABLE)
    if name not in FAILED:
        FAILED.add(name)
        warnings.warn(
            f"{CACHE_VARIABLE}: must be a directory that can be read and written, got {name!r}: {error}; kernels are "
            f"compiled without it, again in every process",
            RuntimeWarning,
            stacklevel=2,
        )


def checked_directory() -> Path | None:
    """Return the directory named by FASTOPT_CACHE_DIR, made if absent; None where the variable is unset or empty.

    Raises OSError where it cannot be made or read, RuntimeError where it names an unknown user or a loop of links, and
    SharedCacheError where other users may write to it.
    """
    name = os.environ.get(CACHE_VARIABLE)
    if not name:
        return None
    path = Path(name).expanduser().resolve()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SharedCacheError(
                f"{CACHE_VARIABLE}: must be a directory that belongs to you and that nobody else can write to, because "
                f"cache files are executable code, got {name!r}; run: chmod 700 {name}"
            )
    return path


def keep_on_disk(dispatcher: Any, directory: Path) -> None:
    """Make numba keep the compiled code of `dispatcher`, whose name holds a digest of all sources, in `directory`."""

    class Locator(caching._CacheLocator):
        """The directory of the files, and a constant stamp: the digest in the function's name detects stale files."""

        def __init__(self, function: FunctionType):
            self.function = function

        def get_cache_path(self) -> str:
            return str(directory)

        def get_source_stamp(self) -> str:
            return self.function.__qualname__

        def get_disambiguator(self) -> str:
            return ""

        @classmethod
        def from_function(cls, function: FunctionType, source: str) -> Locator:
            return cls(function)

    class Files(caching.CompileResultCacheImpl):
        _locator_classes: ClassVar[list[Any]] = [Locator]

    class Cache(caching.FunctionCache):
        _impl_class = Files

        def load_overload(self, signature: Any, target: Any) -> Any:
            try:
                return super().load_overload(signature, target)
            except Exception:  # a truncated or foreign file must cause a compilation, not fail for ever
                try:
                    self.flush()
                except OSError as error:
                    go_on_without_cache(error)
                return None

        def save_overload(self, signature: Any, data: Any) -> None:
            try:
                super().save_overload(signature, data)
            except Exception as error:  # also where a damaged index could not be mended
                go_on_without_cache(error)

    dispatcher._cache = Cache(dispatcher.py_func)
