"""What the CUDA backend is given: bare arrays, other places, devices, streams and owners, and sizes beyond 2**31.

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_bad_input.py
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME

import fastopt
from fastopt import rules
from fastopt.kernels import get_backend
from fastopt.kernels.contract import BLOCK
from fastopt.storage.layout import Layout

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
N = 40
T, V = TypeError, ValueError
ADAM = ("p", "g", "m", "v")
simulator_only = pytest.mark.skipif(not SIMULATED, reason="a second device, or torch on one, is simulated")


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


def backend() -> Any:
    return get_backend("cuda")


def uploaded(array: np.ndarray) -> Any:
    return backend().adopt(array)


def host(array: Any) -> np.ndarray:
    return backend().host(array)


def vectors(names: tuple[str, ...] = ADAM, dtype: Any = np.float64, size: int = N) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.uniform(1.0, 2.0, size).astype(dtype) for name in names}


def there(arrays: dict[str, np.ndarray], shift: int = 0) -> dict[str, Any]:
    """The same on the device, `shift` elements behind where an array begins."""
    return {name: uploaded(np.concatenate([np.zeros(shift, a.dtype), a]))[shift:] for name, a in arrays.items()}


class Foreign:
    """An array of another library on the device: all that is known of it is its interface."""

    def __init__(self, array: np.ndarray, read_only: bool = False, **more: Any):
        self.mine = uploaded(array)
        found = self.mine.__cuda_array_interface__
        self.__cuda_array_interface__ = {**found, "data": (found["data"][0], read_only), "version": 2, **more}


class Tensor(Foreign):
    """As torch's."""


Tensor.__module__ = "torch"


class Parameter:
    """As torch's, which do not tell where they are while they require grad."""

    requires_grad = True

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")


# --- bare arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD-lr=0.1", "Adam", "LAMB", "NovoGrad-weight_decay=0.1"])
@pytest.mark.parametrize(("dtype", "shift"), [(np.float32, 0), (np.float32, 3), (np.float64, 1)])
def test_update_of_bare_arrays_is_that_of_the_cpu_wherever_they_begin(name, shift, dtype):
    rule = BY_NAME[name].rule
    begin = vectors(("p", "g", *rule.states), dtype)
    numbers = [np.array([0.5]) for _ in rule.numbers]
    ours, mine = there(begin, shift), [uploaded(number) for number in numbers]
    theirs = {key: array.copy() for key, array in begin.items()}
    for t in (1, 2):
        rule.update_(*ours.values(), *mine, t=t, lr=0.1, grad_scale=2.0, weight_decay=0.1)
        rule.update_(*theirs.values(), *numbers, t=t, lr=0.1, grad_scale=2.0, weight_decay=0.1)
    for key, expected in theirs.items():
        np.testing.assert_allclose(host(ours[key]), expected, rtol=8 * np.finfo(dtype).eps, err_msg=key)
    for found, expected in zip(mine, numbers, strict=True):
        np.testing.assert_allclose(host(found), expected, rtol=1e-6)
    assert host(ours["g"]).tobytes() == begin["g"].tobytes()


def overlapping() -> dict[str, Any]:
    whole = uploaded(np.ones(2 * N))
    return {"m": whole[:N], "v": whole[N - 1 : 2 * N - 1]}


