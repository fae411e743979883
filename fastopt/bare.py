"""`update_`: one update of arrays that the caller owns, by the kernel that an `Optimizer` would use.

`Rule.update_` is attached here, because a rule launches nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fastopt import scalars
from fastopt.hyper import LOSS, WEIGHT_DECAY
from fastopt.rule import Rule
from fastopt.step.features import features_of
from fastopt.step.inputs import check_inputs
from fastopt.step.table import Point, Table, hyper_of
from fastopt.storage.flat import check_apart, check_vectors
from fastopt.storage.layout import Layout


def update_(rule: Rule, p: Any, g: Any, *states: Any, t: int = 1, grad_scale: float = 1.0, **hyper: Any) -> None:
    """Update 1-D arrays in place, by the kernel that an Optimizer would use.

    Args:
        rule: a `Rule`, such as ``fastopt.rules.adam``; call this as its method ``rule.update_(p, g, ...)``.
        p, g, *states: 1-D contiguous arrays of one length and dtype (float32 or float64), none overlapping another:
            parameter, gradient (which is only read) and the rule's states, in the order of `Rule.states`. Initialise
            the states as `Rule.initial` shows. A per-tensor state (NovoGrad's v) comes last, as an array of one
            float64. Pass NumPy arrays, or arrays that are all on the current CUDA device: CuPy's, torch's
            (``tensor.detach()``), or any with ``__cuda_array_interface__``. The kernel runs on CuPy's current stream,
            and torch must use the same stream: outside of torch's default stream, enter
            ``with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):`` first.
        t: the number of this update, from 1.
        grad_scale: the factor by which the loss was multiplied, a positive finite number; the gradient is divided by
            it.
        **hyper: the rule's hyperparameters, as numbers (not schedules). The others have the defaults of the rule's
            optimizer. For a rule of further inputs also ``loss=``, and False in the place of one that this update does
            not have.

    A rule with norms (LAMB) treats the arrays as one parameter, and a rule with sums over rows and columns (Adafactor)
    as one row. A matrixwise rule (Muon) refuses them.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written.
        RuntimeError: the arrays are on a device, and the CUDA backend cannot work here.

    >>> import numpy as np, fastopt
    >>> p, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    >>> fastopt.rules.adam.update_(p, np.array([1.0, -2.0, 0.0]), m, v, t=1, lr=0.1)
    >>> p.round(6)
    array([0.9, 1.1, 1. ])
    """
    kept = (*rule.states, *rule.numbers)
    if len(states) != len(kept):
        raise TypeError(
            f"rule {rule.name!r}: must be given {len(kept)} states ({', '.join(kept) or 'none'}) after p and g, got "
            f"{len(states)} arrays"
        )
    if rule.matrixwise is not None:
        raise TypeError(f"rule {rule.name!r}: must be given matrices, got 1-D arrays; use its optimizer")
    count = len(rule.states)
    named = dict(zip(("p", "g", *rule.states), (p, g, *states[:count]), strict=True))
    backend, vectors = check_vectors(named, read_only="g")
    numbers = []
    for (name, over), given in zip(rule.over.items(), states[count:], strict=True):
        place, (number,) = check_vectors({name: given}, read_only="")
        if place is not backend:
            raise TypeError(f"{name}: must be on {backend.name!r}, as p is, got an array on {place.name!r}")
        expected = vectors[0].size if over == "column" else 1
        if number.dtype != np.float64 or number.size != expected:
            what = f"{expected} number{'s' if expected != 1 else ''}"
            raise TypeError(f"{name}: must be {what} of float64, got {number.size} of {number.dtype}")
        numbers.append(number)
    check_apart(dict(zip((*named, *rule.numbers), (*vectors, *numbers), strict=True)), backend)
    t = scalars.count("t", t, 1, "the number of this update, an int from 1")
    given = {name: None for name in rule.extra if hyper.pop(name, True)}
    inputs = check_inputs(rule, given, hyper.pop(LOSS, None))
    values = rule.complete({**dict.fromkeys(rule.for_matrices, False), **hyper})
    values = {name: rule.check(name, value, dtype=vectors[0].dtype) for name, value in values.items()}
    point = Point.of(rule, values)
    hyper_type = hyper_of(rule, point)
    size, dtype = vectors[0].size, vectors[0].dtype
    table = Table(rule, hyper_type, dtype)
    table.inputs = inputs
    unscale = table.unscale(grad_scale)
    table.write(0, t, point, unscale)
    features = features_of(rule, decays=values[WEIGHT_DECAY] != 0.0, unscale=unscale != 1.0)
    kernel = backend.kernel(rule, hyper_type, dtype, features)
    layout, chunks = _one_parameter(size, rule.whole, rule.lined, backend.device)
    places = layout.places(backend.address(vectors[0]), backend.address(vectors[1]))
    kernel.launch(places, (*vectors[2:], *numbers), table.array, chunks, size)


Rule.update_ = update_  # type: ignore[assignment, method-assign]


@lru_cache(maxsize=64)
def _one_parameter(size: int, whole: bool, lined: bool, device: int | None) -> tuple[Layout, Any]:
    """Return the layout and the chunks, or tiles, of one parameter. Each device has its own, and keeps a copy."""
    layout = Layout.of([(size,)])
    return layout, layout.tiles([0]) if lined else layout.chunks([0], whole=whole)
