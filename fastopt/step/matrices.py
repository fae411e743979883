"""`Matrices`: the matrices that a matrixwise rule keeps for each parameter, at their own size, and its transform."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

from fastopt.hyper import of_member
from fastopt.kernels import get_backend
from fastopt.rule import Matrixwise, Rule
from fastopt.storage.layout import as_matrix

if TYPE_CHECKING:
    from fastopt.storage.flat import FlatParams

NONE = (0, 0)
"""The shape of a matrix of a parameter that is not treated as one."""


def fits(whole: Matrixwise, shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape can be treated as a matrix."""
    return len(shape) == 2 or (len(shape) > 2 and whole.reshape is not None)


def selects(whole: Matrixwise, shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape is treated as a matrix where nothing else is asked for."""
    return fits(whole, shape) and (whole.largest is None or max(as_matrix(shape)) <= whole.largest)


def chosen_by(flags: Sequence[Any]) -> tuple[bool, ...]:
    """For each parameter whether it is treated as a matrix, now or by a schedule."""
    return tuple([bool(callable(flag) or flag) for flag in flags])


def shape_of(rule: Rule, name: str, shape: Sequence[int], *, chosen: bool) -> tuple[int, int]:
    """The shape of the matrix of this name for a parameter of shape `shape`."""
    if not chosen or rule.matrixwise is None:
        return NONE
    rows, columns = as_matrix(shape)
    first, second = [
        side if isinstance(side, int) else {"rows": rows, "columns": columns}[side]
        for side in rule.matrixwise.matrices[name]
    ]
    return first, second


def shape_in(flat: FlatParams, rule: Rule, name: str, k: int, *, chosen: bool) -> tuple[int, ...]:
    """The same for parameter number k, with the axis of the members of a population."""
    shape = shape_of(rule, name, flat.member_shapes[k], chosen=chosen)
    return shape if flat.members is None else (flat.members, *shape)


class Matrices:
    """What `Matrixwise.matrices` declares, for parameters of which some are treated as matrices.

    Args:
        rule: of any kind: most have none.
        flat: the parameters.
        chosen: for each parameter whether it is treated as a matrix, from `chosen_by`.
        kept: matrices to use where they have the same shape; all others are made of zeros.
    """

    def __init__(
        self, rule: Rule, flat: FlatParams, chosen: tuple[bool, ...], kept: Mapping[str, Sequence[Any]] | None = None
    ):
        self.rule = rule
        self.flat = flat
        self.chosen = chosen
        self.arrays: dict[str, list[Any]] = {}
        zeros = get_backend(flat.backend).zeros
        for name in rule.matrices:
            own = self.arrays[name] = []
            for k, is_chosen in enumerate(chosen):
                shape = shape_in(flat, rule, name, k, chosen=is_chosen)
                if kept is not None and kept[name][k].shape == shape:
                    own.append(kept[name][k])
                else:
                    own.append(zeros(math.prod(shape), flat.compute).reshape(shape))

    def fitted(self, chosen: tuple[bool, ...]) -> Matrices:
        """These, for another choice of parameters: matrices of one that is new begin at 0."""
        return self if chosen == self.chosen else Matrices(self.rule, self.flat, chosen, self.arrays)

    def fitted_to(self, values: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> Matrices:
        """These, for other hyperparameters. changes : of each parameter, where they differ from `values`."""
        whole = self.rule.matrixwise
        if whole is None or not whole.matrices:
            return self
        return self.fitted(chosen_by([change.get(whole.chosen, values[whole.chosen]) for change in changes]))

    def clear(self) -> None:
        """Let all begin at 0 again."""
        for own in self.arrays.values():
            for array in own:
                array.fill(0)

    def transform(
        self,
        k: int,
        states: Mapping[str, Sequence[Any]],
        t: int,
        hyper: Mapping[str, Any],
        member: int | None = None,
    ) -> None:
        """Run the transform of the rule on parameter number k.

        states : by name, those of all parameters. t : the number of the parameter's update, from 1. member : which one
        of a population.
        """
        whole, handed = self.rule.matrixwise, self.rule.handed
        assert whole is not None
        path, shape = self.flat.paths[k], as_matrix(self.flat.member_shapes[k])
        own_part = ... if member is None else member
        views = {
            name: states[name][k][own_part].reshape(shape) for name in states if name == whole.state or name in handed
        }
        array = views.pop(whole.state)
        views.update({name: own[k][own_part] for name, own in self.arrays.items()})
        if member is not None:
            hyper = {name: of_member(value, member) for name, value in hyper.items()}
        beside = {"t": t, "path": path, "seed": crc32(f"{t} {path}".encode(errors="surrogatepass"))}
        whole.transform(array, **hyper, **views, **{name: beside[name] for name in beside if name in handed})
