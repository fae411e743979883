"""A small multilayer network in plain NumPy: the example of embedding fastopt in a trainer of one's own.

The network belongs to the trainer, its numbers to the optimizer, which hands them out as views of one flat buffer.
`backward` reads ``opt.params`` and writes into ``opt.grads``; nothing is copied, and a step is one launch:

    opt = fastopt.Adam(new_layers([64, 32, 10], fastopt.init.he_normal_, rng))
    for x, labels in fastopt.minibatches(X, y, batch_size=32, rng=rng):
        loss = backward(opt.params, x, labels, out=opt.grads)
        opt.step()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastopt import init

Array = NDArray[Any]


class Layer(NamedTuple):
    """``x W + b``: W is (inputs, outputs), b is (outputs,). The gradient of a layer has the same form."""

    W: Array
    b: Array


def new_layers(
    sizes: Sequence[int], fill: Callable[..., Array], rng: np.random.Generator, dtype: DTypeLike = np.float32
) -> list[Layer]:
    """A layer between each two neighbours of `sizes`: W filled by `fill`, as those of `fastopt.init` do; b zero."""
    layers = []
    for inputs, outputs in pairwise(sizes):
        W = fill(np.empty((inputs, outputs), dtype), rng=rng)
        layers.append(Layer(W, b=init.zeros_(np.empty(outputs, dtype))))
    return layers


def forward(layers: Sequence[Layer], x: Array) -> list[Array]:
    """What enters each layer, and the logits that leave the last: ``a = relu(a W + b)``, the last without relu."""
    activations = [x]
    for layer in layers:
        if len(activations) > 1:
            np.maximum(activations[-1], 0, out=activations[-1])
        activations.append(activations[-1] @ layer.W + layer.b)
    return activations


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean of ``log(sum(exp(z))) - z[label]`` over the rows, and its gradient ``(softmax(z) - onehot) / rows``."""
    picks = np.arange(len(labels)), labels
    shifted = logits - logits.max(axis=1, keepdims=True)  # the same softmax, whose largest term is exp(0)
    terms = np.exp(shifted)
    sums = terms.sum(axis=1)
    loss = float(np.mean(np.log(sums) - shifted[picks]))
    gradient = terms / sums[:, None]
    gradient[picks] -= 1
    gradient /= len(labels)
    return loss, gradient


def backward(layers: Sequence[Layer], x: Array, labels: Array, out: Sequence[Layer]) -> float:
    """The mean loss of a batch; its gradient by every W and b is written into `out`, in place."""
    *inputs, logits = forward(layers, x)
    loss, delta = softmax_cross_entropy(logits, labels)
    for k in reversed(range(len(layers))):
        np.matmul(inputs[k].T, delta, out=out[k].W)
        np.sum(delta, axis=0, out=out[k].b)
        if k > 0:
            delta = (delta @ layers[k].W.T) * (inputs[k] > 0)
    return loss


def evaluate(layers: Sequence[Layer], x: Array, labels: Array) -> tuple[float, float]:
    """The mean loss, and the fraction of rows whose largest logit is that of their label."""
    logits = forward(layers, x)[-1]
    loss, _ = softmax_cross_entropy(logits, labels)
    return loss, float(np.mean(logits.argmax(axis=1) == labels))