BAD = {
    "one on the CPU": (
        lambda: {"g": np.ones(N)},
        T,
        r"^g: must be on a device, as p \(.*ndarray\) is, got a NumPy array; pass all",
    ),
    "the first on the CPU": (lambda: {"p": np.ones(N)}, T, r"^p: must be on a device, as g .* got a NumPy array"),
    "a list": (lambda: {"g": [1.0] * N}, T, r"^g: must be a 1-D array of the device, got list"),
    "None": (lambda: {"v": None}, T, r"^v: must be a 1-D array of the device, got NoneType"),
    "requires grad": (
        lambda: {"p": Parameter()},
        T,
        r"^p: must be .* got Parameter; it requires grad: .*detach\(\)",
    ),
    "ints": (lambda: {"g": uploaded(np.ones(N, np.int64))}, T, r"^g: must have dtype float32 or float64 .*int64"),
    "half": (lambda: {"p": uploaded(np.ones(N, np.float16))}, T, r"^p: must have dtype float32 or float64 .*float16"),
    "mixed": (
        lambda: {"m": uploaded(np.ones(N, np.float32))},
        T,
        r"^m: must have dtype float64 as p, got float32",
    ),
    "short": (lambda: {"g": uploaded(np.ones(N - 1))}, V, r"^g: must have 40 elements as p, got 39"),
    "2-D": (lambda: {"p": uploaded(np.ones((N, 1)))}, V, r"^p: must be 1-D, got shape \(40, 1\)"),
    "strided": (lambda: {"v": uploaded(np.ones(2 * N))[::2]}, V, r"^v: must be contiguous, got strides"),
    "misaligned": (
        lambda: {"m": uploaded(np.zeros(8 * N + 8, np.uint8))[1 : 8 * N + 1].view(np.float64)},
        V,
        r"^m: must be aligned to 8 bytes, got address 0x",
    ),
    "read-only": (
        lambda: {"p": Foreign(np.ones(N), read_only=True)},
        V,
        r"^p: must be writeable, .* got a read-only array",
    ),
    "overlap": (overlapping, V, r"^m and v: must not overlap in memory"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), BAD.values(), ids=BAD)
def test_bare_arrays_are_checked_before_anything_is_written(wrong, error, message):
    arrays = {**there(vectors()), **wrong()}
    own = [array for array in arrays.values() if isinstance(array, backend().array_type)]
    before = [host(array).tobytes() for array in own]
    with pytest.raises(error, match=message):
        rules.adam.update_(*arrays.values())
    assert [host(array).tobytes() for array in own] == before


def test_a_number_per_parameter_is_where_the_arrays_are():
    rule = BY_NAME["NovoGrad-weight_decay=0.1"].rule
    arrays = vectors(("p", "g", *rule.states))
    with pytest.raises(TypeError, match=r"^v: must be on 'cuda', as p is, got an array on 'cpu'"):
        rule.update_(*there(arrays).values(), np.zeros(1))
    with pytest.raises(TypeError, match=r"^v: must be on 'cpu', as p is"):
        rule.update_(*arrays.values(), uploaded(np.zeros(1)))


def test_arrays_of_other_libraries_are_updated_where_they_are():
    begin = vectors()
    foreign = {name: Foreign(array, read_only=name == "g") for name, array in begin.items()}
    rules.adam.update_(*foreign.values(), t=2)
    rules.adam.update_(*begin.values(), t=2)
    for name, expected in begin.items():
        np.testing.assert_allclose(host(foreign[name].mine), expected, rtol=1e-14)


# --- devices ----------------------------------------------------------------------------------------------------------


def on_device_1(array: np.ndarray) -> Any:
    with backend().xp.cuda.Device(1):
        return uploaded(array)


@simulator_only
def test_arrays_of_another_device_are_named_with_both():
    params, other = {"w": np.ones(3)}, {"w": on_device_1(np.ones(3))}
    with pytest.raises(
        ValueError, match=r"^parameter 'w': must be on device 0, the current one, got .* device 1; .*Device\(1\)"
    ):
        fastopt.Adam(other)
    opt = fastopt.Adam(params, backend="cuda")
    before = host(opt.flat.data).tobytes()
    for call in (opt.step, opt.accumulate):
        with pytest.raises(ValueError, match=r"^gradient 'w': must be on device 0, as its parameter, got .* device 1"):
            call(other)
    arrays = there(vectors())
    arrays["m"] = on_device_1(np.ones(N))
    with pytest.raises(ValueError, match=r"^m: must be on device 0, the current one, got an array on device 1"):
        rules.adam.update_(*arrays.values())
    arrays = {name: on_device_1(array) for name, array in vectors().items()}
    with pytest.raises(ValueError, match=r"^p: must be on device 0, the current one, got an array on device 1"):
        rules.adam.update_(*arrays.values())
    assert host(opt.flat.data).tobytes() == before
    assert opt.step_count == 0


