"""Optimizers let loose on a surface: their paths, the learning rates that suit them there, and how they ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fastopt.cli.choices import Choice
from fastopt.cli.expression import Array
from fastopt.cli.surfaces import Point, Surface
from fastopt.cli.trainer import gradient_point, result_point

LEARNING_RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 2) for digit in (1, 2, 5))
"""What is tried where a learning rate is asked for: from 0.0001 to 50."""

LONGEST_STEP = 0.25
"""In sides of the window: a path with a longer step is at the mercy of chance."""

SLACK = 1.25
"""Of the learning rates that take up to so many times the fewest steps the smallest is suggested: a smooth path."""

REPORT_EVERY = 50


class Outcome(NamedTuple):
    """What became of one optimizer."""

    points: Array
    """(steps + 1, 2): x and y at the start and after each step; fewer where a step left what can be computed."""
    value: float
    """The function at the last point."""
    distance: float | None
    """From the last point to the nearest minimum; None where no minimum is known."""
    reached: int | None
    """After how many steps the path was within the tolerance of a minimum, to stay there. None if it never was."""
    status: str
    """``"reached"``, ``"not reached"``, ``"left"`` (the window, downhill) or ``"diverged"``."""


def descend(
    surface: Surface,
    choice: Choice,
    learning_rates: Sequence[float],
    steps: int,
    after: Callable[[int], object] = lambda steps: None,
) -> list[Array]:
    """The path for each learning rate, (steps + 1, 2): all are groups of one optimizer, so that a step is one launch.

    A path ends before the first point where the function or its gradient is not a finite number. `after` is called now
    and then with the number of steps made since it was called last.
    """
    opt = choice.kind(
        # Matrices of one row: for vectors Muon has another rule, and another learning rate.
        [np.array([surface.start], np.float64) for _ in learning_rates],
        overrides={str(k): {"lr": lr} for k, lr in enumerate(learning_rates)},
        **choice.options,
    )
    points = np.empty((len(learning_rates), steps + 1, 2))
    points[:, 0] = surface.start
    lengths = np.full(len(learning_rates), steps + 1)
    with np.errstate(all="ignore"):  # of paths that diverge
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
    """A learning rate for `choice`: tried are `LEARNING_RATES`, for as many steps as are usual on this surface.

    Looked at are paths that stay in the window and have no step beyond `LONGEST_STEP`. Those that reach a minimum in
    few steps (see `SLACK`) come first, of these the smallest rate; where none does, the one that ends lowest.
    """
    steps = round(SLACK * surface.steps)  # longer than counts: to be there by chance in the last step is not to stay
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
    """How a path of `steps` steps ended; `points` has fewer where it could not go on."""
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
