"""`fastopt.wrap`: what is done before and after any rule; and the wrappers of the library, against NumPy."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING, OF_EACH_KIND, Case, gradients

import fastopt
from fastopt import Interval, Rule, Sums, reference, wrap
from fastopt.wrappers import averaged, cautious, centralized, lookahead

SHAPES = {"a": (150,), "m": (6, 5), "kernel": (4, 3, 2), "empty": (0, 2), "number": ()}


def tree(seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: np.asarray(rng.normal(size=shape)).astype(dtype) for path, shape in SHAPES.items()}


def grads_of(seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: gradients(rng, math.prod(shape), dtype).reshape(shape) for path, shape in SHAPES.items()}


def bits(opt: fastopt.Optimizer, but: str = "") -> dict[str, bytes]:
    trees = {"p": opt.params, **opt.states}
    return {f"{name}/{k}": leaf.tobytes() for name, found in trees.items() if name != but for k, leaf in found.items()}


# --- any rule ---------------------------------------------------------------------------------------------------------


class Counting(NamedTuple):
    counted: float


def one(t: int, step: float = 1.0) -> Counting:
    return Counting(step)


def same_g(p, g, h):
    return g


def same_g_and_count(p, g, count, h):
    return g, count + h.counted


def same_p_and_count(p, new_p, g, count, h):
    return new_p, count + h.counted


def nothing_around(rule: Rule) -> Rule:
    """What changes nothing, and counts the updates in a state of its own."""
    counting: dict[str, Any] = {"states": ("count",), "prepare": one, "initial": {"count": 0.5}}
    return wrap(rule, before=same_g, after=same_p_and_count, **counting)


OTHERS = (
    "RMSprop-momentum=0.9-centered=True-weight_decay=0.1",
    "Lion-weight_decay=0.1",
    "LARS-weight_decay=0.1",
    "Prodigy-d0=0.01-weight_decay=0.1",
    "SOAP-weight_decay=0.1",
)
"""Weight decay in both ways, a scale without a number, sums over all parameters, and matrices that are states."""


@pytest.mark.parametrize("case", [*OF_EACH_KIND, *(BY_NAME[name] for name in OTHERS)], ids=str)
def test_wrapping_in_nothing_changes_no_bit(case: Case):
    """With every option; a parameter without gradient, a group of its own, and a skipped step are in it."""
    plain = case.make(tree(0, np.float32), **EVERYTHING, overrides={"m": {"weight_decay": 0.1}})
    rule, values = nothing_around(plain.rule), plain._pipeline.groups.base
    own = {"m": {"weight_decay": 0.1, "step": 2.0}}
    with warnings.catch_warnings():  # that no method of the class leads to where gradients are taken, or to the average
        warnings.simplefilter("ignore")
        opt = fastopt.Optimizer(tree(0, np.float32), rule, **values, **EVERYTHING, overrides=own)
    assert rule.states == (*plain.rule.states, "count")
    assert rule.names() == tuple(dict.fromkeys((*plain.rule.hyperparameters, "step", *plain.rule.names())))
    for step in range(4):
        grads: dict[str, Any] = grads_of(step, np.float32)
        if step == 1:
            grads["number"] = None
        plain.step(grads, grad_scale=8.0)
        opt.step(grads, grad_scale=8.0)
    assert bits(opt, but="count") == bits(plain)
    assert {path: leaf.tobytes() for path, leaf in opt.ema.items()} == {k: e.tobytes() for k, e in plain.ema.items()}
    count = opt.states["count"]
    assert (float(count["number"]), set(count["a"].tolist()), set(count["m"].ravel())) == (3.5, {4.5}, {8.5})


def doubled(p, g, count, h):
    return g + g, count + h.counted


class Rate(NamedTuple):
    lr: float


def rate(t, lr=0.1, centred=True, weight_decay=0.0):
    return Rate(lr)


@fastopt.rule(rate)
def keep(p, g, u, h):
    return p, g


def centre(u, lr, centred, weight_decay):
    """It refuses other hyperparameters."""
    u -= u.sum(axis=0) / max(1, len(u))


@fastopt.rule(rate, matrixwise=fastopt.Matrixwise(keep, "u", centre, "centred"))
def centred_descent(p, g, u, h):
    return p - h.lr * u, u


@pytest.mark.parametrize("name", ["adam", "stable_adamw", "lamb", "centred_descent"])
def test_a_rule_of_any_kind_is_given_what_before_returns(name):
    """With gradients that grow, so that the bound of StableAdamW acts."""
    rule = fastopt.rules.ALL.get(name, centred_descent)
    opt = fastopt.Optimizer(tree(0), wrap(rule, before=doubled, states=("count",), prepare=one), lr=0.1)
    plain = fastopt.Optimizer(tree(0), rule, lr=0.1)
    for step in range(3):
        grads = {path: 10.0**step * g for path, g in grads_of(step).items()}
        opt.step(grads)
        plain.step({path: g + g for path, g in grads.items()})
    assert bits(opt, but="count") == bits(plain)
    assert opt.rule.name == f"doubled_{name}"


# --- Lookahead, Cautious, averages ------------------------------------------------------------------------------------


class InNumPy:
    """A rule of the library by its reference, parameter by parameter."""

    def __init__(self, name: str, hyper: dict[str, Any]):
        self.name, self.hyper, self.t = name, hyper, 0
        self.p = tree(0)
        self.states = {path: reference.init_state(name, leaf) for path, leaf in self.p.items()}

    def step(self, grads: dict[str, np.ndarray]) -> None:
        self.t += 1
        for path, g in grads.items():
            reference.OPTIMIZERS[self.name](self.p[path], g, self.states[path], self.t, **self.hyper)


class LookaheadInNumPy(InNumPy):
    """The parameter "m" has its own k."""

    def __init__(self, name: str, hyper: dict[str, Any]):
        super().__init__(name, hyper)
        self.slow = {path: leaf.copy() for path, leaf in self.p.items()}

    def step(self, grads: dict[str, np.ndarray]) -> None:
        super().step(grads)
        for path, leaf in self.p.items():
            if self.t % (2 if path == "m" else 3) == 0:
                self.slow[path] += 0.8 * (leaf - self.slow[path])
                leaf[...] = self.slow[path]


def masked(update: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Of an update that is to be subtracted, what agrees with the gradient, over its mean."""
    mask = (update * g > 0).astype(np.float64)
    return update * mask / max(mask.mean(), 1e-3) if mask.size else update


