"""`CompiledPrepare` runs a rule's `prepare` for many param groups in one compiled call, with the bits of Python.

`prepare` is plain arithmetic on the host: 1.25 us per param group in Python, a small fraction of it compiled. Python
stays the reference. A `prepare` is compiled only if it consists of operations that have the same result in both
(`Exact`); the result is then compared with Python's, to the bit, before it is used. Where Python would raise an error,
the compiled function stops, and leaves the row to Python.
"""

# Intrinsics are typed by numba.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import builtins
import ctypes
import inspect
import math
import operator
import struct
import sys
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir as llvm_ir
from numba import types
from numba.core import cgutils, ir
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.errors import UnsupportedError
from numba.core.ir_utils import build_definitions, get_definition, guard, mk_unique_var
from numba.core.untyped_passes import IRProcessing
from numba.extending import intrinsic

from fastopt.kernels.bind import bind, compile_loop
from fastopt.kernels.contract import StepHyper

if TYPE_CHECKING:
    from fastopt.rule import Rule

Form = tuple[tuple[str, Any], ...]
"""One item per hyperparameter: ("float", None), ("tuple", its length), ("bool", its value) or ("str", its value)."""

N_STEP = len(StepHyper._fields)
FLOAT = llvm_ir.DoubleType()

UNPACK: Any
PREPARE: Any
WRITE: Any

# --- the arguments of prepare -----------------------------------------------------------------------------------------


def form_of(arguments: tuple[Any, ...]) -> Form | None:
    """Return what `prepare` is compiled for; None if an argument is not a float, tuple of floats, bool or str."""
    form: list[tuple[str, Any]] = []
    for value in arguments:
        if isinstance(value, float):
            form.append(("float", None))
        elif isinstance(value, bool):
            form.append(("bool", value))
        elif isinstance(value, str):
            form.append(("str", value))
        elif isinstance(value, tuple) and all(isinstance(item, float) for item in value):
            form.append(("tuple", len(value)))
        else:
            return None
    return tuple(form)


def numbers_of(arguments: tuple[Any, ...]) -> list[Any]:
    """Return the floats among the arguments in order, tuples flattened; and arrays, of a float for each member."""
    numbers: list[Any] = []
    for value in arguments:
        if isinstance(value, float | np.ndarray):
            numbers.append(value)
        elif isinstance(value, tuple):
            numbers.extend(value)
    return numbers


def arguments_of(form: Form, numbers: Sequence[float]) -> tuple[Any, ...]:
    """Return the arguments of this form with these numbers: the inverse of `form_of` and `numbers_of`."""
    left = iter(numbers)
    found: dict[str, Callable[[Any], Any]] = {
        "float": lambda _: next(left),
        "tuple": lambda length: tuple(next(left) for _ in range(length)),
        "bool": bool,
        "str": str,
    }
    return tuple(found[kind](value) for kind, value in form)


def unpacker(form: Form) -> Any:
    """An intrinsic ``unpack(t, numbers, line)`` that returns the arguments of `prepare`.

    t is a float, because Python's ``beta**t`` converts an int t to a double. Bools and strings are constants.
    """
    kinds = {
        "float": lambda _: types.float64,
        "tuple": lambda length: types.UniTuple(types.float64, length),
        "bool": types.literal,
        "str": types.literal,
    }
    items = tuple(kinds[kind](value) for kind, value in form)

    @intrinsic
    def unpack(typing_context, t, numbers, line):
        result = types.BaseTuple.from_types([types.float64, *items])

        def build(context, builder, signature, values):
            source = context.make_array(numbers)(context, builder, values[1])
            width = cgutils.unpack_tuple(builder, source.shape)[1]
            first = builder.mul(values[2], width)
            column = 0

            def number():
                nonlocal column
                pointer = builder.gep(source.data, [builder.add(first, first.type(column))])
                column += 1
                return builder.load(pointer)

            unpacked = [builder.sitofp(values[0], FLOAT)]
            for item in items:
                if item == types.float64:
                    unpacked.append(number())
                elif isinstance(item, types.BaseTuple):
                    unpacked.append(context.make_tuple(builder, item, [number() for _ in range(len(item))]))
                elif isinstance(item, types.BooleanLiteral):
                    unpacked.append(context.get_constant(types.boolean, item.literal_value))
                else:
                    unpacked.append(context.get_dummy_value())
            return context.make_tuple(builder, result, unpacked)

        return result(types.int64, numbers, types.int64), build

    return unpack


