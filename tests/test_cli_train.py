"""`fastopt train`: its network's gradients, names, results, files and errors; one seed has one result."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scripts import on_terminal
from typer.testing import CliRunner

import fastopt
from fastopt.checkpoint import describe
from fastopt.cli import data
from fastopt.cli.app import app
from fastopt.cli.choices import (
    FORMS,
    INITS,
    LEARNING_RATES,
    SCHEDULES,
    optimizers,
    parse_batch_size,
    parse_hidden,
    parse_optimizer,
    parse_optimizers,
)
from fastopt.cli.network import Layer, backward, evaluate, forward, new_layers, new_norms, softmax_cross_entropy
from fastopt.cli.plots.losses import draw_losses
from fastopt.cli.plots.style import COLOURS
from fastopt.cli.resume import Keeper
from fastopt.cli.trainer import train_network

ROOT = Path(__file__).parents[1]


def plain(text):
    """Return text without colours, frames and line breaks, independent of the terminal's width."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def invoke(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


def run_json(tmp_path, *arguments):
    """Return the JSON of a successful run."""
    path = tmp_path / "run.json"
    result = invoke(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text(encoding="utf-8"))


def command(*arguments, code=None, **environment):
    """Start the command in a separate process."""
    program = ["-m", "fastopt"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def without_times(report):
    return {
        **report,
        "runs": [{key: value for key, value in run.items() if "seconds" not in key} for run in report["runs"]],
    }


# --- the network ------------------------------------------------------------------------------------------------------


def small_problem(classes, hidden=(4, 3), rows=7):
    rng = np.random.default_rng(classes)
    layers = new_layers([5, *hidden, classes], fastopt.init.xavier_normal_, rng, np.float64)
    for layer in layers:
        layer.b[...] = rng.normal(size=layer.b.shape)
    return layers, rng.normal(size=(rows, 5)), rng.integers(0, classes, rows)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)])
def test_gradients_equal_numerical_ones(classes, hidden):
    layers, x, labels = small_problem(classes, hidden)
    gradients = [Layer(np.full_like(W, np.nan), np.full_like(b, np.nan)) for W, b, _ in layers]
    backward(layers, x, labels, out=gradients)
    h = 1e-6
    for layer, gradient in zip(layers, gradients, strict=True):
        for values, slopes in zip(layer[:2], gradient[:2], strict=True):
            for index in np.ndindex(values.shape):
                kept = values[index]
                values[index] = kept + h
                above, _ = evaluate(layers, x, labels)
                values[index] = kept - h
                below, _ = evaluate(layers, x, labels)
                values[index] = kept
                assert slopes[index] == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-8)


def test_gradients_through_batch_norm_equal_numerical_ones():
    layers, x, labels = small_problem(3)
    layers, norms = new_norms(layers)
    opt = fastopt.SGD(layers, lr=0.0)
    for norm, params, grads in zip(norms, opt.params, opt.grads, strict=False):
        norm.attach(params.bn, grads.bn)
        params.bn["gamma"][...] = np.linspace(0.5, 1.5, norm.num_features)
        params.bn["beta"][...] = np.linspace(-0.2, 0.3, norm.num_features)
    assert opt.flat.paths[:4] == ("0.W", "0.b", "0.bn.beta", "0.bn.gamma")
    backward(opt.params, x, labels, out=opt.grads, norms=norms)
    slopes = opt.flat.grad.copy()

    def loss():
        return softmax_cross_entropy(forward(opt.params, x, norms, training=True)[-1], labels)[0]

    h = 1e-6
    for index in np.flatnonzero(slopes):
        kept = opt.flat.data[index]
        opt.flat.data[index] = kept + h
        above = loss()
        opt.flat.data[index] = kept - h
        below = loss()
        opt.flat.data[index] = kept
        assert slopes[index] == pytest.approx((above - below) / (2 * h), rel=1e-4, abs=1e-8)
    assert np.count_nonzero(slopes) > 0.8 * sum(opt.flat.layout.sizes) - 7  # all except biases before a norm


def test_backward_writes_into_the_flat_buffer_and_changes_nothing_else():
    layers, x, labels = small_problem(3)
    opt = fastopt.SGD(layers, lr=0.5)
    assert opt.flat.paths == ("0.W", "0.b", "1.W", "1.b", "2.W", "2.b")
    before = opt.flat.data.copy(), x.copy()
    loss = backward(opt.params, x, labels, out=opt.grads)
    np.testing.assert_array_equal(opt.flat.data, before[0])
    np.testing.assert_array_equal(x, before[1])
    assert loss == evaluate(layers, x, labels)[0]
    for gradient in opt.grads:
        assert np.shares_memory(gradient.W, opt.flat.grad)
        assert gradient.W.any()
        assert gradient.b.any()
    opt.step()
    assert evaluate(opt.params, x, labels)[0] < loss


