"""What rules may be besides elementwise: scaled by norms, made of matrices, begun elsewhere than at zero, evaluated
elsewhere than at their parameters."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import BY_NAME, CASES, gradients

import fastopt
from fastopt import reference
from fastopt.rules import muon as muon_rule

SCALED = [case for case in CASES if case.optimizer in ("LARS", "NovoGrad")]
SHAPES = ((3, 3), (13, 7), (7, 13), (1, 9), (9, 1), (1, 1), (0, 4), (70, 40))


def everything(opt: fastopt.Optimizer) -> list[bytes]:
    return [buffer.tobytes() for buffer in (opt.flat.data, *opt._pipeline.buffers)]


# --- scaled by norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SCALED, ids=str)
def test_norms_are_of_each_tensor_and_leave_no_range(case):
    """Long enough for several chunks and blocks; of magnitudes whose squares no float32 holds."""
    rng = np.random.default_rng(0)
    sizes = {"a": 70_001, "b": 5, "zero": 300, "empty": 0, "large": 33, "small": 4097}
    factor = {"zero": 0.0, "large": 1e25, "small": 1e-25}
    tree = {name: (factor.get(name, 1.0) * rng.normal(size=n)).astype(np.float32) for name, n in sizes.items()}
    opt = case.make(tree)
    oracles = {name: case.oracle(leaf.astype(np.float64)) for name, leaf in tree.items() if name != "empty"}
    for _ in range(3):
        grads = {n: (factor.get(n, 1.0) * rng.normal(size=leaf.size)).astype(np.float32) for n, leaf in tree.items()}
        opt.step(grads)
        for name, oracle in oracles.items():
            oracle.step(grads[name].astype(np.float64))
    for name, oracle in oracles.items():
        scale = np.abs(oracle.p).max()
        np.testing.assert_allclose(opt.params[name], oracle.p, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
        for number in opt.rule.numbers:
            np.testing.assert_allclose(opt.states[number][name], oracle.state[number], rtol=1e-5, err_msg=name)


def test_the_number_of_a_tensor_without_gradient_stays_as_it_is():
    opt = fastopt.NovoGrad({"a": np.ones(5), "b": np.ones(5)})
    opt.step({"a": np.ones(5), "b": None})
    assert {path: float(number) for path, number in opt.states["v"].items()} == {"a": pytest.approx(5.0), "b": 0.0}
    opt.step({"a": np.zeros(5), "b": np.full(5, 2.0)})  # the first of b: its own step number is 1
    assert {path: float(v) for path, v in opt.states["v"].items()} == pytest.approx({"a": 0.98 * 5.0, "b": 20.0})


def test_clipping_changes_the_norm_that_scales():
    g = np.array([3.0, 4.0])
    clipped = fastopt.NovoGrad({"w": np.ones(2)}, max_norm=1.0)
    clipped.step({"w": g})
    assert float(clipped.states["v"]["w"]) == pytest.approx(1.0, rel=1e-5)
    scaled = fastopt.NovoGrad({"w": np.ones(2)}, maximize=True)
    scaled.step({"w": g}, grad_scale=5.0)
    assert float(scaled.states["v"]["w"]) == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(scaled.params["w"], 1.0 + 1e-3 * g / 5.0)


@pytest.mark.parametrize("case", [case for case in CASES if "initial_momentum" not in case.options], ids=str)
@pytest.mark.parametrize("dtype", [np.float32])
def test_a_zero_gradient_leaves_what_has_not_moved_yet(case, dtype):
    """Also where the norm of the gradient is divided by. Schedule-free steps and bare momentum included."""
    without_decay = {name: 0.0 for name in ("weight_decay", "l1", "l2", "lambd") if name in case.rule.names()}
    opt = case.make({"w": np.arange(1.0, 6.0, dtype=dtype)}, **without_decay)
    for _ in range(3):
        opt.step({"w": np.zeros(5, dtype)})
    np.testing.assert_array_equal(opt.params["w"], np.arange(1.0, 6.0))


@pytest.mark.parametrize("case", SCALED, ids=str)
def test_the_buffer_of_gradients_is_zeroed_also_where_norms_scale(case):
    opt = case.make({"w": np.ones(5), "v": np.ones((3, 4))}, zero_grad=True)
    for grad in opt.grads.values():
        grad[...] = 2.0
    opt.step()
    assert not opt.flat.grad.any()
    twin = case.make({"w": np.ones(5), "v": np.ones((3, 4))})
    twin.step({"w": np.full(5, 2.0), "v": np.full((3, 4), 2.0)})
    assert everything(opt) == everything(twin)


@pytest.mark.parametrize("case", SCALED, ids=str)
def test_a_copy_goes_its_own_way(case):
    one = case.make({"w": np.ones(5)})
    one.step({"w": np.arange(5.0)})
    other = copy.deepcopy(one)
    before = everything(other)
    one.step({"w": np.ones(5)})
    assert everything(other) == before
    other.step({"w": np.ones(5)})
    assert everything(other) == everything(one)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_variance_never_gets_negative(dtype):
    """Where the gradient hardly changes, the mean square less the square of the mean is rounding, of either sign."""
    grads = np.linspace(0.1, 1.0, 1001, dtype=dtype)
    for case in CASES:
        if case.options.get("centered"):
            opt = case.make({"w": np.ones(1001, dtype)}, alpha=0.9)
            for _ in range(500):
                opt.step({"w": grads})
            assert np.isfinite(opt.flat.data).all(), str(case)


def test_a_nan_in_the_average_of_one_element_is_not_swallowed_by_the_bound_of_its_tensor():
    opt = fastopt.StableAdamW({"w": np.ones(3), "b": np.ones(2)})
    opt.step({"w": np.array([np.nan, 1.0, 1.0]), "b": np.ones(2)})
    opt.params["w"][...] = 1.0
    opt.step({"w": np.ones(3), "b": np.ones(2)})
    assert np.isnan(opt.params["w"]).all()
    assert np.isfinite(opt.params["b"]).all()


# --- made of matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "adjust_lr": "match_rms_adamw", "ns_steps": 3}], ids=str)
def test_muon_equals_the_reference_on_matrices_and_on_the_rest(options):
    rng = np.random.default_rng(1)
    leaves = [rng.normal(size=shape) for shape in (*SHAPES, (5,), (), (2, 3, 4))]
    opt = fastopt.Muon(leaves, lr=0.1, **options)
    expected = [(leaf.copy(), reference.init_state("muon", leaf)) for leaf in leaves]
    for t in range(1, 21):
        grads = [gradients(rng, leaf.size, np.float64).reshape(leaf.shape) for leaf in leaves]
        opt.step(grads)
        for (p, state), g in zip(expected, grads, strict=True):
            reference.muon(p, g, state, t, lr=0.1, **options)
    for found, m, (p, state) in zip(opt.params, opt.states["m"], expected, strict=True):
        np.testing.assert_allclose(found, p, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(m, state["m"], rtol=1e-12, atol=1e-15)


def test_muon_steps_along_an_orthogonal_matrix():
    """With coefficients that converge: every singular value is 1, and the directions are those of the gradient."""
    rng = np.random.default_rng(2)
    g = rng.normal(size=(6, 4))
    exact = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 60}
    opt = fastopt.Muon({"W": np.zeros((6, 4))}, lr=1.0, weight_decay=0.0, **exact)
    opt.step({"W": g})
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    np.testing.assert_allclose(opt.params["W"], -math.sqrt(6 / 4) * u @ vt, atol=1e-12)


def test_muon_in_float32_stays_close_and_finite_whatever_the_gradients():
    rng = np.random.default_rng(3)
    for factor in (1.0, 1e30, 1e-30, 0.0):
        W = rng.normal(size=(20, 30)).astype(np.float32)
        g = (factor * rng.normal(size=W.shape)).astype(np.float32)
        opt = fastopt.Muon({"W": W}, lr=0.1, eps=1e-38)
        opt.step({"W": g})
        p, state = W.astype(np.float64), reference.init_state("muon", W.astype(np.float64))
        reference.muon(p, g.astype(np.float64), state, 1, lr=0.1, eps=1e-38)
        np.testing.assert_allclose(opt.params["W"], p, atol=2e-5)


def test_muon_against_torch():
    """The momentum is torch's to the bit or nearly; the step is not, for torch computes it in bfloat16."""
    torch = pytest.importorskip("torch", reason="torch is not installed: it is the oracle of this test")
    rng = np.random.default_rng(4)
    W = rng.normal(size=(40, 24)).astype(np.float32)
    opt = fastopt.Muon({"W": W}, lr=0.02)
    param = torch.nn.Parameter(torch.from_numpy(W.copy()))
    theirs = torch.optim.Muon([param], lr=0.02, weight_decay=0.1)
    for _ in range(3):
        g = rng.normal(size=W.shape).astype(np.float32)
        before = opt.params["W"].copy()
        opt.step({"W": g})
        param.grad = torch.from_numpy(g.copy())
        theirs.step()
        momentum = theirs.state[param]["momentum_buffer"].numpy()
        np.testing.assert_allclose(opt.states["m"]["W"], momentum, rtol=1e-6, atol=1e-7)
        expected = param.detach().numpy()
        step = np.linalg.norm(expected - before)
        assert np.linalg.norm(opt.params["W"] - expected) < 0.05 * step
        opt.params["W"][...] = expected


