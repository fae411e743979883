"""The backends: where kernels are compiled and launched. `get_backend` imports one only when it is asked for.

This page is the interface that a third backend's author implements. A backend never imports the mathematics: it
receives a rule, and binds the rule into its own loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from fastopt.rule import Rule

Array = Any

ALIGNMENT = 64
"""Bytes. One cache line, and one AVX-512 register: no vector load of a parameter straddles two lines."""

BLOCK = 4096
"""Elements per partial sum of a reduction. Fixed, so that a sum is the same for any chunk size and thread count."""

NAMES = ("cpu", "cuda")


class StepHyper(NamedTuple):
    """What the loop itself applies around every rule: the first fields of every row of the table."""

    unscale: float
    """1 / grad_scale."""
    weight_decay: float
    """L2: g += weight_decay * p."""
    keep: float
    """Decoupled weight decay: p *= 1 - lr * weight_decay."""


@dataclass(frozen=True)
class Features:
    """The compile-time flags of a kernel. One that is off is not in the machine code."""

    unscale: bool = False
    l2: bool = False
    decoupled: bool = False


class Kernel(Protocol):
    """The compiled update of one rule."""

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, chunks: Array) -> None:
        """Update every chunk in place.

        p, g, states : 1-D buffers of one length and dtype.
        table : a row of hyperparameters per group, in the dtype of the buffers: the fields of `StepHyper`, then those
            of the rule's NamedTuple.
        chunks : int64, a line (start, stop, row of the table, parameter, first block) per chunk: `Layout.chunks`.
        """


class Backend(Protocol):
    """A place to compute: memory, and kernels for it."""

    name: str

    def zeros(self, size: int, dtype: Any) -> Array:
        """A 1-D buffer of zeros, aligned to `ALIGNMENT` bytes."""

    def kernel(self, rule: Rule, hyper: type, dtype: Any, features: Features) -> Kernel:
        """The update of `rule`, whose `prepare` returns the NamedTuple `hyper`; compiled once per combination.

        Raises TypeError where the rule's arithmetic leaves `dtype`, or where its return does not match its states.
        """

    def batchnorm(self, formulas: ModuleType, dtype: Any, *, relu: bool, residual: bool) -> Any:
        """BatchNorm of `dtype` by the scalar functions of `formulas`: an object with ``forward`` and ``backward``."""


@cache
def get_backend(name: str) -> Backend:
    """The backend called `name`, made once per process.

    Raises ValueError for a name that is not ``"cpu"`` or ``"cuda"``, and RuntimeError, with the reason, for a backend
    that cannot work here.
    """
    if name == "cpu":
        from fastopt.backends.cpu import CPU

        return CPU()
    if name == "cuda":
        raise RuntimeError("backend='cuda': this version of fastopt has no CUDA backend; use backend='cpu'")
    raise ValueError(f"backend={name!r}: expected one of {', '.join(map(repr, NAMES))}")
