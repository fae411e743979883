"""`fastopt.torch`: what users of torch.optim do, done with both, and every trap of tensors that stay where they are."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt

torch = pytest.importorskip("torch", reason="torch is not installed: fastopt.torch is for it (CI installs it)")

import fastopt.torch as ft  # noqa: E402

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # 20 steps in float32; what differs by itself is held to 4 ulp in test_torch.py


def network(dtype: Any = torch.float32) -> Any:
    torch.manual_seed(1)
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(model: Any, step: int) -> Any:
    x = batch(step, next(model.parameters()).dtype)
    return (model(x) - torch.stack([x.sum(1), x[:, 0], x[:, 1] * x[:, 2]], 1)).square().mean()


def train(model: Any, opt: Any, steps: int = 20, *, first: int = 0, each: Callable[[int], Any] | None = None) -> Any:
    for step in range(first, first + steps):
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()
        if each is not None:
            each(step)
    return model


def assert_same(found: Any, expected: Any, **close: Any) -> None:
    for (name, own), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            own.detach(), theirs.detach(), msg=lambda text, name=name: f"{name}: {text}", **{**CLOSE, **close}
        )


def both(name: str = "AdamW", **options: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """A model and its optimizer of ours, and the same of torch."""
    options.setdefault("lr", 0.01)
    mine, theirs = network(), network()
    ours = getattr(ft, name)(mine.parameters(), **options)
    return (mine, ours), (theirs, getattr(torch.optim, name)(theirs.parameters(), **options))


# --- the same results -------------------------------------------------------------------------------------------------

FORMS = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("Adadelta", {"lr": 1.0, "weight_decay": 0.1}),
    ("RMSprop", {"weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"amsgrad": True, "maximize": True}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"amsgrad": True}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"weight_decay": 0.1}),
    ("Adamax", {"weight_decay": 0.1}),
    ("ASGD", {"lambd": 0.01, "t0": 5.0, "weight_decay": 0.1}),
    ("Rprop", {}),
]
by_form = pytest.mark.parametrize(("name", "options"), FORMS, ids=lambda each: str(each))


@by_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twenty_steps_and_all_states_are_torchs(name, options, dtype):
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (), (0,), (2, 3, 4)]
    mine = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours, other = (getattr(kind, name)(params, **options) for kind, params in ((ft, mine), (torch.optim, theirs)))
    for step in range(20):
        for p, q in zip(mine, theirs, strict=True):
            g = torch.randn(p.shape, dtype=dtype)
            p.grad, q.grad = g.clone(), g.clone()
        if step in (0, 3, 4):
            mine[1].grad = theirs[1].grad = None
        ours.step()
        other.step()
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else CLOSE
    if name in ("NAdam", "ASGD"):  # torch keeps the product of momenta and the learning rate in float32
        close = CLOSE
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **close)
    found, expected = ours.state_dict(), other.state_dict()
    assert [list(group) for group in expected["param_groups"]] == [
        [key for key in group if key not in ft.optimizer.OPTIONS] for group in found["param_groups"]
    ]
    assert list(found["state"]) == list(expected["state"])
    for k, entry in expected["state"].items():
        assert set(found["state"][k]) == set(entry)
        for state, tensor in entry.items():
            torch.testing.assert_close(found["state"][k][state], tensor, **close)


ADAFACTOR = [("Adafactor", {}), ("Adafactor", {"lr": 0.5, "eps": (1e-3, 0.1), "d": 1.5, "weight_decay": 0.1})]


@pytest.mark.parametrize(("name", "options"), [*FORMS, *ADAFACTOR], ids=str)
@pytest.mark.parametrize("theirs_first", [True, False], ids=["torch-ours", "ours-torch"])
def test_a_run_begun_in_one_continues_in_the_other(name, options, theirs_first):
    expected = network()
    train(expected, getattr(torch.optim, name)(expected.parameters(), **options), 16)
    first, second = (torch.optim, ft) if theirs_first else (ft, torch.optim)
    model = network()
    begun = getattr(first, name)(model.parameters(), **options)
    train(model, begun, 8)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    goes_on = getattr(second, name)(model.parameters(), lr=0.5)  # all arguments come from the file
    goes_on.load_state_dict(torch.load(file, weights_only=True))
    train(model, goes_on, 8, first=8)
    assert_same(model, expected)


@pytest.mark.parametrize("name", [name for name in ft.__all__ if name in fastopt.Optimizer.classes])
def test_every_optimizer_makes_the_steps_of_ours(name):
    mine, expected = network(), network()
    opt = getattr(ft, name)(mine.parameters(), lr=0.02)
    paths = [name for name, _ in expected.named_parameters()]
    arrays = [p.detach().numpy() for p in expected.parameters()]
    other = getattr(fastopt, name)(arrays, copy=False, **opt._arguments(opt.param_groups[0]))
    for step in range(5):
        opt.zero_grad()
        loss_of(mine, step).backward()
        opt.step()
        expected.zero_grad()
        loss_of(expected, step).backward()
        other.step([p.grad.numpy() for p in expected.parameters()])
    for path, p, q in zip(paths, mine.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), path


@pytest.mark.parametrize(("name", "options"), ADAFACTOR, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-5], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adafactor_and_its_states_are_torchs(name, options, scale, dtype):
    """Also where the mean of the squares is below eps, which a matrix of one row and a vector tell apart."""
    torch.manual_seed(0)
    shapes = [(3, 4), (1, 6), (5, 1), (7,), ()]
    mine = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours, other = (getattr(kind, name)(params, **options) for kind, params in ((ft, mine), (torch.optim, theirs)))
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype is torch.float64 else CLOSE
    for step in range(8):
        for p, q in zip(mine, theirs, strict=True):
            g = scale * torch.randn(p.shape, dtype=dtype)
            p.grad, q.grad = g.clone(), g.clone()
        if step == 3:
            mine[0].grad = theirs[0].grad = None
        ours.step()
        other.step()
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), **close)
            assert set(ours.state[p]) == set(other.state[q])
            for state, tensor in other.state[q].items():
                torch.testing.assert_close(ours.state[p][state].to(tensor.dtype), tensor, rtol=close["rtol"], atol=0.0)
    ours.state[mine[0]]["row_var"] = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="row_var: must be a tensor of shape"):
        ours.step()


def test_adafactor_takes_its_eps_from_the_dtype_and_refuses_more_axes():
    for dtype in (torch.float32, torch.float64):
        opt = ft.Adafactor([parameter(dtype=dtype)])
        assert opt._arguments(opt.param_groups[0])["eps"] == torch.finfo(dtype).eps
    p = torch.nn.Parameter(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match=r"must have at most two axes, .* got shape \(2, 2, 2\); use from_rule"):
        ft.Adafactor([p])
    opt = ft.from_rule(fastopt.rules.adafactor)(
        [p], lr=0.1, beta2_decay=-0.8, eps=1e-30, min_rms=1e-3, clip_threshold=1
    )
    p.grad = torch.ones(2, 2, 2)
    opt.step()
    assert opt.state[p]["col_var"].shape == (4,)


def test_the_arguments_of_adafactor_are_read_in_every_step():
    (model, opt), (other, theirs) = both("Adafactor")
    for eps, d in (((1e-2, 0.5), 2.0), ((None, 1.0), 1.0)):
        for each in (opt, theirs):
            each.param_groups[0].update(eps=eps, d=d)
        train(model, opt, 4)
        train(other, theirs, 4)
    assert_same(model, other)


def test_a_rule_of_ones_own_becomes_a_torch_optimizer():
    class Hyper(NamedTuple):
        lr: float
        momentum: float

    def prepare(t: int, lr: float, momentum: float = 0.5) -> Hyper:
        return Hyper(lr, momentum)

    @fastopt.rule(prepare)
    def heavy(p, g, velocity, h):
        """Heavy balls."""
        velocity = h.momentum * velocity + g
        return p - h.lr * velocity, velocity

    kind = ft.from_rule(heavy)
    assert ft.from_rule(heavy) is kind
    assert kind.__doc__ == "Heavy balls."
    model, other = network(), network()
    opt = kind(model.parameters(), 0.01, maximize=True)
    assert isinstance(opt, torch.optim.Optimizer)
    train(model, opt)
    train(other, torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.5, maximize=True))
    assert_same(model, other)
    twin = copy.deepcopy((model, opt))
    train(*twin, 5, first=20)
    train(model, opt, 5, first=20)
    assert_same(twin[0], model, rtol=0, atol=0)
    with pytest.raises(TypeError, match="missing a required argument: 'lr'"):
        kind(network().parameters())
    with pytest.raises(TypeError, match="rule: must be a Rule"):
        ft.from_rule(lambda: None)


# --- what the state shows ---------------------------------------------------------------------------------------------


def test_states_are_views_of_flat_buffers_and_parameters_stay_where_they_are():
    (model, opt), _ = both()
    addresses = [p.data_ptr() for p in model.parameters()]
    assert opt.state_dict()["state"] == {}
    train(model, opt, 2)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    states = [opt.state[p] for p in model.parameters()]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert len({entry[name].untyped_storage().data_ptr() for entry in states}) == 1
    assert all(entry["step"].shape == () and entry["step"].item() == 2 for entry in states)


def test_a_state_that_is_replaced_is_seen():
    (model, opt), (expected, other) = both()
    train(model, opt, 3), train(expected, other, 3)
    for m, o in ((model, opt), (expected, other)):
        p = next(m.parameters())
        o.state[p]["exp_avg"] = torch.zeros_like(p)
        o.state[p]["exp_avg_sq"].fill_(1.0)
        o.state[p]["step"] = torch.tensor(7.0)
    train(model, opt, 3, first=3), train(expected, other, 3, first=3)
    assert opt.state[next(model.parameters())]["step"].item() == 10
    assert_same(model, expected)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda opt, p: opt.state[p]["step"].fill_(0.0), id="step-in-place"),
        pytest.param(lambda opt, p: opt.state[p].update(exp_avg=torch.ones_like(p)), id="update"),
        pytest.param(lambda opt, p: opt.state.pop(p), id="pop"),
        pytest.param(lambda opt, p: opt.state.clear(), id="clear"),
        pytest.param(
            lambda opt, p: setattr(opt, "state", type(opt.state)(dict)) if False else opt.state.clear(), id="all"
        ),
        pytest.param(
            lambda opt, p: opt.state.__setitem__(p, {name: tensor.clone() for name, tensor in opt.state[p].items()}),
            id="entry",
        ),
    ],
)
def test_changes_of_a_state_act_as_in_torch(change):
    (model, opt), (expected, other) = both()
    for m, o in ((model, opt), (expected, other)):
        train(m, o, 4)
        change(o, list(m.parameters())[2])
        train(m, o, 4, first=4)
    assert_same(model, expected)
    assert [s["step"].item() for s in opt.state.values()] == [
        other.state[q]["step"].item() for q in _in_order(opt, model, expected)
    ]


def _in_order(opt: Any, model: Any, expected: Any) -> list[Any]:
    own = list(model.parameters())
    theirs = list(expected.parameters())
    return [theirs[next(k for k, p in enumerate(own) if p is key)] for key in opt.state]


def test_states_that_are_made_by_hand_before_the_first_step():
    """As an optimizer for several processes often makes them, with an int for the count."""
    (model, opt), (expected, other) = both()
    for p in model.parameters():
        opt.state[p]["step"] = 0
        opt.state[p]["exp_avg"] = torch.zeros_like(p.data)
        opt.state[p]["exp_avg_sq"] = torch.zeros_like(p.data)
    train(model, opt, 3), train(expected, other, 3)
    assert_same(model, expected)
    assert opt.state[model[0].weight]["step"].item() == 3


def test_another_dict_of_states_is_seen():
    from collections import defaultdict

    (model, opt), (expected, other) = both()
    for m, o in ((model, opt), (expected, other)):
        train(m, o, 3)
        o.state = defaultdict(dict)
        train(m, o, 3, first=3)
    assert_same(model, expected)


def test_a_state_of_another_shape_is_refused():
    (model, opt), _ = both()
    train(model, opt, 1)
    opt.state[model[0].weight]["exp_avg"] = torch.zeros(3)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\]: exp_avg: must be a tensor of shape"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_state_dict_that_does_not_fit_leaves_the_optimizer_as_it_was():
    (model, opt), (expected, other) = both()
    train(model, opt, 3), train(expected, other, 3)
    state = copy.deepcopy(opt.state_dict())
    state["state"][0]["exp_avg"] = torch.zeros(1, 1)
    state["param_groups"][0]["lr"] = 100.0
    with pytest.raises(ValueError, match="exp_avg: must be a tensor of shape"):
        opt.load_state_dict(state)
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["betas"] = (2.0, 0.9)
    with pytest.raises(ValueError, match=r"betas\[0\]: must be"):
        opt.load_state_dict(state)
    train(model, opt, 3, first=3), train(expected, other, 3, first=3)
    assert_same(model, expected)


def test_a_run_of_nadam_whose_momenta_were_changed_cannot_be_continued():
    (model, opt), (expected, other) = both("NAdam")
    train(expected, other, 3)
    other.param_groups[0]["momentum_decay"] = 0.5
    with pytest.raises(ValueError, match="mu_product: must be"):
        opt.load_state_dict(copy.deepcopy(other.state_dict()))
    train(model, opt, 3)
    assert_same(model, expected)


def test_a_loaded_state_is_a_copy():
    (model, opt), _ = both()
    train(model, opt, 2)
    other = ft.AdamW(model.parameters(), lr=0.01)
    other.load_state_dict(opt.state_dict())
    p = model[0].weight
    assert other.state[p]["exp_avg"].data_ptr() != opt.state[p]["exp_avg"].data_ptr()
    before = other.state[p]["exp_avg"].clone()
    train(model, opt, 1, first=2)
    assert torch.equal(other.state[p]["exp_avg"], before)


# --- parameters and gradients of all kinds ----------------------------------------------------------------------------


def test_a_model_that_becomes_double_keeps_its_parameters_and_goes_on():
    (model, opt), _ = both()
    train(model, opt, 3)
    expected = copy.deepcopy(model).double()
    other = torch.optim.AdamW(expected.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch would share the counts of updates
    parameters = list(model.parameters())
    model.double()
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    train(model, opt, 3, first=3), train(expected, other, 3, first=3)
    assert opt.state[parameters[0]]["exp_avg"].dtype is torch.float64
    assert_same(model, expected, rtol=1e-12, atol=1e-12)


def test_the_dtype_is_looked_at_in_every_step():
    (model, opt), _ = both()
    train(model, opt, 1)
    model.bfloat16()
    opt.zero_grad()
    model(batch(1).bfloat16()).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for p in model.parameters():
        p.data = p.data.to(torch.complex64)
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"must have dtype torch\.float32, .*, got torch\.complex64"):
        opt.step()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB", "NovoGrad", "StableAdamW"])
def test_gradients_of_any_strides(name):
    kind = getattr(ft, name)
    torch.manual_seed(2)
    w, other = (torch.nn.Parameter(torch.arange(12.0).reshape(3, 4)) for _ in range(2))
    opt, plain = kind([w], lr=0.1), kind([other], lr=0.1)
    grads = [torch.randn(4, 3).t(), torch.randn(1, 4).expand(3, 4), torch.randn(3, 8)[:, ::2], torch.randn(3, 4)]
    for g in grads:
        w.grad, other.grad = g, g.contiguous()
        opt.step()
        plain.step()
    assert torch.equal(w, other)


def test_matrices_of_a_rule_are_states_and_resume():
    def made() -> tuple[list[Any], Any]:
        torch.manual_seed(3)
        kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
        params = [torch.nn.Parameter(each) for each in (kernel, torch.randn(3, 5), torch.randn(3))]
        groups = [{"params": params[:1], "lr": 0.2}, {"params": params[1:]}]
        return params, ft.SOAP(groups, lr=0.1, precondition_frequency=2)

    def train(params: list[Any], opt: Any, steps: range) -> None:
        for step in steps:
            for k, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + k))
            opt.step()

    params, opt = made()
    arrays = [p.detach().clone().contiguous().numpy() for p in params]
    ours = fastopt.SOAP(arrays, lr=0.1, precondition_frequency=2, overrides={"0": {"lr": 0.2}})
    train(params, opt, range(3))
    own = opt.state[params[0]]
    assert (own["QL"].shape, own["QR"].shape, own["S"].shape) == ((4, 4), (12, 12), (4, 12))
    assert sorted(opt.state[params[2]]) == ["exp_avg", "exp_avg_sq", "step"]
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded, again = made()
    for p, q in zip(loaded, params, strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy((params, opt))
    for each in ((params, opt), (loaded, again), copied):
        train(*each, range(3, 6))
    for step in range(6):
        ours.step(
            [
                torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + k)).numpy()
                for k, p in enumerate(params)
            ]
        )
    for p, q, r, array in zip(params, loaded, copied[0], ours.params, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
        assert p.detach().contiguous().numpy().tobytes() == array.tobytes()
    state = opt.state_dict()
    del state["state"][1]["QL"]
    with pytest.raises(ValueError, match=r"must have exp_avg, exp_avg_sq, S, L, R, QL, QR, as the optimizer has"):
        made()[1].load_state_dict(state)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps", "mixed"])
def test_parameters_of_any_strides(layout):
    def made() -> list[Any]:
        torch.manual_seed(3)
        weights = torch.randn(4, 3, 2, 2)
        if layout == "channels_last":
            weights = weights.to(memory_format=torch.channels_last)
        elif layout == "transposed":
            weights = torch.randn(5, 4).t()
        elif layout == "gaps":
            weights = torch.randn(10, 5, 2)[..., 0]
        found = [torch.nn.Parameter(weights)]
        return [*found, torch.nn.Parameter(torch.randn(3))] if layout == "mixed" else found

    mine, theirs = made(), made()
    assert mine[0].stride() == theirs[0].stride()
    ours, other = ft.AdamW(mine, lr=0.1, ema=0.5), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(6):
        for k, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + k))
            p.grad = q.grad = torch.empty_strided(p.shape, p.stride()).copy_(g) if step % 2 else g
            if step == 3:
                with torch.no_grad():  # somebody writes between two steps
                    p.mul_(0.5)
                    q.mul_(0.5)
        ours.step()
        other.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **CLOSE)
        torch.testing.assert_close(ours.state[p]["exp_avg"], other.state[q]["exp_avg"], **CLOSE)
        if layout != "gaps":
            assert ours.state[p]["exp_avg"].stride() == p.stride()


@pytest.mark.parametrize(
    "make", [ft.Muon, ft.from_rule(fastopt.wrappers.centralized(fastopt.rules.sgd))], ids=["Muon", "centralized_sgd"]
)
def test_a_transposed_matrix_has_its_rows_and_columns(make):
    torch.manual_seed(0)
    start, grads = torch.randn(6, 2), torch.randn(3, 6, 2)
    found = []
    for weight in (start, start.t().contiguous().t()):
        p = torch.nn.Parameter(weight.clone(memory_format=torch.preserve_format))
        opt = make([p], lr=0.1)
        for g in grads:
            p.grad = g
            opt.step()
        found.append(p.detach())
    assert found[1].stride() == (1, 6)
    torch.testing.assert_close(*found)


def test_a_model_that_becomes_channels_last_goes_on():
    def made() -> Any:
        torch.manual_seed(0)
        return torch.nn.Conv2d(3, 4, 3)

    model, expected = made(), made()
    opt, other = ft.AdamW(model.parameters(), lr=0.01), torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(6):
        if step == 3:
            model.to(memory_format=torch.channels_last)
        for m, o in ((model, opt), (expected, other)):
            o.zero_grad()
            m(torch.ones(2, 3, 5, 5) * (step + 1)).square().sum().backward()
            o.step()
    assert_same(model, expected)


def test_parameters_without_a_gradient_stay_as_they_are():
    (model, opt), (expected, other) = both(weight_decay=0.5)
    for m, o in ((model, opt), (expected, other)):
        m[2].weight.requires_grad_(False)
        m[2].bias.requires_grad_(False)
        train(m, o, 5)
    assert_same(model, expected)
    assert torch.equal(model[2].weight, network()[2].weight)
    assert model[2].weight not in opt.state
    assert model[2].weight._version == network()[2].weight._version
    model[2].weight.requires_grad_(True)
    expected[2].weight.requires_grad_(True)
    train(model, opt, 5, first=5), train(expected, other, 5, first=5)
    assert_same(model, expected)
    assert opt.state[model[2].weight]["step"].item() == 5


def test_gradients_that_come_and_go():
    torch.manual_seed(4)
    rng = np.random.default_rng(4)
    mine = [torch.nn.Parameter(torch.randn(3)) for _ in range(4)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours, other = ft.AdamW(mine, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for _ in range(30):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = q.grad = torch.randn(3) if rng.random() < 0.5 else None
        ours.step()
        other.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **CLOSE)


def test_without_any_gradient_nothing_happens():
    (model, opt), _ = both()
    opt.step()
    opt.step()
    assert opt.state == {}
    assert opt.info is None
    assert_same(model, network(), rtol=0, atol=0)


def test_a_tied_parameter_is_one():
    def made() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    models = made(), made()
    for model, kind in zip(models, (ft.AdamW, torch.optim.AdamW), strict=True):
        opt = kind(model.parameters(), lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            opt.step()
    assert_same(*models)


def test_a_parameter_that_is_there_twice_is_updated_once():
    w = torch.ones(2, requires_grad=True)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = ft.SGD([w, w], lr=0.5)
    w.grad = torch.ones(2)
    opt.step()
    assert w.tolist() == [0.5, 0.5]


def test_parameters_that_share_memory_are_refused():
    memory = torch.zeros(4)
    w, v = torch.nn.Parameter(memory[:3]), torch.nn.Parameter(memory[1:])
    opt = ft.SGD([w, v], lr=0.5)
    w.grad, v.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match="must not overlap in memory"):
        opt.step()


def test_a_list_of_parameters_that_is_changed_is_seen():
    (model, opt), (expected, other) = both()
    for m, o in ((model, opt), (expected, other)):
        train(m, o, 3)
        head = torch.nn.Parameter(m[4].weight.detach() * 0.5)
        o.param_groups[0]["params"][4] = head
        m[4].weight = head
        train(m, o, 3, first=3)
        del o.param_groups[0]["params"][0]
        train(m, o, 2, first=6)
    assert_same(model, expected)
    assert opt.state[model[4].weight]["step"].item() == 5


def test_parameters_that_move_are_followed():
    (model, opt), (expected, other) = both()
    for m, o in ((model, opt), (expected, other)):
        train(m, o, 3)
        for p in m.parameters():
            p.data = p.data.clone()
        train(m, o, 3, first=3)
        m.load_state_dict(network().state_dict())
        train(m, o, 3, first=6)
    assert_same(model, expected)


def test_a_parameter_of_another_shape_is_refused():
    w = torch.nn.Parameter(torch.ones(4))
    opt = ft.AdamW([w], lr=0.1)
    w.grad = torch.ones(4)
    opt.step()
    w.grad = None
    w.data = w.data[:2]
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"exp_avg: must be a tensor of shape \(2,\), got shape \(4,\)"):
        opt.step()


def test_a_conjugated_gradient_of_one_number():
    """The imaginary part of a conjugated number is a view with a sign that is not in memory."""
    z = torch.view_as_complex(torch.tensor([[1.0, 2.0]])).conj()
    g = z.imag
    assert g.is_neg()
    assert g.is_contiguous()
    w = torch.nn.Parameter(torch.zeros(1))
    opt = ft.SGD([w], lr=1.0)
    for step in (1, 2):  # the first one looks at every gradient
        w.grad = g
        opt.step()
        assert w.item() == 2.0 * step


def test_lazy_parameters_are_taken_when_they_are_there():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 1))
    opt = ft.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    before = model[0].weight.detach().clone()
    opt.step()
    assert (model[0].weight - before).abs().min() > 0.05


# --- autograd, hooks, closures ----------------------------------------------------------------------------------------


def test_autograd_sees_that_parameters_have_changed():
    w = torch.ones(3, requires_grad=True)
    opt = ft.SGD([w], lr=0.1)
    loss = w.square().sum()
    w.grad = torch.ones(3)
    version = w._version
    opt.step()
    assert w._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_closure_is_called_with_gradients():
    (model, opt), (expected, other) = both("SGD")
    for m, o in ((model, opt), (expected, other)):

        def closure(m: Any = m, o: Any = o) -> Any:
            o.zero_grad()
            loss = loss_of(m, 0)
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [o.step(closure).item() for _ in range(5)]
        assert losses[-1] < losses[0]
    assert_same(model, expected)


def test_hooks_are_called():
    hooks = importlib.import_module("torch.optim.optimizer")
    (model, opt), _ = both()
    called = []
    handles = [
        opt.register_step_pre_hook(lambda o, args, kwargs: called.append("before")),
        opt.register_step_post_hook(lambda o, args, kwargs: called.append("after")),
        hooks.register_optimizer_step_pre_hook(lambda o, args, kwargs: called.append("global before")),
        hooks.register_optimizer_step_post_hook(lambda o, args, kwargs: called.append("global after")),
    ]
    train(model, opt, 1)
    assert called == ["global before", "before", "after", "global after"]
    for handle in handles:
        handle.remove()
    train(model, opt, 1)
    assert len(called) == 4
    opt.register_state_dict_pre_hook(lambda o: called.append("state_dict"))
    opt.register_load_state_dict_post_hook(lambda o: called.append("load"))
    opt.load_state_dict(opt.state_dict())
    assert called[4:] == ["state_dict", "load"]


def test_optimizers_in_the_backward_pass():
    models = network(), network()
    for model, kind in zip(models, (ft.SGD, torch.optim.SGD), strict=True):
        opts = {p: kind([p], lr=0.1) for p in model.parameters()}

        def apply(p: Any, opts: Any = opts) -> None:
            opts[p].step()
            opts[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(apply)
        for step in range(5):
            loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
    assert_same(*models)


def test_the_profiler_shows_the_step():
    (model, opt), _ = both()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, opt, 2)
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    (model, opt), (expected, other) = both()
    for m, o in ((model, opt), (expected, other)):
        for step in range(6):
            loss_of(m, step).backward()
            o.step()
            if step % 2:
                o.zero_grad(set_to_none=set_to_none)
            else:
                m.zero_grad(set_to_none=set_to_none)
            assert all((p.grad is None) == set_to_none for p in m.parameters())
    assert_same(model, expected)


def test_gradients_that_are_added_up():
    (model, opt), (expected, other) = both()
    for m, o in ((model, opt), (expected, other)):
        for step in range(12):
            (loss_of(m, step) / 3).backward()
            if step % 3 == 2:
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
                o.step()
                o.zero_grad()
    assert_same(model, expected)


# --- param groups and schedulers --------------------------------------------------------------------------------------


def groups_of(model: Any) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.03}]


def test_param_groups_and_what_is_set_in_them():
    models = network(), network()
    for model, kind in zip(models, (ft.AdamW, torch.optim.AdamW), strict=True):
        opt = kind(groups_of(model), lr=0.01, weight_decay=0.1)

        def each(step: int, opt: Any = opt) -> None:
            opt.param_groups[step % 2]["lr"] *= 0.9
            opt.param_groups[1]["betas"] = (0.8, 0.99)
            opt.param_groups[0]["weight_decay"] = 0.2 * (step % 3)
            if step == 4:
                opt.param_groups[0]["maximize"] = True

        train(model, opt, 8, each=each)
        model.append(torch.nn.Linear(3, 3))
        torch.nn.init.eye_(model[5].weight)
        torch.nn.init.zeros_(model[5].bias)
        opt.add_param_group({"params": list(model[5].parameters()), "lr": 0.002})
        train(model, opt, 5, first=8)
        opt.param_groups[1]["maximize"] = True
        opt.param_groups[0]["maximize"] = False
        opt.param_groups.pop()
        train(model, opt, 2, first=13)
    assert_same(*models)


def test_momentum_that_is_switched_on_and_off():
    models = network(), network()
    for model, kind in zip(models, (ft.SGD, torch.optim.SGD), strict=True):
        opt = kind(model.parameters(), lr=0.01)
        for k, momentum in enumerate((0.0, 0.9, 0.0, 0.5)):
            opt.param_groups[0]["momentum"] = momentum
            train(model, opt, 3, first=3 * k)
    assert_same(*models)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [4, 9], 0.5),
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step)),
    "LambdaLR from 0": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(step / 5, 1.0)),
    "MultiplicativeLR": lambda opt: torch.optim.lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "PolynomialLR": lambda opt: torch.optim.lr_scheduler.PolynomialLR(opt, 15, 2.0),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
    "CosineAnnealingWarmRestarts": lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "ExponentialLR": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=21),
    "CyclicLR": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.001, 0.1, 3, cycle_momentum=False),
    "CyclicLR of betas": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.001, 0.1, 3),
    "ChainedScheduler": lambda opt: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9), torch.optim.lr_scheduler.LinearLR(opt)]
    ),
    "SequentialLR": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt, [torch.optim.lr_scheduler.LinearLR(opt), torch.optim.lr_scheduler.ConstantLR(opt)], [5]
    ),
    "ReduceLROnPlateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    models, opts = (network(), network()), []
    for model, kind in zip(models, (ft.AdamW, torch.optim.AdamW), strict=True):
        opt = kind(groups_of(model), lr=0.01)
        scheduler = SCHEDULERS[name](opt)
        metric = (1.0,) if name == "ReduceLROnPlateau" else ()
        train(model, opt, each=lambda step, scheduler=scheduler, metric=metric: scheduler.step(*metric))
        opts.append(opt)
    assert [group["lr"] for group in opts[0].param_groups] == [group["lr"] for group in opts[1].param_groups]
    assert_same(*models)


def test_a_learning_rate_in_a_tensor_is_read_in_every_step():
    models = network(), network()
    for model, kind in zip(models, (ft.AdamW, torch.optim.AdamW), strict=True):
        lr = torch.tensor(0.01)
        opt = kind(model.parameters(), lr=lr, foreach=False)
        train(model, opt, 10, each=lambda step, lr=lr: lr.mul_(0.8))
        opt.param_groups[0]["lr"] = 0.02
        train(model, opt, 3, first=10)
        opt.param_groups[0]["lr"] = torch.tensor(0.01)
        train(model, opt, 3, first=13, each=lambda step, opt=opt: opt.param_groups[0]["lr"].mul_(0.5))
    assert_same(*models)


def test_named_parameters_are_named_in_errors():
    model = network()
    opt = ft.AdamW(model.named_parameters(), lr=0.01, nonfinite="raise")
    assert opt.param_groups[0]["param_names"][0] == "0.weight"
    loss_of(model, 0).backward()
    model[2].bias.grad[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"gradient '2.bias' holds NaN"):
        opt.step()
    assert_same(model, network(), rtol=0, atol=0)


# --- options of ours --------------------------------------------------------------------------------------------------


def test_clipping_is_that_of_torch():
    (model, opt), (expected, other) = both()
    opt = ft.AdamW(groups_of(model), lr=0.01, max_norm=0.1)
    other = torch.optim.AdamW(groups_of(expected), lr=0.01)
    for step in range(10):
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()
        other.zero_grad()
        loss_of(expected, step).backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        other.step()
        assert opt.info.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert_same(model, expected)


def test_the_norm_is_that_of_all_parameters_also_of_several_dtypes():
    def made() -> list[Any]:
        torch.manual_seed(5)
        found = [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(3, dtype=torch.float64))]
        for p in found:
            p.grad = torch.ones_like(p)
        return found

    mine, theirs = made(), made()
    opt = ft.SGD(mine, lr=1.0, max_norm=0.5)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.optim.SGD(theirs, lr=1.0).step()
    opt.step()
    assert opt.info.grad_norm == pytest.approx(norm.item())
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("bad", [0, 1])
def test_a_step_of_several_dtypes_is_made_whole_or_not_at_all(bad):
    def made() -> list[Any]:
        found = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
        for p in found:
            p.grad = torch.ones_like(p)
        return found

    for nonfinite in ("skip", "raise"):
        params = made()
        opt = ft.SGD(params, lr=1.0, nonfinite=nonfinite)
        params[bad].grad[0] = float("inf")
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match=rf"\['params'\]\[{bad}\]"):
                opt.step()
        else:
            opt.step()
            assert opt.info.skipped
        assert all((p == 1).all() for p in params)
        params[bad].grad[0] = 1.0
        opt.step()
        assert all((p == 0).all() for p in params)


def test_a_step_that_is_skipped_counts_nothing():
    (model, opt), _ = both(lr=0.01)
    opt = ft.AdamW(model.parameters(), lr=0.01, nonfinite="skip")
    train(model, opt, 2)
    loss_of(model, 2).backward()
    model[0].weight.grad[0, 0] = float("nan")
    before, version = model[0].weight.detach().clone(), model[0].weight._version
    opt.step()
    assert opt.info.skipped
    assert torch.equal(model[0].weight, before)
    assert model[0].weight._version == version
    assert opt.state[model[0].weight]["step"].item() == 2


def test_the_average_is_torchs_and_is_saved():
    (model, opt), (expected, other) = both()
    opt = ft.AdamW(model.parameters(), lr=0.01, ema=0.9)
    averaged = torch.optim.swa_utils.AveragedModel(
        expected, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    averaged.update_parameters(expected)
    train(model, opt, 5)
    train(expected, other, 5, each=lambda step: averaged.update_parameters(expected))
    assert_same(model, expected)
    resumed = copy.deepcopy(model)
    twin = ft.AdamW(resumed.parameters(), lr=0.01, ema=0.9)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    for own, m in ((opt, model), (twin, resumed)):
        inside = [p.detach().clone() for p in m.parameters()]
        with own.swap_ema():
            assert_same(m, averaged.module)
        assert all(torch.equal(p, q) for p, q in zip(m.parameters(), inside, strict=True))
    with pytest.raises(RuntimeError, match="keeps no average"), ft.SGD(model.parameters()).swap_ema():
        pass


def test_clip_value():
    w = torch.zeros(3, requires_grad=True)
    opt = ft.SGD([w], lr=1.0, clip_value=0.5)
    w.grad = torch.tensor([-3.0, 0.25, 7.0])
    opt.step()
    assert w.tolist() == [0.5, -0.25, -0.5]
    assert w.grad.tolist() == [-3.0, 0.25, 7.0]


def test_options_are_those_of_all_groups_and_can_be_set():
    model = network()
    with pytest.raises(ValueError, match="max_norm: must be the same in all param groups, got None in group 0"):
        ft.SGD([{"params": [model[0].weight]}, {"params": [model[0].bias], "max_norm": 1.0}], lr=0.1)
    opt = ft.SGD(model.parameters(), lr=1.0)
    train(model, opt, 1)
    opt.param_groups[0]["max_norm"] = 1e-3
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    train(model, opt, 1)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(ValueError, match="max_norm: must be"):
        ft.SGD(model.parameters(), max_norm=-1.0)


# --- what is refused --------------------------------------------------------------------------------------------------


def parameter(**options: Any) -> Any:
    return torch.nn.Parameter(torch.ones(3, **options))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ft.AdamW([parameter()], lr=-1.0), ValueError, "Invalid learning rate"),
        (lambda: ft.Lion([parameter()], lr=-1.0), ValueError, "lr: must be"),
        (lambda: ft.Lion([parameter()], betas=(1.0, 2.0)), ValueError, r"betas\[0\]: must be"),
        (lambda: ft.Lion([parameter()], beta=1.0), TypeError, "beta: must be an argument of Lion"),
        (lambda: ft.Lion([parameter()], copy=True), TypeError, "copy: must be an argument of Lion"),
        (lambda: ft.AdamW([parameter()], beta=1.0), TypeError, "unexpected keyword argument 'beta'"),
        (lambda: ft.AdamW([parameter()], differentiable=True), ValueError, "differentiable: must be False"),
        (lambda: ft.AdamW([parameter()], capturable=True), ValueError, "capturable: must be False"),
        (lambda: ft.AdamW([parameter()], foreach=True, fused=True), RuntimeError, "cannot be"),
        (lambda: ft.AdamW([{"params": [parameter()], "eps": -1.0}]), ValueError, "eps: must be"),
        (lambda: ft.AdamW([]), ValueError, "empty parameter list"),
        (lambda: ft.AdamW(parameter()), TypeError, "params argument"),
        (lambda: ft.AdamW([np.ones(3)]), TypeError, "can only optimize Tensors"),
        (lambda: ft.AdamW([parameter().sum()]), ValueError, "non-leaf"),
        (
            lambda: ft.AdamW([parameter(dtype=torch.float16)], states="int8"),
            ValueError,
            "states: must be 'bfloat16' or",
        ),
        (lambda: ft.AdamW([parameter()], states="fp8").step(), ValueError, "states: must be one of"),
        (lambda: ft.AdamW([parameter(dtype=torch.complex64)]), TypeError, "got torch.complex64"),
        (
            lambda: ft.AdamW([parameter(device="meta")]),
            TypeError,
            "must be on the CPU or a CUDA device, got a tensor on meta",
        ),
        (lambda: ft.AdamW([torch.zeros(1).expand(3).requires_grad_()]), ValueError, "expanded"),
        (lambda: ft.AdamW([torch.eye(3).to_sparse().requires_grad_()]), TypeError, "must be a dense tensor"),
        (lambda: ft.AdamW([parameter()], nonfinite="hope"), ValueError, "nonfinite: must be"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_sparse_gradients_are_refused_as_in_torch():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    opt = ft.AdamW(embedding.parameters())
    embedding(torch.tensor([1, 3])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="AdamW does not support sparse gradients"):
        opt.step()
    assert torch.equal(embedding.weight, before)


SPARSE = [
    ("SGD", {"lr": 0.01}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"lr": 0.01, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
]


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize(("name", "options"), SPARSE, ids=lambda each: str(each))
def test_sparse_gradients_are_taken_where_torch_takes_them(name, options):
    def made() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Embedding(50, 4, sparse=True), torch.nn.Flatten(), torch.nn.Linear(12, 1))

    models, opts = (made(), made()), []
    for model, kind in zip(models, (ft, torch.optim), strict=True):
        opt = getattr(kind, name)(model.parameters(), **options)
        for step in range(12):
            opt.zero_grad()
            rows = torch.randint(50, (6, 3), generator=torch.Generator().manual_seed(step))
            rows[0] = 7  # repeated
            dense = step == 5 and "momentum" not in options  # whose buffer torch cannot add a dense gradient to
            loss = model[0].weight.square().sum() if dense else model(rows).square().mean()
            loss.backward()
            opt.step()
        opts.append(opt)
    assert_same(*models)
    found, expected = (opt.state_dict()["state"] for opt in opts)
    assert found.keys() == expected.keys()
    for k, entry in expected.items():
        for state, tensor in entry.items():
            tensor = tensor.to_dense() if tensor.layout is torch.sparse_coo else tensor
            torch.testing.assert_close(found[k][state], tensor, **CLOSE)


def test_rows_without_a_gradient_cost_nothing():
    embedding = torch.nn.Embedding(100_000, 4, sparse=True)
    opt = ft.SGD(embedding.parameters(), lr=0.5, max_norm=1.0)
    embedding(torch.tensor([3, 5])).sum().backward()
    opt.step()
    part = opt._parts[0]
    assert part.pipeline.clocks
    assert opt.info.grad_norm == pytest.approx(8**0.5)
    before = embedding.weight.detach().clone()
    opt.zero_grad()
    embedding(torch.tensor([5, 5])).sum().backward()
    opt.step()
    moved = (embedding.weight.detach() - before).abs().sum(1).nonzero().flatten().tolist()
    assert moved == [5]


def test_weight_decay_is_refused_with_sparse_gradients_as_in_torch():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    opt = ft.Adagrad(embedding.parameters(), weight_decay=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="weight_decay must be 0 with sparse gradients"):
        opt.step()


def test_an_empty_parameter_of_any_strides_is_taken():
    empty = torch.nn.Parameter(torch.from_numpy(np.zeros((0, 2), np.float32)))
    assert empty.stride() == (0, 0)
    empty.grad = torch.zeros(0, 2)
    opt = ft.AdamW([empty])
    opt.step()
    assert opt.state[empty]["step"].item() == 1.0


def test_a_failed_constructor_leaves_nothing_to_fail_later(monkeypatch):
    failed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    for options in ({"lr": -1.0}, {"capturable": True}, {"max_norm": -1.0}):
        with pytest.raises(ValueError, match=r"must be|Invalid"):
            ft.AdamW([parameter()], **options)
    gc.collect()
    assert failed == []


def test_a_group_that_is_refused_is_not_added():
    opt = ft.AdamW([parameter()])
    with pytest.raises(ValueError, match="lr: must be"):
        opt.add_param_group({"params": [parameter()], "lr": -1.0})
    with pytest.raises(TypeError, match="must have dtype"):
        opt.add_param_group({"params": [parameter(dtype=torch.complex64)]})
    assert len(opt.param_groups) == 1


def test_a_hyperparameter_that_is_set_out_of_range_is_refused_by_the_step():
    (model, opt), (expected, other) = both()
    train(model, opt, 1), train(expected, other, 1)
    opt.param_groups[0]["lr"] = -1.0
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match="lr: must be"):
        opt.step()
    assert_same(model, expected)
    opt.param_groups[0]["lr"] = 0.01
    train(model, opt, 3, first=1), train(expected, other, 3, first=1)
    assert_same(model, expected)


# --- copies and processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "ScheduleFreeAdamW"])
def test_copies_go_on_independently(way, name):
    model = network()
    opt = getattr(ft, name)(model.parameters(), lr=0.01, **({"momentum": 0.9} if name == "SGD" else {}))
    train(model, opt, 3)
    if way == "deepcopy":
        twin, own = copy.deepcopy((model, opt))
    elif way == "pickle":
        twin, own = pickle.loads(pickle.dumps((model, opt)))
    else:
        file = io.BytesIO()
        torch.save((model, opt), file)
        file.seek(0)
        twin, own = torch.load(file, weights_only=False)
    before = [p.detach().clone() for p in model.parameters()]
    train(twin, own, 3, first=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    train(model, opt, 3, first=3)
    assert_same(twin, model, rtol=0, atol=0)


def test_memory_is_freed_without_the_garbage_collector():
    import weakref

    (model, opt), _ = both()
    train(model, opt, 2)
    gc.collect()
    gc.disable()
    try:
        buffer = weakref.ref(opt._parts[0].pipeline.states[0])
        del opt
        assert buffer() is None
    finally:
        gc.enable()


def in_another_process(program: str) -> str:
    code = "import sys\nsys.path[:0] = [{!r}, {!r}]\n".format("tests", ".") + program
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout


HOGWILD = """
import torch, torch.multiprocessing as mp, fastopt.torch as ft