def test_an_override_gives_a_matrix_to_adamw():
    rng = np.random.default_rng(5)
    tree = {"embedding": rng.normal(size=(9, 4)), "W": rng.normal(size=(4, 4))}
    opt = fastopt.Muon(tree, overrides={"embedding": {"orthogonal": False}, "W": {"lr": 0.5}})
    alone = fastopt.AdamW({"embedding": tree["embedding"]}, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        grads = {path: rng.normal(size=leaf.shape) for path, leaf in tree.items()}
        opt.step(grads)
        alone.step({"embedding": grads["embedding"]})
    assert opt.params["embedding"].tobytes() == alone.params["embedding"].tobytes()
    with pytest.raises(ValueError, match=r"^parameter 'b': must be 2-D, got shape \(3,\); set orthogonal=False"):
        fastopt.Muon({"b": np.ones(3)}, overrides={"b": {"orthogonal": True}})


CANNOT_ACT = [
    ("b", "lr", 0.5, "orthogonal=False, got 0.5; use adamw_lr"),
    ("b", "eps", 1e-3, "orthogonal=False, got 0.001; use adamw_eps"),
    ("b", "momentum", 0.9, "orthogonal=False, got 0.9; it acts only where orthogonal=True"),
    ("embedding", "ns_steps", 3, "orthogonal=False, got 3.0; it acts only where orthogonal=True"),
    ("W", "adamw_lr", 0.5, "orthogonal=True, got 0.5; use lr"),
    ("W", "adamw_betas", (0.9, 0.9), r"orthogonal=True, got \(0.9, 0.9\); it acts only where orthogonal=False"),
]


@pytest.mark.parametrize(("path", "name", "value", "message"), CANNOT_ACT)
def test_an_override_that_cannot_act_is_refused(path, name, value, message):
    tree = {"embedding": np.ones((9, 4)), "W": np.ones((4, 4)), "b": np.ones(4)}
    overrides: dict[str, dict[str, Any]] = {"embedding": {"orthogonal": False}}
    fastopt.Muon(tree, overrides={**overrides, "W": {"lr": 0.1, "weight_decay": 0.0}, "b": {"adamw_lr": 0.1}})
    overrides[path] = {**overrides.get(path, {}), name: value}
    with pytest.raises(ValueError, match=rf"^overrides: {path}: {name}: must be absent where {message}$"):
        fastopt.Muon(tree, overrides=overrides)


def test_every_hyperparameter_of_muon_acts_on_matrices_on_others_or_on_both():
    kind = muon_rule.matrixwise
    names = [*kind.matrix_only, *kind.other_only, kind.chosen, "weight_decay"]
    assert sorted(names) == sorted(muon_rule.names())
    with pytest.raises(TypeError, match=r"matrixwise: must name hyperparameters .*, got 'speed'"):
        fastopt.rule(muon_rule.prepare, matrixwise=dataclasses.replace(kind, matrix_only=("speed",)))(muon_rule.scalar)


def test_every_flag_works_on_matrices():
    """As separate passes: unscale, clip, step, average, zero; and a skipped step changes nothing."""
    rng = np.random.default_rng(6)
    tree = {"W": rng.normal(size=(8, 5)), "b": rng.normal(size=5)}
    flags = {"max_norm": 0.5, "ema": 0.9, "zero_grad": True, "maximize": True, "nonfinite": "skip"}
    fused, plain = fastopt.Muon(tree, **flags), fastopt.Muon(tree)
    average = {path: leaf.copy() for path, leaf in tree.items()}
    for _ in range(4):
        grads = {path: rng.normal(size=leaf.shape) for path, leaf in tree.items()}
        info = fused.step(grads, grad_scale=4.0)
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values())) / 4.0
        assert info.grad_norm == pytest.approx(norm, rel=1e-12)
        plain.step({path: info.clip_coefficient * (-0.25 * g) for path, g in grads.items()})
        for path, leaf in average.items():
            leaf += (1.0 - 0.9) * (plain.params[path] - leaf)
            assert fused.params[path].tobytes() == plain.params[path].tobytes()
            np.testing.assert_allclose(fused.ema[path], leaf, rtol=1e-14)
        assert not fused.flat.grad.any()
    before = everything(fused)
    assert fused.step({"W": np.full((8, 5), np.nan), "b": np.ones(5)}).skipped
    assert everything(fused) == before
    fused.step({"W": None, "b": np.ones(5)})
    assert fused.params["W"].tobytes() == plain.params["W"].tobytes()


