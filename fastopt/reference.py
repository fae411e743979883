"""Every optimizer and BatchNorm in plain NumPy: the oracle of the tests and the NumPy side of the benchmarks.

The module imports nothing from fastopt, so a mistake in a compiled rule cannot be in this file as well. Each function
writes its formula as printed in the paper, or, if several forms are in use, as in the named framework; no constant is
folded and no term is rearranged. The code is not optimized for speed.

All optimizers have the same signature, ``optimizer(p, g, state, t, **hyperparameters) -> None``:

- ``p`` parameter, float32 or float64 of any shape, updated in place;
- ``g`` gradient of the loss, the shape of ``p``, only read (another dtype is first rounded to that of ``p``);
- ``state`` dictionary of arrays like ``p`` (NovoGrad's "v" is one number, Adafactor's states are one per row and one
  per column), updated in place, returned by `init_state`;
- ``t`` number of this update, a Python int, 1 at the first.

Everything is computed in the dtype of ``p``, except norms and means over whole tensors, rows and columns, which are
computed in float64. Hyperparameters are Python numbers: a NumPy float64 scalar would promote the arithmetic of float32
arrays to float64. Their ranges are not checked. ``t``, shapes, dtypes, the names of the states and options such as
``form`` are checked before anything is written; a bad one raises ValueError or TypeError with the argument's name.
- ``state`` dictionary of arrays like ``p`` (some are one number, as NovoGrad's "v"), updated in place, returned by
  `init_state`;
- ``t`` number of this update, a Python int, 1 at the first.

Everything is computed in the dtype of ``p``, except the norms and sums of whole tensors (LAMB, LARS, NovoGrad, Muon,
Prodigy), which are computed in float64. Hyperparameters are Python numbers: a NumPy float64 scalar would promote the
arithmetic of float32 arrays to float64. Their ranges are not checked. ``t``, shapes, dtypes, the names of the states
and options such as ``form`` are checked before anything is written; a bad one raises ValueError or TypeError with the
argument's name.

`batchnorm_forward` and `batchnorm_backward`, at the end of the file, take and return arrays.

In the formulas ``g`` is the gradient after L2 weight decay, ``g + weight_decay * p``, unless the formula contains
weight_decay. In the units of hyperparameters [p] stands for the unit of the parameter and [g] for that of the gradient,
which is [loss]/[p]; a hyperparameter without a unit is a pure number.

>>> import numpy as np
>>> from fastopt import reference
>>> p = np.array([1.0, -1.0])
>>> state = reference.init_state("momentum", p, momentum=0.5)
>>> for t in (1, 2, 3):
...     reference.momentum(p, 2 * p, state, t, lr=0.25, momentum=0.5)  # 2 p is the gradient of |p|^2
>>> p.tolist()
[-0.25, 0.25]
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "OPTIMIZERS",
    "adabelief",
    "adabound",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adam_mini",
    "adamax",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "asgd",
    "batchnorm_backward",
    "batchnorm_forward",
    "ftrl",
    "init_state",
    "lamb",
    "lars",
    "lion",
    "mars",
    "momentum",
    "muon",
    "nadam",
    "nesterov",
    "novograd",
    "prodigy",
    "radam",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_eval",
    "sgd",
    "shampoo",
    "soap",
    "sophia",
    "stable_adamw",
    "yogi",
]

Array: TypeAlias = npt.NDArray[np.floating[Any]]
State: TypeAlias = dict[str, Array]


def _gradient(p: Array, g: Array, t: int, weight_decay: float = 0.0) -> Array:
    """Check the arguments that all optimizers share, and return g + weight_decay * p in the dtype of p."""
    if p.dtype not in (np.float32, np.float64):
        raise TypeError(f"p: must be float32 or float64, got {p.dtype}; convert it with p.astype(numpy.float64)")
    if g.shape != p.shape:
        # NumPy would silently broadcast a (1,) gradient, and an oracle must not guess.
        raise ValueError(f"g: must have the shape of p, {p.shape}, got {g.shape}; reshape the gradient")
    if not isinstance(t, int):
        # beta ** numpy.int64 is a numpy.float64, which would promote float32 arithmetic to float64.
        raise TypeError(f"t: must be a Python int, got {t!r} of type {type(t).__name__}; pass int(t)")
    if t < 1:
        raise ValueError(f"t: must be at least 1, got {t}; the first update is t = 1")
    g = g.astype(p.dtype, copy=False)
    return g + weight_decay * p if weight_decay else g


def _states(
    state: State, p: Array, *names: str, numbers: tuple[str, ...] = (), lines: Mapping[str, int] | None = None
) -> list[Array]:
    """Return the named states after a check that each is an array like p; one number if it is in `numbers`; and as many
    as `lines` says, one for each row or column of p."""
    for name in names:
        if name not in state:
            raise ValueError(
                f"state: must have {name!r}, got {sorted(state)}; use init_state with the same hyperparameters"
            )
        s = state[name]
        shape, like = ((), "one number for all of p") if name in numbers else (p.shape, "like p")
        if lines and name in lines:
            shape, like = (lines[name],), "a number for each row or column of p"
        if s.shape != shape or s.dtype != p.dtype:
            raise ValueError(
                f"state {name!r}: must be {p.dtype} of shape {shape} ({like}), got {s.dtype} of shape {s.shape}; "
                "use init_state with this p"
            )
    return [state[name] for name in names]


def _matrix_of(p: Array) -> tuple[int, int]:
    """Return the rows and columns of p: its first axis and the others, or a single row."""
    return (p.shape[0], math.prod(p.shape[1:])) if p.ndim > 1 else (1, p.size)


def _root(v: Array, eps: float, eps_inside: bool) -> Array:
    """Return sqrt(v + eps) if eps_inside, else sqrt(v) + eps."""
    root: Array = np.sqrt(v + eps) if eps_inside else np.sqrt(v) + eps
    return root


def _norm(x: Array) -> float:
    """Return the Euclidean norm over all of x, computed in float64."""
    wide = np.asarray(x.astype(np.float64))
    scale = 2.0 ** (math.frexp(np.abs(wide).max(initial=0.0))[1] - 1)  # an exact factor: squares may leave the range
    return float(np.linalg.norm(wide / scale)) * scale


def _sum(x: Array) -> float:
    """Return the sum over all of x, computed in float64."""
    return float(np.asarray(x.astype(np.float64)).sum())


def _adam_moments(
    p: Array, g: Array, state: State, t: int, betas: tuple[float, float], bias_correction: bool, amsgrad: bool
) -> tuple[Array, Array]:
    """Update the moments of Adam (Algorithm 1) and return the two estimates m_hat and v_hat."""
    m, v, *v_max = _states(state, p, "m", "v", *(["v_max"] if amsgrad else []))
    b1, b2 = betas
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * g**2
    if amsgrad:
        # Take the maximum of the raw second moment and correct it afterwards, as in torch: the corrected moment would
        # reach its maximum at t = 1, where the correction is largest.
        v_max[0][...] = np.maximum(v_max[0], v)
        v = v_max[0]
    if not bias_correction:
        return m, v
    return m / (1 - b1**t), v / (1 - b2**t)


def _adam_fraction(
    p: Array,
    g: Array,
    state: State,
    t: int,
    betas: tuple[float, float],
    eps: float,
    eps_inside: bool,
    eps_hat: bool,
    bias_correction: bool,
    amsgrad: bool,
) -> tuple[Array, Array]:
    """Update the moments of Adam and return the numerator and the denominator of its step, without lr."""
    if not (eps_hat and bias_correction):
        m_hat, v_hat = _adam_moments(p, g, state, t, betas, bias_correction, amsgrad)
        return m_hat, _root(v_hat, eps, eps_inside)
    b1, b2 = betas
    m, v = _adam_moments(p, g, state, t, betas, bias_correction=False, amsgrad=amsgrad)
    return math.sqrt(1 - b2**t) / (1 - b1**t) * m, _root(v, eps, eps_inside)


def sgd(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    lr_inside: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """Stochastic gradient descent, with the momentum of torch.optim.SGD.

        momentum = 0:   p = p - lr g
        otherwise:      v = g                                     at t = 1, for any dampening
                        v = momentum v + (1 - dampening) g        for t > 1
                        p = p - lr v                              or, nesterov, p = p - lr (g + momentum v)
        lr_inside:      v = -lr g                                 at t = 1, for any dampening
                        v = momentum v - lr (1 - dampening) g     for t > 1
                        p = p + v                                 or, nesterov, p = p + momentum v - lr g

    lr_inside has no effect while lr is constant or without momentum.

    lr [p]/[g]; momentum and dampening no unit; weight_decay [g]/[p]. State: "velocity", [g], or [p] with lr_inside;
    only with momentum.

    Source: H. Robbins, S. Monro, A stochastic approximation method, Ann. Math. Statist. 22 (1951); dampening and the
    first step with momentum as in torch.optim.SGD; lr_inside as in keras.optimizers.SGD.

    >>> p = np.array([1.0, 2.0])
    >>> sgd(p, np.array([4.0, -4.0]), {}, 1, lr=0.25)
    >>> p.tolist()
    [0.0, 3.0]
    """
    g = _gradient(p, g, t, weight_decay)
    if momentum == 0:
        p -= lr * g
        return
    (v,) = _states(state, p, "velocity")
    if lr_inside:
        v[...] = -lr * g if t == 1 else momentum * v - lr * (1 - dampening) * g
        p += momentum * v - lr * g if nesterov else v
    else:
        v[...] = g if t == 1 else momentum * v + (1 - dampening) * g
        p -= lr * (g + momentum * v) if nesterov else lr * v


def asgd(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.01,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
) -> None:
    """Averaged stochastic gradient descent.

        eta = lr / (1 + lambd lr (t - 1))^alpha
        p = (1 - lambd eta) p - eta g
        ax = ax + (p - ax) / max(1, t - 1 - t0)

    lr [p]/[g]; lambd [g]/[p]; alpha no unit; t0 in updates; weight_decay [g]/[p]. State: "ax" [p], which starts as a
    copy of p, in torch at 0: the first update replaces it.

    Source: B. T. Polyak, A. B. Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim.
    30 (1992), https://doi.org/10.1137/0330046, in the form of torch.optim.ASGD.

    >>> p = np.array([0.0]); state = init_state("asgd", p)
    >>> for t, g in enumerate((8.0, -4.0, 2.0), 1):
    ...     asgd(p, np.array([g]), state, t, lr=0.5, lambd=0.0, t0=0.0)  # -4, -2, -3
    >>> p.tolist(), state["ax"].tolist()
    ([-3.0], [-2.5])
    """
    g = _gradient(p, g, t, weight_decay)
    (ax,) = _states(state, p, "ax")
    eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
    mu = 1 / max(1, t - 1 - t0)
    p *= 1 - lambd * eta
    p -= eta * g
    ax[...] = p if mu == 1 else ax + mu * (p - ax)


def momentum(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.01,
    momentum: float = 0.9,
    form: str = "heavy_ball",
    weight_decay: float = 0.0,
) -> None:
    """Gradient descent with classical momentum, in the three forms in use; v = 0 before the first update.

        "heavy_ball":   v = momentum v + g                   p = p - lr v
        "ema":          v = momentum v + (1 - momentum) g    p = p - lr v
        "lr_inside":    v = momentum v - lr g                p = p + v

    lr [p]/[g]; momentum no unit; weight_decay [g]/[p]. State: "velocity", [g], or [p] in the form "lr_inside".
    "ema" is "heavy_ball" with lr (1 - momentum) instead of lr; "lr_inside" is "heavy_ball" while lr is constant.

    Source: B. T. Polyak, Some methods of speeding up the convergence of iteration methods, USSR Comput. Math. Math.
    Phys. 4 (1964), the heavy ball; I. Sutskever et al., On the importance of initialization and momentum in deep
    learning, ICML 2013, Eqs. (1)-(2), is "lr_inside".

    >>> p = np.array([1.0]); state = init_state("momentum", p)
    >>> for t in (1, 2):
    ...     momentum(p, np.array([1.0]), state, t, lr=0.25, momentum=0.5)
    >>> p.tolist(), state["velocity"].tolist()
    ([0.375], [1.5])
    """
    if form not in ("heavy_ball", "ema", "lr_inside"):
        raise ValueError(f"form: must be one of 'heavy_ball', 'ema', 'lr_inside', got {form!r}")
    g = _gradient(p, g, t, weight_decay)
    (v,) = _states(state, p, "velocity")
    if form == "heavy_ball":
        v[...] = momentum * v + g
        p -= lr * v
    elif form == "ema":
        v[...] = momentum * v + (1 - momentum) * g
        p -= lr * v
    else:
        v[...] = momentum * v - lr * g
        p += v


def nesterov(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.01,
    momentum: float = 0.9,
    form: str = "reformulated",
    weight_decay: float = 0.0,
) -> None:
    """Nesterov's accelerated gradient, in the two forms in use; v = 0 before the first update.

        "reformulated":   v = momentum v + g        p = p - lr (g + momentum v)      g is the gradient at p
        "lookahead":      v = momentum v + lr g     p = p - v                        g is the gradient at p - momentum v

    For "lookahead" the caller evaluates g at the look-ahead point but passes the unshifted p. The L2 term of
    weight_decay uses the unshifted p.

    With constant lr and no weight decay both forms follow the same path: the p of "reformulated" are the look-ahead
    points p - momentum v of "lookahead", and the v of "lookahead" is lr times the other.

    lr [p]/[g]; momentum no unit; weight_decay [g]/[p]. State: "velocity", [g], or [p] in the form "lookahead".

    Source: Y. Nesterov, A method of solving a convex programming problem with convergence rate O(1/k^2), Soviet Math.
    Dokl. 27 (1983); "lookahead" as in I. Sutskever et al., ICML 2013, Eqs. (3)-(4); "reformulated" as in Y. Bengio,
    N. Boulanger-Lewandowski, R. Pascanu, Advances in optimizing recurrent networks, ICASSP 2013,
    https://arxiv.org/abs/1212.0901 (simplified Nesterov momentum), and in torch.optim.SGD.

    >>> p = np.array([1.0]); state = init_state("nesterov", p)
    >>> nesterov(p, np.array([1.0]), state, 1, lr=0.25, momentum=0.5)
    >>> p.tolist(), state["velocity"].tolist()
    ([0.625], [1.0])
    """
    if form not in ("reformulated", "lookahead"):
        raise ValueError(f"form: must be one of 'reformulated', 'lookahead', got {form!r}")
    g = _gradient(p, g, t, weight_decay)
    (v,) = _states(state, p, "velocity")
    if form == "reformulated":
        v[...] = momentum * v + g
        p -= lr * (g + momentum * v)
    else:
        v[...] = momentum * v + lr * g
        p -= v


def adagrad(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.01,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    eps_inside: bool = False,
    initial_accumulator_value: float = 0.0,
    weight_decay: float = 0.0,
) -> None:
    """Adagrad, the diagonal form.

        lr_t = lr / (1 + (t - 1) lr_decay)
        s = s + g^2
        p = p - lr_t g / (sqrt(s) + eps)        or, eps_inside, / sqrt(s + eps)

    lr [p]; lr_decay no unit; eps [g], or [g]^2 with eps_inside; weight_decay [g]/[p]. State: "sum_sq" [g]^2, which
    starts at initial_accumulator_value: only init_state uses that argument; this function accepts it so that both take
    the same hyperparameters.

    Source: J. Duchi, E. Hazan, Y. Singer, Adaptive subgradient methods for online learning and stochastic optimization,
    JMLR 12 (2011), section 1.1, and Figure 1 for eps outside of the root; lr_decay as in torch.optim.Adagrad.

    >>> p = np.array([1.0]); state = init_state("adagrad", p)
    >>> adagrad(p, np.array([-4.0]), state, 1, lr=0.25, eps=0.0)
    >>> p.tolist(), state["sum_sq"].tolist()
    ([1.25], [16.0])
    """
    del initial_accumulator_value
    g = _gradient(p, g, t, weight_decay)
    (s,) = _states(state, p, "sum_sq")
    lr_t = lr / (1 + (t - 1) * lr_decay)
    s[...] = s + g**2
    p -= lr_t * g / _root(s, eps, eps_inside)


def adadelta(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> None:
    """Adadelta.

        s = rho s + (1 - rho) g^2
        d = sqrt(r + eps) / sqrt(s + eps) g         r from the previous update
        p = p - lr d
        r = rho r + (1 - rho) d^2

    lr and rho no unit (the paper has lr = 1); eps is added both to [g]^2 and to [p]^2; weight_decay [g]/[p].
    States: "square_avg" is s [g]^2, "acc_delta" is r [p]^2.

    Source: M. D. Zeiler, ADADELTA: an adaptive learning rate method, 2012, https://arxiv.org/abs/1212.5701, Algorithm
    1.

    >>> p = np.array([1.0]); state = init_state("adadelta", p)
    >>> adadelta(p, np.array([4.0]), state, 1, rho=0.75, eps=12.0)
    >>> (1 - p).round(6).tolist(), state["square_avg"].tolist(), state["acc_delta"].round(6).tolist()
    ([3.464102], [4.0], [3.0])
    """
    g = _gradient(p, g, t, weight_decay)
    s, r = _states(state, p, "square_avg", "acc_delta")
    s[...] = rho * s + (1 - rho) * g**2
    d = np.sqrt(r + eps) / np.sqrt(s + eps) * g
    p -= lr * d
    r[...] = rho * r + (1 - rho) * d**2


def rmsprop(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    eps_inside: bool = False,
    lr_inside: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """RMSprop, with the centering of Graves and the momentum of torch as options.

        v = alpha v + (1 - alpha) g^2
        centered:   a = alpha a + (1 - alpha) g ;  w = max(v - a^2, 0)         otherwise w = v
        d = sqrt(w) + eps                                                      or, eps_inside, sqrt(w + eps)
        momentum = 0:   p = p - lr g / d
        otherwise:      b = momentum b + g / d ;  p = p - lr b
                        or, lr_inside, b = momentum b + lr g / d ;  p = p - b

    Rounding can make the variance v - a^2 negative; the maximum keeps the root real.

    lr [p]; alpha and momentum no unit; eps [g], or [g]^2 with eps_inside; weight_decay [g]/[p]. States: "square_avg"
    is v [g]^2; "grad_avg" is a [g], if centered; "buf" is b, no unit, or [p] with lr_inside, with momentum.

    Source: T. Tieleman, G. Hinton, Lecture 6.5 of Neural Networks for Machine Learning, Coursera 2012; centered (with
    eps inside) is A. Graves, Generating sequences with recurrent neural networks, 2013,
    https://arxiv.org/abs/1308.0850, Eqs. (38)-(41), except for the momentum, which is that of torch.optim.RMSprop, or,
    lr_inside, that of keras.optimizers.RMSprop and optax.rmsprop.

    >>> p = np.array([1.0]); state = init_state("rmsprop", p)
    >>> rmsprop(p, np.array([-4.0]), state, 1, lr=0.25, alpha=0.75, eps=0.0)
    >>> p.tolist(), state["square_avg"].tolist()
    ([1.5], [4.0])
    """
    g = _gradient(p, g, t, weight_decay)
    names = [name for name, on in (("square_avg", True), ("grad_avg", centered), ("buf", momentum != 0)) if on]
    arrays = dict(zip(names, _states(state, p, *names), strict=True))
    v = arrays["square_avg"]
    v[...] = alpha * v + (1 - alpha) * g**2
    if centered:
        a = arrays["grad_avg"]
        a[...] = alpha * a + (1 - alpha) * g
        d = _root(np.maximum(v - a**2, 0), eps, eps_inside)
    else:
        d = _root(v, eps, eps_inside)
    if momentum == 0:
        p -= lr * g / d
    else:
        b = arrays["buf"]
        if lr_inside:
            b[...] = momentum * b + lr * g / d
            p -= b
        else:
            b[...] = momentum * b + g / d
            p -= lr * b


def adam(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_inside: bool = False,
    eps_hat: bool = False,
    bias_correction: bool = True,
    amsgrad: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """Adam, and AMSGrad as an option.

        m = b1 m + (1 - b1) g            m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) g^2          v_hat = v / (1 - b2^t)
        p = p - lr m_hat / (sqrt(v_hat) + eps)          or, eps_inside, / sqrt(v_hat + eps)
        eps_hat:    p = p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)      or, eps_inside, / sqrt(v + eps)

    bias_correction=False: m_hat = m, v_hat = v, and eps_hat has no effect. amsgrad: v_max = max(v_max, v), and v_max
    replaces v in v_hat and in the line of eps_hat.

    lr [p]; betas no unit; eps [g], or [g]^2 with eps_inside; weight_decay [g]/[p]. States: "m" [g], "v" [g]^2, and with
    amsgrad "v_max" [g]^2.

    Source: D. P. Kingma, J. Ba, Adam: a method for stochastic optimization, ICLR 2015,
    https://arxiv.org/abs/1412.6980, Algorithm 1, and the end of section 2 for eps_hat (also in keras.optimizers.Adam);
    AMSGrad is S. J. Reddi, S. Kale, S. Kumar, On the convergence of Adam and beyond, ICLR 2018, Algorithm 2, with the
    bias correction of torch.optim.Adam, which the paper does not have.

    >>> p = np.array([1.0, 1.0]); state = init_state("adam", p)
    >>> adam(p, np.array([4.0, -0.5]), state, 1, lr=0.25, betas=(0.5, 0.75), eps=0.0)
    >>> p.tolist(), state["m"].tolist(), state["v"].tolist()
    ([0.75, 1.25], [2.0, -0.25], [4.0, 0.0625])
    """
    g = _gradient(p, g, t, weight_decay)
    u, d = _adam_fraction(p, g, state, t, betas, eps, eps_inside, eps_hat, bias_correction, amsgrad)
    p -= lr * u / d


def adamw(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_inside: bool = False,
    eps_hat: bool = False,
    bias_correction: bool = True,
    amsgrad: bool = False,
    weight_decay: float = 0.01,
) -> None:
    """Adam with decoupled weight decay: the decay does not pass through the moments.

        p = (1 - lr weight_decay) p
        p = p - lr m_hat / (sqrt(v_hat) + eps)          with m_hat and v_hat as in adam, of the gradient without decay

    lr [p]; weight_decay 1/[p], so that lr weight_decay is the fraction of p lost per update; betas, eps, eps_inside,
    eps_hat, bias_correction and amsgrad as in `adam`.
    States: "m" [g], "v" [g]^2, and with amsgrad "v_max" [g]^2.

    Source: I. Loshchilov, F. Hutter, Decoupled weight decay regularization, ICLR 2019,
    https://arxiv.org/abs/1711.05101, Algorithm 2, with the decay multiplied by lr as in torch.optim.AdamW.

    >>> p = np.array([1.0]); state = init_state("adamw", p)
    >>> adamw(p, np.array([4.0]), state, 1, lr=0.25, eps=0.0, weight_decay=0.5)
    >>> p.tolist()
    [0.625]
    """
    g = _gradient(p, g, t)
    u, d = _adam_fraction(p, g, state, t, betas, eps, eps_inside, eps_hat, bias_correction, amsgrad)
    p *= 1 - lr * weight_decay
    p -= lr * u / d


def lamb(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
) -> None:
    """LAMB: Adam's direction, with a length proportional to that of the parameter. p is one whole parameter tensor.

        u = m_hat / (sqrt(v_hat) + eps) + weight_decay p          m_hat, v_hat as in adam, of the gradient without decay
        ratio = |p| / |u|                                         Euclidean norms over all of p; 1 if either is 0
        p = p - lr ratio u

    bias_correction=False: m_hat = m, v_hat = v. The norms are computed in float64 for any dtype of p.

    lr no unit: it is the fraction of |p| moved per update; betas no unit; eps [g]; weight_decay 1/[p]. States: "m" [g],
    "v" [g]^2.

    Source: Y. You et al., Large batch optimization for deep learning: training BERT in 76 minutes, ICLR 2020,
    https://arxiv.org/abs/1904.00962v3, Algorithm 2, with phi the identity.

    >>> p = np.array([3.0, 4.0]); state = init_state("lamb", p)
    >>> lamb(p, np.array([7.0, 0.0]), state, 1, lr=0.25, weight_decay=0.0)  # u = (1, 0), |p| / |u| = 5
    >>> p.round(5).tolist()
    [1.75, 4.0]
    """
    g = _gradient(p, g, t)
    m_hat, v_hat = _adam_moments(p, g, state, t, betas, bias_correction, amsgrad=False)
    u = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p
    p_norm, u_norm = _norm(p), _norm(u)
    ratio = 1.0 if p_norm == 0 or u_norm == 0 else p_norm / u_norm
    p -= lr * ratio * u


def nadam(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    weight_decay: float = 0.0,
) -> None:
    """NAdam: Adam with Nesterov momentum, whose weight grows with t.

        mu_i = b1 (1 - 0.5 0.96^(i momentum_decay))
        prod = mu_1 mu_2 ... mu_t
        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        m_bar = (1 - mu_t) / (1 - prod) g + mu_{t+1} / (1 - prod mu_{t+1}) m
        p = p - lr m_bar / (sqrt(v / (1 - b2^t)) + eps)

    lr [p]; betas and momentum_decay no unit; eps [g]; weight_decay [g]/[p]. States: "m" [g], "v" [g]^2.

    Source: T. Dozat, Incorporating Nesterov momentum into Adam, ICLR 2016 workshop,
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, Algorithm 2, with b1 instead of mu_t in m, as in
    torch.optim.NAdam.

    >>> p = np.array([1.0]); state = init_state("nadam", p)
    >>> nadam(p, np.array([4.0]), state, 1, lr=0.375, betas=(0.5, 0.75), eps=0.0, momentum_decay=0.0)  # mu = 1/4
    >>> p.round(6).tolist(), state["m"].tolist(), state["v"].tolist()
    ([0.575], [2.0], [4.0])
    """
    g = _gradient(p, g, t, weight_decay)
    m, v = _states(state, p, "m", "v")
    b1, b2 = betas
    mu = [b1 * (1 - 0.5 * 0.96 ** (i * momentum_decay)) for i in range(1, t + 2)]
    mu_t, mu_next, product = mu[t - 1], mu[t], math.prod(mu[:t])
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * g**2
    m_bar = (1 - mu_t) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
    p -= lr * m_bar / (np.sqrt(v / (1 - b2**t)) + eps)


def radam(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_hat: bool = True,
    weight_decay: float = 0.0,
) -> None:
    """RAdam: Adam that ignores the second moment until it has enough gradients, and then phases it in.

        m = b1 m + (1 - b1) g            m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) g^2
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 t b2^t / (1 - b2^t)
        rho > 5:     r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
                     p = p - lr m_hat r sqrt(1 - b2^t) / (sqrt(v) + eps)
        otherwise:   p = p - lr m_hat

    eps_hat=False: p = p - lr m_hat r / (sqrt(v / (1 - b2^t)) + eps), as in optax.

    lr [p], and [p]/[g] while rho is at most 5; betas no unit; eps [g]; weight_decay [g]/[p]. States: "m" [g], "v"
    [g]^2.

    Source: L. Liu et al., On the variance of the adaptive learning rate and beyond, ICLR 2020,
    https://arxiv.org/abs/1908.03265, Algorithm 2, with the bound 5 of torch.optim.RAdam instead of the paper's 4, and
    with torch's eps, which the paper does not have.

    >>> p = np.array([1.0]); state = init_state("radam", p)
    >>> radam(p, np.array([4.0]), state, 1, lr=0.125)  # rho = 1: a step of plain gradient descent
    >>> p.round(12).tolist(), state["m"].round(12).tolist()
    ([0.5], [0.4])
    """
    g = _gradient(p, g, t, weight_decay)
    m, v = _states(state, p, "m", "v")
    b1, b2 = betas
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * g**2
    m_hat = m / (1 - b1**t)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    if rho > 5:
        r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        bc2 = 1 - b2**t
        root = np.sqrt(v) / math.sqrt(bc2)
        p -= lr * m_hat * r / (root + (eps / math.sqrt(bc2) if eps_hat else eps))
    else:
        p -= lr * m_hat


def adamax(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_inside: bool = True,
    weight_decay: float = 0.0,
) -> None:
    """Adamax: Adam with a decaying maximum of the gradients instead of their mean square.

        m = b1 m + (1 - b1) g
        eps_inside:    u = max(b2 u, |g| + eps)      p = p - lr / (1 - b1^t) m / u
        otherwise:     u = max(b2 u, |g|)            p = p - lr / (1 - b1^t) m / (u + eps)

    lr [p]; betas no unit; eps [g], inside the maximum or not; weight_decay [g]/[p]. States: "m" [g], "u" [g].

    Source: D. P. Kingma, J. Ba, Adam: a method for stochastic optimization, ICLR 2015,
    https://arxiv.org/abs/1412.6980, Algorithm 2, which has no eps; eps_inside as in torch.optim.Adamax, the other form
    as in keras.optimizers.Adamax.

    >>> p = np.array([1.0]); state = init_state("adamax", p)
    >>> adamax(p, np.array([-3.0]), state, 1, lr=0.5, betas=(0.5, 0.75), eps=1.0)
    >>> p.tolist(), state["m"].tolist(), state["u"].tolist()
    ([1.375], [-1.5], [4.0])
    """
    g = _gradient(p, g, t, weight_decay)
    m, u = _states(state, p, "m", "u")
    b1, b2 = betas
    m[...] = b1 * m + (1 - b1) * g
    if eps_inside:
        u[...] = np.maximum(b2 * u, np.abs(g) + eps)
        p -= lr / (1 - b1**t) * m / u
    else:
        u[...] = np.maximum(b2 * u, np.abs(g))
        p -= lr / (1 - b1**t) * m / (u + eps)


def lion(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> None:
    """Lion: steps of constant size along the sign of an average of the gradients.

        p = (1 - lr weight_decay) p
        p = p - lr sign(b1 m + (1 - b1) g)          sign(0) = 0
        m = b2 m + (1 - b2) g

    lr [p]; betas no unit; weight_decay 1/[p]. State: "m" [g].

    Source: X. Chen et al., Symbolic discovery of optimization algorithms, NeurIPS 2023,
    https://arxiv.org/abs/2302.06675, Algorithm 2.

    >>> p = np.array([1.0, 1.0, 1.0]); state = init_state("lion", p)
    >>> lion(p, np.array([4.0, -0.5, 0.0]), state, 1, lr=0.25, betas=(0.5, 0.75))
    >>> p.tolist(), state["m"].tolist()
    ([0.75, 1.25, 1.0], [1.0, -0.125, 0.0])
    """
    g = _gradient(p, g, t)
    (m,) = _states(state, p, "m")
    b1, b2 = betas
    p *= 1 - lr * weight_decay
    p -= lr * np.sign(b1 * m + (1 - b1) * g)
    m[...] = b2 * m + (1 - b2) * g


def adabelief(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
) -> None:
    """AdaBelief: Adam with the mean square of the gradient's deviation from the first moment.

        p = (1 - lr weight_decay) p
        m = b1 m + (1 - b1) g                         m_hat = m / (1 - b1^t)
        s = b2 s + (1 - b2) (g - m)^2 + eps           s_hat = s / (1 - b2^t)        with the new m
        p = p - lr m_hat / (sqrt(s_hat) + eps)

    lr [p]; betas no unit; eps is added both to [g]^2 and to [g]; weight_decay 1/[p]. States: "m" [g], "s" [g]^2.

    Source: J. Zhuang et al., AdaBelief optimizer: adapting stepsizes by the belief in observed gradients, NeurIPS 2020,
    https://arxiv.org/abs/2010.07468, Algorithm 2, with decoupled weight decay.

    >>> p = np.array([1.0]); state = init_state("adabelief", p)
    >>> adabelief(p, np.array([4.0]), state, 1, lr=0.25, betas=(0.5, 0.75), eps=0.0)
    >>> p.tolist(), state["m"].tolist(), state["s"].tolist()
    ([0.5], [2.0], [1.0])
    """
    g = _gradient(p, g, t)
    m, s = _states(state, p, "m", "s")
    b1, b2 = betas
    p *= 1 - lr * weight_decay
    m[...] = b1 * m + (1 - b1) * g
    s[...] = b2 * s + (1 - b2) * (g - m) ** 2 + eps
    m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
    p -= lr * m_hat / (np.sqrt(s_hat) + eps)


def adabound(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    final_lr: float = 0.1,
    gamma: float = 1e-3,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """AdaBound: Adam whose step size per element is kept between bounds that close in on a learning rate of SGD.

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        lower = final_lr (1 - 1 / (gamma t + 1));  upper = final_lr (1 + 1 / (gamma t))
        eta = min(max(lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps), lower), upper)
        p = p - eta m

    lr [p]; betas and gamma no unit; final_lr [p]/[g]; eps [g]; weight_decay [g]/[p]. States: "m" [g]; "v" [g]^2.

    Source: L. Luo, Y. Xiong, Y. Liu, X. Sun, Adaptive gradient methods with dynamic bound of learning rate, ICLR 2019,
    https://openreview.net/forum?id=Bkg3g2R9FX, Algorithm 2, with the bounds of section 5 and the bias correction of the
    authors' code, where the paper divides eta by sqrt(t).

    >>> p = np.array([1.0]); state = init_state("adabound", p)
    >>> adabound(p, np.array([4.0]), state, 1, lr=0.5, betas=(0.5, 0.75), final_lr=0.5, gamma=0.5)  # eta is 1/4
    >>> p.round(8).tolist(), state["m"].tolist(), state["v"].tolist()
    ([0.5], [2.0], [4.0])
    """
    g = _gradient(p, g, t, weight_decay)
    m, v = _states(state, p, "m", "v")
    b1, b2 = betas
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * g**2
    lower, upper = final_lr * (1 - 1 / (gamma * t + 1)), final_lr * (1 + 1 / (gamma * t))
    p -= np.clip(lr * math.sqrt(1 - b2**t) / (1 - b1**t) / (np.sqrt(v) + eps), lower, upper) * m


def adan(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    form: str = "paper",
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
) -> None:
    """Adan: Nesterov momentum from the differences of the gradients, with a step per element as in Adam.

        d = g - prev_grad                             0 at t = 1
        m = b1 m + (1 - b1) g                         m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) d                         v_hat = v / (1 - b2^t)
        n = b3 n + (1 - b3) (g + b2 d)^2              n_hat = n / (1 - b3^t)
        p = (p - lr (m_hat + b2 v_hat) / (sqrt(n_hat) + eps)) / (1 + lr weight_decay)
        prev_grad = g

    form="optax": 1 - b2 in place of b2 in n and p, and p = p - lr (... + weight_decay p). eps_root is added to n_hat.

    lr [p]; betas no unit, each the kept fraction, which is 1 minus the paper's beta; eps [g]; eps_root [g]^2;
    weight_decay 1/[p]. States: "m" [g], "v" [g], "n" [g]^2, "prev_grad" [g].

    Source: X. Xie et al., Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models, 2022,
    https://arxiv.org/abs/2208.06677, Algorithm 1, with the bias corrections of its authors' code.

    >>> p = np.array([1.0]); state = init_state("adan", p)
    >>> for t, g in ((1, 4.0), (2, 2.0)):
    ...     adan(p, np.array([g]), state, t, lr=0.25, betas=(0.5, 0.5, 0.75), eps=0.0)
    >>> state["m"].tolist(), state["v"].tolist(), state["n"].tolist(), state["prev_grad"].tolist()
    ([2.0], [-1.0], [3.25], [2.0])
    """
    g = _gradient(p, g, t)
    m, v, n, prev_grad = _states(state, p, "m", "v", "n", "prev_grad")
    b1, b2, b3 = betas
    d = np.zeros_like(g) if t == 1 else g - prev_grad
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * d
    ahead = {"paper": b2, "optax": 1 - b2}[form]
    n[...] = b3 * n + (1 - b3) * (g + ahead * d) ** 2
    m_hat, v_hat, n_hat = m / (1 - b1**t), v / (1 - b2**t), n / (1 - b3**t)
    u = (m_hat + ahead * v_hat) / (np.sqrt(n_hat + eps_root) + eps)
    p[...] = (p - lr * u) / (1 + lr * weight_decay) if form == "paper" else p - lr * (u + weight_decay * p)
    prev_grad[...] = g


def ademamix(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 2.0,
    eps: float = 1e-8,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
) -> None:
    """AdEMAMix: AdamW with a second, slower average of the gradients.

        p = (1 - lr weight_decay) p
        m1 = b1 m1 + (1 - b1) g                       m1_hat = m1 / (1 - b1^t)
        m2 = b3_t m2 + (1 - b3_t) g
        v = b2 v + (1 - b2) g^2                       v_hat = v / (1 - b2^t)
        p = p - lr (m1_hat + alpha_t m2) / (sqrt(v_hat) + eps)

        t < T = warmup_steps:   alpha_t = alpha t / T
                                b3_t = min(exp(ln b1 ln b3 / ((1 - t/T) ln b3 + t/T ln b1)), b3)
        otherwise:              alpha_t = alpha,  b3_t = b3

    lr [p]; betas and alpha no unit; eps [g]; warmup_steps in updates (a warm-up needs b1 > 0); weight_decay
    1/[p]. States: "m1" [g], "m2" [g], "v" [g]^2.

    Source: M. Pagliardini, P. Ablin, D. Grangier, The AdEMAMix optimizer: better, faster, older, 2024,
    https://arxiv.org/abs/2409.03137, Algorithm 1 and its schedulers of alpha and beta_3.

    >>> p = np.array([1.0]); state = init_state("ademamix", p)
    >>> ademamix(p, np.array([4.0]), state, 1, lr=0.25, betas=(0.5, 0.75, 0.75), alpha=2.0, eps=0.0)  # 1 - (4 + 2) / 16
    >>> p.tolist(), state["m1"].tolist(), state["m2"].tolist(), state["v"].tolist()
    ([0.625], [2.0], [1.0], [4.0])
    """
    g = _gradient(p, g, t)
    m1, m2, v = _states(state, p, "m1", "m2", "v")
    b1, b2, b3 = betas
    alpha_t, b3_t = alpha, b3
    if t < warmup_steps:
        f = t / warmup_steps
        alpha_t = alpha * f
        b3_t = min(math.exp(math.log(b1) * math.log(b3) / ((1 - f) * math.log(b3) + f * math.log(b1))), b3)
    p *= 1 - lr * weight_decay
    m1[...] = b1 * m1 + (1 - b1) * g
    m2[...] = b3_t * m2 + (1 - b3_t) * g
    v[...] = b2 * v + (1 - b2) * g**2
    m1_hat, v_hat = m1 / (1 - b1**t), v / (1 - b2**t)
    p -= lr * (m1_hat + alpha_t * m2) / (np.sqrt(v_hat) + eps)


def lars(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """LARS: momentum on steps whose length is proportional to that of the parameter. p is one whole parameter tensor.

        ratio = trust_coefficient |p| / (|g| + weight_decay |p| + eps)      Euclidean norms over all of p and g, the
                                                                            gradient without decay; 1 if |p| or |g| is 0
        d = ratio (g + weight_decay p)
        v = momentum v + lr d
        p = p - v                                                           or, nesterov, p = p - (lr d + momentum v)

    v = 0 before the first update. The norms are computed in float64 for any dtype of p.

    lr, momentum and trust_coefficient no unit; eps [g]; weight_decay [g]/[p]. State: "velocity" is v [p].

    Source: Y. You, I. Gitman, B. Ginsburg, Large batch training of convolutional networks, 2017,
    https://arxiv.org/abs/1708.03888, Algorithm 1, where trust_coefficient is eta and the ratio is the local learning
    rate; the ratio of 1 is as in LAMB.

    >>> p = np.array([3.0, 4.0]); state = init_state("lars", p)
    >>> lars(p, np.array([2.0, 0.0]), state, 1, lr=0.25, trust_coefficient=0.5)  # ratio = 0.5 5 / 2
    >>> p.tolist(), state["velocity"].tolist()
    ([2.375, 4.0], [0.625, 0.0])
    """
    g = _gradient(p, g, t)
    (v,) = _states(state, p, "velocity")
    p_norm, g_norm = _norm(p), _norm(g)
    zero = p_norm == 0 or g_norm == 0
    ratio = 1.0 if zero else trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps)
    d = ratio * (g + weight_decay * p)
    v[...] = momentum * v + lr * d
    p -= lr * d + momentum * v if nesterov else v


def novograd(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.95, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """NovoGrad: momentum on gradients divided by an average of their norm. p is one whole parameter tensor.

        v = |g|^2                                     at t = 1; Euclidean norm over all of g
        v = b2 v + (1 - b2) |g|^2                     for t > 1
        m = b1 m + (g / (sqrt(v) + eps) + weight_decay p)
        p = p - lr m

    m = 0 before the first update. |g|^2 is computed in float64 and then rounded to the dtype of p.

    lr [p]; betas no unit; eps [g]; weight_decay 1/[p]. States: "m", no unit; "v" [g]^2, one number of shape ().

    Source: B. Ginsburg et al., Stochastic gradient methods with layer-wise adaptive moments for training of deep
    networks, 2019, https://arxiv.org/abs/1905.11286, Algorithm 1.

    >>> p = np.array([1.0, 1.0]); state = init_state("novograd", p)
    >>> novograd(p, np.array([3.0, 4.0]), state, 1, lr=0.5, eps=0.0)
    >>> p.round(12).tolist(), state["m"].tolist(), state["v"].tolist()
    ([0.7, 0.6], [0.6, 0.8], 25.0)
    """
    g = _gradient(p, g, t)
    m, v = _states(state, p, "m", "v", numbers=("v",))
    b1, b2 = betas
    g_norm = _norm(g)
    g_norm_sq = p.dtype.type(g_norm * g_norm)
    v[...] = g_norm_sq if t == 1 else b2 * v + (1 - b2) * g_norm_sq
    m[...] = b1 * m + (g / (np.sqrt(v) + eps) + weight_decay * p)
    p -= lr * m


def stable_adamw(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> None:
    """StableAdamW: AdamW with a learning rate that is bounded by how much g outgrows v. p is one whole tensor.

        b1_t = b1 (1 - b1^(t-1)) / (1 - b1^t);   b2_t likewise
        m = b1_t m + (1 - b1_t) g
        v = b2_t v + (1 - b2_t) g^2
        rms = sqrt(mean of g^2 / max(v, eps^2) over p)
        lr_t = lr / max(1, rms)
        p = p - lr_t (m / (sqrt(v) + eps) + weight_decay p)

    m = v = 0 before the first update. The mean is taken in float64 and the factor rounded to the dtype of p. With
    eps = 0, an element whose v is 0 counts as 0.

    lr [p]; betas no unit; eps [g]; weight_decay 1/[p]. States: "m" [g]; "v" [g]^2.

    Source: M. Wortsman et al., Stable and low-precision training for large-scale vision-language models, NeurIPS 2023,
    https://arxiv.org/abs/2304.13013, Algorithm 2.

    >>> p = np.array([1.0]); state = init_state("stable_adamw", p)
    >>> for t, g in enumerate((1.0, 7.0), 1):
    ...     stable_adamw(p, np.array([g]), state, t, lr=0.5, betas=(0.0, 0.75), eps=0.0, weight_decay=0.0)
    >>> state["v"].round(12).tolist(), p.round(12).tolist()  # rms = 7 / sqrt(v), and p - 0.5 sqrt(v)/7 7/sqrt(v)
    ([28.428571428571], [0.0])
    """
    g = _gradient(p, g, t)
    m, v = _states(state, p, "m", "v")
    b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * g**2
    average = np.maximum(v, eps**2)
    excess = np.divide(g**2, average, out=np.zeros_like(p), where=np.asarray(average != 0))
    mean = np.asarray(excess.astype(np.float64)).mean() if p.size else 0.0
    bound = p.dtype.type(1 / np.maximum(1.0, np.sqrt(mean)))
    p -= lr * bound * (m / (np.sqrt(v) + eps) + weight_decay * p)


def prodigy(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    bias_correction: bool = False,
    safeguard_warmup: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """Prodigy: AdamW whose learning rate is an estimate of the distance to the solution. p is all parameters.

        b3 = sqrt(b2)
        eta = d lr                                  or, with bias_correction, d lr sqrt(1 - b2^t) / (1 - b1^t)
        r = b3 r + d / d0 eta sum(g (p0 - p))
        m = b1 m + (1 - b1) d g
        v = b2 v + (1 - b2) d^2 g^2
        s = b3 s + d / d0 eta g                     or, with safeguard_warmup, b3 s + d / d0 d g
        d' = max(d, d_coef r / sum(|s|))            d where the sum is 0
        p = p - eta weight_decay p - eta m / (sqrt(v) + d' eps)
        d = d'

    lr no unit; betas and d_coef no unit; d0 [p]; eps [g]; weight_decay 1/[p]. States: "m" and "s" [p] times [g]; "v"
    [p]^2 [g]^2; "p0" [p], which starts as a copy of p; the numbers "d" [p], which starts at d0, and "numerator", r
    [p]^2 [g].

    Source: K. Mishchenko, A. Defazio, Prodigy: an expeditiously adaptive parameter-free learner, ICML 2024,
    https://arxiv.org/abs/2306.06101, Algorithm 4, with r and s divided by d0, as in the authors' prodigyopt.

    >>> p = np.array([1.0, 2.0]); state = init_state("prodigy", p, d0=0.25)
    >>> for t in (1, 2):
    ...     prodigy(p, np.array([4.0, -1.0]), state, t, betas=(0.0, 0.0), eps=0.0, d0=0.25, d_coef=3.0)
    >>> p.tolist(), state["d"].tolist()  # 0.25 in each of two steps; 3 times the 0.25 of the first
    ([0.5, 2.5], 0.75)
    """
    g = _gradient(p, g, t)
    m, v, s, p0, d, r = _states(state, p, "m", "v", "s", "p0", "d", "numerator", numbers=("d", "numerator"))
    b1, b2 = betas
    b3 = math.sqrt(b2)
    now = float(d)
    eta = now * lr
    if bias_correction:
        eta = eta * math.sqrt(1 - b2**t) / (1 - b1**t)
    r[...] = b3 * float(r) + now / d0 * eta * _sum(g * (p0 - p))
    m[...] = b1 * m + (1 - b1) * now * g
    v[...] = b2 * v + (1 - b2) * (now * g) ** 2
    s[...] = b3 * s + now / d0 * (now if safeguard_warmup else eta) * g
    total = _sum(np.abs(s))
    d[...] = now if total == 0 else np.maximum(now, d_coef * float(r) / total)
    p -= eta * weight_decay * p + eta * m / (np.sqrt(v) + float(d) * eps)


def mars(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    gamma: float = 0.025,
    weight_decay: float = 0.0,
) -> None:
    """MARS-AdamW: AdamW of gradients corrected by their change. p is one whole tensor.

        c = g + gamma b1 / (1 - b1) (g - prev_grad)          c = g at t = 1
        c = c / max(1, |c|)                                  |c| is the root of the sum of all squares
        p = (1 - lr weight_decay) p
        m = b1 m + (1 - b1) c                                m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) c^2                              v_hat = v / (1 - b2^t)
        p = p - lr m_hat / (sqrt(v_hat) + eps)
        prev_grad = g

    |c| is computed in float64 and the factor rounded to the dtype of p.

    lr [p]; betas, gamma and eps no unit; weight_decay 1/[p]. States: "m" and "v" no unit; "prev_grad" [g].

    Source: H. Yuan, Y. Liu, S. Wu, X. Zhou, Q. Gu, MARS: unleashing the power of variance reduction for training large
    models, ICML 2025, https://arxiv.org/abs/2411.10438, Algorithm 2 with the gradient of the step before, and the first
    step as in timm.

    >>> p = np.array([1.0]); state = init_state("mars", p)
    >>> for t, g in enumerate((4.0, 0.5), 1):  # c is 4, and so 1; 1/2 + 1/8 (1/2 - 4)
    ...     mars(p, np.array([g]), state, t, lr=0.5, betas=(0.5, 0.75), eps=0.0, gamma=0.125)
    >>> state["m"].tolist(), state["v"].tolist(), state["prev_grad"].tolist()
    ([0.28125], [0.1884765625], [0.5])
    """
    g = _gradient(p, g, t)
    m, v, prev_grad = _states(state, p, "m", "v", "prev_grad")
    b1, b2 = betas
    c = g if t == 1 else g + gamma * b1 / (1 - b1) * (g - prev_grad)
    c = c * p.dtype.type(1 / np.maximum(1.0, _norm(c)))
    p *= 1 - lr * weight_decay
    m[...] = b1 * m + (1 - b1) * c
    v[...] = b2 * v + (1 - b2) * c**2
    p -= lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    prev_grad[...] = g


def adam_mini(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """Adam-mini: AdamW with one second moment per block. p is one block, here a whole tensor.

        p = (1 - lr weight_decay) p
        m = b1 m + (1 - b1) g                            m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) mean of g^2 over p           v_hat = v / (1 - b2^t)
        p = p - lr m_hat / (sqrt(v_hat) + eps)           0 / 0 is 0

    The mean and the root are computed in float64.

    lr [p]; betas no unit; eps [g]; weight_decay 1/[p]. States: "m" [g]; "v" [g]^2, a number.

    Source: Y. Zhang et al., Adam-mini: use fewer learning rates to gain more, ICLR 2025,
    https://arxiv.org/abs/2406.16793, Algorithm 1; the block as in its partition "PyTorch default".

    >>> p = np.array([0.0, 0.0]); state = init_state("adam_mini", p)
    >>> adam_mini(p, np.array([7.0, -1.0]), state, 1, lr=0.5, betas=(0.5, 0.75), eps=0.0)  # sqrt(mean) is 5
    >>> p.round(12).tolist(), state["v"].tolist()
    ([-0.7, 0.1], 6.25)
    """
    g = _gradient(p, g, t)
    m, v = _states(state, p, "m", "v", numbers=("v",))
    b1, b2 = betas
    p *= 1 - lr * weight_decay
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * float(v) + (1 - b2) * (_sum(g**2) / p.size if p.size else 0.0)
    divisor = math.sqrt(float(v) / (1 - b2**t)) + eps
    p -= lr * (m / (1 - b1**t)) / (divisor if divisor != 0 else 1.0)


def adopt(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6,
    clip_exp: float = 0.25,
    weight_decay: float = 0.0,
) -> None:
    """ADOPT: Adam that divides by the root of the second moment before g, and averages the quotients.

        t = 1:      v = g^2, and nothing else
        otherwise:  c = (t - 1)^clip_exp
                    m = b1 m + (1 - b1) min(max(g / max(sqrt(v), eps), -c), c)
                    p = p - lr m
                    v = b2 v + (1 - b2) g^2

    lr [p]; betas and clip_exp no unit; eps [g]; weight_decay [g]/[p]. States: "m" no unit; "v" [g]^2.

    Source: S. Taniguchi et al., ADOPT: modified Adam can converge with any beta2 with the optimal rate, NeurIPS 2024,
    https://arxiv.org/abs/2411.02853, Algorithm 2, whose t is one less.

    >>> p = np.array([1.0]); state = init_state("adopt", p)
    >>> for t, g in enumerate((4.0, 2.0), 1):
    ...     adopt(p, np.array([g]), state, t, lr=0.5, betas=(0.5, 0.75))  # 1 - 0.5 (0.5 2 / 4)
    >>> p.tolist(), state["m"].tolist(), state["v"].tolist()
    ([0.875], [0.25], [13.0])
    """
    g = _gradient(p, g, t, weight_decay)
    m, v = _states(state, p, "m", "v")
    b1, b2 = betas
    if t == 1:
        v[...] = g**2
        return
    c = (t - 1) ** clip_exp
    m[...] = b1 * m + (1 - b1) * np.clip(g / np.maximum(np.sqrt(v), eps), -c, c)
    p -= lr * m
    v[...] = b2 * v + (1 - b2) * g**2


def adafactor(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.01,
    beta2_decay: float = -0.8,
    eps: float = 1e-30,
    min_rms: float = 1e-3,
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
) -> None:
    """Adafactor: a second moment from one number per row and per column. p is one whole parameter tensor.

        b2 = 1 - t^beta2_decay
        row_var = b2 row_var + (1 - b2) mean(g^2 over a row);   col_var likewise over a column
        v_ij = max(row_var_i / max(mean(row_var), eps) col_var_j, eps^2)
        u = g / sqrt(v)
        step = min(lr, 1/sqrt(t)) max(min_rms, rms(p)) / max(1, rms(u) / clip_threshold)
        p = (1 - lr weight_decay) p - step u

    rms(x) = sqrt(mean(x^2)) over all of p, before the decay. The rows of p are those of p.reshape(p.shape[0], -1); p of
    fewer than two axes is one row, whose mean is not bounded by eps: v is then col_var. row_var = col_var = 0 before
    the first update. Means are taken in float64. v and mean(row_var) are not smaller than 1.2e-38.

    lr no unit; eps [g]; min_rms [p]; weight_decay no unit. States: "row_var", "col_var" [g]^2, of the lengths of a
    column and a row.

    Source: N. Shazeer and M. Stern, Adafactor: adaptive learning rates with sublinear memory cost, ICML 2018,
    https://arxiv.org/abs/1804.04235, Algorithms 4 and 5; in the form of torch.optim.Adafactor.

    >>> p = np.ones((2, 1)); state = init_state("adafactor", p)
    >>> adafactor(p, np.array([[3.0], [4.0]]), state, 1, lr=0.5)
    >>> state["row_var"].tolist(), state["col_var"].tolist(), p.tolist()
    ([9.0, 16.0], [12.5], [[0.5], [0.5]])
    """
    g = _gradient(p, g, t)
    rows, columns = _matrix_of(p)
    row_var, col_var = _states(state, p, "row_var", "col_var", lines={"row_var": rows, "col_var": columns})
    if p.size == 0:
        return
    b2 = 1 - t**beta2_decay
    squares = np.asarray(g.astype(np.float64)).reshape(rows, columns) ** 2
    for state_of, axis in ((row_var, 1), (col_var, 0)):
        state_of[...] = b2 * state_of + (1 - b2) * squares.mean(axis=axis).astype(p.dtype)
    least = max(eps**2, 1.2e-38)
    least_mean = max(eps, 1.2e-38) if p.ndim > 1 else 1.2e-38
    mean = p.dtype.type(max(float(np.asarray(row_var.astype(np.float64)).mean()), least_mean))
    v = np.maximum((row_var / mean)[:, None] * col_var, p.dtype.type(least))
    u = g / np.sqrt(v).reshape(p.shape)
    rms_p, rms_u = (_norm(x) / math.sqrt(p.size) for x in (p, np.asarray(u)))
    step = min(lr, t**-0.5) * max(min_rms, rms_p) / max(1.0, rms_u / clip_threshold)
    p *= 1 - lr * weight_decay
    p -= p.dtype.type(step) * u


def sophia(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.96, 0.99),
    gamma: float = 0.01,
    eps: float = 1e-12,
    weight_decay: float = 0.0,
    hessian: Array | None = None,
) -> None:
    """Sophia: momentum divided by an average of the Hessian's diagonal, each element of a step being lr at most.

        p = (1 - lr weight_decay) p
        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) hessian          where one is given, an estimate of the Hessian's diagonal, like p
        p = p - lr clip(m / max(gamma v, eps), -1, 1)

    lr [p]; betas no unit; gamma 1/[p]; eps [g]; weight_decay 1/[p]; hessian [g]/[p]. States: "m" [g]; "v" [g]/[p].

    Source: H. Liu et al., Sophia: a scalable stochastic second-order optimizer for language model pre-training, ICLR
    2024, https://arxiv.org/abs/2305.14342, Algorithm 3.

    >>> p = np.array([0.0, 0.0]); state = init_state("sophia", p)
    >>> hyper = {"lr": 0.5, "betas": (0.0, 0.0), "gamma": 0.5}
    >>> sophia(p, np.array([1.0, 1.0]), state, 1, hessian=np.array([8.0, 1.0]), **hyper)
    >>> sophia(p, np.array([2.0, -2.0]), state, 2, **hyper)
    >>> p.tolist()
    [-0.375, 0.0]
    """
    g = _gradient(p, g, t)
    m, v = _states(state, p, "m", "v")
    b1, b2 = betas
    p *= 1 - lr * weight_decay
    m[...] = b1 * m + (1 - b1) * g
    if hessian is not None:
        v[...] = b2 * v + (1 - b2) * _gradient(p, hessian, t)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        p -= lr * np.clip(m / np.maximum(gamma * v, eps), -1, 1)


def yogi(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    initial_accumulator_value: float = 1e-6,
    bias_correction: bool = True,
    initial_momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> None:
    """Yogi: Adam whose second moment approaches g^2 in steps whose size does not depend on the distance.

        m = b1 m + (1 - b1) g                                m_hat = m / (1 - b1^t)
        v = v - (1 - b2) sign(v - g^2) g^2                   v_hat = v / (1 - b2^t)
        p = p - lr m_hat / (sqrt(v_hat) + eps)

    bias_correction=False: m_hat = m, v_hat = v.

    lr [p]; betas no unit; eps [g]; weight_decay [g]/[p]. States: "m" [g], which starts at initial_momentum; "v" [g]^2,
    which starts at initial_accumulator_value: only init_state uses these arguments.

    Source: M. Zaheer, S. Reddi, D. Sachan, S. Kale, S. Kumar, Adaptive methods for nonconvex optimization, NeurIPS
    2018, Algorithm 2, with the bias correction of Adam, which the paper does not have.

    >>> p = np.array([1.0]); state = init_state("yogi", p, initial_accumulator_value=0.0)
    >>> yogi(p, np.array([4.0]), state, 1, lr=0.25, betas=(0.5, 0.75), eps=0.0)
    >>> p.tolist(), state["m"].tolist(), state["v"].tolist()
    ([0.75], [2.0], [4.0])
    """
    del initial_accumulator_value, initial_momentum
    g = _gradient(p, g, t, weight_decay)
    m, v = _states(state, p, "m", "v")
    b1, b2 = betas
    m[...] = b1 * m + (1 - b1) * g
    v[...] = v - (1 - b2) * np.sign(v - g**2) * g**2
    m_hat, v_hat = (m / (1 - b1**t), v / (1 - b2**t)) if bias_correction else (m, v)
    p -= lr * m_hat / (np.sqrt(v_hat) + eps)


def ftrl(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.1,
    beta: float = 1.0,
    l1: float = 0.0,
    l2: float = 0.0,
    initial_accumulator_value: float = 0.0,
    weight_decay: float = 0.0,
) -> None:
    """FTRL-Proximal: Adagrad with an l1 term, which keeps parameters at exactly 0.

        z = -(beta + sqrt(n)) p                                     before the first update
        sigma = sqrt(n + g^2) - sqrt(n)
        z = z + lr g - sigma p
        n = n + g^2
        p = 0                                                       |z| <= lr l1
        p = -(z - sign(z) lr l1) / (beta + sqrt(n) + lr l2)         otherwise

    The z of the paper is z / lr, the same for a constant lr, and begins at 0, the same for p = 0.

    lr [p]; beta and l1 [g]; l2 [g]/[p]; weight_decay [g]/[p]. States: "z" [p] times [g]; "n" [g]^2, which starts at
    initial_accumulator_value: the function uses that argument at t = 1 alone.

    Source: H. B. McMahan et al., Ad click prediction: a view from the trenches, KDD 2013,
    https://doi.org/10.1145/2487575.2488200, Algorithm 1.

    >>> p = np.array([0.0]); state = init_state("ftrl", p)
    >>> ftrl(p, np.array([3.0]), state, 1, lr=1.0, l1=1.0)  # 0 - (3 - 1) / (1 + 3)
    >>> p.tolist(), state["z"].tolist(), state["n"].tolist()
    ([-0.5], [3.0], [9.0])
    """
    g = _gradient(p, g, t, weight_decay)
    z, n = _states(state, p, "z", "n")
    if t == 1:
        z[...] = -(beta + math.sqrt(initial_accumulator_value)) * p
    sigma = np.sqrt(n + g**2) - np.sqrt(n)
    z[...] = z + lr * g - sigma * p
    n[...] = n + g**2
    p[...] = np.where(np.abs(z) <= lr * l1, 0, -(z - np.sign(z) * lr * l1) / (beta + np.sqrt(n) + lr * l2))


def rprop(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    weight_decay: float = 0.0,
) -> None:
    """Rprop: a step size per element that grows while the gradient keeps its sign and shrinks when the sign changes.

        prev_grad g > 0:   s = etas[1] s
        prev_grad g < 0:   s = etas[0] s,  and then g = 0
        s = min(max(s, step_sizes[0]), step_sizes[1])
        p = p - sign(g) s                             sign(0) = 0
        prev_grad = g

    lr [p]; etas no unit; step_sizes [p]; weight_decay [g]/[p]. States: "prev_grad" [g]; "step_size" is s [p], which
    starts at lr: only init_state uses that argument.

    Source: M. Riedmiller, H. Braun, A direct adaptive method for faster backpropagation learning: the RPROP algorithm,
    IEEE Int. Conf. on Neural Networks 1993, without a step back when the sign changes, as in torch.optim.Rprop.

    >>> p = np.array([1.0]); state = init_state("rprop", p, lr=0.25)
    >>> for t, g in ((1, 4.0), (2, 1.0), (3, -1.0)):
    ...     rprop(p, np.array([g]), state, t, lr=0.25, etas=(0.5, 2.0))  # 0.25, 0.5, none after the sign change
    >>> p.tolist(), state["step_size"].tolist(), state["prev_grad"].tolist()
    ([0.25], [0.25], [0.0])
    """
    del lr
    g = _gradient(p, g, t, weight_decay)
    prev_grad, s = _states(state, p, "prev_grad", "step_size")
    product = prev_grad * g
    s[...] = np.clip(np.where(product > 0, etas[1] * s, np.where(product < 0, etas[0] * s, s)), *step_sizes)
    g = np.where(product < 0, 0, g)
    p -= np.sign(g) * s
    prev_grad[...] = g


def schedule_free_adamw(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    warmup_steps: int = 0,
    form: str = "paper",
    weight_decay: float = 0.0,
) -> None:
    """Schedule-free AdamW: an average of the points replaces a falling lr. p is y, the point of the gradient.

        s_i = sqrt(1 - b2^i) min(1, i / warmup_steps)        sqrt(1 - b2^i) if warmup_steps = 0
        c = s_t^2 / (s_1^2 + ... + s_t^2)
        x = (y - (1 - b1) z) / b1                            the x of the previous update
        v = b2 v + (1 - b2) g^2
        z = z - lr s_t (g / (sqrt(v) + eps) + weight_decay y)
        x = (1 - c) x + c z
        y = (1 - b1) z + b1 x

    form="optax" and "keras": z = z - lr w (g / (sqrt(v / (1 - b2^t)) + eps) + weight_decay y). optax: s_i = min(1, i /
    warmup_steps), w = s_(t-1), which is 0 at first; Keras: c = 1 / t, w = min(1, t / warmup_steps).

    x is the result; `schedule_free_eval` returns it. With a constant lr, c equals that of the paper, which has lr^2 in
    each term of the fraction.

    lr [p]; betas no unit, the first above 0; eps [g]; warmup_steps in updates; weight_decay 1/[p]. States: "z" [p],
    which starts as a copy of p; "v" [g]^2.

    Source: A. Defazio et al., The road less scheduled, NeurIPS 2024, https://arxiv.org/abs/2405.15682, Algorithm 1.

    >>> p = np.array([1.0]); state = init_state("schedule_free_adamw", p)
    >>> schedule_free_adamw(p, np.array([4.0]), state, 1, lr=0.25, betas=(0.5, 0.75), eps=0.0)  # c = 1
    >>> p.tolist(), state["z"].tolist(), state["v"].tolist()
    ([0.75], [0.75], [4.0])
    """
    g = _gradient(p, g, t)
    z, v = _states(state, p, "z", "v")
    x = schedule_free_eval(p, state, betas=betas)
    b1, b2 = betas
    warm = [min(1.0, i / warmup_steps) if warmup_steps else 1.0 for i in range(t + 1)]
    v[...] = b2 * v + (1 - b2) * g**2
    if form == "paper":
        s = [math.sqrt(1 - b2**i) * warm[i] for i in range(1, t + 1)]
        z -= lr * s[-1] * (g / (np.sqrt(v) + eps) + weight_decay * p)
    else:
        s = {"optax": warm[1:], "keras": [1.0] * t}[form]
        gamma = lr * (warm[t - 1] if form == "optax" else warm[t])
        z -= gamma * (g / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * p)
    c = s[-1] ** 2 / sum(each**2 for each in s)
    x = (1 - c) * x + c * z
    p[...] = (1 - b1) * z + b1 * x


def schedule_free_eval(p: Array, state: State, *, betas: tuple[float, float] = (0.9, 0.999)) -> Array:
    """Return x of `schedule_free_adamw`, the average that is its result, from p, which is y, and the state.

        x = (y - (1 - b1) z) / b1

    betas as in the updates. Returns an array of the shape of p. Raises ValueError if the first beta is 0, because then
    y is z, or if the state does not fit p.

    Source: A. Defazio et al., The road less scheduled, NeurIPS 2024, https://arxiv.org/abs/2405.15682, Algorithm 1,
    first line for y, solved for x.

    >>> schedule_free_eval(np.array([1.0]), {"z": np.array([4.0])}, betas=(0.75, 0.999)).tolist()
    [0.0]
    """
    (z,) = _states(state, p, "z")
    b1 = betas[0]
    if b1 <= 0:
        raise ValueError(f"betas: must have a first value above 0, got {betas}; with 0, p does not contain the average")
    x: Array = (p - (1 - b1) * z) / b1
    return x


def _newton_schulz(u: Array, steps: int, coefficients: tuple[float, float, float], eps: float) -> Array:
    """Return u with its singular values driven towards 1 by an odd polynomial, applied `steps` times."""
    a, b, c = coefficients
    X: Array = u / max(_norm(u), eps)
    if u.shape[0] > u.shape[1]:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if u.shape[0] > u.shape[1] else X


def muon(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 1e-3,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: float = 1e-7,
    adjust_lr: str = "original",
    adamw_lr: float = 3e-4,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    orthogonal: bool | None = None,
    weight_decay: float = 0.1,
) -> None:
    """Muon: orthogonalized momentum for a matrix, AdamW for other shapes. p is one whole parameter tensor.

        orthogonal (None: if p has two axes):
            p = (1 - lr weight_decay) p
            m = momentum m + (1 - momentum) g
            u = m                                     or, nesterov, u = (1 - momentum) g + momentum m
            X = u / max(|u|, eps)                     |u| is the root of the sum of all squares
            ns_steps times, with (a, b, c) = ns_coefficients:
                A = X X^T ;  X = a X + (b A + c A A) X
            p = p - lr adjust X

            adjust = sqrt(max(1, rows / columns))            adjust_lr = "original"
            adjust = 0.2 sqrt(max(rows, columns))            adjust_lr = "match_rms_adamw"

        otherwise:
            adamw with adamw_lr, adamw_betas, adamw_eps and weight_decay

    A matrix with more rows than columns is transposed before the loop and back after it. The loop uses the dtype of p;
    |u| is computed in float64.

    lr and adamw_lr [p]; momentum, ns_coefficients and adamw_betas no unit; eps and adamw_eps [g]; weight_decay 1/[p].
    States: "m" [g]; "v" is X at the end of the loop, no unit, or, if not orthogonal, AdamW's "v" [g]^2.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon/; the average of m and the decay as in torch.optim.Muon, which runs the
    loop in bfloat16; "match_rms_adamw" is J. Liu et al., Muon is scalable for LLM training, 2025,
    https://arxiv.org/abs/2502.16982, section 2.2.

    >>> p = np.eye(2); state = init_state("muon", p)
    >>> g = np.array([[0.0, 8.0], [6.0, 0.0]])  # u = 0.75 g, |u| = 7.5
    >>> muon(p, g, state, 1, lr=0.5, momentum=0.5, ns_steps=1, ns_coefficients=(1.0, 0.0, 0.0), weight_decay=0.0)
    >>> p.round(12).tolist(), state["m"].tolist(), state["v"].round(12).tolist()
    ([[1.0, -0.4], [-0.3, 1.0]], [[0.0, 4.0], [3.0, 0.0]], [[0.0, 0.8], [0.6, 0.0]])
    """
    if adjust_lr not in ("original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr: must be one of 'original', 'match_rms_adamw', got {adjust_lr!r}")
    if orthogonal and p.ndim != 2:
        raise ValueError(f"p: must have two axes with orthogonal=True, got shape {p.shape}; reshape it to a matrix")
    g = _gradient(p, g, t)
    if orthogonal is None:
        orthogonal = p.ndim == 2
    if not orthogonal:
        adamw(p, g, state, t, lr=adamw_lr, betas=adamw_betas, eps=adamw_eps, weight_decay=weight_decay)
        return
    m, v = _states(state, p, "m", "v")
    rows, columns = p.shape
    p *= 1 - lr * weight_decay
    m[...] = momentum * m + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * m if nesterov else m
    v[...] = _newton_schulz(u, ns_steps, ns_coefficients, eps)
    if adjust_lr == "original":
        adjust = math.sqrt(max(1, rows / max(columns, 1)))  # without columns the value does not matter
    else:
        adjust = 0.2 * math.sqrt(max(rows, columns))
    p -= lr * adjust * v


def _as_matrix(p: Array, precondition: bool | None) -> tuple[int, int] | None:
    """Return p's rows and columns if it is preconditioned, else None. precondition : None if p has two axes or more."""
    if precondition and p.ndim < 2:
        raise ValueError(f"p: must have at least two axes with precondition=True, got shape {p.shape}")
    preconditioned = p.ndim >= 2 if precondition is None else precondition
    return (p.shape[0], math.prod(p.shape[1:])) if preconditioned else None


