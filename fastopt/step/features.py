"""`features_of`: the compile-time flags of the kernel that runs a rule."""

from __future__ import annotations

from fastopt.kernels.contract import Features
from fastopt.rule import Rule


def features_of(rule: Rule, *, decays: bool, **flags: bool) -> Features:
    """Return the flags of the kernel that runs `rule`.

    Args:
        rule: the loop applies its weight decay, unless the rule applies it itself.
        decays: whether the weights of any parameter decay.
        **flags: the flags of `Features` except the two of weight decay.

    >>> import fastopt
    >>> found = features_of(fastopt.rules.sgd, decays=True)
    >>> found.l2, found.decoupled
    (True, False)
    """
    by_loop = decays and not rule.owns_weight_decay
    return Features(**flags, l2=by_loop and not rule.decoupled, decoupled=by_loop and rule.decoupled)
