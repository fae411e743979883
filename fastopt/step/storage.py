"""`StateFormats`: the storage formats of an optimizer's buffers, and what is kept of parameters of 16 bits besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastopt.hyper import EMA
from fastopt.kernels.contract import (
    BFLOAT16,
    CODED,
    CODES,
    FLOAT16,
    FLOAT32,
    INT8,
    MASTER,
    REST,
    STORED,
    UINT8,
    Storage,
)
from fastopt.rule import Rule
from fastopt.step.globs import Paths
from fastopt.step.options import MIN_8BIT_SIZE, StepOptions
from fastopt.storage.flat import FlatParams
from fastopt.storage.formats import HALF, dtype_of, format_of

OF_STATES = (FLOAT32, BFLOAT16, FLOAT16, INT8)
"""The formats that states can have where the parameters are not float64."""


class Memory(NamedTuple):
    """What an optimizer holds, in bytes, padding included."""

    parameters: int
    gradients: int
    """Of ``opt.grads``, once somebody has asked for it."""
    states: int
    """Those of the rule, the average, and what is kept of parameters of 16 bits besides."""
    scratch: int
    """Of gradients that are accumulated."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


@dataclass(frozen=True)
class StateFormats:
    """The storage formats of the buffers of one optimizer.

    Args:
        params: the format of parameters and gradients.
        states: by name, that of each state of the rule, of the average where there is one, and of what `keeps` adds.
        keeps: as `fastopt.kernels.contract.Storage`: MASTER, REST or "".
        stochastic: whether numbers of 16 bits are rounded at random.
        sizes: the smallest parameters whose states have codes of 8 bits; or that by globs of paths.
    """

    params: str
    states: Mapping[str, str]
    keeps: str
    stochastic: bool
    sizes: int | Mapping[str, int]

    @classmethod
    def of(cls, rule: Rule, flat: FlatParams, options: StepOptions) -> StateFormats:
        """The formats that options ask for; TypeError or ValueError, naming the option, where that cannot be."""
        params = format_of(flat.dtype)
        assert params is not None
        names = (*rule.states, *(() if options.ema is None else (EMA,)))
        states = dict.fromkeys(names, flat.compute.name)
        for name, form in _wanted(rule, flat, options.states, names).items():
            if form == INT8:
                _check_codes(rule, flat, name)
                form = UINT8 if name in rule.nonnegative else INT8
            states[name] = form
        keeps = _kept(params, options)
        if keeps:
            if keeps in states or keeps in rule.numbers:
                raise ValueError(f"rule {rule.name!r}: must have no state {keeps!r}, which the optimizer keeps itself")
            states[keeps] = flat.compute.name if keeps == MASTER else params
        formats = cls(params, states, keeps, options.stochastic, options.min_8bit_size)
        if formats.plain:
            if options.stochastic:
                raise ValueError("rounding: must be 'nearest' where no buffer has 16 bits, got 'stochastic'")
        else:
            _check_possible(rule)
        return formats

    @property
    def plain(self) -> bool:
        """Whether all buffers are of the dtype that is computed in."""
        return len({self.params, *self.states.values()}) == 1 and self.params not in HALF

    @property
    def coded(self) -> tuple[str, ...]:
        """The states that have codes of 8 bits."""
        return tuple([name for name, form in self.states.items() if form in CODED])

    def advice(self, rule: Rule) -> list[str]:
        """What is allowed here and seldom works, for warnings."""
        found = []
        if self.params in HALF and not self.keeps and not self.stochastic:
            found.append(
                f"parameters of {self.params} are rounded to the nearest, and updates below half of their last place "
                f"vanish: use master=True, rounding='stochastic' or compensated=True"
            )
        small = [name for name in rule.nonnegative if self.states[name] == FLOAT16]
        if small:
            found.append(
                f"states: {', '.join(small)}: float16 ends at 6e-8, and squares of gradients are often smaller: use "
                f"'bfloat16' or 'int8'"
            )
        return found

    @property
    def bytes_per_element(self) -> float:
        """Of all states, for a large parameter."""
        units = len(self.coded) * STORED[FLOAT32].itemsize / CODES
        return sum(STORED[form].itemsize for form in self.states.values()) + units

    def laid_out(self, flat: FlatParams) -> FlatParams:
        """The parameters, with room for the states in these formats."""
        return flat.with_codes(self._large(flat)) if self.coded else flat

    def _large(self, flat: FlatParams) -> list[bool]:
        """For each parameter whether its states have codes."""
        least = [MIN_8BIT_SIZE] * len(flat.paths)
        if isinstance(self.sizes, Mapping):
            paths = Paths(flat.paths)
            for glob, size in self.sizes.items():
                found = paths.matching(glob)
                if not found:
                    names = ", ".join(flat.paths)
                    raise ValueError(f"min_8bit_size[{glob!r}]: must match a parameter; the paths are {names}")
                for k in found:
                    least[k] = size
        else:
            least = [self.sizes] * len(flat.paths)
        return [size >= max(1, smallest) for size, smallest in zip(flat.layout.sizes, least, strict=True)]

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of the buffer of a state."""
        form = self.states[name]
        return STORED[form] if form in CODED else dtype_of(form, f"states: {name}")

    def storage(self, rule: Rule, grads: str | None = None, *, ema: bool = True) -> Storage | None:
        """What a kernel is told; None where all buffers are of the dtype.

        grads : the format of the gradients; None for that of the parameters. ema : whether the kernel keeps an average.
        """
        if self.plain:
            return None
        states = [form for name, form in self.states.items() if ema or name != EMA]
        return Storage(self.params, grads or self.params, tuple(states), self.keeps, self.stochastic)


def _wanted(rule: Rule, flat: FlatParams, states: Any, names: tuple[str, ...]) -> dict[str, str]:
    """By name, the formats that ``states=`` names."""
    if states is None:
        return {}
    expected = f"one of {', '.join(map(repr, OF_STATES))}, or a dict of such by the names of states"
    if isinstance(states, str):
        chosen = dict.fromkeys(rule.states, states)
    elif isinstance(states, Mapping):
        chosen = dict(states)
    else:
        raise TypeError(f"states: must be {expected}, got {states!r} ({type(states).__name__})")
    if isinstance(states, str) and states not in OF_STATES:
        raise ValueError(f"states: must be {expected}, got {states!r}")
    for name, form in chosen.items():
        if name not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise ValueError(f"states: must name states of rule {rule.name!r} ({known}), got {name!r}")
        if form not in OF_STATES:
            raise ValueError(f"states: {name}: must be one of {', '.join(map(repr, OF_STATES))}, got {form!r}")
    if flat.compute == np.float64 and chosen:
        raise ValueError(f"states: must be None for parameters of float64, got {states!r}; pack them as float32")
    return chosen


def _check_codes(rule: Rule, flat: FlatParams, name: str) -> None:
    """Refuse codes of 8 bits for a state that cannot have them."""
    reason = None
    if rule.sums:
        reason = f"rule {rule.name!r} has sums over whole parameters"
    elif flat.members is not None:
        reason = "blocks of codes would lie across the members of a population"
    elif name == EMA or rule.initial.get(name) == "p":
        reason = "it follows the parameters, whose last places are all that changes"
    elif name in rule.extra:
        reason = "it is given to the step"
    if reason is not None:
        raise ValueError(f"states: {name}: must not be 'int8', because {reason}; use 'bfloat16'")


def _kept(params: str, options: StepOptions) -> str:
    """What is kept of the parameters besides: MASTER, REST or ""."""
    if params not in HALF:
        for name, value in (("master", options.master), ("compensated", options.compensated)):
            if value:
                raise ValueError(f"{name}: must be False for parameters of {params}, which lose nothing, got True")
        return ""
    if options.compensated and options.master:
        raise ValueError("compensated: must be False together with master=True, got True; choose one of them")
    if options.compensated:
        if options.stochastic:
            raise ValueError("compensated: must be False together with rounding='stochastic', got True; choose one")
        return REST
    if options.master is None:
        return "" if options.stochastic else MASTER
    return MASTER if options.master else ""


def _check_possible(rule: Rule) -> None:
    """Refuse formats where the rule does not know them."""
    if rule.matrixwise is not None:
        raise ValueError(
            f"states: must be None, and parameters float32 or float64, for rule {rule.name!r}, whose linear algebra "
            f"works on them as they are"
        )
