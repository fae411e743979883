"""The measuring tools of `fastopt bench` and of the repository's benchmarks.

- `interleave`: times contestants in alternating turns and returns the `Spread` of each;
- `limit_of`, `bytes_of`: the memory limit of an optimizer's step, and the bytes it moves;
- `Work`, `RIVALS`: a step that all contestants make, and the table of rivals;
- `compare_step`, `compare_batchnorm`, `Result`: the comparison of a step, or of a pass of BatchNorm, with its rivals;
- `compare_company`: a step between matrix products, and its effect on them;
- `machine`: a description of the machine.

``import fastopt`` loads nothing of this package, and rivals need not be installed.
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
