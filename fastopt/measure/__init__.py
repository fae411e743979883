"""What `fastopt bench` and the benchmarks of the repository measure with; it uses fastopt as any user would.

- `interleave`: times contestants by turns and returns the `Spread` of each;
- `limit_of`, `bytes_of`: the memory limit of an optimizer's step, and the bytes it moves;
- `Work`, `RIVALS`: a step that all are to make, and the one table of those who can make it too;
- `compare_step`, `compare_batchnorm`, `Result`: all of that together;
- `compare_company`: a step between matrix products, and what it does to them;
- `machine`: what it was measured on.

Nothing here is loaded by ``import fastopt``, and no rival has to be installed.
"""

from __future__ import annotations

from fastopt.measure import machine
from fastopt.measure.comparison import Result, compare, compare_batchnorm, compare_company, compare_step
from fastopt.measure.interleaved import Spread, interleave
from fastopt.measure.limit import bytes_of, limit_of
from fastopt.measure.rivals import RIVALS, Absent, Work, enter

__all__ = [
    "RIVALS",
    "Absent",
    "Result",
    "Spread",
    "Work",
    "bytes_of",
    "compare",
    "compare_batchnorm",
    "compare_company",
    "compare_step",
    "enter",
    "interleave",
    "limit_of",
    "machine",
]
