"""The contract of a backend: what it must implement, and the records and constants that it shares with its callers.

To write a third backend, implement this page. A backend never imports the mathematics: it receives a rule, and binds
the rule into its own loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = Any

ALIGNMENT = 64
"""Bytes: one cache line and one AVX-512 register. No vector load of a parameter straddles two lines."""

BLOCK = 4096
"""Elements per partial sum of a reduction. It is fixed, so a sum is the same for any chunk size and thread count."""


FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = "float32", "float64", "bfloat16", "float16"
"""Storage formats of floats. Numbers of 16 bits are computed in float32."""
INT8, UINT8 = "int8", "uint8"
"""Codes of 8 bits with a scale for each block of `CODES`: the first for any numbers, the second for none below 0."""
CODED = (INT8, UINT8)

CODES = 256
"""Numbers with one scale. Blocks are counted from the beginning of each parameter."""

CODE_BASE = (127 - 31) << 3
"""What the first bits of a float32, exponent and 3 of the significand, are more than its code of UINT8."""

STORED: Mapping[str, np.dtype[Any]] = {
    FLOAT32: np.dtype(np.float32),
    FLOAT64: np.dtype(np.float64),
    BFLOAT16: np.dtype(np.uint16),
    FLOAT16: np.dtype(np.uint16),
    INT8: np.dtype(np.int8),
    UINT8: np.dtype(np.uint8),
}
"""By format: the dtype of the arrays that kernels are given."""


class Place(NamedTuple):
    """Where one parameter is: a line of the table of places, in int64."""

    p: int
    """The address of its first element."""
    g: int
    """The address of the first element of its gradient."""
    state: int
    """The offset of its first element in every buffer of states."""
    network: int
    """The number of the network that it belongs to: 0, but in populations. They follow each other."""


class Chunk(NamedTuple):
    """A piece of work: a line of the table of chunks, in int64. It may extend over parameters that follow in memory."""

    place: int
    """The index of the (first) parameter: its line of the table of places."""
    start: int
    """The first element, counted from the beginning of the parameter."""
    stop: int
    """The element after the last one."""
    grad: int
    """The offset of the first gradient, counted from the address `Place.g`: `start`, except for row gradients."""
    group: int
    """The index of its param group: the row of the table of hyperparameters."""
    block: int
    """The index of its first partial sum. Each sum covers `BLOCK` elements, counted from `start`."""


class Cut(NamedTuple):
    """The chunks of which a process works on a part, where several processes make a step."""

    own: Array
    """The chunks of this process, whose partial sums are numbered from 0 ..."""
    whole: Array
    """... and those of all."""
    gathered: Callable[[Array], Array]
    """Returns the partial sums of all chunks, given those of the own ones. Every process calls it."""


class Tile(NamedTuple):
    """A piece of a matrix, for sums over its rows or columns: a line of the table of tiles, in int64."""

    place: int
    """The index of the parameter: its line of the table of places."""
    row: int
    """The first row ..."""
    rows: int
    """... and how many."""
    column: int
    """The first column ..."""
    width: int
    """... and how many."""
    columns: int
    """How many columns the matrix has."""
    group: int
    """The row of the table of hyperparameters."""
    row_line: int
    """The index of its first row among the rows of all parameters."""
    column_line: int
    """The same of its first column."""
    row_part: int
    """The index of its first partial sum over a row: it has one for each of its rows."""
    column_part: int
    """The same for columns."""


class Line(NamedTuple):
    """Rows, columns or parameters whose sums are settled: a line of a table in int64."""

    first: int
    """The index of the first one among those of all parameters ..."""
    length: int
    """... and how many there are."""
    size: int
    """How many elements each has."""
    tile: int
    """The first tile with partial sums of them ..."""
    tiles: int
    """... how many such tiles there are ..."""
    stride: int
    """... and how far they are apart."""
    group: int
    """The row of the table of hyperparameters."""
    place: int
    """The index of the parameter."""


class Tiles(NamedTuple):
    """The work of one launch of a rule with sums over rows or columns."""

    table: Array
    """A line of `Tile` each: rows of tiles from left to right, one below the other, parameter after parameter."""
    lines: Mapping[str, Array]
    """By `SumsFunctions.over`: a table of `Line`."""
    counts: Mapping[str, int]
    """By the same: how many rows, columns or parameters there are ..."""
    parts: Mapping[str, int]
    """... and how many partial sums over them."""
    together: int
    """How many parameters each network has: what goes over all goes over them."""


LEVEL = {"tensor": "tensor", "all": "tensor", "row": "row", "column": "column"}
"""By `SumsFunctions.over`: of what there is a value of each result in the update of a rule that is lined."""


class StepHyper(NamedTuple):
    """Hyperparameters that the loop itself applies around every rule: the first fields of every row of the table."""

    unscale: float
    """1 / grad_scale, negated to maximise the objective, and divided by the count to average accumulated gradients."""
    clip_value: float
    """The largest allowed magnitude of an element of the gradient."""
    coefficient: float
    """Clipping by norm: the factor of every gradient."""
    weight_decay: float
    """L2: g += weight_decay * p."""
    keep: float
    """Decoupled weight decay: p *= 1 - lr * weight_decay."""
    ema_weight: float
    """The weight of the new parameters in their moving average."""
    proceeds: float
    """0 where the step is skipped, which changes nothing; else 1. See `Kernel.launch` for what a kernel writes here."""
    noise: float
    """Stochastic rounding: a whole number below 2**24, another one in every step."""


PROCEEDS, NOISE = StepHyper._fields.index("proceeds"), StepHyper._fields.index("noise")
"""The columns of `StepHyper.proceeds` and `StepHyper.noise` in a table of hyperparameters."""

N_PLACE, N_CHUNK, N_STEP = len(Place._fields), len(Chunk._fields), len(StepHyper._fields)
N_TILE, N_LINE = len(Tile._fields), len(Line._fields)


REFUSED = -2
"""What a pass of BatchNorm returns that was not made, because Python has to look at its arrays. Otherwise it returns
the number of the input that it has written over, or -1."""


class SumsOfRanks(Protocol):
    """What adds up the sums of a pass of BatchNorm over all ranks, each of which has a part of the batch."""

    def statistics(self, counts: Array, partials: Array) -> tuple[float, Array]:
        """Return the values per channel of all parts, and (2, channels): their mean, and the squares about it.

        counts, partials : of the blocks of this rank's part, the values per channel, and (2, blocks, channels).
        """

    def sums(self, counts: Array, partials: Array) -> tuple[float, Array]:
        """Return the values per channel of all parts, and (2, channels): the sums of their gradients' terms."""