def test_a_nan_is_not_swallowed_by_a_product_of_matrices():
    opt = fastopt.Muon({"W": np.ones((3, 3)), "V": np.ones((3, 3))})
    g = np.eye(3)
    g[1, 2] = np.nan
    opt.step({"W": g, "V": np.eye(3)})
    assert np.isnan(opt.params["W"]).all()
    assert np.isfinite(opt.params["V"]).all()


def test_a_matrix_that_is_orthogonalized_no_longer_goes_on_with_adamw():
    """The state v has held its direction, some elements of which are negative."""
    opt = fastopt.Muon({"W": np.ones((3, 3))}, adamw_lr=0.1)
    rng = np.random.default_rng(0)
    for step in range(4):
        opt.groups["W"].orthogonal = step < 2
        before = opt.params["W"].copy()
        opt.step({"W": rng.normal(size=(3, 3))})
        assert 0.0 < np.abs(opt.params["W"] - before).max() < 0.5


def test_bare_arrays_are_refused_where_a_rule_looks_at_matrices():
    p, g, m, v = np.ones((4, 9))
    with pytest.raises(TypeError, match="rule 'muon': must be given matrices, got 1-D arrays; use its optimizer"):
        muon_rule.update_(p, g, m, v)


# --- states that do not begin at zero ---------------------------------------------------------------------------------


