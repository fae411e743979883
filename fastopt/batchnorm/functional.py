"""`batchnorm_forward`, `batchnorm_backward`: checks, then the backend's kernels."""

from __future__ import annotations

import math
import struct
from ctypes import addressof, c_char
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastopt import scalars
from fastopt.batchnorm import formulas
from fastopt.kernels import backend_of, check_device, get_backend
from fastopt.kernels.contract import REFUSED, Backend, SumsOfRanks
from fastopt.storage.door import Door, address_of

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
AXES = (1, -1)
ACTIVATIONS = (None, "relu")


class BatchNormGrads(NamedTuple):
    """The gradients that `batchnorm_backward` returns.

    Attributes:
        dx: in the shape of x.
        dgamma, dbeta: of shape (C,); None where the forward pass had no gamma or no beta.
        dresidual: in the shape of x; None where the forward pass had no residual; `dy` itself, not a copy, where no
            ReLU followed the addition.
    """

    dx: np.ndarray
    dgamma: np.ndarray | None
    dbeta: np.ndarray | None
    dresidual: np.ndarray | None


class Saved:
    """What a forward pass keeps for one call of `batchnorm_backward`.

    Attributes:
        mean, inv_std: float64, of shape (C,): the statistics the forward pass normalised with.
        shape, dtype: of x.
        training: whether these were the statistics of the batch.
        used: whether a backward pass has used it.
    """

    __slots__ = ("_kind", "_state", "_x", "_y", "used")

    def __init__(self, kind: Kind, state: Any, x: np.ndarray | None, y: np.ndarray | None):
        self.used = False
        self._kind = kind
        self._state = state
        self._x = x
        self._y = y

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        return self._kind.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of x."""
        return self._kind.dtype

    @property
    def training(self) -> bool:
        """Whether the forward pass used the statistics of the batch."""
        return self._kind.training

    @property
    def mean(self) -> np.ndarray:
        """The mean of every channel."""
        return self._statistics()[0]

    @property
    def inv_std(self) -> np.ndarray:
        """1 / sqrt(var + eps) of every channel."""
        return self._statistics()[1]

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray] = self._kind.kernel.statistics(self._state, self._kind.view[1])
        return found

    def __repr__(self) -> str:
        state = "used" if self.used else "not used yet"
        return f"<Saved: BatchNorm of {self.dtype} {self.shape}, training={self.training}, {state}>"

    def twin(self) -> Saved:
        """Return the same for another call of `batchnorm_backward`, before this one is used.

        >>> import numpy as np
        >>> from fastopt.batchnorm import batchnorm_backward, batchnorm_forward
        >>> y, saved = batchnorm_forward(np.array([[0.0], [1.0]]))
        >>> twin = saved.twin()
        >>> first, second = (batchnorm_backward(np.ones((2, 1)), each) for each in (saved, twin))
        >>> bool((first.dx == second.dx).all())
        True
        """
        return Saved(self._kind, self._state.copy(), self._x, self._y)

    def _mark_used(self) -> None:
        self.used = True
        self._x = self._y = None


class Kind:
    """All that two forward passes share whose arrays have the same shapes, and whose options are the same."""

    def __init__(
        self,
        backend: Backend,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        axis: int,
        activation: str | None,
        residual: bool,
        gamma: bool,
        beta: bool,
        training: bool,
    ):
        self.backend = backend
        self.shape = shape
        self.dtype = dtype
        self.axis = axis
        self.view = _view(shape, axis)
        self.activation = activation
        self.residual = residual
        self.gamma = gamma
        self.beta = beta
        self.training = training
        self.reads_y = residual and activation is not None
        """Whether the backward pass reads y, and writes a gradient of the residual of its own."""
        self.of_device = backend.asynchronous
        self.kernel = backend.batchnorm(formulas, dtype, relu=activation is not None, residual=residual)
        self._quick: dict[bool, Quick] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("axis", "activation", "residual", "gamma", "beta", "training")
        options = {name: getattr(self, name) for name in names}
        return partial(Kind, **options), (self.backend, self.shape, self.dtype)

    def quick(self, *, backward: bool) -> Quick:
        """What makes a pass over arrays on the CPU."""
        found = self._quick.get(backward)
        if found is None:
            found = self._quick[backward] = Quick(self, backward=backward)
        return found


class Quick:
    """A pass over arrays on the CPU that compiled code checks, in 4 us; Python's checks take 30.

    It makes none where an array is not as the kernels need it. The checks in Python then word the error, or find that
    the array can be used all the same.
    """

    def __init__(self, kind: Kind, *, backward: bool):
        self._prepared = kind.kernel.prepared(kind.view, backward=backward, training=kind.training)
        shapes, written = self._prepared.arrays(kind.shape)
        self._door = Door(shapes, kind.dtype, writeable=written, patience=False)
        self._lists: list[tuple[np.ndarray, int]] = []
        """Arrays for addresses, with their own address: a pass takes one, and puts it back."""

    def forward(
        self, arrays: list[Any], eps: float, weight: float | None, count: np.ndarray | None
    ) -> tuple[np.ndarray, int] | None:
        """Make a forward pass; return its workspace and the number of the input that y was written over, or -1.

        arrays : x, residual, y, gamma, beta, running_mean, running_var; any but x and y may be None.
        """
        workspace = self._prepared.workspace()
        arrays.append(workspace)
        addresses = self._taken_list()
        over = REFUSED
        if self._door.take(arrays, addresses[0])[0] == 0:
            over = self._prepared.forward(addresses[1], workspace, eps, weight, count)
        self._lists.append(addresses)
        return None if over == REFUSED else (workspace, over)

    def backward(self, arrays: list[Any]) -> bool:
        """Make a backward pass; return whether it was made.

        arrays : x, dy, y or None, dx, dresidual or None, dgamma, dbeta, and the workspace of the forward pass.
        """
        addresses = self._taken_list()
        made: bool = self._door.take(arrays, addresses[0])[0] == 0 and self._prepared.backward(addresses[1])
        self._lists.append(addresses)
        return made

    def forward_at(
        self, places: tuple[int, ...], eps: float, weight: float, count: np.ndarray | None
    ) -> np.ndarray | None:
        """As `forward`, of arrays that the caller has checked, by their addresses; return the workspace, or None.

        places : of x, residual, y, gamma, beta, running_mean, running_var; 0 for None.
        """
        workspace = self._prepared.workspace()
        addresses = self._taken_list()
        _put(places, workspace, addresses[0])
        over = self._prepared.forward(addresses[1], workspace, eps, weight, count)
        self._lists.append(addresses)
        return None if over == REFUSED else workspace

    def backward_at(self, places: tuple[int, ...], workspace: np.ndarray) -> bool:
        """As `backward`, of arrays that the caller has checked, by their addresses.

        places : of x, dy, y, dx, dresidual, dgamma, dbeta; 0 for None.
        """
        addresses = self._taken_list()
        _put(places, workspace, addresses[0])
        made = self._prepared.backward(addresses[1])
        self._lists.append(addresses)
        return made

    def _taken_list(self) -> tuple[np.ndarray, int]:
        try:
            return self._lists.pop()
        except IndexError:  # none yet, or other threads have all of them
            array = np.empty(len(self._door.shapes), np.int64)
            return array, address_of(array)


ADDRESSES = struct.Struct("8q")
"""Those of a pass."""


def _put(places: tuple[int, ...], workspace: Any, addresses: Any) -> None:
    """Write the addresses of a pass into their array."""
    ADDRESSES.pack_into(addresses, 0, *places, addressof(c_char.from_buffer(workspace)))


LEAST_QUICK_EPS = 1e-30
"""Smaller numbers may be 0 in float32: Python looks at them."""

KINDS: dict[tuple[Any, ...], Kind] = {}
"""Those of the last forward passes, by what they were called with."""

MOST_KINDS = 256

QUICK_ARRAYS: set[type] = {np.ndarray}
"""Types of x whose passes are looked up in KINDS: NumPy's, and those of the devices that were seen."""