class SumsFunctions(Protocol):
    """The part of `fastopt.Sums` that a kernel needs: sums over whole parameters, and what follows from them."""

    @property
    def terms(self) -> Mapping[str, Callable[..., Any]]:
        """``term(p, g, *states, h)``, of which the sums are taken, by the names of the sums."""

    @property
    def norms(self) -> Mapping[str, Callable[..., Any]]:
        """The same, of which the norms are taken: the roots of the sums of their squares."""

    @property
    def settle(self) -> Callable[..., Any]:
        """``settle(sums, numbers, size, h)``, once per parameter or once for all."""

    @property
    def results(self) -> tuple[str | int, ...]:
        """The fields of h that it gives, by their names or numbers."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the states that it reads, and gives as well: a number per parameter, row or column."""

    @property
    def over(self) -> str:
        """``"tensor"``, ``"row"``, ``"column"`` or ``"all"``."""


class KernelRule(Protocol):
    """The part of `fastopt.Rule` that a kernel needs."""

    name: str
    states: tuple[str, ...]
    """The names of its state buffers."""
    scalar: FunctionType
    """The scalar function ``(p, g, *states, h)``, in plain Python."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of its states that have a number per parameter, row or column."""

    @property
    def sums(self) -> tuple[SumsFunctions, ...]:
        """One after the other: each finds in h what those before it gave."""

    @property
    def lined(self) -> bool:
        """Whether any of these go over rows or columns: its kernel is launched with `Tiles`."""