def calls_of_a_layer() -> dict[str, Any]:
    """BatchNorm, each time with one array of device 1."""
    x, c = uploaded(np.arange(6.0).reshape(2, 3)), uploaded(np.ones(3))
    far, far_c = on_device_1(np.ones((2, 3))), on_device_1(np.ones(3))
    forward = fastopt.batchnorm_forward
    return {
        "x": lambda: forward(far),
        "gamma": lambda: forward(x, far_c, c),
        "beta": lambda: forward(x, c, far_c),
        "running_mean": lambda: forward(x, running_mean=far_c, running_var=c),
        "running_var": lambda: forward(x, running_mean=c, running_var=far_c),
        "residual": lambda: forward(x, residual=far),
        "out": lambda: forward(x, out=far),
        "dy": lambda: fastopt.batchnorm_backward(far, forward(x)[1]),
        "dgamma": lambda: fastopt.batchnorm_backward(x, forward(x, c)[1], dgamma=far_c),
    }


@simulator_only
@pytest.mark.parametrize(
    "name", ["x", "gamma", "beta", "running_mean", "running_var", "residual", "out", "dy", "dgamma"]
)
def test_batchnorm_names_the_array_of_another_device(name):
    with pytest.raises(ValueError, match=rf"^{name}: must be on device 0, the current one, got an array on device 1"):
        calls_of_a_layer()[name]()


def test_what_overlaps_is_refused_where_such_a_pass_was_made_before():
    x, dy, y = (uploaded(np.arange(6.0).reshape(2, 3)) for _ in range(3))
    c = [uploaded(np.ones(3)) for _ in range(4)]
    forward, backward = fastopt.batchnorm_forward, fastopt.batchnorm_backward
    for _ in range(2):
        saved = forward(x, *c, out=y)[1]
        backward(dy, saved, out=y, dgamma=c[0], dbeta=c[1])
    saved = forward(x, *c)[1]
    row = y.reshape(-1)[3:]
    for name, call in {
        "running_var": lambda: forward(x, c[0], c[1], c[2], c[2]),
        "running_mean": lambda: forward(x, c[2], *c[1:]),
        "out": lambda: forward(x, *c, out=x),
        "out again": lambda: forward(x, row, *c[1:], out=y),
        "dgamma": lambda: backward(dy, saved, out=y, dgamma=row),
        "dbeta": lambda: backward(dy, saved, dgamma=c[0], dbeta=c[0]),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name.split()[0]}: must (not|share no)"):
            call()
    assert not saved.used


@simulator_only
def test_an_array_of_another_device_is_not_copied_unasked():
    """CuPy's `asarray` copies it to the current device: what is then written, or read later, is the copy."""
    opt = fastopt.Adam({"w": np.ones((3, 2))}, backend="cuda")
    other = on_device_1(np.ones((3, 2)))
    tells = r": must be on device 0, .*, got an array on device 1"
    with pytest.raises(ValueError, match=r'^opt\.params\["w"\]' + tells):
        opt.params["w"] = other
    with pytest.raises(ValueError, match=r"^parameter 'w'" + tells):
        opt.set_params({"w": other})
    with pytest.raises(ValueError, match=r"^rows\['w'\]: row_grads" + tells):
        opt.step_rows({"w": (np.arange(3), other)})
    with pytest.raises(ValueError, match=r"^X" + tells):
        fastopt.minibatches(other, batch_size=2)
    assert host(opt.params["w"]).tolist() == [[1.0] * 2] * 3
    assert opt.step_count == 0


