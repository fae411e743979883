"""The contract of a backend: what the rest of fastopt asks of it, and the words and constants that both share.

The author of a third backend implements this page. A backend never imports the mathematics: it receives a rule, and
binds the rule into its own loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from fastopt.rule import Rule

Array = Any

ALIGNMENT = 64
"""Bytes. One cache line, and one AVX-512 register: no vector load of a parameter straddles two lines."""

BLOCK = 4096
"""Elements per partial sum of a reduction. Fixed, so that a sum is the same for any chunk size and thread count."""


class StepHyper(NamedTuple):
    """What the loop itself applies around every rule: the first fields of every row of the table."""

    unscale: float
    """1 / grad_scale; negative where the objective is maximised, smaller where accumulated gradients are averaged."""
    clip_value: float
    """The largest magnitude of an element of the gradient."""
    coefficient: float
    """Clipping by norm: what every gradient is multiplied by."""
    weight_decay: float
    """L2: g += weight_decay * p."""
    keep: float
    """Decoupled weight decay: p *= 1 - lr * weight_decay."""
    fresh: float
    """The weight of the new parameters in their moving average."""
    proceeds: float
    """0 where the step is left out: everything stays as it is."""


def clip_coefficient(norm: Any, max_norm: Any) -> Any:
    """What clipping by norm multiplies gradients of this norm by, in torch's form; NaN for NaN."""
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient


@dataclass(frozen=True)
class Features:
    """The compile-time flags of a kernel. One that is off is not in the machine code.

    They are applied in the order in which they stand here: the first seven before the rule (`clip_norm` multiplies by
    the coefficient of `StepHyper`), the next two after it.
    """

    still: bool = False
    """Gradients count as 0, and are not read."""
    unscale: bool = False
    zero_nonfinite: bool = False
    """Elements that are NaN or infinite count as 0."""
    clip_value: bool = False
    clip_norm: bool = False
    l2: bool = False
    decoupled: bool = False
    ema: bool = False
    """The last of the states is a moving average of the parameters."""
    gated: bool = False
    """`StepHyper.proceeds` decides whether there is a step at all: where no host has seen the gradients' norm."""
    zero_grad: bool = False
    """Gradients are 0 afterwards."""
    scattered: bool = False
    """Chunks are short and far from each other: they are fetched ahead of time. The last column of `chunks` is where
    the gradient of a chunk begins, in a buffer of its own."""

    def of_norm(self) -> Features:
        """Those that decide of what the norm of gradients is."""
        return Features(unscale=self.unscale, zero_nonfinite=self.zero_nonfinite, clip_value=self.clip_value)


class Kernel(Protocol):
    """The compiled update of one rule."""

    def launch(self, p: Array, g: Array, states: tuple[Array, ...], table: Array, chunks: Array) -> None:
        """Update every chunk in place.

        p, g, states : 1-D buffers of one length and dtype: the rule's states, with the feature `ema` the average, and
            the rule's numbers (`Rule.numbers`), which have an element per parameter, in float64.
        table : a row of hyperparameters per group, in the dtype of the buffers: the fields of `StepHyper`, then those
            of the rule's NamedTuple. A NumPy array, or what `Asynchronous.table` returned.
        chunks : int64, a line (start, stop, row of the table, parameter, first block) per chunk: `Layout.chunks`.
        """


class NormKernel(Protocol):
    """The pass over the gradients that a step needs before its update, where their norm decides about it."""

    def launch(self, g: Array, table: Array, chunks: Array) -> Array:
        """The partial sums of the gradients: float64, a line for each block, an array of the backend.

        A line holds the sum of the squares of what the features before `clip_norm` make of the block's gradients, and
        0, or NaN where one of them is not finite after `unscale`.

        chunks : as for `Kernel`, made with ``layerwise=True``.
        """


class Verdict(Protocol):
    """What a device has found of the gradients of a step."""

    def send(self) -> None:
        """Have it sent to the host, without waiting for it. Not while launches are recorded."""

    @property
    def arrived(self) -> bool:
        """Whether what was sent is there."""

    def read(self) -> tuple[float, float, bool]:
        """Wait for it: the norm, the coefficient of clipping, and whether all gradients are finite."""


class Adder(NamedTuple):
    """What `Backend.add` is to do, besides adding."""

    measure: bool
    """Take the partial sums that `NormKernel` would, of what is in the buffer afterwards."""
    zero_nonfinite: bool
    """As in `Features`, for those sums; the buffer keeps what it is given."""


