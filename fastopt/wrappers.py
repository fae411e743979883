"""Rules around rules: each function here takes any rule, and returns it wrapped. `fastopt.wrap` makes others."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastopt.hyper import Choice, Flag, Interval
from fastopt.rule import Rule, Sums
from fastopt.wrap import wrap

__all__ = ["averaged", "cautious", "centralized", "lookahead"]


# --- Lookahead --------------------------------------------------------------------------------------------------------


class Pull(NamedTuple):
    """Whether this step pulls, and how far."""

    lookahead_pulls: float
    lookahead_weight: float


def _prepare_pull(t: int, lookahead_k: float = 5.0, lookahead_alpha: float = 0.5) -> Pull:
    return Pull(1.0 if t % lookahead_k == 0.0 else 0.0, lookahead_alpha)


def _pull(p, new_p, g, slow, h):
    if h.lookahead_pulls > 0:
        slow = slow + h.lookahead_weight * (new_p - slow)
        return slow, slow
    return new_p, slow


def lookahead(rule: Rule) -> Rule:
    """Return a rule whose weights are pulled back, every few steps, towards slow weights that follow them.

    Formula:
        every lookahead_k updates, after that of the rule:
        slow = slow + lookahead_alpha (p - slow)
        p = slow

    Args:
        rule: any `Rule`. The new hyperparameters are lookahead_k = 5, in updates of a parameter from 1, and
            lookahead_alpha = 0.5, from 0 to 1; the new state "slow" is in units of the parameter, and begins there.

    Returns:
        A `Rule`, named ``lookahead_`` and that of `rule`.

    Raises:
        TypeError: `rule` must be a Rule that `fastopt.wrap` takes with an `after`.

    Source: Zhang et al. 2019, https://arxiv.org/abs/1907.08610, algorithm 1.

    >>> import numpy as np, fastopt
    >>> rule = fastopt.wrappers.lookahead(fastopt.rules.adam)
    >>> opt = fastopt.Optimizer({"w": np.ones(2)}, rule, lr=0.1, lookahead_k=2)
    >>> for _ in range(2):
    ...     _ = opt.step({"w": np.array([1.0, -1.0])})
    >>> opt.params["w"].round(6)
    array([0.9, 1.1])
    """
    return wrap(
        rule,
        after=_pull,
        states=("slow",),
        prepare=_prepare_pull,
        initial={"slow": "p"},
        domains={
            "lookahead_k": Interval(1.0, 1e9, whole=True),
            "lookahead_alpha": Interval(0.0, 1.0),
        },
        name=f"lookahead_{getattr(rule, 'name', '')}",
    )


# --- Cautious ---------------------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """What the steps that agree are multiplied by."""

    cautious_scale: float
    cautious_zero: float  # a literal 0.0 would be float64


def _prepare_agreement(t: int) -> Agreement:
    return Agreement(1.0, 0.0)


def _agrees(p, new_p, g, h):
    return (new_p < p and g > 0) or (new_p > p and g < 0)


def _rescale(sums: Any, numbers: Any, size: float, h: Any) -> float:
    share: float = sums.agree / size
    return 1.0 / max(share, 1e-3)


def _mask(p, new_p, g, h):
    return new_p if _agrees(p, new_p, g, h) else p + h.cautious_zero * (new_p - p)  # a NaN stays one


def _mask_and_rescale(p, new_p, g, h):
    weight = h.cautious_scale if _agrees(p, new_p, g, h) else h.cautious_zero
    return p + weight * (new_p - p)


def cautious(rule: Rule, *, rescale: bool = True) -> Rule:
    """Return a rule that steps only where it goes against the gradient, and there further.

    Formula:
        p_new = p + mask (p_new - p) / max(mean(mask), 1e-3)
        mask = 1 where (p - p_new) g > 0, else 0; its mean is over each parameter tensor

    Args:
        rule: any `Rule`. `p` is the parameter after decoupled weight decay, and `g` contains L2; the decay of a rule
            that applies its own is part of its step.
        rescale: whether the step is divided by the mean of the mask, which takes another pass over p, g and the states.
            False for none, and for rules that see matrices (Muon).

    Returns:
        A `Rule`, named ``cautious_`` and that of `rule`, with its states and hyperparameters.

    Raises:
        TypeError: `rule` must be a Rule that `fastopt.wrap` takes with an `after`, and with sums to rescale.

    Source: Liang et al. 2024, https://arxiv.org/abs/2411.16085, algorithm 1; the mean as in timm 1.0.

    >>> import numpy as np, fastopt
    >>> rule = fastopt.wrappers.cautious(fastopt.rules.momentum)
    >>> opt = fastopt.Optimizer({"w": np.zeros(2)}, rule, lr=0.25, momentum=0.5)
    >>> _ = opt.step({"w": np.array([4.0, 4.0])})
    >>> _ = opt.step({"w": np.array([4.0, -1.0])})  # the second velocity is 1, and does not agree with -1
    >>> opt.params["w"]
    array([-4., -1.])
    """
    Flag().check("rescale", rescale)
    return wrap(
        rule,
        after=_mask_and_rescale if rescale else _mask,
        prepare=_prepare_agreement,
        sums=Sums({"agree": _agrees}, _rescale, results=("cautious_scale",)) if rescale else (),
        name=f"cautious_{getattr(rule, 'name', '')}",
    )


# --- gradient centralization ------------------------------------------------------------------------------------------


class Centre(NamedTuple):
    """Whether gradients lose the mean of their row, and that mean."""

    centralize: float
    centralize_mean: float  # filled in by the backend


def _prepare_centre(t: int, centralize: bool = True) -> Centre:
    return Centre(float(centralize), 0.0)


def _gradient(p, g, h):
    return g


def _mean_of_row(sums: Any, numbers: Any, size: float, h: Any) -> float:
    # Not the product with the flag: of a parameter that is left out, a NaN stays in its element.
    mean: float = sums.gradient / size if h.centralize > 0.0 else 0.0
    return mean


def _less_mean(p, g, h):
    return g - h.centralize_mean


def centralized(rule: Rule, *, over: str = "row") -> Rule:
    """Return a rule that is given gradients whose rows have the mean 0: gradient centralization.

    Formula:
        g = g - mean(g), the mean over each row: over all axes but the first one

    Args:
        rule: any `Rule` that is not matrixwise. `g` is clipped, and contains L2 but no decoupled weight decay. The new
            hyperparameter is centralize = True, a flag. It is False by default for parameters of fewer than two axes,
            which keep their gradients; overrides can change it, as ``{"embedding": {"centralize": False}}``.
        over: ``"row"`` for weights with a row per output, as torch's; ``"column"`` for matrices with a column per
            output, as W in ``X @ W``.

    Returns:
        A `Rule`, named ``centralized_`` and that of `rule`, with its states.

    Raises:
        TypeError: `rule` must be a Rule that `fastopt.wrap` takes with sums.
        ValueError: `over` must be one of these.

    Source: Yong et al. 2020, https://arxiv.org/abs/2004.01461, eq. 1.

    >>> import numpy as np, fastopt
    >>> rule = fastopt.wrappers.centralized(fastopt.rules.sgd)
    >>> opt = fastopt.Optimizer({"W": np.zeros((2, 3)), "b": np.zeros(2)}, rule, lr=1.0)
    >>> _ = opt.step({"W": np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]), "b": np.array([1.0, 2.0])})
    >>> opt.params["W"], opt.params["b"]
    (array([[ 1.,  0., -1.],
           [ 0.,  0.,  0.]]), array([-1., -2.]))
    """
    Choice(("row", "column")).check("over", over)
    return wrap(
        rule,
        before=_less_mean,
        prepare=_prepare_centre,
        sums=Sums({"gradient": _gradient}, _mean_of_row, results=("centralize_mean",), over=over),
        for_matrices=("centralize",),
        name=f"centralized_{getattr(rule, 'name', '')}",
    )


# --- the average of weights -------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """That of the new parameters in their average."""

    average_weight: float


def _prepare_weight(t: int, average_from: float = 1.0) -> Weight:
    return Weight(1.0 / max(1.0, t - average_from + 1.0))


def _average(p, new_p, g, average, h):
    return new_p, average + h.average_weight * (new_p - average)


def averaged(rule: Rule) -> Rule:
    """Return a rule that keeps the mean of all parameters from some update on, for evaluation.

    Formula:
        average = average + (p - average) / max(1, t - average_from + 1)

    Args:
        rule: any `Rule`. The new hyperparameter is average_from = 1, the first update of the mean, from 1; the new
            state "average" is in units of the parameter. For a mean that forgets, every optimizer has ``ema=``.

    Returns:
        A `Rule`, named ``averaged_`` and that of `rule`.

    Raises:
        TypeError: `rule` must be a Rule that `fastopt.wrap` takes with an `after`.

    Source: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; Izmailov et al. 2018, SWA,
    https://arxiv.org/abs/1803.05407.

    >>> import numpy as np, fastopt
    >>> opt = fastopt.Optimizer({"w": np.zeros(1)}, fastopt.wrappers.averaged(fastopt.rules.sgd), lr=1.0)
    >>> for g in (1.0, 1.0, 2.0):
    ...     _ = opt.step({"w": np.array([g])})
    >>> opt.params["w"], opt.states["average"]["w"]  # the mean of -1, -2 and -4
    (array([-4.]), array([-2.33333333]))
    """
    return wrap(
        rule,
        after=_average,
        states=("average",),
        prepare=_prepare_weight,
        initial={"average": "p"},
        domains={"average_from": Interval(1.0, 1e9, whole=True)},
        name=f"averaged_{getattr(rule, 'name', '')}",
    )
