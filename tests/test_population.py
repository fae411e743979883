"""A population of networks is updated as each of them would be by an optimizer of its own, to the bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING, MANY_STATES, OF_EACH_KIND, PER_RULE, WRAPPED, Case

import fastopt
from fastopt.hyper import Interval, check_each

MEMBERS = 3
SHAPES = {"W": (5, 7), "b": (7,), "deep": (3, 2, 2), "empty": (0,), "number": ()}
SKIPPING = {"nonfinite": "skip", "grad_norm": True}
"""Options that share kernels with steps without any."""


def stacked(seed: int, dtype: Any = np.float64, members: int = MEMBERS, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: (scale * rng.normal(size=(members, *shape))).astype(dtype) for path, shape in SHAPES.items()}


def of(tree: dict[str, Any], member: int) -> dict[str, Any]:
    parts = {path: None if leaf is None else leaf[member] for path, leaf in tree.items()}
    return {path: np.asarray(part) if isinstance(part, np.generic) else part for path, part in parts.items()}


def inputs(opt: fastopt.Optimizer, grads: dict[str, Any]) -> dict[str, Any]:
    """The further inputs that the rule takes."""
    return {"extra": dict.fromkeys(opt.rule.extra, grads)} if opt.rule.extra else {}


class Pair:
    """A population, and an optimizer for each of its members."""

    def __init__(self, case: Case, dtype: Any = np.float64, members: int = MEMBERS, params: Any = None, **options: Any):
        params = stacked(0, dtype, members) if params is None else params
        backend = fastopt.pack(params).backend
        self.members = members
        own: dict[str, Any] = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in options.items() if name not in own}
        self.together = case.make(params, members=members, **rest, **own)
        self.apart = [
            case.make(of(params, member), **rest, **{name: float(value[member]) for name, value in own.items()})
            for member in range(members)
        ]
        assert {opt.flat.backend for opt in (self.together, *self.apart)} == {backend}

    def step(self, grads: dict[str, Any], **more: Any) -> fastopt.StepInfo:
        info = self.together.step(grads, **inputs(self.together, grads), **more)
        self.infos = [
            opt.step(of(grads, member), **inputs(opt, of(grads, member)), **more)
            for member, opt in enumerate(self.apart)
        ]
        return info

    def check(self) -> None:
        together = bits(self.together)
        for member, opt in enumerate(self.apart):
            for name, own in bits(opt).items():
                np.testing.assert_array_equal(together[name][member], own, err_msg=f"{name} of member {member}")


def bits(opt: fastopt.Optimizer) -> dict[str, np.ndarray]:
    arrays = opt.state.arrays
    found = {f"{name}/{path}": view for name in arrays for path, view in zip(opt.flat.paths, arrays[name], strict=True)}
    return {**found, **dict(zip(opt.flat.paths, opt.flat.arrays, strict=True))}


def rates(members: int = MEMBERS) -> dict[str, np.ndarray]:
    return {"lr": np.linspace(0.01, 0.05, members)}


@pytest.mark.parametrize("case", [*PER_RULE, MANY_STATES, *WRAPPED], ids=str)
def test_members_have_the_bits_of_optimizers_of_their_own(case):
    """Every rule, with rates of their own: states, rows, columns, matrices and sums over all are each member's."""
    pair = Pair(case, **rates())
    for step in range(3):
        pair.step(stacked(10 + step))
        pair.check()


@pytest.mark.parametrize(
    ("case", "dtype", "options"),
    [
        *((case, np.float64, SKIPPING) for case in OF_EACH_KIND),
        *((BY_NAME["Adam"], dtype, {**SKIPPING, "max_norm": 0.5}) for dtype in (np.float32, np.float64)),
    ],
    ids=str,
)
def test_every_option_is_about_one_member(case, dtype, options):
    """Norms, clipping and the step itself: the gradients of one member are large, and those of another are NaN."""
    pair = Pair(case, dtype, **options, **rates())
    for step in range(4):
        grads = stacked(20 + step, dtype, scale=0.01)
        grads["W"][1] *= 100.0
        if step == 1:
            grads["b"][2, 3] = np.nan if "max_norm" in options else np.inf
        info = pair.step(grads)
        pair.check()
        assert (info.clip_coefficient[1] < 1.0) == ("max_norm" in options)
        for member, own in enumerate(pair.infos):
            np.testing.assert_array_equal(info.grad_norm[member], own.grad_norm)
            assert info.clip_coefficient[member] == own.clip_coefficient
            assert info.skipped[member] == own.skipped == (step == 1 and member == 2)
            assert info.nonfinite_consecutive[member] == own.nonfinite_consecutive
            assert info.nonfinite_total[member] == own.nonfinite_total
    assert info.step == 4
    assert info.clip_coefficient[0] == 1.0