class Backend(Protocol):
    """A place to compute: memory, and kernels for it."""

    name: str
    asynchronous: bool
    """Whether it is an `Asynchronous`."""

    wide: int
    """Bytes. Of buffers that all begin at a multiple of it a kernel may read and write several elements at once; with
    others it is made with the feature `scattered`, or launched on copies."""

    def zeros(self, size: int, dtype: Any) -> Array:
        """A 1-D buffer of zeros, aligned to `ALIGNMENT` bytes."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array whose content does not matter."""

    @property
    def array_type(self) -> Any:
        """That of its arrays, which are given and taken at the door. They have the methods and operators of NumPy's."""

    def adopt(self, leaf: Any) -> Array | None:
        """An array as one of this backend; None for what it does not take.

        Raises ValueError for an array that another library would be writing to meanwhile.
        """

    @property
    def device(self) -> int | None:
        """The number of the device that is current. None where there is but one place."""

    def device_of(self, array: Array) -> int | None:
        """That of the device on which an array of this backend lives."""

    def copy(self, to: Array, source: Array) -> None:
        """Copy a NumPy array, or one of this backend, to another of this backend."""

    def host(self, array: Array) -> Any:
        """An array of this backend as a NumPy array: itself, or a copy."""

    def address(self, array: Array) -> int:
        """Where the memory of an array of this backend begins."""

    @property
    def overlap(self) -> Callable[[Array, Array], bool]:
        """Whether two arrays of this backend may share memory."""

    def kernel(
        self,
        rule: Rule,
        hyper: type,
        dtype: Any,
        features: Features,
        first: tuple[Callable[..., Any], type] | None = None,
    ) -> Kernel:
        """The update of `rule`, whose `prepare` returns the NamedTuple `hyper`; compiled once per combination.

        first : a scalar function like a rule's, without weight decay, and the NamedTuple of its hyperparameters: an
            update that is made before that of the rule, in the same pass, its gradient not being read. The columns of
            its hyperparameters follow those of the rule's in the table.

        Raises TypeError where the rule's arithmetic leaves `dtype`, or where its return does not match its states.
        """

    def norm(self, dtype: Any, features: Features) -> NormKernel:
        """The norm of gradients of `dtype`, compiled once per combination; `features` beyond `clip_value` are off."""

    def add(
        self,
        g: Array,
        arrays: list[Array | None],
        offsets: Array,
        fresh: Array,
        weight: float,
        chunks: Array,
        partials: Array,
        adder: Adder,
    ) -> None:
        """Add weight times arrays to their parts of `g`.

        arrays, offsets, fresh : one for each number that stands in the fourth column of `chunks`: an array (None adds
            nothing), where its part of `g` begins (int64), and whether that is overwritten instead (bool).
        chunks : as for `NormKernel`, but for that column.
        partials : as `NormKernel` returns them; the lines of an array that is not there stay as they are.
        """

    def sum_rows(self, grads: Array, order: Any, starts: Any) -> Array:
        """The sums of runs of rows of a 2-D array, each in the order of the run.

        order : NumPy int64, the numbers of the rows. starts : where in `order` each run begins.
        """

    def batchnorm(self, formulas: ModuleType, dtype: Any, *, relu: bool, residual: bool) -> Any:
        """BatchNorm of `dtype` by the scalar functions of `formulas`: an object with ``forward`` and ``backward``."""


class Asynchronous(Backend, Protocol):
    """A backend that goes on while the host does: what a step decides by its gradients is decided there."""

    def table(self, table: Any) -> Array:
        """A table of hyperparameters for `Kernel.launch` and `judged`: the present content of a NumPy array.

        One array that is given again and again has one place on a device.
        """

    def judged(
        self,
        table: Array,
        candidates: Any,
        partials: Array,
        factor: float,
        max_norm: float | None,
        skipped: tuple[Array, int] | None,
    ) -> Verdict:
        """Write what the norm of the gradients decides into a table, without waiting for it.

        That is the coefficient of clipping by norm and, with `skipped`, whether the step proceeds.

        table : as `table` returned it.
        candidates : None, or NumPy tables for the cases that none, one, two ... of the steps whose outcome the host
            does not know were left out; the one that is true becomes the table.
        partials : as a `NormKernel` returned them; the norm is that of their sums times `factor`.
        max_norm : None clips nothing.
        skipped : None where a step proceeds whatever its gradients are; else the number of steps that were left out, an
            int64 array of one element that this updates, and how many of these the host knows of.
        """

    def capturing(self) -> bool:
        """Whether what is launched now is not run but recorded, in a graph of launches that is run later."""