def test_states_begin_where_the_rule_says_parameter_by_parameter():
    rprop = fastopt.Rprop({"a": np.ones(3), "b": np.ones(2)}, lr=0.1, overrides={"b": {"lr": 0.5}})
    assert {path: leaf.tolist() for path, leaf in rprop.states["step_size"].items()} == {"a": [0.1] * 3, "b": [0.5] * 2}
    scheduled = fastopt.Rprop({"a": np.ones(1)}, lr=fastopt.schedules.inverse_time(0.25, 1.0))
    assert scheduled.states["step_size"]["a"].tolist() == [0.25]
    free = fastopt.ScheduleFreeAdamW({"a": np.arange(3.0)})
    assert free.states["z"]["a"].tolist() == [0.0, 1.0, 2.0]
    assert not np.shares_memory(free.states["z"]["a"], free.params["a"])
    adagrad = fastopt.Adagrad([np.ones(3, np.float32), np.ones(1, np.float32)], initial_accumulator_value=0.5)
    assert adagrad._pipeline.states[0][:4].tolist() == [0.5, 0.5, 0.5, 0.0]  # the padding stays zero


class Hyper(NamedTuple):
    lr: float


def prepare(t: int, lr: float = 0.1) -> Hyper:
    return Hyper(lr)


def descent(p, g, a, h):
    return p - h.lr * g, a


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ({"b": 0.0}, r"initial: must name states \(a\), got 'b'"),
        ({"a": "mu"}, r"initial\['a'\]: must be a number, 'p' or a hyperparameter \(lr\), got 'mu'"),
        ({"p": 1.0}, r"initial: must name states \(a\), got 'p'"),
    ],
    ids=["unknown state", "unknown hyperparameter", "p, which is not a state"],
)
def test_a_rule_whose_initial_values_make_no_sense_is_refused(initial, message):
    with pytest.raises(TypeError, match=message):
        fastopt.rule(prepare, initial=initial)(descent)


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match="prepare must take weight_decay for a matrixwise rule"):
        fastopt.rule(prepare, matrixwise=muon_rule.matrixwise)(descent)

    def named(p, g, ema, h):
        return p - h.lr * g, ema

    with pytest.raises(TypeError, match="must differ from 'ema'"):
        fastopt.rule(prepare)(named)