def _keep(key: tuple[Any, ...], kind: Kind) -> None:
    if len(KINDS) >= MOST_KINDS:
        KINDS.clear()
    KINDS[key] = kind


def kind_of(
    shape: tuple[int, ...], dtype: np.dtype[Any], *, axis: int, relu: bool, gamma: bool, beta: bool, training: bool
) -> Kind:
    """What passes over arrays of the CPU share, without a residual; the same as `batchnorm_forward` uses."""
    activation = "relu" if relu else None
    key = (shape, dtype, axis, activation, True, not gamma, not beta, training)
    kind = KINDS.get(key)
    if kind is None:
        options = {"axis": axis, "activation": activation, "gamma": gamma, "beta": beta, "training": training}
        kind = Kind(get_backend("cpu"), tuple(shape), dtype, residual=False, **options)  # type: ignore[arg-type]
        _keep((tuple(shape), *key[1:]), kind)
    return kind


def batchnorm_forward(
    x: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    running_mean: np.ndarray | None = None,
    running_var: np.ndarray | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    residual: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, Saved]:
    """Normalise every channel of x to mean 0 and variance 1, then scale and shift it.

    Formula: ``y = gamma (x - mean) / sqrt(var + eps) + beta``, then ``+ residual``, then ``max(y, 0)`` for
    ``activation="relu"``

    In training, mean and var are those of the batch, over all axes but the channels' (var divided by m, the number of
    values per channel), and the running statistics move: ``running = (1 - momentum) running + momentum batch``, with
    the batch's unbiased variance (divided by m - 1). A batch with a NaN or an infinity, whose mean or variance in some
    channel is not finite, moves none of them: it would spoil the layer for ever. Its y shows the NaN. Otherwise mean
    and var are the running statistics. Memory is read once for the sums and once for y. The bits are the same for any
    number of threads.

    Args:
        x: float32 or float64, of shape (N, C), (N, C, L), (N, C, H, W), (N, C, D, H, W), or (N, ..., C) with
            ``axis=-1``. It is kept, not copied: leave it unchanged until the backward pass. A transpose, a slice or
            another array that is not C-contiguous is copied first, as are such a residual and such a dy.
        gamma, beta: shape (C,), dtype of x; None for 1 and 0. [y]
        running_mean, running_var: shape (C,), dtype of x, written in place in training; both or neither. A variance
            that float32 cannot hold is stored as the largest number of the dtype. [x], [x]^2
        training: whether to use, and record, the batch's statistics.
        momentum: weight of the new batch in the running statistics, in [0, 1].
        eps: > 0. [x]^2
        axis: 1 or -1: where the channels are.
        activation: None or ``"relu"``.
        residual: added before the activation; shape and dtype of x.
        out: C-contiguous array to write y to; shape and dtype of x. It may be `residual`. With training=False it may be
            x; there is then no backward pass, which needs x.

    Returns:
        (y, saved): y, and the argument of `batchnorm_backward`.

    Raises:
        TypeError, ValueError: naming the argument, before anything is written: a dtype, shape, memory order or range
            other than above, fewer than two values per channel in training, running statistics that are needed and are
            missing, negative or not finite, arrays that overlap.
        RuntimeError: the arrays are on a device that cannot be used here.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1.

    >>> import numpy as np
    >>> from fastopt.batchnorm import batchnorm_backward, batchnorm_forward
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
    >>> y, saved = batchnorm_forward(x, np.array([2.0, 1.0]), np.array([0.0, 5.0]), eps=1e-12)
    >>> y.round(6)
    array([[-2.,  5.],
           [ 2.,  5.]])
    >>> batchnorm_backward(np.array([[1.0, 1.0], [0.0, 0.0]]), saved).dgamma.round(6)
    array([-1.,  0.])
    """
    return forward_pass(
        x,
        gamma,
        beta,
        running_mean,
        running_var,
        training=training,
        momentum=momentum if type(momentum) is float else check_momentum(momentum),
        eps=eps,
        axis=axis,
        activation=activation,
        residual=residual,
        out=out,
        count=None,
    )


