"""One step of Adam on a population of small networks, each with a learning rate of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from groups import Group, by_name, each_contestant
from numpy.typing import NDArray

import fastopt
from fastopt.measure import Result, compare

Tree = dict[str, NDArray[Any]]

SHAPES = {"W1": (8, 16), "b1": (16,), "W2": (16, 4), "b2": (4,)}
"""A network of 212 parameters."""
CASES = {"1000 networks of 212": 1000, "100 networks of 212": 100}
B1, B2, EPS = 0.9, 0.999, 1e-8


def stacked(members: int, seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=(members, *shape)).astype(np.float32) for path, shape in SHAPES.items()}


def of_each(tree: Tree, members: int) -> list[Tree]:
    return [{path: leaf[member] for path, leaf in tree.items()} for member in range(members)]


def population(params: Tree, grads: Tree, rates: NDArray[Any]) -> Callable[[], Any]:
    opt = fastopt.Adam(params, lr=rates, members=len(rates))
    return lambda: opt.step(grads)


def one_rate(params: Tree, grads: Tree, rates: NDArray[Any]) -> Callable[[], Any]:
    opt = fastopt.Adam(params, lr=float(rates[0]))
    return lambda: opt.step(grads)


def loop(params: Tree, grads: Tree, rates: NDArray[Any]) -> Callable[[], Any]:
    members = len(rates)
    each = zip(of_each(params, members), of_each(grads, members), rates.tolist(), strict=True)
    made = [(fastopt.Adam(own, lr=rate), own_grads) for own, own_grads, rate in each]

    def steps() -> None:
        for opt, own_grads in made:
            opt.step(own_grads)

    return steps


def in_numpy(params: Tree, grads: Tree, rates: NDArray[Any]) -> Callable[[], Any]:
    """Stacked, with the rates along the first axis, in place."""
    p = {path: leaf.copy() for path, leaf in params.items()}
    m, v = ({path: np.zeros_like(leaf) for path, leaf in params.items()} for _ in "mv")
    lr = {path: rates.astype(np.float32).reshape(-1, *[1] * (leaf.ndim - 1)) for path, leaf in p.items()}
    t = 0

    def step() -> None:
        nonlocal t
        t += 1
        root = np.float32(np.sqrt(1 - B2**t))
        scale = root / np.float32(1 - B1**t)
        for path, g in grads.items():
            m[path] += np.float32(1 - B1) * (g - m[path])
            v[path] += np.float32(1 - B2) * (g * g - v[path])
            p[path] -= scale * lr[path] * m[path] / (np.sqrt(v[path]) + root * np.float32(EPS))

    return step


def by_vmap(params: Tree, grads: Tree, rates: NDArray[Any]) -> Callable[[], Any]:
    jax, optax, numbers = (import_module(name) for name in ("jax", "optax", "jax.numpy"))
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    p, g = (jax.tree.map(numbers.asarray, tree) for tree in (params, grads))

    def begin(own: Any, rate: Any) -> Any:
        state = adam.init(own)
        state.hyperparams["learning_rate"] = rate
        return state

    def update(own: Any, state: Any, own_grads: Any) -> Any:
        updates, state = adam.update(own_grads, state, own)
        return optax.apply_updates(own, updates), state

    held = [p, jax.vmap(begin)(p, numbers.asarray(rates, numbers.float32))]
    jitted = jax.jit(jax.vmap(update), donate_argnums=(0, 1))

    def step() -> None:
        held[:] = jitted(*held, g)
        jax.block_until_ready(held[0])

    return step


WAYS: dict[str, Callable[[Tree, Tree, NDArray[Any]], Callable[[], Any]]] = {
    "fastopt": population,
    "one rate": one_rate,
    "numpy": in_numpy,
    "optax vmap": by_vmap,
    "a loop": loop,
}


def group_of(name: str) -> Group:
    members = CASES[name]

    def run(title: str, **how: Any) -> Result:
        params, grads = stacked(members, 0), stacked(members, 1)
        rates = np.geomspace(1e-4, 1e-2, members)
        absent = {} if all(map(find_spec, ("jax", "optax"))) else {"optax vmap": "jax or optax is not installed"}
        contestants = {way: make(params, grads, rates) for way, make in WAYS.items() if way not in absent}
        parameters = sum(leaf.size for leaf in params.values())
        return compare(title, contestants, absent=absent, parameters=parameters, states=2, dtype="float32", **how)

    return Group(f"Adam, {name}", tuple(WAYS), run, 1.0, members * 212)


GROUPS = by_name(group_of(name) for name in CASES)


@pytest.mark.parametrize(**each_contestant(GROUPS))
def test_population(measure, group, contestant):
    measure(GROUPS[group], contestant)
