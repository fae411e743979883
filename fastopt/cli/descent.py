"""The paths of optimizers on a surface, the learning rates that suit them, and the outcomes of the paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fastopt.cli.choices import Choice
from fastopt.cli.expression import Array
from fastopt.cli.surfaces import Point, Surface
from fastopt.cli.trainer import gradient_point, result_point

LEARNING_RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 2) for digit in (1, 2, 5))
"""The rates that `suggest_lr` tries: from 0.0001 to 50."""

LONGEST_STEP = 0.25
"""Longest step of a suggested path, in sides of the window: beyond it a path reaches a minimum by chance."""

SLACK = 1.25
"""`suggest_lr` accepts up to this multiple of the fewest steps, and picks the smallest such rate: a smooth path."""

REPORT_EVERY = 50


class Outcome(NamedTuple):
    """The outcome of one optimizer's path."""

    points: Array
    """(steps + 1, 2): x and y at the start and after each step; fewer if a step left the finite numbers."""
    value: float
    """The function value at the last point."""
    distance: float | None
    """Distance from the last point to the nearest minimum; None if no minimum is known."""
    reached: int | None
    """Number of steps after which the path stays within the tolerance of a minimum; None if it does not."""
    status: str
    """``"reached"``, ``"not reached"``, ``"left"`` (the window, downhill) or ``"diverged"``."""


def descend(
    surface: Surface,
    choice: Choice,
    learning_rates: Sequence[float],
    steps: int,
    after: Callable[[int], object] = lambda steps: None,
) -> list[Array]:
    """Return the path for each learning rate, (steps + 1, 2); one optimizer holds all rates, so a step is one launch.

    A path ends before the first point where the function or its gradient is not finite. `after` is called from time to
    time with the number of steps since its last call.
    """
    opt = choice.kind(
        # Use matrices of one row: Muon treats vectors with another rule and another learning rate.
        [np.array([surface.start], np.float64) for _ in learning_rates],
        overrides={str(k): {"lr": lr} for k, lr in enumerate(learning_rates)},
        **choice.options,
    )
    points = np.empty((len(learning_rates), steps + 1, 2))
    points[:, 0] = surface.start
    lengths = np.full(len(learning_rates), steps + 1)
    with np.errstate(all="ignore"):  # diverging paths overflow
        for t in range(1, steps + 1):
            with gradient_point(opt, choice.looks_ahead) as params:
                slopes = np.array(surface.f.gradient(*np.concatenate(params).T))
            finite = np.isfinite(slopes).all(axis=0)
            for grad, slope in zip(opt.grads, np.where(finite, slopes[1:], 0.0).T, strict=True):
                grad[...] = slope
            opt.step()
            with result_point(opt) as params:
                points[:, t] = np.concatenate(params)
            finite &= np.isfinite(surface.f(*points[:, t].T))
            finite &= np.isfinite(points[:, t]).all(axis=1)
            lengths[~finite & (lengths > t)] = t
            if t % REPORT_EVERY == 0:
                after(REPORT_EVERY)
            if (lengths <= t).all():
                break
    after(steps % REPORT_EVERY)
    return [path[:length] for path, length in zip(points, lengths, strict=True)]


def suggest_lr(surface: Surface, choice: Choice, tolerance: float) -> float:
    """Return a learning rate for `choice`, found by trying `LEARNING_RATES` for the surface's usual number of steps.

    Only paths that stay in the window and have no step beyond `LONGEST_STEP` qualify. Return the smallest rate whose
    path reaches a minimum in few steps (see `SLACK`), or, if no path reaches one, the rate whose path ends lowest.
    """
    steps = round(SLACK * surface.steps)  # run longer than counts: a path near a minimum in its last step may leave it
    left, right, bottom, top = surface.window
    sides = surface.window.width, surface.window.height
    outcomes = {}
    for lr, path in zip(LEARNING_RATES, descend(surface, choice, LEARNING_RATES, steps), strict=True):
        inside = len(path) > steps and ((path >= (left, bottom)) & (path <= (right, top))).all()
        if inside and np.hypot(*(np.diff(path, axis=0) / sides).T).max(initial=0.0) <= LONGEST_STEP:
            outcomes[lr] = measure(surface, path, steps, tolerance)
    counts = {lr: o.reached for lr, o in outcomes.items() if o.reached is not None and o.reached <= surface.steps}
    if counts:
        return min(lr for lr, count in counts.items() if count <= SLACK * min(counts.values()))
    return min(outcomes, key=lambda lr: outcomes[lr].value, default=LEARNING_RATES[0])


def measure(surface: Surface, points: Array, steps: int, tolerance: float) -> Outcome:
    """Return the outcome of a path of `steps` steps; `points` has fewer if the path ended early."""
    end = Point(*points[-1].tolist())
    value = float(surface.f(*end))
    broken_off = len(points) <= steps
    away = not surface.window.holds(*end)
    distance, reached = None, None
    if minima := surface.minima_near(end):
        distances = np.min([np.hypot(points[:, 0] - x, points[:, 1] - y) for x, y in minima], axis=0)
        distance = float(distances[-1])
        outside = np.flatnonzero(distances > tolerance)
        first = int(outside[-1]) + 1 if len(outside) else 0
        if first < len(points) and not broken_off:
            reached = first
    if reached is not None:
        status = "reached"
    elif broken_off or (away and value > float(surface.f(*surface.start))):
        status = "diverged"
    else:
        status = "left" if away else "not reached"
    return Outcome(points, value, distance, reached, status)