@pytest.mark.parametrize("options", [EVERYTHING, {"clip_norm_per_tensor": 0.5}], ids=["everything", "per tensor"])
@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_all_options_together(name, options):
    pair = Pair(BY_NAME[name], **options, **rates())
    for step in range(3):
        grads = stacked(30 + step)
        grads["W"][0, 0, 0] = np.inf if options is EVERYTHING else 3.0
        info = pair.step(grads)
        pair.check()
        assert [own.clip_coefficient for own in pair.infos] == info.clip_coefficient.tolist()


@pytest.mark.parametrize("case", OF_EACH_KIND, ids=str)
def test_missing_gradients_accumulated_ones_and_buffers(case):
    pair = Pair(case, grad_norm=True, **rates())
    pair.step({**stacked(1), "W": None})
    pair.check()
    for weight, seed in ((1.0, 2), (3.0, 3)):
        grads = stacked(seed)
        pair.together.accumulate(grads, weight)
        for member, opt in enumerate(pair.apart):
            opt.accumulate(of(grads, member), weight)
    info = pair.together.step()
    assert [opt.step().grad_norm for opt in pair.apart] == info.grad_norm.tolist()
    pair.check()
    grads = stacked(4)
    for path, leaf in grads.items():
        pair.together.grads[path][...] = leaf
    pair.together.step()
    for member, opt in enumerate(pair.apart):
        opt.step(of(grads, member))
    pair.check()


def test_a_step_of_no_member_is_none():
    opt = fastopt.Adam(stacked(0), members=MEMBERS, nonfinite="skip", zero_grad=True)
    before = pickle.dumps(bits(opt))
    for leaf in opt.flat.grad_arrays:
        leaf.fill(np.nan)
    info = opt.step()
    assert info.skipped.all()
    assert info.step == opt.step_count == 0
    assert (info.nonfinite_total == 1).all()
    assert pickle.dumps(bits(opt)) == before
    assert all((leaf == 0.0).all() for leaf in opt.flat.grad_arrays)


def test_gradients_of_skipped_members_are_zeroed_too():
    opt = fastopt.SGD(stacked(0), members=MEMBERS, nonfinite="skip", zero_grad=True)
    for leaf in opt.flat.grad_arrays:
        leaf.fill(1.0)
    opt.grads["b"][1] = np.inf
    assert opt.step().skipped.tolist() == [False, True, False]
    assert all((leaf == 0.0).all() for leaf in opt.flat.grad_arrays)


def test_an_error_names_the_parameter():
    opt = fastopt.SGD(stacked(0), members=MEMBERS, nonfinite="raise")
    grads = stacked(1)
    grads["deep"][1] = np.nan
    with pytest.raises(FloatingPointError, match="gradient 'deep' holds NaN"):
        opt.step(grads)


# --- hyperparameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [2, 70])  # of which `prepare` runs in Python, and compiled
@pytest.mark.parametrize("name", ["AdamW", "Adam-lr=0.1-betas=(0.5, 0.75)-eps=0.001-weight_decay=0.1"])
def test_every_number_may_differ(name, members):
    """Decay that shrinks the parameters, and decay that is added to the gradients."""
    betas, decay = np.linspace(0.5, 0.99, members), np.linspace(0.0, 0.1, members)
    more = {"eps": np.geomspace(1e-8, 1e-3, members), "weight_decay": decay}
    pair = Pair(BY_NAME[name], members=members, **rates(members), **more)
    for member, opt in enumerate(pair.apart):
        opt.betas = (0.9, betas[member])
    pair.together.betas = (0.9, betas)
    for step in range(3):
        pair.step(stacked(step, members=members))
        pair.check()


def test_transforms_of_matrices_have_the_numbers_of_their_member():
    """Their hyperparameters, and the number of their update: one member has missed a step."""
    numbers = {"shampoo_beta": np.array([0.5, 0.7, 0.9]), "precondition_frequency": 2}
    pair = Pair(BY_NAME["SOAP-weight_decay=0.1"], nonfinite="skip", **numbers)
    for step in range(5):
        grads = stacked(step)
        if step == 1:
            grads["W"][1] = np.nan
        pair.step(grads)
        pair.check()