def forward_pass(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    *,
    training: bool,
    momentum: float | None,
    eps: float,
    axis: int,
    activation: str | None,
    residual: np.ndarray | None,
    out: np.ndarray | None,
    count: np.ndarray | None,
    ranks: SumsOfRanks | None = None,
) -> tuple[np.ndarray, Saved]:
    """As `batchnorm_forward`; with `momentum` None the running statistics average all batches counted in `count`.

    Args:
        x, gamma, beta, running_mean, running_var, training, eps, axis, activation, residual, out: as there.
        momentum: as there, or None.
        count: an array of one number, which goes up by 1 where the batch moves the running statistics; or None.
        ranks: in training on the CPU, adds up the sums of all ranks, of whose batch x is a part, which may be empty;
            or None.
    """
    key: tuple[Any, ...] = ()
    if (
        type(x) in QUICK_ARRAYS
        and type(axis) is int
        and type(eps) is float
        and LEAST_QUICK_EPS < eps < math.inf
        and (momentum is None or (type(momentum) is float and 0.0 <= momentum <= 1.0))
        and (training is True or (training is False and running_mean is not None))
        and (running_mean is None) == (running_var is None)
        and (activation is None or type(activation) is str)
    ):
        key = (type(x), x.shape, x.dtype, axis, activation, residual is None, gamma is None, beta is None, training)
        kind = KINDS.get(key)
        if kind is not None and kind.of_device:
            quick = _forward_on_device(
                kind, (x, residual, out), (gamma, beta, running_mean, running_var), eps, momentum, count
            )
            if quick is not None:
                return quick
        elif kind is not None and ranks is None:
            y = np.empty(x.shape, x.dtype) if out is None else out
            arrays = [x, residual, y, gamma, beta, running_mean, running_var]
            made = kind.quick(backward=False).forward(arrays, eps, momentum, None if running_mean is None else count)
            if made is not None:
                return y, Saved(kind, made[0], None if made[1] == 0 else x, y if kind.reads_y else None)
    axis, training = check_axis(axis), scalars.flag("training", training)
    shape = _check_x(x, axis)
    channels = shape[1]
    backend = get_backend(backend_of(x))
    if is_strided(x, backend) or is_strided(residual, backend):
        scalars.refuse_masked("residual", residual)
        return forward_pass(
            _contiguous(x, backend),
            gamma,
            beta,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            axis=axis,
            activation=activation,
            residual=_contiguous(residual, backend),
            out=out,
            count=count,
            ranks=ranks,
        )
    _check_memory("x", x)
    for name, array in (("gamma", gamma), ("beta", beta)):
        _check_channelwise(name, array, x, channels, backend)
    if (running_mean is None) != (running_var is None):
        missing, there = ("running_var", "running_mean") if running_var is None else ("running_mean", "running_var")
        raise ValueError(f"{missing}: must be an array, as {there} is, got None; pass both, or neither")
    _check_channelwise("running_mean", running_mean, x, channels, backend, written=training)
    _check_channelwise("running_var", running_var, x, channels, backend, written=training)
    eps = check_options(eps=eps, activation=activation, dtype=x.dtype)
    if momentum is not None:
        momentum = check_momentum(momentum)
    values = shape[0] * shape[2]
    if training:
        if values < 2 and ranks is None:
            raise ValueError(
                f"x: must have at least 2 values per channel in training, got {values} (shape {x.shape}); use a larger "
                f"batch, or training=False"
            )
        if running_mean is not None and running_var is not None:
            if backend.overlap(running_mean, running_var):
                raise _overlap("running_var", "running_mean")
            for name, array in (("gamma", gamma), ("beta", beta)):
                for written_name, written in (("running_mean", running_mean), ("running_var", running_var)):
                    if array is not None and backend.overlap(written, array):
                        raise _overlap(written_name, name)
    elif running_mean is None or running_var is None:
        raise ValueError(
            "running_mean: must be an array with training=False, got None; pass both statistics, or training=True"
        )
    elif backend.name == "cpu":  # reading it from a device would wait for the device
        check_statistics("running_mean", running_mean, "running_var", running_var)
    if residual is not None:
        check_like("residual", residual, x.shape, x.dtype, backend)
    overwritten = False
    if out is None:
        out = backend.empty(x.shape, x.dtype)
    else:
        check_like("out", out, x.shape, x.dtype, backend, written=True)
        overwritten = _check_same_or_apart("out", out, "x", x, backend)
        if training and overwritten:
            raise ValueError(
                "out: must not be x in training, whose backward pass needs x, got x; pass another array (it may be the "
                "residual), or training=False"
            )
        if residual is not None:
            _check_same_or_apart("out", out, "residual", residual, backend)
        for name, array in (
            ("gamma", gamma),
            ("beta", beta),
            ("running_mean", running_mean),
            ("running_var", running_var),
        ):
            if array is not None and backend.overlap(out, array):
                raise _overlap("out", name)

    of_device = backend.asynchronous
    if of_device:
        QUICK_ARRAYS.add(type(x))
        key = (type(x), x.shape, x.dtype, axis, activation, residual is None, gamma is None, beta is None, training)
    # On the CPU the compiled checks have refused it, unless there are ranks.
    kind = KINDS.get(key) if of_device or ranks is not None else None
    if kind is None:
        kind = Kind(
            backend,
            x.shape,
            np.dtype(x.dtype.type),
            axis=axis,
            activation=activation,
            residual=residual is not None,
            gamma=gamma is not None,
            beta=beta is not None,
            training=training,
        )
    state = kind.kernel.forward(
        shape,
        *(_flat(array, backend) for array in (x, residual, out)),
        (gamma, beta, running_mean, running_var),
        training=training,
        eps=eps,
        weight=momentum,
        count=None if running_mean is None else count,
        **({} if ranks is None else {"ranks": ranks}),
    )
    if key:
        _keep(key, kind)
    return out, Saved(
        kind,
        state,
        None if overwritten else x,
        out if kind.reads_y else None,
    )


