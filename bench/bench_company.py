"""A step in company: between NumPy's matrix products, beside busy processes, and alone.

The contestants are fastopt unchanged, on one thread and on OpenMP's threads (launched by numba), torch, and, between
the products, no step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from groups import Group, by_name, each_contestant

import fastopt
from fastopt.kernels.driver import DRIVER
from fastopt.kernels.threads import using
from fastopt.measure import Result, Work, compare, compare_company
from fastopt.measure import batchnorm as norms
from fastopt.measure.company import busy_processes, ways
from fastopt.measure.rivals import enter, of_fastopt

SIZES = {"100k": 100_000, "300k": 300_000, "1M": 1_000_000}
SHAPE = (32, 256, 14, 14)


@pytest.fixture(autouse=True)
def restored():
    with using(fastopt.get_num_threads()):
        yield
    DRIVER.choose()


class Steps(NamedTuple):
    """The contestants of a case."""

    steps: dict[str, Callable[[], Any]]
    before: dict[str, Callable[[], None]]
    """Functions to call before a contestant's turn."""
    absent: dict[str, str]
    """Reasons of rivals that do not take part."""


def adam(size: int) -> Steps:
    work = Work("Adam", ((size,),))
    steps, before = ways(of_fastopt(work).step, openmp=True)
    entered, absent = enter(work, ["torch fused"])
    return Steps({**steps, **{name: each.step for name, each in entered.items()}}, before, absent)


def batch_norm() -> Steps:
    contestants, absent = norms.contestants(SHAPE, 1, "forward", ["torch"])
    steps, before = ways(contestants.pop("fastopt").step, openmp=True)
    del contestants["limit"]
    return Steps({**steps, **{name: each.step for name, each in contestants.items()}}, before, absent)


CASES: dict[str, Callable[[], Steps]] = {
    **{f"Adam {name}": lambda size=size: adam(size) for name, size in SIZES.items()},
    "BatchNorm 32x256x14x14": batch_norm,
}


TURNS = 5
"""Turns of each contestant at every --scale: iterations beside busy processes have two speeds, a turn usually one."""

BUSY = (0, 1, 2, 4)
"""Numbers of busy processes beside the measured one."""

ALONE = {"Adam 4M": 4_000_000, "Adam 30M": 30_000_000}
"""Steps that are measured only alone, not in company."""


def title_of(name: str, busy: int) -> str:
    return f"X@W; X@W; {name}" + (f", beside {busy} busy" if busy else "")


def contestants_of(name: str) -> tuple[str, ...]:
    return ("fastopt", "one thread", "OpenMP", "torch fused" if name.startswith("Adam") else "torch")


def in_company(name: str, busy: int) -> Group:
    """Return the group of an iteration: two products and a step. Every iteration is a round of the plugin's table."""

    def run(title: str, *, times: dict[str, list[float]], **how: Any) -> Result:
        case = CASES[name]()
        steps = case.steps if busy else {**case.steps, "no step": lambda: None}
        turns: dict[str, list[np.ndarray]] = {}
        how |= {"before": case.before, "absent": case.absent, "rounds": TURNS, "times": turns}
        with busy_processes(busy):
            result = compare_company(title, steps, busy=busy, case=name, **how)
        times |= {contestant: np.concatenate([turn[0] for turn in of]).tolist() for contestant, of in turns.items()}
        return result

    contestants = contestants_of(name) + (() if busy else ("no step",))
    heading = f"two matmuls and {name}" + (f", beside {busy} busy" if busy else "")
    return Group(heading, contestants, run, 5.0 if busy else 3.0, title=title_of(name, busy))


def alone(name: str) -> Group:
    """Return the group of the same step without products."""

    def run(title: str, **how: Any) -> Result:
        case = adam(ALONE[name]) if name in ALONE else CASES[name]()
        return compare(title, case.steps, before=case.before, absent=case.absent, case=name, **how)

    return Group(f"{name}, alone", contestants_of(name), run, 1.5)


COMPANY = by_name(in_company(name, busy) for name in CASES for busy in BUSY)
ALONES = by_name(alone(name) for name in [*CASES, *ALONE])


@pytest.mark.parametrize(**each_contestant(COMPANY))
def test_company(measure, group, contestant):
    measure(COMPANY[group], contestant)


@pytest.mark.parametrize(**each_contestant(ALONES))
def test_alone(measure, group, contestant):
    measure(ALONES[group], contestant)
