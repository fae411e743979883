"""Zero-gradient steps of Adam and AMSGrad in closed form: many steps along a decaying momentum, as one expansion.

Without a gradient m and v only decay, and a step moves p by lr/bc1 m / (sqrt(v/bc2) + eps). The sum over k steps is m
times a function of sqrt(v), which is expanded about the mean of 1/sqrt(bc2) over these steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastopt.closed_forms import MOST


class ZeroGradientSteps(NamedTuple):
    """Coefficients of k zero-gradient steps: p = keep p - m F(v), m = b1^k m, v = b2^k v, e = e_e e + e_p p - m E(v).

    F(v) = sum over the k steps of a / (r sqrt(v) + eps), where a and r depend on the step. r hardly changes in the few
    steps before m vanishes: F is expanded about the mean `center` of r, with the moments f0, f2, f3, f4 of r - center.
    """

    keep: float
    m_k: float
    v_k: float
    center: float
    eps: float
    f0: float
    f2: float
    f3: float
    f4: float
    e_e: float
    e_p: float
    e0: float
    e1: float
    e2: float
    e3: float
    e4: float


def adam_zero_gradient(p, g, m, v, h):  # type: ignore[no-untyped-def]
    """Make zero-gradient steps of Adam."""
    x = math.sqrt(v)
    d = h.center * x + h.eps
    z = x / d
    return h.keep * p - m / d * (h.f0 + z * z * (h.f2 - z * (h.f3 - z * h.f4))), h.m_k * m, h.v_k * v


def adam_zero_gradient_averaged(p, g, m, v, e, h):  # type: ignore[no-untyped-def]
    """Make zero-gradient steps of Adam, and update the moving average of p."""
    x = math.sqrt(v)
    d = h.center * x + h.eps
    z = x / d
    e = h.e_e * e + h.e_p * p - m / d * (h.e0 - z * (h.e1 - z * (h.e2 - z * (h.e3 - z * h.e4))))
    return h.keep * p - m / d * (h.f0 + z * z * (h.f2 - z * (h.f3 - z * h.f4))), h.m_k * m, h.v_k * v, e


def amsgrad_zero_gradient(p, g, m, v, v_max, h):  # type: ignore[no-untyped-def]
    """Make zero-gradient steps of AMSGrad."""
    # v only falls, so v_max stays: only bc2 changes the root.
    p, m, _ = adam_zero_gradient(p, g, m, v_max, h)
    return p, m, h.v_k * v, v_max


def amsgrad_zero_gradient_averaged(p, g, m, v, v_max, e, h):  # type: ignore[no-untyped-def]
    """Make zero-gradient steps of AMSGrad, and update the moving average of p."""
    p, m, _, e = adam_zero_gradient_averaged(p, g, m, v_max, e, h)
    return p, m, h.v_k * v, v_max, e


class AdamClosedForm:
    """As `fastopt.closed_forms.Idle`: Adam's zero-gradient steps along a decaying momentum."""

    def __init__(self, plain: Any, averaged: Any, *, largest: bool):
        self.scalars = (plain, averaged)
        self.largest = largest
        """Whether the root uses the largest v, which does not decay."""

    def refusal(self, rule: Any, values: Mapping[str, Any], l2: bool) -> str | None:
        """As `Idle`."""
        if l2:
            return "with weight_decay every element has a gradient (use AdamW, or decoupled_weight_decay=True)"
        for name in ("betas", "eps"):
            if callable(values[name]):
                return f"{name} is a schedule"
        if values["eps_inside"]:
            return "the closed form is for eps outside the root (eps_inside=False)"
        if values["eps"] == 0.0:
            return "eps=0 divides 0 by 0 where there never was a gradient"
        return None

    def history(self, rule: Any, ema_weight: float | None) -> AdamHistory:
        """As `Idle`."""
        return AdamHistory(rule, self.scalars[ema_weight is not None], ema_weight, self.largest)


