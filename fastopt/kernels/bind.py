"""One loop + one rule + compile-time flags -> one named kernel, which is compiled, or loaded from the disk.

A loop such as ``elementwise`` of the CPU is an ordinary function that reads a few undefined upper-case globals
(``RULE``, ``L2``, ...). `bind` rebuilds the function with these names set. numba treats a global as a constant, prunes
``if FLAG:`` on it and inlines a function behind it. So a loop is written once, and disabled features cost nothing.
"""

from __future__ import annotations

import dis
import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numba
import numpy as np

from fastopt.kernels import cache


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
    closure. So a rule may call another rule or a plain function: by its name, or as ``fastopt.rules.adam``.

    The result is named ``label_digest``. The digest covers the bytecode and constants of everything that went in.

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
        names, attributes = _names(function.__code__), _attributes(function.__code__)
        own = {name: value for name, value in function.__globals__.items() if name in names}
        namespace = {**own, **constants}
        digest = hashlib.sha256(f"{sys.version}|{numba.__version__}|{_describe_function(function, namespace)}".encode())
        cells = None
        if function.__closure__ is not None:
            free = zip(function.__code__.co_freevars, function.__closure__, strict=True)
            cells = tuple(CellType(self.resolve(cell.cell_contents, attributes.get(name, ()))) for name, cell in free)
        resolved = {name: self.resolve(value, attributes.get(name, ())) for name, value in namespace.items()}
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

    def resolve(self, value: Any, attributes: Collection[Path] = ()) -> Any:
        """Return what compiled code finds in the place of a value, of which it reads these attributes."""
        if isinstance(value, ModuleType):
            return self.resolve_module(value, attributes)
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

    def resolve_module(self, module: ModuleType, attributes: Collection[Path]) -> ModuleType:
        """Return a module, or one like it whose rules and functions, as far as they are read, are compiled."""
        found = {}
        for name in dict.fromkeys([path[0] for path in attributes if path]):
            value = getattr(module, name, None)
            if isinstance(value, FunctionType) and value.__module__.partition(".")[0] == "numpy":
                continue  # numba has its own
            resolved = self.resolve(value, [path[1:] for path in attributes if path[:1] == (name,)])
            if resolved is not value:
                found[name] = resolved
        return _Module(module, found) if found else module


class _Module(ModuleType):
    """A module, some of whose attributes are replaced."""

    def __init__(self, module: ModuleType, replaced: Mapping[str, Any]):
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


Path = tuple[str, ...]
"""Names of attributes, each of what the one before it means: ``("rules", "adam")`` in ``fastopt.rules.adam``."""


@lru_cache(maxsize=1024)
def _attributes(code: CodeType) -> dict[str, set[Path]]:
    """Return the attributes that `code` reads of its globals and of the variables of its closure, by their names."""
    found: dict[str, set[Path]] = {}
    base, path = "", Path()
    for each in dis.get_instructions(code):
        if base and each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path = (*path, each.argval)
            found.setdefault(base, set()).add(path)
        elif each.opname != "EXTENDED_ARG":
            base, path = each.argval if each.opname in ("LOAD_GLOBAL", "LOAD_DEREF") else "", ()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            for base, paths in _attributes(constant).items():
                found.setdefault(base, set()).update(paths)
    return found


# --- the digest: everything that shapes the machine code --------------------------------------------------------------


@lru_cache(maxsize=1024)
def _names(code: CodeType) -> frozenset[str]:
    """Return the globals that `code` reads. co_names also holds attributes, and h.momentum is not the rule momentum."""
    instructions = dis.get_instructions(code)
    own = {each.argval for each in instructions if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(own.union(*(_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))))