def test_forward_is_relu_between_affine_maps():
    layers, x, _ = small_problem(3, hidden=(4,))
    (W1, b1, _), (W2, b2, _) = layers
    hidden = np.where(x @ W1 + b1 > 0, x @ W1 + b1, 0)
    inputs, into_last, logits = forward(layers, x)
    assert inputs is x
    np.testing.assert_allclose(into_last, hidden, rtol=1e-15)
    np.testing.assert_allclose(logits, hidden @ W2 + b2, rtol=1e-13)


def test_softmax_cross_entropy_of_equal_and_of_huge_logits():
    loss, gradient = softmax_cross_entropy(np.zeros((2, 4)), np.array([0, 3]))
    assert loss == pytest.approx(math.log(4))
    np.testing.assert_allclose(gradient, [[-0.375, 0.125, 0.125, 0.125], [0.125, 0.125, 0.125, -0.375]])
    loss, gradient = softmax_cross_entropy(np.array([[1e4, 0.0], [1e4, 0.0]]), np.array([0, 1]))
    assert loss == pytest.approx(5e3)
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [0.5, -0.5]])


def test_evaluate_counts_the_rows_whose_largest_logit_is_their_label():
    layers = [Layer(np.eye(2), np.zeros(2))]
    assert (
        evaluate(layers, np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 2.0], [5.0, 4.0]]), np.array([0, 1, 1, 0]))[1] == 0.75
    )


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "features", "classes"), [("digits", 1797, 64, 10), ("breast-cancer", 569, 30, 2)]
)
def test_data_is_split_and_standardised_by_its_training_rows(name, rows, features, classes):
    found = data.load(name, np.random.default_rng(3))
    assert found.classes == classes == len(np.unique(found.y_train))
    assert len(found.x_test) == len(found.y_test) == round(0.2 * rows)
    assert len(found.x_train) == len(found.y_train) == rows - len(found.x_test)
    assert found.x_train.shape[1] == found.x_test.shape[1] == features
    assert found.x_train.dtype == found.x_test.dtype == np.float32
    np.testing.assert_allclose(found.x_train.mean(axis=0), 0.0, atol=1e-5)
    deviation = found.x_train.std(axis=0, dtype=np.float64)
    np.testing.assert_allclose(deviation[deviation > 0], 1.0, atol=1e-5)
    assert abs(found.x_test.mean(axis=0)).max() > 1e-3  # the test rows did not contribute
    assert np.isfinite(found.x_test).all()


def test_the_split_follows_the_seed():
    first, same, other = (data.load("breast-cancer", np.random.default_rng(seed)) for seed in (1, 1, 2))
    for a, b in zip(first, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.y_test, other.y_test)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "kind", "options", "lr"),
    [
        ("adam", "adam", "Adam", {}, None),
        (" RMSprop ", "rmsprop", "RMSprop", {}, None),
        ("momentum:ema", "momentum:ema", "Momentum", {"form": "ema"}, None),
        ("momentum:form=ema", "momentum:ema", "Momentum", {"form": "ema"}, None),
        ("momentum:ema:momentum=0.5", "momentum:ema:momentum=0.5", "Momentum", {"form": "ema", "momentum": 0.5}, None),
        ("adam:amsgrad", "adam:amsgrad", "Adam", {"amsgrad": True}, None),
        ("adam:amsgrad=false", "adam:amsgrad=false", "Adam", {"amsgrad": False}, None),
        ("adam:betas=0.8/0.99", "adam:betas=0.8/0.99", "Adam", {"betas": (0.8, 0.99)}, None),
        ("sgd:lr=0.25", "sgd:lr=0.25", "SGD", {}, 0.25),
    ],
)
def test_an_optimizer_is_a_name_with_options(text, label, kind, options, lr):
    choice = parse_optimizer(text)
    assert (choice.label, choice.kind.__name__, choice.options, choice.given_lr) == (label, kind, options, lr)


def test_all_is_every_class_and_every_form_once():
    labels = [choice.label for choice in parse_optimizers(["sgd", "all,adam"])]
    names = {name.lower() for name in fastopt.Optimizer.classes} - {"sophia"}  # whose Hessian nothing here computes
    assert sorted(labels) == sorted([*names, *FORMS])
    assert labels[0] == "sgd"


def test_lr_applies_to_optimizers_without_their_own():
    a, b = parse_optimizers(["adam:lr=0.5,sgd"], lr=0.25)
    assert (a.lr(1), b.lr(1)) == (0.5, 0.25)


def test_suggested_learning_rates_belong_to_optimizers_and_grow_with_the_root_of_the_batch():
    for name in LEARNING_RATES:
        choice = parse_optimizer(name)
        assert choice.lr(32) == LEARNING_RATES[name]
        assert choice.lr(128) == pytest.approx(2 * choice.lr(32))
    assert parse_optimizer("momentum:lr_inside").lr(32) == LEARNING_RATES["momentum"]


