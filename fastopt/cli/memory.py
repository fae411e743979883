"""`fastopt info --memory`: what a model of some size takes in every storage format."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from rich.table import Table

import fastopt
from fastopt.cli.choices import one_of
from fastopt.step.options import StepOptions
from fastopt.step.storage import StateFormats
from fastopt.storage.formats import dtype_of

UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("float32", {}),
    ("float32", {"states": "bfloat16"}),
    ("float32", {"states": "int8"}),
    ("float16", {}),
    ("bfloat16", {}),
    ("bfloat16", {"compensated": True}),
    ("bfloat16", {"rounding": "stochastic"}),
    ("bfloat16", {"rounding": "stochastic", "states": "bfloat16"}),
    ("bfloat16", {"rounding": "stochastic", "states": "int8"}),
)
"""The dtype of parameters and gradients, and the arguments of the optimizer."""


def parameters_of(text: str) -> float:
    """Read a number of parameters: 125M, 7B, 1.5e9, 350_000. Raises ValueError for others."""
    number, unit = text.strip().replace("_", ""), ""
    if number[-1:].lower() in UNITS:
        number, unit = number[:-1], number[-1].lower()
    try:
        found = float(number) * UNITS[unit]
    except ValueError:
        found = 0.0
    if not 1.0 <= found < float("inf"):
        raise ValueError(f"must be a number of parameters, such as 125M, 7B or 350000, got {text!r}")
    return found


def bytes_of(optimizer: str) -> list[dict[str, Any]]:
    """Return a row for each of `WAYS` that an optimizer takes: bytes per parameter."""
    names = {name.lower(): name for name in fastopt.optimizers.ALL}
    own = getattr(fastopt, names[one_of(optimizer.lower(), names, "optimizer")])
    rule, rows = own(None).rule, []
    for dtype, options in WAYS:
        if not rule.states and "states" in options:
            continue
        flat = fastopt.pack({"w": np.zeros(1, np.float32)}, dtype=dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                formats = StateFormats.of(rule, flat, StepOptions.checked(**options))
        except ValueError:  # a rule of sums has no states of 8 bits, one of matrices none of 16
            continue
        itemsize = dtype_of(dtype, "dtype").itemsize
        states = formats.bytes_per_element
        rows.append(
            {
                "parameters": dtype,
                "options": ", ".join(f"{name}={value!r}" for name, value in options.items()),
                "bytes": {"parameters": itemsize, "gradients": itemsize, "states": states},
                "total": 2 * itemsize + states,
            }
        )
    return rows


def table_of(count: float, rows: list[dict[str, Any]], optimizer: str) -> Table:
    """Return the table that is printed."""
    title = f"{optimizer}: bytes per parameter, and GiB for {count:,.0f} parameters"
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for name in ("parameters", "options", "parameter", "gradient", "states", "total", "GiB"):
        table.add_column(name, justify="left" if name in ("parameters", "options") else "right")
    for row in rows:
        numbers = [*row["bytes"].values(), row["total"]]
        table.add_row(
            row["parameters"], row["options"], *[f"{number:.4g}" for number in numbers], f"{gib(count, row):,.2f}"
        )
    return table


def gib(count: float, row: dict[str, Any]) -> float:
    """Return what a row takes for so many parameters."""
    return float(count * row["total"] / 2**30)
