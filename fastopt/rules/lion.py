r"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2).

    p = p - lr weight_decay p
    p = p - lr sign(b1 m + (1 - b1) g)
    m = b2 m + (1 - b2) g

State: m, in units of the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt.rule import rule


class Hyper(NamedTuple):
    lr: float
    b1: float
    one_minus_b1: float
    b2: float
    one_minus_b2: float
    zero: float  # a literal 0.0 would be float64


def prepare(t: int, lr: float, betas: tuple[float, float]) -> Hyper:
    b1, b2 = betas
    return Hyper(lr, b1, 1.0 - b1, b2, 1.0 - b2, 0.0)


def along_sign(length, direction, zero):
    # The last branch keeps 0, and passes NaN on.
    return length if direction > zero else (-length if direction < zero else length * direction)


@rule(prepare, decoupled=True)
def lion(p, g, m, h):
    direction = h.b1 * m + h.one_minus_b1 * g
    return p - along_sign(h.lr, direction, h.zero), h.b2 * m + h.one_minus_b2 * g