@simulator_only
@pytest.mark.parametrize("name", ADAM)
def test_an_array_of_another_library_that_cupy_would_copy_is_refused(name):
    foreign: dict[str, Any] = {key: Foreign(array) for key, array in vectors().items()}
    before = [host(array.mine).tobytes() for array in foreign.values()]
    with backend().xp.cuda.Device(1):
        foreign[name] = Foreign(np.ones(N))
    with pytest.raises(ValueError, match=rf"^{name}: must be on device 0, the current one, got .* another device"):
        rules.adam.update_(*foreign.values())
    assert [host(array.mine).tobytes() for key, array in foreign.items() if key != name] == [
        old for key, old in zip(foreign, before, strict=True) if key != name
    ]
    opt = fastopt.SGD({"p": np.ones(N)}, backend="cuda")
    with pytest.raises(ValueError, match=r"^gradient 'p': must be on device 0, .* another device"):
        opt.step({"p": foreign[name]})
    with pytest.raises(ValueError, match=r"^parameter 'p': must be on device 0, .* another device"):
        fastopt.SGD({"p": foreign[name]})


@simulator_only
def test_an_optimizer_works_where_its_arrays_are():
    opt = fastopt.SGD({"w": np.ones(3)}, backend="cuda", lr=1.0)
    with backend().xp.cuda.Device(1):
        with pytest.raises(
            ValueError, match=r"^the arrays are on device 0, and the current device is 1: .*Device\(0\)"
        ):
            opt.step()
        there_too = fastopt.SGD({"w": np.ones(3)}, backend="cuda", lr=1.0)
        there_too.step({"w": uploaded(np.ones(3))})
        assert there_too.flat.data.device.id == 1
    assert opt.step_count == 0
    opt.step({"w": uploaded(np.ones(3))})
    assert host(opt.params["w"]).tolist() == host(there_too.params["w"]).tolist() == [0.0] * 3


# --- owners and streams -----------------------------------------------------------------------------------------------


def test_views_of_one_array_are_refused_where_their_elements_are_the_same():
    whole = uploaded(np.ones((5, 4)))
    tied = {"a": whole[:3], "c": uploaded(np.ones(2)), "layer": [whole[2:]]}
    for copies in (True, False):
        with pytest.raises(V, match=r"^parameters 'a' and 'layer\.0': must not overlap in memory"):
            fastopt.SGD(tied, copy=copies)
    with pytest.raises(V, match=r"^parameters 'a' and 'b': must not overlap in memory"):
        fastopt.SGD({"a": whole[::2], "b": whole[:, 1]})
    assert fastopt.pack({"a": whole[::2], "b": whole[1::2]}).backend == "cuda"
    opt = fastopt.SGD({"a": whole[0:1], "b": whole[2:3]}, lr=1.0, copy=False)
    opt.step({"a": whole[1:2], "b": whole[3:4]})
    assert not host(whole)[::2][:2].any()
    with pytest.raises(V, match=r"^gradient 'b': must not overlap the parameters in memory"):
        opt.step({"a": whole[1:2], "b": whole[0:1]})
    with pytest.raises(V, match=r"^parameters 'a' and 'c': must not overlap in memory"):
        opt.add({"c": whole[:1]})


def test_a_number_is_the_gradient_of_a_0_d_parameter():
    opt = fastopt.SGD({"s": uploaded(np.zeros((), np.float32))}, lr=1.0)
    for value in (0.25, np.float64(0.25), np.array(0.25), uploaded(np.array(0.25))):
        opt.step({"s": value})
    assert host(opt.params["s"]) == -1.0
    for wrong in (True, "1", 1j, np.array([0.25], np.float32)):
        with pytest.raises((T, V), match=r"^gradient 's': must "):
            opt.step({"s": wrong})


def test_memory_outlives_its_owner_where_it_is_used_and_is_let_go_where_it_was_copied():
    owner = Foreign(np.arange(3.0))
    watched = weakref.ref(owner)
    adopted = backend().adopt(owner)
    opt = fastopt.SGD({"w": owner}, lr=1.0)
    opt.step({"w": owner})  # copied as well
    del owner
    gc.collect()
    assert watched() is not None, "the owner of memory in use was let go"
    assert host(adopted).tolist() == [0.0, 1.0, 2.0]
    del adopted
    gc.collect()
    assert watched() is None, "the optimizer keeps what it has copied"
    assert host(opt.params["w"]).tolist() == [0.0, 0.0, 0.0]


