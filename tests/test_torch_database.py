"""torch's own test database of optimizers, through `fastopt.torch`: all inputs of shared ones, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
import unittest
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: fastopt.torch is for it (CI installs it)")
if (
    importlib.util.find_spec("expecttest") is None
):  # torch's tests derive a class from its TestCase; the database does not
    stub: Any = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stub
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    database = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)

import fastopt.torch as ft  # noqa: E402

INFOS = {info.name: info for info in database.optim_db if hasattr(ft, info.name)}
FLAGS = ({}, {"foreach": True}, {"foreach": False}, {"fused": True})
NO_FLAG = ("Muon",)
BFLOAT16 = {"Muon": 0.02}
"""torch makes Muon's matrices orthogonal in bfloat16: how far 20 steps of lr 1 may be apart."""


def inputs() -> list[Any]:
    found = []
    for name, info in INFOS.items():
        for dtype in (torch.float32, torch.float64):
            for each in info.optim_inputs_func(device="cpu", dtype=dtype):
                mark = f"{name}-{str(dtype).removeprefix('torch.')}-{each.desc}"
                found.append(pytest.param(name, dtype, each.kwargs, id=mark.replace(" ", "_")))
    return found


def errors() -> list[Any]:
    found = []
    for name, info in INFOS.items():
        for k, each in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32)):
            mark = each.optimizer_error_input.desc or str(each.optimizer_error_input.kwargs)
            found.append(pytest.param(name, each, id=f"{name}-{k}-{mark}".replace(" ", "_")))
    return found


def test_the_database_has_all_that_torch_and_we_share():
    assert set(INFOS) >= {
        "SGD",
        "Adafactor",
        "Adagrad",
        "Adadelta",
        "RMSprop",
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "Adamax",
        "Rprop",
    }


@pytest.mark.parametrize(("name", "dtype", "options"), inputs())
def test_twenty_steps_are_torchs(name, dtype, options):
    """A layer of 2-D parameters, as in torch's own test of its implementations against each other."""
    options = copy.deepcopy(options)
    own = ("foreach", "fused") if name not in NO_FLAG else ()
    flags = [
        flag
        for flag in FLAGS
        if set(flag) <= set(own)
        and (flag.get("fused") is None or "fused" in INFOS[name].supported_impls)
        and not (flag.get("foreach") and isinstance(options.get("lr"), torch.Tensor))
    ]
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((10, 5), (5, 3))]
    grads = [[torch.randn(p.shape, generator=generator, dtype=dtype) for p in start] for _ in range(20)]

    def trained(kind: Any, **more: Any) -> tuple[list[Any], Any]:
        params = [torch.nn.Parameter(p.clone()) for p in start]
        opt = kind(params, **options, **more)
        for each in grads:
            for p, g in zip(params, each, strict=True):
                p.grad = g.clone()
            opt.step()
        return params, opt

    expected, theirs = trained(getattr(torch.optim, name))
    rtol, atol = (
        (1e-10, 1e-10) if dtype is torch.float64 and name not in ("NAdam", "ASGD") else (2e-5, 2e-6)
    )  # numbers among their states are float32
    atol = max(atol, BFLOAT16.get(name, 0.0) * theirs.defaults["lr"] * 20)
    for flag in flags:
        found, ours = trained(getattr(ft, name), **flag)
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=atol)
            for state, tensor in theirs.state[q].items():
                found_state = ours.state[p][state]
                assert found_state.dtype in (tensor.dtype, torch.float64)  # a number per row or column
                torch.testing.assert_close(found_state, tensor, rtol=rtol, atol=atol, check_dtype=False)


ACCEPTED = {
    ("Muon", "only supports 2D"): "parameters that are not matrices are updated by AdamW here",
}


@pytest.mark.parametrize(("name", "case"), errors())
def test_what_torch_refuses_is_refused(name, case):
    given = case.optimizer_error_input
    kind = getattr(ft, name)
    if any(name == own and text in case.error_regex for own, text in ACCEPTED):
        kind(given.params, **given.kwargs)
        return
    if case.error_type is UserWarning:
        with pytest.warns(UserWarning, match=case.error_regex):
            kind(given.params, **given.kwargs)
        return
    params = [torch.nn.Parameter(torch.zeros(1, 1))] if given.params is None else given.params
    if case.error_on is database.OptimizerErrorEnum.STEP_ERROR:
        with pytest.raises(TypeError, match="must have dtype"):
            kind(params, **given.kwargs)
        return
    with pytest.raises(case.error_type, match=case.error_regex):  # by torch's own words
        kind(params, **given.kwargs)


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [False, True])
def test_a_loop_goes_in_the_right_direction(name, contiguous, schedulers):
    """As torch's test of that name: least squares, with parameters that have gaps in memory as well."""
    info = INFOS[name]
    for given in info.optim_inputs_func(device="cpu", dtype=torch.float32):
        torch.manual_seed(0)
        shape = (10, 5) if contiguous else (10, 5, 2)
        weight = torch.nn.Parameter(torch.randn(shape) if contiguous else torch.randn(shape)[..., 0])
        bias = torch.nn.Parameter(torch.randn(10, 1) if contiguous else torch.randn(10, 1, 2)[..., 0])
        x, target = torch.randn(5), torch.randn(10, 1)
        opt = getattr(ft, name)([weight, bias], **copy.deepcopy(given.kwargs))
        made = [make(opt) for make in info.scheduler_inputs[0]] if schedulers and info.scheduler_inputs else []

        def loss(weight: Any = weight, bias: Any = bias, x: Any = x, target: Any = target) -> Any:
            return (weight.mv(x)[:, None] + bias - target).square().sum()

        first = loss().item()
        for _ in range(20):
            opt.zero_grad()
            value = loss()
            value.backward()
            opt.step()
            for scheduler in made:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(value.detach())
                else:
                    scheduler.step()
        assert (loss().item() > first) == bool(given.kwargs.get("maximize"))
