"""Every optimizer and BatchNorm in plain NumPy: the oracle of the tests and the NumPy side of the benchmarks.

The module imports nothing of fastopt, so that a mistake in a compiled rule cannot also be here. Each function writes
its formula as the paper (or, where there are several forms in use, as the framework named) prints it; no constant is
folded and no term is rearranged. Speed was not a consideration.

All optimizers are called alike, ``optimizer(p, g, state, t, **hyperparameters) -> None``:

- ``p`` parameter, float32 or float64 of any shape, updated in place;
- ``g`` gradient of the loss, the shape of ``p``, only read (another dtype is rounded to that of ``p`` first);
- ``state`` dictionary of arrays like ``p``, updated in place, made by :func:`init_state`;
- ``t`` number of this update, a Python int, 1 at the first.

Everything is computed in the dtype of ``p``, except the norms of LAMB (float64). Hyperparameters are Python numbers:
a NumPy float64 scalar would lift the arithmetic of float32 arrays to float64 before the result is stored. Their
ranges are not checked here. What is checked (``t``, shapes, dtypes, the states present, ``form``) is checked before
anything is written, and raises ValueError or TypeError naming the argument.

:func:`batchnorm_forward` and :func:`batchnorm_backward`, at the end of the file, take and return arrays.

In the formulas ``g`` is the gradient after L2 weight decay, ``g + weight_decay * p``, except in AdamW and LAMB, which
do their own. In the units of hyperparameters [p] stands for the unit of the parameter and [g] for that of the
gradient, which is [loss]/[p]; what has no unit is a pure number.

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
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "OPTIMIZERS",
    "adadelta",
    "adagrad",
    "adam",
    "adamw",
    "batchnorm_backward",
    "batchnorm_forward",
    "init_state",
    "lamb",
    "momentum",
    "nesterov",
    "rmsprop",
    "sgd",
]

Array: TypeAlias = npt.NDArray[np.floating[Any]]
State: TypeAlias = dict[str, Array]


def _gradient(p: Array, g: Array, t: int, weight_decay: float = 0.0) -> Array:
    """Check the arguments all optimizers share, and return g + weight_decay * p in the dtype of p."""
    if p.dtype not in (np.float32, np.float64):
        raise TypeError(f"p has dtype {p.dtype}, expected float32 or float64: convert it with p.astype(numpy.float64)")
    if g.shape != p.shape:
        # NumPy would broadcast a (1,) gradient without a word, and an oracle must not guess.
        raise ValueError(f"g has shape {g.shape}, expected the shape of p, {p.shape}: reshape the gradient")
    if not isinstance(t, int):
        # beta ** numpy.int64 is a numpy.float64, which would lift float32 arithmetic to float64.
        raise TypeError(f"t is {t!r} of type {type(t).__name__}, expected a Python int: pass int(t)")
    if t < 1:
        raise ValueError(f"t is {t}, expected at least 1: the first update is t = 1")
    g = g.astype(p.dtype, copy=False)
    return g + weight_decay * p if weight_decay else g


def _states(state: State, p: Array, *names: str) -> list[Array]:
    """Return the named states, once each is known to be an array like p."""
    for name in names:
        if name not in state:
            raise ValueError(
                f"state has no {name!r} (found {sorted(state)}): make it by init_state with the same hyperparameters"
            )
        s = state[name]
        if s.shape != p.shape or s.dtype != p.dtype:
            raise ValueError(
                f"state {name!r} is {s.dtype} of shape {s.shape}, expected {p.dtype} of shape {p.shape} like p: "
                "make it by init_state from this p"
            )
    return [state[name] for name in names]


def _root(v: Array, eps: float, eps_inside: bool) -> Array:
    """Return sqrt(v + eps) if eps_inside, else sqrt(v) + eps."""
    root: Array = np.sqrt(v + eps) if eps_inside else np.sqrt(v) + eps
    return root


def _adam_moments(
    p: Array, g: Array, state: State, t: int, betas: tuple[float, float], bias_correction: bool, amsgrad: bool
) -> tuple[Array, Array]:
    """Update the moments of Adam (Algorithm 1) and return the two estimates m_hat and v_hat."""
    m, v, *v_max = _states(state, p, "m", "v", *(["v_max"] if amsgrad else []))
    b1, b2 = betas
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * g**2
    if amsgrad:
        # The maximum of the raw second moment; its correction comes after, as in torch. Correcting first would let the
        # maximum be reached at t = 1, where the correction is largest.
        v_max[0][...] = np.maximum(v_max[0], v)
        v = v_max[0]
    if not bias_correction:
        return m, v
    return m / (1 - b1**t), v / (1 - b2**t)


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
    weight_decay: float = 0.0,
) -> None:
    """Stochastic gradient descent, with the momentum of torch.optim.SGD.

    ::

        momentum = 0:   p = p - lr g
        otherwise:      v = g                                     at t = 1, whatever the dampening
                        v = momentum v + (1 - dampening) g        after
                        p = p - lr v                              or, nesterov, p = p - lr (g + momentum v)

    lr [p]/[g]; momentum and dampening no unit; weight_decay [g]/[p]. State: "velocity" [g], only with momentum.

    Source: H. Robbins, S. Monro, A stochastic approximation method, Ann. Math. Statist. 22 (1951); dampening and the
    first step with momentum as in torch.optim.SGD.

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
    v[...] = g if t == 1 else momentum * v + (1 - dampening) * g
    p -= lr * (g + momentum * v) if nesterov else lr * v


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

    ::

        "heavy_ball":   v = momentum v + g                   p = p - lr v
        "ema":          v = momentum v + (1 - momentum) g    p = p - lr v
        "lr_inside":    v = momentum v - lr g                p = p + v

    lr [p]/[g]; momentum no unit; weight_decay [g]/[p]. State: "velocity", [g], or [p] in the form "lr_inside".
    "ema" is "heavy_ball" with lr (1 - momentum) in place of lr; "lr_inside" is "heavy_ball" as long as lr is constant.

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
        raise ValueError(f"form is {form!r}, expected one of 'heavy_ball', 'ema', 'lr_inside'")
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

    ::

        "reformulated":   v = momentum v + g        p = p - lr (g + momentum v)      g is the gradient at p
        "lookahead":      v = momentum v + lr g     p = p - v                        g is the gradient at p - momentum v

    For "lookahead" the caller evaluates g at the look-ahead point; p is handed over where it was, not shifted. The L2
    term of weight_decay is taken at that p.

    With constant lr and no weight decay both walk the same path: the p of "reformulated" are the look-ahead points
    p - momentum v of "lookahead", and the v of "lookahead" is lr times the other.

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
        raise ValueError(f"form is {form!r}, expected one of 'reformulated', 'lookahead'")
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

    ::

        lr_t = lr / (1 + (t - 1) lr_decay)
        s = s + g^2
        p = p - lr_t g / (sqrt(s) + eps)        or, eps_inside, / sqrt(s + eps)

    lr [p]; lr_decay no unit; eps [g], or [g]^2 with eps_inside; weight_decay [g]/[p]. State: "sum_sq" [g]^2, which
    starts at initial_accumulator_value: init_state reads that argument, this function only accepts it, so that one
    set of hyperparameters serves both.

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

    ::

        s = rho s + (1 - rho) g^2
        d = sqrt(r + eps) / sqrt(s + eps) g         r from the update before
        p = p - lr d
        r = rho r + (1 - rho) d^2

    lr and rho no unit (the paper has lr = 1); eps is added to [g]^2 and to [p]^2 alike; weight_decay [g]/[p].
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
    weight_decay: float = 0.0,
) -> None:
    """RMSprop, with the centering of Graves and the momentum of torch as options.

    ::

        v = alpha v + (1 - alpha) g^2
        centered:   a = alpha a + (1 - alpha) g ;  w = max(v - a^2, 0)         otherwise w = v
        d = sqrt(w) + eps                                                      or, eps_inside, sqrt(w + eps)
        momentum = 0:   p = p - lr g / d
        otherwise:      b = momentum b + g / d ;  p = p - lr b

    v - a^2 is a variance, which rounding can make negative; the maximum keeps the root real.

    lr [p]; alpha and momentum no unit; eps [g], or [g]^2 with eps_inside; weight_decay [g]/[p]. States: "square_avg"
    is v [g]^2; "grad_avg" is a [g], if centered; "buf" is b, no unit, with momentum.

    Source: T. Tieleman, G. Hinton, Lecture 6.5 of Neural Networks for Machine Learning, Coursera 2012; centered (with
    eps inside) is A. Graves, Generating sequences with recurrent neural networks, 2013,
    https://arxiv.org/abs/1308.0850, Eqs. (38)-(41), but for its momentum, which is the one of torch.optim.RMSprop
    here.

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
    bias_correction: bool = True,
    amsgrad: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """Adam, and AMSGrad as an option.

    ::

        m = b1 m + (1 - b1) g            m_hat = m / (1 - b1^t)
        v = b2 v + (1 - b2) g^2          v_hat = v / (1 - b2^t)
        p = p - lr m_hat / (sqrt(v_hat) + eps)          or, eps_inside, / sqrt(v_hat + eps)

    bias_correction=False: m_hat = m, v_hat = v. amsgrad: v_max = max(v_max, v), and v_max takes the place of v in
    v_hat.

    lr [p]; betas no unit; eps [g], or [g]^2 with eps_inside; weight_decay [g]/[p]. States: "m" [g], "v" [g]^2, and with
    amsgrad "v_max" [g]^2.

    Source: D. P. Kingma, J. Ba, Adam: a method for stochastic optimization, ICLR 2015,
    https://arxiv.org/abs/1412.6980, Algorithm 1; AMSGrad is S. J. Reddi, S. Kale, S. Kumar, On the convergence of
    Adam and beyond, ICLR 2018, Algorithm 2, with the bias correction of torch.optim.Adam, which the paper has not.

    >>> p = np.array([1.0, 1.0]); state = init_state("adam", p)
    >>> adam(p, np.array([4.0, -0.5]), state, 1, lr=0.25, betas=(0.5, 0.75), eps=0.0)
    >>> p.tolist(), state["m"].tolist(), state["v"].tolist()
    ([0.75, 1.25], [2.0, -0.25], [4.0, 0.0625])
    """
    g = _gradient(p, g, t, weight_decay)
    m_hat, v_hat = _adam_moments(p, g, state, t, betas, bias_correction, amsgrad)
    p -= lr * m_hat / _root(v_hat, eps, eps_inside)


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
    bias_correction: bool = True,
    amsgrad: bool = False,
    weight_decay: float = 0.01,
) -> None:
    """Adam with decoupled weight decay: the decay does not pass through the moments.

    ::

        p = (1 - lr weight_decay) p
        p = p - lr m_hat / (sqrt(v_hat) + eps)          with m_hat and v_hat as in adam, of the bare gradient

    lr [p]; weight_decay 1/[p], so that lr weight_decay is the fraction of p lost per update; betas, eps, eps_inside,
    bias_correction and amsgrad as in :func:`adam`.
    States: "m" [g], "v" [g]^2, and with amsgrad "v_max" [g]^2.

    Source: I. Loshchilov, F. Hutter, Decoupled weight decay regularization, ICLR 2019,
    https://arxiv.org/abs/1711.05101, Algorithm 2, with the decay multiplied by lr as in torch.optim.AdamW.

    >>> p = np.array([1.0]); state = init_state("adamw", p)
    >>> adamw(p, np.array([4.0]), state, 1, lr=0.25, eps=0.0, weight_decay=0.5)
    >>> p.tolist()
    [0.625]
    """
    g = _gradient(p, g, t)
    m_hat, v_hat = _adam_moments(p, g, state, t, betas, bias_correction, amsgrad)
    p *= 1 - lr * weight_decay
    p -= lr * m_hat / _root(v_hat, eps, eps_inside)


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

    ::

        u = m_hat / (sqrt(v_hat) + eps) + weight_decay p          with m_hat and v_hat as in adam, of the bare gradient
        ratio = |p| / |u|                                         Euclidean norms over all of p; 1 where either is 0
        p = p - lr ratio u

    bias_correction=False: m_hat = m, v_hat = v. The norms are taken in float64 whatever the dtype of p.

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
    p_norm = float(np.linalg.norm(p.astype(np.float64)))
    u_norm = float(np.linalg.norm(u.astype(np.float64)))
    ratio = 1.0 if p_norm == 0 or u_norm == 0 else p_norm / u_norm
    p -= lr * ratio * u


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
}


def init_state(name: str, p: Array, **hyper: Any) -> State:
    """Return the state of an optimizer before its first update: the arrays these hyperparameters call for, like p.

    ``name`` is a key of OPTIMIZERS; ``hyper`` any of its hyperparameters, the others have their defaults. All states
    are zero, but for "sum_sq" of Adagrad, which is ``initial_accumulator_value`` ([g]^2). Raises ValueError for an
    unknown name, TypeError for an unknown hyperparameter.

    >>> init_state("adam", np.ones(2, np.float32), amsgrad=True)["v_max"]
    array([0., 0.], dtype=float32)
    >>> sorted(init_state("rmsprop", np.ones(2), centered=True))
    ['grad_avg', 'square_avg']
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(map(repr, OPTIMIZERS))}")
    parameters = inspect.signature(OPTIMIZERS[name]).parameters.values()
    values = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    if unknown := sorted(hyper.keys() - values.keys()):
        raise TypeError(f"{name} has no hyperparameter {unknown[0]!r}, expected some of {', '.join(values)}")
    values.update(hyper)

    initial: dict[str, float]
    match name:
        case "sgd":
            initial = {"velocity": 0.0} if values["momentum"] != 0 else {}
        case "momentum" | "nesterov":
            initial = {"velocity": 0.0}
        case "adagrad":
            initial = {"sum_sq": values["initial_accumulator_value"]}
        case "adadelta":
            initial = {"square_avg": 0.0, "acc_delta": 0.0}
        case "rmsprop":
            initial = {"square_avg": 0.0}
            if values["centered"]:
                initial["grad_avg"] = 0.0
            if values["momentum"] != 0:
                initial["buf"] = 0.0
        case _:  # the Adam family
            initial = {"m": 0.0, "v": 0.0}
            if values.get("amsgrad", False):
                initial["v_max"] = 0.0
    return {key: np.full_like(p, value) for key, value in initial.items()}


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
    """Batch normalisation over all axes but `axis`, and what :func:`batchnorm_backward` needs.

    ::

        mean = sum(x) / m               training; m values per channel
        var  = sum((x - mean)^2) / m
        running_mean = (1 - momentum) running_mean + momentum mean
        running_var  = (1 - momentum) running_var + momentum var m / (m - 1)

        mean, var = running_mean, running_var            otherwise

        xhat = (x - mean) / sqrt(var + eps)
        y    = gamma xhat + beta
        y    = y + residual             where there is one
        y    = max(y, 0)                activation = "relu"

    x [x], residual [y], gamma [y], beta [y], running_mean [x], running_var and eps [x]^2, momentum no unit. The
    running statistics are updated in place; gamma, beta and they have shape (C,), residual that of x.

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
            raise ValueError("running_mean and running_var are needed where training is False")
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
        raise ValueError(f"activation is {activation!r}, expected None or 'relu'")
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
    """The gradients of a loss L with respect to all that entered :func:`batchnorm_forward`; dy = dL/dy.

    The chain rule, one line of the forward pass at a time, from the last to the first (dv stands for dL/dv)::

        y = max(z, 0)                       dz = dy where y > 0, else 0
        z = u + residual                    du = dz,  dresidual = dz
        u = gamma xhat + beta               dbeta = sum(du),  dgamma = sum(du xhat),  dxhat = gamma du
        xhat = (x - mean) inv_std           dinv_std = sum(dxhat (x - mean));
                                            dx = inv_std dxhat,  dmean = -inv_std sum(dxhat)
        inv_std = (var + eps)^(-1/2)        dvar = -1/2 inv_std^3 dinv_std
        var = sum((x - mean)^2) / m         dx += dvar 2 (x - mean) / m,  dmean += -dvar 2 sum(x - mean) / m
        mean = sum(x) / m                   dx += dmean / m

    The last three lines are those of training; otherwise mean and var are constants. The sums run over the m values of
    a channel. A ReLU has gradient 0 at 0.

    Returns a dict of ``"dx"``, ``"dgamma"``, ``"dbeta"`` and ``"dresidual"``, all of them, whatever the forward pass
    was given.

    Source: S. Ioffe, C. Szegedy, ICML 2015, section 3, where the same derivatives are printed.

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
