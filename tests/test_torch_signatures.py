"""What `help()`, `inspect.signature` and editors show of the optimizers of `fastopt.torch`."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import fastopt

torch = pytest.importorskip("torch", reason="torch is not installed: fastopt.torch is for it (CI installs it)")

import fastopt.torch as ft  # noqa: E402

NAMED = [name for name in ft.__all__ if name in fastopt.Optimizer.classes]


@pytest.mark.parametrize("name", NAMED)
def test_the_signature_is_torchs_or_ours_with_the_options_of_a_step(name):
    found = list(inspect.signature(getattr(ft, name)).parameters.values())
    has = getattr(torch.optim, name, getattr(fastopt, name))
    expected = [p for p in inspect.signature(has).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert [(p.name, p.kind) for p in found[: len(expected)]] == [(p.name, p.kind) for p in expected]
    assert [p.default for p in found[1 : len(expected)]] == [p.default for p in expected[1:]]
    assert found[0].default is inspect.Parameter.empty
    shared = inspect.signature(fastopt.Optimizer).parameters
    more = ["maximize", "decoupled_weight_decay"] if has.__module__.startswith("fastopt") else []
    more += ["max_norm", "clip_norm_per_tensor", "clip_value", "nonfinite", "ema", "grad_norm"]
    more += ["states", "master", "rounding", "compensated", "seed"]
    assert found[len(expected) :] == [shared[option] for option in more]


@pytest.mark.parametrize("name", NAMED)
def test_the_arguments_that_are_shown_are_taken_with_their_defaults_and_documented(name):
    kind = getattr(ft, name)
    arguments = {p.name: p.default for p in list(inspect.signature(kind).parameters.values())[1:]}
    shown, plain = (
        kind([torch.nn.Parameter(torch.ones(2))], **arguments).defaults,
        kind([torch.nn.Parameter(torch.ones(2))]).defaults,
    )
    assert {key: value for key, value in shown.items() if key in plain} == plain
    assert [key for key in shown if key not in plain] in ([], ["decoupled_weight_decay"])  # None: the rule's own
    assert max(map(len, kind.__doc__.splitlines())) <= 120
    described = re.sub(r"\n {5,}", " ", inspect.getdoc(kind))  # an argument a line
    for argument, default in arguments.items():
        assert re.search(rf"^    {argument}: .* Default: {re.escape(repr(default))}\.$", described, re.MULTILINE), (
            argument
        )
    assert "*args" not in described
    ours = {*inspect.signature(getattr(fastopt, name)).parameters, "options"} - {"params", "options", *arguments}
    assert not [word for word in ours if re.search(rf"\b{word}\b", described) and not word.startswith("adamw_")]


def test_a_subclass_shows_its_own_arguments():
    class Renamed(ft.AdamW):
        pass

    class Own(ft.AdamW):
        def __init__(self, params: Any, rate: float = 0.1):
            super().__init__(params, rate)

    assert inspect.signature(Renamed) == inspect.signature(ft.AdamW)
    assert list(inspect.signature(Own).parameters) == ["params", "rate"]
    assert Own([torch.nn.Parameter(torch.ones(2))]).defaults["lr"] == 0.1
