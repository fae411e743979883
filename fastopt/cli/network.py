"""A small multilayer network in NumPy or CuPy: an example of a custom trainer that embeds fastopt.

The trainer owns the network; the optimizer owns the parameters and provides views of one flat buffer. `backward` reads
``opt.params`` and writes into ``opt.grads``: nothing is copied, and a step is one launch. With batch normalisation,
gamma and beta are in the same buffer (`new_norms`):

    opt = fastopt.Adam(new_layers([64, 32, 10], fastopt.init.he_normal_, rng))
    for x, labels in fastopt.minibatches(X, y, batch_size=32, rng=rng):
        loss = backward(opt.params, x, labels, out=opt.grads)
        opt.step()

With ``backend="cuda"`` the parameters are CuPy arrays. The inputs of the network must then also be CuPy arrays
(``module_of(opt.flat.data).asarray(X)``), and values stay on the device until they are read: ``float(loss)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastopt import BatchNorm, init
from fastopt.distributed import Communicator

Array = NDArray[Any]

ACTIVATIONS = ("relu", "tanh")
"""The function after every layer but the last: ``max(z, 0)`` or ``tanh(z)``."""


class Layer(NamedTuple):
    """``x W + b``: W is (inputs, outputs), b is (outputs,). The gradient of a layer has the same form.

    `bn` holds gamma and beta of the batch normalisation after the layer, or None.
    """

    W: Array
    b: Array
    bn: dict[str, Array] | None = None


def new_layers(
    sizes: Sequence[int], fill: Callable[..., Array], rng: np.random.Generator, dtype: DTypeLike = np.float32
) -> list[Layer]:
    """Return a layer for each two neighbours in `sizes`: W filled by `fill` (see `fastopt.init`), b zero."""
    layers = []
    for inputs, outputs in pairwise(sizes):
        W = fill(np.empty((inputs, outputs), dtype), rng=rng)
        layers.append(Layer(W, b=init.zeros_(np.empty(outputs, dtype))))
    return layers


def module_of(array: Array) -> ModuleType:
    """Return the module of the array, NumPy or CuPy: both have the same functions.

    >>> import numpy as np
    >>> module_of(np.zeros(3)).__name__
    'numpy'
    """
    return import_module(type(array).__module__)


def new_norms(
    layers: Sequence[Layer], backend: str = "cpu", activation: str = "relu", comm: Communicator | None = None
) -> tuple[list[Layer], list[BatchNorm]]:
    """Add batch normalisation after every layer but the last; return the layers with its parameters, and the norms.

    The pass of the norm includes ReLU; tanh is a separate pass after it. `comm`: the processes over whose batches the
    norms take their statistics.

    Let the optimizer pack the layers, then `attach` each norm to its views:

        layers, norms = new_norms(layers)
        opt = fastopt.Adam(layers)
        for norm, params, grads in zip(norms, opt.params, opt.grads):
            norm.attach(params.bn, grads.bn)
    """
    fused = "relu" if activation == "relu" else None
    norms = [
        BatchNorm(layer.W.shape[1], activation=fused, dtype=layer.W.dtype, backend=backend, comm=comm)
        for layer in layers[:-1]
    ]
    normed = [layer._replace(bn=norm.params) for layer, norm in zip(layers, norms, strict=False)]
    return [*normed, layers[-1]], norms


def forward(
    layers: Sequence[Layer],
    x: Array,
    norms: Sequence[BatchNorm] = (),
    training: bool = False,
    activation: str = "relu",
) -> list[Array]:
    """Return the input of each layer and the logits: ``a = relu(a W + b)``, the last layer without relu.

    `activation` is one of `ACTIVATIONS`, the same as for `new_norms`.
    """
    xp = module_of(x)
    activations = [x]
    for k, layer in enumerate(layers):
        z = activations[-1] @ layer.W + layer.b
        if k < len(layers) - 1:
            if norms:
                z = norms[k].forward(z, training=training)
            if activation == "tanh":
                z = xp.tanh(z)
            elif not norms:
                xp.maximum(z, 0, out=z)
        activations.append(z)
    return activations


def softmax_cross_entropy(logits: Array, labels: Array, rows: int | None = None) -> tuple[Any, Array]:
    """Return the mean of ``log(sum(exp(z))) - z[label]`` over the rows and its gradient ``(softmax - onehot)/rows``.

    rows: of the batch of which these are a part, whose sums are then divided by that number; None: of these.
    """
    rows = len(labels) if rows is None else rows
    xp = module_of(logits)
    picks = xp.arange(len(labels)), labels
    shifted = logits - logits.max(axis=1, keepdims=True)  # the same softmax, whose largest term is exp(0)
    terms = xp.exp(shifted)
    sums = terms.sum(axis=1)
    loss = (xp.log(sums) - shifted[picks]).sum() / rows
    gradient = terms / sums[:, None]
    gradient[picks] -= 1
    gradient /= rows
    return loss, gradient


def backward(
    layers: Sequence[Layer],
    x: Array,
    labels: Array,
    out: Sequence[Layer],
    norms: Sequence[BatchNorm] = (),
    activation: str = "relu",
    rows: int | None = None,
) -> Any:
    """Return the mean loss of a batch; write its gradient by every parameter into `out`, in place.

    rows: as in `softmax_cross_entropy`.
    """
    xp = module_of(x)
    *inputs, logits = forward(layers, x, norms, training=True, activation=activation)
    loss, delta = softmax_cross_entropy(logits, labels, rows)
    for k in reversed(range(len(layers))):
        xp.matmul(inputs[k].T, delta, out=out[k].W)
        delta.sum(axis=0, out=out[k].b)
        if k > 0:
            delta = delta @ layers[k].W.T
            if activation == "tanh":
                delta *= 1 - inputs[k] ** 2
            elif not norms:
                delta *= inputs[k] > 0
            if norms:
                delta = norms[k - 1].backward(delta, out=delta)
    return loss


def evaluate(
    layers: Sequence[Layer], x: Array, labels: Array, norms: Sequence[BatchNorm] = (), activation: str = "relu"
) -> tuple[float, float]:
    """Return the mean loss and the fraction of rows whose largest logit is their label's; wait for the device."""
    logits = forward(layers, x, norms, activation=activation)[-1]
    loss, _ = softmax_cross_entropy(logits, labels)
    return float(loss), float((logits.argmax(axis=1) == labels).mean())
