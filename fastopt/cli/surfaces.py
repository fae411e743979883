"""Functions of x and y to descend on, named or written by the user, and their minima."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fastopt.cli.choices import one_of
from fastopt.cli.expression import MAX_CHARACTERS, Array, Expression, parse


class Point(NamedTuple):
    """A point of the plane."""

    x: float
    y: float


class Window(NamedTuple):
    """The visible part of the plane."""

    left: float
    right: float
    bottom: float
    top: float

    @property
    def width(self) -> float:
        """Distance from left to right."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Distance from bottom to top."""
        return self.top - self.bottom

    @property
    def extent(self) -> float:
        """The shorter side."""
        return min(self.width, self.height)

    def holds(self, x: float, y: float) -> bool:
        """Whether the point is inside, or on the edge."""
        return self.left <= x <= self.right and self.bottom <= y <= self.top

    def mesh(self, points: int) -> tuple[Array, Array]:
        """Return x and y of `points` times `points` points."""
        xs = np.linspace(self.left, self.right, points)
        ys = np.linspace(self.bottom, self.top, points)
        x, y = np.meshgrid(xs, ys)
        return x, y


@dataclass(frozen=True)
class Surface:
    """A function, the start and length of the paths, the window, and the lowest minima."""

    name: str
    f: Expression
    start: Point
    window: Window
    minima: tuple[Point, ...]
    """The minima in the window that share the lowest value; empty if there is none inside."""
    steps: int = 200
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """By the label of an optimizer, a rate that shows its typical path; other optimizers use `suggest_lr`."""

    @cached_property
    def lowest(self) -> float:
        """The largest value of a minimum that counts as one of the lowest; infinity if none of them is known."""
        if not self.minima:
            return math.inf
        return max(float(self.f(*point)) for point in self.minima) + EQUAL * _variation(self.f(*self.window.mesh(MESH)))

    def minima_near(self, point: Point) -> tuple[Point, ...]:
        """Return `minima`, plus the minimum downhill from `point` if it is as low: on the flat floor of a valley, or
        outside the window."""
        if self.name:  # all minima are known
            return self.minima
        (own,) = nearest_minima(self.f, np.array([point]), self.window)
        return self.minima if own is None or float(self.f(*own)) > self.lowest else (*self.minima, own)


def _named(name: str, text: str, start: Point, window: Window, minima: tuple[Point, ...], steps: int) -> Surface:
    return Surface(name, parse(text), start, window, minima, steps)


SURFACES = {
    surface.name: surface
    for surface in (
        replace(
            _named("bowl", "x^2/10 + y^2", Point(-7.0, 2.0), Window(-10.0, 10.0, -5.0, 5.0), (Point(0.0, 0.0),), 100),
            learning_rates={"sgd": 0.95, "momentum": 0.1, "adagrad": 1.5, "adam": 0.3},
        ),
        _named(
            "rosenbrock",
            "(1 - x)^2 + 100*(y - x^2)^2",
            Point(-1.5, 2.0),
            Window(-2.0, 2.0, -1.0, 3.0),
            (Point(1.0, 1.0),),
            1000,
        ),
        _named(
            "beale",
            "(1.5 - x + x*y)^2 + (2.25 - x + x*y^2)^2 + (2.625 - x + x*y^3)^2",
            Point(1.0, 1.0),
            Window(-0.5, 4.5, -1.5, 2.0),
            (Point(3.0, 0.5),),
            500,
        ),
        _named(
            "himmelblau",
            "(x^2 + y - 11)^2 + (x + y^2 - 7)^2",
            Point(0.0, -1.0),  # near the top between the four minima: paths diverge from here
            Window(-5.0, 5.0, -5.0, 5.0),
            # The common roots of both squares: two conics meet in four points.
            (
                Point(3.0, 2.0),
                Point(-2.805118086952745, 3.131312518250573),
                Point(-3.779310253377747, -3.283185991286170),
                Point(3.584428340330492, -1.848126526964404),
            ),
            100,
        ),
        _named(
            "saddle",
            "x^2 - y^2 + y^4/4",
            Point(-1.5, 0.01),
            Window(-2.0, 2.0, -2.0, 2.0),
            (Point(0.0, math.sqrt(2.0)), Point(0.0, -math.sqrt(2.0))),
            100,
        ),
    )
}
"""The saddle is x^2 - y^2 around its saddle point (0, 0); y^4/4 adds minima beyond it, so that paths can reach one."""

DEFAULT_WINDOW = Window(-5.0, 5.0, -5.0, 5.0)
MARGIN = 0.1
"""Margin around a start outside the window, as a fraction of the widened window."""


def surface_of(text: str) -> Surface:
    """Return the surface of that name or expression, before the search for its minima."""
    if len(text) <= MAX_CHARACTERS:
        word = text.strip()
        if word.lower() in SURFACES:
            return SURFACES[word.lower()]
        if re.fullmatch(r"[A-Za-z_]{2,}", word):
            one_of(word.lower(), SURFACES, "function", "an expression in x and y such as 'x^2/10 + y^2'")
    return Surface("", parse(text), _usual_start(DEFAULT_WINDOW), DEFAULT_WINDOW, ())


