"""`fastopt train --compare` and `--lr auto`: known orderings, output and figures, equal results, refused input."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.image import imread
from test_cli_train import invoke, plain, run_json, small_problem, without_times
from typer.testing import CliRunner

import fastopt
from fastopt.cli import data, runs
from fastopt.cli.app import app
from fastopt.cli.choices import SCHEDULES, parse_optimizer
from fastopt.cli.compare import COMPARISONS, LR_FACTORS, OPTIMIZERS
from fastopt.cli.network import ACTIVATIONS, backward, forward, new_layers, new_norms, softmax_cross_entropy
from fastopt.cli.runs import SCANNED, Plan, Setting, make_run, scan_rates
from fastopt.curvature import dominant_eigenvalue

CANCER = ("--data", "breast-cancer")
SHORT = {
    "batch-sizes": (*CANCER, "--epochs", "4"),
    "optimizers": (*CANCER, "--epochs", "3"),
    "schedules": ("--epochs", "2"),
    "inits": ("--epochs", "4"),
    "batch-norm": ("--epochs", "3"),
}
"""Options with which each comparison takes a second and still shows its ordering."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Run each comparison once: its output on 80 columns, its report, its figure."""
    kept = {}

    def run(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            arguments = ["train", "--compare", name, *SHORT[name]]
            arguments += ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
            result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
            assert result.exit_code == 0, result.output
            report = json.loads((folder / "out.json").read_text(encoding="utf-8"))
            kept[name] = result.output, report, (folder / "out.png").read_bytes(), folder / "out.png"
        return kept[name]

    return run


def runs_of(compared, name):
    return compared(name)[1]["runs"]


# --- the network with tanh --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normed", [False, True])
def test_gradients_with_each_activation_equal_numerical_ones(activation, normed):
    layers, x, labels = small_problem(3)
    layers, norms = new_norms(layers, activation=activation) if normed else (layers, [])
    flat = fastopt.pack(layers)
    for norm, params, grads in zip(norms, flat.params, flat.grads, strict=False):
        norm.attach(params.bn, grads.bn)
        params.bn["gamma"][...] = np.linspace(0.5, 1.5, norm.num_features)
        params.bn["beta"][...] = np.linspace(-0.2, 0.3, norm.num_features)
    backward(flat.params, x, labels, out=flat.grads, norms=norms, activation=activation)
    slopes = flat.grad.copy()

    def loss():
        logits = forward(flat.params, x, norms, training=True, activation=activation)[-1]
        return softmax_cross_entropy(logits, labels)[0]

    h = 1e-6
    for index in np.flatnonzero(slopes):
        kept = flat.data[index]
        flat.data[index] = kept + h
        above = loss()
        flat.data[index] = kept - h
        below = loss()
        flat.data[index] = kept
        assert slopes[index] == pytest.approx((above - below) / (2 * h), rel=1e-4, abs=1e-8)
    assert np.count_nonzero(slopes) > 0.8 * sum(flat.layout.sizes) - 7


def test_forward_with_tanh_is_tanh_between_affine_maps():
    layers, x, _ = small_problem(3, hidden=(4,))
    (W1, b1, _), (W2, b2, _) = layers
    _, hidden, logits = forward(layers, x, activation="tanh")
    np.testing.assert_allclose(hidden, np.tanh(x @ W1 + b1), rtol=1e-14)
    np.testing.assert_allclose(logits, np.tanh(x @ W1 + b1) @ W2 + b2, rtol=1e-13)


def test_the_option_trains_a_network_with_tanh(tmp_path):
    report = run_json(tmp_path, "--activation", "tanh", "--init", "xavier", "--epochs", 10)
    assert report["settings"]["activation"] == "tanh"
    assert report["runs"][0]["test_accuracy"] > 0.93
    (relu,) = run_json(tmp_path, "--init", "xavier", "--epochs", 10)["runs"]
    assert relu["parameters_sha256"] != report["runs"][0]["parameters_sha256"]


# --- the ordering in each comparison ----------------------------------------------------------------------------------


def test_batch_sizes_use_the_same_rows_in_more_or_fewer_steps(compared):
    full, mini, single = runs_of(compared, "batch-sizes")
    assert [run["batch_size"] for run in (full, mini, single)] == ["full", 32, 1]
    assert [run["steps"] for run in (full, mini, single)] == [4, 4 * 15, 4 * 455]
    assert [len(run["losses"]) for run in (full, mini, single)] == [5, 5, 5]
    assert full["losses"][0] == mini["losses"][0] == single["losses"][0]  # the same weights to begin with
    assert full["losses"][1] > mini["losses"][1] > single["losses"][1]  # more steps get farther in an epoch
    settings = compared("batch-sizes")[1]["settings"]
    assert not {"batch_size", "steps"} & set(settings)
    assert settings["optimizer"] == "sgd"


def test_optimizers_equal_those_of_plain_training(tmp_path):
    alone = run_json(tmp_path, "-o", ",".join(OPTIMIZERS), *SHORT["optimizers"])
    usual = run_json(tmp_path, "--compare", "optimizers", "--rates", "defaults", *SHORT["optimizers"])
    assert without_times(alone)["runs"] == without_times(usual)["runs"]
    assert [run["optimizer"] for run in alone["runs"]] == list(OPTIMIZERS)


def test_the_rate_of_each_optimizer_is_the_best_of_a_scan(compared, tmp_path):
    output, report, _, _ = compared("optimizers")
    for run in report["runs"]:
        usual = parse_optimizer(run["optimizer"]).lr(32)
        tried = {trial["lr"]: trial["loss"] for trial in run["lr_scan"]}
        assert list(tried) == pytest.approx([factor * usual for factor in SCANNED], rel=0.05)
        assert run["lr"] == min(tried, key=tried.get)
        assert len(set(tried.values())) == len(SCANNED)
        assert f"{run['optimizer']} {run['lr']:.4g}" in plain(output)
    assert "of 8 rates each, the one with the lowest training loss after one epoch: sgd " in plain(output)
    for name, trial in ((run["optimizer"], run["lr_scan"][k]) for k, run in enumerate(report["runs"])):
        arguments = ("-o", name, "--lr", trial["lr"], *CANCER, "--epochs", 1)
        (alone,) = run_json(tmp_path, *arguments)["runs"]
        assert alone["loss"] == trial["loss"]  # the same weights and mini-batches, to the bit


def test_scanned_rates_lower_the_loss_and_tell_sgd_from_momentum(tmp_path):
    arguments = ("--compare", "optimizers", "--epochs", 3)
    scanned, usual = (run_json(tmp_path, *arguments, "--rates", rates)["runs"] for rates in ("scan", "defaults"))
    for chosen, given in zip(scanned, usual, strict=True):
        assert chosen["loss"] < given["loss"]
        assert "lr_scan" not in given
    steps = {run["optimizer"]: run["lr"] for run in scanned}
    assert 10 * steps["momentum"] != pytest.approx(steps["sgd"], rel=0.2)


def test_a_rate_is_chosen_where_some_or_all_diverge(monkeypatch):
    setting = Setting("breast-cancer", [4], 1, "cpu", 0)
    run = make_run(Plan("sgd", parse_optimizer("sgd"), 32, "constant", "he_normal", "relu"), setting)
    monkeypatch.setattr(runs, "SCANNED", (1e30, 1.0, 1e31))
    (chosen,) = scan_rates([run], setting)
    assert chosen.lr == 0.1
    assert [math.isfinite(trial.loss) for trial in chosen.plan.scan] == [False, True, False]
    monkeypatch.setattr(runs, "SCANNED", (1e30, 1e31))
    (chosen,) = scan_rates([run], setting)
    assert chosen.lr == 0.1  # the usual one


def test_schedules_equal_those_of_plain_training_at_a_large_rate(compared, tmp_path):
    runs = {run["schedule"]: run for run in runs_of(compared, "schedules")}
    assert {"constant", "exponential", "inverse_time", "cyclical"} <= set(runs) <= set(SCHEDULES)
    assert {run["lr"] for run in runs.values()} == {0.25} == {5 * parse_optimizer("sgd").lr(8)}
    options = ("-o", "sgd", "--lr", 0.25, "--batch-size", 8, *SHORT["schedules"])
    for name in ("constant", "cyclical"):
        (alone,) = run_json(tmp_path, *options, "--schedule", name)["runs"]
        assert alone["parameters_sha256"] == runs[name]["parameters_sha256"]
    assert len({run["parameters_sha256"] for run in runs.values()}) == len(runs)


def test_given_learning_rates_are_used_unchanged(tmp_path):
    arguments = ("--compare", "schedules", *CANCER, "--epochs", 1, "--lr", 0.125)
    assert {run["lr"] for run in run_json(tmp_path, *arguments)["runs"]} == {0.125}


def by_init(compared):
    return {(run["init"], run["activation"]): run for run in runs_of(compared, "inits")}


def stds(run):
    return [layer["std"] for layer in run["activations_before_training"]]


def test_zeros_and_small_normal_weights_learn_nothing_and_the_others_do(compared):
    runs = by_init(compared)
    assert len(runs) == 8
    for (init, activation), run in runs.items():
        if init in ("zeros", "normal"):
            assert run["losses"][-1] == pytest.approx(math.log(10), rel=5e-3), (init, activation)
        else:
            assert run["losses"][-1] < 0.2, (init, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_vanish_or_persist_with_depth_as_in_the_papers(compared, activation):
    runs = by_init(compared)
    assert stds(runs["zeros", activation]) == [0.0] * 5
    normal = stds(runs["normal", activation])
    # With 64 units and weights of deviation 0.01 each layer scales the mean square by 64 * 0.01^2; ReLU halves it.
    shrink = 8 * 0.01 if activation == "tanh" else 8 * 0.01 / math.sqrt(2)
    for before, after in pairwise(normal):
        assert shrink / 2 < after / before < 2 * shrink
    he, xavier = stds(runs["he", activation]), stds(runs["xavier", activation])
    assert he[-1] > 0.6 * he[0]
    if activation == "relu":  # Xavier's weights are too small for ReLU by the square root of 2 in every layer
        assert xavier[-1] / xavier[0] == pytest.approx(0.5**2, rel=0.5)
    else:
        assert 0.3 * xavier[0] < xavier[-1] < he[-1]


def test_dead_and_saturated_are_counted(compared):
    for (init, activation), run in by_init(compared).items():
        for layer in run["activations_before_training"]:
            assert layer["dead"] == 1.0 if init == "zeros" else layer["dead"] < 0.1
            assert (layer["saturated"] is None) == (activation == "relu")
    he, xavier = (by_init(compared)[init, "tanh"]["activations_before_training"][0] for init in ("he", "xavier"))
    assert he["saturated"] > xavier["saturated"] > 0.0


def test_the_statistics_describe_the_initial_weights(compared):
    seeds = np.random.SeedSequence(0).spawn(2)
    x = data.load("digits", np.random.default_rng(seeds[0])).x_train
    layers = new_layers([64, *[64] * 5, 10], fastopt.init.he_normal_, np.random.default_rng(seeds[1]))
    reported = by_init(compared)["he", "relu"]["activations_before_training"]
    for layer, statistics in zip(layers[:-1], reported, strict=True):
        x = np.maximum(x @ layer.W, 0)
        assert statistics["mean"] == pytest.approx(x.mean(), rel=1e-4)
        assert statistics["std"] == pytest.approx(x.std(), rel=1e-4)
        assert statistics["dead"] == pytest.approx(np.mean(x.max(axis=0) == 0))


def test_batch_norm_survives_rates_that_the_plain_network_does_not(compared):
    runs = runs_of(compared, "batch-norm")
    assert [run["batch_norm"] for run in runs] == [False] * 4 + [True] * 4
    assert [run["lr"] for run in runs] == pytest.approx([0.1 * factor for factor in LR_FACTORS] * 2)
    without, with_norm = runs[:4], runs[4:]
    for bare, normed in zip(without[2:], with_norm[2:], strict=True):
        assert normed["losses"][-1] < 0.5
        # If the plain run does not diverge, its loss fluctuates with BLAS's rounding, between 0.5 and 2.4.
        assert bare["status"] == "diverged" or bare["losses"][-1] > 4.0 * normed["losses"][-1]
    assert all(run["losses"][-1] < run["losses"][0] / 2 for run in (without[1], with_norm[1]))


# --- output of all comparisons ----------------------------------------------------------------------------------------

LABELS = {
    "batch-sizes": ["all rows", "mini-batches of 32", "single rows"],
    "optimizers": list(OPTIMIZERS),
    "schedules": ["constant", "exponential", "inverse_time", "cyclical", "cosine", "one_cycle"],
    "inits": ["zeros, tanh", "normal, relu", "xavier, tanh", "he, relu", "dead: units that are 0 on every row"],
    "batch-norm": ["without, lr x 10", "batch norm, lr x 10"],
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_there_is_one_table_one_figure_and_one_report(compared, name):
    output, report, _, picture = compared(name)
    assert max(map(len, output.splitlines())) <= max(80, len(str(picture)) + 60)  # the last line names the file
    for label in LABELS[name]:
        assert label in plain(output)
    assert f"{COMPARISONS[name].picture}: " in output
    assert (report["command"], report["compare"], report["settings"]["seed"]) == ("train", name, 0)
    pixels = imread(picture)
    assert pixels.shape[0] > 700
    assert pixels.shape[1] > 1500
    assert pixels.std() > 0.05
    half = pixels.shape[1] // 2
    assert (pixels[:, :half, :3] < 0.9).any(axis=2).mean() > 0.005  # neither panel is empty
    assert (pixels[:, half:, :3] < 0.9).any(axis=2).mean() > 0.005


@pytest.mark.parametrize("name", COMPARISONS)
def test_one_seed_gives_one_report_and_one_picture(compared, tmp_path, name):
    _, report, picture, _ = compared(name)
    again = run_json(tmp_path, "--compare", name, *SHORT[name], "--plot", tmp_path / "again.png")
    assert without_times(again) == without_times(report)
    assert (tmp_path / "again.png").read_bytes() == picture


@pytest.mark.parametrize("name", COMPARISONS)
def test_options_that_do_not_vary_are_obeyed(tmp_path, name):
    arguments = ("--compare", name, *CANCER, "--epochs", 1, "--hidden", "8,4", "--seed", 3, "--lr", 0.05)
    if name != "optimizers":
        arguments += ("--optimizer", "rmsprop:momentum=0.5")
    if name != "batch-sizes":
        arguments += ("--batch-size", 100)
    report = run_json(tmp_path, *arguments)
    settings = report["settings"]
    assert (settings["data"], settings["epochs"], settings["seed"]) == ("breast-cancer", 1, 3)
    assert settings["layers"] == [30, 8, 4, 2]
    if name != "optimizers":
        assert {run["optimizer"] for run in report["runs"]} == {"rmsprop:momentum=0.5"}
    if name != "batch-sizes":
        assert settings["batch_size"] == 100
    factors = LR_FACTORS if name == "batch-norm" else (1.0,)
    assert {run["lr"] for run in report["runs"]} == {0.05 * factor for factor in factors}


@pytest.mark.parametrize("name", COMPARISONS)
def test_runs_that_all_diverge_are_reported_and_drawn(tmp_path, name):
    picture = tmp_path / "out.png"
    result = invoke("--compare", name, *CANCER, "--epochs", 2, "--lr", 1e32, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "diverged: its loss after epoch 1 is not finite" in plain(result.output)
    assert imread(picture).std() > 0.01


def test_help_names_the_comparisons_and_their_defaults():
    words = plain(invoke("--help").output)
    for name, comparison in COMPARISONS.items():
        assert name in words
        assert comparison.what in words
    for text in (
        "--compare",
        "--activation",
        "NUMBER|auto",
        "inits: --optimizer sgd --hidden 64,64,64,64,64 --epochs 10",
    ):
        assert text in words


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "batchsizes",
            (),
            "comparison: must be one of batch-sizes, optimizers, schedules, inits, batch-norm, got 'batchsizes'; did "
            "you mean 'batch-sizes'?",
        ),
        ("batch-sizes", ("--batch-size", "32"), "--batch-size: must not be given, the comparison sets it; drop"),
        ("optimizers", ("-o", "sgd"), "--optimizer: must not be given, the comparison sets it"),
        ("schedules", ("--schedule", "constant"), "--schedule: must not be given, the comparison sets it"),
        ("inits", ("--init", "he"), "--init: must not be given, the comparison sets it"),
        ("inits", ("--activation", "relu"), "--activation: must not be given, the comparison sets it"),
        ("batch-norm", ("--batch-norm",), "--batch-norm: must not be given, the comparison sets it"),
        ("inits", ("--batch-norm",), "--batch-norm: must not be given, no comparison supports it"),
        ("schedules", ("--checkpoint", "x"), "--checkpoint: must not be given, no comparison supports it"),
        ("schedules", ("--resume",), "--resume: must not be given, no comparison supports it"),
        ("schedules", ("-o", "sgd,adam"), "--optimizer: must name one optimizer for this comparison, got 2"),
        ("inits", ("--hidden", "none"), "--hidden: must name at least one layer for this comparison, got none"),
        ("batch-norm", ("--hidden", "none"), "--hidden: must name at least one layer"),
        ("batch-norm", ("--batch-size", "1"), "--batch-size: must leave no batch of one of the 1438 rows"),
        ("inits", ("--lr", "auto"), "--lr: must be a number for this comparison, got auto; some of its initial"),
        ("schedules", ("--rates", "scan"), "--rates: must be given with --compare optimizers, whose learning rates"),
        ("optimizers", ("--rates", "scn"), "--rates: rates: must be one of scan, defaults, got 'scn'; did you mean"),
        ("optimizers", ("--rates", "scan", "--lr", "1"), "--rates: must be defaults with --lr 1, got scan; drop"),
        ("optimizers", ("--lr", "auto"), "'adagrad': lr must be a number, got auto: auto is 1/lambda"),
        ("optimizers", ("--plot", "x.txt"), "x.txt: must end in one of ."),
    ],
)
def test_contradictory_options_are_refused(tmp_path, monkeypatch, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("--compare", name, *arguments)
    assert result.exit_code == 2
    assert message in plain(result.output)
    assert not list(tmp_path.iterdir())


def test_an_unknown_activation_is_named():
    result = invoke("--activation", "tan")
    assert result.exit_code == 2
    assert "activation: must be one of relu, tanh, got 'tan'; did you mean 'tanh'?" in plain(result.output)


# --- --lr auto --------------------------------------------------------------------------------------------------------


def cancer_eigenvalue(seed):
    """Return lambda of the network for this data, computed from the library's parts."""
    split, weights, _, start = np.random.SeedSequence(seed).spawn(4)
    rows = data.load("breast-cancer", np.random.default_rng(split))
    layers = new_layers([30, 16, 8, 2], fastopt.init.he_normal_, np.random.default_rng(weights))
    flat = fastopt.pack(layers, dtype=np.float64)

    def grad(layers):
        backward(layers, rows.x_train.astype(np.float64), rows.y_train, out=flat.grads)
        return flat.grads

    return dominant_eigenvalue(grad, flat, rng=np.random.default_rng(start))


@pytest.mark.parametrize("seed", [0, 1])
def test_lr_auto_is_one_over_the_largest_eigenvalue(tmp_path, seed):
    arguments = ("--lr", "auto", "--seed", seed, "--epochs", 10, *CANCER, "--hidden", "16,8")
    (run,) = run_json(tmp_path, *arguments)["runs"]
    assert run["optimizer"] == "sgd"
    assert run["dominant_eigenvalue"] == pytest.approx(cancer_eigenvalue(seed), rel=1e-4)
    assert run["lr"] == 1.0 / run["dominant_eigenvalue"]
    assert run["test_accuracy"] > 0.93


def test_lr_auto_lowers_the_loss_at_every_step_of_gradient_descent(tmp_path):
    (run,) = run_json(tmp_path, "--lr", "auto", "--batch-size", "full", "--epochs", 30)["runs"]
    assert (np.diff(run["losses"]) < 0).all()
    (steep,) = run_json(tmp_path, "--lr", 30 * run["lr"], "-o", "sgd", "--batch-size", "full", "--epochs", 30)["runs"]
    assert steep["status"] == "diverged" or (np.diff(steep["losses"]) > 0).any()


def test_lr_auto_allows_for_a_velocity_and_for_the_network(tmp_path):
    names = "sgd,momentum,momentum:ema,nesterov:momentum=0.5,sgd:momentum=0.9,sgd:lr=0.25,adam:lr=0.01"
    runs = run_json(tmp_path, "-o", names, "--lr", "auto", *CANCER, "--epochs", 1, "--batch-norm")["runs"]
    plain_, normed = runs[::2], runs[1::2]
    for some in (plain_, normed):
        eigenvalue = some[0]["dominant_eigenvalue"]
        assert [run["lr"] for run in some] == pytest.approx(
            [factor / eigenvalue for factor in (1.0, 0.1, 1.0, 0.5, 0.1)] + [0.25, 0.01]
        )
        assert [run["dominant_eigenvalue"] for run in some] == [eigenvalue] * 5 + [None] * 2
    assert plain_[0]["dominant_eigenvalue"] != normed[0]["dominant_eigenvalue"]


def test_lr_auto_trains_like_the_same_number(tmp_path):
    arguments = ("-o", "sgd", "--batch-norm", *CANCER, "--epochs", 2)
    auto = run_json(tmp_path, *arguments, "--lr", "auto")["runs"]
    for k, run in enumerate(auto):
        number = run_json(tmp_path, *arguments, "--lr", repr(run["lr"]))["runs"][k]
        assert number["parameters_sha256"] == run["parameters_sha256"]


def test_lr_auto_is_printed_and_can_apply_to_one_optimizer():
    result = invoke("-o", "sgd:lr=auto,adam", *CANCER, "--epochs", 1)
    assert result.exit_code == 0
    words = plain(result.output)
    assert "lambda is the largest eigenvalue of the Hessian of the loss over all training rows" in words
    assert ", 1/lambda = " in words
    assert ": sgd:lr=auto" in words


def test_from_zeros_only_the_last_biases_have_a_curvature(tmp_path):
    (run,) = run_json(tmp_path, "--init", "zeros", "--lr", "auto", *CANCER, "--epochs", 1)["runs"]
    assert run["dominant_eigenvalue"] == pytest.approx(0.5, rel=1e-3)  # diag(p) - p p' of a two-class softmax


def test_lr_auto_is_resumed(tmp_path):
    arguments = (*CANCER, "--lr", "auto", "--checkpoint", tmp_path / "x")
    run_json(tmp_path, *arguments, "--epochs", 1)
    resumed = run_json(tmp_path, *arguments, "--epochs", 2, "--resume")
    assert without_times(resumed) == without_times(run_json(tmp_path, *CANCER, "--lr", "auto", "--epochs", 2))


@pytest.mark.parametrize("name", ["adam", "lamb", "adadelta", "lion", "lars", "muon"])
def test_lr_auto_is_refused_where_steps_are_not_along_the_gradient(name):
    result = invoke("-o", name, "--lr", "auto")
    assert result.exit_code == 2
    words = plain(result.output)
    assert f"--optimizer: '{name}': lr must be a number, got auto: auto is 1/lambda, a step length along" in words
    assert "or one of sgd, momentum, nesterov" in words


def test_lr_auto_works_only_in_training():
    result = CliRunner().invoke(app, ["contour", "-o", "sgd:lr=auto"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "lr: must be a finite number from 0, such as 0.001, got auto" in plain(result.output)


@pytest.mark.parametrize("eigenvalue", [-2.0, 0.0])
def test_a_loss_that_does_not_curve_up_has_no_lr_auto(monkeypatch, eigenvalue):
    monkeypatch.setattr(fastopt.curvature, "dominant_eigenvalue", lambda *arguments, **options: eigenvalue)
    result = invoke("--lr", "auto", *CANCER)
    assert result.exit_code == 2
    words = plain(result.output)
    assert "--lr: largest eigenvalue of the Hessian at the initial weights: must be above 0" in words
    assert f"got {eigenvalue:g}; give a number" in words


@pytest.mark.parametrize("text", ["fast", "-1", "nan"])
def test_an_invalid_learning_rate_is_refused(text):
    result = invoke("--lr", text)
    assert result.exit_code == 2
    message = f"learning rate: must be a finite number from 0, such as 0.001, or auto, got {text}"
    assert message in plain(result.output)