# --- the row of the table ---------------------------------------------------------------------------------------------


def writer(width: int) -> Any:
    """An intrinsic ``write(table, row, prepared)``: whether the numbers fit the dtype and were written to the row."""

    @intrinsic
    def write(typing_context, table, row, prepared):
        if not isinstance(prepared, types.BaseTuple) or len(prepared) != width:
            raise UnsupportedError(f"prepare must return {width} numbers, found {prepared}")
        if not all(isinstance(kind, types.Float | types.Integer | types.Boolean) for kind in prepared):
            raise UnsupportedError(f"prepare must return numbers, found {prepared}")

        def build(context, builder, signature, values):
            target = context.make_array(table)(context, builder, values[0])
            number = context.get_data_type(table.dtype)
            zero, total, fits = FLOAT(0.0), FLOAT(0.0), cgutils.true_bit
            converted = []
            for k, kind in enumerate(prepared):
                value = context.cast(builder, builder.extract_value(values[2], k), kind, types.float64)
                total = builder.fadd(total, value)
                item = value if table.dtype == types.float64 else builder.fptrunc(value, number)
                fits = builder.and_(fits, builder.fcmp_ordered("==", builder.fsub(item, item), number(0.0)))
                converted.append(item)
            # As in `Table.write`, which adds up the numbers.
            fits = builder.and_(fits, builder.fcmp_ordered("==", builder.fsub(total, total), zero))
            with builder.if_then(fits):
                first = builder.mul(values[1], values[1].type(N_STEP + width))
                for k, item in enumerate(converted):
                    builder.store(item, builder.gep(target.data, [builder.add(first, first.type(N_STEP + k))]))
            return fits

        return types.boolean(table, types.int64, prepared), build

    return write


def fill(table, rows, ts, numbers):
    """Write one row after the other; return the first index that could not be written, or -1."""
    for k in range(rows.size):
        try:
            prepared = PREPARE(*UNPACK(ts[k], numbers, k))
        except Exception:
            return k
        if not WRITE(table, rows[k], prepared):
            return k
    return -1


# --- arithmetic with Python's results ---------------------------------------------------------------------------------


def library_function(name: str, count: int) -> Any:
    """An intrinsic that calls a function of the C library, as Python does; it raises where the result is not finite.

    Under a name of our own: LLVM knows `pow`, and would make of ``x**2`` a product, or vectorise it with other bits.
    """
    symbol = f"fastopt_{name}"

    def emit(context, builder, signature, values):
        operands = [
            context.cast(builder, value, kind, types.float64)
            for value, kind in zip(values, signature.args, strict=True)
        ]
        kind = llvm_ir.FunctionType(FLOAT, [FLOAT] * count)
        result = builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol), operands)
        unfit = builder.fcmp_unordered("!=", builder.fsub(result, result), FLOAT(0.0))
        with builder.if_then(unfit, likely=False):
            context.call_conv.return_user_exc(builder, ArithmeticError, ())
        return result

    @intrinsic
    def of_one(typing_context, x):
        if not isinstance(x, types.Float | types.Integer):
            raise UnsupportedError(f"{name} of {x}")
        return types.float64(x), emit

    @intrinsic
    def of_two(typing_context, x, y):
        # The power of an int is exact in Python, of whatever size.
        if not isinstance(x, types.Float) or not isinstance(y, types.Float | types.Integer):
            raise UnsupportedError(f"{name} of {x} and {y}")
        return types.float64(x, y), emit

    return of_one if count == 1 else of_two


FUNCTIONS = {
    name: library_function(name, 2 if name == "pow" else 1)
    for name in ("pow", "sqrt", "exp", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tanh")
}
"""The functions of `math` that are those of the C library."""


def smaller(x, y):
    """`min` of two numbers, with Python's choice between two zeros."""
    return y if y < x else x


def larger(x, y):
    """`max` of two numbers, with Python's choice between two zeros."""
    return y if y > x else x


@intrinsic
def converted(typing_context, value):
    """`float` of a number; numba's does not accept a bool."""
    if not isinstance(value, types.Float | types.Integer | types.Boolean):
        raise UnsupportedError(f"float of {value}")

    def build(context, builder, signature, values):
        return context.cast(builder, values[0], signature.args[0], types.float64)

    return types.float64(value), build


REPLACED: dict[Any, Any] = {
    builtins.float: converted,
    builtins.min: numba.njit(smaller),  # numba's `min` takes the other one of two equal zeros
    builtins.max: numba.njit(larger),
    builtins.pow: FUNCTIONS["pow"],
    **{getattr(math, name): function for name, function in FUNCTIONS.items()},
}
"""What is called instead of these functions."""

SAME = (abs, bool, len, tuple)
"""Functions with the same result in Python and in numba."""

OPERATORS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pos, operator.not_),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(operator.lt, operator.le, operator.eq, operator.ne, operator.ge, operator.gt),
}
"""Operators with the same result in Python and in numba, for floats and for ints below 2**53."""