def placed(surface: Surface, start: Point | None, window: Window | None) -> Surface:
    """Return `surface` with another start or window, and the minima of that window.

    Raise ValueError if the start is outside a requested window, or if the function has no finite value or gradient at
    the start.
    """
    if window is not None:
        kept = surface.name and window.holds(*surface.start)
        surface = replace(surface, window=window, start=surface.start if kept else _usual_start(window))
    if start is not None:
        if window is not None and not window.holds(*start):
            raise ValueError(f"start: must be inside --window, got ({start.x:g}, {start.y:g})")
        surface = replace(surface, start=start, window=_widened(surface.window, start))
    if not np.isfinite(surface.f.gradient(*surface.start)).all():
        raise ValueError(
            f"start: must be a point where {surface.f.text} has a finite value and gradient, got "
            f"({surface.start.x:g}, {surface.start.y:g})"
        )
    if surface.name:
        return surface
    return replace(surface, minima=find_minima(surface.f, surface.window))


def _usual_start(window: Window) -> Point:
    return Point(window.left + 0.1 * window.width, window.bottom + 0.8 * window.height)


def _widened(window: Window, start: Point) -> Window:
    """Return `window`, widened to hold `start` with a margin if `start` is outside."""
    left, right, bottom, top = window
    if not left <= start.x <= right:
        left, right = min(left, start.x), max(right, start.x)
        left, right = left - MARGIN * (right - left), right + MARGIN * (right - left)
    if not bottom <= start.y <= top:
        bottom, top = min(bottom, start.y), max(top, start.y)
        bottom, top = bottom - MARGIN * (top - bottom), top + MARGIN * (top - bottom)
    return Window(left, right, bottom, top)


# --- minima -----------------------------------------------------------------------------------------------------------

MESH = 401
MAX_CANDIDATES = 100
SEARCH_ROUNDS = 150
FAR, FINE = 1e3, 1e-10
"""Largest distance of a search from the window, and the precision of a minimum, both in sides of the window."""
EQUAL = 1e-9
"""Minima whose values differ by less than this fraction of the function's variation count as equally low."""


def find_minima(f: Expression, window: Window) -> tuple[Point, ...]:
    """Return the lowest minima inside the window, all of one value; empty if there is none.

    A mesh finds candidates, and a derivative-free search refines them. If the minima are not isolated points (a valley
    with a flat floor), the search finds some of them.
    """
    x, y = window.mesh(MESH)
    z = f(x, y)
    z = np.where(np.isnan(z), np.inf, z)
    inner = z[1:-1, 1:-1]
    low = np.isfinite(inner)
    for i in (0, 1, 2):
        for j in (0, 1, 2):
            low &= inner <= z[i : i + MESH - 2, j : j + MESH - 2]
    rows, columns = np.nonzero(low)
    order = np.argsort(inner[rows, columns], kind="stable")
    order = order[:: max(1, math.ceil(len(order) / MAX_CANDIDATES))]
    at = rows[order] + 1, columns[order] + 1
    refined = nearest_minima(f, np.stack([x[at], y[at]], axis=1), window)
    found = [(float(f(*point)), point) for point in refined if point is not None and window.holds(*point)]
    equal = EQUAL * _variation(z)
    lowest = min((value for value, _ in found), default=math.inf)
    minima: list[Point] = []
    for value, point in found:
        if value <= lowest + equal and all(math.dist(point, other) > 1e-4 * window.extent for other in minima):
            minima.append(point)
    return tuple(minima)


def _variation(z: Array) -> float:
    """Return the range of the lower half of the values; the higher half may be poles."""
    finite = z[np.isfinite(z)]
    return float(np.median(finite) - finite.min()) if finite.size else 0.0


PATCH = np.array([(i / 5.0, j / 5.0) for i in range(-5, 6) for j in range(-5, 6)])
PATCH = PATCH[np.argsort(np.hypot(*PATCH.T), kind="stable")]
"""Offsets that a search tries, nearest first: the nearest of equal values wins, so a search stops on flat ground."""


def nearest_minima(f: Expression, starts: Array, window: Window) -> list[Point | None]:
    """Search downhill from each of `starts`, (n, 2); return the minimum each search finds, or None.

    A search evaluates a patch of points, moves to the lowest, and shrinks the patch unless the lowest is on its border.
    A search fails after `SEARCH_ROUNDS` (as on an endless slope), far from the window, where floats are too coarse, and
    at an edge of the function's domain.
    """
    sides = np.array([window.width, window.height])
    at = starts.copy()
    reach = np.full(len(at), 0.01)
    failed = np.zeros(len(at), bool)
    for _ in range(SEARCH_ROUNDS):
        failed |= (np.abs(at - (window.left, window.bottom)) > FAR * sides).any(axis=1)
        (going,) = np.nonzero(~failed & (reach > FINE))
        if not len(going):
            break
        around = at[going, None] + reach[going, None, None] * sides * PATCH
        z = f(around[..., 0], around[..., 1])
        best = np.argmin(np.where(np.isnan(z), np.inf, z), axis=1)
        at[going] = around[np.arange(len(going)), best]
        reach[going] *= np.where(np.abs(PATCH[best]).max(axis=1) < 1.0, 0.3, 1.0)
        failed[going] |= (reach[going] <= FINE) & ~np.isfinite(z).all(axis=1)
    failed |= reach > FINE
    digits = 7 - math.floor(math.log10(window.extent))
    points = [Point(round(x, digits) + 0.0, round(y, digits) + 0.0) for x, y in at.tolist()]  # + 0.0 turns -0.0 to 0.0
    return [None if none else point for none, point in zip(failed.tolist(), points, strict=True)]
