"""One step of Adam on many small tensors, with one learning rate for all and with hundreds of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from groups import Group, by_name, each_contestant, of_step

from fastopt.measure import RIVALS, Result, Work, compare_step

CASES = {
    "100 x 10k": ((10_000,), 100, 1),
    "1000 x 64": ((64,), 1000, 1),
    "1000 x 64, 501 groups": ((64,), 1000, 501),
    "10000 x 16": ((16,), 10_000, 1),
}
MOST = 1000
"""Maximum number of tensors for all rivals: for 10,000, XLA compiles for minutes and per-tensor loops take seconds."""
FEW = ("numpy", "torch fused")


def group_of(name: str) -> Group:
    shape, tensors, groups = CASES[name]
    rivals = FEW if tensors > MOST else tuple(RIVALS)
    left_out = {rival: f"left out with {tensors} tensors" for rival in RIVALS if rival not in rivals}

    def run(title: str, **how: Any) -> Result:
        work = Work("Adam", (shape,) * tensors, groups=groups)
        return compare_step(title, work, rivals, left_out=left_out, **how)

    return Group(f"Adam {name}", of_step("Adam", rivals), run, 1.4, math.prod(shape) * tensors)


GROUPS = by_name(group_of(name) for name in CASES)


@pytest.mark.parametrize(**each_contestant(GROUPS))
def test_many_tensors(measure, group, contestant):
    measure(GROUPS[group], contestant)