EXPRESSIONS = {
    *("binop", "inplace_binop", "unary", "call", "getattr", "getitem", "static_getitem"),
    *("build_tuple", "exhaust_iter", "cast", "phi"),
}


def meaning_of(value: Any) -> Any:
    """Return what a global of `prepare` is in compiled code; UnsupportedError if it could differ from Python's."""
    if isinstance(value, float | int | str | None) or value is math or value in SAME:
        return value
    if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
        return value
    if getattr(getattr(value, "_compiler", None), "pipeline_class", None) is ExactCompiler:
        return value  # a function that `prepare` calls, compiled by `scalar`
    if isinstance(value, Hashable) and value in REPLACED:
        return REPLACED[value]
    raise UnsupportedError(f"prepare uses {value!r}")


@register_pass(mutates_CFG=False, analysis_only=False)
class Exact(FunctionPass):
    """A pass of numba's compiler that refuses what could differ from Python, and replaces ``**``, `math`, `min`, `max`.

    It also refuses loops: the time of `prepare` must not depend on t.
    """

    _name = "fastopt_exact"

    def __init__(self):
        FunctionPass.__init__(self)

    def run_pass(self, state):
        """Rewrite the function in place."""
        function = state.func_ir
        for label, block in function.blocks.items():
            if any(target <= label for target in block.terminator.get_targets()):
                raise UnsupportedError("prepare has a loop")
            body = []
            for statement in block.body:
                if isinstance(statement, ir.Assign):
                    value, where = statement.value, statement.loc
                    if operator_of(value) in (operator.pow, operator.ipow):
                        self.check_base(function, value)
                        callee = ir.Var(block.scope, mk_unique_var("$power"), where)
                        body.append(ir.Assign(ir.Global("power", FUNCTIONS["pow"], where), callee, where))
                        statement.value = ir.Expr.call(callee, (value.lhs, value.rhs), (), where)
                    else:
                        statement.value = self.replacement(function, value)
                body.append(statement)
            block.body = body
        function._definitions = build_definitions(function.blocks)
        return True

    @staticmethod
    def check_base(function, value):
        """Refuse ``t**3``, which is an exact int in Python."""
        base, exponent = (guard(get_definition, function, name) for name in (value.lhs, value.rhs))
        of_t = isinstance(base, ir.Arg) and base.name == "t"
        if of_t and isinstance(exponent, ir.Const) and isinstance(exponent.value, int):
            raise UnsupportedError("prepare has a power of t, which is an exact int in Python")

    @staticmethod
    def replacement(function, value):
        """Return what takes the place of the right side of an assignment."""
        if isinstance(value, ir.Global | ir.FreeVar):
            return ir.Global(value.name, meaning_of(value.value), value.loc)
        if not isinstance(value, ir.Expr):
            return value
        used = operator_of(value)
        if value.op not in EXPRESSIONS or not (used is None or used in OPERATORS):
            raise UnsupportedError(f"prepare has the expression {value}")
        if value.op == "getattr":
            owner = guard(get_definition, function, value.value)
            if isinstance(owner, ir.Global) and owner.value is math:
                return ir.Global(value.attr, meaning_of(getattr(math, value.attr)), value.loc)
        return value


def operator_of(value: Any) -> Any:
    """Return the function of the module `operator` that an expression applies; None for other expressions."""
    return value.fn if isinstance(value, ir.Expr) and value.op in ("binop", "inplace_binop", "unary") else None


class ExactCompiler(CompilerBase):
    """numba's compiler with the pass `Exact`."""

    def define_pipelines(self):
        """Return numba's usual passes and `Exact`."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(Exact, IRProcessing)
        passes.finalize()
        return [passes]


def scalar(function: Callable[..., Any]) -> Any:
    """Compile `prepare` or a function it calls. A division by zero raises an error, as in Python."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": ExactCompiler}
    return numba.njit(error_model="python", **options)(function)


