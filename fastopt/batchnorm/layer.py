"""`BatchNorm`: the functional pair with its parameters, gradients and running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt import scalars
from fastopt.batchnorm.functional import (
    DTYPES,
    Saved,
    backward_pass,
    check_axis,
    check_like,
    check_momentum,
    check_options,
    check_statistics,
    forward_pass,
)
from fastopt.batchnorm.synchronized import BACKWARD, FORWARD, Exchange
from fastopt.communicators import communicator_of
from fastopt.kernels import get_backend
from fastopt.kernels.contract import Backend
from fastopt.signals import deferred_signals
from fastopt.step.ranks import Ranks
from fastopt.storage.flat import check_apart

STATE_FORMAT = 1


class BatchNorm:
    """Batch normalisation, optionally with a fused residual addition and ReLU.

    Formula: ``y = gamma (x - mean) / sqrt(var + eps) + beta``; see `batchnorm_forward`

    Its parameters can live in an optimizer's buffer: put ``bn.params`` in the optimizer's tree, then `attach` the
    leaves of that tree. The forward pass reads gamma and beta there, and the backward pass writes their gradients
    there. With ``bn.state`` in the tree, the running statistics live there as well; see `state`.

    Args:
        num_features: number of channels C, >= 1.
        momentum: weight of the new batch in the running statistics, in [0, 1]; None for the average over all batches
            seen.
        eps: added to the variance, > 0.
        affine: whether the layer has gamma and beta.
        track_running_stats: whether the layer has running statistics. Without them, inference uses those of the batch.
        axis: 1 for (N, C) and (N, C, ...), -1 for (N, ..., C).
        activation: None or ``"relu"``.
        dtype: float32 or float64, of x, parameters and running statistics.
        backend: ``"auto"`` (the CPU), ``"cpu"`` or ``"cuda"``: where the arrays of the layer, and x, are.
        comm: of a run on several processes, their communicator, as for an optimizer: of MPI or gloo, not of NCCL. In
            training the statistics are then those of the batches of all of them together (SyncBN), and so is dx; see
            below.

    With `comm`, every process calls `forward` and `backward`, each with its part of the batch, which may be of any
    size, or empty. The moments of the parts are merged in the order of ranks by Chan's formula, so the running
    statistics are the same on all ranks, to the bit. Evaluation exchanges nothing. The gradients of gamma and beta are
    those of the own part: an optimizer with `comm` adds them up. dx is the gradient of the sum of what the ranks have
    as their loss: where their parts differ in size, divide each loss by the rows of all parts, and pass
    ``reduction="sum"`` to `Optimizer.step`. An error on one rank, before anything is exchanged, is one on all.

    Attributes:
        params, grads: dicts of ``"gamma"`` and ``"beta"``, arrays of shape (C,) that begin as 1 and 0, and of their
            gradients; empty where affine is False.
        running_mean, running_var: of shape (C,); they begin as 0 and 1; None where track_running_stats is False.
        num_batches_tracked: the number of batches in the running statistics; a batch with a NaN or an infinity is not
            one of them. May be set. On a device, reading it waits for the device.

    Raises:
        TypeError, ValueError: naming the argument that is out of range.
        RuntimeError: the backend cannot work here. `CommunicatorError`: the layers of the ranks differ.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167; Chan, Golub and LeVeque 1983, Algorithms for
    computing the sample variance.

    >>> import numpy as np, fastopt
    >>> from fastopt.batchnorm import BatchNorm
    >>> bn = BatchNorm(3, activation="relu", dtype=np.float64)
    >>> opt = fastopt.SGD({"W": np.ones((5, 3)), "bn": bn.params}, lr=1.0)
    >>> bn.attach(opt.params["bn"], opt.grads["bn"])
    >>> y = bn.forward(np.arange(12.0).reshape(4, 3))
    >>> dx = bn.backward(np.ones((4, 3)))
    >>> opt.grads["bn"]["beta"]
    array([2., 2., 2.])
    >>> _ = opt.step()
    >>> bn.params["beta"]
    array([-2., -2., -2.])
    """

    params: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    running_mean: np.ndarray | None
    running_var: np.ndarray | None
    _count: np.ndarray
    num_features: int
    momentum: float | None
    eps: float
    affine: bool
    track_running_stats: bool
    axis: int
    activation: str | None
    dtype: np.dtype[Any]
    backend: str
    _backend: Backend
    _ranks: Ranks | None

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        track_running_stats: bool = True,
        axis: int = 1,
        activation: str | None = None,
        dtype: Any = np.float32,
        backend: str = "auto",
        comm: Any = None,
    ):
        found = communicator_of(comm)
        self._ranks = None if found is None else Ranks(found)
        if self._ranks is None:
            self._make(num_features, momentum, eps, affine, track_running_stats, axis, activation, dtype, backend)
            return
        with self._ranks.together("BatchNorm") as same:
            self._make(num_features, momentum, eps, affine, track_running_stats, axis, activation, dtype, backend)
            if self._backend.name != "cpu":
                raise ValueError(
                    f"comm: must be None with backend={backend!r}, whose kernels exchange no sums, got a communicator"
                )
            same.append(("num_features and options", f"{self!r}".encode()))

    def _make(
        self,
        num_features: int,
        momentum: float | None,
        eps: float,
        affine: bool,
        track_running_stats: bool,
        axis: int,
        activation: str | None,
        dtype: Any,
        backend: str,
    ) -> None:
        self.num_features = scalars.count("num_features", num_features, 1)
        self.momentum = None if momentum is None else check_momentum(momentum)
        self.axis = check_axis(axis)
        self.dtype = np.dtype(dtype)
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype: must be float32 or float64, got {dtype!r}")
        self.backend = "cpu" if backend == "auto" else backend
        self._backend = get_backend(self.backend)
        self.eps = check_options(eps=eps, activation=activation, dtype=self.dtype)
        self.affine = scalars.flag("affine", affine)
        self.track_running_stats = scalars.flag("track_running_stats", track_running_stats)
        self.activation = activation
        self.params, self.grads = {}, {}
        if self.affine:
            self.params = {"gamma": self._filled(1.0), "beta": self._filled(0.0)}
            self.grads = {"gamma": self._filled(0.0), "beta": self._filled(0.0)}
        self.running_mean = self._filled(0.0) if self.track_running_stats else None
        self.running_var = self._filled(1.0) if self.track_running_stats else None
        # An array, on the device as well: there the host does not wait to learn whether a batch was recorded.
        self._count = self._backend.zeros(1, self.dtype if momentum is None else np.dtype(np.float64))
        self._saved: Saved | None = None

    def _filled(self, value: float) -> np.ndarray:
        array: np.ndarray = self._backend.empty((self.num_features,), self.dtype)
        array[...] = value
        return array

    def __repr__(self) -> str:
        options = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in ("momentum", "eps", "affine", "track_running_stats", "axis", "activation")
        )
        return f"<BatchNorm({self.num_features}, {options}) of {self.dtype}, {self.num_batches_tracked} batches seen>"

    @property
    def num_batches_tracked(self) -> int:
        """The number of batches in the running statistics: see the class. Assign an int >= 0.

        Raises:
            TypeError, ValueError: what is assigned is not an int >= 0.

        >>> import numpy as np, fastopt
        >>> bn = fastopt.BatchNorm(1, dtype=np.float64)
        >>> for x in ([[1.0], [3.0]], [[1.0], [np.nan]]):
        ...     y = bn.forward(np.array(x))
        >>> bn.num_batches_tracked, bn.running_mean
        (1, array([0.2]))
        """
        return round(float(self._backend.host(self._count)[0]))

    @num_batches_tracked.setter
    def num_batches_tracked(self, count: int) -> None:
        self._count[...] = float(scalars.count("num_batches_tracked", count, 0))

    @property
    def state(self) -> dict[str, np.ndarray]:
        """The parameters and the running statistics, if tracked: put them in an optimizer's tree, then `attach`.

        `Optimizer.save` and `Optimizer.load` then keep the running statistics with the parameters. Their gradients
        stay zero, so that a step leaves them unchanged, with three exceptions:

        - weight decay, which must be off for them: ``overrides={"*.running_*": {"weight_decay": 0.0}}``;
        - contexts that exchange the parameters: statistics recorded inside ``with opt.lookahead()`` are undone at its
          end, and ``with opt.swap_ema()`` shows the average of the running statistics as well;
        - a rule that divides by a gradient (``eps=0``), or keeps the parameters in its states (schedule-free ones).

        If one of these applies, use `params` and `state_dict`. With ``momentum=None``, ``running_count`` is the number
        of batches that the running statistics average, an array of shape (1,), exact up to 2**24 in float32.

        >>> import numpy as np, fastopt
        >>> from fastopt.batchnorm import BatchNorm
        >>> bn = BatchNorm(2, momentum=0.5, dtype=np.float64)
        >>> keep = {"*.running_*": {"weight_decay": 0.0}}
        >>> opt = fastopt.AdamW({"W": np.ones((3, 2)), "bn": bn.state}, overrides=keep)
        >>> bn.attach(opt.params["bn"], opt.grads["bn"])
        >>> y = bn.forward(np.array([[0.0, 1.0], [2.0, 5.0]]))
        >>> opt.params["bn"]["running_mean"]
        array([0.5, 1.5])
        """
        state = dict(self.params)
        if self.running_mean is not None and self.running_var is not None:
            state.update(running_mean=self.running_mean, running_var=self.running_var)
            if self.momentum is None:
                state.update(running_count=self._count)
        return state

    def attach(self, params: Mapping[str, np.ndarray], grads: Mapping[str, np.ndarray]) -> None:
        """Use these arrays for gamma, beta and their gradients from now on: an optimizer's views of its buffers.

        Args:
            params: dict of arrays of shape (C,), ``opt.params[...]`` of an optimizer whose tree held ``bn.params``, or
                ``bn.state``: the running statistics are then read and written there as well. The values in these arrays
                replace those of the layer.
            grads: dict of arrays of shape (C,), ``opt.grads[...]`` of the same tree. The gradients of the running
                statistics are not written.

        Raises:
            TypeError, ValueError: naming the array: other keys, shapes or dtypes than the layer's, read-only arrays,
                two that share memory; the layer is then unchanged.

        >>> import numpy as np, fastopt
        >>> bn = fastopt.BatchNorm(2, dtype=np.float64)
        >>> opt = fastopt.SGD({"bn": bn.params})
        >>> bn.attach(opt.params["bn"], opt.grads["bn"])
        >>> opt.params["bn"]["gamma"][0] = 7.0
        >>> bn.params["gamma"]
        array([7., 1.])
        """
        own = self.state
        keys = set(self.params)
        if isinstance(params, Mapping) and set(params) == set(own):
            keys = set(own)
        for name, tree in (("params", params), ("grads", grads)):
            if not isinstance(tree, Mapping) or set(tree) != keys:
                found = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
                both = f"; or pass {sorted(own)} in both" if len(own) > len(self.params) else ""
                raise ValueError(f"{name}: must be a dict with the keys {sorted(keys)}, got {found}{both}")
            for key, array in tree.items():
                check_like(f"{name}[{key!r}]", array, own[key].shape, self.dtype, self._backend, written=True)
        apart = {f"params[{key!r}]": params[key] for key in params} | {f"grads[{key!r}]": grads[key] for key in grads}
        if len(keys) < len(own):  # the running statistics stay where they are
            apart |= {key: own[key] for key in set(own) - keys}
        check_apart(apart, self._backend)
        names = tuple(self.params)
        self.params = {key: params[key] for key in names}
        self.grads = {key: grads[key] for key in names}
        if len(keys) > len(names):
            self.running_mean, self.running_var = params["running_mean"], params["running_var"]
            self._count = params.get("running_count", self._count)

    def forward(
        self,
        x: np.ndarray,
        training: bool = True,
        residual: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Normalise x: in training with the statistics of the batch, which are recorded, else with the running ones.

        A batch with a NaN or an infinity is not recorded: the running statistics and their count stay.

        Args:
            x: of shape (N, C), (N, C, ...), or (N, ..., C) with ``axis=-1``, of the layer's dtype. Kept for `backward`,
                not copied; an array that is not C-contiguous is copied.
            training: which statistics to use.
            residual: added before the activation; shape of x.
            out: array to write y to, shape of x; see `batchnorm_forward`.

        Returns:
            y, in the shape of x.

        Raises:
            TypeError, ValueError, RuntimeError: as `batchnorm_forward`, before anything is changed.

        >>> import numpy as np
        >>> from fastopt.batchnorm import BatchNorm
        >>> bn = BatchNorm(2, momentum=0.5, dtype=np.float64)
        >>> y = bn.forward(np.array([[0.0, 1.0], [2.0, 5.0]]))
        >>> bn.running_mean, bn.running_var
        (array([0.5, 1.5]), array([1.5, 4.5]))
        """
        use_batch = scalars.flag("training", training) or not self.track_running_stats
        if self._ranks is None or not use_batch:
            return self._forward(x, use_batch, residual, out, None)
        with Exchange(self._ranks.comm, self.num_features, FORWARD).shared() as ranks:
            return self._forward(x, use_batch, residual, out, ranks)

    def _forward(self, x: Any, use_batch: bool, residual: Any, out: Any, ranks: Exchange | None) -> np.ndarray:
        array = isinstance(x, self._backend.array_type)
        if not array and self.backend != "cpu":
            raise TypeError(f"x: must be an array of the device, as the layer is, got {type(x).__name__}")
        if array and x.dtype != self.dtype:
            raise TypeError(f"x: must be of dtype {self.dtype}, as the layer is, got {scalars.dtype_name(x.dtype)}")
        if array and x.ndim >= 2 and x.shape[self.axis] != self.num_features:
            raise ValueError(
                f"x: must have {self.num_features} channels (num_features) on axis {self.axis}, got shape {x.shape}"
            )
        y, self._saved = forward_pass(
            x,
            self.params.get("gamma"),
            self.params.get("beta"),
            self.running_mean,
            self.running_var,
            training=use_batch,
            momentum=self.momentum,
            eps=self.eps,
            axis=self.axis,
            activation=self.activation,
            residual=residual,
            out=out,
            count=self._count,
            ranks=ranks,
        )
        return y

    def __call__(self, x: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        """Return what `forward` returns, as layers of torch and Keras are called.

        >>> import numpy as np, fastopt
        >>> bn = fastopt.BatchNorm(1)
        >>> bn(np.array([[1.0], [3.0]], np.float32)).round(3).tolist()
        [[-1.0], [1.0]]
        """
        return self.forward(x, *args, **kwargs)

    def backward(self, dy: np.ndarray, out: np.ndarray | None = None) -> Any:
        """Return the gradient with respect to x of the last forward pass; write those of gamma and beta to ``grads``.

        They replace what is there. To add up micro-batches of an attached layer, pass ``opt.grads`` to
        `Optimizer.accumulate` after each backward pass.

        Args:
            dy: gradient with respect to y; shape and dtype of x.
            out: array to write dx to, shape of x; it may be dy or x.

        Returns:
            dx, in the shape of x; where the forward pass had a residual, (dx, dresidual).

        Raises:
            RuntimeError: no forward pass since the last backward pass.
            TypeError, ValueError: as `batchnorm_backward`, before anything is changed.

        >>> import numpy as np
        >>> from fastopt.batchnorm import BatchNorm
        >>> bn = BatchNorm(1, dtype=np.float64)
        >>> y = bn.forward(np.array([[1.0], [2.0], [4.0]]))
        >>> dx = bn.backward(np.array([[1.0], [0.0], [0.0]]))
        >>> bn.grads["beta"]
        array([1.])
        """
        saved = self._saved
        if self._ranks is None or (saved is not None and not saved.training):
            return self._backward(dy, out, None)
        with Exchange(self._ranks.comm, self.num_features, BACKWARD).shared() as ranks:
            return self._backward(dy, out, ranks)

    def _backward(self, dy: Any, out: Any, ranks: Exchange | None) -> Any:
        if self._saved is None:
            raise RuntimeError(
                "backward: must follow a forward pass, got none since the last backward pass; call forward first"
            )
        residual = self._saved._kind.residual
        of_gamma, of_beta = self.grads.get("gamma"), self.grads.get("beta")
        grads = backward_pass(dy, self._saved, out, of_gamma, of_beta, ranks)
        self._saved = None
        return (grads.dx, grads.dresidual) if residual else grads.dx

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the running statistics, as plain data and copies of arrays. The optimizer keeps gamma and beta.

        Keys: ``format``, ``running_mean``, ``running_var`` (None where they are not tracked), ``num_batches_tracked``.

        >>> from fastopt.batchnorm import BatchNorm
        >>> BatchNorm(2).state_dict()["running_var"]
        array([1., 1.], dtype=float32)
        """
        mean, var = self.running_mean, self.running_var
        return {
            "format": STATE_FORMAT,
            "running_mean": None if mean is None else self._backend.host(mean).copy(),
            "running_var": None if var is None else self._backend.host(var).copy(),
            "num_batches_tracked": self.num_batches_tracked,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the running statistics of a `state_dict` into the arrays of the layer.

        Args:
            state: what `state_dict` returned.

        Raises:
            TypeError, ValueError: naming what differs (keys, a newer format, shapes, dtype, statistics that only one
                side tracks, numbers that are not finite); the layer is then unchanged.

        >>> import numpy as np, fastopt
        >>> bn, twin = (fastopt.BatchNorm(1, momentum=0.5, dtype=np.float64) for _ in range(2))
        >>> _ = bn.forward(np.array([[1.0], [3.0]]))
        >>> twin.load_state_dict(bn.state_dict())
        >>> twin.running_mean, twin.num_batches_tracked
        (array([1.]), 1)
        """
        keys = {"format", "running_mean", "running_var", "num_batches_tracked"}
        if not isinstance(state, Mapping) or set(state) != keys:
            raise TypeError(
                "state: must be what state_dict() returned, got "
                + (
                    f"a dict with the keys {sorted(map(str, state))}"
                    if isinstance(state, Mapping)
                    else type(state).__name__
                )
            )
        if state["format"] != STATE_FORMAT:
            raise ValueError(f"state['format']: must be {STATE_FORMAT}, got {state['format']!r}; use a newer fastopt")
        count = state["num_batches_tracked"]
        count = scalars.count("state['num_batches_tracked']", count, 0)
        for name in ("running_mean", "running_var"):
            own, new = getattr(self, name), state[name]
            if (own is None) != (new is None):
                wanted, got = ("None", "an array") if own is None else ("an array", "None")
                raise ValueError(f"state[{name!r}]: must be {wanted}, as in the layer, got {got} (track_running_stats)")
            if own is None:
                continue
            check_like(f"state[{name!r}]", new, own.shape, self.dtype, get_backend("cpu"))
        if self.running_var is not None:
            means, variances = state["running_mean"], state["running_var"]
            check_statistics("state['running_mean']", means, "state['running_var']", variances)
        with deferred_signals:
            if self.running_mean is not None and self.running_var is not None:
                self._backend.copy(self.running_mean, state["running_mean"])
                self._backend.copy(self.running_var, state["running_var"])
            self.num_batches_tracked = count
