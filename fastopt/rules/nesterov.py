r"""Nesterov's accelerated gradient (Nesterov 1983; Sutskever et al. 2013, http://proceedings.mlr.press/v28/sutskever13.html).

    lookahead       g taken at p - momentum v;  v = momentum v + lr g   p = p - v
    reformulated    v = momentum v + g          p = p - lr (g + momentum v)

The reformulated parameters are the look-ahead points of the other form, so the gradient is taken where the parameters
are (Bengio et al. 2012, https://arxiv.org/abs/1212.0901, eq. 7). State: velocity, in units of the gradient
(reformulated) or of the parameter (lookahead).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastopt.closed_forms.linear import Linear
from fastopt.optimizer import Optimizer
from fastopt.rule import rule
from fastopt.rules.momentum import Hyper
from fastopt.rules.momentum import momentum as momentum_rule


def prepare(t: int, lr: float, momentum: float) -> Hyper:
    return Hyper(momentum, 1.0, lr)


def prepare_lookahead(t: int, lr: float, momentum: float) -> Hyper:
    return Hyper(momentum, lr, 1.0)


@rule(prepare, idle=Linear(with_l2=True))
def nesterov(p, g, velocity, h):
    velocity = h.momentum * velocity + h.weight * g
    return p - h.rate * (h.weight * g + h.momentum * velocity), velocity


@rule(prepare_lookahead, idle=Linear(with_l2=True))
def nesterov_lookahead(p, g, velocity, h):
    return momentum_rule(p, g, velocity, h)


@rule(prepare_lookahead)
def look_ahead(p, g, velocity, h):
    return p - h.momentum * velocity, velocity


class Nesterov(Optimizer, rules=(nesterov, nesterov_lookahead), conventions={"torch": {"lr": 1e-3}, "optax": {}}):
    """Nesterov's accelerated gradient, in one of two forms.

    Formula: reformulated: ``v = momentum v + g``, ``p -= lr (g + momentum v)``; lookahead: g at ``p - momentum v``,
    ``v = momentum v + lr g``, ``p -= v``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams.
        lr: learning rate, >= 0.
        momentum: decay rate of the velocity, in [0, 1].
        form: ``"reformulated"``, or ``"lookahead"`` with the gradient taken inside ``with opt.lookahead():``.
        weight_decay: L2, >= 0.
        **options: see `Optimizer`.

    Raises:
        ValueError: a number out of range or an unknown form.

    Source: Nesterov 1983; Sutskever et al. 2013, http://proceedings.mlr.press/v28/sutskever13.html, eq. 3-4;
    Bengio et al. 2012, https://arxiv.org/abs/1212.0901, eq. 7

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Nesterov({"w": np.ones(1)}, lr=0.1, form="lookahead")
    >>> for _ in range(2):
    ...     with opt.lookahead() as params:
    ...         grads = {"w": 2 * params["w"]}
    ...     _ = opt.step(grads)
    >>> opt.params["w"].round(6)
    array([0.496])
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 0.01,
        momentum: Any = 0.9,
        form: str = "reformulated",
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        forms = {"reformulated": nesterov, "lookahead": nesterov_lookahead}
        if form not in forms:
            raise ValueError(f"form={form!r}: expected one of {', '.join(map(repr, forms))}")
        super().__init__(params, forms[form], lr=lr, momentum=momentum, weight_decay=weight_decay, **options)

    @contextmanager
    def lookahead(self) -> Iterator[Any]:
        """Hold the parameters at the look-ahead point ``p - momentum v`` inside a ``with`` block, and yield them.

        Take the gradient in the block, step after it. On leaving, also by an exception, the parameters are what they
        were, to the bit.

        Raises:
            TypeError: of the reformulated form, whose parameters are the look-ahead point.
            RuntimeError: inside another such block.

        >>> import numpy as np, fastopt
        >>> opt = fastopt.Nesterov({"w": np.ones(1)}, lr=0.5, momentum=0.5, form="lookahead")
        >>> _ = opt.step({"w": np.ones(1)})  # the velocity is 0.5 now, and w 0.5
        >>> with opt.lookahead() as params:
        ...     print(params["w"])
        [0.25]
        >>> opt.params["w"]
        array([0.5])
        """
        if self.rule is not nesterov_lookahead:
            raise TypeError("lookahead() is for Nesterov(form='lookahead'); the reformulated form needs no look-ahead")
        with self._moved(look_ahead, "lookahead") as params:
            yield params
