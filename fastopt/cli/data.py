"""The data sets that scikit-learn carries with it, split, and standardised by what the training rows say."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NAMES = ("digits", "breast-cancer")
TEST_FRACTION = 0.2


class Dataset(NamedTuple):
    """Rows are float32 features of mean 0 and deviation 1 (over the training rows); labels are ints from 0."""

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    classes: int

    def on(self, xp: ModuleType) -> Dataset:
        """The same as arrays of `xp`, which is NumPy or CuPy."""
        x_train, y_train, x_test, y_test = map(xp.asarray, self[:-1])
        return Dataset(x_train, y_train, x_test, y_test, self.classes)


def load(name: str, rng: np.random.Generator) -> Dataset:
    """`name` is one of `NAMES`. The rows are shuffled by `rng`; the first fifth of them is the test set."""
    from sklearn import datasets  # 1 s: not for --help

    loader = datasets.load_digits if name == "digits" else datasets.load_breast_cancer
    features, labels = loader(return_X_y=True)
    order = rng.permutation(len(labels))
    test, training = np.split(order, [round(TEST_FRACTION * len(labels))])
    mean = features[training].mean(axis=0)
    deviation = features[training].std(axis=0)
    deviation[deviation == 0.0] = 1.0  # a pixel that is black in every digit
    rows = ((features - mean) / deviation).astype(np.float32)
    return Dataset(rows[training], labels[training], rows[test], labels[test], int(labels.max()) + 1)