def shampoo(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    eps: float = 1e-4,
    exponent: float = 0.25,
    precondition_frequency: int = 1,
    precondition: bool | None = None,
    weight_decay: float = 0.0,
) -> None:
    """Shampoo for a matrix, AdaGrad for other shapes. p is one whole parameter tensor.

        m = momentum m + (1 - momentum) g

        precondition (None: if p has at least two axes; p and g as matrices with the first axis of p as rows):
            L = L + g g^T ;  R = R + g^T g
            if t - 1 is a multiple of precondition_frequency:
                L_root = (L + eps I)^(-exponent) ;  R_root = (R + eps I)^(-exponent)
            p = p - lr L_root m R_root

        otherwise:
            v = v + g^2
            p = p - lr m / sqrt(v + eps)

    g contains weight_decay. Algorithm 1 has exponent = 1/4 for two axes (Algorithm 2: 1/(2k) for k of them, so 1/2 for
    one), no momentum, and L and R that begin at eps I, without eps in the roots.

    lr [p] for exponent = 1/4; momentum and exponent no unit; eps [g]^2; weight_decay [g]/[p]. States: "m" [g]; "v"
    [g]^2, m^2 for a matrix; for a matrix also "L" and "R" [g]^2, "L_root" and "R_root" [g]^(-2 exponent).

    Source: V. Gupta, T. Koren, Y. Singer, Shampoo: preconditioned stochastic tensor optimization, ICML 2018,
    https://arxiv.org/abs/1802.09568.

    >>> p = np.zeros((2, 2)); state = init_state("shampoo", p)
    >>> shampoo(p, np.array([[0.0, 4.0], [9.0, 0.0]]), state, 1, lr=0.5, eps=1e-12)
    >>> state["L"].tolist(), p.round(9).tolist()  # L = diag(16, 81), R = diag(81, 16): 4 / (2 2) and 9 / (3 3)
    ([[16.0, 0.0], [0.0, 81.0]], [[0.0, -0.5], [-0.5, 0.0]])
    """
    shape = _as_matrix(p, precondition)
    g = _gradient(p, g, t, weight_decay)
    m, v = _states(state, p, "m", "v")
    m[...] = momentum * m + (1 - momentum) * g
    if shape is None:
        v[...] = v + g**2
        p -= lr * m / np.sqrt(v + eps)
        return
    v[...] = m**2
    g = g.reshape(shape)
    state["L"][...] = state["L"] + g @ g.T
    state["R"][...] = state["R"] + g.T @ g
    if (t - 1) % precondition_frequency == 0:
        for name in ("L", "R"):
            u, values, vt = np.linalg.svd(state[name] + eps * np.eye(len(state[name]), dtype=p.dtype))
            state[f"{name}_root"][...] = u @ np.diag(values**-exponent) @ vt
    p -= lr * (state["L_root"] @ m.reshape(shape) @ state["R_root"]).reshape(p.shape)