def work(model, opt, seed):
    torch.manual_seed(seed)
    own = ft.AdamW(model.parameters(), lr=0.02) if opt is None else opt
    for _ in range(100):
        x = torch.randn(16, 3)
        own.zero_grad()
        (model(x)[:, 0] - x.sum(1)).square().mean().backward()
        own.step()

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        for shared in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 1)
            opt = ft.AdamW(model.parameters(), lr=0.02)
            work(model, opt, 9) if method == "fork" and not shared else None
            model.share_memory()
            if shared:
                opt.share_memory()
            context = mp.get_context(method)
            ps = [context.Process(target=work, args=(model, opt if shared else None, k)) for k in range(2)]
            [p.start() for p in ps]
            [p.join(100) for p in ps]
            error = (model.weight - 1).abs().max().item()
            steps = opt.state[model.weight]["step"].item() if shared else 0
            print(method, shared, error < 0.2, not shared or steps > 100, [p.exitcode for p in ps])
"""


def test_processes_that_share_a_model_and_states(tmp_path):
    script = tmp_path / "hogwild.py"
    script.write_text(f"import sys\nsys.path[:0] = ['.']\n{HOGWILD}")
    found = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=300)
    assert found.stdout.splitlines() == [
        f"{method} {shared} True True [0, 0]" for method in ("fork", "spawn") for shared in (False, True)
    ], found.stderr


def test_states_that_are_shared_one_by_one_are_refused():
    (model, opt), _ = both()
    train(model, opt, 1)
    p = model[0].weight
    opt.state[p]["exp_avg"] = torch.zeros_like(p).share_memory_()
    with pytest.raises(ValueError, match="must not be in shared memory by itself"):
        opt.step()


def test_a_state_that_is_moved_to_shared_memory_takes_all_with_it():
    (model, opt), (expected, other) = both()
    train(model, opt, 3), train(expected, other, 3)
    opt.state[model[0].weight]["exp_avg"].share_memory_()
    opt.state[model[0].weight]["step"].share_memory_()
    train(model, opt, 3, first=3), train(expected, other, 3, first=3)
    assert opt.state[model[2].weight]["exp_avg"].is_shared()
    assert_same(model, expected)


FORKED = """
import torch, fastopt.torch as ft