class CautiousAdamWInNumPy(InNumPy):
    """As the authors write it: the mask is that of the mean of the gradients."""

    def step(self, grads: dict[str, np.ndarray]) -> None:
        self.t += 1
        lr, (b1, b2) = self.hyper["lr"], (0.9, 0.999)
        for path, g in grads.items():
            p, state = self.p[path], self.states[path]
            state["m"] = b1 * state["m"] + (1 - b1) * g
            state["v"] = b2 * state["v"] + (1 - b2) * g * g
            denominator = np.sqrt(state["v"]) / math.sqrt(1 - b2**self.t) + 1e-8
            p *= 1 - lr * self.hyper["weight_decay"]
            p -= masked(lr / (1 - b1**self.t) * state["m"] / denominator, g)


class CautiousMomentumInNumPy(InNumPy):
    """L2 is part of the gradient."""

    def step(self, grads: dict[str, np.ndarray]) -> None:
        for path, g in grads.items():
            p, state = self.p[path], self.states[path]
            g = g + self.hyper["weight_decay"] * p
            state["velocity"] = 0.9 * state["velocity"] + g
            p -= masked(self.hyper["lr"] * state["velocity"], g)


class AveragedInNumPy(InNumPy):
    def __init__(self, name: str, hyper: dict[str, Any]):
        super().__init__(name, hyper)
        self.seen: list[dict[str, np.ndarray]] = []

    def step(self, grads: dict[str, np.ndarray]) -> None:
        super().step(grads)
        self.seen.append({path: leaf.copy() for path, leaf in self.p.items()})
        kept = self.seen[4:] or self.seen[-1:]
        self.average = {path: np.mean([leaves[path] for leaves in kept], axis=0) for path in self.p}


class CentralizedInNumPy(InNumPy):
    """Where the rule has L2 it is part of the gradient. The parameter "m" keeps its own."""

    def step(self, grads: dict[str, np.ndarray]) -> None:
        self.t += 1
        for path, g in grads.items():
            hyper, p = dict(self.hyper), self.p[path]
            if self.name == "momentum":
                g = g + hyper.pop("weight_decay") * p
            if g.ndim > 1 and g.size and path != "m":
                g = g - g.reshape(len(g), -1).mean(axis=1).reshape(-1, *[1] * (g.ndim - 1))
            reference.OPTIMIZERS[self.name](p, g, self.states[path], self.t, **hyper)


