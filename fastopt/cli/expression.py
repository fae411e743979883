"""User-written functions of x and y: a small grammar, evaluated on arrays together with the gradient.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/") signed)*
    signed  = ("+" | "-") signed | power
    power   = atom (("^" | "**") signed)?
    atom    = number | "x" | "y" | "pi" | "e" | function "(" sum ")" | "(" sum ")"

Powers bind tightest and associate to the right, and ``-x^2`` is ``-(x^2)``. The parser compiles a text to a list of
stack operations, all of which are defined in this file: a text cannot run Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastopt.cli.choices import one_of

MAX_CHARACTERS = 1000
MAX_NESTING = 50
"""Nesting depth of parentheses, signs and powers: bounds the recursion of the parser."""
MAX_EXPONENT = 100.0
"""Largest constant exponent: larger ones overflow almost everywhere."""

VARIABLES = ("x", "y")
CONSTANTS = {"pi": math.pi, "e": math.e}

Array: TypeAlias = NDArray[Any]


class Operation(NamedTuple):
    """A function of one or two arguments, and its partial derivatives as a function of its result and arguments."""

    arity: int
    value: Callable[..., Array]
    slopes: Callable[..., tuple[Any, ...]]


FUNCTIONS = {
    "abs": Operation(1, np.abs, lambda r, a: (np.sign(a),)),
    "atan": Operation(1, np.arctan, lambda r, a: (1.0 / (1.0 + a * a),)),
    "cos": Operation(1, np.cos, lambda r, a: (-np.sin(a),)),
    "cosh": Operation(1, np.cosh, lambda r, a: (np.sinh(a),)),
    "exp": Operation(1, np.exp, lambda r, a: (r,)),
    "log": Operation(1, np.log, lambda r, a: (1.0 / a,)),
    "sin": Operation(1, np.sin, lambda r, a: (np.cos(a),)),
    "sinh": Operation(1, np.sinh, lambda r, a: (np.cosh(a),)),
    "sqrt": Operation(1, np.sqrt, lambda r, a: (0.5 / r,)),
    "tan": Operation(1, np.tan, lambda r, a: (1.0 + r * r,)),
    "tanh": Operation(1, np.tanh, lambda r, a: (1.0 - r * r,)),
}

NEGATE = Operation(1, np.negative, lambda r, a: (-1.0,))
OPERATORS = {
    "+": Operation(2, np.add, lambda r, a, b: (1.0, 1.0)),
    "-": Operation(2, np.subtract, lambda r, a, b: (1.0, -1.0)),
    "*": Operation(2, np.multiply, lambda r, a, b: (b, a)),
    "/": Operation(2, np.divide, lambda r, a, b: (1.0 / b, -r / b)),
    "^": Operation(2, np.power, lambda r, a, b: (b * np.power(a, b - 1.0), r * np.log(a))),
}


def _power_of(k: float) -> Operation:
    """Return ``a^k`` for a constant k; its slope at 0 is a polynomial's, where the general slope is 0 * infinity."""
    return Operation(1, lambda a: np.power(a, k), lambda r, a: (k * np.power(a, k - 1.0) if k else 0.0,))


@dataclass(frozen=True)
class Expression:
    """A parsed text: call it with x and y, numbers or arrays that broadcast, to get the values there.

    Points where the function is undefined give NaN or infinity, without a warning.
    """

    text: str
    program: tuple[float | str | Operation, ...]
    """In evaluation order: numbers and variables are pushed on a stack, an operation replaces its arguments there."""

    def __call__(self, x: ArrayLike, y: ArrayLike) -> Array:
        """Return the values."""
        return self._run(x, y, sloped=False)[0]

    def gradient(self, x: ArrayLike, y: ArrayLike) -> tuple[Array, Array, Array]:
        """Return the values and their derivatives by x and y: one pass with the chain rule, exact up to rounding."""
        return self._run(x, y, sloped=True)

    def _run(self, x: ArrayLike, y: ArrayLike, *, sloped: bool) -> tuple[Array, Array, Array]:
        # Use NumPy scalars: a Python float raises on division by 0.
        xs, ys = (np.asarray(values, np.float64)[()] for values in (x, y))
        one = np.float64(1.0) if sloped else None
        # Values with their derivatives by x and y, or None for a zero derivative: with 0.0, 0 * infinity would be NaN.
        stack: list[tuple[Any, Any, Any]] = []
        with np.errstate(all="ignore"):
            for item in self.program:
                if isinstance(item, float):
                    stack.append((np.float64(item), None, None))
                elif isinstance(item, str):
                    stack.append((xs, one, None) if item == "x" else (ys, None, one))
                else:
                    arguments = stack[-item.arity :]
                    del stack[-item.arity :]
                    values, by_x, by_y = zip(*arguments, strict=True)
                    result = item.value(*values)
                    slopes = item.slopes(result, *values) if sloped else ()
                    stack.append((result, _chain(slopes, by_x), _chain(slopes, by_y)))
        shape = np.broadcast_shapes(np.shape(xs), np.shape(ys))
        value, *derivatives = stack.pop()
        whole = [np.float64(0.0) if part is None else part for part in (value, *derivatives)]
        if shape:
            whole = [np.broadcast_to(part, shape) for part in whole]
        return whole[0], whole[1], whole[2]


def _chain(slopes: tuple[Any, ...], inner: tuple[Any, ...]) -> Any:
    terms = [slope * change for slope, change in zip(slopes, inner, strict=False) if change is not None]
    return sum(terms[1:], terms[0]) if terms else None


