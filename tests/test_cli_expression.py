"""The language of `fastopt contour --function`: its values, its gradients, and the quick refusal of hostile text."""

from __future__ import annotations

import builtins
import math
import operator
import re
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastopt.cli.expression import FUNCTIONS, MAX_CHARACTERS, MAX_NESTING, parse

# --- random expressions against an evaluation of their trees ----------------------------------------------------------

ORACLE = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": np.power,
    "atan": np.arctan,
    **{name: getattr(np, name) for name in FUNCTIONS if name != "atan"},
}

LEAVES = st.one_of(
    st.floats(0.0, 1e3, allow_subnormal=False), st.integers(0, 9).map(float), st.sampled_from(["x", "y", "pi", "e"])
)


def wider(parts):
    return st.one_of(
        st.tuples(st.sampled_from("+-*/"), parts, parts),
        st.tuples(st.just("^"), parts, st.one_of(st.integers(-9, 9).map(float), parts)),
        st.tuples(st.sampled_from([*FUNCTIONS, "minus"]), parts),
    )


TREES = st.recursive(LEAVES, wider, max_leaves=12)


def written(tree, spaces=""):
    """Return the tree as text, with all parentheses."""
    if isinstance(tree, float):
        return repr(tree) if tree >= 0 else f"(-{abs(tree)!r})"
    if isinstance(tree, str):
        return tree
    sign, *parts = tree
    texts = [written(part, spaces) for part in parts]
    if sign == "minus":
        return f"(-{texts[0]})"
    if len(parts) == 1:
        return f"{sign}{spaces}({texts[0]})"
    return f"({texts[0]}{spaces}{sign}{spaces}{texts[1]})"


def computed(tree, x, y):
    if isinstance(tree, float):
        return np.float64(tree)
    if isinstance(tree, str):
        return np.float64({"x": x, "y": y, "pi": math.pi, "e": math.e}[tree])
    sign, *parts = tree
    values = [computed(part, x, y) for part in parts]
    return -values[0] if sign == "minus" else ORACLE[sign](*values)


def accepted(tree, spaces=""):
    """Return the parsed tree, or None if it is a constant, too long, too deep, or has a too large constant exponent."""
    try:
        return parse(written(tree, spaces))
    except ValueError as error:
        reason = str(error)
    assert re.search(
        "must depend on x or y|a constant exponent must lie|nesting must be at most|characters long", reason
    ), reason
    return None


@given(TREES, st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(["", " ", "\t\n "]))
def test_values_equal_those_of_the_tree_bit_for_bit(tree, x, y, spaces):
    f = accepted(tree, spaces)
    if f is not None:
        with np.errstate(all="ignore"):
            assert np.array_equal(f(x, y), computed(tree, x, y), equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_equal_those_of_pythons_math(name):
    expected = abs(0.7) if name == "abs" else getattr(math, name)(0.7)
    assert parse(f"{name}(x)")(0.7, 0.0) == pytest.approx(expected, rel=1e-15)
    assert parse("abs(x)")(-0.7, 0.0) == 0.7


@given(TREES, st.floats(-2, 2), st.floats(-2, 2))
@example(("^", 0.0, "x"), 0.0, 0.0)
def test_gradients_equal_numerical_ones(tree, x, y):
    f = accepted(tree)
    if f is None:
        return
    value, by_x, by_y = f.gradient(x, y)
    assert np.array_equal(value, f(x, y), equal_nan=True)
    for slope, (dx, dy) in ((by_x, (1.0, 0.0)), (by_y, (0.0, 1.0))):
        fine, coarse = (
            (f(x + h * dx, y + h * dy) - f(x - h * dx, y - h * dy)) / (2.0 * h) if np.isfinite(value) else math.nan
            for h in (1e-5, 2e-5)
        )
        with np.errstate(invalid="ignore"):  # next to a pole, such as that of 0^x at 0, both are infinite
            smooth = abs(fine - coarse) <= 1e-6 * max(1.0, abs(fine)) and abs(value) < 1e3 and abs(fine) < 1e3
        if smooth and np.isfinite(slope):
            nearby = [f(x + h * dx, y + h * dy) for h in (-1e-5, 0.0, 1e-5)]
            kink = abs(nearby[0] - 2.0 * nearby[1] + nearby[2]) > 1e-7
            if not kink:
                assert slope == pytest.approx(fine, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "value", "by_x", "by_y"),
    [
        ("x^2/10 + y^2", 0.9 + 4.0, 0.6, 4.0),
        ("(1 - x)^2 + 100*(y - x^2)^2", 4.0 + 100.0 * 49.0, -2.0 * -2.0 - 400.0 * 3.0 * -7.0, 200.0 * -7.0),
        ("exp(x)*sin(y)", math.exp(3) * math.sin(2), math.exp(3) * math.sin(2), math.exp(3) * math.cos(2)),
        ("log(x)/y", math.log(3) / 2, 1 / 6, -math.log(3) / 4),
        ("sqrt(x*y)", math.sqrt(6), 1 / math.sqrt(6), 1.5 / math.sqrt(6)),
        ("abs(y - x)", 1.0, 1.0, -1.0),
        ("x^y", 9.0, 6.0, 9.0 * math.log(3)),
        ("2^x", 8.0, 8.0 * math.log(2), 0.0),
        ("tanh(x) + atan(y)", math.tanh(3) + math.atan(2), 1 - math.tanh(3) ** 2, 0.2),
        ("tan(x) - cos(y)", math.tan(3) - math.cos(2), 1 / math.cos(3) ** 2, math.sin(2)),
        ("cosh(x) + sinh(y)", math.cosh(3) + math.sinh(2), math.sinh(3), math.cosh(2)),
    ],
)
def test_derivatives_by_hand(text, value, by_x, by_y):
    assert parse(text).gradient(3.0, 2.0) == pytest.approx((value, by_x, by_y), rel=1e-14, abs=1e-14)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("-x^2", "-(x^2)"),
        ("2^-x", "2^(-x)"),
        ("2^x^y", "2^(x^y)"),
        ("x**2", "x^2"),
        ("x - y - 1", "(x - y) - 1"),
        ("x / y / 2", "(x / y) / 2"),
        ("x / y * 2", "(x / y) * 2"),
        ("x + y * 2", "x + (y * 2)"),
        ("x * y ^ 2", "x * (y ^ 2)"),
        ("+x - -y", "x + y"),
        ("--x", "x"),
        ("1.5e1*x + .5 + 2.", "15*x + 2.5"),
        ("sin(x)^2", "(sin(x))^2"),
        ("-sin(-x)", "sin(x)"),
        ("e^x", "exp(x)"),
        (" x \n+\t1\r\n", "x+1"),
    ],
)
def test_precedence(text, same):
    for x, y in ((0.7, 1.3), (2.0, 3.0)):
        assert parse(text)(x, y) == pytest.approx(parse(same)(x, y), rel=1e-15)