def test_an_optimizer_without_a_suggestion_uses_the_default_of_its_class(monkeypatch):
    monkeypatch.delitem(LEARNING_RATES, "adagrad")
    assert parse_optimizer("adagrad").lr(32) == 0.01


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1350])
def test_schedules_stay_between_zero_and_lr_and_reach_it(name, steps):
    made = SCHEDULES[name][1](0.5, steps)
    values = [made(t) if callable(made) else made for t in range(steps)]
    assert min(values) >= 0.0
    assert max(values) <= 0.5 + 1e-12
    if steps >= 1000:
        assert max(values) > 0.49
        assert name == "constant" or values[0] != values[-1]


@pytest.mark.parametrize(("text", "size"), [("full", "full"), ("1", 1), ("100000", 100000)])
def test_batch_sizes(text, size):
    assert parse_batch_size(text) == size


@pytest.mark.parametrize(("text", "widths"), [("none", []), ("8", [8]), ("8, 4", [8, 4])])
def test_hidden_layers(text, widths):
    assert parse_hidden(text) == widths


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_defaults_pass_95_percent_for_every_seed(tmp_path, seed):
    (run,) = run_json(tmp_path, "--seed", seed)["runs"]
    assert run["optimizer"] == "adam"
    assert run["test_accuracy"] > 0.95


def test_the_report_describes_the_run(tmp_path):
    report = run_json(tmp_path, "--epochs", 3, "-o", "sgd", "--lr", 0.125, "--schedule", "cosine", "--seed", 7)
    assert report["fastopt"] == fastopt.__version__
    settings = report["settings"]
    assert settings["training_rows"] + settings["test_rows"] == 1797
    assert settings["layers"] == [64, 128, 32, 10]
    assert (settings["epochs"], settings["schedule"], settings["seed"]) == (3, "cosine", 7)
    (run,) = report["runs"]
    assert run["lr"] == 0.125
    assert run["steps"] == settings["steps"] == 3 * math.ceil(settings["training_rows"] / settings["batch_size"])
    assert len(run["losses"]) == 4
    assert run["losses"][0] > run["losses"][-1] == run["loss"]
    assert 0 < run["optimizer_microseconds_per_step"] * run["steps"] * 1e-6 < run["seconds"]
    assert re.fullmatch("[0-9a-f]{64}", run["parameters_sha256"])


def test_the_table_shows_every_optimizer_and_column():
    result = invoke("-o", "sgd,adam", "-o", "momentum:ema", "--epochs", 2, "--data", "breast-cancer")
    assert result.exit_code == 0
    lines = plain(result.output.replace("\n", " ; "))
    for heading in ("optimizer", "lr", "loss", "train", "test", "accuracy", "seconds", "us per", "step"):
        assert heading in lines
    for name in ("sgd", "adam", "momentum:ema"):
        assert re.search(rf"; {name} [0-9.e-]+ [0-9.]+ [0-9.]+% [0-9.]+% [0-9.]+ [0-9.]+ ;", lines), lines
    assert "455 training rows" in lines
    assert "114 test rows" in lines


def test_the_table_fits_eighty_columns():
    result = CliRunner().invoke(app, ["train", "-o", "momentum:lr_inside", "--epochs", "1"], env={"COLUMNS": "80"})
    assert max(map(len, result.output.splitlines())) <= 80
    assert "momentum:lr_inside" in result.output


@pytest.mark.parametrize("size", ["1", "7", "full", "455"])
def test_every_batch_size_learns(tmp_path, size):
    epochs = 2 if size == "1" else 40
    report = run_json(tmp_path, "-o", "sgd,adam", "--data", "breast-cancer", "--batch-size", size, "--epochs", epochs)
    for run in report["runs"]:
        assert run["test_accuracy"] > 0.9, run["optimizer"]
        assert run["steps"] == epochs * {"1": 455, "7": 65, "full": 1, "455": 1}[size]


def test_a_batch_of_more_rows_than_there_are_is_refused():
    result = invoke("--data", "breast-cancer", "--batch-size", 456)
    assert result.exit_code == 2
    message = "--batch-size: must be at most the 455 training rows of breast-cancer, or full, got 456"
    assert message in plain(result.output)


def test_rprop_on_mini_batches_is_explained():
    note = "needs full batches: it follows the signs of gradients"
    arguments = ("--data", "breast-cancer", "--epochs", 1)
    assert f"rprop {note}" in plain(invoke("-o", "adam,rprop", *arguments).output)
    assert note not in plain(invoke("-o", "adam,rprop", "--batch-size", "full", *arguments).output)
    assert note not in plain(invoke("-o", "adam", *arguments).output)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_learns(tmp_path, name):
    (run,) = run_json(tmp_path, "--data", "breast-cancer", "--schedule", name)["runs"]
    assert run["test_accuracy"] > 0.9


@pytest.mark.parametrize("name", INITS)
def test_every_init_runs_and_all_but_zeros_learn(tmp_path, name):
    (run,) = run_json(tmp_path, "--init", name, "--epochs", 15)["runs"]
    if name == "zeros":
        assert run["losses"][0] == pytest.approx(math.log(10), rel=1e-6)
        assert run["test_accuracy"] < 0.2
    else:
        assert run["test_accuracy"] > 0.9