# --- schedule-free ----------------------------------------------------------------------------------------------------


def test_eval_params_holds_the_average_and_restores_the_parameters():
    rng = np.random.default_rng(7)
    start = rng.normal(size=1000)
    opt = fastopt.ScheduleFreeAdamW({"w": start}, lr=0.1, warmup_steps=5)
    oracle = BY_NAME["ScheduleFreeAdamW-warmup_steps=3-weight_decay=0.1"].oracle(
        start, lr=0.1, warmup_steps=5, weight_decay=0.0
    )
    for _ in range(20):
        g = rng.normal(size=1000)
        opt.step({"w": g})
        oracle.step(g)
    before = everything(opt)
    with opt.eval_params() as params:
        expected = reference.schedule_free_eval(oracle.p, oracle.state, betas=(0.9, 0.999))
        np.testing.assert_allclose(params["w"], expected, rtol=1e-12, atol=1e-14)
        with pytest.raises(RuntimeError, match=r"inside `with opt\.eval_params"):
            opt.step({"w": g})
    assert everything(opt) == before
    with pytest.raises(KeyError), opt.eval_params():
        raise KeyError
    assert everything(opt) == before


@pytest.mark.parametrize(("b2", "warmup"), [(0.999, 0), (0.9, 100), (0.99999, 7.5), (0.0, 3)])
def test_the_weights_of_the_average_add_up_whatever_the_step(b2, warmup):
    module = __import__("fastopt.rules.schedule_free_adamw", fromlist=["sum_of_weights"])
    for t in (1, 2, 5, 4095, 4096, 4200, 10_000):
        terms = [(1.0 - b2**i) * (min(1.0, i / warmup) if warmup else 1.0) ** 2 for i in range(1, t + 1)]
        assert module.sum_of_weights(t, b2, warmup) == pytest.approx(math.fsum(terms), rel=1e-11)


# --- conventions ------------------------------------------------------------------------------------------------------


def test_a_convention_gives_defaults_and_what_is_given_wins():
    params = {"w": np.ones(3)}
    keras = fastopt.AdamW(params, convention="keras")
    assert keras._pipeline.groups.values_of(0) | {
        "eps": 1e-7,
        "eps_hat": True,
        "weight_decay": 0.004,
    } == keras._pipeline.groups.values_of(0)
    mixed = fastopt.AdamW(params, 0.5, eps=1e-3, convention="keras")
    assert (mixed.lr, mixed._pipeline.groups.values_of(0)["eps"], mixed._pipeline.groups.values_of(0)["eps_hat"]) == (
        0.5,
        1e-3,
        True,
    )


@pytest.mark.parametrize("name", fastopt.Optimizer.classes)
def test_an_unknown_convention_is_refused_with_the_known_ones(name):
    kind: Any = fastopt.Optimizer.classes[name]
    known = ", ".join(map(repr, kind.conventions)) or "none"
    with pytest.raises(ValueError, match=f"convention='paper': {name} has {known}"):
        kind({"w": np.ones(3)}, convention="paper")
    for convention in kind.conventions:
        kind({"w": np.ones(3)}, convention=convention).step({"w": np.ones(3)})


