r"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2).

    p = p - lr weight_decay p
    then Adam, with the undecayed gradient

The loop around the rule applies the decay (``decoupled=True``); the rule is Adam's. States: those of Adam.
"""

from __future__ import annotations

from fastopt.rule import rule
from fastopt.rules.adam import adam, amsgrad, prepare


@rule(prepare, decoupled=True, idle=adam.idle, nonnegative=("v",))
def adamw(p, g, m, v, h):
    return adam(p, g, m, v, h)


@rule(prepare, decoupled=True, idle=amsgrad.idle, nonnegative=("v", "v_max"))
def adamw_amsgrad(p, g, m, v, v_max, h):
    return amsgrad(p, g, m, v, v_max, h)
