"""A step in company: between NumPy's matrix products, beside busy processes, and alone.

The contestants are fastopt unchanged, on one thread and on OpenMP's threads (launched by numba), torch, and, between
the products, no step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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


def adam(size: int) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], None]]]:
    work = Work("Adam", ((size,),))
    steps, before = ways(of_fastopt(work).step, openmp=True)
    entered, _ = enter(work, ["torch fused"])
    return {**steps, **{name: each.step for name, each in entered.items()}}, before


def batch_norm() -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], None]]]:
    contestants, _ = norms.contestants(SHAPE, 1, "forward", ["torch"])
    steps, before = ways(contestants.pop("fastopt").step, openmp=True)
    del contestants["limit"]
    return {**steps, **{name: each.step for name, each in contestants.items()}}, before


CASES: dict[str, Callable[[], Any]] = {
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


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("name", CASES)
def test_company(measure, name, busy):
    def case(title: str, **options: Any) -> Result:
        steps, before = CASES[name]()
        if not busy:
            steps["no step"] = lambda: None
        with busy_processes(busy):
            return compare_company(title, steps, before=before, busy=busy, case=name, **{**options, "rounds": TURNS})

    measure(case, title_of(name, busy), seconds=5.0 if busy else 3.0)


@pytest.mark.parametrize("name", [*CASES, *ALONE])
def test_alone(measure, name):
    def case(title: str, **options: Any) -> Result:
        steps, before = adam(ALONE[name]) if name in ALONE else CASES[name]()
        return compare(title, steps, before=before, case=name, **options)

    measure(case, f"{name}, alone", seconds=1.5)