# --- what is out of range ---------------------------------------------------------------------------------------------

BAD = [
    ("NAdam", {"momentum_decay": -1.0}, r"momentum_decay: must be a number in \[0, inf\), got -1.0"),
    ("RAdam", {"betas": (0.9, 1.0)}, r"betas\[1\]: must be a number in \[0, 1\), got 1.0"),
    ("Adamax", {"eps_inside": 1}, "eps_inside: must be True or False, got 1"),
    ("Lion", {"lr": math.nan}, r"lr: must be a number.*, got nan"),
    ("AdaBelief", {"eps": -1e-8}, r"eps: must be .*, got -1e-08"),
    ("Adan", {"betas": (0.9, 0.9)}, r"betas: must be 3 numbers, each in \[0, 1\), got \(0.9, 0.9\)"),
    ("AdEMAMix", {"warmup_steps": -1}, r"warmup_steps: must be .*, got -1"),
    ("AdEMAMix", {"alpha": math.inf}, r"alpha: must be .*, got inf"),
    ("LARS", {"trust_coefficient": -1.0}, r"trust_coefficient: must be .*, got -1.0"),
    ("LARS", {"decoupled_weight_decay": True}, "decoupled_weight_decay: must be None for rule 'lars'"),
    ("NovoGrad", {"betas": 0.9}, r"betas: must be 2 numbers.*, got 0.9"),
    ("Yogi", {"initial_accumulator_value": -1.0}, r"initial_accumulator_value: must be .*, got -1.0"),
    ("Rprop", {"etas": (1.2, 0.5)}, r"etas\[0\]: must be a number in \(0, 1\), got 1.2"),
    ("Rprop", {"etas": (0, 1.2)}, r"etas\[0\]: must be a number in \(0, 1\), got 0.0"),
    ("Rprop", {"etas": (0.5, 1)}, r"etas\[1\]: must be a number in \(1, inf\), got 1.0"),
    ("Rprop", {"step_sizes": (1.0, 0.1)}, r"step_sizes: must be 2 numbers, .* ascending order, got \(1.0, 0.1\)"),
    ("ScheduleFreeAdamW", {"betas": (0.0, 0.999)}, r"betas\[0\]: must be a number in \(0, 1\), got 0\.0"),
    ("ADOPT", {"clip_exp": -0.25}, r"clip_exp: must be .*, got -0.25"),
    ("AdaBound", {"gamma": 0.0}, r"gamma: must be a number in \(0, 1\), got 0.0"),
    ("AdaBound", {"final_lr": -0.1}, r"final_lr: must be .*, got -0.1"),
    *[("FTRL", {name: -0.5}, f"{name}: must be .*, got -0.5") for name in ("beta", "l1", "l2")],
    ("FTRL", {"decoupled_weight_decay": True}, "decoupled_weight_decay: must be None for rule 'ftrl'"),
    *[("ASGD", {name: -0.5}, f"{name}: must be .*, got -0.5") for name in ("lambd", "alpha", "t0")],
    ("Prodigy", {"d0": 0.0}, r"d0: must be a number in \(0, inf\), got 0.0"),
    ("Prodigy", {"d_coef": -1.0}, r"d_coef: must be .*, got -1.0"),
    ("MARS", {"gamma": -0.025}, r"gamma: must be .*, got -0.025"),
    ("Muon", {"ns_steps": 0}, r"ns_steps: must be a whole number in \[1, 100\), got 0"),
    ("Muon", {"ns_steps": 100}, r"ns_steps: must be a whole number in \[1, 100\), got 100"),
    ("Muon", {"ns_steps": 2.5}, r"ns_steps: must be a whole number in \[1, 100\), got 2.5"),
    ("Muon", {"adjust_lr": "adam"}, r"adjust_lr: must be one of 'original', 'match_rms_adamw'.*, got 'adam'"),
    ("Adagrad", {"initial_accumulator_value": math.nan}, r"initial_accumulator_value: must be .*, got nan"),
    ("Adam", {"eps_hat": "yes"}, "eps_hat: must be True or False, got 'yes'"),
    ("SGD", {"lr_inside": None}, "lr_inside: must be True or False, got None"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_number_out_of_range_is_named(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(fastopt, name)({"w": np.ones(3)}, **options)


@pytest.mark.parametrize(
    ("name", "later"),
    [
        ("RAdam", ("eps_hat",)),
        ("Yogi", ("initial_momentum",)),
        ("Adan", ("form", "eps_root")),
        ("ScheduleFreeAdamW", ("form",)),
    ],
)
def test_a_state_from_before_a_form_existed_continues_in_the_form_of_then(name, later):
    def make(**options: Any) -> fastopt.Optimizer:
        return getattr(fastopt, name)({"w": np.ones(3)}, **options)

    opt, resumed = make(), make(**({} if name == "Yogi" else getattr(fastopt, name).conventions["optax"]))
    grads = {"w": np.array([1.0, -2.0, 0.5])}
    opt.step(grads)
    state = opt.state_dict()
    for hyper in later:
        del state["hyper"][hyper]
    resumed.params["w"] = opt.params["w"]
    resumed.load_state_dict(state)
    for each in (opt, resumed):
        each.step(grads)
    assert resumed.params["w"].tobytes() == opt.params["w"].tobytes()
    del state["hyper"]["lr"]
    with pytest.raises(ValueError, match=r"^state: hyper: must hold all hyperparameters, got no lr"):
        resumed.load_state_dict(state)


def test_muon_without_a_name_adjusts_as_torch_does():
    grads = {"W": np.array([[0.5, 1.0], [2.0, -1.0], [1.5, 0.25]])}
    tall = [fastopt.Muon({"W": np.ones((3, 2))}, adjust_lr=name) for name in (None, "original", "match_rms_adamw")]
    for opt in tall:
        opt.step(grads)
    none, original, other = (opt.params["W"].tobytes() for opt in tall)
    assert none == original != other


AT_EVERY_DOOR = [
    ("Rprop", {}, "etas", (0.0, 1.2)),
    ("Rprop", {}, "etas", (0.5, 1.0)),
    ("Rprop", {}, "step_sizes", (1.0, 0.5)),
    ("Muon", {}, "ns_steps", 100),
    ("Muon", {}, "ns_steps", 2.5),
    ("ScheduleFreeAdamW", {}, "betas", (0.0, 0.999)),
    ("SGD", {"momentum": 0.9, "nesterov": True}, "dampening", 0.5),
]


@pytest.mark.parametrize(("name", "options", "hyper", "bad"), AT_EVERY_DOOR, ids=str)
def test_a_number_out_of_range_is_refused_at_every_door(name, options, hyper, bad):
    """At construction, when it is set, in an override, by a schedule, in a state and for bare arrays."""
    tree = {"W": np.ones((2, 2))}

    def make(**more: Any) -> fastopt.Optimizer:
        return getattr(fastopt, name)(tree, **{**options, **more})

    def load() -> None:
        state = make().state_dict()
        state["hyper"][hyper] = bad
        make().load_state_dict(state)

    opt = make()
    doors = {
        "construction": lambda: make(**{hyper: bad}),
        "assignment": lambda: setattr(opt, hyper, bad),
        "group": lambda: setattr(opt.groups["W"], hyper, bad),
        "override": lambda: make(overrides={"W": {hyper: bad}}),
        "schedule": lambda: make(**{hyper: lambda step: bad}) if hyper != "dampening" else setattr(opt, hyper, bad),
        "added": lambda: opt.add({"V": np.ones((2, 2))}, **{hyper: bad}),
        "state": load,
    }
    if opt.rule.matrixwise is None:
        arrays = np.ones((2 + len(opt.rule.states), 3))
        doors["bare arrays"] = lambda: opt.rule.update_(*arrays, **{hyper: bad})
    for door in doors.values():
        with pytest.raises(ValueError, match=rf"({hyper}(\[\d\])?|nesterov): must be "):
            door()


REFUSED_BY_TORCH = [
    ("SGD", {"lr": -0.1}),
    ("SGD", {"momentum": -0.1}),
    ("SGD", {"weight_decay": -0.1}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    *[("Adadelta", {name: -0.1}) for name in ("lr", "rho", "eps", "weight_decay")],
    ("Adadelta", {"rho": 1.1}),
    *[("Adagrad", {name: -0.1}) for name in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")],
    *[
        (name, change)
        for name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam")
        for change in (
            {"lr": -0.1},
            {"eps": -0.1},
            {"weight_decay": -0.1},
            {"betas": (-0.1, 0.9)},
            {"betas": (1.0, 0.9)},
            {"betas": (0.9, -0.1)},
            {"betas": (0.9, 1.0)},
        )
    ],
    ("NAdam", {"momentum_decay": -0.1}),
    *[("RMSprop", {name: -0.1}) for name in ("lr", "eps", "momentum", "weight_decay", "alpha")],
    *[("ASGD", {name: -0.1}) for name in ("lr", "weight_decay")],
    ("Rprop", {"lr": -0.1}),
    *[("Rprop", {"etas": etas}) for etas in ((0.0, 1.2), (-0.5, 1.2), (1.0, 1.2), (0.5, 1.0), (0.5, 0.9))],
    *[("Muon", {name: -0.1}) for name in ("lr", "momentum", "weight_decay")],
    ("Muon", {"ns_steps": 100}),
    ("Muon", {"ns_steps": 1000}),
    ("Muon", {"ns_coefficients": (1.0, 2.0)}),
    ("Muon", {"adjust_lr": "adam"}),
]
"""What an optimizer of torch 2.13 refuses, of those that are here as well."""


@pytest.mark.parametrize(("name", "options"), REFUSED_BY_TORCH, ids=str)
def test_what_torch_refuses_is_refused(name, options):
    torch = pytest.importorskip("torch", reason="torch is not installed: it is the oracle of this test")
    theirs = {"adjust_lr_fn" if key == "adjust_lr" else key: value for key, value in options.items()}
    weights = torch.ones(2, 2, requires_grad=True)
    with pytest.raises((TypeError, ValueError)):  # noqa: PT012 torch's Muon refuses some in its first step
        optimizer = getattr(torch.optim, name)([weights], **theirs)
        weights.grad = torch.ones(2, 2)
        optimizer.step()
    with pytest.raises((TypeError, ValueError), match=r"must be"):
        getattr(fastopt, name)({"w": np.ones((2, 2))}, **options)


def test_the_states_of_adafactor_are_a_row_and_a_column():
    """A matrix of a million numbers: 16 KB, where Adam has 8 MB."""
    adafactor, adam = (kind({"W": np.ones((1000, 1000), np.float32)}) for kind in (fastopt.Adafactor, fastopt.Adam))
    sizes = [sum(leaf.nbytes for tree in opt.states.values() for leaf in tree.values()) for opt in (adafactor, adam)]
    assert sizes == [8 * 2000, 8 * 1000 * 1000]
    assert sum(buffer.nbytes for buffer in adafactor._pipeline.buffers) == 8 * 2000


@pytest.mark.parametrize("eps", [1e-30, 0.9])
def test_adafactor_equals_the_reference_on_matrices_at_any_rate(eps):
    """A rate that 1/sqrt(t) bounds from the second update on, and that the weights decay by all the same."""
    rng = np.random.default_rng(3)
    options = {"lr": 0.9, "clip_threshold": 0.75, "min_rms": 0.5, "weight_decay": 0.1, "eps": eps}
    leaves = [rng.normal(size=shape) for shape in ((7, 5), (4, 3, 2, 2), (6,), ())]
    opt = fastopt.Adafactor(leaves, **options)
    expected = [(leaf.copy(), reference.init_state("adafactor", leaf)) for leaf in leaves]
    for t in range(1, 11):
        grads = [rng.normal(size=leaf.shape) for leaf in leaves]
        opt.step(grads)
        for g, (p, state) in zip(grads, expected, strict=True):
            reference.adafactor(p, np.asarray(g), state, t, **options)
    for found, (p, _) in zip(opt.params, expected, strict=True):
        np.testing.assert_allclose(found, p, rtol=1e-11)