def test_no_hidden_layer_is_softmax_regression_that_learns_from_zeros(tmp_path):
    report = run_json(tmp_path, "--hidden", "none", "--init", "zeros")
    assert report["settings"]["layers"] == [64, 10]
    assert report["runs"][0]["test_accuracy"] > 0.9


def test_a_single_step_has_no_time_per_step(tmp_path):
    report = run_json(tmp_path, "--epochs", 1, "--batch-size", "full", "--data", "breast-cancer")
    assert report["runs"][0]["steps"] == 1
    assert report["runs"][0]["optimizer_microseconds_per_step"] is None


def test_a_diverging_run_is_reported_and_the_others_continue(tmp_path):
    path, picture = tmp_path / "run.json", tmp_path / "curves.png"
    result = invoke("-o", "sgd:lr=1e30,adam", "--epochs", 4, "--json", path, "--plot", picture)
    assert result.exit_code == 0
    assert "sgd:lr=1e+30 diverged: its loss after epoch 1 is not finite" in plain(result.output)
    bad, good = json.loads(path.read_text())["runs"]
    assert (bad["status"], bad["diverged_in_epoch"], bad["loss"], bad["test_accuracy"]) == ("diverged", 1, None, None)
    assert len(bad["losses"]) == 2
    assert (good["status"], good["diverged_in_epoch"], len(good["losses"])) == ("trained", None, 5)
    assert picture.stat().st_size > 10_000


def test_lookahead_takes_every_gradient_at_the_look_ahead_point():
    rows = data.load("breast-cancer", np.random.default_rng(0))
    layers = new_layers([30, 8, 2], fastopt.init.he_normal_, np.random.default_rng(0))
    trained = {}
    for form in ("lookahead", "reformulated"):
        opt = trained[form] = fastopt.Nesterov(layers, lr=0.01, form=form)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a step outside `lookahead` would warn
            rng = np.random.default_rng(0)
            train_network(opt, rows, epochs=3, batch_size=64, rng=rng, looks_ahead=form == "lookahead")
    # The look-ahead points of one form are the parameters of the other, if gradients are taken at the former.
    with trained["lookahead"].lookahead():
        np.testing.assert_allclose(trained["lookahead"].flat.data, trained["reformulated"].flat.data, atol=1e-5)
    assert abs(trained["lookahead"].flat.data - trained["reformulated"].flat.data).max() > 1e-3


# --- one seed, one result ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result_and_another_seed_another(tmp_path):
    def run(seed):
        return without_times(run_json(tmp_path, "-o", "adam,nesterov:lookahead", "--epochs", 2, "--seed", seed))

    first, second, other = run(4), run(4), run(5)
    assert first == second
    assert first["runs"][0]["parameters_sha256"] != other["runs"][0]["parameters_sha256"]


def test_an_optimizer_does_not_depend_on_the_others(tmp_path):
    (alone,) = without_times(run_json(tmp_path, "-o", "adam", "--epochs", 2))["runs"]
    *_, last = without_times(run_json(tmp_path, "-o", "sgd,rmsprop,adam", "--epochs", 2))["runs"]
    assert alone == last


def test_the_result_does_not_depend_on_the_number_of_threads():
    # With 256 x 256 weights a step runs on two threads; OpenBLAS would also use two for products of all 1438 rows, and
    # its sums would differ in the last bit.
    arguments = [
        "train",
        "-o",
        "adam,lamb",
        "--hidden",
        "256,256",
        "--batch-size",
        "full",
        "--epochs",
        4,
        "--json",
        "-",
    ]
    started = [
        command(*arguments, NUMBA_NUM_THREADS=n, OPENBLAS_NUM_THREADS=n, OMP_WAIT_POLICY="passive") for n in ("1", "2")
    ]
    reports = []
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        reports.append(without_times(json.loads(out)))
    assert reports[0] == reports[1]


# --- all optimizers, and their figure ---------------------------------------------------------------------------------


