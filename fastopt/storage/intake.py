"""`Intake`: the gradients of a step, checked and taken where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.kernels.contract import Array, Backend
from fastopt.storage.door import Door, intervals
from fastopt.storage.flat import FlatParams

ALONE = (0.0, True)
"""`Taken.beside` of a step whose gradients are all in one pipeline."""


class Taken(NamedTuple):
    """The gradients of one step, as the kernels read them."""

    places: np.ndarray
    """`fastopt.kernels.contract.Place`, a line per parameter, of each member."""
    present: list[bool] | None
    """Which parameters have a gradient; None where all have."""
    kept: Any
    """Keeps the memory alive while the kernels read it; an iterable of an array or None per parameter, for errors."""
    beside: tuple[float, bool] = ALONE
    """The norm of gradients that other pipelines take in the same step, and whether all of them are finite."""


class Intake:
    """Takes the gradients of the steps of one optimizer.

    Args:
        flat: the parameters.
        buffers: of states, which a step writes, as it does the parameters: no gradient may overlap them.
    """

    def __init__(self, flat: FlatParams, backend: Backend, buffers: Sequence[Array]):
        self._flat = flat
        self._backend = backend
        self._buffers = tuple(buffers)
        self._door: Door | None = None
        self._places = flat.places_of(flat.addresses, flat.addresses)
        self._found = np.empty(len(flat.paths), np.int64)

    def _made_door(self) -> Door:
        """The checks of gradients that are read where they are, and must not overlap parameters and buffers."""
        flat = self._flat
        door = Door(flat.shapes, flat.dtype)
        addresses = np.concatenate([flat.addresses, flat.addresses_of(self._buffers)])
        sizes = np.concatenate([door.sizes, np.array([buffer.nbytes for buffer in self._buffers], np.int64)])
        door.protect(*intervals(addresses, sizes), whose="the parameters and states")
        return door

    def take(self, grads: Any) -> Taken:
        """Check a tree of gradients, and take the addresses of its arrays; on a device, copy them into our buffer.

        Args:
            grads: as for `FlatParams.check_grads`.

        Raises:
            TypeError, ValueError: as `FlatParams.check_grads`.
        """
        flat = self._flat
        if flat.device is not None:
            leaves = flat.check_grads(grads)
            flat.copy_grads(leaves)
            present = [leaf is not None for leaf in leaves]
            return Taken(flat.places, None if all(present) else present, leaves)
        leaves = flat.leaves_like(grads)
        if self._door is None:
            self._door = self._made_door()
        absent = self._door.admit(leaves, self._found, flat.paths)
        self._places[:, 1] = flat.each(self._found)
        return Taken(self._places, (self._found != 0).tolist() if absent else None, leaves)

    def take_to_add(self, grads: Any) -> Taken:
        """As `take`, and on a device as well where they are: `opt.grads` may be among them.

        Args:
            grads: as for `FlatParams.check_grads`.

        Raises:
            TypeError, ValueError: as `FlatParams.check_grads`.
        """
        flat = self._flat
        if flat.device is None:
            return self.take(grads)
        found = np.zeros(len(flat.paths), np.int64)
        leaves = flat.check_grads(grads)
        for k, leaf in enumerate(leaves):
            if leaf is not None:
                leaves[k] = leaf if leaf.flags.c_contiguous else leaf.copy(order="C")
                found[k] = self._backend.address(leaves[k])
        present = [leaf is not None for leaf in leaves]
        return Taken(flat.places_of(flat.addresses, found), None if all(present) else present, leaves)
