r"""FTRL-Proximal (McMahan et al. 2013, https://doi.org/10.1145/2487575.2488200, algorithm 1), z in units of the step.

    g = g + weight_decay p
    z = z + lr g - (sqrt(n + g^2) - sqrt(n)) p          z = -(beta + sqrt(n)) p before the first update
    n = n + g^2
    p = (clip(z, lr l1) - z) / (beta + sqrt(n) + lr l2)

The paper has z / lr for z, which is the same while lr is constant, but scales p with every change of lr. It begins with
z = 0, which forgets p unless that begins at 0. States: z, in units of the parameter times the gradient; n, of the
gradient squared, at first ``initial_accumulator_value``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO
from fastopt.rule import rule
from fastopt.rules.adagrad import INITIAL
from fastopt.rules.rprop import within


class Hyper(NamedTuple):
    lr: float
    start: float  # the weight of p before the first update
    added: float
    l1: float
    weight_decay: float


def prepare(
    t: int, lr: float, beta: float, l1: float, l2: float, initial_accumulator_value: float, weight_decay: float
) -> Hyper:
    start = beta + math.sqrt(initial_accumulator_value) if t == 1 else 0.0
    return Hyper(lr, start, beta + lr * l2, lr * l1, weight_decay)


DOMAINS = dict.fromkeys(("beta", "l1", "l2", INITIAL), POSITIVE_OR_ZERO)


@rule(prepare, domains=DOMAINS, initial={"n": INITIAL}, nonnegative=("n",))
def ftrl(p, g, z, n, h):
    g = g + h.weight_decay * p
    before = math.sqrt(n)
    n = n + g * g
    root = math.sqrt(n)
    z = z + h.lr * g - (h.start + (root - before)) * p
    return (within(z, -h.l1, h.l1) - z) / (h.added + root), z, n
