"""`Plan`: what a step needs that stays from one step to the next: the table, the chunks, the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.kernels.contract import NOISE, Backend, Features, Kernel, NormKernel, Storage
from fastopt.lazy import lazy
from fastopt.step.features import features_of
from fastopt.step.groups import Groups
from fastopt.step.options import StepOptions
from fastopt.step.storage import StateFormats
from fastopt.step.table import Table, hyper_of
from fastopt.storage.flat import FlatParams

if TYPE_CHECKING:
    from fastopt.rule import Rule
    from fastopt.step.many import ManyGroups

MANY = 64
"""Param groups. From here on `prepare` is compiled, which takes 0.2-0.3 s: Python takes 1.25 us per group and step."""


MOST_MASKS = 128
"""Sets of parameters with a gradient whose tables are kept: about 100 KiB each at 2,000 parameters."""


class Plan:
    """The table of hyperparameters, the tables of chunks, and the kernels, for the param groups as they are.

    A new value of a hyperparameter leaves it as it is. Where a group is split, or weights begin to decay, it is made
    again: `version` is then no longer that of the groups.
    """

    def __init__(
        self,
        rule: Rule,
        flat: FlatParams,
        options: StepOptions,
        groups: Groups,
        backend: Backend,
        formats: StateFormats,
        *,
        step: int,
        gated: bool,
    ):
        """gated : whether a device decides if there is a step."""
        self._formats = formats
        self._seed = options.seed if formats.stochastic else None
        self.version = groups.version
        self.rule = rule
        self.flat = flat
        self.options = options
        self.backend = backend
        self._tiled, self._whole = rule.lined, rule.whole
        self._per_tensor = options.clip_norm_per_tensor is not None
        members = flat.members or 1
        self._alone = len(groups.list) == 1 and flat.members is None
        by_group = [number * members + member for member in range(members) for number in groups.of]
        self.of = list(range(len(by_group))) if self._per_tensor else by_group
        """The row of the table of each parameter, of each member: that of its group, or its own, with a coefficient of
        its own."""
        self._decays = groups.decays
        self._gated = gated
        self.hyper = hyper_of(rule, groups.list[0].point(step))
        self.table = Table(
            rule,
            self.hyper,
            flat.compute,
            len(groups.list) * members,
            clip_value=options.clip_value,
            ema=options.ema,
            of=by_group if self._per_tensor else None,
        )
        self.rows: dict[tuple[bool, ...], list[int]] = {}
        """For parameters that are there the row of the table, and -1 for the others; in a population of each member."""
        self._chunks: dict[tuple[int, bool, bool], tuple[Sequence[int], Any]] = {}
        self._dense: dict[tuple[int, tuple[bool, ...]], tuple[Sequence[int], np.ndarray]] = {}
        self._kernels: dict[tuple[bool, bool, bool], Kernel] = {}
        self._many: ManyGroups | None = None
        self._norms: dict[tuple[bool, bool], NormKernel] = {}
        self.usual = self.kernel(scaled=options.maximize)
        """The kernel of steps without grad_scale, for gradients in our buffer."""

    def write_table(self, groups: Groups, t: int, unscale: float) -> None:
        """Write the row of every group for update number `t`, less those that the group has missed."""
        if self._alone:  # 50 ns less than by the loop
            group = groups.list[0]
            self.table.write(0, t - group.missed, group.fixed or group.point(t - 1), unscale)
        elif len(groups.list) < MANY and groups.networks is None:
            write = self.table.write
            for row, group in enumerate(groups.list):
                write(row, t - group.missed, group.fixed or group.point(t - 1), unscale)
        else:
            if self._many is None or self._many.changes != groups.changes_made:
                from fastopt.step.many import ManyGroups  # and numba, which is loaded by those who make steps

                compiles = len(self.table.by_group) >= MANY
                self._many = ManyGroups(self.table, groups, self.hyper, t - 1, self._many, compiles=compiles)
            self._many.write(t, unscale)
        if self._per_tensor:
            self.table.spread()
        if self._seed is not None:
            self.table.array[:, NOISE] = noise_of(self._seed, t)

    @lazy
    def joined(self) -> Any:
        """The chunks of all parameters, for gradients in our buffer."""
        return self.chunks(self.of)

    @property
    def blocks(self) -> Any:
        """The chunks of all parameters, each with partial sums of its own, on every process."""
        return Plan.chunks(self, self.of, whole=True)

    def forget_chunks(self) -> None:
        """Lay out the chunks again: the parameters may be neighbours elsewhere."""
        self._chunks.clear()
        self.__dict__.pop("joined", None)

    def keep_rows(self, mask: tuple[bool, ...]) -> list[int]:
        """The rows of the table of the parameters of a mask, which is looked up in `rows` from now on."""
        if len(self.rows) >= MOST_MASKS:
            self.rows.clear()
            self._chunks.clear()  # whose keys are the ids of the rows
            self._dense.clear()
        found = self.rows[mask] = [row if here else -1 for row, here in zip(self.of, mask, strict=True)]
        return found

    def chunks(self, rows: Sequence[int], *, whole: bool = False, apart: bool = False) -> Any:
        """The chunks of parameters of these rows; the tiles, for the update of a rule that is lined.

        whole : each is part of one parameter, and has partial sums of its own.
        apart : the gradients are not neighbours where the parameters are.
        """
        tiled = self._tiled and not whole
        whole = not tiled and (whole or apart or self._whole)
        key = (id(rows), whole, apart)
        found = self._chunks.get(key)
        if found is None:  # the list is kept, so that its id is not given to another
            layout, neighbours = self.flat.split, None if whole or tiled else self.flat.neighbours
            made = layout.tiles(rows) if tiled else layout.chunks(rows, neighbours=neighbours, whole=whole)
            found = self._chunks[key] = (rows, made)
        return found[1]

    def dense_chunks(self, dense: tuple[bool, ...], rows: Sequence[int]) -> np.ndarray:
        """The chunks (whole ones) of some of these parameters: those with an ordinary gradient, or matrices."""
        key = (id(rows), dense)
        found = self._dense.get(key)
        if found is None:
            if len(self._dense) >= MOST_MASKS:
                self._dense.clear()
            only = [row if here else -1 for row, here in zip(rows, dense, strict=True)]
            found = self._dense[key] = (rows, self.flat.split.chunks(only, whole=True))
        return found[1]

    def kernel(self, *, scaled: bool, own: bool = True, summed: bool = False) -> Kernel:
        """The update.

        scaled : gradients are multiplied by `StepHyper.unscale`. own : they are in our buffer. summed : they are
        accumulated ones, which are of the dtype that is computed in.
        """
        kernel = self._kernels.get((scaled, own, summed))
        if kernel is None:
            flags = {**self.options.flags, "zero_grad": self.options.zero_grad and own}
            storage = self._formats.storage(self.rule, self._format_of_sums if summed else None)
            kernel = self._made(None, storage, unscale=scaled, gated=self._gated, **flags)
            self._kernels[scaled, own, summed] = kernel
        return kernel

    @property
    def _format_of_sums(self) -> str:
        return str(self.flat.compute.name)

    def row_kernel(self, flags: Mapping[str, bool], first: tuple[Any, type] | None) -> Kernel:
        """The update of scattered rows."""
        return self._made(first, None, scattered=True, **flags)

    def moved_kernel(self, shift: Rule) -> Kernel:
        """The update by `shift`, a rule of the same states and hyperparameters, without options."""
        storage = self._formats.storage(self.rule, ema=False)
        return self.backend.kernel(shift, self.hyper, self.flat.compute, Features(), storage=storage)

    def direction_kernel(self, *, scaled: bool) -> Kernel:
        """The update that leaves the direction of matrices in a state."""
        assert self.rule.matrixwise is not None
        features = Features(unscale=scaled, **self.options.conditioning, clip_norm=self.options.clips)
        return self.backend.kernel(self.rule.matrixwise.direction, self.hyper, self.flat.compute, features)

    def norm_kernel(self, *, scaled: bool, summed: bool = False) -> NormKernel:
        """The pass over gradients that measures them. scaled, summed : as for `kernel`."""
        kernel = self._norms.get((scaled, summed))
        if kernel is None:
            features = Features(unscale=scaled, **self.options.conditioning)
            grads = self._format_of_sums if summed else self._formats.params
            kernel = self._norms[scaled, summed] = self.backend.norm(self.flat.compute, features, grads)
        return kernel

    def _made(self, first: tuple[Any, type] | None, storage: Storage | None, **flags: bool) -> Kernel:
        features = features_of(self.rule, decays=self._decays, **flags)
        return self.backend.kernel(self.rule, self.hyper, self.flat.compute, features, first, storage)


def noise_of(seed: int, t: int) -> int:
    """The number of a step from which stochastic rounding draws: a whole one below 2**24, which float32 holds."""
    word = (seed * 0x9E3779B97F4A7C15 + t * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ (word >> 32)) * 0xD6E8FEB86659FD93) & 0xFFFFFFFFFFFFFFFF
    return word >> 40
