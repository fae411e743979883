"""fastopt: an optimizer's mathematics written once, as a scalar function; run as one fused kernel on a flat buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastopt import init, reference, rules, schedules
from fastopt.batches import minibatches
from fastopt.batchnorm import BatchNorm, batchnorm_backward, batchnorm_forward, fold_batchnorm
from fastopt.flat import FlatParams, pack
from fastopt.idle import Linear
from fastopt.optimizer import Optimizer
from fastopt.rule import Choice, Flag, Interval, Layerwise, Rule, rule
from fastopt.tail import StepInfo

if TYPE_CHECKING:
    from fastopt.rules.adadelta import Adadelta as Adadelta
    from fastopt.rules.adagrad import Adagrad as Adagrad
    from fastopt.rules.adam import Adam as Adam
    from fastopt.rules.adamw import AdamW as AdamW
    from fastopt.rules.lamb import LAMB as LAMB
    from fastopt.rules.momentum import Momentum as Momentum
    from fastopt.rules.nesterov import Nesterov as Nesterov
    from fastopt.rules.rmsprop import RMSprop as RMSprop
    from fastopt.rules.sgd import SGD as SGD

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Choice",
    "FlatParams",
    "Flag",
    "Interval",
    "Layerwise",
    "Linear",
    "Optimizer",
    "Rule",
    "StepInfo",
    "batchnorm_backward",
    "batchnorm_forward",
    "fold_batchnorm",
    "init",
    "minibatches",
    "pack",
    "reference",
    "rule",
    "rules",
    "schedules",
    *Optimizer.classes,
]

globals().update(Optimizer.classes)  # every optimizer under fastopt/rules, so that a new one is a new file and no more