@pytest.mark.parametrize("members", [2, 70])
def test_schedules_give_a_number_or_one_for_each(members):
    factors = np.linspace(1.0, 2.0, members)
    params = stacked(0, members=members)
    together = fastopt.Adam(params, members=members, lr=lambda t: factors / (t + 1), betas=(0.9, 0.99))
    apart = [
        fastopt.Adam(of(params, member), lr=lambda t, factor=float(factor): factor / (t + 1), betas=(0.9, 0.99))
        for member, factor in enumerate(factors)
    ]
    for step in range(3):
        grads = stacked(step, members=members)
        info = together.step(grads)
        assert info.lr.tolist() == [opt.step(of(grads, member)).lr for member, opt in enumerate(apart)]
    for member, opt in enumerate(apart):
        assert (together.params["W"][member] == opt.params["W"]).all()
    common = fastopt.SGD(params, members=members, lr=lambda t: 1.0 / (t + 1))
    common.step(grads)
    assert common.step(grads).lr == 0.5


def test_hyper_reads_and_sets():
    opt = fastopt.AdamW(stacked(0), members=MEMBERS, lr=0.1, betas=(0.5, [0.6, 0.7, 0.8]))
    lr = opt.hyper["lr"]
    assert lr.shape == (3,)
    assert len(lr) == 3
    assert lr[1] == 0.1
    assert list(lr) == [0.1] * 3
    lr[1] = 0.2
    assert np.array_equal(opt.lr, [0.1, 0.2, 0.1])
    assert np.array_equal(opt.hyper["lr"] * 2, [0.2, 0.4, 0.2])
    opt.hyper["lr"] *= 2
    assert np.array_equal(np.asarray(opt.hyper["lr"]), [0.2, 0.4, 0.2])
    opt.hyper["lr"][[0, 2]] = opt.hyper["lr"][[1, 1]]
    assert opt.lr.tolist() == [0.4] * 3
    assert np.array_equal(opt.hyper["betas"], [[0.5, 0.6], [0.5, 0.7], [0.5, 0.8]])
    opt.hyper["betas"][1] = (0.1, 0.2)
    assert opt.hyper["betas"][1].tolist() == [0.1, 0.2]
    assert opt.betas[0].tolist() == [0.5, 0.1, 0.5]
    assert dict(opt.hyper)["eps_inside"] is False
    assert len(opt.hyper) == len(opt.rule.names())
    with pytest.raises(ValueError, match=r"lr\[2\]: must be a number in \[0, inf\), got -1.0"):
        lr[2] = -1.0
    with pytest.raises(KeyError, match="rate: must be a hyperparameter of 'adamw'"):
        opt.hyper["rate"] = 1.0
    with pytest.raises(TypeError, match="cannot be deleted"):
        del opt.hyper["lr"]
    assert opt.lr.tolist() == [0.4] * 3
    assert not opt.lr.flags.writeable
    one = fastopt.SGD({"w": np.zeros(2)}, lr=0.5)
    one.hyper["lr"] = 0.25
    assert one.lr == one.hyper["lr"] == 0.25
    assert one.members is None


def test_overrides_and_groups_take_arrays():
    rate = np.array([0.1, 0.2, 0.3])
    opt = fastopt.SGD(stacked(0), members=MEMBERS, lr=1.0, overrides={"b": {"lr": rate}, "W": {"lr": 0.5}})
    before = {path: leaf.copy() for path, leaf in opt.params.items()}
    grads = {path: np.ones_like(leaf) for path, leaf in before.items()}
    opt.groups["W"].lr_scale = 2.0
    opt.step(grads)
    moved = {path: before[path] - opt.params[path] for path in before}
    np.testing.assert_allclose(moved["b"], np.broadcast_to(rate[:, None], (3, 7)), rtol=1e-15)
    assert np.allclose(moved["W"], 1.0, rtol=1e-15)
    assert np.allclose(moved["deep"], 1.0, rtol=1e-15)
    assert opt.groups["b"].lr.tolist() == rate.tolist()
    opt.groups["b"].lr = rate[::-1]
    opt.groups["deep"].frozen = True
    held = opt.params["deep"].copy()
    opt.step(grads)
    assert (opt.params["deep"] == held).all()
    assert opt.groups["b"].lr.tolist() == rate[::-1].tolist()


