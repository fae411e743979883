"""The hyperparameters of an optimizer by name, and those of the members of a population as arrays that can be set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from fastopt.rule import Rule


class PerMember(NDArrayOperatorsMixin):
    """One hyperparameter of each member of a population: an array whose items can be set. From `Optimizer.hyper`.

    Reading gives NumPy arrays and floats. Setting some items sets the hyperparameter, or raises and changes nothing.
    """

    def __init__(self, values: Callable[[], np.ndarray], put: Callable[[np.ndarray], None]):
        self._values = values
        self._put = put

    def __getitem__(self, key: Any) -> Any:
        found = self._values()[key]
        return found if isinstance(found, np.ndarray) else float(found)

    def __setitem__(self, key: Any, value: Any) -> None:
        values = self._values()
        values[key] = value
        self._put(values)

    def __len__(self) -> int:
        return len(self._values())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values().tolist())

    @property
    def shape(self) -> tuple[int, ...]:
        """Members; and how many numbers each has, where these are several."""
        return self._values().shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._values(), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        """What NumPy's functions and operators give: of ``*=`` as well, whose result is then set."""
        plain = [each._values() if isinstance(each, PerMember) else each for each in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __repr__(self) -> str:
        return f"PerMember({np.array2string(self._values(), separator=', ', threshold=10)})"


class HyperView(MutableMapping[str, Any]):
    """The hyperparameters of an optimizer by name. Made by `Optimizer.hyper`."""

    def __init__(
        self, rule: Rule, values: Callable[[], Mapping[str, Any]], put: Callable[[str, Any], None], members: int | None
    ):
        """values : returns them. put : sets one. members : of a population."""
        self._rule = rule
        self._values = values
        self._put = put
        self._members = members

    def __getitem__(self, name: str) -> Any:
        value = self._values()[name]
        of_numbers = isinstance(value, float | np.ndarray | tuple)
        if self._members is None or not of_numbers:
            return value
        return PerMember(lambda: self._each(name), lambda array: self._put(name, array))

    def _each(self, name: str) -> np.ndarray:
        """An array of the numbers of all members: a line for each, where these are several."""
        value = self._values()[name]
        columns = value if isinstance(value, tuple) else (value,)
        array = np.stack([np.broadcast_to(column, (self._members or 1,)) for column in columns], axis=1)
        return array.copy() if isinstance(value, tuple) else array[:, 0].copy()

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._values():
            raise KeyError(f"{name}: must be a hyperparameter of {self._rule.name!r} ({', '.join(self._values())})")
        self._put(name, np.asarray(value) if isinstance(value, PerMember) else value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name}: a hyperparameter cannot be deleted; set it")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __repr__(self) -> str:
        return f"HyperView({dict(self)})"