class Data(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, k): return torch.full((200,), float(k % 7)), float(k % 3)

model = torch.nn.Linear(200, 200)
opt = ft.AdamW(model.parameters(), lr=0.01)
for epoch in range(2):
    for x, y in torch.utils.data.DataLoader(Data(), batch_size=8, num_workers=2):
        opt.zero_grad()
        (model(x).mean(1) - y).square().mean().backward()
        opt.step()
print(opt.state[model.weight]["step"].item())
"""


def test_workers_of_a_data_loader_are_forked_between_steps():
    assert in_another_process(FORKED).strip() == "16.0"


# --- what surrounds a step in torch -----------------------------------------------------------------------------------


def test_a_gradient_scaler():
    models = network(), network()
    for model, kind in zip(models, (ft.AdamW, torch.optim.AdamW), strict=True):
        opt = kind(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
        for step in range(10):
            opt.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 5:
                model[0].weight.grad[0, 0] = float("inf")  # this step is left out
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
    assert_same(*models)


def test_autocast_keeps_parameters_in_float32():
    models = network(), network()
    for model, kind in zip(models, (ft.AdamW, torch.optim.AdamW), strict=True):
        opt = kind(model.parameters(), lr=0.01)
        for step in range(5):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()
            opt.step()
    assert_same(*models)


COMPILED = """
import warnings
warnings.simplefilter("ignore")
import torch, fastopt.torch as ft
from test_torch_optim import network, loss_of, train, assert_same