@simulator_only
def test_torch_must_be_on_the_stream_of_cupy(monkeypatch):
    """Its interface names no stream, so that nobody waits for it: what it still writes would be read."""
    ours = backend().xp.cuda.get_current_stream().ptr
    current = SimpleNamespace(cuda_stream=ours)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda: current)))
    opt = fastopt.SGD({"w": Tensor(np.ones(2))}, lr=1.0)
    opt.step({"w": Tensor(np.ones(2))})
    current.cuda_stream = 0xABC
    tells = r"current stream of torch \(0xabc\) is not that of CuPy \(0x0\).*cupy\.cuda\.ExternalStream"
    with pytest.raises(ValueError, match=r"^gradient 'w': the " + tells):
        opt.step({"w": Tensor(np.ones(2))})
    with pytest.raises(ValueError, match=r"^parameter 'w': the " + tells):
        fastopt.SGD({"w": Tensor(np.ones(2))})
    with pytest.raises(ValueError, match=r"^p: the " + tells):
        rules.sgd.update_(Tensor(np.ones(2)), Tensor(np.ones(2)))
    assert (opt.step_count, host(opt.params["w"]).tolist()) == (1, [0.0, 0.0])


def test_a_stream_that_an_array_names_is_left_to_cupy(monkeypatch):
    """`asarray` waits for it; so every foreign array has to come in by it."""
    xp, seen = backend().xp, []
    original = xp.asarray
    monkeypatch.setattr(xp, "asarray", lambda source, *more: seen.append(source) or original(source, *more))
    gradient = Foreign(np.ones(2), version=3, stream=1)
    opt = fastopt.SGD({"w": np.ones(2)}, backend="cuda")
    opt.step({"w": gradient})
    assert any(source is gradient for source in seen)


@pytest.mark.parametrize("kind", ["parameter", "gradient"])
def test_a_tensor_that_requires_grad_is_told_what_to_do(kind):
    call = fastopt.SGD if kind == "parameter" else fastopt.SGD({"w": np.ones(2)}, backend="cuda").step
    message = rf"^{kind} 'w': must be .*, got .*Parameter.*it requires grad: pass tensor\.detach\(\)"
    with pytest.raises(TypeError, match=message):
        call({"w": Parameter()})
    with pytest.raises(TypeError, match=r"^X: must be an array without a gradient, got Parameter; use detach\(\)"):
        fastopt.minibatches(Parameter())


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_sizes_beyond_32_bits_are_cut_without_gaps(whole):
    """Nothing is allocated but the table of chunks: about 35 MB for 3,000,000,000 elements."""
    from fastopt.kernels.cuda.backend import columns_of, cut, spans_of
    from fastopt.kernels.cuda.sums import Span

    sizes = (3_000_000_000, 5, 2**31 + 1)
    layout = Layout.of([(size,) for size in sizes])
    lines = cut(layout.chunks([0, 1, 0], whole=whole))
    assert lines.dtype == np.int64
    columns = columns_of(lines)
    lengths = columns.stop - columns.start
    assert lengths.min() > 0
    assert lengths.max() <= BLOCK
    assert columns.start.max() > 2**31
    assert (columns.grad == columns.start).all()
    for param, size in enumerate(sizes):
        own = columns_of(lines[columns.place == param])
        assert (own.start[0], own.stop[-1]) == (0, size)
        assert (own.start[1:] == own.stop[:-1]).all()
    if whole:
        assert (columns.block == np.arange(len(lines))).all()
        spans = [Span(*span) for span in spans_of(lines).tolist()]
        assert [(span.place, span.group) for span in spans] == [(0, 0), (1, 1), (2, 0)]
        assert [span.block for span in spans[1:]] == [span.end for span in spans[:-1]]
        assert spans[-1].end == len(lines)
