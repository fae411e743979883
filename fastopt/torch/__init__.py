"""fastopt for torch: optimizers with the interface of `torch.optim`, on tensors where they are; and BatchNorm.

Change one import: ``fastopt.torch.AdamW`` in place of ``torch.optim.AdamW``. `convert_batchnorm` has the BatchNorm of a
model make its passes by our kernels.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("fastopt.torch: must have torch, got none; use pip install 'fastopt[torch]'") from error

from fastopt.torch.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert_batchnorm
from fastopt.torch.classes import (
    ADOPT,
    ASGD,
    FTRL,
    LAMB,
    LARS,
    MARS,
    SGD,
    SOAP,
    AdaBelief,
    AdaBound,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamMini,
    AdamW,
    Adan,
    AdEMAMix,
    Lion,
    Momentum,
    Muon,
    NAdam,
    Nesterov,
    NovoGrad,
    Prodigy,
    RAdam,
    RMSprop,
    Rprop,
    ScheduleFreeAdamW,
    Shampoo,
    StableAdamW,
    Yogi,
    from_rule,
)
from fastopt.torch.optimizer import Optimizer

__all__ = [
    "ADOPT",
    "ASGD",
    "FTRL",
    "LAMB",
    "LARS",
    "MARS",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "AdaBelief",
    "AdaBound",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamMini",
    "AdamW",
    "Adamax",
    "Adan",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Lion",
    "Momentum",
    "Muon",
    "NAdam",
    "Nesterov",
    "NovoGrad",
    "Optimizer",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "Shampoo",
    "StableAdamW",
    "Yogi",
    "convert_batchnorm",
    "from_rule",
]
