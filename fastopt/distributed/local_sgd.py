"""`LocalSGD`: ranks that train for many steps on their own, and then agree on the parameters."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt import scalars
from fastopt.optimizer import Optimizer
from fastopt.step.ranks import Ranks

if TYPE_CHECKING:
    from fastopt.step.info import StepInfo

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
KEPT = "local_sgd"
"""Where, in the file of the outer optimizer, it is said which files belong to it."""


class LocalSGD:
    """Local steps of one optimizer on each rank; every H of them, a step of an outer optimizer on all (DiLoCo).

    Formula: with x the parameters after the last outer step, and y those of a rank after H local steps since then, the
    outer optimizer makes a step from x with the gradient ``mean over ranks of (x - y)``; every rank goes on from there.
    With the outer ``SGD(lr=1)`` this is the mean of the parameters.

    Ranks exchange as much as in one step of data parallelism, once in H steps. Every rank must make the same number of
    steps. After an outer step all have the same parameters, to the bit; the states of the inner optimizers, such as
    Adam's moments, stay those of their rank. After the last step, call `synchronize`.

    Args:
        inner: the optimizer of this rank's steps, without ``comm``, of parameters in float32 or float64. Its rule must
            have no states that begin at the parameters, as schedule-free ones have. An average (``ema``) is that of
            this rank's parameters.
        outer: an optimizer of the same parameters with ``comm``: `Nesterov` with ``lr=0.7`` and ``momentum=0.9`` is
            the choice of the paper. Its own options hold: ``shard``, ``order``, ``wire``, ``nonfinite="skip"``.
        every: H, an int from 1: how many local steps come before an outer step.

    Attributes:
        inner, outer, every: as given.

    Raises:
        TypeError, ValueError: naming the argument, before anything is changed.

    Source: Douillard et al. 2023, https://arxiv.org/abs/2311.08105; Stich 2018, https://arxiv.org/abs/1805.09767

    >>> import numpy as np, fastopt
    >>> def train(comm):
    ...     inner = fastopt.SGD({"w": np.zeros(1)}, lr=0.1)
    ...     outer = fastopt.SGD(inner.params, lr=1.0, comm=comm)
    ...     opt = fastopt.distributed.LocalSGD(inner, outer=outer, every=2)
    ...     for _ in range(2):
    ...         _ = opt.step({"w": np.array([1.0 + comm.rank])})
    ...     return opt.params["w"].round(6)
    >>> fastopt.distributed.run_threads(2, train)
    [array([-0.3]), array([-0.3])]
    """

    def __init__(self, inner: Optimizer, *, outer: Optimizer, every: int):
        for name, given in (("inner", inner), ("outer", outer)):
            if not isinstance(given, Optimizer):
                raise TypeError(f"{name}: must be an optimizer of fastopt, got {type(given).__name__}")
        self.every = scalars.count("every", every, 1)
        ranks = outer._ranks
        if ranks is None:
            raise ValueError("outer: must be an optimizer with comm=, got one of one process")
        if inner._ranks is not None:
            raise ValueError("inner: must be an optimizer of one process, got one with comm=; pass that as outer")
        for what in ("paths", "shapes", "dtype"):
            expected, found = getattr(outer.flat, what), getattr(inner.flat, what)
            if found != expected:
                raise ValueError(f"inner: must have the {what} of outer, {expected}, got {found}")
        if inner.flat.dtype not in DTYPES:
            raise ValueError(f"inner: must have parameters in float32 or float64, got {inner.flat.dtype}")
        born = [name for name, value in inner.rule.initial.items() if value == "p"]
        if born:
            raise ValueError(
                f"inner: must be of a rule whose states do not begin at the parameters, got {inner.rule.name!r} with "
                f"{', '.join(born)}; the outer step would not move them"
            )
        self.inner, self.outer = inner, outer
        self._ranks: Ranks = ranks
        self._steps = 0
        """Local steps so far; and how many of them since the last outer one."""
        self._since = 0

    def __repr__(self) -> str:
        return f"<LocalSGD(every={self.every}) of {self.inner!r}, {self._since} steps after those of {self.outer!r}>"

    @property
    def params(self) -> Any:
        """The parameters of this rank: those of the inner optimizer."""
        return self.inner.params

    @property
    def grads(self) -> Any:
        """The gradients of this rank: those of the inner optimizer."""
        return self.inner.grads

    @property
    def step_count(self) -> int:
        """How many local steps this rank has made."""
        return self._steps

    def step(self, grads: Any = None, grad_scale: float = 1.0, **options: Any) -> StepInfo:
        """Make a local step and, after `every` of them, the outer one, in which all ranks meet.

        Args:
            grads, grad_scale, options: as for `Optimizer.step`.

        Returns:
            `StepInfo` of the local step.

        Raises:
            TypeError, ValueError, FloatingPointError, RuntimeError: as `Optimizer.step`. Where the local step has
                raised, it does not count, and the other ranks wait: end them. Where the outer step has raised, it has
                changed nothing, and the next call tries again.

        >>> import numpy as np, fastopt
        >>> def train(comm):
        ...     inner = fastopt.SGD({"w": np.zeros(1)}, lr=1.0)
        ...     outer = fastopt.Nesterov(inner.params, lr=0.5, momentum=0.5, comm=comm)
        ...     opt = fastopt.distributed.LocalSGD(inner, outer=outer, every=1)
        ...     _ = opt.step({"w": np.array([2.0 * comm.rank])})
        ...     return opt.params["w"]
        >>> fastopt.distributed.run_threads(2, train)
        [array([-0.75]), array([-0.75])]
        """
        info = self.inner.step(grads, grad_scale, **options)
        self._steps += 1
        self._since += 1
        if self._since >= self.every:
            self.synchronize()
        return info

    def synchronize(self) -> StepInfo | None:
        """Make the outer step now, unless there was no local step since the last one. Every rank calls this.

        Returns:
            `StepInfo` of the outer step, or None.

        Raises:
            CommunicatorError, FloatingPointError: as `Optimizer.step`; nothing was changed.

        >>> import numpy as np, fastopt
        >>> def train(comm):
        ...     inner = fastopt.SGD({"w": np.zeros(1)}, lr=1.0)
        ...     opt = fastopt.distributed.LocalSGD(inner, outer=fastopt.SGD(inner.params, lr=1.0, comm=comm), every=9)
        ...     _ = opt.step({"w": np.array([2.0 * comm.rank])})
        ...     _ = opt.synchronize()
        ...     return opt.params["w"], opt.synchronize()
        >>> fastopt.distributed.run_threads(2, train)
        [(array([-1.]), None), (array([-1.]), None)]
        """
        if self._since == 0:
            return None
        self.inner.flush_rows()
        ours, theirs = self.inner.flat, self.outer.flat
        for change, before, after in zip(theirs.grad_arrays, theirs.arrays, ours.arrays, strict=True):
            change[...] = before
            change -= after
        info = self.outer.step()
        self._take_outer()
        self._since = 0
        return info

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Write the outer optimizer to a file, and each inner one to a file beside it. Every rank calls this.

        The file of the outer one has the names of the others, and is written last: a killed process leaves the old
        files in force. The folder must be the same for all ranks. The files that are replaced are removed.

        Args:
            path: of the outer optimizer's file, which `Optimizer.load` of one process reads as well.
            extra: as for `Optimizer.save`.

        Raises:
            TypeError, ValueError, OSError, RuntimeError: as `Optimizer.save`, on the rank where it happened, and
                `CommunicatorError` on the others; what was there before still is.

        >>> import pathlib, tempfile
        >>> import numpy as np, fastopt
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> def train(comm):
        ...     inner = fastopt.Adam({"w": np.zeros(1)})
        ...     opt = fastopt.distributed.LocalSGD(inner, outer=fastopt.Nesterov(inner.params, comm=comm), every=9)
        ...     _ = opt.step({"w": np.array([1.0 * comm.rank])})
        ...     opt.save(folder / "run.safetensors", extra={"epoch": 1})
        >>> _ = fastopt.distributed.run_threads(2, train)
        >>> [file.name for file in sorted(folder.iterdir())]
        ['run.safetensors', 'run.safetensors.rank-0-of-2.step-1', 'run.safetensors.rank-1-of-2.step-1']
        """
        own = self._file_of(Path(path), self._steps)
        with self._ranks.together("save"):
            self.inner.save(own)
        kept = {"ranks": self._ranks.size, "steps": self._steps, "since": self._since}
        self.outer.save(path, extra={KEPT: kept, "extra": dict(extra or {})})
        with self._ranks.together("save"):
            for old in own.parent.glob(f"{glob.escape(own.name.rpartition('-')[0])}-*"):
                if old != own:
                    old.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Continue from the files that `save` wrote. Every rank calls this, and there must be as many as then.

        Args:
            path: as for `save`.

        Returns:
            The `extra` that `save` was given.

        Raises:
            TypeError, ValueError, OSError, RuntimeError: as `Optimizer.load`, or there are more or fewer ranks, on the
                rank where it happened, and `CommunicatorError` on the others; nothing was changed.

        >>> import pathlib, tempfile
        >>> import numpy as np, fastopt
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> def train(comm, load):
        ...     inner = fastopt.Adam({"w": np.zeros(1)})
        ...     opt = fastopt.distributed.LocalSGD(inner, outer=fastopt.Nesterov(inner.params, comm=comm), every=9)
        ...     if load:
        ...         return opt.load(folder / "run.safetensors"), opt.step_count
        ...     _ = opt.step({"w": np.array([1.0 * comm.rank])})
        ...     opt.save(folder / "run.safetensors", extra={"epoch": 1})
        >>> _ = fastopt.distributed.run_threads(2, train, False)
        >>> fastopt.distributed.run_threads(2, train, True)
        [({'epoch': 1}, 1), ({'epoch': 1}, 1)]
        """
        with self._ranks.together("load"):
            kept = _kept_in(path)
            if kept["ranks"] != self._ranks.size:
                raise ValueError(
                    f"comm: must have {kept['ranks']} ranks, as the run that wrote {os.fspath(path)!r}, got "
                    f"{self._ranks.size}; or load the outer optimizer alone, by outer.load(path)"
                )
            own = self._file_of(Path(path), kept["steps"])
            copy.deepcopy(self.inner).load(own)  # which raises the errors there are, and changes nothing
        found = self.outer.load(path)
        self.inner.load(own)
        self._steps, self._since = found[KEPT]["steps"], found[KEPT]["since"]
        return dict(found["extra"])

    def _take_outer(self) -> None:
        """Let the parameters of the inner optimizer be those of the outer one."""
        for own, array in zip(self.inner.flat.arrays, self.outer.flat.arrays, strict=True):
            own[...] = array

    def _file_of(self, path: Path, steps: int) -> Path:
        """That of this rank's inner optimizer, after so many steps."""
        return path.with_name(f"{path.name}.rank-{self._ranks.rank}-of-{self._ranks.size}.step-{steps}")


def _kept_in(path: str | os.PathLike[str]) -> dict[str, int]:
    """What `LocalSGD.save` has left in the file of the outer optimizer."""
    from fastopt.checkpoint import describe  # and safetensors, which is loaded by those who save

    kept = (describe(path)["extra"] or {}).get(KEPT)
    if kept is None:
        raise ValueError(f"{os.fspath(path)}: must be a file of LocalSGD.save, got one of an optimizer")
    found: dict[str, int] = kept
    return found
