"""`fastopt train --backend cuda`, its network, and mini-batches on a device: in numba's simulator, or on a GPU (--gpu).

NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_train.py
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fastopt
from fastopt.cli.app import app
from fastopt.cli.network import backward, evaluate, forward, module_of, new_layers, new_norms
from fastopt.cli.trainer import Stopwatch
from fastopt.kernels import get_backend

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") == "1"
SMALL = ("--data", "breast-cancer", "--hidden", "4", "--batch-size", "152")  # 3 steps an epoch


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> None:
    if not SIMULATED and not request.config.getoption("--gpu"):
        pytest.skip("needs numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1, as in CI) or a GPU (--gpu)")


def train(tmp_path: Any, *arguments: Any) -> dict[str, Any]:
    path = tmp_path / "run.json"
    result = CliRunner().invoke(app, ["train", *map(str, arguments), "--json", str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return {**json.loads(path.read_text(encoding="utf-8")), "printed": result.output}


def uploaded(array: np.ndarray) -> Any:
    return get_backend("cuda").adopt(array)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "nesterov:lookahead,schedulefreeadamw"])
def test_a_run_is_that_of_the_cpu(tmp_path, optimizer):
    found, expected = (
        train(tmp_path, *SMALL, "--optimizer", optimizer, "--epochs", 2, "--backend", name) for name in ("cuda", "cpu")
    )
    assert found["settings"] == {**expected["settings"], "backend": "cuda"}
    assert "on cuda" in found["printed"]
    assert "between two events on the device" in found["printed"]
    for ours, cpu in zip(found["runs"], expected["runs"], strict=True):
        assert ours["losses"] == pytest.approx(cpu["losses"], rel=1e-5)
        assert ours["losses"][-1] < 0.9 * ours["losses"][0]
        for name in ("train_accuracy", "test_accuracy"):
            assert ours[name] == pytest.approx(cpu[name], abs=0.01)
        assert ours["optimizer_microseconds_per_step"] > 0


def test_batch_norm_trains_on_the_device(tmp_path):
    # Plain descent: Adam makes whole steps of what rounding leaves of the gradient of a bias before a norm, which is 0.
    data = ("--data", "breast-cancer", "--hidden", "3", "--batch-size", "full", "--epochs", 1)
    arguments = (*data, "--optimizer", "sgd", "--batch-norm")
    found, expected = (train(tmp_path, *arguments, "--backend", name) for name in ("cuda", "cpu"))
    assert [run["batch_norm"] for run in found["runs"]] == [False, True]
    for ours, cpu in zip(found["runs"], expected["runs"], strict=True):
        assert ours["losses"] == pytest.approx(cpu["losses"], rel=1e-4)


def test_a_run_is_continued_to_the_bit_and_only_where_it_was(tmp_path):
    arguments = (*SMALL, "--backend", "cuda", "--epochs")
    unbroken = train(tmp_path, *arguments, 2)
    kept = tmp_path / "run.safetensors"
    train(tmp_path, *arguments, 1, "--checkpoint", kept)
    resumed = train(tmp_path, *arguments, 2, "--checkpoint", kept, "--resume")
    assert resumed["runs"][0]["parameters_sha256"] == unbroken["runs"][0]["parameters_sha256"]
    assert resumed["runs"][0]["losses"] == unbroken["runs"][0]["losses"]
    elsewhere = ["train", *SMALL, "--epochs", "2", "--checkpoint", str(kept), "--resume"]
    refused = CliRunner().invoke(app, elsewhere, env={"COLUMNS": "200"})
    assert refused.exit_code == 2
    assert "--backend: must be cuda as in" in refused.output
    assert "got cpu" in refused.output


@pytest.mark.skipif(not SIMULATED, reason="counts what the simulator is asked for")
def test_the_device_is_asked_once_an_epoch_and_not_at_every_step(tmp_path, monkeypatch):
    from fastopt.kernels.cuda import simulated

    asked: list[str] = []
    for name in ("__float__", "__bool__", "__int__", "item", "tolist"):
        original = getattr(np.ndarray, name)
        monkeypatch.setattr(
            simulated.ndarray, name, lambda self, original=original: asked.append("") or original(self), raising=False
        )
    counts = []
    for rows in (455, 100):
        asked.clear()
        train(
            tmp_path,
            "--data",
            "breast-cancer",
            "--hidden",
            "2",
            "--batch-size",
            rows,
            "--backend",
            "cuda",
            "--epochs",
            2,
        )
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0


# --- the network ------------------------------------------------------------------------------------------------------


def test_the_network_is_the_same_on_both_sides():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(6, 5)), rng.integers(0, 3, 6)
    found = []
    for backend in ("cpu", "cuda"):
        layers = new_layers([5, 4, 3], fastopt.init.he_normal_, np.random.default_rng(1), np.float64)
        layers, norms = new_norms(layers, backend)
        opt = fastopt.SGD(layers, backend=backend)
        norms[0].attach(opt.params[0].bn, opt.grads[0].bn)
        xp = module_of(opt.flat.data)
        there = xp.asarray(x), xp.asarray(labels)
        loss = backward(opt.params, *there, out=opt.grads, norms=norms)
        assert isinstance(loss, get_backend(opt.flat.backend).array_type | np.floating)
        host = get_backend(opt.flat.backend).host
        found.append([float(loss), *evaluate(opt.params, *there, norms), *host(opt.flat.grad)])
        assert forward(opt.params, there[0], norms)[-1].shape == (6, 3)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12, atol=1e-15)


def test_a_stopwatch_reads_what_was_between_two_events():
    opt = fastopt.SGD([np.zeros(3, np.float32)], backend="cuda")
    watch = Stopwatch(module_of(opt.flat.data))
    watch.time(opt.step)
    watch.time(opt.step)
    both = watch.read()
    assert 0.0 < both < 5.0
    assert watch.read() == 0.0
    assert opt.step_count == 2


# --- mini-batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"rng": 3}, {"shuffle": False}, {"batch_size": "full"}, {"rng": 3, "drop_last": True}]
)
def test_minibatches_of_a_device_hold_the_rows_that_numpys_would(options):
    X = np.arange(22.0).reshape(11, 2)
    y, weights = np.arange(11), np.linspace(0.0, 1.0, 11)
    options = {"batch_size": 4, **options}
    ours = fastopt.minibatches(uploaded(X), uploaded(y), uploaded(weights), **options)
    theirs = fastopt.minibatches(X, y, weights, **options)
    kind, host = get_backend("cuda").array_type, get_backend("cuda").host
    for _ in range(2):
        for found, expected in zip(ours, theirs, strict=True):
            assert [type(part) for part in found] == [kind] * 3
            for part, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(host(part), wanted)


def test_minibatches_are_of_one_place():
    X, y = np.zeros((4, 2)), np.zeros(4)
    with pytest.raises(TypeError, match=r"must all be on one backend, got X on 'cuda', y on 'cpu'"):
        fastopt.minibatches(uploaded(X), y)
    with pytest.raises(ValueError, match=r"X: must have a first axis that counts the rows"):
        fastopt.minibatches(uploaded(np.zeros(())))