def soap(
    p: Array,
    g: Array,
    state: State,
    t: int,
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    shampoo_beta: float = 0.95,
    precondition_frequency: int = 10,
    precondition: bool | None = None,
    weight_decay: float = 0.01,
) -> None:
    """SOAP for a matrix, Adam with decoupled decay for other shapes. p is one whole parameter tensor.

        precondition (None: if p has at least two axes; p and g as matrices with the first axis of p as rows):
            at t = 1:
                L = (1 - shampoo_beta) g g^T ;  R = (1 - shampoo_beta) g^T g
                QL, QR = eigenvectors of L and R, the largest eigenvalue first; p, m and S stay as they are
            then, with k = t - 1:
                G = QL^T g QR
                m = b1 m + (1 - b1) G
                S = b2 S + (1 - b2) G^2
                p = p - lr sqrt(1 - b2^k) / (1 - b1^k) QL (m / (sqrt(S) + eps)) QR^T
                p = p - lr weight_decay p
                L = shampoo_beta L + (1 - shampoo_beta) g g^T ;  R = shampoo_beta R + (1 - shampoo_beta) g^T g
                if k is a multiple of precondition_frequency:
                    M = QL m QR^T
                    sort the columns of QL by falling diagonals of QL^T L QL, and the rows of S with them; QR likewise
                    QL = Q of the QR decomposition of L QL ;  QR likewise
                    m = QL^T M QR

        otherwise:
            adam with eps_hat, then p = p - lr weight_decay p

    lr [p]; betas and shampoo_beta no unit; eps [g]; weight_decay 1/[p]. States: "m" [g], in the bases for a matrix; "v"
    [g]^2, m^2 for a matrix; for a matrix also "S", "L" and "R" [g]^2, and "QL" and "QR", no unit.

    Source: N. Vyas et al., SOAP: improving and stabilizing Shampoo using Adam, 2024, https://arxiv.org/abs/2409.11321,
    Algorithm 3, with the first update, the order and the decay of https://github.com/nikhilvyas/SOAP.

    >>> p = np.zeros((2, 2)); state = init_state("soap", p)
    >>> for t in (1, 2):
    ...     soap(p, np.array([[0.0, 4.0], [9.0, 0.0]]), state, t, lr=0.5, weight_decay=0.0)
    >>> p.round(6).tolist()  # the second update is Adam's first: lr sign(G)
    [[0.0, -0.5], [-0.5, 0.0]]
    """
    shape = _as_matrix(p, precondition)
    if shape is None:
        adam(p, g, state, t, lr=lr, betas=betas, eps=eps, eps_hat=True)
        p -= lr * weight_decay * p
        return
    g = _gradient(p, g, t).reshape(shape)
    m, v = (array.reshape(shape) for array in _states(state, p, "m", "v"))
    b1, b2 = betas
    sides = (("L", "QL", 0, g @ g.T), ("R", "QR", 1, g.T @ g))
    if t == 1:
        for name, basis, _, product in sides:
            state[name][...] = shampoo_beta * state[name] + (1 - shampoo_beta) * product
            state[basis][...] = np.linalg.eigh(state[name])[1][:, ::-1]
        return
    QL, QR, S, k = state["QL"], state["QR"], state["S"], t - 1
    turned = QL.T @ g @ QR
    m[...] = b1 * m + (1 - b1) * turned
    S[...] = b2 * S + (1 - b2) * turned**2
    p -= lr * math.sqrt(1 - b2**k) / (1 - b1**k) * (QL @ (m / (np.sqrt(S) + eps)) @ QR.T).reshape(p.shape)
    p -= lr * weight_decay * p
    average = QL @ m @ QR.T
    for name, basis, axis, product in sides:
        state[name][...] = shampoo_beta * state[name] + (1 - shampoo_beta) * product
        if k % precondition_frequency == 0:
            order = np.argsort(-np.diag(state[basis].T @ state[name] @ state[basis]))
            S[...] = np.take(S, order, axis=axis)
            state[basis][...] = np.linalg.qr(state[name] @ state[basis][:, order])[0]
    m[...] = QL.T @ average @ QR
    v[...] = m**2