def _forward_on_device(
    kind: Kind,
    whole: tuple[Any, Any, Any],
    channelwise: tuple[Any, Any, Any, Any],
    eps: float,
    momentum: float | None,
    count: Any,
) -> tuple[Any, Saved] | None:
    """Make a forward pass over arrays that are as the kernels need them; None where one is not, or two overlap.

    whole : x, residual and out. channelwise : gamma, beta and the running statistics.
    """
    backend: Any = kind.backend
    x, residual, out = whole
    given = [array for array in whole if array is not None]
    narrow = [array for array in channelwise if array is not None]
    where = backend.located(given, kind.shape, kind.dtype)
    at = None if where is None else backend.located(narrow, kind.view[1:2], kind.dtype)
    if at is None or not _apart(where, x.nbytes) or not _apart(at, kind.view[1] * x.itemsize):
        return None
    if out is None:
        out = backend.empty(kind.shape, kind.dtype)
    elif not _outside(at, where[-1], kind.view[1] * x.itemsize, x.nbytes):
        return None
    state = kind.kernel.forward(
        kind.view,
        x,
        residual,
        out,
        channelwise,
        training=kind.training,
        eps=eps,
        weight=momentum,
        count=None if channelwise[2] is None else count,
    )
    return out, Saved(kind, state, x, out if kind.reads_y else None)