PULLS = {"lookahead_k": 3, "lookahead_alpha": 0.8, "overrides": {"m": {"lookahead_k": 2}}}
DECAYS = {"lr": 0.05, "weight_decay": 0.1}
WRAPPED: list[tuple[Callable[[Rule], Rule], str, type[InNumPy], dict[str, Any], dict[str, Any]]] = [
    (lookahead, "adamw", LookaheadInNumPy, DECAYS, PULLS),
    (lookahead, "sgd", LookaheadInNumPy, {"lr": 0.05}, PULLS),
    (lookahead, "stable_adamw", LookaheadInNumPy, DECAYS, PULLS),
    (cautious, "adamw", CautiousAdamWInNumPy, DECAYS, {}),
    (cautious, "momentum", CautiousMomentumInNumPy, DECAYS, {}),
    (averaged, "adamw", AveragedInNumPy, DECAYS, {"average_from": 5}),
    (centralized, "adamw", CentralizedInNumPy, DECAYS, {"overrides": {"m": {"centralize": False}}}),
    (centralized, "momentum", CentralizedInNumPy, DECAYS, {"overrides": {"m": {"centralize": False}}}),
    (centralized, "stable_adamw", CentralizedInNumPy, DECAYS, {"overrides": {"m": {"centralize": False}}}),
]


