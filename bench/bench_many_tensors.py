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
MOST_TRACED = 1000
"""Tensors. XLA compiles a step of 1,000 in seconds, and one of 10,000 in minutes."""


@pytest.mark.parametrize("name", CASES)
def test_adam(measure, name):
    shape, tensors, groups = CASES[name]
    work = Work("Adam", (shape,) * tensors, groups=groups)
    left_out = (
        {} if tensors <= MOST_TRACED else {"optax": f"optax takes minutes to compile a step of {tensors} tensors"}
    )
    rivals = [rival for rival in RIVALS if rival not in left_out]
    measure(compare_step, f"Adam {name}", work, rivals, seconds=2.0, size=work.size, left_out=left_out)