def rescaling(norm: Any, max_norm: Any) -> Any:
    """Return the factor that brings gradients of this norm to max_norm, in torch's form."""
    return max_norm / (norm + 1e-6)


def clip_coefficient(norm: Any, max_norm: Any) -> Any:
    """Return the factor that clips gradients of this norm, in torch's form; NaN for NaN."""
    coefficient = rescaling(norm, max_norm)
    return 1.0 if coefficient > 1.0 else coefficient


# --- norms ------------------------------------------------------------------------------------------------------------
# Sums of squares are float64. Squares of float32 neither overflow nor underflow in it. Those of float64 do, beyond
# 1.3e154 and below 1.5e-154: a block whose sum shows that is summed twice more, scaled by powers of 2, which are exact.

SMALLEST_SUM = 2.0**-880
"""Below this, squares of single elements may have underflowed, and count."""

SCALE_UP, SCALE_DOWN = 2.0**600, 2.0**-600
"""Factors of the elements of a block. Scaled up, no square of an element below 2**-450 underflows; scaled down, none
overflows."""


def sums_per_block(dtype: Any) -> int:
    """Return how many numbers a line of partial sums has: see `NormKernel`."""
    return 6 if dtype.itemsize == 8 else 2


def in_range(total: Any) -> Any:
    """Return whether a sum of squares is right as it is: finite, and larger than squares that underflow."""
    return (total >= SMALLEST_SUM) & (total - total == 0.0)


def scaled_square(value: Any, scale: Any) -> Any:
    """Return the square of a scaled value. A function of its own, without fastmath: the two scales must stay apart."""
    scaled = value * scale
    return scaled * scaled


def rescaled(total: Any, scale: Any) -> Any:
    """Return the sum of the `scaled_square` of values, from the sum of their squares."""
    return total * scale * scale


def root_of_squares(total: Any, up: Any, down: Any) -> Any:
    """Return the norm of values: from the sum of their squares, or of their squares scaled up or down."""
    if in_range(total):
        return math.sqrt(total)
    if total < SMALLEST_SUM:
        return math.sqrt(up) * SCALE_DOWN
    return math.sqrt(down) * SCALE_UP


def norm_of_array(values: Any) -> float:
    """Return the norm of an array of float64, of NumPy or of a device."""
    with np.errstate(over="ignore", under="ignore"):
        total = float((values**2).sum())
        if in_range(total):
            return math.sqrt(total)
        up, down = (float(((scale * values) ** 2).sum()) for scale in (SCALE_UP, SCALE_DOWN))
    return float(root_of_squares(total, up, down))


@dataclass(frozen=True)
class Features:
    """The compile-time flags of a kernel. A flag that is off is not in the machine code.

    They are applied in the order of the fields: the first seven before the rule (`clip_norm` multiplies by the
    coefficient of `StepHyper`), the next two after it.
    """

    still: bool = False
    """Gradients count as 0 and are not read."""
    unscale: bool = False
    zero_nonfinite: bool = False
    """Elements that are NaN or infinite count as 0."""
    clip_value: bool = False
    clip_norm: bool = False
    l2: bool = False
    decoupled: bool = False
    ema: bool = False
    """The last state is a moving average of the parameters."""
    gated: bool = False
    """`StepHyper.proceeds` decides whether the step is made: the host launches it before the norm is known."""
    zero_grad: bool = False
    """Gradients are set to 0 after the update."""
    scattered: bool = False
    """Chunks are short and far apart: they are prefetched."""


MASTER, REST = "master", "rest"


class Storage(NamedTuple):
    """In which formats the buffers of a kernel are, which computes in the dtype of the table."""

    params: str
    grads: str
    states: tuple[str, ...]
    """Of every buffer: the rule's states, with the feature `ema` the average, and what `keeps` adds.

    After these follow the units of those of 8 bits, in float32: one for each `CODES` elements, as many as there are
    codes. States whose offset (`Place.state`) is behind the codes have none: their numbers lie behind the units.
    """
    keeps: str = ""
    """What a last buffer of states is for: MASTER holds the parameters in the dtype, and the rule is given these; REST
    holds what their rounding has left; "" where there is none."""
    stochastic: bool = False
    """Whether numbers of 16 bits are rounded at random, by `StepHyper.noise`, and not to the nearest."""