def run(kind):
    model = network()
    opt = kind(model.parameters(), lr=0.01)

    @torch.compile(backend="eager")
    def iteration(x):
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        return loss

    for step in range(6):
        iteration(torch.randn(16, 6, generator=torch.Generator().manual_seed(step)))
    return model, opt

mine, opt = run(ft.AdamW)
theirs, _ = run(torch.optim.AdamW)
assert_same(mine, theirs)
print(opt.state[mine[0].weight]["step"].item())
"""


def test_a_compiled_iteration_breaks_its_graph_at_the_step_and_is_right():
    assert in_another_process(COMPILED).strip() == "6.0"


def test_inference_with_parameters_between_steps():
    (model, opt), (expected, other) = both()
    for m, o in ((model, opt), (expected, other)):
        for step in range(4):
            train(m, o, 1, first=step)
            with torch.inference_mode():
                m(batch(step))
            with torch.no_grad():
                m[0].weight.mul_(0.99)
    assert_same(model, expected)


def test_torchs_functional_tools_see_a_torch_optimizer():
    (model, opt), _ = both()
    train(model, opt, 1)
    assert isinstance(opt, torch.optim.Optimizer)
    assert repr(opt).startswith("AdamW (\nParameter Group 0\n    amsgrad: False\n")
    opt = ft.Adam(model.parameters(), max_norm=1.0)
    assert type(opt)(network().parameters(), **opt.defaults).defaults == opt.defaults


def test_a_subclass_with_a_step_of_its_own():
    class Mine(ft.AdamW):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(0.5)
            return super().step(closure)

    model, expected = network(), network()
    train(model, Mine(model.parameters(), lr=0.01), 5)
    other = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(5):
        other.zero_grad()
        (loss_of(expected, step) * 0.5).backward()
        other.step()
    assert_same(model, expected)


def lstm() -> Any:
    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = torch.nn.LSTM(6, 5, 2, batch_first=True), torch.nn.Linear(5, 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.lstm(x[:, None].expand(-1, 3, -1))[0][:, -1])

    return Last()


def parametrized() -> Any:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4))
    return torch.nn.Sequential(
        layer, torch.nn.Tanh(), torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 3))
    )


def pruned() -> Any:
    model = network()
    torch.nn.utils.prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


def attention() -> Any:
    class Attended(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)
            self.scale = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(())), "b": torch.zeros(1)})
            self.head = torch.nn.Linear(6, 3)

        def forward(self, x: Any) -> Any:
            x = x[:, None]
            return self.head(self.scale["a"] * self.attention(x, x, x)[0][:, 0]) + self.scale["b"]

    return Attended()


def checkpointed() -> Any:
    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    return Checkpointed()


@pytest.mark.parametrize("make", [lstm, parametrized, pruned, attention, checkpointed])
def test_models_of_all_kinds(make):
    importlib.import_module("torch.utils.checkpoint")
    importlib.import_module("torch.nn.utils.prune")
    models = []
    for kind in (ft.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = make()
        opt = kind(model.parameters(), lr=0.01)
        torch.manual_seed(1)
        models.append(train(model, opt, 10))
    assert_same(*models)


def test_another_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        models = network(torch.float64), network(torch.float64)
        for model, kind in zip(models, (ft.AdamW, torch.optim.AdamW), strict=True):
            train(model, kind(model.parameters(), lr=0.01), 5)
        assert_same(*models, rtol=1e-10, atol=1e-12)
    finally:
        torch.set_default_dtype(before)


DISTRIBUTED = """
import warnings
warnings.simplefilter("ignore")
import torch, fastopt.torch as ft
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from test_torch_optim import network, train, assert_same

