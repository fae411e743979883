"""A convolutional network with batch normalisation that reads handwritten digits, in NumPy.

    python examples/numpy_convnet_batchnorm.py

One sees the test accuracy reach about 97 % within 6 epochs. A convolution is a product of matrices: the windows of the
image, one per row, times the kernel. Its result, one row per pixel and one column per channel, is what BatchNorm with
``axis=-1`` takes as it is. ReLU is part of BatchNorm's pass. gamma and beta are in the optimizer's buffer with all
other parameters (``attach``), and ``bn.backward`` writes their gradients there. The data come with scikit-learn:
``pip install 'fastopt[cli]'``.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits

import fastopt

EPOCHS, BATCH_SIZE, CHANNELS = 6, 32, (8, 16)


def windows(images: np.ndarray) -> np.ndarray:
    """Return the 3 x 3 window around every pixel of (N, H, W, C) images, as rows of 9 C numbers; the border is 0."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    found = sliding_window_view(padded, (3, 3), axis=(1, 2))  # (N, H, W, C, 3, 3), a view
    return found.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * images.shape[3])


def windows_backward(d_rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Add up, for every pixel of images of this shape, the gradients of the windows that it is part of."""
    count, height, width, channels = shape
    d_windows = d_rows.reshape(count, height, width, 3, 3, channels)
    d_padded = np.zeros((count, height + 2, width + 2, channels), d_rows.dtype)
    for i in range(3):
        for j in range(3):
            d_padded[:, i : i + height, j : j + width] += d_windows[:, :, :, i, j]
    return d_padded[:, 1:-1, 1:-1]


class Network:
    """Two convolutions with batch normalisation and ReLU, an average over 2 x 2 pixels after each, a dense layer."""

    def __init__(self, rng: np.random.Generator) -> None:
        ins = (1, *CHANNELS)
        kernels = [np.empty((9 * fan, out), np.float32) for fan, out in zip(ins, CHANNELS, strict=False)]
        self.norms = [fastopt.BatchNorm(out, axis=-1, activation="relu") for out in CHANNELS]
        self.opt = fastopt.AdamW(
            {
                "kernels": [fastopt.init.he_normal_(kernel, rng=rng) for kernel in kernels],  # no bias: beta is one
                "norms": [norm.params for norm in self.norms],
                "W": fastopt.init.xavier_normal_(np.empty((4 * CHANNELS[1], 10), np.float32), rng=rng),
                "b": np.zeros(10, np.float32),
            },
            lr=0.005,
            overrides={"norms.*": {"weight_decay": 0.0}, "b": {"weight_decay": 0.0}},
        )
        for norm, params, grads in zip(self.norms, self.opt.params["norms"], self.opt.grads["norms"], strict=True):
            norm.attach(params, grads)

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        """Return the logits, and keep what `backward` needs."""
        self.kept = []
        for kernel, norm in zip(self.opt.params["kernels"], self.norms, strict=True):
            rows = windows(x)
            shape = (*x.shape[:3], kernel.shape[1])
            z = norm.forward((rows @ kernel).reshape(shape), training=training)
            self.kept.append((rows, x.shape))
            x = z.reshape(shape[0], shape[1] // 2, 2, shape[2] // 2, 2, shape[3]).mean(axis=(2, 4))
        self.pooled = x
        return x.reshape(len(x), -1) @ self.opt.params["W"] + self.opt.params["b"]

    def backward(self, d_logits: np.ndarray) -> None:
        """Write the gradient of every parameter into ``opt.grads``."""
        params, grads = self.opt.params, self.opt.grads
        np.matmul(self.pooled.reshape(len(d_logits), -1).T, d_logits, out=grads["W"])
        d_logits.sum(axis=0, out=grads["b"])
        dx = (d_logits @ params["W"].T).reshape(self.pooled.shape)
        for k in (1, 0):
            rows, shape = self.kept[k]
            dz = self.norms[k].backward(np.repeat(np.repeat(dx / 4, 2, axis=1), 2, axis=2))  # of the average
            d_product = dz.reshape(-1, dz.shape[-1])
            np.matmul(rows.T, d_product, out=grads["kernels"][k])
            if k > 0:
                dx = windows_backward(d_product @ params["kernels"][k].T, shape)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean loss and its gradient with respect to the logits."""
    terms = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances = terms / terms.sum(axis=1, keepdims=True)
    picks = np.arange(len(labels)), labels
    loss = -np.log(chances[picks] + 1e-12).mean()
    chances[picks] -= 1
    return float(loss), chances / len(labels)


def main() -> None:
    """Train, and print how the network does on images that it has not seen."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]  # (N, 8, 8, 1)
    train, test = np.split(np.random.default_rng(0).permutation(len(images)), [1437])
    network = Network(np.random.default_rng(0))
    batches = fastopt.minibatches(images[train], digits.target[train], batch_size=BATCH_SIZE, rng=0, drop_last=True)
    for epoch in range(EPOCHS):
        losses = []
        for x, labels in batches:
            loss, d_logits = cross_entropy(network.forward(x, training=True), labels)
            network.backward(d_logits)
            network.opt.step()  # the gradients are in opt.grads
            losses.append(loss)
        right = network.forward(images[test]).argmax(axis=1) == digits.target[test]
        print(f"epoch {epoch + 1}   training loss {np.mean(losses):.3f}   test accuracy {right.mean():.3f}")


if __name__ == "__main__":
    main()