class Kernel(Protocol):
    """The compiled update of one rule."""

    def launch(self, places: Array, states: tuple[Array, ...], table: Array, chunks: Array, elements: int) -> None:
        """Update every chunk in place: all of them, or none where a handler of a signal raises an exception.

        The handlers run between two instructions of Python, and not in compiled code. A kernel of the CPU sets
        ``table[0, PROCEEDS]`` to 0 when it has begun to write: after an exception, this shows whether it has run.

        places : a line of `Place` per parameter. The arrays at these addresses have the kernel's dtype, are contiguous
            and aligned, and do not overlap.
        states : 1-D buffers: the rule's states, with the feature `ema` the average, and the rule's numbers
            (`Rule.numbers`), which have one float64 per parameter, row or column.
        table : a row of hyperparameters per param group, in the dtype of the buffers: the fields of `StepHyper`, then
            those of the rule's NamedTuple. A NumPy array, or what `Asynchronous.table` returned.
        chunks : lines of `Chunk`. Make them with ``whole=True`` for a rule that needs whole parameters; `Tiles` for a
            rule that is `lined`; a `Cut` for a rule of sums where several processes make the step.
        elements : about how many elements the chunks hold. A second thread pays from some ten thousand elements on.
        """


class NormKernel(Protocol):
    """The pass over the gradients before the update of a step that depends on their norm."""

    def launch(self, places: Array, table: Array, chunks: Array, elements: int) -> Array:
        """Return the partial sums of the gradients: an array of the backend, in float64, with a line per block.

        A line begins with two numbers: the sum of squares of the block's gradients, after the features before
        `clip_norm` were applied to them; and 0, or NaN where a gradient is not finite after `unscale`. In float64 four
        more follow, of which the first two are the sums of the squares scaled up and down, for `root_of_squares`.

        Read or use them before the next launch over the same table of chunks, which may overwrite them.

        chunks : as for `Kernel`, made with ``whole=True``; a `Cut` where several processes measure them together.
        """


class Decision(Protocol):
    """The decision of a device about a step, made by the norm of the gradients."""

    def send(self) -> None:
        """Start sending the decision to the host; do not wait. Do not call this while launches are recorded."""

    @property
    def arrived(self) -> bool:
        """Whether the decision has arrived at the host."""

    def read(self) -> tuple[float, float, bool]:
        """Wait for the decision; return the norm, the coefficient of clipping, and whether all gradients are finite."""


class Adder(NamedTuple):
    """What `Backend.add` does besides adding."""

    measure: bool
    """Also compute the partial sums of `NormKernel`, of the sums in the buffer."""
    zero_nonfinite: bool
    """As in `Features`, for the partial sums only; the buffer keeps the elements that are not finite."""