def test_states_that_begin_at_a_hyperparameter_begin_at_that_of_each_member():
    first = np.array([0.1, 0.2, 0.3])
    opt = fastopt.Adagrad(stacked(0), members=MEMBERS, initial_accumulator_value=first)
    (name,) = opt.rule.states
    assert opt.states[name]["W"][:, 0, 0].tolist() == first.tolist()
    opt.hyper["initial_accumulator_value"][1] = 0.7
    assert opt.states[name]["b"][:, 0].tolist() == [0.1, 0.7, 0.3]


# --- members that continue as others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*OF_EACH_KIND, BY_NAME["SOAP-weight_decay=0.1"]], ids=str)
def test_a_copied_member_goes_on_as_the_other(case):
    """Also where the other has missed a step: bias corrections are by the updates of each member."""
    more = {"precondition_frequency": 2} if "precondition_frequency" in case.rule.names() else {}
    opt = case.make(stacked(0), members=MEMBERS, nonfinite="skip", **more)
    for step in range(3):
        grads = stacked(step)
        if step == 1:
            grads["W"][0] = np.nan
        opt.step(grads)
    opt.copy_member(0, [2])
    for step in range(3, 5):
        grads = stacked(step)
        for leaf in grads.values():
            leaf[2] = leaf[0]
        opt.step(grads)
    for name, array in bits(opt).items():
        np.testing.assert_array_equal(array[2], array[0], err_msg=name)
    assert not np.array_equal(opt.params["W"][1], opt.params["W"][0])


def test_many_members_are_copied_at_once():
    opt = fastopt.Adam(stacked(0, members=5), members=5)
    opt.step(stacked(1, members=5))
    before = opt.params["W"].copy()
    opt.copy_member([4, 0], np.array([1, 2]))
    assert np.array_equal(opt.params["W"], before[[0, 4, 0, 3, 4]])
    opt.copy_member(3, [0, 1])
    assert np.array_equal(opt.params["W"], before[[3, 3, 0, 3, 4]])


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*OF_EACH_KIND, BY_NAME["SOAP-weight_decay=0.1"]], ids=str)
def test_a_population_goes_on_from_a_file_and_from_copies(case, tmp_path):
    def made(seed: int) -> fastopt.Optimizer:
        more = {"overrides": {"W": {"lr": np.array([0.1, 0.2, 0.3])}}}
        return case.make(stacked(seed), members=MEMBERS, **SKIPPING, **rates(), **more)

    opt = made(0)
    for step in range(3):
        grads = stacked(step)
        if step == 1:
            grads["W"][1] = np.nan
        opt.step({**grads, "deep": None} if step == 2 else grads)
    opt.save(tmp_path / "run")
    loaded = made(1)
    loaded.hyper["lr"] = 0.7
    loaded.load(tmp_path / "run")
    fitted = made(2)
    fitted.load_state_dict(opt.state_dict())
    fitted.set_params(opt.params)
    fitted.load_state_dict(opt.state_dict())  # the average, which `set_params` lets begin again
    all_of_them = [opt, loaded, fitted, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    assert loaded.groups["W"].lr.tolist() == [0.1, 0.2, 0.3]
    infos = [each.step(stacked(9)) for each in all_of_them]
    for other, info in zip(all_of_them[1:], infos[1:], strict=True):
        assert info.nonfinite_total.tolist() == [0, 1, 0]
        for name, array in bits(opt).items():
            np.testing.assert_array_equal(bits(other)[name], array, err_msg=name)


def test_a_file_of_another_number_of_members_is_refused(tmp_path):
    fastopt.Adam(stacked(0), members=MEMBERS).save(tmp_path / "run")
    four = fastopt.Adam(stacked(0, members=4), members=4)
    with pytest.raises(ValueError, match="must be saved with members=4, as this optimizer, got members=3"):
        four.load(tmp_path / "run")
    one = fastopt.Adam(stacked(0))
    with pytest.raises(ValueError, match="must be saved with members=None, as this optimizer, got members=3"):
        one.load(tmp_path / "run")


def test_counts_in_a_file_are_checked():
    opt = fastopt.Adam(stacked(0), members=MEMBERS)
    opt.step(stacked(1))
    for missed, error in (([0, 1], "for each of 3 members, got 2"), ([0, 0, 2], "at most step=1, got 2")):
        with pytest.raises(ValueError, match=error):
            opt.load_state_dict({**opt.state_dict(), "missed": {"W": missed}})


# --- in place, elsewhere, and added -----------------------------------------------------------------------------------


def test_in_place_and_other_arrays():
    params = stacked(0)
    opt = fastopt.Adam(members=MEMBERS, **rates())
    pair = Pair(BY_NAME["Adam"], **rates())
    for step in range(3):
        if step == 2:
            params = {path: leaf.copy() for path, leaf in params.items()}
        opt.update(params, stacked(step))
        pair.step(stacked(step))
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, pair.together.params[path])


