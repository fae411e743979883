r"""Adafactor (Shazeer, Stern 2018, https://arxiv.org/abs/1804.04235, algorithms 4 and 5), in torch's form.

    b2 = 1 - t^beta2_decay
    row_var = b2 row_var + (1 - b2) mean(g^2 over each row)
    col_var = b2 col_var + (1 - b2) mean(g^2 over each column)
    v = max(row_var col_var / max(mean(row_var), eps), eps^2)
    u = g / sqrt(v)
    step = min(lr, 1/sqrt(t)) max(min_rms, rms(p)) / max(1, rms(u) / clip_threshold)
    p = (1 - lr weight_decay) p - step u

rms is the root of the mean square over a parameter. A parameter of fewer than two axes is a single row, and its v is
col_var: there the mean is not bounded by eps (``bound_mean``).

States: row_var and col_var, in units of the square of the gradient: a number per row and per column.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import Domain, Flag, Interval
from fastopt.rule import Sums, rule

SMALLEST = 1.2e-38
"""A normal number of float32: a gradient of zeros divides by its root."""


class Hyper(NamedTuple):
    b2: float
    one_minus_b2: float
    lr: float  # not larger than 1/sqrt(t)
    keep: float  # decoupled weight decay
    least: float  # of v
    least_mean: float  # of row_var's mean
    min_rms: float
    inverse_threshold: float
    row: float  # these four are filled in by the backend
    column: float
    mean: float
    step: float


def prepare(
    t: int,
    lr: float,
    beta2_decay: float,
    eps: float,
    min_rms: float,
    clip_threshold: float,
    weight_decay: float,
    bound_mean: bool = True,
) -> Hyper:
    one_minus_b2 = t**beta2_decay
    return Hyper(
        b2=1.0 - one_minus_b2,
        one_minus_b2=one_minus_b2,
        lr=min(lr, 1.0 / math.sqrt(t)),
        keep=1.0 - lr * weight_decay,
        least=max(eps * eps, SMALLEST),
        least_mean=max(eps, SMALLEST) if bound_mean else SMALLEST,
        min_rms=min_rms,
        inverse_threshold=1.0 / clip_threshold,
        row=0.0,
        column=0.0,
        mean=0.0,
        step=0.0,
    )


DOMAINS: dict[str, Domain] = {
    "beta2_decay": Interval(-math.inf, 0.0),
    "min_rms": Interval(0.0),
    "clip_threshold": Interval(0.0, open_low=True),
    "bound_mean": Flag(),
}


def square(p, g, h):
    return g * g


def of_row(sums, numbers, size, h):
    row = h.b2 * numbers.row_var + h.one_minus_b2 * (sums.square / size)
    return row, row


def of_column(sums, numbers, size, h):
    column = h.b2 * numbers.col_var + h.one_minus_b2 * (sums.square / size)
    return column, column


def row(p, g, h):
    return h.row


def mean_of_rows(sums, numbers, size, h):
    mean = sums.row / size
    return h.least_mean if mean < h.least_mean else mean  # in this form, so that a NaN stays one


def normalised(g, h):
    v = (h.row / h.mean) * h.column
    return g / math.sqrt(h.least if v < h.least else v)


def square_of_u(p, g, h):
    u = normalised(g, h)
    return u * u


def square_of_p(p, g, h):
    return p * p


def step(sums, numbers, size, h):
    rms = math.sqrt(sums.p / size)
    excess = math.sqrt(sums.u / size) * h.inverse_threshold
    scale = h.min_rms if rms < h.min_rms else rms
    return h.lr * scale / (1.0 if excess < 1.0 else excess)


@rule(
    prepare,
    sums=(
        Sums({"square": square}, of_row, ("row",), ("row_var",), over="row"),
        Sums({"square": square}, of_column, ("column",), ("col_var",), over="column"),
        Sums({"row": row}, mean_of_rows, ("mean",)),
        Sums({"p": square_of_p, "u": square_of_u}, step, ("step",)),
    ),
    domains=DOMAINS,
    for_matrices=("bound_mean",),
)
def adafactor(p, g, h):
    return h.keep * p - h.step * normalised(g, h)
