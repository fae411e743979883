"""What is wrong in a scalar function, in one line: which line of it, and what numba or the dtype refuses there."""

from __future__ import annotations

import dis
import linecache
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from types import FunctionType
from typing import Any

from numba import types
from numba.core import ir

from fastopt import suggest

LONGEST = 200
"""The most characters of numba's own message that are quoted."""

INSTEAD: Mapping[str, str] = {
    "clip": "write min(max(x, low), high)",
    "where": "write a if condition else b",
    "norm": "declare it by fastopt.Sums(norms=...)",
    **dict.fromkeys(("sum", "mean", "std", "var", "median"), "declare it by fastopt.Sums: a rule sees one element"),
}
"""What a rule does instead of some functions of arrays."""


def place(filename: str, line: int) -> str:
    """Return a line of a file in words, with its text where that can be read."""
    text = linecache.getline(filename, line).strip()
    return f"line {line} of {PurePath(filename).name}{f' (`{text}`)' if text else ''}"


# --- why numba does not compile a function ----------------------------------------------------------------------------


def refusal(compiled: Any, hyper: Any, error: Exception) -> str:
    """Return why numba refused to compile a scalar function, and where: "must ..., got ... in line ...".

    Args:
        compiled: the function, compiled by `scalar` as far as numba could.
        hyper: the NamedTuple that is its last argument.
        error: what numba raised.
    """
    functions = list(_reached(compiled.py_func, set()))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # numba writes in bold where colorama is installed
    message = re.sub(r"\A(Failed in \w+ mode pipeline \(step: .*\)\s*)+", "", plain)
    first = message.strip().partition("\n")[0]
    if found := re.match(r"NameError: name '(\w+)' is not defined", first):
        name = found[1]
        return f"must use names that are defined, got {name!r}{_at(_of_name(functions, name))}"
    if found := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", first):
        return f"must use names that are defined, got {found[1]}.{found[2]}{_at(_of_name(functions, found[2]))}"
    code = compiled.py_func.__code__
    where = _at(_of_typing(functions, message) or (code.co_filename, code.co_firstlineno))
    if found := re.match(r"Unknown attribute '(\w+)' of type (\w+)(.*)", first):
        name, kind, _ = found.groups()
        if kind != hyper.__name__:
            return f"must use numbers as numbers, got the attribute .{name} of {kind}{where}"
        meant = suggest.argument(name, hyper._fields)
        hint = f"; did you mean h.{meant}?" if meant else ""
        return f"must read fields of {kind} ({', '.join(hyper._fields)}), got h.{name}{where}{hint}"
    if re.match(r"(No implementation of function|Invalid use of)", first) and (call := re.search(r">>> (.+)", message)):
        remedy = INSTEAD.get(call[1].partition("(")[0], "see fastopt.math for functions of numbers")
        return f"must call what numba compiles for numbers, got {call[1]}{where}; {remedy}"
    if found := re.match(r"Cannot bind 'args=\((.*?),?\) kws=.*' to signature '(.*?)'", first):
        count = len(found[1].split(", ")) if found[1] else 0
        return f"must call functions with their arguments, {found[2]}, got {count}{where}"
    return f"must be compiled by numba, got {type(error).__name__}: {first[:LONGEST]}{where}"


def _at(found: tuple[str, int] | None) -> str:
    return f" in {place(*found)}" if found else ""


def _reached(function: FunctionType, seen: set[FunctionType]) -> Iterator[FunctionType]:
    """The function, and those that it calls by name."""
    if function in seen:
        return
    seen.add(function)
    yield function
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    closed = [cell.cell_contents for cell in function.__closure__ or ()]
    for value in (*named, *closed):
        inner = getattr(value, "py_func", None)
        if isinstance(inner, FunctionType):
            yield from _reached(inner, seen)


def _of_name(functions: list[FunctionType], name: str) -> tuple[str, int] | None:
    """The file and line where a name is read first."""
    for function in functions:
        line = function.__code__.co_firstlineno
        starts = dict(dis.findlinestarts(function.__code__))
        for each in dis.get_instructions(function.__code__):
            line = starts.get(each.offset) or line
            read = each.argval if isinstance(each.argval, tuple) else (each.argval,)
            if each.opname.startswith("LOAD_") and name in read:
                return function.__code__.co_filename, line
    return None


