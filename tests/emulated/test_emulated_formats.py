"""States of 16 bits, decoded and rounded in registers of compiled CUDA kernels, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from cases import BY_NAME
from test_emulated_updates import assert_same, stepped


@pytest.mark.parametrize("states", ["bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore:states")
def test_states_of_16_bits_have_the_bits_of_the_cpu(states, backend):
    case = BY_NAME["Adam"]
    backend.contracted = False
    assert_same(
        stepped(case, backend, np.float32, states=states, grad_norm=True),
        stepped(case, "cpu", np.float32, states=states, grad_norm=True),
    )