OPTIMIZERS: dict[str, Callable[..., None]] = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adagrad": adagrad,
    "adadelta": adadelta,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adamw,
    "lamb": lamb,
    "nadam": nadam,
    "radam": radam,
    "adamax": adamax,
    "lion": lion,
    "adabelief": adabelief,
    "adan": adan,
    "ademamix": ademamix,
    "lars": lars,
    "novograd": novograd,
    "stable_adamw": stable_adamw,
    "adafactor": adafactor,
    "sophia": sophia,
    "yogi": yogi,
    "rprop": rprop,
    "schedule_free_adamw": schedule_free_adamw,
    "muon": muon,
    "shampoo": shampoo,
    "soap": soap,
    "adopt": adopt,
    "adabound": adabound,
    "ftrl": ftrl,
    "asgd": asgd,
    "prodigy": prodigy,
    "mars": mars,
    "adam_mini": adam_mini,
}


def init_state(name: str, p: Array, **hyper: Any) -> State:
    """Return the state of an optimizer before its first update: the arrays like p that these hyperparameters require.

    ``name`` is a key of OPTIMIZERS; ``hyper`` any of its hyperparameters, the others have their defaults. All states
    are zero, except "sum_sq" of Adagrad, "v" of Yogi and "n" of FTRL, which are ``initial_accumulator_value`` ([g]^2),
    "step_size" of Rprop, which is ``lr``, "d" of Prodigy, which is ``d0``, and "z" of schedule-free AdamW, "ax" of ASGD
    and "p0" of Prodigy, copies of p. "v" of NovoGrad and Adam-mini, "d" and "numerator" of Prodigy have shape (); the
    states of Adafactor have a number per row and column; Shampoo and SOAP have matrices of rows and columns as well.

    Returns a dictionary of arrays by name, which the optimizer updates in place. Raises ValueError for an unknown name,
    TypeError for an unknown hyperparameter.

    >>> init_state("adam", np.ones(2, np.float32), amsgrad=True)["v_max"]
    array([0., 0.], dtype=float32)
    >>> sorted(init_state("rmsprop", np.ones(2), centered=True))
    ['grad_avg', 'square_avg']
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"name: must be one of {', '.join(map(repr, OPTIMIZERS))}, got {name!r}")
    parameters = inspect.signature(OPTIMIZERS[name]).parameters.values()
    values = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    if unknown := sorted(hyper.keys() - values.keys()):
        raise TypeError(f"hyperparameter of {name}: must be one of {', '.join(values)}, got {unknown[0]!r}")
    values.update(hyper)

    initial: dict[str, float | Array]
    matrices: dict[str, str] = {}
    match name:
        case "sgd":
            initial = {"velocity": 0.0} if values["momentum"] != 0 else {}
        case "momentum" | "nesterov":
            initial = {"velocity": 0.0}
        case "adagrad":
            initial = {"sum_sq": values["initial_accumulator_value"]}
        case "ftrl":
            initial = {"z": 0.0, "n": values["initial_accumulator_value"]}
        case "adadelta":
            initial = {"square_avg": 0.0, "acc_delta": 0.0}
        case "rmsprop":
            initial = {"square_avg": 0.0}
            if values["centered"]:
                initial["grad_avg"] = 0.0
            if values["momentum"] != 0:
                initial["buf"] = 0.0
        case "adamax":
            initial = {"m": 0.0, "u": 0.0}
        case "lion":
            initial = {"m": 0.0}
        case "adabelief":
            initial = {"m": 0.0, "s": 0.0}
        case "adan":
            initial = {"m": 0.0, "v": 0.0, "n": 0.0, "prev_grad": 0.0}
        case "ademamix":
            initial = {"m1": 0.0, "m2": 0.0, "v": 0.0}
        case "lars":
            initial = {"velocity": 0.0}
        case "novograd" | "adam_mini":
            return {"m": np.zeros_like(p), "v": np.zeros_like(p, shape=())}
        case "adafactor":
            rows, columns = _matrix_of(p)
            return {"row_var": np.zeros_like(p, shape=rows), "col_var": np.zeros_like(p, shape=columns)}
        case "yogi":
            initial = {"m": values["initial_momentum"], "v": values["initial_accumulator_value"]}
        case "rprop":
            initial = {"prev_grad": 0.0, "step_size": values["lr"]}
        case "asgd":
            initial = {"ax": p}
        case "mars":
            initial = {"m": 0.0, "v": 0.0, "prev_grad": 0.0}
        case "prodigy":
            arrays = {"m": np.zeros_like(p), "v": np.zeros_like(p), "s": np.zeros_like(p), "p0": p.copy()}
            return {**arrays, "d": np.full_like(p, values["d0"], shape=()), "numerator": np.zeros_like(p, shape=())}
        case "schedule_free_adamw":
            initial = {"z": p, "v": 0.0}
        case "shampoo":
            initial = {"m": 0.0, "v": 0.0}
            matrices = {"L": "rows", "R": "columns", "L_root": "rows", "R_root": "columns"}
        case "soap":
            initial = {"m": 0.0, "v": 0.0}
            matrices = {"S": "both", "L": "rows", "R": "columns", "QL": "rows", "QR": "columns"}
        case _:  # the Adam family
            initial = {"m": 0.0, "v": 0.0}
            if values.get("amsgrad", False):
                initial["v_max"] = 0.0
    state = {key: np.full_like(p, value) for key, value in initial.items()}
    shape = _as_matrix(p, values["precondition"]) if matrices else None
    if shape is not None:
        shapes = {"rows": (shape[0], shape[0]), "columns": (shape[1], shape[1]), "both": shape}
        state |= {key: np.zeros_like(p, shape=shapes[sides]) for key, sides in matrices.items()}
    return state


def batchnorm_forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """Return batch normalisation over all axes except `axis`, and the values that `batchnorm_backward` needs.

        mean = sum(x) / m               training; m values per channel
        var  = sum((x - mean)^2) / m
        running_mean = (1 - momentum) running_mean + momentum mean
        running_var  = (1 - momentum) running_var + momentum var m / (m - 1)

        mean, var = running_mean, running_var            otherwise

        xhat = (x - mean) / sqrt(var + eps)
        y    = gamma xhat + beta
        y    = y + residual             if given
        y    = max(y, 0)                activation = "relu"

    x [x], residual [y], gamma [y], beta [y], running_mean [x], running_var and eps [x]^2, momentum no unit. The
    running statistics are updated in place. gamma, beta and the running statistics have shape (C,); residual has the
    shape of x, whose channels are on `axis`, 1 or -1.

    Returns y, in the shape of x, and the dictionary that `batchnorm_backward` takes.

    Source: S. Ioffe, C. Szegedy, Batch normalization, ICML 2015, https://arxiv.org/abs/1502.03167, Algorithms 1 and 2.

    >>> y, cache = batchnorm_forward(np.array([[1.0], [3.0]]), eps=1e-30)
    >>> y.tolist(), batchnorm_backward(np.array([[1.0], [1.0]]), cache)["dbeta"].tolist()
    ([[-1.0], [1.0]], [2.0])
    """
    axes = tuple(k for k in range(x.ndim) if k != axis % x.ndim)
    along = tuple(x.shape[k] if k == axis % x.ndim else 1 for k in range(x.ndim))
    m = x.size // x.shape[axis]
    if training:
        mean = x.mean(axes)
        var = ((x - mean.reshape(along)) ** 2).mean(axes)
        if running_mean is not None and running_var is not None:
            running_mean[...] = (1 - momentum) * running_mean + momentum * mean
            running_var[...] = (1 - momentum) * running_var + momentum * var * m / (m - 1)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var: must be given with training=False, got None")
        mean, var = running_mean.copy(), running_var.copy()
    inv_std = 1 / np.sqrt(var + eps)
    xhat = (x - mean.reshape(along)) * inv_std.reshape(along)
    y = xhat
    if gamma is not None:
        y = gamma.reshape(along) * y
    if beta is not None:
        y = y + beta.reshape(along)
    if residual is not None:
        y = y + residual
    if activation == "relu":
        y = np.maximum(y, 0)
    elif activation is not None:
        raise ValueError(f"activation: must be None or 'relu', got {activation!r}")
    cache = {
        "x": x,
        "y": y,
        "xhat": xhat,
        "mean": mean,
        "inv_std": inv_std,
        "gamma": gamma,
        "axes": axes,
        "along": along,
        "m": m,
        "training": training,
        "activation": activation,
    }
    return y, cache


def batchnorm_backward(dy: Array, cache: dict[str, Any]) -> dict[str, Array]:
    """Return the gradients of a loss L with respect to the inputs of `batchnorm_forward`; dy = dL/dy.

    The chain rule, one line of the forward pass at a time, from the last to the first (dv stands for dL/dv):

        y = max(z, 0)                       dz = dy where y > 0, else 0
        z = u + residual                    du = dz,  dresidual = dz
        u = gamma xhat + beta               dbeta = sum(du),  dgamma = sum(du xhat),  dxhat = gamma du
        xhat = (x - mean) inv_std           dinv_std = sum(dxhat (x - mean));
                                            dx = inv_std dxhat,  dmean = -inv_std sum(dxhat)
        inv_std = (var + eps)^(-1/2)        dvar = -1/2 inv_std^3 dinv_std
        var = sum((x - mean)^2) / m         dx += dvar 2 (x - mean) / m,  dmean += -dvar 2 sum(x - mean) / m
        mean = sum(x) / m                   dx += dmean / m

    The last three lines apply in training only; otherwise mean and var are constants. The sums run over the m values of
    a channel. A ReLU has gradient 0 at 0.

    Returns a dict of ``"dx"``, ``"dgamma"``, ``"dbeta"`` and ``"dresidual"``, always all four.

    Source: S. Ioffe, C. Szegedy, ICML 2015, section 3, which prints the same derivatives.

    >>> y, cache = batchnorm_forward(np.array([[0.0], [1.0], [5.0]]), np.array([2.0]))
    >>> bool(abs(batchnorm_backward(np.array([[1.0], [2.0], [4.0]]), cache)["dx"].sum()) < 1e-12)  # y ignores a shift
    True
    """
    x, xhat, axes, along, m = (cache[name] for name in ("x", "xhat", "axes", "along", "m"))
    mean, inv_std = cache["mean"].reshape(along), cache["inv_std"].reshape(along)
    dz = np.where(cache["y"] > 0, dy, 0) if cache["activation"] == "relu" else dy
    du, dresidual = dz, dz
    dbeta = du.sum(axes)
    dgamma = (du * xhat).sum(axes)
    dxhat = du if cache["gamma"] is None else cache["gamma"].reshape(along) * du
    dx = inv_std * dxhat
    if cache["training"]:
        dmean = -inv_std * dxhat.sum(axes, keepdims=True)
        dinv_std = (dxhat * (x - mean)).sum(axes, keepdims=True)
        dvar = -0.5 * inv_std**3 * dinv_std
        dx = dx + dvar * 2 * (x - mean) / m
        dmean = dmean - dvar * 2 * (x - mean).sum(axes, keepdims=True) / m
        dx = dx + dmean / m
    return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta, "dresidual": dresidual}