def test_arrays_broadcast_and_constants_have_their_shape():
    x, y = np.linspace(-1, 1, 4), np.linspace(0, 2, 3)[:, None]
    for text in ("x^2 + y", "x", "3*y"):
        f = parse(text)
        assert f(x, y).shape == (3, 4)
        for part in f.gradient(x, y):
            assert part.shape == (3, 4)
        assert [part.shape for part in f.gradient(1.0, 2.0)] == [()] * 3
    np.testing.assert_array_equal(parse("x")(x, y), np.broadcast_to(x, (3, 4)))


def test_undefined_values_are_nan_or_infinite_without_a_warning():
    for text in ("log(x)", "sqrt(x)", "x^0.5"):
        assert np.isnan(parse(text)(-1.0, 0.0))
    assert parse("1/x")(0.0, 0.0) == math.inf
    assert parse("exp(x)")(1e4, 0.0) == math.inf


def test_a_zero_derivative_stays_zero_next_to_an_infinite_one():
    assert parse("sqrt(x) + y^2").gradient(0.0, 3.0) == (9.0, math.inf, 6.0)
    assert parse("x^0 + y").gradient(0.0, 1.0) == (2.0, 0.0, 1.0)


def test_a_parsed_expression_cannot_be_changed():
    f = parse("x + y")
    with pytest.raises(AttributeError):
        f.text = "x"
    assert isinstance(f.program, tuple)


