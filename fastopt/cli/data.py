"""The data sets that come with scikit-learn, split, and standardised with statistics of the training rows."""

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
        """Return the data set as arrays of `xp`, which is NumPy or CuPy."""
        x_train, y_train, x_test, y_test = map(xp.asarray, self[:-1])
        return Dataset(x_train, y_train, x_test, y_test, self.classes)


def load(name: str, rng: np.random.Generator) -> Dataset:
    """Load one of `NAMES`; shuffle its rows with `rng` and use the first fifth of them as the test set."""
    from sklearn import datasets  # importing it takes 1 s, which --help should not spend

    loader = datasets.load_digits if name == "digits" else datasets.load_breast_cancer
    features, labels = loader(return_X_y=True)
    order = rng.permutation(len(labels))
    test, training = np.split(order, [round(TEST_FRACTION * len(labels))])
    mean = features[training].mean(axis=0)
    deviation = features[training].std(axis=0)
    deviation[deviation == 0.0] = 1.0  # some pixels are black in every digit
    rows = ((features - mean) / deviation).astype(np.float32)
    return Dataset(rows[training], labels[training], rows[test], labels[test], int(labels.max()) + 1)
