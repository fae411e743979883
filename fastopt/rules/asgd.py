r"""ASGD (Polyak & Juditsky 1992, https://doi.org/10.1137/0330046), in the form of torch.optim.ASGD.

    eta = lr / (1 + lambd lr (t - 1))^alpha
    p = (1 - lambd eta) p - eta g
    ax = ax + (p - ax) / max(1, t - 1 - t0)       the average of p from update t0 + 1 on; before that p itself

The schedule is that of Bottou (2012, https://doi.org/10.1007/978-3-642-35289-8_25). State: ax, in units of the
parameter, at first the parameter.
"""

from __future__ import annotations

from typing import NamedTuple

from fastopt.hyper import POSITIVE_OR_ZERO
from fastopt.rule import rule


class Hyper(NamedTuple):
    eta: float
    shrink: float
    old: float
    new: float


def prepare(t: int, lr: float, lambd: float, alpha: float, t0: float) -> Hyper:
    eta = lr / (1.0 + lambd * lr * (t - 1)) ** alpha
    new = 1.0 / max(1.0, t - 1 - t0)
    return Hyper(eta, 1.0 - lambd * eta, 1.0 - new, new)


DOMAINS = dict.fromkeys(("lambd", "alpha", "t0"), POSITIVE_OR_ZERO)


@rule(prepare, domains=DOMAINS, initial={"ax": "p"})
def asgd(p, g, ax, h):
    p = h.shrink * p - h.eta * g
    return p, h.old * ax + h.new * p
