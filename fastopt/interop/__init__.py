"""Optimizer states in the formats of torch, optax and Keras: continue a run of those frameworks here, and vice versa.

The frameworks are not imported: their states are read and written as plain containers of arrays. A state holds no
parameters; copy them separately with ``opt.params["w"][...] = array``.
"""

from __future__ import annotations

from fastopt.interop.keras import from_keras_state, to_keras_state
from fastopt.interop.optax import from_optax_state, to_optax_state
from fastopt.interop.torch import from_torch_state, to_torch_state

__all__ = [
    "from_keras_state",
    "from_optax_state",
    "from_torch_state",
    "to_keras_state",
    "to_optax_state",
    "to_torch_state",
]
