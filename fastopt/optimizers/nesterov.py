"""`Nesterov`, the optimizer whose formulas stand in `fastopt.rules.nesterov`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastopt.hyper import Choice
from fastopt.optimizer import Optimizer
from fastopt.rule import rule
from fastopt.rules.nesterov import nesterov, nesterov_lookahead, prepare_lookahead


@rule(prepare_lookahead)
def look_ahead(p, g, velocity, h):  # type: ignore[no-untyped-def]
    """Move p to the point at which the form "lookahead" evaluates the gradient."""
    return p - h.momentum * velocity, velocity


class Nesterov(Optimizer, rules=(nesterov, nesterov_lookahead), conventions={"torch": {"lr": 1e-3}, "optax": {}}):
    """Nesterov's accelerated gradient, in one of two forms.

    Formula: reformulated: ``v = momentum v + g``, ``p -= lr (g + momentum v)``; lookahead: g at ``p - momentum v``,
    ``v = momentum v + lr g``, ``p -= v``

    Args:
        params: tree of float32 or float64 arrays, or FlatParams; None leaves them to `update`.
        lr: learning rate, >= 0.
        momentum: decay rate of the velocity, in [0, 1].
        form: ``"reformulated"``, or ``"lookahead"`` with the gradient computed inside ``with opt.lookahead():``; a step
            for which that block was not entered warns, once.
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
        params: Any = None,
        lr: Any = 0.01,
        momentum: Any = 0.9,
        form: str = "reformulated",
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        forms = {"reformulated": nesterov, "lookahead": nesterov_lookahead}
        chosen = forms[Choice(tuple(forms)).check("form", form)]
        super().__init__(params, chosen, lr=lr, momentum=momentum, weight_decay=weight_decay, **options)

    @contextmanager
    def lookahead(self) -> Iterator[Any]:
        """Hold the parameters at the look-ahead point ``p - momentum v`` inside a ``with`` block, and yield them.

        Compute the gradient inside the block, and step after the block. At its end, also after an exception, the
        parameters are restored, to the bit.

        Raises:
            TypeError: the form is "reformulated", whose parameters are the look-ahead point.
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
            raise TypeError("lookahead(): form must be 'lookahead', got 'reformulated', which needs no look-ahead")
        with self._running.moved(look_ahead, "lookahead") as params:
            yield params