@lru_cache(maxsize=1024)
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
    for name in sorted(_names(function.__code__) | set(namespace or ())):
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that a module still has: NumPy 1.26 has np.math
            attributes = {name: getattr(value, name) for name in function.__code__.co_names if hasattr(value, name)}
        inner = (f"{name}={_describe(each, function, seen | {value})}" for name, each in attributes.items())
        return f"{value.__name__}({','.join(inner)})"
    plain = scalar_of(value)
    if plain is not None:
        return _describe_function(plain, seen=seen)
    digest = getattr(value, "digest", None)
    if isinstance(digest, str):  # a function with a form per dtype: see `fastopt.kernels.typed`
        return digest
    definition = getattr(value, "_defn", None)
    if isinstance(definition, FunctionType):  # a numba intrinsic: its code is part of the kernel
        return _describe_function(definition, seen=seen)
    inside = getattr(value, "py_func", None)
    if isinstance(inside, FunctionType):  # a numba dispatcher: one of ours, or a function that the user compiled
        return f"{sorted(getattr(value, 'targetoptions', {}).items())!r}:{_describe_function(inside, seen=seen)}"
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return f"{name}{getattr(value, '_fields', '')}"


# --- from a function to machine code ----------------------------------------------------------------------------------


class Compiled:
    """A function that was compiled for one signature, in this process or in an earlier one."""

    def __init__(self, result: Any):
        self._result = result

    @property
    def entry(self) -> Callable[..., Any]:
        """What Python calls, without numba's dispatch on the types of arguments."""
        entry: Callable[..., Any] = self._result.entry_point
        return entry

    def address(self, *, of_c: bool = False) -> int:
        """The address of the machine code, for calls from numba; with `of_c`, for calls from C."""
        described = self._result.fndesc
        name = described.llvm_cfunc_wrapper_name if of_c else described.llvm_func_name
        address: int = self._result.library.get_pointer_to_function(name)
        return address

    def assembly(self) -> str:
        """The machine code as text; only of a function that was compiled in this process."""
        text: str = self._result.library.get_asm_str()
        return text


def compile_loop(
    function: FunctionType,
    signature: tuple[Any, ...],
    *,
    check: Callable[[], None] | None = None,
    nogil: bool = True,
    **options: Any,
) -> Compiled:
    """Compile a function that `bind` returned for one signature, or load it from the disk: see `fastopt.kernels.cache`.

    check : called before the function is compiled. What it refuses, by an error, is not kept on disk.
    nogil : False for a function that reads Python objects, so that no other thread changes them meanwhile.
    """
    options = {"error_model": "numpy", "nogil": nogil, **options}
    name = cache.name_of(function.__name__, signature, options)
    result = cache.load(name)
    if result is None:
        if check is not None:
            check()
        start = time.perf_counter()
        dispatcher = numba.njit(**options)(function)
        dispatcher.compile(signature)
        (result,) = dispatcher.overloads.values()
        is_kept = cache.save(name, result)
        WAIT.add(function.__name__, time.perf_counter() - start, is_kept)
    else:
        WAIT.loaded += 1
    return Compiled(result)


class Wait:
    """Counts compilations, and tells people at a terminal, once, what they wait for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """What compilation has taken in this process."""
        self.compiled = self.kept = self.loaded = 0
        """Kernels that were compiled, those of them that were kept on disk, and kernels that were loaded from there."""
        self.quiet = False
        """Whether people see already what they wait for, as in a command's progress bar."""
        self._told = False

    def add(self, label: str, seconds: float, is_kept: bool) -> None:
        """Count a compilation."""
        self.seconds += seconds
        self.compiled += 1
        self.kept += is_kept
        if self.quiet or self._told or self.seconds < PATIENCE:
            return
        if sys.stderr is None or not sys.stderr.isatty():
            return
        self._told = True
        later = "the next process loads them" if is_kept else "the next process compiles them again, without a cache"
        name = label.rpartition("_")[0]  # the digest says nothing
        print(f"fastopt: compiling kernels, {self.seconds:.0f} s so far ({name}); {later}", file=sys.stderr)


PATIENCE = 2.0
"""Seconds of compilation after which people are told."""

WAIT = Wait()


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a part of a loop: numba inlines its source, which compiles faster than a function of its own."""
    return numba.njit(error_model="numpy", inline="always")(function)
