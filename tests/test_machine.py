"""An optimizer with a BatchNorm under random sequences of what people do to them, against a plain model in float64.

`FASTOPT_MACHINE_EXAMPLES=3000 pytest tests/test_machine.py` runs for about half an hour.
"""

from __future__ import annotations

import copy
import gc
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, Case, Oracle
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_interrupts import interrupted, raise_alarm

import fastopt
from fastopt import reference

EXAMPLES = int(os.environ.get("FASTOPT_MACHINE_EXAMPLES", "20"))
CASES = (
    "SGD-lr=0.1-momentum=0.9-dampening=0.3-weight_decay=0.01",
    "RMSprop-momentum=0.9-centered=True-weight_decay=0.1",
    "Adam-amsgrad=True-betas=(0.9, 0.9)",
    "AdamW",
    "Lion-weight_decay=0.1",
    "LAMB",
    "NovoGrad-weight_decay=0.1",
    "ScheduleFreeAdamW-warmup_steps=3-weight_decay=0.1",
)
PATHS = ("W", "b", "bn.beta", "bn.gamma", "s")
SHAPES = {"W": (4, 3), "b": (17,), "bn.beta": (3,), "bn.gamma": (3,), "s": ()}

seeds = st.integers(0, 2**16)
masks = st.sampled_from([(), (), ("W",), ("b", "s"), ("bn.beta", "bn.gamma"), PATHS])
"""Which parameters have no gradient."""


class Model:
    """What should happen, in plain NumPy: one oracle per parameter, and all else in a dict or a number."""

    def __init__(self, case: Case, params: dict[str, np.ndarray], options: dict[str, Any]):
        self.options = options
        self.oracles: dict[str, Oracle] = {path: case.oracle(array) for path, array in params.items()}
        self.average = {path: array.copy() for path, array in params.items()}
        self.lr: dict[str, float] = dict.fromkeys(params, case.make(None).lr)
        self.own_lr: set[str] = set()
        self.steps = self.skipped = 0
        self.pending: dict[str, np.ndarray] = {}
        self.weight, self.sums = 0.0, False
        self.running = {"mean": np.zeros(3), "var": np.ones(3), "batches": 0}

    @property
    def params(self) -> dict[str, np.ndarray]:
        return {path: oracle.p for path, oracle in self.oracles.items()}

    def step(self, grads: dict[str, np.ndarray | None]) -> None:
        present = {path: g for path, g in grads.items() if g is not None}
        self.drop_the_sum()
        if self.options["nonfinite"] == "skip" and not all(np.isfinite(g).all() for g in present.values()):
            self.skipped += 1
            return
        norm = np.sqrt(sum((g**2).sum() for g in present.values()))
        max_norm, limit = self.options.get("max_norm"), self.options.get("clip_norm_per_tensor")
        coefficient = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        self.steps += 1
        for path, g in present.items():
            oracle = self.oracles[path]
            own = coefficient if limit is None else limit / max(limit, np.sqrt((g**2).sum()))
            oracle.step(own * g, lr=self.lr[path])
            if self.options["ema"] is not None:
                self.average[path] += (1.0 - self.options["ema"]) * (oracle.p - self.average[path])

    def accumulate(self, grads: dict[str, np.ndarray | None], weight: float) -> None:
        for path, g in grads.items():
            if g is not None:
                self.pending[path] = self.pending.get(path, np.zeros(SHAPES[path])) + weight * g
        self.weight, self.sums = self.weight + weight, True

    def drop_the_sum(self) -> None:
        self.pending, self.weight, self.sums = {}, 0.0, False

    def begin_at(self, params: dict[str, np.ndarray]) -> None:
        """New weights: the average and the states that begin at the weights begin there again."""
        for path, oracle in self.oracles.items():
            oracle.p[...] = self.average[path][...] = params[path]
            if "z" in oracle.state:
                oracle.state["z"][...] = params[path]

    def restart(self, case: Case) -> None:
        self.oracles = {path: case.oracle(oracle.p) for path, oracle in self.oracles.items()}
        self.average = {path: oracle.p.copy() for path, oracle in self.oracles.items()}
        self.steps = self.skipped = 0
        self.drop_the_sum()

    def accumulated(self, reduction: str) -> dict[str, np.ndarray | None]:
        divisor = self.weight or 1.0 if reduction == "mean" else 1.0
        return {path: self.pending[path] / divisor if path in self.pending else None for path in PATHS}