def _backward_on_device(saved: Saved, x: Any, dy: Any, out: Any, of_gamma: Any, of_beta: Any) -> BatchNormGrads | None:
    """Make a backward pass over arrays that are as the kernels need them; None where one is not, or two overlap."""
    kind = saved._kind
    backend: Any = kind.backend
    channels, size = kind.view[1:2], kind.view[1] * kind.dtype.itemsize
    given = [array for array in (x, dy, saved._y, out) if array is not None]
    narrow = [array for array in (of_gamma, of_beta) if array is not None]
    where = backend.located(given, kind.shape, kind.dtype)
    if where is None or not _apart(where, x.nbytes):
        return None
    if narrow:
        at = backend.located(narrow, channels, kind.dtype)
        if at is None or not _apart(at, size) or not all(_outside(at, each, size, x.nbytes) for each in where):
            return None
    dx = backend.empty(kind.shape, kind.dtype) if out is None else out
    of_gamma = backend.empty(channels, kind.dtype) if of_gamma is None else of_gamma
    of_beta = backend.empty(channels, kind.dtype) if of_beta is None else of_beta
    of_residual = backend.empty(kind.shape, kind.dtype) if kind.reads_y else None
    sums = (of_gamma, of_beta)
    kind.kernel.backward(kind.view, x, dy, saved._y, (dx, of_residual), sums, saved._state, training=kind.training)
    saved._mark_used()
    return BatchNormGrads(
        dx,
        of_gamma if kind.gamma else None,
        of_beta if kind.beta else None,
        of_residual if kind.reads_y or not kind.residual else dy,
    )