def test_the_way_up_is_that_of_each_member():
    pair, grads = Pair(BY_NAME["SGD-lr=0.1"]), stacked(5)
    grads["W"][2], grads["b"][2], grads["deep"][2], grads["number"][2] = 0.0, 0.0, 0.0, 0.0
    for rounds in range(2):  # gradients that are given, and those in the buffer
        given = grads if rounds == 0 else None
        for path, leaf in grads.items():
            pair.together.grads[path][...] = leaf
        with pair.together.ascent(0.5, given) as held:
            for member, opt in enumerate(pair.apart):
                with opt.ascent(0.5, of(grads, member)) as own:
                    for path, leaf in own.items():
                        np.testing.assert_allclose(held[path][member], leaf, rtol=4e-16, atol=1e-16)
        assert (held["W"] == stacked(0)["W"]).all()


def test_lookahead_and_average_are_those_of_each_member():
    pair = Pair(BY_NAME["Nesterov-form=lookahead-weight_decay=0.1"], ema=0.9, **rates())
    for step in range(2):
        with pair.together.lookahead() as held:
            for member, opt in enumerate(pair.apart):
                with opt.lookahead() as own:
                    assert (held["W"][member] == own["W"]).all()
        pair.step(stacked(step))
    with pair.together.swap_ema() as held:
        for member, opt in enumerate(pair.apart):
            assert (held["b"][member] == opt.ema["b"]).all()