def tree_of(leaves: dict[str, Any]) -> dict[str, Any]:
    return {
        "W": leaves["W"],
        "b": leaves["b"],
        "bn": {"beta": leaves["bn.beta"], "gamma": leaves["bn.gamma"]},
        "s": leaves["s"],
    }


def leaves_of(tree: Any) -> dict[str, Any]:
    return {
        "W": tree["W"],
        "b": tree["b"],
        "bn.beta": tree["bn"]["beta"],
        "bn.gamma": tree["bn"]["gamma"],
        "s": tree["s"],
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, rtol=1e-8, atol=1e-10, err_msg=f"{what} {path}")


class Machine(RuleBasedStateMachine):
    """Hypothesis picks the rules in any order, and shrinks what fails to the shortest sequence."""

    @initialize(
        name=st.sampled_from(CASES),
        seed=seeds,
        copies=st.booleans(),
        ema=st.sampled_from([None, 0.75]),
        clipping=st.sampled_from([{}, {"max_norm": 1.0}, {"clip_norm_per_tensor": 1.0}]),
    )
    def begin(self, name: str, seed: int, copies: bool, ema: float | None, clipping: dict[str, float]) -> None:
        rng = np.random.default_rng(seed)
        self.case = BY_NAME[name]
        self.options = {"ema": ema, **clipping, "nonfinite": "skip", "copy": copies}
        self.folder = TemporaryDirectory()
        self.handler = signal.signal(signal.SIGALRM, raise_alarm)
        self.bn = fastopt.BatchNorm(3, dtype=np.float64)
        params = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
        params.update({"bn.beta": np.zeros(3), "bn.gamma": np.ones(3)})
        tree = tree_of({path: array.copy() for path, array in params.items()})
        self.opt = self.case.make(tree, **self.options)
        self.bn.attach(self.opt.params["bn"], self.opt.grads["bn"])
        self.model = Model(self.case, params, self.options)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()
            signal.signal(signal.SIGALRM, self.handler)

    def grads(self, seed: int, absent: tuple[str, ...] = ()) -> dict[str, np.ndarray | None]:
        rng = np.random.default_rng(seed)
        return {path: None if path in absent else rng.normal(size=shape) for path, shape in SHAPES.items()}

    # --- steps --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.model.sums)
    @rule(seed=seeds, absent=masks)
    def step(self, seed: int, absent: tuple[str, ...]) -> None:
        grads = self.grads(seed, absent)
        info = self.opt.step(tree_of(grads))
        self.model.step(grads)
        assert (info.step, info.skipped) == (self.model.steps, False)

    @precondition(lambda self: not self.model.sums)
    @rule(seed=seeds, path=st.sampled_from(PATHS), value=st.sampled_from([np.nan, np.inf, -np.inf]))
    def step_that_is_not_finite(self, seed: int, path: str, value: float) -> None:
        grads = self.grads(seed)
        grads[path] = np.full(SHAPES[path], value)
        assert self.opt.step(tree_of(grads)).skipped
        self.model.step(grads)

    @rule(seed=seeds, absent=masks, weight=st.sampled_from([1.0, 0.5, 3.0]))
    def accumulate(self, seed: int, absent: tuple[str, ...], weight: float) -> None:
        grads = self.grads(seed, absent)
        self.opt.accumulate(tree_of(grads), weight)
        self.model.accumulate(grads, weight)

    @precondition(lambda self: self.model.sums)
    @rule(reduction=st.sampled_from(["mean", "sum"]))
    def step_along_the_sum(self, reduction: str) -> None:
        self.opt.step(reduction=reduction)
        self.model.step(self.model.accumulated(reduction))

    @rule(seed=seeds, size=st.sampled_from([1e-6, 3e-5, 1e-4, 1e-3]))
    def interrupt_a_step(self, seed: int, size: float) -> None:
        """Ctrl-C at any moment: the step was made, or it was not."""
        grads = self.grads(seed) if not self.model.sums else self.model.accumulated("mean")
        given = None if self.model.sums else tree_of(grads)
        gc.disable()  # hypothesis times the collector in a callback, from which an exception does not come back
        try:
            raised = interrupted(lambda: self.opt.step(given), size)
        finally:
            gc.enable()
        if raised and self.opt.step_count == self.model.steps:
            self.they_agree()
            self.opt.step(given)  # in any case, so that the rules that follow do not depend on the time
        self.model.step(grads)

    @rule()
    def drop_the_sum(self) -> None:
        self.opt.zero_grad()
        self.model.drop_the_sum()

    @precondition(lambda self: not self.model.sums)
    @rule(seed=seeds)
    def train_through_the_layer(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        x, dy = rng.normal(1.0, 2.0, (8, 4)), rng.normal(size=(8, 3))
        y = self.bn.forward(x @ self.opt.params["W"])
        dz = self.bn.backward(dy)
        grads = self.grads(seed, ("b", "s"))
        grads |= {"W": x.T @ dz, "bn.beta": self.bn.grads["beta"].copy(), "bn.gamma": self.bn.grads["gamma"].copy()}
        self.opt.step(tree_of(grads))
        params, running = self.model.params, self.model.running
        expected, cache = reference.batchnorm_forward(
            x @ params["W"], params["bn.gamma"].copy(), params["bn.beta"].copy(), running["mean"], running["var"]
        )
        running["batches"] += 1
        np.testing.assert_allclose(y, expected, rtol=1e-7, atol=1e-9)
        back = reference.batchnorm_backward(dy, cache)
        self.model.step({**grads, "W": x.T @ back["dx"], "bn.beta": back["dbeta"], "bn.gamma": back["dgamma"]})

    @rule(seed=seeds, weight=st.sampled_from([0.0, 1.0, 2.0]))
    def accumulate_through_the_layer(self, seed: int, weight: float) -> None:
        """Each backward pass writes into opt.grads, and what was there has been added before."""
        rng = np.random.default_rng(seed)
        z, dy = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
        self.bn.forward(z)
        self.bn.backward(dy)
        self.opt.accumulate({"W": None, "b": None, "bn": self.opt.grads["bn"], "s": 0.5}, weight)
        params, running = self.model.params, self.model.running
        _, cache = reference.batchnorm_forward(
            z, params["bn.gamma"], params["bn.beta"], running["mean"], running["var"]
        )
        running["batches"] += 1
        back = reference.batchnorm_backward(dy, cache)
        absent = dict.fromkeys(("W", "b"))
        sums = {"bn.beta": back["dbeta"], "bn.gamma": back["dgamma"], "s": np.array(0.5)}
        self.model.accumulate(absent | (sums if weight else dict.fromkeys(sums)), weight)

    @rule(seed=seeds, value=st.sampled_from([np.nan, np.inf]))
    def poison_the_layer(self, seed: int, value: float) -> None:
        """A batch that is not finite leaves nothing that lasts."""
        z = np.random.default_rng(seed).normal(size=(6, 3))
        z[seed % 6, seed % 3] = value
        with np.errstate(invalid="ignore"):
            self.bn.forward(z)

    @rule(seed=seeds)
    def evaluate_the_layer(self, seed: int) -> None:
        x = np.random.default_rng(seed).normal(size=(5, 3))
        params, running = self.model.params, self.model.running
        expected, _ = reference.batchnorm_forward(
            x, params["bn.gamma"], params["bn.beta"], running["mean"], running["var"], training=False
        )
        np.testing.assert_allclose(self.bn.forward(x, training=False), expected, rtol=1e-7, atol=1e-9)

    # --- hyperparameters ----------------------------------------------------------------------------------------------

    @rule(lr=st.sampled_from([0.0, 1e-3, 0.05]))
    def set_the_rate(self, lr: float) -> None:
        self.opt.lr = lr
        self.model.lr.update({path: lr for path in PATHS if path not in self.model.own_lr})

    @rule(lr=st.sampled_from([0.01, 0.02]), glob=st.sampled_from([("b*", ("b", "bn.beta", "bn.gamma")), ("W", ("W",))]))
    def set_the_rate_of_some(self, lr: float, glob: tuple[str, tuple[str, ...]]) -> None:
        self.opt.groups[glob[0]].lr = lr
        self.model.lr.update(dict.fromkeys(glob[1], lr))
        self.model.own_lr.update(glob[1])

    # --- weights that come from elsewhere -----------------------------------------------------------------------------

    @rule(seed=seeds)
    def set_the_weights(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        new = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
        self.opt.set_params(tree_of(new))
        self.model.begin_at(new)

    @precondition(lambda self: not self.model.steps)
    @rule(seed=seeds)
    def write_the_weights(self, seed: int) -> None:
        """Before the first step the arrays themselves may be written."""
        rng = np.random.default_rng(seed)
        new = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
        for path, array in leaves_of(self.opt.params).items():
            array[...] = new[path]
        self.model.begin_at(new)

    @rule()
    def restart(self) -> None:
        self.opt.restart()
        self.model.restart(self.case)

    # --- copies, files, contexts --------------------------------------------------------------------------------------

    @rule(seed=seeds)
    def go_on_with_a_copy(self, seed: int) -> None:
        """What happens to the original afterwards does not reach the copy."""
        original, bn = self.opt, self.bn
        self.opt, self.bn = copy.deepcopy((original, bn))  # together, so that they stay tied
        if not self.model.sums:
            original.step(tree_of(self.grads(seed)))
        bn.forward(np.random.default_rng(seed).normal(size=(4, 3)))

    def another(self) -> fastopt.Optimizer:
        return self.case.make(tree_of(self.grads(0)), **self.options)

    @rule()
    def go_on_from_a_file(self) -> None:
        path = Path(self.folder.name, "run")
        self.opt.save(
            path, extra={"bn": {name: np.asarray(array).tolist() for name, array in self.bn.state_dict().items()}}
        )
        self.opt = self.another()
        extra = self.opt.load(path)
        bn = fastopt.BatchNorm(3, dtype=np.float64)
        bn.attach(self.opt.params["bn"], self.opt.grads["bn"])
        bn.load_state_dict(
            {name: np.array(values) if isinstance(values, list) else values for name, values in extra["bn"].items()}
        )
        self.bn = bn
        self.model.drop_the_sum()  # gradients that are being accumulated are not saved

    @rule()
    def go_on_from_a_state(self) -> None:
        state, params = self.opt.state_dict(), leaves_of(self.opt.params)
        opt = self.case.make(tree_of({path: array.copy() for path, array in params.items()}), **self.options)
        opt.load_state_dict(state)
        self.opt = opt
        self.bn.attach(opt.params["bn"], opt.grads["bn"])
        self.model.drop_the_sum()

    @precondition(lambda self: self.options["ema"] is not None)
    @rule()
    def look_at_the_average(self) -> None:
        with self.opt.swap_ema() as params:
            assert_same(leaves_of(params), self.model.average, "average")
            with pytest.raises(RuntimeError, match="leave the block first"):
                self.opt.step()

    @precondition(lambda self: hasattr(self.opt, "eval_params"))
    @rule()
    def look_at_what_is_evaluated(self) -> None:
        with self.opt.eval_params() as params:
            b1 = self.opt.betas[0]
            for path, oracle in self.model.oracles.items():
                expected = (oracle.p - (1.0 - b1) * oracle.state["z"]) / b1
                np.testing.assert_allclose(leaves_of(params)[path], expected, rtol=1e-7, atol=1e-9, err_msg=path)

    # --- what must hold after each ------------------------------------------------------------------------------------

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        opt, model = self.opt, self.model
        assert opt.step_count == model.steps
        assert_same(leaves_of(opt.params), model.params, "parameter")
        for name in (*opt.rule.states, *opt.rule.numbers):
            assert_same(
                leaves_of(opt.states[name]), {path: o.state[name] for path, o in model.oracles.items()}, f"state {name}"
            )
        if self.options["ema"] is not None:
            assert_same(leaves_of(opt.ema), model.average, "average")
        missed = {path: model.steps - oracle.t for path, oracle in model.oracles.items() if model.steps != oracle.t}
        assert opt.state_dict()["missed"] == missed
        np.testing.assert_allclose(self.bn.running_mean, model.running["mean"], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(self.bn.running_var, model.running["var"], rtol=1e-7, atol=1e-9)
        assert self.bn.num_batches_tracked == model.running["batches"]
        for name, own in self.bn.params.items():
            assert np.shares_memory(own, opt.params["bn"][name])


TestMachine = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")(
    Machine.TestCase
)
TestMachine.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