def assert_whole_picture(path, colours):
    """Check that the picture has the expected colours, and that nothing crosses its edges."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    height, width, _ = pixels.shape
    assert width >= 1000
    assert height >= 600
    for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (edge == 255).all()
    drawn = {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
    for colour in colours:
        assert tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5)) in drawn


def test_all_optimizers_learn_and_are_drawn(tmp_path):
    # Run in a separate process: `all` would include optimizers that other tests define.
    picture = tmp_path / "curves.png"
    process = command("train", "--optimizer", "all", "--plot", picture, "--json", "-", MPLBACKEND="qtagg")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    runs = {run["optimizer"]: run for run in json.loads(out)["runs"]}
    assert set(FORMS) < set(runs)
    assert len(runs) >= 25
    for name, run in runs.items():
        assert run["status"] == "trained", name
        if name == "rprop":  # rprop needs full batches: the signs of gradients of 32 rows keep changing
            continue
        assert run["loss"] < 0.02 * run["losses"][0], name
        assert run["test_accuracy"] > 0.94, name
        assert name in errors  # the table goes to standard error because of the JSON
    assert_whole_picture(picture, COLOURS)


def test_extreme_curves_are_drawn(tmp_path):
    path = tmp_path / "curves.png"
    curves = {
        "exploded": [2.3, 1e12, 1e30],
        "diverged": [2.3, math.nan],
        "flat": [2.3, 2.3, 2.3],
        "to zero": [2.3, 1e-3, 0.0],
        **{f"number {k}": [2.3, 1.0 / k] for k in range(1, 30)},
    }
    draw_losses(path, "a title that is longer than the picture is wide, " * 5, curves)
    assert_whole_picture(path, COLOURS[:1])


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_other_formats_by_the_ending(tmp_path, ending):
    path = tmp_path / f"curves.{ending}"
    result = invoke("--data", "breast-cancer", "--epochs", 1, "--plot", path)
    assert result.exit_code == 0, result.output
    assert f"loss curves: {path}" in result.output
    assert path.read_bytes().startswith({"pdf": b"%PDF", "svg": b"<?xml"}[ending])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["-o", "adma"], ["--optimizer", "optimizer: must be one of", "'adma'; did you mean", "'adam'", *optimizers()]),
        (["-o", ""], ["--optimizer", "must be one of", "adam", "got ''"]),
        (["-o", "adam,,sgd"], ["--optimizer", "must be one of", "got ''"]),
        (["-o", "adam:beta=3"], ["--optimizer", "'beta'", "did you mean 'betas'?", "weight_decay"]),
        (["-o", "adam:amsgrat"], ["--optimizer", "'amsgrat'", "did you mean 'amsgrad'?"]),
        (["-o", "adam:eps"], ["--optimizer", "option eps must have a value, got none", "adam:eps=1e-08"]),
        (["-o", "adam:betas=1.5/0.9"], ["--optimizer", "betas[0]: must be a number in [0, 1), got 1.5", "[0, 1)"]),
        (["-o", "adam:lr=-1"], ["--optimizer", "lr: must be a finite number from 0, such as 0.001, got -1.0"]),
        (["-o", "adam:lr=fast"], ["--optimizer", "lr: must be a finite number from 0, such as 0.001, got fast"]),
        (["-o", "momentum:emo"], ["--optimizer", "'emo'", "'heavy_ball', 'ema', 'lr_inside'"]),
        (["-o", "nesterov:ahead"], ["--optimizer", "'ahead'", "'lookahead'"]),
        (["-o", "sgd:nesterov"], ["--optimizer", "unless momentum > 0"]),
        (["-o", "all:lr=1"], ["--optimizer", "'all:lr=1': must be 'all' without options"]),
        (["--lr", "-0.1"], ["--lr", "-0.1", "finite number from 0"]),
        (["--lr", "nan"], ["--lr", "nan", "finite number from 0"]),
        (["--lr", "inf"], ["--lr", "inf", "finite number from 0"]),
        (["--lr", "quick"], ["--lr"]),
        (["--batch-size", "0"], ["--batch-size", "'0'", "a whole number from 1, or 'full'"]),
        (["--batch-size", "-3"], ["--batch-size", "'-3'", "a whole number from 1, or 'full'"]),
        (["--batch-size", "2.5"], ["--batch-size", "'2.5'", "a whole number from 1, or 'full'"]),
        (["--hidden", "8,,4"], ["--hidden", "'8,,4'", "'none'"]),
        (["--hidden", "0"], ["--hidden", "'0'"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--seed", "-1"], ["--seed"]),
        (["--schedule", "cosin"], ["--schedule", "did you mean 'cosine'?", *SCHEDULES]),
        (["--init", "xavier_norma"], ["--init", "did you mean 'xavier_normal' or", *INITS]),
        (["--data", "digit"], ["--data", "did you mean 'digits'?", "breast-cancer"]),
        (["--plot", "no-such-folder/x.png"], ["--plot", "must be in an existing directory", "mkdir -p no-such-folder"]),
        (["--plot", "."], ["--plot", "must be a file, got a directory"]),
        (["--plot", "curves.doc"], ["--plot", "curves.doc: must end in", ".png", "got .doc"]),
        (["--plot", "curves"], ["--plot", "curves: must end in", ".png", "got no ending"]),
        (["--json", "no-such-folder/x.json"], ["--json", "must be in an existing directory, got no-such-folder"]),
    ],
)
def test_errors_name_the_option_and_the_remedy(arguments, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    words = plain(result.output)
    for message in messages:
        assert message in words
    assert not list(tmp_path.iterdir())


def test_an_unwritable_file_is_refused_before_training(tmp_path, monkeypatch):
    # Patch the system's answer: the superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = invoke("--json", tmp_path / "x.json")
    assert result.exit_code == 2
    assert "x.json: must be writable; choose another file" in plain(result.output)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")
def test_a_full_disk_is_reported_with_the_option():
    result = invoke("--data", "breast-cancer", "--epochs", 1, "--json", "/dev/full")
    assert result.exit_code == 1
    assert "Error: --json: [Errno 28] No space left on device: '/dev/full'" in plain(result.output)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals need POSIX")
def test_progress_is_shown_only_on_terminals():
    process = command("train", "--data", "breast-cancer", "--epochs", "2")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")

    shown, out = on_terminal("train", "--data", "breast-cancer", "--epochs", "2")
    assert "2/2 epochs loss 0." in plain(shown)
    assert "epochs loss" not in out


def test_json_on_standard_output_has_no_other_text():
    process = command("train", "--data", "breast-cancer", "--epochs", "1", "--json", "-")
    out, errors = process.communicate(timeout=60)
    assert json.loads(out)["command"] == "train"
    assert "us per" in errors


def test_help_lists_every_option_and_name():
    result = invoke("--help")
    assert result.exit_code == 0
    words = plain(result.output)
    for option in ("--optimizer", "--data", "--lr", "--schedule", "--init", "--hidden", "--epochs", "--batch-size"):
        assert option in words
    for option in ("--checkpoint", "--resume", "--checkpoint run.safetensors --resume"):
        assert option in words
    for option in ("--seed", "--plot", "--json", "Examples", "fastopt train --optimizer all --plot curves.png"):
        assert option in words
    for name in (*optimizers(), *FORMS, *SCHEDULES, *INITS, *data.NAMES, "full"):
        assert name in words
    for default in ("adam", "digits", "constant", "he_normal", "128,32", "30", "32", "0"):
        assert f"[default: {default}]" in words


def test_no_command_prints_help_and_an_option_prints_the_version():
    result = CliRunner().invoke(app, [])
    assert "train" in result.output
    assert "info" in result.output
    process = command("--version")
    assert process.communicate(timeout=60)[0].strip() == fastopt.__version__


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("typer", []),
        ("rich", []),
        ("sklearn", ["train"]),
        ("threadpoolctl", ["train"]),
        ("matplotlib", ["train", "--plot", "curves.png"]),
    ],
)
def test_a_missing_package_of_the_extra_is_named_with_the_remedy(package, arguments):
    code = f"import sys; sys.modules[{package!r}] = None; from fastopt.cli import main; main()"
    process = command(*arguments, code=code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"needs the package {package!r}" in errors
    assert "pip install 'fastopt[cli]'" in errors
    assert "Traceback" not in errors


def test_heavy_packages_are_imported_only_when_needed():
    code = (
        "import sys, fastopt\n"
        "extra = {'typer', 'rich', 'sklearn', 'matplotlib', 'threadpoolctl'}\n"
        "assert not extra & set(sys.modules), 'the library needs none of them'\n"
        "import fastopt.cli.app\n"
        "assert not {'sklearn', 'matplotlib', 'numba.cuda'} & set(sys.modules), 'nor does --help'\n"
    )
    process = command(code=code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


# --- batch normalisation ----------------------------------------------------------------------------------------------


def test_batch_norm_learns_where_the_plain_network_struggles(tmp_path):
    picture = tmp_path / "curves.png"
    report = run_json(tmp_path, "-o", "sgd", "--lr", 1, "--batch-norm", "--epochs", 8, "--plot", picture)
    without, with_norm = report["runs"]
    assert [without["batch_norm"], with_norm["batch_norm"]] == [False, True]
    assert without["losses"][0] == pytest.approx(with_norm["losses"][0], rel=1e-4)  # the same initial weights
    goal = 0.3
    assert min(without["losses"]) > goal
    assert next(epoch for epoch, loss in enumerate(with_norm["losses"]) if loss < goal) <= 2
    assert with_norm["test_accuracy"] > 0.95
    assert imread(picture).std() > 0.05


def test_batch_norm_is_in_the_table_and_in_the_buffer(tmp_path):
    result = invoke("-o", "sgd,adam", "--batch-norm", "--epochs", 1)
    assert result.exit_code == 0, result.output
    for label in ("sgd", "sgd + batch norm", "adam", "adam + batch norm"):
        assert re.search(rf"^ *{re.escape(label)}  +", result.output, flags=re.MULTILINE)


def test_batch_norm_gives_one_result_for_one_seed(tmp_path):
    arguments = ("-o", "nesterov:lookahead", "--batch-norm", "--epochs", 2, "--seed", 3)
    assert without_times(run_json(tmp_path, *arguments)) == without_times(run_json(tmp_path, *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden", "none"), "--hidden: must name at least one layer for batch normalisation, got none"),
        (("--batch-size", "1"), "--batch-size: must leave no batch of one of the 1438 rows, which has no variance, go"),
        (("--batch-size", "479"), "one of the 1438 rows, which has no variance, got 479"),
    ],
)
def test_batch_norm_needs_layers_and_batches(arguments, message):
    result = invoke("--batch-norm", *arguments)
    assert result.exit_code == 2
    assert message in plain(result.output)


# --- checkpoints ------------------------------------------------------------------------------------------------------

CANCER = ("--data", "breast-cancer")


def interrupt(monkeypatch, after):
    """Raise KeyboardInterrupt once `after` epochs of a run are saved."""
    keep = Keeper.keep

    def keep_and_stop(self, outcome):
        keep(self, outcome)
        if outcome.epochs == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "keep", keep_and_stop)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-o", "momentum:ema", "--schedule", "one_cycle"),
        ("-o", "nesterov:lookahead", "--batch-norm", "--seed", 3),
        ("-o", "rmsprop:momentum=0.9", "--batch-size", "full", "--schedule", "warmup"),
        ("-o", "adam:betas=0.8/0.99", "--schedule", "cyclical", "--hidden", "none", "--batch-size", 100),
    ],
)
def test_a_resumed_run_has_the_result_of_an_uninterrupted_one(tmp_path, arguments):
    arguments = (*CANCER, *arguments, "--epochs", 5)
    unbroken = run_json(tmp_path, *arguments)
    file = tmp_path / "run.safetensors"
    for after in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, after)
            result = invoke(*arguments, "--checkpoint", file, "--resume")
        assert result.exit_code == 130
        message = f"Interrupted: {file} holds the run after epoch {after} of 5. To continue, run the command again with"
        assert plain(result.stderr).strip() == f"{message} --resume"
    first = describe(file)
    assert first["step"] == unbroken["runs"][0]["steps"] * 3 // 5
    if "--batch-norm" in arguments:  # also interrupt the second run
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, 4)
            while not (tmp_path / "run.batch-norm.safetensors").exists():
                invoke(*arguments, "--checkpoint", file, "--resume")
    resumed = run_json(tmp_path, *arguments, "--checkpoint", file, "--resume")
    assert without_times(resumed) == without_times(unbroken)
    again = run_json(tmp_path, *arguments, "--checkpoint", file, "--resume")
    assert without_times(again) == without_times(unbroken)


def test_a_run_interrupted_in_the_first_epoch_keeps_nothing(tmp_path, monkeypatch):
    def keep(self, outcome):
        raise KeyboardInterrupt

    file = tmp_path / "run.safetensors"
    monkeypatch.setattr(Keeper, "keep", keep)
    result = invoke(*CANCER, "--epochs", 2, "--checkpoint", file)
    assert result.exit_code == 130
    assert f"Interrupted in epoch 1: {file} was not written" in plain(result.stderr)
    assert not file.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals need POSIX")
@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_ctrl_c_reports_the_epoch_in_the_file(tmp_path, delay):
    file = tmp_path / "run.safetensors"
    arguments = (*CANCER, "--epochs", 4000, "--schedule", "cosine", "--checkpoint", file)
    with command("train", *arguments) as process:
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert process.returncode == 130
    epoch = describe(file)["step"] // 15
    assert 0 < epoch < 4000
    assert f"holds the run after epoch {epoch} of 4000" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""


FOUR_HUNDRED = (*CANCER, "--epochs", 400, "--schedule", "cosine")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_json(tmp_path_factory.mktemp("uninterrupted"), *FOUR_HUNDRED)


@pytest.mark.skipif(sys.platform == "win32", reason="signals need POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_resumes_to_the_result_of_an_uninterrupted_one(tmp_path, number, uninterrupted):
    file = tmp_path / "run.safetensors"
    arguments = (*FOUR_HUNDRED, "--checkpoint", file)
    with command("train", *arguments) as process:
        try:
            deadline = time.monotonic() + 60
            while not file.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.05)
        finally:
            process.send_signal(number)
    assert process.returncode == -number
    assert 0 < describe(file)["step"] < 400 * 15
    resumed = run_json(tmp_path, *arguments, "--resume")
    assert without_times(resumed) == without_times(uninterrupted)


def test_a_constant_schedule_can_be_extended(tmp_path):
    file = tmp_path / "run.safetensors"
    run_json(tmp_path, *CANCER, "--epochs", 2, "--checkpoint", file)
    extended = run_json(tmp_path, *CANCER, "--epochs", 4, "--checkpoint", file, "--resume")
    assert without_times(extended) == without_times(run_json(tmp_path, *CANCER, "--epochs", 4))
    result = invoke(*CANCER, "--epochs", 6, "--checkpoint", file, "--resume")
    assert f"checkpoint: {file}, continued after epoch 4" in plain(result.output)


def test_resuming_a_diverged_run_reports_it_again(tmp_path):
    file = tmp_path / "run.safetensors"
    arguments = ("-o", "sgd", "--lr", 1e30, "--batch-norm", "--epochs", 3, *CANCER, "--checkpoint", file)
    first = run_json(tmp_path, *arguments)
    assert [run["status"] for run in first["runs"]] == ["diverged", "diverged"]
    assert without_times(run_json(tmp_path, *arguments, "--resume")) == without_times(first)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("changed", "option", "found"),
    [
        (["--data", "digits"], "--data: must be breast-cancer", "digits"),
        (["--hidden", "8"], "--hidden: must be 4", "8"),
        (["--hidden", "none"], "--hidden: must be 4", "none"),
        (["--batch-size", "full"], "--batch-size: must be 64", "full"),
        (["--schedule", "linear"], "--schedule: must be cosine", "linear"),
        (["--init", "xavier"], "--init: must be he_normal", "xavier"),
        (["--activation", "tanh"], "--activation: must be relu", "tanh"),
        (["--seed", "1"], "--seed: must be 0", "1"),
        (["-o", "sgd"], "--optimizer: must be adam", "sgd"),
        (["-o", "adam:eps=1e-7"], "--optimizer: must be adam", "adam:eps=1e-07"),
        (["--lr", "0.5"], "--lr: must be 0.0028", "0.5"),
        (["--epochs", "3"], "--epochs: must be 2", "3"),
        (["--epochs", "1"], "--epochs: must be 2", "1"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(tmp_path, changed, option, found):
    arguments = [*CANCER, "--hidden", 4, "--batch-size", 64, "--schedule", "cosine", "--epochs", 2]
    arguments += ["--checkpoint", tmp_path / "x"]
    assert invoke(*arguments).exit_code == 0
    before = files_of(tmp_path)
    result = invoke(*arguments, *changed, "--resume")
    assert result.exit_code == 2
    words = plain(result.output)
    assert f"{option} as in {tmp_path / 'x'}, " in words
    assert f"got {found}; use the same value" in words
    assert ("because schedule cosine spans that many" in words) == ("--epochs" in changed)
    assert "choose another --checkpoint FILE" in words
    assert files_of(tmp_path) == before


def test_unusable_checkpoints_are_refused_and_kept(tmp_path):
    file = tmp_path / "x"
    arguments = [*CANCER, "--hidden", "none", "--epochs", 2, "--checkpoint", file]
    fastopt.SGD(np.ones(3), lr=0.1).save(file)

    def refused(*more, because):
        before = files_of(tmp_path)
        result = invoke(*arguments, *more)
        assert result.exit_code == 2
        assert because in plain(result.output)
        assert files_of(tmp_path) == before

    refused(because="x: must not exist yet; continue it with --resume, delete it, or choose another file")
    refused("--resume", because="x: must be a checkpoint of fastopt train, got another checkpoint")
    file.write_bytes(b"weights")
    refused("--resume", because="x: must be a fastopt checkpoint, got another or a damaged file")
    file.unlink()
    assert invoke(*arguments).exit_code == 0
    refused("--resume", "--epochs", 1, because="x: must hold at most --epochs 1 epochs, got 2; raise --epochs")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("--resume", because="must have the SHA-256 stored in the file, got another")
    file.write_bytes(whole)
    kept = describe(file)["extra"]
    opt = fastopt.SGD(np.ones(3), lr=0.1)
    for progress in ({}, {**kept["fastopt train"]["progress"], "losses": 3}, None):
        opt.save(file, extra={"fastopt train": {**kept["fastopt train"], "progress": progress}})
        refused("--resume", because="x: the data of fastopt train in the file is damaged")
    opt.save(file, extra=kept)
    refused("--resume", because="x: must be saved by Adam (rule 'adam'), as this optimizer, got SGD (rule 'sgd')")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--resume"], ["--resume", "must be given with --checkpoint FILE"]),
        (["-o", "sgd,adam", "--checkpoint", "x"], ["--checkpoint", "--optimizer: must name one optimizer, got 2"]),
        (["--checkpoint", "-"], ["--checkpoint", "must be the name of a file, such as run.safetensors, got -"]),
        (["--checkpoint", "."], ["--checkpoint", "must be a file, got a directory"]),
        (["--checkpoint", "missing/x"], ["--checkpoint", "existing directory, got missing", "mkdir -p missing"]),
    ],
)
def test_a_checkpoint_is_one_file_of_one_optimizer(tmp_path, monkeypatch, arguments, messages):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    for message in messages:
        assert message in plain(result.output)
    assert not list(tmp_path.iterdir())


# --- backends ---------------------------------------------------------------------------------------------------------


def test_an_unavailable_backend_is_an_error_with_its_reason():
    """Run in a process without the CUDA simulator and without visible devices."""
    without = {"NUMBA_ENABLE_CUDASIM": "0", "CUDA_VISIBLE_DEVICES": ""}
    refused = command("train", "--backend", "cuda", **without)
    automatic = command("train", "--backend", "auto", "--epochs", "1", "--json", "-", **without)
    output, error = refused.communicate(timeout=60)
    written, trouble = automatic.communicate(timeout=60)
    assert (refused.returncode, output) == (2, "")
    assert "Invalid value for --backend: backend='cuda': numba finds no CUDA d" in plain(error)  # device, or driver
    assert "Traceback" not in error
    assert automatic.returncode == 0, trouble
    assert json.loads(written)["settings"]["backend"] == "cpu"


def test_a_library_missing_for_cupy_is_an_error_with_its_name(monkeypatch):
    class Lonely:
        params = property(lambda self: [self])

        def __matmul__(self, other):
            raise ImportError("libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr("fastopt.cli.choices.pack", lambda arrays, backend: Lonely())
    result = invoke("--backend", "cuda")
    assert result.exit_code == 2
    assert "CuPy cannot multiply matrices here: libcublas.so.13" in plain(result.output)
