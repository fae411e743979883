"""BatchNorm: the layer, the functional pair under it, and its fold into the layer before it."""

from __future__ import annotations

from fastopt.batchnorm.fold import fold_batchnorm
from fastopt.batchnorm.functional import BatchNormGrads, Saved, batchnorm_backward, batchnorm_forward
from fastopt.batchnorm.layer import BatchNorm

__all__ = ["BatchNorm", "BatchNormGrads", "Saved", "batchnorm_backward", "batchnorm_forward", "fold_batchnorm"]