def _apart(addresses: list[int], size: int) -> bool:
    """Whether arrays of `size` bytes at these addresses do not overlap."""
    end = -1
    for address in sorted(addresses):
        if address < end:
            return False
        end = address + size
    return True


def _outside(addresses: list[int], start: int, size: int, length: int) -> bool:
    """Whether arrays of `size` bytes at these addresses do not overlap with one of `length` bytes."""
    return all(address + size <= start or start + length <= address for address in addresses)


def batchnorm_backward(
    dy: np.ndarray,
    saved: Saved,
    *,
    out: np.ndarray | None = None,
    dgamma: np.ndarray | None = None,
    dbeta: np.ndarray | None = None,
) -> BatchNormGrads:
    """Return the gradients of `batchnorm_forward`.

    Formula: with dy zero where a fused ReLU left y <= 0 and m values per channel, ``dbeta = sum dy``,
    ``dgamma = sum dy xhat``, ``dx = gamma inv_std (dy - dbeta / m - xhat dgamma / m)``, ``dresidual = dy``; where the
    forward pass had training=False, mean and variance are constants and ``dx = gamma inv_std dy``

    No mask is stored: y > 0 is computed again from x, to the same bits. With a residual it is read from y: leave y
    unchanged until the backward pass.

    Args:
        dy: gradient of the loss with respect to y; shape and dtype of x. It is copied if it is not C-contiguous.
        saved: what `batchnorm_forward` returned. It serves one call.
        out: C-contiguous array to write dx to; shape and dtype of x. It may be dy or x.
        dgamma, dbeta: arrays of shape (C,) to write these gradients to, which replace their content.

    Returns:
        `BatchNormGrads` (dx, dgamma, dbeta, dresidual).

    Raises:
        TypeError, ValueError: naming the argument, before anything is written: a dtype, shape or memory order other
            than that of x, arrays that overlap, a destination for a gradient that does not exist, an x that the forward
            pass has overwritten.
        RuntimeError: `saved` was used before.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3.

    >>> import numpy as np
    >>> from fastopt.batchnorm import batchnorm_backward, batchnorm_forward
    >>> y, saved = batchnorm_forward(np.array([[0.0], [1.0], [2.0]]), activation="relu")
    >>> grads = batchnorm_backward(np.ones((3, 1)), saved)
    >>> bool(abs(grads.dx.sum()) < 1e-12), grads.dgamma is None
    (True, True)
    """
    return backward_pass(dy, saved, out, dgamma, dbeta)


