"""Trees that are handed out, of arrays on a device: in numba's simulator, or on a GPU with ``--gpu``.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_trees.py
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from fastopt.kernels import get_backend
from fastopt.storage.trees import adopt, flatten, handed_out, plain

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


def on_device(array: Any) -> Any:
    return get_backend("cuda").adopt(np.asarray(array))


def on_host(leaf: Any) -> list[float]:
    return get_backend("cuda").host(leaf).tolist()


@pytest.fixture
def tree() -> Any:
    _, treespec, _ = flatten({"a": 0, "b": 0, "s": [0]})
    buffer = get_backend("cuda").zeros(5, np.dtype(np.float32))
    return handed_out(treespec, [buffer[:2], buffer[2:4], buffer[4:].reshape(())], "opt.params")


@pytest.mark.parametrize("there", [True, False])
def test_arrays_of_the_device_and_of_the_host_are_written_into_the_leaf(tree, there):
    leaf = tree["a"]
    for dtype in (np.float32, np.float64, np.int32):
        value = np.array([1, 2], dtype) + np.dtype(dtype).itemsize
        tree["a"] = on_device(value) if there else value
        assert tree["a"] is leaf
        assert leaf.dtype == np.float32
        assert on_host(leaf) == value.tolist()


def test_numbers_and_lists_and_augmented_assignment(tree):
    tree["s"][0] = 2.5
    tree["a"] = [3, 4]
    tree["a"] += 1.0
    assert on_host(tree["s"][0]) == 2.5
    assert on_host(tree["a"]) == [4.0, 5.0]


def test_several_leaves_are_read_before_any_is_written(tree):
    tree.update(a=[1, 2], b=[3, 4])
    tree.update(a=tree["b"], b=tree["a"])
    assert (on_host(tree["a"]), on_host(tree["b"])) == ([3.0, 4.0], [1.0, 2.0])
    tree["a"] = tree["a"][::-1]
    assert on_host(tree["a"]) == [4.0, 3.0]


def test_errors(tree):
    with pytest.raises(ValueError, match=r'^opt\.params\["a"\]: must be of shape \(2,\), got shape \(1,\); '):
        tree["a"] = on_device([1.0])
    with pytest.raises(TypeError, match=r'^opt\.params\["a"\]: must be of a dtype that casts to float32, got complex'):
        tree["a"] = np.ones(2, complex)
    with pytest.raises(TypeError, match=r'^opt\.params\["a"\]: must be an array of shape \(2,\), got None; '):
        tree["a"] = None
    assert on_host(tree["a"]) == [0.0, 0.0]


def test_an_array_of_the_device_is_refused_by_a_leaf_of_the_host():
    leaves, treespec, _ = flatten({"a": np.zeros(2)})
    tree = handed_out(treespec, leaves, "opt.params")
    with pytest.raises(TypeError, match=r'^opt\.params\["a"\]: must be an array of the host, got a '):
        tree["a"] = on_device([1.0, 2.0])


def test_views_are_put_into_the_callers_own_tree(tree):
    own = {"a": np.zeros(2), "b": on_device([1.0, 2.0]), "s": [np.zeros(())]}
    leaves, treespec, _ = flatten(plain(tree))
    adopt(own, treespec, leaves)
    assert own["a"] is tree["a"]
    assert own["s"][0] is tree["s"][0]