@pytest.mark.parametrize(
    ("wrapper", "name", "oracle", "hyper", "own"),
    WRAPPED,
    ids=[f"{wrapper.__name__}-{name}" for wrapper, name, *_ in WRAPPED],
)
def test_wrappers_equal_numpy_and_go_on_after_a_load_and_a_copy(wrapper, name, oracle, hyper, own, tmp_path):
    rule = wrapper(fastopt.rules.ALL[name])
    opt, expected = fastopt.Optimizer(tree(0), rule, **hyper, **own), oracle(name, hyper)
    others = []
    for step in range(20):
        if step == 7:  # in the middle between two pulls
            opt.save(tmp_path / "run")
            loaded = fastopt.Optimizer(tree(1), wrapper(fastopt.rules.ALL[name]), **hyper, **own)
            loaded.load(tmp_path / "run")
            others = [loaded, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
        grads = grads_of(step)
        for each in (opt, *others):
            each.step(grads)
        expected.step(grads)
    for path, leaf in expected.p.items():
        np.testing.assert_allclose(opt.params[path], leaf, rtol=1e-12, atol=1e-14, err_msg=path)
        for state in fastopt.rules.ALL[name].states:
            np.testing.assert_allclose(opt.states[state][path], expected.states[path][state], rtol=1e-12, atol=1e-14)
        for state in ("slow", "average"):
            if hasattr(expected, state):
                np.testing.assert_allclose(opt.states[state][path], getattr(expected, state)[path], rtol=1e-12)
    assert {name.partition("/")[0] for name in bits(opt)} == {"p", *rule.states}
    assert all(bits(each) == bits(opt) for each in others)
    assert rule.name == f"{wrapper.__name__}_{name}"


def test_a_cautious_step_keeps_a_nan():
    for rule in (cautious(fastopt.rules.momentum), cautious(fastopt.rules.lars, rescale=False)):
        opt = fastopt.Optimizer({"w": np.ones(3)}, rule, weight_decay=0.1)
        opt.step({"w": np.array([np.nan, 1.0, -1.0])})
        assert np.isnan(opt.params["w"]).tolist() == [True, False, False]


def test_without_the_mean_a_cautious_step_is_the_rules_or_none():
    g = grads_of(0)["a"]
    opt, plain = fastopt.Optimizer({"w": g}, cautious(fastopt.rules.lars, rescale=False)), fastopt.LARS({"w": g})
    for sign in (1.0, -0.5):
        before, old = opt.params["w"].copy(), opt.states["velocity"]["w"].copy()
        plain.params["w"][...] = before
        opt.step({"w": sign * g})
        plain.step({"w": sign * g})
        agrees = (before - plain.params["w"]) * sign * g > 0
        assert agrees.sum() + old.any() > 0
        assert (opt.params["w"] == np.where(agrees, plain.params["w"], before)).all()


def whole_numbers(seed: int) -> dict[str, np.ndarray]:
    """Gradients whose rows, of 2^k elements, have means without rounding."""
    rng = np.random.default_rng(seed)
    return {path: rng.integers(-9, 9, shape).astype(np.float64) for path, shape in ROWS.items()}


ROWS = {"a": (7,), "m": (3, 8), "kernel": (5, 4, 2), "row": (1, 4), "hollow": (2, 0), "number": ()}


@pytest.mark.parametrize("over", ["row", "column"])
@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_a_centralized_rule_does_what_the_rule_does_of_centred_gradients(case, over):
    """Bit for bit, also where the rule has sums of its own; but LAMB's norms, of what is no whole number, are added up
    in another order beside sums over rows."""
    rule = case.rule
    if rule.matrixwise:
        with pytest.raises(TypeError, match=rf"^wrap: sums: must be none for the matrixwise rule '{rule.name}'"):
            centralized(rule)
        return
    params = {
        path: leaf if over == "row" or leaf.ndim != 2 else leaf.T.copy() for path, leaf in whole_numbers(0).items()
    }
    if over == "column":
        del params["kernel"]
    plain = case.make(params)
    with warnings.catch_warnings():  # that no method of the class leads to the average
        warnings.simplefilter("ignore")
        opt = fastopt.Optimizer(params, centralized(rule, over=over), **plain._pipeline.groups.base)
    for step in range(3):
        given, centred = {}, {}
        for path, g in whole_numbers(step).items():
            if path in params:
                mean = (
                    g.reshape(len(g), -1).mean(axis=1).reshape(-1, *[1] * (g.ndim - 1)) if g.ndim > 1 and g.size else 0
                )
                turned = over == "column" and g.ndim == 2
                given[path], centred[path] = (each.T.copy() if turned else each for each in (g, g - mean))
        opt.step(given)
        plain.step(centred)
    if rule.name == "lamb":
        for path, leaf in plain.params.items():
            np.testing.assert_allclose(opt.params[path], leaf, rtol=1e-12)
    else:
        assert bits(opt) == bits(plain)
    assert opt.rule.states == rule.states


def test_vectors_are_not_centralized_wherever_they_come_from():
    """Added, given to `update`, as bare arrays; and neither is a NaN of theirs, which stays where it is."""
    rule, g = centralized(fastopt.rules.sgd), np.array([1.0, np.nan, 3.0])
    opt = fastopt.Optimizer({"W": np.zeros((2, 3))}, rule, lr=1.0)
    opt.add({"b": np.zeros(3)})
    opt.step({"W": np.stack([g, np.arange(3.0)]), "b": g})
    np.testing.assert_array_equal(opt.params["b"], -g)
    np.testing.assert_array_equal(opt.params["W"], [[np.nan] * 3, [1.0, 0.0, -1.0]])
    opt.groups["b"].centralize = True
    opt.step({"W": np.zeros((2, 3)), "b": np.arange(3.0)})
    np.testing.assert_array_equal(opt.params["b"], [0.0, np.nan, -4.0])
    twin = fastopt.Optimizer({"b": np.zeros(3)}, rule, lr=1.0, decoupled_weight_decay=True)
    twin.step({"b": g})
    np.testing.assert_array_equal(twin.params["b"], -g)
    own = {"b": np.zeros(3)}
    fastopt.Optimizer(None, rule, lr=1.0).update(own, {"b": g})
    np.testing.assert_array_equal(own["b"], -g)
    bare = np.zeros(3)
    rule.update_(bare, g, lr=1.0)
    np.testing.assert_array_equal(bare, -g)
    rule.update_(bare, np.arange(3.0), lr=1.0, centralize=True)
    np.testing.assert_array_equal(bare, [0.0, np.nan, -4.0])
    with pytest.raises(ValueError, match=r"^over: must be one of 'row', 'column', got 'all'"):
        centralized(fastopt.rules.sgd, over="all")


def test_wrappers_go_around_wrappers_and_many_groups_have_their_own():
    """More groups than those for which `prepare` is tried to be compiled."""
    params = {f"w{k}": np.full(3, 1.0 + k) for k in range(70)}
    lookahead_k = {path: {"lookahead_k": 1 + k % 4, "lr": 0.01 * (1 + k)} for k, path in enumerate(params)}
    both = averaged(lookahead(fastopt.rules.adam))
    opt = fastopt.Optimizer(params, both, overrides=lookahead_k)
    alone = {path: fastopt.Optimizer({path: params[path]}, both, **change) for path, change in lookahead_k.items()}
    for step in range(4):
        g = np.random.default_rng(step).normal(size=3)
        opt.step(dict.fromkeys(params, g))
        for path, single in alone.items():
            single.step({path: g})
    assert both.states == ("m", "v", "slow", "average")
    for path, single in alone.items():
        assert opt.params[path].tobytes() == single.params[path].tobytes()
        assert opt.states["average"][path].tobytes() == single.states["average"][path].tobytes()


# --- functions of one's own -------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    largest: float
    share: float


def prepare_bound(t, lr, bound=1.0):
    return Bound(bound * lr, 0.0)


def of_both(p, new_p, g, v, seen, m, h):
    """Reads states of both, in an order of its own, fields of both, and a sum of the new states."""
    new_p = max(min(new_p, p + h.largest), p - h.largest)
    return new_p + h.share * h.b1 * m, seen + v


def smoothed(p, g, seen, h):
    return g + seen


def new_m(p, new_p, g, m, h):
    return m


def mean(sums, numbers, size, h):
    return sums.m / size, numbers.total + sums.m


def test_states_fields_and_sums_of_the_rule_are_there_by_their_names():
    terms = Sums({"m": new_m}, mean, results=("share",), numbers=("total",))
    rule = wrap(fastopt.rules.adam, before=smoothed, after=of_both, states=("seen",), prepare=prepare_bound, sums=terms)
    opt = fastopt.Optimizer({"w": np.ones(5)}, rule, lr=0.1, bound=0.5)
    p, m, v, seen, total = np.ones(5), np.zeros(5), np.zeros(5), np.zeros(5), 0.0
    for t in range(1, 6):
        g = np.random.default_rng(t).normal(size=5)
        opt.step({"w": g})
        m, v = 0.9 * m + 0.1 * (g + seen), 0.999 * v + 0.001 * (g + seen) ** 2
        new_p = p - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        total += m.sum()
        p = np.clip(new_p, p - 0.05, p + 0.05) + m.mean() * 0.9 * m
        seen = seen + v
    np.testing.assert_allclose(opt.params["w"], p, rtol=1e-12)
    np.testing.assert_allclose(opt.states["seen"]["w"], seen, rtol=1e-12)
    assert float(opt.states["total"]["w"]) == pytest.approx(total, rel=1e-12)
    with pytest.raises(ValueError, match=r"^bound: must be a finite number"):
        opt.bound = np.nan
    with pytest.raises(TypeError, match=r"^step_rows\(\): must have a rule with a closed form .*, got 'of_both_adam'"):
        opt.step_rows({"w": (np.array([0]), np.ones((1, 1)))})


# --- what is refused --------------------------------------------------------------------------------------------------

adam, lamb, lars, muon = (fastopt.rules.ALL[name] for name in ("adam", "lamb", "lars", "muon"))
ANY = Sums({"m": new_m}, mean, numbers=("total",), results=("share",))


def with_alpha(t, alpha=0.5):
    return Counting(alpha)


def with_decay(t, weight_decay):
    return Counting(weight_decay)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no rule": (lambda: wrap(fastopt.Adam, before=same_g), r"rule: must be a Rule, as fastopt.rules.adam, got <class"),
    "nothing": (lambda: wrap(adam), r"before: must be a function where after is None, got None"),
    "no function": (lambda: wrap(adam, before=1.0), r"before: must be a plain function \(p, g, \.\.\., h\) or None"),
    "an unknown state": (
        lambda: wrap(adam, after=of_both),
        r"after: must have the signature \(p, new_p, g, \.\.\., h\), with states for the dots \(m, v\), got "
        r"\(p, new_p, g, v, seen, m, h\)",
    ),
    "other first arguments": (lambda: wrap(adam, before=same_p_and_count), r"before: must have the signature \(p, g"),
    "a state of the rule": (
        lambda: wrap(adam, after=new_m, states=("m",)),
        r"states: must be names other than p, new_p, g, h, m, v, got 'm'",
    ),
    "a name as states": (
        lambda: wrap(adam, before=same_g, states="slow"),
        r"states: must be different names of variables, as \('scale',\), got 'slow'",
    ),
    "a state twice": (
        lambda: wrap(adam, before=same_g, states=("slow", "slow")),
        r"states: must be different names of variables, as \('scale',\), got \('slow', 'slow'\)",
    ),
    "initial values without names": (
        lambda: wrap(adam, after=same_p_and_count, states=("count",), initial=["count"]),
        r"initial: must be a dict of state -> initial value, got \['count'\]",
    ),
    "a number as prepare": (
        lambda: wrap(adam, before=same_g, prepare=1.0),
        r"prepare: must be a function \(t, \.\.\.\) or None, got 1.0",
    ),
    "ranges without names": (
        lambda: wrap(adam, before=same_g, domains=5),
        r"domains: must be a dict of hyperparameter -> range, got 5",
    ),
    "no sums": (lambda: wrap(adam, before=same_g, sums=None), r"sums: must be a Sums or several, got None"),
    "a term that is none": (
        lambda: wrap(adam, before=same_g, sums=Sums({"m": 5}, mean, numbers=("total",))),
        r"sums: terms\['m'\]: must be a plain function \(p, g, \.\.\., h\) or \(p, new_p, g, \.\.\., h\), got 5",
    ),
    "an initial value of the rule's": (
        lambda: wrap(adam, after=same_p_and_count, states=("count",), initial={"m": "p"}),
        r"initial: must name states of its own \(count\), got 'm'",
    ),
    "sums of a matrixwise rule": (
        lambda: wrap(muon, after=new_m, sums=ANY),
        r"sums: must be none for the matrixwise rule 'muon', got 1",
    ),
    "a term of other arguments": (
        lambda: wrap(adam, before=same_g, sums=Sums({"m": lambda p, grad, h: p}, mean, numbers=("total",))),
        r"sums: terms\['m'\]: must have the signature \(p, g, \.\.\., h\) or \(p, new_p, g, \.\.\., h\), with states "
        r"for the dots \(m, v\), got \(p, grad, h\)",
    ),
    "flags for matrices that are the rule's": (
        lambda: wrap(adam, before=same_g, prepare=with_alpha, for_matrices=("lr",)),
        r"for_matrices: must name arguments of prepare \(alpha\), got 'lr'",
    ),
    "a hyperparameter of the rule": (
        lambda: wrap(fastopt.rules.rmsprop, before=same_g, prepare=with_alpha),
        r"prepare: alpha: must have no default, to be that of rule 'rmsprop', or another name, got alpha=0.5",
    ),
    "weight decay": (
        lambda: wrap(adam, before=same_g, prepare=with_decay),
        r"prepare: must not take weight_decay, which the loop applies for rule 'adam', got \(t, weight_decay\)",
    ),
    "no t": (lambda: wrap(adam, before=same_g, prepare=lambda lr: lr), r"prepare: must take the step number t first"),
    "a name": (lambda: wrap(adam, before=same_g, name="my adam"), r"name: must be the name of a variable"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_when_it_is_wrapped(what):
    action, message = REFUSED[what]
    with pytest.raises(TypeError, match=f"^wrap: {message}") as found:
        action()
    assert "\n" not in str(found.value)


class Same(NamedTuple):
    b1: float


def test_what_only_a_call_shows_is_refused_when_an_optimizer_is_made():
    params = {"w": np.ones(3)}
    twice = wrap(adam, before=same_g, prepare=lambda t: Same(1.0))
    with pytest.raises(TypeError, match=r"^prepare of rule 'same_g_adam': must return fields other than .*, got 'b1'"):
        fastopt.Optimizer(params, twice)
    with pytest.raises(TypeError, match=r"^prepare of rule 'same_g_adam': must return a NamedTuple, got float"):
        fastopt.Optimizer(params, wrap(adam, before=same_g, prepare=lambda t: 1.0))
    short = wrap(adam, after=lambda p, new_p, g, count, h: (new_p,), states=("count",), name="short")
    with pytest.raises(TypeError, match=r"^rule 'short': must return the tuple \(p, m, v, count\), .* a tuple of 3$"):
        fastopt.Optimizer(params, short)
    literal = wrap(adam, after=lambda p, new_p, g, h: 0.5 * new_p, name="literal")
    with pytest.raises(TypeError, match=r"^rule 'literal' on float32: must return float32, got p as float64"):
        fastopt.Optimizer({"w": np.ones(3, np.float32)}, literal)
    assert wrap(adam, before=same_g, domains={"x": Interval(0, 1)})._domains["x"] == Interval(0, 1)
