"""The cost of a step of Adam against its size, from 100 to 100 million parameters, and against the number of threads.

The contestants named after threads ignore `SERIAL_BELOW`, the size below which the driver uses one thread: their curves
show the best value of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from groups import Group, by_name, each_contestant

from fastopt import get_num_threads, set_num_threads
from fastopt.kernels import driver
from fastopt.kernels.driver import DRIVER
from fastopt.kernels.threads import using
from fastopt.measure import Result, Work, compare, limit_of
from fastopt.measure.comparison import check_memory
from fastopt.measure.limit import bytes_of
from fastopt.measure.rivals import of_fastopt

SIZES = [
    *(10**k for k in range(2, 9)),
    *(round(10 ** (k + 0.5)) for k in range(2, 8)),
    *(16_384, 20_000, 24_576, 49_152, 65_536, 131_072),  # around the switch
]
SWITCH = driver.SERIAL_BELOW
MODE = DRIVER.choose()


def thread_counts(most: int) -> dict[str, int]:
    """Return 1, 2, 4, ... and `most` by the names of their contestants."""
    counts = sorted({min(2**k, most) for k in range(most.bit_length() + 1)})
    return {f"{count} thread{'s' if count > 1 else ''}": count for count in counts}


@pytest.fixture(autouse=True)
def restored():
    with using(get_num_threads()):
        yield
    driver.SERIAL_BELOW = SWITCH
    DRIVER.choose()


def on_threads(count: int, serial_below: int, mode: str | None) -> Callable[[], None]:
    def switch() -> None:
        set_num_threads(count)
        driver.SERIAL_BELOW = serial_below
        DRIVER.choose(mode)

    return switch


def scale(title: str, *, size: int, **options: Any) -> Result:
    """Compare the default step, its limit, and the same step on each number of threads."""
    work = Work("Adam", ((size,),))
    check_memory(work, 2)
    optimizer = of_fastopt(work).optimizer
    most = get_num_threads()
    contestants = {"fastopt": optimizer.step, "limit": limit_of(optimizer).step}
    before = dict.fromkeys(contestants, on_threads(most, SWITCH, None))
    for name, count in thread_counts(most).items():
        contestants[name], before[name] = optimizer.step, on_threads(count, 0, MODE)
    return compare(
        title,
        contestants,
        before=before,
        moved=bytes_of(optimizer),
        parameters=size,
        states=2,
        dtype="float32",
        threads=most,
        serial_below=SWITCH,
        **options,
    )


def group_of(size: int) -> Group:
    contestants = ("fastopt", "limit", *thread_counts(get_num_threads()))
    run = partial(scale, size=size)
    title = f"Adam {size:,}"
    return Group(f"{title}, by threads", contestants, run, 0.5 if size < 10**7 else 1.5, size, title)


GROUPS = by_name(group_of(size) for size in sorted(SIZES))


@pytest.mark.parametrize(**each_contestant(GROUPS))
def test_scaling(measure, group, contestant):
    measure(GROUPS[group], contestant)