def parse(text: str) -> Expression:
    """Parse `text` as a function of x and y.

    Raise ValueError with the position for a text outside the grammar, an unknown name, a constant exponent beyond
    `MAX_EXPONENT`, more than `MAX_CHARACTERS` or `MAX_NESTING`, or a function that depends on neither x nor y.
    """
    if len(text) > MAX_CHARACTERS:  # check this first: it bounds the work below
        raise ValueError(f"expression: must be at most {MAX_CHARACTERS} characters long, got {len(text)}")
    program = _Parser(text).whole()
    if not any(item in VARIABLES for item in program if isinstance(item, str)):
        raise ValueError(f"expression: must depend on x or y, such as x^2/10 + y^2, got {text.strip()!r}")
    return Expression(text.strip(), program)


class Token(NamedTuple):
    """A word of the language and its position."""

    kind: str
    text: str
    at: int


TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+)"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
    r"|(?P<sign>\*\*|[-+*/^()])"
)

REMEDIES = {
    ".": "attributes are not part of this language",
    ",": "every function takes one argument, and decimals have a point",
    "[": "group with ( and )",
    "]": "group with ( and )",
    "{": "group with ( and )",
    "}": "group with ( and )",
    "=": "give the right-hand side only",
    "|": "absolute values are written abs(x)",
}
NO_REMEDY = "an expression consists of numbers, x, y, + - * / ^, parentheses and functions"


class _Parser:
    """Recursive-descent parser that emits the operations in evaluation order."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[Token] = []
        self.next = 0
        self.nesting = 0
        self.program: list[float | str | Operation] = []
        at = 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                self.fail(at, f"unexpected {text[at]!a}; {REMEDIES.get(text[at], NO_REMEDY)}")
            if match.lastgroup != "space":
                self.tokens.append(Token(str(match.lastgroup), match.group(), at))
            at = match.end()
        self.tokens.append(Token("end", "", at))

    def whole(self) -> tuple[float | str | Operation, ...]:
        self.sum()
        token = self.tokens[self.next]
        if token.text == ")":
            self.fail(token.at, "unmatched )")
        if token.kind != "end":
            self.fail(token.at, "must be an operator; write a product with *, as in 2*x")
        return tuple(self.program)

    def sum(self) -> None:
        self.product()
        while operator := self.accept("+", "-"):
            self.product()
            self.apply(OPERATORS[operator.text])

    def product(self) -> None:
        self.signed()
        while operator := self.accept("*", "/"):
            self.signed()
            self.apply(OPERATORS[operator.text])

    def signed(self) -> None:
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            self.fail(self.tokens[self.next].at, f"nesting must be at most {MAX_NESTING} deep")
        if sign := self.accept("+", "-"):
            self.signed()
            if sign.text == "-":
                self.apply(NEGATE)
        else:
            self.power()
        self.nesting -= 1

    def power(self) -> None:
        self.atom()
        if self.accept("^", "**"):
            at = self.tokens[self.next].at
            self.signed()
            exponent = self.program[-1]
            if not isinstance(exponent, float):
                self.apply(OPERATORS["^"])
                return
            if not abs(exponent) <= MAX_EXPONENT:
                self.fail(at, f"a constant exponent must lie within +-{MAX_EXPONENT:g}, got {exponent:.6g}")
            self.program.pop()
            self.apply(_power_of(exponent))

    def atom(self) -> None:
        token = self.tokens[self.next]
        self.next += 1
        if token.kind == "number":
            number = float(token.text)
            if not math.isfinite(number):
                self.fail(token.at, "a number must fit into a 64-bit float")
            self.program.append(number)
        elif token.kind == "name":
            self.named(token)
        elif token.text == "(":
            self.group(token)
        else:
            self.fail(token.at, "must be a number, x, y, a function or a parenthesis")

    def named(self, token: Token) -> None:
        called = self.accept("(")
        try:
            name = one_of(token.text, [*VARIABLES, *CONSTANTS, *FUNCTIONS], "name")
        except ValueError as error:
            self.fail(token.at, str(error))
        if name in FUNCTIONS:
            if called is None:
                self.fail(token.at, f"{name} is a function; write {name}(x)")
            self.group(called)
            self.apply(FUNCTIONS[name])
        elif called is not None:
            self.fail(token.at, f"{name} is not a function; write a product with *, as in {name}*(x + y)")
        else:
            self.program.append(CONSTANTS.get(name, name))

    def group(self, opened: Token) -> None:
        self.sum()
        if self.accept(")") is None:
            at = self.tokens[self.next].at
            self.fail(at, f"must be an operator, or the ) that closes the ( at character {opened.at + 1}")

    def accept(self, *signs: str) -> Token | None:
        token = self.tokens[self.next]
        if token.text not in signs:
            return None
        self.next += 1
        return token

    def apply(self, operation: Operation) -> None:
        """Emit `operation`, or its result if its arguments are constants."""
        arguments = self.program[-operation.arity :]
        numbers = [np.float64(item) for item in arguments if isinstance(item, float)]
        if len(numbers) < operation.arity:
            self.program.append(operation)
            return
        with np.errstate(all="ignore"):
            self.program[-operation.arity :] = [float(operation.value(*numbers))]

    def fail(self, at: int, what: str) -> NoReturn:
        shown = self.text[at : at + 20]
        where = f"at character {at + 1}, {shown!a}" if at < len(self.text) else "at the end"
        raise ValueError(f"{where}: {what}")
