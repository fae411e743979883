"""`Born`: the states that begin at the parameters, the average among them, and which of them have begun."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fastopt.hyper import EMA
from fastopt.kernels import get_backend
from fastopt.step.options import StepOptions
from fastopt.storage.flat import FlatParams

if TYPE_CHECKING:
    from fastopt.rule import Rule


class Born:
    """The states that begin at a parameter as it is at its first update, when pretrained weights have been written."""

    def __init__(self, rule: Rule, options: StepOptions):
        self.names = tuple([name for name, value in rule.initial.items() if value == "p"])
        if options.ema is not None:
            self.names = (*self.names, EMA)
        self.waiting: list[int] = []
        """Parameters that may have had no update yet. Empty in most steps."""
        self.shown: dict[tuple[str, str], int | None] = {}
        """By state and path: a hash of what was handed out before the first update; None for what was written."""

    def wait(self, parameters: int) -> None:
        """Look again at each of so many parameters before its next update."""
        self.waiting = list(range(parameters)) if self.names else []

    def begin(
        self, flat: FlatParams, views: Mapping[str, list[Any]], parameters: Iterable[int], *, show: bool = False
    ) -> None:
        """Begin at these parameters, which have had no update, but for states that the caller has written himself.

        views : the states by name. show : they are about to be handed out.
        """
        arrays = flat.held(flat.arrays)
        for k in parameters:
            for name in self.names:
                view, key = views[name][k], (name, flat.paths[k])
                if key in self.shown and self.shown[key] != _hash(flat, view):
                    self.shown[key] = None
                    continue
                view[...] = arrays[k]
                if show or key in self.shown:
                    self.shown[key] = _hash(flat, view)

    def keep_written(self, flat: FlatParams, views: Mapping[str, list[Any]], parameters: Iterable[int]) -> None:
        """After a load: a state that is not at its parameter, which has had no update, was written. Keep it."""
        arrays = flat.held(flat.arrays)
        for k in parameters:
            for name in self.names:
                if _hash(flat, views[name][k]) != _hash(flat, arrays[k]):
                    self.shown[name, flat.paths[k]] = None


def _hash(flat: FlatParams, array: Any) -> int:
    return hash(get_backend(flat.backend).host(array).tobytes())