# --- for many param groups --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def find_functions() -> bool:
    """Give LLVM the addresses of the C library's functions; whether they were found."""
    try:
        library = ctypes.CDLL(None)
        addresses = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in FUNCTIONS}
    except (AttributeError, OSError, TypeError):
        return False
    for name, address in addresses.items():
        llvm.add_symbol(f"fastopt_{name}", address)
    return True


@lru_cache(maxsize=128)
def compiled_fill(prepare: Callable[..., Any], form: Form, width: int, dtype: np.dtype[Any]) -> Any:
    """Compile `fill` for a `prepare` that returns `width` numbers; None where numba cannot."""
    if not find_functions():
        return None
    constants = {
        "PREPARE": prepare,
        "UNPACK": unpacker(form),
        "WRITE": writer(width),
        # For the digest of the cache on disk, which does not see the form, nor what `Exact` puts in.
        "FORM": form,
        "SOURCE": inspect.getsource(sys.modules[__name__]),
    }
    numbers = types.Array(types.float64, 2, "C")
    words = types.Array(types.int64, 1, "C")
    signature = (types.Array(numba.from_dtype(dtype), 2, "C"), words, words, numbers)
    try:
        bound = bind(fill, constants, label=f"{prepare.__name__}_{dtype}", scalar=scalar)
        return compile_loop(bound, signature).entry
    except Exception:  # numba and its passes fail with errors of many types
        return None


# The last ones reveal products of many t, which are exact ints in Python.
TRIED_STEPS = (1, 2, 3, 7, 100, 12_345, *range(999_983, 9_000_000, 524_287))
TRIED_FACTORS = (1.0, 0.97, 0.51)
"""The compiled `prepare` is compared with Python's at these steps, with the given numbers times these factors."""


class CompiledPrepare:
    """A rule's `prepare`, compiled for hyperparameters of one form; made by `of`."""

    def __init__(self, form: Form, entry: Any):
        self.form = form
        self._entry = entry

    @classmethod
    def of(cls, rule: Rule, hyper: Any, dtype: np.dtype[Any], arguments: tuple[Any, ...]) -> CompiledPrepare | None:
        """Compile `prepare` for arguments of this form.

        Args:
            rule: whose `prepare`.
            hyper: the NamedTuple that `prepare` returns.
            dtype: of the table, float32 or float64.
            arguments: the hyperparameters in the order of `rule.hyperparameters`.

        Returns:
            A `CompiledPrepare`; None where `prepare` must run in Python.
        """
        form = form_of(arguments)
        width = len(hyper._fields)
        if form is None:
            return None
        entry = compiled_fill(rule.prepare, form, width, dtype)
        if entry is None:
            return None
        compiled = cls(form, entry)
        return compiled if compiled.agrees(rule, width, dtype, numbers_of(arguments)) else None

    def fill(self, table: np.ndarray, rows: np.ndarray, ts: np.ndarray, numbers: np.ndarray) -> int:
        """Write the hyperparameters of many param groups: the columns after the fields of `StepHyper`.

        Args:
            table: 2-D, C-contiguous, in the compute dtype. Not checked; so are the others.
            rows: int64, rows of the table.
            ts: int64, the number of the update for each of them, from 1 and below 2**53.
            numbers: float64, 2-D, C-contiguous, a line of `numbers_of` for each of them.

        Returns:
            -1, or the first index that Python must decide: Python's `prepare` raises an error there, or may do so, or
            its numbers leave the range of the dtype. The rows before it are written; it and those after it are as they
            were.
        """
        return self._entry(table, rows, ts, numbers)

    def agrees(self, rule: Rule, width: int, dtype: np.dtype[Any], numbers: list[float]) -> bool:
        """Whether the compiled `prepare` gives the bits of Python's, and none where Python raises an error."""
        pack = struct.Struct(f"={width}{'f' if dtype.itemsize == 4 else 'd'}").pack
        table = np.zeros((1, N_STEP + width), dtype)
        row = np.zeros(1, np.int64)
        written = 0
        for t, factor in product(TRIED_STEPS, TRIED_FACTORS):
            tried = [factor * number for number in numbers]
            if self.fill(table, row, np.array([t]), np.array([tried])) == 0:
                continue  # Python decides
            try:
                expected = pack(*rule.prepare(t, *arguments_of(self.form, tried)))
            except (ArithmeticError, TypeError, ValueError, struct.error):
                return False
            if table[0, N_STEP:].tobytes() != expected:
                return False
            written += 1
        return written > 0
