"""One step of Adam on many small tensors, with one learning rate for all and with hundreds of them."""

from __future__ import annotations

import pytest

from fastopt.measure import RIVALS, Work, compare_step

CASES = {
    "100 x 10k": ((10_000,), 100, 1),
    "1000 x 64": ((64,), 1000, 1),
    "1000 x 64, 501 groups": ((64,), 1000, 501),
    "10000 x 16": ((16,), 10_000, 1),
}
MOST = 1000
"""Maximum number of tensors for all rivals: for 10,000, XLA compiles for minutes and per-tensor loops take seconds."""
FEW = ("numpy", "torch fused")


@pytest.mark.parametrize("name", CASES)
def test_adam(measure, name):
    shape, tensors, groups = CASES[name]
    work = Work("Adam", (shape,) * tensors, groups=groups)
    rivals = FEW if tensors > MOST else tuple(RIVALS)
    left_out = {rival: f"left out with {tensors} tensors" for rival in RIVALS if rival not in rivals}
    measure(compare_step, f"Adam {name}", work, rivals, seconds=1.4, size=work.size, left_out=left_out)