# --- hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at the end: must be a number, x, y"),
        ("   ", "at the end: must be a number, x, y"),
        ("x +", "at the end: must be a number, x, y"),
        ("* x", "at character 1, '* x': must be a number, x, y"),
        ("x 2", "at character 3, '2': must be an operator; write a product with *"),
        ("2x", "at character 2, 'x': must be an operator; write a product with *, as in 2*x"),
        ("(x)(y)", "at character 4, '(y)': must be an operator"),
        ("x(y)", "x is not a function; write a product with *, as in x*(x + y)"),
        ("sin x", "sin is a function; write sin(x)"),
        ("sin(x", "at the end: must be an operator, or the ) that closes the ( at character 4"),
        ("sin()", "at character 5, ')': must be a number, x, y"),
        ("sin(x, y)", "every function takes one argument"),
        ("x)", "at character 2, ')': unmatched )"),
        ("()", "must be a number"),
        ("3 + pi", "expression: must depend on x or y, such as x^2/10 + y^2, got '3 + pi'"),
        ("z + x", "name: must be one of x, y, pi, e, abs"),
        ("z + x", ", got 'z'"),
        ("X", ", got 'X'"),
        ("sine(x)", ", got 'sine'; did you mean 'sin"),
        ("import os", "at character 1, 'import os': name: must be one of x, y"),
        ("import os", ", got 'import'"),
        ("__import__", ", got '__import__'"),
        ("__import__('os').system('x')", 'unexpected "\'"'),
        ("eval(x)", ", got 'eval'"),
        ("exec(x)", ", got 'exec'"),
        ("open(x)", ", got 'open'"),
        ("x.__class__", "at character 2, '.__class__': unexpected '.'; attributes are not part"),
        ("x.real", "attributes are not part of this language"),
        ("x[0]", "group with ( and )"),
        ("{x}", "group with ( and )"),
        ("lambda: x", "unexpected ':'"),
        ("lambda", ", got 'lambda'"),
        ("x if y else x", "at character 3"),
        ("x := 3", "unexpected ':'"),
        ("x == y", "give the right-hand side only"),
        ("f(x) = x", "give the right-hand side only"),
        ("x; y", "unexpected ';'"),
        ("x // y", "must be a number"),
        ("x % y", "unexpected '%'"),
        ("|x|", "absolute values are written abs(x)"),
        ("x @ y", "unexpected '@'"),
        ("`x`", "unexpected '`'"),
        ("x\0", r"unexpected '\x00'"),
        ("x\\", r"unexpected '\\'"),
        ("x² + y²", r"at character 2, '\xb2 + y\xb2'"),
        ("٣*x", r"at character 1, '\u0663*x': unexpected '\u0663'"),
        ("\u0445 + y", r"unexpected '\u0445'"),
        ("x\u00a0+ y", r"unexpected '\xa0'"),
        ("0x10*x", "at character 2"),
        ("1_000*x", "at character 2"),
        ("1e999*x", "a number must fit into a 64-bit float"),
        ("9" * 400 + "*x", "a number must fit into a 64-bit float"),
        ("x^101", "at character 3, '101': a constant exponent must lie within +-100, got 101"),
        ("x**-101", "exponent must lie within +-100, got -101"),
        ("x^1e300", "exponent must lie within +-100, got 1e+300"),
        ("x^(60+60)", "exponent must lie within +-100, got 120"),
        ("x^9^9^9^9", "exponent must lie within +-100, got 3.8742e+08"),
        ("9^9^9^9*x", "exponent must lie within +-100, got 3.8742e+08"),
        ("x^(0/0)", "exponent must lie within +-100, got nan"),
        ("x^(1/0)", "exponent must lie within +-100, got inf"),
        ("x^exp(1000)", "exponent must lie within +-100, got inf"),
        ("(" * (MAX_NESTING + 1) + "x" + ")" * (MAX_NESTING + 1), "nesting must be at most 50 deep"),
        ("-" * (MAX_NESTING + 1) + "x", "nesting must be at most 50 deep"),
        ("x^" * (MAX_NESTING + 1) + "x", "nesting must be at most 50 deep"),
        ("sin(" * 249 + "x", "nesting must be at most 50 deep"),
        ("x" * (MAX_CHARACTERS + 1), "expression: must be at most 1000 characters long, got 1001"),
    ],
)
def test_invalid_text_is_refused_with_the_reason(text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is checked below
        parse(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_text_at_the_limits_is_accepted():
    assert parse("(" * (MAX_NESTING - 1) + "x" + ")" * (MAX_NESTING - 1))(2.0, 0.0) == 2.0
    assert parse("x^100")(1.0, 0.0) == 1.0
    longest = "+".join(["x"] * (MAX_CHARACTERS // 2)) + "+"
    assert parse(longest[:-1]).gradient(2.0, 0.0) == (1000.0, 500.0, 0.0)
    assert parse("2^x^y^2")(2.0, 1.0) == 4.0


@pytest.mark.parametrize("piece", ["x", "(", "-", "9", "x^", "sin(", " ", "x+", "٣", "\0"])
def test_ten_megabytes_are_refused_before_they_are_read(piece):
    text = piece * (10_000_000 // len(piece))
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"must be at most 1000 characters long, got {len(text)}$"):
        parse(text)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("piece", ["x", "(", ")", "-", "9", "x^", "sin(", " ", "x+", "1e9^", "x/x*", ".", "e", "1e"])
def test_the_longest_texts_are_parsed_quickly(piece):
    text = (piece * MAX_CHARACTERS)[:MAX_CHARACTERS]
    started = time.perf_counter()
    with suppress(ValueError):
        parse(text)
    assert time.perf_counter() - started < 1.0


@settings(max_examples=300)
@given(st.one_of(st.text(), st.text("xy0123456789.eE+-*/^() sincoexplgqrtabh_,[]'\"")))
def test_any_text_is_parsed_or_refused_with_a_value_error(text):
    try:
        f = parse(text)
    except ValueError:
        return
    f.gradient(1.0, 2.0)


def test_text_never_runs_as_python(monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("an expression ran as Python")

    for name in ("eval", "exec", "compile", "__import__"):
        monkeypatch.setattr(builtins, name, forbidden)
    try:
        value = parse("x^2/10 + sin(y)*exp(-x)").gradient(1.0, 2.0)
    finally:
        monkeypatch.undo()
    assert np.isfinite(value).all()