dist.init_process_group("gloo", init_method="file://FILE", rank=0, world_size=1)
found = []
for kind in (ft.AdamW, torch.optim.AdamW):
    model = torch.nn.parallel.DistributedDataParallel(network())
    train(model, kind(model.parameters(), lr=0.01), 5)
    sharded = network()
    train(sharded, ZeroRedundancyOptimizer(sharded.parameters(), optimizer_class=kind, lr=0.01), 5)
    saved = network()
    opt = kind(saved.parameters(), lr=0.01)
    train(saved, opt, 3)
    state = get_optimizer_state_dict(saved, opt)
    resumed = kind(saved.parameters(), lr=0.5)
    set_optimizer_state_dict(saved, resumed, state)
    train(saved, resumed, 3, first=3)
    found.append((model, sharded, saved))
for mine, theirs in zip(*found):
    assert_same(mine, theirs)
dist.destroy_process_group()
print("ok")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_torchs_distributed_tools(tmp_path):
    assert in_another_process(DISTRIBUTED.replace("FILE", str(tmp_path / "group"))).strip().endswith("ok")


def test_several_optimizers_of_one_model():
    models = network(), network()
    for model, kinds in zip(models, (ft, torch.optim), strict=True):
        opts = kinds.SGD(model[0].parameters(), lr=0.1), kinds.AdamW(model[2:].parameters(), lr=0.01)
        for step in range(8):
            for opt in opts:
                opt.zero_grad()
            loss_of(model, step).backward()
            for opt in opts:
                opt.step()
    assert_same(*models)


def test_import_fastopt_does_not_import_torch():
    program = "import sys, fastopt, fastopt.interop; assert 'torch' not in sys.modules; print('ok')"
    assert in_another_process(program).strip() == "ok"


def test_muon_updates_matrices_and_everything_else_in_groups_that_change():
    model = network()
    opt = ft.Muon(groups_of(model), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        first = loss_of(model, 0).item()
        train(model, opt, 30, each=lambda step: scheduler.step())
    assert loss_of(model, 0).item() < 0.8 * first
    assert sorted(opt.state[model[0].weight]) == ["momentum_buffer", "step", "v"]