def _of_typing(functions: list[FunctionType], message: str) -> tuple[str, int] | None:
    """The file and line of one of the functions that numba names first: errors inside of numba's own come before."""
    files = {function.__code__.co_filename for function in functions}
    for found in re.finditer(r"During: [\w -]+ at (.+) \((\d+)\)$", message, flags=re.MULTILINE):
        if found[1] in files:
            return found[1], int(found[2])
    return None


# --- where a number of another dtype comes from -----------------------------------------------------------------------


def promotion(compiled: Any, signature: tuple[Any, ...], number: Any) -> str:
    """Return where a scalar function leaves its dtype, and by which literal, to end an error; "" where unknown.

    Args:
        compiled: the function, compiled by `scalar` for the signature.
        signature: the numba types of its arguments.
        number: the numba type that it should return numbers of.
    """
    if compiled.overloads[signature].signature.return_type == types.none:
        return "; end it with return"
    found = _Search(number).of_returned(compiled, signature)
    if found is None:
        return ""
    literal, where = found
    if literal is None:
        return f"; {place(where.filename, where.line)} leaves {number}"
    return (
        f"; the literal {literal} in {place(where.filename, where.line)} promotes {number} to float64: compute the "
        f"constant in `prepare` and read it from h"
    )


class _Search:
    """Follows a value of another dtype back through typed functions to where it arises."""

    def __init__(self, number: Any):
        self.number = number
        self.seen: set[Any] = set()

    def other(self, kind: Any) -> bool:
        """Whether a numba type is another number than it should be, or an array, or holds one."""
        if isinstance(kind, types.BaseTuple):
            return any(map(self.other, kind))
        return isinstance(kind, types.Number | types.Array) and types.unliteral(kind) != self.number

    def of_returned(self, dispatcher: Any, signature: tuple[Any, ...]) -> tuple[Any, Any] | None:
        """The literal, or None, and the place of what a compiled function returns."""
        result = dispatcher.overloads.get(signature)
        if result is None or dispatcher in self.seen:
            return None
        self.seen.add(dispatcher)
        typed = result.type_annotation
        values: dict[str, list[Any]] = {}
        statements = [each for block in typed.blocks.values() for each in block.body]
        for each in statements:
            if isinstance(each, ir.Assign):
                values.setdefault(each.target.name, []).append(each)
        for each in statements:
            if isinstance(each, ir.Return):
                found = self.of_variable(each.value, typed, values)
                if found is not None:
                    return found
        return None

    def of_variable(self, variable: Any, typed: Any, values: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The same of a variable of a function. values : the assignments by the names of their targets."""
        key = (id(typed), variable.name)
        if key in self.seen or not self.other(typed.typemap[variable.name]):
            return None
        self.seen.add(key)
        for assigned in values.get(variable.name, ()):
            found = self.of_value(assigned, typed, values)
            if found is not None:
                return found
        return None

    def of_value(self, assigned: Any, typed: Any, values: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The same of the right side of an assignment."""
        value = assigned.value
        if isinstance(value, ir.Const):
            return repr(value.value), assigned.loc
        if isinstance(value, ir.Global | ir.FreeVar):
            return f"{value.name} = {value.value!r}", assigned.loc
        if isinstance(value, ir.Var):
            return self.of_variable(value, typed, values)
        if not isinstance(value, ir.Expr):
            return None
        kinds = [typed.typemap[each.name] for each in value.list_vars()]
        if value.op == "call":
            callee = typed.typemap[value.func.name]
            if isinstance(callee, types.Dispatcher):
                inner = self.of_returned(callee.dispatcher, tuple(typed.calltypes[value].args))
                if inner is not None:
                    return inner
        widest = sorted(zip(kinds, value.list_vars(), strict=True), key=lambda pair: isinstance(pair[0], types.Integer))
        for _, operand in widest:  # floats first: an int is promoted along with them
            found = self.of_variable(operand, typed, values)
            if found is not None:
                return found
        return None if value.op == "phi" else (None, assigned.loc)
