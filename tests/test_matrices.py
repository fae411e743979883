"""Matrixwise rules that keep matrices of their own: saved, copied, made and forgotten with the choice of parameters.

And those that come with fastopt, Shampoo and SOAP, on matrices.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pytest

import fastopt
from fastopt import reference


class Hyper(NamedTuple):
    lr: float


def prepare(t, lr=0.1, decay=0.75, whiten=True, weight_decay=0.0):
    return Hyper(lr)


@fastopt.rule(prepare)
def gradient(p, g, m, u, h):
    return p, m, g


def decorrelate(array, decay, m, L, R, t, path, seed, **hyper):
    """Divide by averages of the products of rows, and of columns, which begin with noise of the seed."""
    if t == 1:
        L += np.random.default_rng(seed).uniform(size=L.shape)
    L *= decay
    L += array @ array.T
    R += array.sum(axis=0, keepdims=True)
    m[...] = t
    array[...] = np.linalg.solve(L + L.T + np.eye(len(L)), array) * (1.0 + R**2) ** -0.5


SHAPES: dict[str, Any] = {"L": ("rows", "rows"), "R": (1, "columns")}
MATRICES = fastopt.Matrixwise(gradient, "u", decorrelate, "whiten", matrices=SHAPES, reshape="first_axis", largest=9)


@fastopt.rule(prepare, matrixwise=MATRICES)
def decorrelated(p, g, m, u, h):
    return p - h.lr * u, m, u


PARAMS = {"W": np.ones((3, 4)), "b": np.ones(5), "conv": np.ones((2, 3, 1, 2)), "table": np.ones((2, 10))}


def made(**options: Any) -> fastopt.Optimizer:
    return fastopt.Optimizer(PARAMS, decorrelated, **options)


def grads(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=p.shape) for path, p in PARAMS.items()}


def content(opt: fastopt.Optimizer) -> dict[str, bytes]:
    """The bits of parameters and states."""
    own = {f"{name}/{path}": leaf for name, leaves in opt.states.items() for path, leaf in leaves.items()}
    return {key: leaf.tobytes() for key, leaf in {**opt.params, **own}.items()}


def expected(array: np.ndarray, L: np.ndarray, R: np.ndarray) -> np.ndarray:
    """The direction that `decorrelate` makes, from its matrices."""
    return np.linalg.inv(L + L.T + np.eye(len(L))) @ array / np.sqrt(1.0 + R**2)


def test_a_transform_keeps_matrices_of_their_own_size_and_is_given_what_it_names():
    opt = made(lr=0.5, overrides={"conv": {"lr": 0.25}})
    first, second = grads(1), {**grads(2), "conv": None}
    opt.step(first)
    L = 0.75 * np.random.default_rng(crc32(b"1 W")).uniform(size=(3, 3)) + first["W"] @ first["W"].T
    np.testing.assert_allclose(opt.states["L"]["W"], L, rtol=1e-14)
    after = 1.0 - 0.5 * expected(first["W"], L, first["W"].sum(axis=0, keepdims=True))
    np.testing.assert_allclose(opt.params["W"], after, rtol=1e-14)
    kernel = first["conv"].reshape(2, 6)
    R = kernel.sum(axis=0, keepdims=True)
    direction = expected(kernel, opt.states["L"]["conv"], R)
    np.testing.assert_allclose(opt.states["R"]["conv"], R, rtol=1e-14)
    np.testing.assert_allclose(opt.params["conv"].reshape(2, 6), 1.0 - 0.25 * direction, rtol=1e-14)
    for path in ("b", "table"):  # a vector, and a matrix beyond `largest`: the rule alone
        assert opt.states["L"][path].shape == opt.states["R"][path].shape == (0, 0)
        assert opt.params[path].tolist() == np.ones(PARAMS[path].shape).tolist()
    before = content(opt)
    opt.groups["W"].frozen = True
    opt.step(second)
    assert {key for key, bits in content(opt).items() if before[key] != bits} == set()
    opt.groups["W"].frozen = False
    opt.step(grads(3))
    assert [opt.states["m"][path].flat[0] for path in PARAMS] == [2.0, 0.0, 2.0, 0.0]  # each parameter's own count
    assert sum(leaf.nbytes for name in SHAPES for leaf in opt.states[name].values()) == 8 * (9 + 4 + 4 + 6)


def test_matrices_resume_bit_for_bit(tmp_path):
    opt = made(max_norm=1.0, overrides={"conv": {"lr": 0.25, "decay": 0.5}})
    for seed in range(3):
        opt.step({**grads(seed), "W": None if seed == 1 else grads(seed)["W"]})
    opt.save(tmp_path / "run.safetensors")
    loaded, given, into = made(max_norm=1.0), made(max_norm=1.0), made(max_norm=1.0)
    for fresh in (loaded, given, into):
        fresh.groups["conv"].decay = 0.5
        fresh.groups["conv"].lr = 0.25
    loaded.load(tmp_path / "run.safetensors")
    given.load_state_dict(opt.state_dict())
    given.set_params(opt.params)
    into.load(tmp_path / "run.safetensors", strict=False)
    copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), loaded, given, into]
    assert not np.shares_memory(copies[0].states["L"]["W"], opt.states["L"]["W"])
    for seed in (3, 4):
        for one in (opt, *copies):
            one.step(grads(seed))
    assert [content(one) == content(opt) for one in copies] == [True] * 5
    opt.restart()
    opt.set_params(PARAMS)
    assert not any(leaf.any() for name in SHAPES for leaf in opt.states[name].values())
    opt.step(grads(0))
    fresh = made(max_norm=1.0, overrides={"conv": {"lr": 0.25, "decay": 0.5}})
    fresh.step(grads(0))
    assert content(opt) == content(fresh)


def test_matrices_follow_the_choice_of_parameters(tmp_path):
    opt = made()
    opt.step(grads(0))
    kept = opt.states["L"]["conv"]
    opt.groups["W"].whiten = False
    assert opt.states["L"]["W"].shape == (0, 0)
    opt.step(grads(1))
    opt.groups["table"].whiten = True
    assert opt.states["L"]["table"].shape == (2, 2)
    assert np.shares_memory(opt.states["L"]["conv"], kept)
    # A file brings its own choice; where a parameter is not loaded, it stays as it is here.
    opt.save(tmp_path / "run.safetensors")
    other = made(overrides={"conv": {"whiten": False}})
    with pytest.raises(ValueError, match=r"'L/W': must have shape \(3, 3\) as in this optimizer, got \(0, 0\)"):
        other.load(tmp_path / "run.safetensors", keep={"whiten"})
    other.load(tmp_path / "run.safetensors")
    assert content(other) == content(opt)
    third = fastopt.Optimizer({**PARAMS, "W": np.ones((4, 4))}, decorrelated)
    third.step({**grads(2), "W": np.eye(4)})
    W = third.states["L"]["W"].copy()
    report = third.load(tmp_path / "run.safetensors", strict=False)
    assert set(report.missing) == {"W", "m/W", "u/W", "L/W", "R/W"}
    assert third.states["L"]["W"].tobytes() == W.tobytes()
    assert third.states["L"]["table"].tobytes() == opt.states["L"]["table"].tobytes()
    # What is chosen again begins at 0; a schedule counts as chosen, whatever it returns.
    del opt.groups["W"].whiten
    assert opt.states["L"]["W"].tolist() == [[0.0] * 3] * 3
    opt.step(grads(3))
    opt.whiten = lambda step: step > 5
    before = opt.states["L"]["W"].copy()
    assert before.any()
    for seed, changes in ((4, False), (5, False), (6, False), (7, True)):  # at the steps 3 to 6
        opt.step(grads(seed))
        assert (opt.states["L"]["W"].tobytes() != before.tobytes()) is changes
    opt.whiten = False
    assert [leaf.shape for leaf in opt.states["L"].values()] == [(0, 0)] * 3 + [(2, 2)]
    opt.save(tmp_path / "run.safetensors")
    third.load(tmp_path / "run.safetensors", strict=False)  # the flag is loaded, W is not
    assert third.states["L"]["W"].shape == (0, 0)


def test_matrices_of_added_parameters_and_of_skipped_steps():
    opt = made(nonfinite="skip")
    opt.step(grads(0))
    before = content(opt)
    assert opt.step({**grads(1), "b": np.full(5, np.nan)}).skipped
    assert content(opt) == before
    opt.add({"head": np.ones((4, 3))}, lr=0.5)
    assert {key: bits for key, bits in content(opt).items() if "head" not in key} == before
    assert opt.states["L"]["head"].shape == (4, 4)
    opt.step({**grads(2), "head": np.ones((4, 3))})
    assert opt.states["m"]["head"][0, 0] == 1.0
    assert opt.states["m"]["W"][0, 0] == 2.0


def of(**changed: Any) -> Any:
    """The declaration of a rule like that above, with another `Matrixwise`."""
    arguments = {"direction": gradient, "state": "u", "transform": decorrelate, "chosen": "whiten", "matrices": SHAPES}
    return fastopt.rule(prepare, matrixwise=fastopt.Matrixwise(**{**arguments, **changed}))(decorrelated.scalar)


REFUSED = {
    "a shape": ({"matrices": {"L": ("rows",)}}, r"matrices\['L'\]: must be a pair of 'rows', 'columns' or ints from 0"),
    "a side": ({"matrices": {"L": ("rows", "width")}}, r"matrices\['L'\]: must be a pair .*, got \('rows', 'width'\)$"),
    "a negative side": ({"matrices": {"L": ("rows", -1)}}, r"must be a pair"),
    "a name": ({"matrices": {"1L": ("rows", 1)}}, r"matrices: must have names of variables as keys, got '1L'"),
    "a list": ({"matrices": ["L"]}, r"matrices: must be a dict of name -> \(rows, columns\), got \['L'\]"),
    "another reshape": ({"reshape": "last_axis"}, r"reshape: must be None or 'first_axis', got 'last_axis'"),
    "no whole number": ({"largest": 2.5}, r"largest: must be an int from 0, or None, got 2.5"),
    "a matrix named as a state": ({"matrices": {**SHAPES, "m": (1, 1)}}, r"must differ .*, got 'm' twice; rename one"),
    "as the array's state": ({"matrices": {**SHAPES, "u": (1, 1)}}, r"names of states must differ from .*, got m, u"),
    "as a hyperparameter": ({"matrices": {**SHAPES, "lr": (1, 1)}}, r"must differ .*, got 'lr' twice"),
    "as the seed": ({"matrices": {**SHAPES, "seed": (1, 1)}}, r"must differ .*, got 'seed' twice"),
    "as the average": ({"matrices": {**SHAPES, "ema": (1, 1)}}, r"must differ from 'ema'"),
    "as the array": ({"transform": lambda m, **hyper: None}, r"got 'm' twice; rename one"),
    "a matrix that is not taken": (
        {"transform": lambda u, L, lr, decay, whiten, weight_decay: None},
        r"transform: must have the signature \(array, \*\*hyperparameters\), got \(u, L, lr",
    ),
    "another state": ({"state": "x"}, r"state: must be one of the rule's states \(m, u\), got 'x'"),
    "another direction": ({"direction": fastopt.rules.sgd}, r"direction: must be a rule with the states m, u, got"),
    "no transform": ({"transform": None}, r"transform: must be a function \(array, \*\*keywords\), got None"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_rule_whose_matrices_cannot_be_is_refused_where_it_is_declared(what):
    changed, message = REFUSED[what]
    with pytest.raises(TypeError, match=message):
        of(**changed)


def test_a_parameter_that_is_no_matrix_is_refused_and_others_are_named():
    with pytest.raises(ValueError, match=r"'b': must be at least 2-D, got shape \(5,\); set whiten=False there"):
        made(overrides={"b": {"whiten": True}})
    state = made().state_dict()
    state["state"]["L"]["W"] = np.zeros((0, 0))
    with pytest.raises(ValueError, match=r"L\['W'\]: must be float64 \(3, 3\), got float64 \(0, 0\)"):
        made().load_state_dict(state)


# --- Shampoo and SOAP -------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "shampoo": ("Shampoo", {}),
    "shampoo with momentum": (
        "Shampoo",
        {"momentum": 0.5, "weight_decay": 0.1, "exponent": 0.5, "eps": 1e-2, "precondition_frequency": 3},
    ),
    "soap": ("SOAP", {"lr": 0.1, "precondition_frequency": 3}),
    "soap at every step": ("SOAP", {"lr": 0.1, "precondition_frequency": 1, "betas": (0.8, 0.9), "shampoo_beta": 0.7}),
}
TREE = {"W": (4, 4), "conv": (3, 2, 1, 2), "tall": (6, 3), "table": (5, 2), "b": (5,)}


@pytest.mark.parametrize("form", FORMS)
def test_matrices_are_updated_as_the_reference_does(form):
    """To 1e-12 over 20 steps; SOAP from the bases of its first step, which only those of square matrices determine."""
    name, hyper = FORMS[form]
    rng = np.random.default_rng(5)
    p = {path: rng.normal(size=shape) for path, shape in TREE.items()}
    opt = getattr(fastopt, name)(p, overrides={"table": {"precondition": False}}, **hyper)
    own = {path: {**hyper, "precondition": path not in ("table", "b")} for path in p}
    states = {path: reference.init_state(name.lower(), p[path], **own[path]) for path in p}
    for t in range(1, 21):
        grads = {path: rng.normal(size=shape) for path, shape in TREE.items()}
        opt.step(grads)
        for path in p:
            reference.OPTIMIZERS[name.lower()](p[path], grads[path], states[path], t, **own[path])
            if t == 1 and name == "SOAP":
                for key in ("QL", "QR"):
                    if key in states[path]:
                        np.testing.assert_allclose(opt.states["L"][path], states[path]["L"], rtol=1e-13)
                        states[path][key][...] = opt.states[key][path]
    for path in p:
        np.testing.assert_allclose(opt.params[path], p[path], rtol=1e-12, atol=1e-12, err_msg=path)
        for key, array in states[path].items():
            np.testing.assert_allclose(opt.states[key][path], array, rtol=1e-10, atol=1e-11, err_msg=f"{key}/{path}")


@pytest.mark.parametrize("name", ["Shampoo", "SOAP"])
def test_nan_and_empty_matrices_and_a_late_choice(name):
    opt = getattr(fastopt, name)({"W": np.ones((3, 2)), "V": np.ones((2, 2)), "empty": np.ones((0, 3))}, lr=0.1)
    grads = {"W": np.ones((3, 2)), "V": np.eye(2), "empty": np.ones((0, 3))}
    grads["W"][2, 1] = np.nan
    opt.step(grads)
    opt.step({**grads, "W": np.ones((3, 2))})
    assert np.isnan(opt.params["W"]).all()
    assert np.isfinite(opt.params["V"]).all()
    # From one update to the next, steps stay of one size: those of vectors, of the matrix, and of its elements again.
    opt = getattr(fastopt, name)({"W": np.zeros((3, 3))}, lr=0.1, precondition_frequency=7)
    rng = np.random.default_rng(6)
    for choice in (False, True, False):
        opt.groups["W"].precondition = choice
        for k in range(4):
            before = opt.params["W"].copy()
            opt.step({"W": rng.normal(size=(3, 3))})
            step = np.abs(opt.params["W"] - before).max()
            assert (0.0 if k == 0 else 0.01) <= step < 0.6  # the first of SOAP is 0
