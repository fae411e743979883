"""`Launcher`: what the kernels of this folder need of the backend that launches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from fastopt.kernels.contract import Array

T = TypeVar("T")


class Chunks(NamedTuple):
    """A table of chunks on the device, its lines one after the other."""

    lines: Array
    by_place: Array
    """The same with the number of the parameter for that of the group."""
    length: int
    """How many lines."""
    spans: Array
    """A `Span` for each parameter that is there ..."""
    spanned: int
    """... and how many these are."""
    blocks: int
    parameters: int
    """One more than the number of the last one."""


class Launcher(Protocol):
    """See `fastopt.kernels.cuda.backend.CUDA`, which is one, and documents these methods."""

    xp: Any
    pinned: Callable[[int], np.ndarray]

    def empty(self, shape: Any, dtype: Any = ...) -> Array: ...  # noqa: D102

    def unused(self, dtype: Any) -> Array: ...  # noqa: D102

    def upload(self, array: Any) -> Array: ...  # noqa: D102

    def keep(self, kept: T) -> T: ...  # noqa: D102

    def constant(self, array: np.ndarray) -> Array: ...  # noqa: D102

    def table(self, table: Any) -> Array: ...  # noqa: D102

    def places(self, places: np.ndarray) -> Array: ...  # noqa: D102

    def chunks(self, chunks: np.ndarray) -> Chunks: ...  # noqa: D102

    def addresses(self, arrays: tuple[Array, ...]) -> tuple[int, ...]: ...  # noqa: D102

    def host(self, array: Array) -> np.ndarray: ...  # noqa: D102

    def compiled(  # noqa: D102
        self, function: Callable[..., None], constants: dict[str, Any], label: str, blocks: int | None = None
    ) -> Any: ...

    def launch(self, kernel: Any, blocks: int, *arguments: Any) -> None: ...  # noqa: D102