def backward_pass(
    dy: np.ndarray,
    saved: Saved,
    out: np.ndarray | None,
    dgamma: np.ndarray | None,
    dbeta: np.ndarray | None,
    ranks: SumsOfRanks | None = None,
) -> BatchNormGrads:
    """As `batchnorm_backward`; with `ranks`, which the forward pass had as well, dx is that of the batch of all."""
    if ranks is None and type(saved) is Saved and not saved.used and (saved._kind.gamma or dgamma is None):
        kind, x = saved._kind, saved._x
        quick = x is not None and type(x) is np.ndarray and (not kind.residual or out is None)
        if kind.of_device and x is not None and (kind.beta or dbeta is None):
            made = _backward_on_device(saved, x, dy, out, dgamma, dbeta)
            if made is not None:
                return made
        elif quick and (kind.beta or dbeta is None):
            dx = np.empty(kind.shape, kind.dtype) if out is None else out
            of_gamma = np.empty(kind.view[1], kind.dtype) if dgamma is None else dgamma
            of_beta = np.empty(kind.view[1], kind.dtype) if dbeta is None else dbeta
            of_residual = np.empty(kind.shape, kind.dtype) if kind.reads_y else None
            arrays = [x, dy, saved._y, dx, of_residual, of_gamma, of_beta, saved._state]
            if kind.quick(backward=True).backward(arrays):
                saved._mark_used()
                return BatchNormGrads(
                    dx,
                    of_gamma if kind.gamma else None,
                    of_beta if kind.beta else None,
                    of_residual if kind.reads_y or not kind.residual else dy,
                )
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: must be what batchnorm_forward returned, got {type(saved).__name__}")
    if saved.used:
        raise RuntimeError(
            "saved: must be good for one backward pass, got one that was used; call batchnorm_forward again"
        )
    x = saved._x
    if x is None:
        raise ValueError(
            "saved: must be of a forward pass that kept x, got one that wrote y over x (out=x); call batchnorm_forward "
            "with another out"
        )
    kind = saved._kind
    backend = kind.backend
    if is_strided(dy, backend):
        scalars.refuse_masked("dy", dy)
        return backward_pass(_contiguous(dy, backend), saved, out, dgamma, dbeta, ranks)
    check_like("dy", dy, saved.shape, saved.dtype, backend)
    y = saved._y
    if out is not None:
        check_like("out", out, saved.shape, saved.dtype, backend, written=True)
        for name, array in (("x", x), ("dy", dy), ("y", y)):
            if array is not None:
                _check_same_or_apart("out", out, name, array, backend)
    channels = kind.view[1]
    sums = []
    for name, array, present in (("dgamma", dgamma, kind.gamma), ("dbeta", dbeta, kind.beta)):
        if array is None:
            sums.append(backend.empty((channels,), saved.dtype))
            continue
        if not present:
            raise ValueError(f"{name}: must be None where the forward pass had no {name[1:]}, got an array")
        _check_channelwise(name, array, x, channels, backend, written=True)
        for other_name, other in (("dy", dy), ("x", x), ("y", y), ("out", out), *zip(("dgamma",), sums, strict=False)):
            if other is not None and backend.overlap(array, other):
                raise _overlap(name, other_name)
        sums.append(array)

    dresidual = None
    if kind.reads_y:
        dresidual = backend.empty(kind.shape, kind.dtype)
    elif kind.residual:
        dresidual = dy.copy() if out is not None and backend.overlap(out, dy) else dy
    if out is None:
        out = backend.empty(kind.shape, kind.dtype)
    kind.kernel.backward(
        kind.view,
        *(_flat(array, backend) for array in (x, dy, y)),
        (_flat(out, backend), _flat(dresidual, backend) if kind.reads_y else None),
        tuple(sums),
        saved._state,
        training=kind.training,
        **({} if ranks is None else {"ranks": ranks}),
    )
    saved._mark_used()
    return BatchNormGrads(out, sums[0] if kind.gamma else None, sums[1] if kind.beta else None, dresidual)


def _flat(array: Any, backend: Backend) -> Any:
    """A contiguous array as the kernels of the backend take it: 1-D on the CPU, of any shape on a device."""
    return array if array is None or backend.asynchronous else array.reshape(-1)


# --- the checks -------------------------------------------------------------------------------------------------------


def check_options(*, eps: Any, activation: Any, dtype: np.dtype[Any]) -> float:
    """Return eps as a float; refuse options out of their range."""
    number = scalars.number("eps", eps, "a finite number > 0")
    if not (math.isfinite(number) and number > 0.0):
        raise ValueError(f"eps: must be a finite number > 0, got {eps!r}")
    scalars.check_eps("eps", number, dtype)
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise ValueError(f"activation: must be None or 'relu', got {scalars.shown(activation)}")
    return number


def check_momentum(momentum: Any) -> float:
    """Return the weight of the new batch as a float; refuse one that is not in [0, 1]."""
    if momentum is None:
        raise ValueError(
            "momentum: must be a number in [0, 1], got None; for the average over all batches pass 1 / (batches seen, "
            "including this one), or use the layer BatchNorm(momentum=None), which counts them"
        )
    number = scalars.number("momentum", momentum, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"momentum: must be a number in [0, 1], got {momentum!r}")
    return number


def check_axis(axis: Any) -> int:
    """Return 1 or -1; refuse any other axis."""
    found = scalars.real(axis)
    if not isinstance(found, int) or found not in AXES:
        raise ValueError(f"axis: must be 1 for (N, C, ...) or -1 for (N, ..., C), got {scalars.shown(axis)}")
    return found


def _check_x(x: Any, axis: int) -> tuple[int, int, int]:
    scalars.refuse_masked("x", x)
    backend = get_backend(backend_of(x))
    if not isinstance(x, backend.array_type):
        raise TypeError(f"x: must be a NumPy array, got {type(x).__name__}; use np.asarray(x)")
    check_device("x", x, backend, backend.device, "the current one")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"x: must be float32 or float64 in native byte order, got dtype {scalars.dtype_name(x.dtype)}; use "
            f"x.astype('float32')"
        )
    if x.ndim < 2:
        layout = "(N, C) or (N, C, ...)" if axis == 1 else "(N, ..., C)"
        raise ValueError(f"x: must have shape {layout}, got {x.shape}")
    view = _view(x.shape, axis)
    if view[1] == 0:
        raise ValueError(f"x: must have at least one channel, got shape {x.shape} with axis={axis}")
    return view