class AdamHistory:
    """As `fastopt.closed_forms.History`: sums over the steps for every age; a step adds a term to each sum.

    sums[n, k] = sum over the last k steps of a r^n for n up to 6. The sums give the moments about the mean, and an
    estimate of the truncation error of the expansion.
    """

    hyper: type = ZeroGradientSteps

    def __init__(self, rule: Any, scalar: Any, ema_weight: float | None, largest: bool):
        self.scalar = scalar
        self._rule = rule
        self._ema_weight = 0.0 if ema_weight is None else ema_weight
        self._largest = largest
        self._steps = 0
        self._sums = np.zeros((7, MOST + 1))
        self._averaged = np.zeros((7, MOST + 1))
        self._keep = np.ones(MOST + 1)
        self._e_e = np.ones(MOST + 1)
        self._e_p = np.zeros(MOST + 1)
        self._powers = np.zeros((7, MOST + 1))
        self._b1 = self._b2 = self._eps = 0.0

    def append(self, t: int, point: Any) -> None:
        """As `History`."""
        values = dict(zip(self._rule.hyperparameters, point.arguments, strict=True))
        lr, (b1, b2), self._eps = values["lr"], values["betas"], values["eps"]
        ages = np.arange(MOST + 1)
        exponents = np.arange(7)[:, None]
        if self._steps == 0:
            self._b1, self._b2 = b1, b2
            falling = 0.0 if self._largest else 0.5 * np.log(b2) if b2 > 0.0 else -np.inf
            with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
                decay = np.log(b1) + exponents * falling if b1 > 0.0 else np.full((7, 1), -np.inf)
                self._powers = np.where(ages == 0, 1.0, np.exp(decay * np.maximum(ages, 1)))
        bc1, bc2 = (1.0 - b1**t, 1.0 - b2**t) if values["bias_correction"] else (1.0, 1.0)
        n = self._steps + 1
        a, r = lr / bc1, bc2**-0.5
        if values["eps_hat"]:
            a, r = a / r, 1.0
        self._sums[:, 1 : n + 1] = point.keep * self._sums[:, :n] + a * r**exponents * self._powers[:, 1 : n + 1]
        self._keep[1 : n + 1] = point.keep * self._keep[:n]
        w = self._ema_weight
        if w:
            self._averaged[:, 1 : n + 1] = (1.0 - w) * self._averaged[:, :n] + w * self._sums[:, 1 : n + 1]
            self._e_e[1 : n + 1] = (1.0 - w) * self._e_e[:n]
            self._e_p[1 : n + 1] = (1.0 - w) * self._e_p[:n] + w * self._keep[1 : n + 1]
        self._steps = n

    def coefficients(self, ages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `History`."""
        sums = self._sums[:, ages]
        unmoved = sums[0] == 0.0  # no steps, or only steps with learning rate 0
        center = np.where(unmoved, 1.0, sums[1] / np.where(unmoved, 1.0, sums[0]))
        f = _about(center, sums)
        e = _about(center, self._averaged[:5, ages]) if self._ema_weight else np.zeros((5, ages.size))
        truncated = np.sqrt(np.abs(f[4] * f[6])) / center**5
        k = ages.astype(np.float64)
        columns = [self._keep[ages], self._b1**k, self._b2**k, center, np.where(unmoved, 1.0, self._eps)]
        columns += [f[0], f[2], f[3], f[4], self._e_e[ages], self._e_p[ages], *e]
        return np.stack(columns, 1), truncated <= 1e-8 * f[0]


def _about(center: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return the moments about `center` of the measures whose moments about 0 are the columns of `sums`."""
    moments = sums.copy()
    for n in range(1, len(sums)):  # shift by Horner's scheme: the binomial theorem without powers
        for k in range(len(sums) - 1, n - 1, -1):
            moments[k] -= center * moments[k - 1]
    return moments


ADAM = AdamClosedForm(adam_zero_gradient, adam_zero_gradient_averaged, largest=False)
AMSGRAD = AdamClosedForm(amsgrad_zero_gradient, amsgrad_zero_gradient_averaged, largest=True)
