r"""Rprop (Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623), without step reversal.

    s = s eta_plus, s eta_minus or s      where g keeps its sign, changes it, or g or the one before is 0
    s within step_sizes
    g = 0                                 where the sign has changed
    p = p - s sign(g)

For gradients of the whole data set; only their signs matter. States: prev_grad (g), in units of the gradient;
step_size (s), of the parameter, at first lr.
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO, Interval, Pair
from fastopt.rule import rule
from fastopt.rules.lion import along_sign


class Hyper(NamedTuple):
    eta_minus: float
    eta_plus: float
    smallest: float
    largest: float
    zero: float  # literals would be float64


def prepare(t: int, lr: float, etas: tuple[float, float], step_sizes: tuple[float, float]) -> Hyper:
    return Hyper(*etas, *step_sizes, 0.0)


DOMAINS = {
    "etas": Pair(Interval(0.0, 1.0, open=True, open_low=True), Interval(1.0, open_low=True)),
    "step_sizes": Pair(POSITIVE_OR_ZERO, POSITIVE_OR_ZERO, ascending=True),
}


@rule(prepare, domains=DOMAINS, initial={"step_size": "lr"}, nonnegative=("step_size",))
def rprop(p, g, prev_grad, step_size, h):
    product = g * prev_grad
    longer, shorter = h.eta_plus * step_size, h.eta_minus * step_size
    step_size = within(
        longer if product > h.zero else (shorter if product < h.zero else step_size), h.smallest, h.largest
    )
    g = h.zero if product < h.zero else g
    return p - along_sign(step_size, g, h.zero), g, step_size


def within(x, low, high):
    return low if x < low else (high if x > high else x)