def _view(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """Return (samples, channels, spatial), the shape of the array in memory."""
    if axis == -1:
        return math.prod(shape[:-1]), shape[-1], 1
    return shape[0], shape[1], math.prod(shape[2:])


def is_strided(array: Any, backend: Backend) -> bool:
    """Whether an array of the backend has other strides than the kernels read: a transpose, a slice, a broadcast."""
    return isinstance(array, backend.array_type) and not array.flags.c_contiguous


def _contiguous(array: Any, backend: Backend) -> Any:
    """The array, or its copy if it is strided."""
    return array.copy("C") if is_strided(array, backend) else array


def _check_memory(name: str, array: np.ndarray, written: bool = False) -> None:
    flags = array.flags
    if not flags.c_contiguous:
        raise ValueError(f"{name}: must be C-contiguous, got strides {array.strides}; use np.ascontiguousarray({name})")
    if not getattr(flags, "aligned", True):  # CuPy's always are
        raise ValueError(
            f"{name}: must be aligned, got an address that is not a multiple of {array.itemsize} bytes; pass a copy"
        )
    if written and not getattr(flags, "writeable", True):
        raise ValueError(f"{name}: must be writeable, got a read-only array")


def check_like(
    name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype[Any], backend: Backend, written: bool = False
) -> None:
    """Refuse an array that is not of this shape and dtype, contiguous, on this backend; written: or not writeable."""
    _check_place(name, array, backend)
    if array.dtype != dtype:
        raise TypeError(f"{name}: must be of dtype {dtype}, got {scalars.dtype_name(array.dtype)}; use astype")
    if array.shape != shape:
        raise ValueError(f"{name}: must have shape {shape}, got {array.shape}")
    _check_memory(name, array, written)


def check_statistics(mean_name: str, mean: np.ndarray, var_name: str, var: np.ndarray) -> None:
    """Refuse running statistics that are not finite, and variances below 0."""
    for name, array in ((mean_name, mean), (var_name, var)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: must be finite, got {array[~np.isfinite(array)][0]}")
    if not (var >= 0.0).all():
        raise ValueError(f"{var_name}: must be >= 0, got {var[~(var >= 0.0)][0]}")


def _check_place(name: str, array: Any, backend: Backend, none: str = "") -> None:
    """Refuse anything but an array of this backend."""
    scalars.refuse_masked(name, array)
    if not isinstance(array, backend.array_type):
        expected = "a NumPy array" if backend.name == "cpu" else "an array of the device, as x is,"
        raise TypeError(f"{name}: must be {expected}{none}, got {type(array).__name__}")
    check_device(name, array, backend, backend.device, "the current one")


def _check_channelwise(
    name: str, array: Any, x: np.ndarray, channels: int, backend: Backend, written: bool = False
) -> None:
    if array is None:
        return
    _check_place(name, array, backend, " or None")
    if array.dtype != x.dtype:
        raise TypeError(
            f"{name}: must be of dtype {x.dtype}, as x is, got {scalars.dtype_name(array.dtype)}; use astype"
        )
    if array.shape != (channels,):
        raise ValueError(
            f"{name}: must have shape ({channels},), one number per channel of x {x.shape}, got {array.shape}"
        )
    _check_memory(name, array, written)


def _check_same_or_apart(name: str, array: Any, other_name: str, other: Any, backend: Backend) -> bool:
    """Return whether two arrays of one shape are the same memory; refuse those that share only some of it."""
    if not backend.overlap(array, other):
        return False
    if backend.address(array) != backend.address(other):
        raise ValueError(
            f"{name}: must be {other_name} or share no memory with it, got an array that overlaps it; pass another"
        )
    return True


def _overlap(name: str, other_name: str) -> ValueError:
    return ValueError(
        f"{name}: must share no memory with {other_name}, got an array that overlaps it; pass another array"
    )