def test_parameters_are_added_to_each_member():
    opt = fastopt.Adam({"W": stacked(0)["W"]}, members=MEMBERS, **rates())
    opt.step({"W": stacked(1)["W"]})
    opt.add({"b": stacked(0)["b"]}, lr=[1.0, 2.0, 3.0])
    opt.step({"W": stacked(2)["W"], "b": stacked(2)["b"]})
    moved = stacked(0)["b"] - opt.params["b"]
    np.testing.assert_allclose(np.abs(moved), np.broadcast_to([[1.0], [2.0], [3.0]], (3, 7)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"parameter 'c': must have a first axis of length members=3"):
        opt.add({"c": np.zeros((2, 2))})


# --- sums over all ----------------------------------------------------------------------------------------------------


class Shares(NamedTuple):
    lr: float
    total: float


def _prepare_shares(t, lr=0.1):
    return Shares(lr, 0.0)


def _square(p, g, h):
    return g * g


def _settle_shares(sums, numbers, size, h):
    return (sums.square + size) ** 0.5, numbers.seen + 1.0


@fastopt.rule(
    _prepare_shares, sums=fastopt.Sums({"square": _square}, _settle_shares, ("total",), ("seen",), over="all")
)
def of_all(p, g, h):
    return p - h.lr * g / h.total


@fastopt.rule(
    _prepare_shares,
    sums=(
        fastopt.Sums({"square": _square}, _settle_shares, ("total",), ("seen",), over="all"),
        fastopt.Sums({"square": _square}, lambda sums, numbers, size, h: sums.square, (), ("rows",), over="row"),
    ),
)
def of_all_and_rows(p, g, h):
    return p - h.lr * g / h.total


@pytest.mark.parametrize("rule", [of_all, of_all_and_rows], ids=lambda rule: rule.name)
def test_all_are_all_of_a_member(rule):
    """Also where a parameter has no gradient, and where a member is skipped: the numbers are the same within each."""
    params = stacked(0)
    together = fastopt.Optimizer(params, rule, members=MEMBERS, nonfinite="skip")
    apart = [fastopt.Optimizer(of(params, member), rule, nonfinite="skip") for member in range(MEMBERS)]
    for step in range(3):
        grads: dict[str, Any] = {**stacked(step), **({"W": None} if step == 1 else {})}
        if step == 2:
            grads["b"][0] = np.inf
        together.step(grads)
        for member, opt in enumerate(apart):
            opt.step(of(grads, member))
            for name, own in bits(opt).items():
                np.testing.assert_array_equal(bits(together)[name][member], own, err_msg=f"{name}, {step}")
    assert together.states["seen"]["W"].tolist() == [2.0, 3.0, 3.0]


# --- threads, and what is refused -------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_threads():
    members, shapes = 40, {"W": (30, 40), "b": (40,)}
    rng = np.random.default_rng(0)
    params, grads = (
        {path: rng.normal(size=(members, *shape)).astype(np.float32) for path, shape in shapes.items()} for _ in "pg"
    )
    found = []
    for threads in (1, 2):
        fastopt.set_num_threads(threads)
        try:
            opt = fastopt.LAMB(params, members=members, max_norm=0.1, lr=np.linspace(0.1, 1.0, members))
            for _ in range(2):
                opt.step(grads)
            found.append(pickle.dumps(bits(opt)))
        finally:
            fastopt.set_num_threads(None)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: fastopt.SGD(p, members=4), ValueError, r"'W': must have a first axis of length members=4.*np.stack"),
        (lambda p: fastopt.SGD(p, members=0), ValueError, "members: must be the number of networks"),
        (lambda p: fastopt.SGD(p, members=2.5), TypeError, "members: must be the number of networks"),
        (lambda p: fastopt.SGD({"s": np.zeros(())}, members=1), ValueError, r"'s': must have a first axis"),
        (lambda p: fastopt.SGD(p, lr=[0.1, 0.2, 0.3]), TypeError, "lr: must be a number"),
        (lambda p: fastopt.SGD(p, lr=[0.1, 0.2], members=3), TypeError, r"lr: must be .* each of 3 members"),
        (lambda p: fastopt.SGD(p, lr=[0.1, np.nan, 1.0], members=3), ValueError, r"lr\[1\]: must be a number in"),
        (lambda p: fastopt.Adam(p, betas=(0.9, [0.9, 1.0, 0.9]), members=3), ValueError, r"betas\[1\]\[1\]: must be"),
        (lambda p: fastopt.Adam(p, eps=[1e-8, 1e-60, 0.0], members=3), ValueError, "eps: must not become 0 in float32"),
        (lambda p: fastopt.Adam(p, eps_inside=[True, False, True], members=3), TypeError, "eps_inside: must be"),
        (lambda p: fastopt.SGD(p, members=3, lr=lambda t: [0.1]), TypeError, r"schedule of lr: must be .* 3 members"),
        (lambda p: fastopt.SGD(fastopt.pack(p), members=3), ValueError, "members: must be None, of the packed"),
        (lambda p: fastopt.SGD(p).copy_member(0, 1), RuntimeError, "copy_member.. must be of a population|copy_member"),
    ],
)
def test_what_is_refused_when_made(make, error, match):
    with pytest.raises(error, match=match):
        make(stacked(0, np.float32))


@pytest.mark.parametrize(
    ("use", "error", "match"),
    [
        (lambda opt: opt.copy_member(0, 3), ValueError, "target: must be row numbers from 0 to 2, got 3"),
        (lambda opt: opt.copy_member([0, 1], [0, 1, 2]), ValueError, "source: must be one member, or 3 as target"),
        (lambda opt: opt.copy_member(0, [1, 1]), ValueError, "target: must name each member once"),
        (lambda opt: opt.copy_member(0.5, 1), TypeError, "source: must be integers"),
        (lambda opt: opt.step_rows({"W": (np.array([0]), np.zeros((1, 7)))}), ValueError, "one network, got a popul"),
        (lambda opt: opt.read_rows("W", [0]), ValueError, "one network, got a population"),
        (lambda opt: fastopt.interop.to_torch_state(opt), ValueError, "opt: must be of one network, got a population"),
    ],
)
def test_what_is_refused_of_a_population(use, error, match):
    opt = fastopt.SGD(stacked(0), members=MEMBERS, momentum=0.9)
    before = pickle.dumps(bits(opt))
    with pytest.raises(error, match=match):
        use(opt)
    assert pickle.dumps(bits(opt)) == before


def test_the_extremes_decide():
    """One call for each end, however many members: NaN is an end, too."""
    assert check_each(Interval(0.0, 1.0), "x", np.linspace(0, 1, 1000), 1000).shape == (1000,)
    with pytest.raises(ValueError, match=r"x\[7\]: must be a whole number"):
        check_each(Interval(0.0, whole=True), "x", [1.0] * 7 + [1.5, 2.0], 9)
