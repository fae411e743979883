"""A network of two layers that reads handwritten digits, in NumPy: the shortest complete training loop.

    python examples/numpy_mlp.py

One sees the test accuracy rise from 10 % (guessing) to about 97 % within 20 epochs. The mathematics of the network is
in `forward` and `backward`; fastopt makes the mini-batches, the first weights, the schedule and the step. The data come
with scikit-learn: ``pip install 'fastopt[cli]'``.
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

import fastopt

EPOCHS, BATCH_SIZE, HIDDEN = 20, 32, 64


def load() -> tuple[np.ndarray, ...]:
    """Return 1,437 training images of 8 x 8 pixels with their labels, and 360 for the test."""
    digits = load_digits()
    X = (digits.data / 16).astype(np.float32)  # pixels from 0 to 1
    order = np.random.default_rng(0).permutation(len(X))
    train, test = order[:1437], order[1437:]
    return X[train], digits.target[train], X[test], digits.target[test]


def new_params(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the weights of a network with one hidden layer. He's initialisation suits ReLU."""
    return {
        "W1": fastopt.init.he_normal_(np.empty((64, HIDDEN), np.float32), rng=rng),
        "b1": np.zeros(HIDDEN, np.float32),
        "W2": fastopt.init.he_normal_(np.empty((HIDDEN, 10), np.float32), rng=rng),
        "b2": np.zeros(10, np.float32),
    }


def forward(params: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hidden layer and the probability of each digit."""
    hidden = np.maximum(x @ params["W1"] + params["b1"], 0)
    logits = hidden @ params["W2"] + params["b2"]
    terms = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, terms / terms.sum(axis=1, keepdims=True)


def backward(params: dict[str, np.ndarray], x: np.ndarray, labels: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Return the mean cross-entropy and its gradients: a dictionary with the keys of the parameters."""
    hidden, chances = forward(params, x)
    picks = np.arange(len(x)), labels
    loss = -np.log(chances[picks] + 1e-12).mean()
    d_logits = chances
    d_logits[picks] -= 1
    d_logits /= len(x)
    d_hidden = d_logits @ params["W2"].T * (hidden > 0)
    grads = {"W1": x.T @ d_hidden, "b1": d_hidden.sum(0), "W2": hidden.T @ d_logits, "b2": d_logits.sum(0)}
    return float(loss), grads


def main() -> None:
    """Train, and print how the network does on images that it has not seen."""
    X, labels, X_test, labels_test = load()
    batches = fastopt.minibatches(X, labels, batch_size=BATCH_SIZE, rng=0)
    schedule = fastopt.schedules.cosine(0.003, 0.0, steps=EPOCHS * len(batches))
    opt = fastopt.Adam(new_params(np.random.default_rng(0)), lr=schedule)
    for epoch in range(EPOCHS):
        losses = []
        for x, y in batches:  # in a new order in every epoch
            loss, grads = backward(opt.params, x, y)  # opt.params: the parameters that the optimizer updates
            opt.step(grads)
            losses.append(loss)
        right = forward(opt.params, X_test)[1].argmax(axis=1) == labels_test
        if epoch % 5 == 4 or epoch == 0:
            print(f"epoch {epoch + 1:2d}   training loss {np.mean(losses):.3f}   test accuracy {right.mean():.3f}")


if __name__ == "__main__":
    main()
