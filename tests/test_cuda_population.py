"""Populations on CUDA: each member has the bits of an optimizer of its own. In numba's simulator, or with ``--gpu``.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_population.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, OF_EACH_KIND, CaseOfRule
from test_cuda import SIMULATED, uploaded
from test_population import Pair, bits, of_all, of_all_and_rows, rates

import fastopt
from fastopt.kernels import get_backend

SHAPES = {"W": (3, 2), "b": (2,)}
MEMBERS = 2


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


def stacked(seed: int, members: int = MEMBERS) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return uploaded({path: rng.normal(size=(members, *shape)) for path, shape in SHAPES.items()})


def check(pair: Pair) -> None:
    host = get_backend("cuda").host
    together = {name: host(array) for name, array in bits(pair.together).items()}
    for member, opt in enumerate(pair.apart):
        for name, own in bits(opt).items():
            np.testing.assert_array_equal(together[name][member], host(own), err_msg=f"{name} of member {member}")


ALL = (CaseOfRule("of_all", of=of_all), CaseOfRule("of_all_and_rows", of=of_all_and_rows))


@pytest.mark.parametrize("case", [*OF_EACH_KIND, *ALL], ids=str)
def test_members_have_the_bits_of_optimizers_of_their_own(case):
    """Also where a parameter has no gradient, and where a member is skipped."""
    pair = Pair(case, params=stacked(0), members=MEMBERS, nonfinite="skip", **rates(MEMBERS))
    for step in range(3):
        grads = stacked(step + 1)
        if step == 1:
            grads["W"][0, 2, 0] = np.nan
        if step == 2:
            grads["b"] = None
        info = pair.step(grads)
        check(pair)
        assert info.skipped.tolist() == [step == 1, False]


def test_clipping_and_buffers():
    pair = Pair(BY_NAME["Adam"], params=stacked(0), members=MEMBERS, max_norm=0.5, zero_grad=True, nonfinite="skip")
    for step in range(2):
        for path, leaf in stacked(step + 1).items():
            leaf[1] *= 0.01
            if step == 1 and path == "b":
                leaf[0] = np.inf
            pair.together.grads[path][...] = leaf
            for member, opt in enumerate(pair.apart):
                opt.grads[path][...] = leaf[member]
        info = pair.together.step()
        own = [opt.step() for opt in pair.apart]
        check(pair)
        assert info.clip_coefficient.tolist() == [each.clip_coefficient for each in own]
        assert info.skipped.tolist() == [step == 1, False]
        assert all((get_backend("cuda").host(leaf) == 0.0).all() for leaf in pair.together.flat.grad_arrays)


def test_members_are_copied_and_go_up():
    opt = fastopt.Adam(stacked(0), members=MEMBERS, lr=[0.1, 0.2])
    opt.step(stacked(1))
    host = get_backend("cuda").host
    here = host(opt.params["W"]).copy()
    before = {path: host(leaf).copy() for path, leaf in opt.params.items()}
    with opt.ascent(0.5, stacked(2)) as held:
        squares = [(host(leaf) - before[path]).reshape(MEMBERS, -1) ** 2 for path, leaf in held.items()]
    np.testing.assert_allclose(np.concatenate(squares, axis=1).sum(1), 0.25, rtol=1e-12)
    np.testing.assert_array_equal(host(opt.params["W"]), here)
    opt.copy_member(1, 0)
    assert np.array_equal(host(opt.params["W"])[0], here[1])