class Backend(Protocol):
    """Where computation runs: memory, and kernels for that memory."""

    name: str
    asynchronous: bool
    """Whether the backend is an `Asynchronous`."""

    def zeros(self, size: int, dtype: Any) -> Array:
        """Return a 1-D buffer of zeros, aligned to `ALIGNMENT` bytes."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array with arbitrary content."""

    @property
    def array_type(self) -> Any:
        """The type of the arrays that users pass and receive. It has the methods and operators of NumPy's arrays."""

    def adopt(self, leaf: Any) -> Array | None:
        """Return an array as one of this backend, or None for an object that it does not accept.

        Raises ValueError for an array that another library may still be writing to.
        """

    @property
    def device(self) -> int | None:
        """The number of the current device; None for a backend without devices."""

    def device_of(self, array: Array) -> int | None:
        """Return the number of the device that holds an array of this backend; None without devices."""

    def copy(self, to: Array, source: Array) -> None:
        """Copy a NumPy array, or an array of this backend, to an array of this backend."""

    def host(self, array: Array) -> Any:
        """Return an array of this backend as a NumPy array: the same array or a copy."""

    def address(self, array: Array) -> int:
        """Return the address of an array of this backend."""

    @property
    def overlap(self) -> Callable[[Array, Array], bool]:
        """The function that returns whether two arrays of this backend may share memory."""

    def kernel(
        self,
        rule: KernelRule,
        hyper: type,
        dtype: Any,
        features: Features,
        first: tuple[Callable[..., Any], type] | None = None,
        storage: Storage | None = None,
    ) -> Kernel:
        """Return the update of `rule`, whose `prepare` returns the NamedTuple `hyper`; compile once per combination.

        first : a scalar function like a rule's, without weight decay, and the NamedTuple of its hyperparameters. The
            kernel applies it before the rule, in the same pass, without reading the gradient. The columns of its
            hyperparameters follow the rule's columns in the table.
        storage : the formats of the buffers; None where all are of the dtype.

        Raises TypeError where the rule's arithmetic leaves `dtype`, or where its return does not match its states.
        """

    def norm(self, dtype: Any, features: Features, grads: str | None = None) -> NormKernel:
        """Return the norm kernel for `dtype`, compiled once per combination of the flags that change a norm.

        grads : the format of the gradients; None for that of the dtype.

        features : none but those before `Features.clip_norm`.
        """

    def add(
        self,
        places: Array,
        present: Array,
        overwrite: Array,
        weight: Any,
        chunks: Array,
        partials: Array,
        adder: Adder,
        dtype: Any,
        grads: str | None = None,
    ) -> None:
        """Add weight times an array to the sum of each parameter.

        places : `Place.p` is the address of the sum, `Place.g` the address of the array that is added.
        present, overwrite : a bool per parameter: whether there is an array to add, and whether it overwrites the sum
            instead.
        weight : a NumPy array of the dtype: the weight, and a 0, which becomes 1 when sums have begun to change. As in
            `Kernel.launch`, a handler of a signal cannot interrupt the adding, and this shows whether it has run.
        chunks : as for `NormKernel`.
        partials : as `NormKernel` returns them. The lines of a parameter that is not present do not change.
        grads : the format of what is added; None for that of the dtype, which the sums have.
        """

    def sum_rows(self, grads: Array, order: Any, starts: Any) -> Array:
        """Return the sums of runs of rows of a 2-D array, each added in the order of its run.

        order : NumPy int64, the indices of the rows. starts : where in `order` each run begins.
        """

    def batchnorm(self, formulas: ModuleType, dtype: Any, *, relu: bool, residual: bool) -> Any:
        """Return BatchNorm of `dtype` by the functions of `formulas`.

        It has ``forward``, ``backward``, and ``statistics``, which reads mean and inv_std of what ``forward`` returned.
        On the CPU it has ``prepared`` as well, for passes whose arrays compiled code checks, and its passes have the
        argument ``ranks``, a `SumsOfRanks`.
        """


class Asynchronous(Backend, Protocol):
    """A backend that runs in parallel with the host, and decides about a step by its gradients on the device."""

    def table(self, table: Any) -> Array:
        """Return a table of hyperparameters for `Kernel.launch` and `decide`, with the content of a NumPy array.

        The same array gets the same memory on the device in every call.
        """

    def decide(
        self,
        table: Array,
        candidates: Any,
        partials: Array,
        factor: float,
        max_norm: float | None,
        skipped: tuple[Array, int] | None,
    ) -> Decision:
        """Write the decision of a step into its table, without waiting for the norm of the gradients.

        The decision is the coefficient of clipping by norm and, with `skipped`, whether the step proceeds.

        table : as `table` returned it.
        candidates : None, or NumPy tables for the cases that 0, 1, 2 ... of the steps in flight were skipped; the
            table for the actual number replaces `table`.
        partials : as a `NormKernel` returned them; the norm is that of their sums times `factor`.
        max_norm : None clips nothing.
        skipped : None for a step that proceeds whatever its gradients are. Else a pair: the number of skipped steps, an
            int64 array of one element that this call updates; and how many of these skips the host knows of.
        """

    def capturing(self) -> bool:
        """Return whether launches are now recorded, in a graph that runs later, instead of run."""
