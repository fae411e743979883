"""`fastopt contour`: the classic paths, the minima it finds, its table and files; one command has one result."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image
from scripts import on_terminal
from typer.testing import CliRunner

import fastopt
from fastopt import reference
from fastopt.cli.app import app
from fastopt.cli.choices import FORMS, optimizers, parse_optimizer
from fastopt.cli.descent import LEARNING_RATES, descend, measure, suggest_lr
from fastopt.cli.expression import FUNCTIONS, parse
from fastopt.cli.plots.paths import FRAMES, Scene, animate_paths, draw_paths, frames_of
from fastopt.cli.plots.style import COLOURS
from fastopt.cli.surfaces import DEFAULT_WINDOW, SURFACES, Point, Window, find_minima, placed, surface_of

ROOT = Path(__file__).parents[1]
CLASSICS = ("sgd", "momentum", "adagrad", "adam")


def plain(text):
    """Return text without colours, frames and line breaks, independent of the terminal's width."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def invoke(*arguments, columns=200):
    return CliRunner().invoke(app, ["contour", *map(str, arguments)], env={"COLUMNS": str(columns)})


def run_json(tmp_path, *arguments):
    """Return the JSON of a successful run."""
    path = tmp_path / "run.json"
    result = invoke(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text(encoding="utf-8"))


def path_of(surface, optimizer, lr, steps):
    (points,) = descend(surface, parse_optimizer(optimizer), [lr], steps)
    return points


# --- the classic picture ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classic(tmp_path_factory):
    """The runs of the command without options, by optimizer."""
    report = run_json(tmp_path_factory.mktemp("classic"))
    assert report["settings"]["expression"] == "x^2/10 + y^2"
    assert report["settings"]["minima"] == [[0.0, 0.0]]
    runs = {run["optimizer"]: run for run in report["runs"]}
    assert tuple(runs) == CLASSICS
    return runs


def test_all_four_reach_the_minimum(classic):
    for run in classic.values():
        path = np.array(run["path"])
        assert path.shape == (101, 2)
        assert path[0].tolist() == [-7.0, 2.0]
        assert run["status"] == "reached"
        distances = np.hypot(*path.T)
        assert (distances[run["steps_to_minimum"] :] <= 0.1).all()
        assert distances[run["steps_to_minimum"] - 1] > 0.1
        assert run["distance"] == pytest.approx(distances[-1])
        assert run["value"] == pytest.approx(path[-1][0] ** 2 / 10 + path[-1][1] ** 2)


def test_sgd_zigzags(classic):
    x, y = np.array(classic["sgd"]["path"])[:30].T
    assert (np.diff(np.sign(y)) != 0).all()  # every step crosses the valley
    assert (np.diff(x) > 0).all()


def test_momentum_overshoots(classic):
    x, y = np.array(classic["momentum"]["path"]).T
    assert x.max() > 1.0
    assert y.min() < -1.0
    assert 2 <= np.count_nonzero(np.diff(np.sign(y[:40]))) < 15  # in curves, not in a zigzag


def bend(path):
    """Return the largest distance from the chord between start and end, in lengths of the chord."""
    chord = path[-1] - path[0]
    apart = (path - path[0]) @ np.array([-chord[1], chord[0]]) / np.hypot(*chord)
    return np.abs(apart).max() / np.hypot(*chord)


def test_adagrad_goes_straight_and_adam_curves(classic):
    adagrad, adam = (np.array(classic[name]["path"]) for name in ("adagrad", "adam"))
    short, long = (np.hypot(*np.diff(path, axis=0).T).sum() / np.hypot(7.0, 2.0) for path in (adagrad, adam))
    assert short < 1.07 < 1.3 < long
    assert (np.diff(adagrad[:, 0]) > 0).all()  # it never goes back
    assert (np.diff(adagrad[:, 1]) <= 0).all()
    assert adagrad[:, 1].min() > -1e-6
    assert bend(adagrad) < 0.17 < 0.2 < bend(adam) < 0.5
    turns = np.diff(np.unwrap(np.arctan2(*np.diff(adam[:20], axis=0).T[::-1])))
    assert (turns > 0.0).sum() > 15  # it keeps turning the same way
    assert turns.max() < 0.3  # and smoothly
    assert adam[:, 0].max() > 0.3


def test_the_paths_match_the_papers(classic):
    """Compare with the pure NumPy optimizers, on a gradient derived by hand."""
    for name in CLASSICS:
        step = getattr(reference, name)
        p = np.array([-7.0, 2.0])
        state = reference.init_state(name, p)
        for t, point in enumerate(classic[name]["path"][1:31], start=1):
            step(p, p * [0.2, 2.0], state, t, lr=classic[name]["lr"])
            np.testing.assert_allclose(point, p, rtol=1e-12, err_msg=f"{name}, step {t}")


# --- surfaces and their minima ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES.values(), ids=SURFACES)
def test_named_functions_have_the_minima_they_claim(surface):
    for point in surface.minima:
        value, by_x, by_y = surface.f.gradient(*point)
        assert value == pytest.approx(-1.0 if surface.name == "saddle" else 0.0, abs=1e-12)
        assert [by_x, by_y] == pytest.approx([0.0, 0.0], abs=1e-10)
    found = find_minima(surface.f, surface.window)
    assert sorted(found) == pytest.approx(np.array(sorted(surface.minima)), abs=2e-6)
    assert surface.window.holds(*surface.start)


@pytest.mark.parametrize(
    ("text", "minima"),
    [
        ("(x - 1.25)^2 + (y + 3.1)^2", [(1.25, -3.1)]),
        ("abs(x - 2) + abs(y + pi)", [(2.0, -math.pi)]),
        ("sqrt(x^2 + y^2)", [(0.0, 0.0)]),
        ("x^3 - 3*x + y^2", [(1.0, 0.0)]),  # the edge is lower but not a minimum
        ("x^4 - 4*x^2 + x + y^2", [(-1.472998, 0.0)]),  # the higher of its two does not count
        ("20 + x^2 + y^2 - 10*(cos(2*pi*x) + cos(2*pi*y))", [(0.0, 0.0)]),
        ("1/(x^2 + y^2) + x^2 + (y - x)^2/3 + y^2", [(-0.7071068, -0.7071068), (0.7071068, 0.7071068)]),
        ("log(x + 3) + (x - 1)^2 + y^2", [(0.8708287, 0.0)]),  # -infinity on a line within the window
        ("sqrt(x + 3) + y^2", []),  # an edge of its domain
        ("1e-9*(x - 1)^2 + 1e9*y^2", [(1.0, 0.0)]),
        ("x + y", []),
        ("x^2 - y^2", []),
        ("(x - 20)^2 + y^2", []),
    ],
)
def test_minima_of_expressions_are_found(text, minima):
    f = parse(text)
    assert np.array(sorted(find_minima(f, DEFAULT_WINDOW))) == pytest.approx(np.array(minima), abs=1e-5)


@pytest.mark.parametrize("text", ["x^2", "(x - y)^2", "(x^2 + y^2 - 9)^2", "(x*y - 1)^2"])
def test_a_flat_valley_floor_is_reached_wherever_a_path_meets_it(tmp_path, text):
    report = run_json(tmp_path, "-f", text, "--start=-3.3,2.7")
    for run in report["runs"]:
        assert run["status"] == "reached", run["optimizer"]
        assert run["distance"] < 0.1
        assert run["value"] < 0.5


def test_a_minimum_outside_the_window_counts_when_a_path_reaches_it(tmp_path):
    sgd, none = run_json(tmp_path, "-f", "(x - 9)^2 + y^2", "-o", "sgd:lr=0.1,sgd:lr=0")["runs"]
    assert sgd["status"] == "reached"
    assert sgd["path"][-1] == pytest.approx([9.0, 0.0], abs=1e-6)
    assert (none["status"], none["steps_to_minimum"]) == ("not reached", None)
    assert none["distance"] == pytest.approx(math.hypot(13.0, 3.0), abs=1e-6)


def test_start_and_window_follow_the_options(tmp_path):
    settings = run_json(tmp_path, "--start", "-30,2.5", "--steps", 3)["settings"]
    assert settings["start"] == [-30.0, 2.5]
    left, right, bottom, top = settings["window"]
    assert (left, bottom, top) == (pytest.approx(-34.0), -5.0, 5.0)
    assert right >= 10.0
    settings = run_json(tmp_path, "--window=-1,2,-3,4", "-f", "x*x + y*y")["settings"]
    assert settings["window"] == [-1.0, 2.0, -3.0, 4.0]
    assert settings["tolerance"] == pytest.approx(0.03)
    assert -1 < settings["start"][0] < 2
    assert run_json(tmp_path, "--window=-8,8,-9,9")["settings"]["start"] == [-7.0, 2.0]


@pytest.mark.parametrize("name", ["himmelblau", " Rosenbrock "])
def test_function_names_ignore_case(name):
    assert surface_of(name) is SURFACES[name.strip().lower()]


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_a_path_does_not_depend_on_rates_tried_together_with_it():
    surface = SURFACES["beale"]
    for name in ("adam", "lamb", "nesterov:lookahead", "schedulefreeadamw", "muon"):
        together = descend(surface, parse_optimizer(name), (0.001, 0.01, 1e30), 40)
        for lr, points in zip((0.001, 0.01), together, strict=False):
            np.testing.assert_array_equal(points, path_of(surface, name, lr, 40))


def test_more_steps_extend_the_same_path(tmp_path):
    for runs in zip(*(run_json(tmp_path, "-f", "himmelblau", "--steps", n)["runs"] for n in (20, 70)), strict=True):
        short, long = (run["path"] for run in runs)
        assert long[:21] == short
        assert len(long) == 71


def test_lookahead_takes_its_gradient_ahead():
    surface = SURFACES["bowl"]
    ahead, here = np.array([-7.0, 2.0]), np.zeros(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = path_of(surface, "nesterov:lookahead", 0.1, 20)
    for point in path[1:]:
        here = 0.9 * here + 0.1 * (ahead - 0.9 * here) * [0.2, 2.0]
        ahead = ahead - here
        np.testing.assert_allclose(point, ahead, rtol=1e-12)


def test_schedule_free_is_shown_at_its_average():
    surface = SURFACES["bowl"]
    opt = fastopt.ScheduleFreeAdamW(np.array([[-7.0, 2.0]]), lr=0.5)
    for point in path_of(surface, "schedulefreeadamw", 0.5, 10)[1:]:
        opt.step(opt.params * [0.2, 2.0])
        with opt.eval_params() as average:
            np.testing.assert_allclose(point, average[0], rtol=1e-12)
    assert np.abs(opt.params[0] - point).max() > 1e-3


@pytest.mark.parametrize("name", SURFACES)
def test_every_optimizer_descends_at_the_suggested_rate(name):
    surface = SURFACES[name]
    for optimizer in ("sgd", "adam", "lion"):
        choice = parse_optimizer(optimizer)
        lr = suggest_lr(surface, choice, 0.01 * surface.window.extent)
        assert lr in LEARNING_RATES
        points = path_of(surface, optimizer, lr, surface.steps)
        assert all(surface.window.holds(*point) for point in points)
        assert surface.f(*points[-1]) < 0.3 * surface.f(*surface.start)


def test_all_optimizers_run_on_all_of_the_bowl(tmp_path):
    # Run in a separate process: `all` would include optimizers that other tests define.
    picture = tmp_path / "paths.png"
    process = command("-o", "all", "--plot", picture, "--json", "-")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    runs = {run["optimizer"]: run for run in json.loads(out)["runs"]}
    assert set(runs) == {*optimizers(), *FORMS} & set(runs) | set(FORMS)
    assert len(runs) >= 25
    for name, run in runs.items():
        # Steps never shrink; a slow start; bases of gradients of long ago, which turn while the path bends; steps
        # relative to p, which shrink as it does; a rate that begins at a millionth.
        assert run["status"] == "reached" or name in ("lion", "radam", "soap", "adafactor", "prodigy"), name
        assert run["value"] < (0.5 if name == "prodigy" else 0.1), name
        assert name in errors  # the table goes to standard error because of the JSON
    assert "Warning" not in errors
    assert_whole_picture(picture, COLOURS)


# --- paths that do not arrive -----------------------------------------------------------------------------------------


def test_diverging_paths_are_reported_and_clipped(tmp_path):
    picture = tmp_path / "paths.png"
    result = invoke("-o", "sgd:lr=1.2,sgd:lr=1e9,adam", "--plot", picture, "--json", tmp_path / "x.json")
    assert result.exit_code == 0, result.output
    words = plain(result.output)
    assert "sgd:lr=1.2 diverged; try a learning rate below 1.2." in words
    assert re.search(r"sgd:lr=1e\+09: after step \d+ the function or its gradient is not finite", words)
    mild, wild, adam = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert (mild["status"], len(mild["path"])) == ("diverged", 101)
    assert wild["status"] == "diverged"
    assert 2 < len(wild["path"]) < 30
    assert wild["steps_to_minimum"] is None
    assert np.isfinite(wild["path"]).all()
    assert adam["status"] == "reached"
    assert_whole_picture(picture, COLOURS[:3])


def test_huge_points_do_not_change_the_picture_inside_the_window(tmp_path):
    surface = SURFACES["bowl"]
    x, y = surface.window.mesh(31)
    pictures = []
    for far in (1e3, 1e9):
        path = tmp_path / f"{far}.png"
        points = np.array([[-7.0, 2.0], [0.0, 0.0], [0.0, far], [far, far]])
        draw_paths(path, Scene("far", x, y, surface.f(x, y), 0.0, surface.start, surface.minima, {"sgd": points}))
        pictures.append(imread(path))
    np.testing.assert_array_equal(*pictures)


def test_paths_leave_the_window_of_a_function_without_a_minimum(tmp_path):
    result = invoke("-f", "x + y", "-o", "sgd:lr=1,sgd:lr=0.001", "--steps", 100, "--plot", tmp_path / "paths.png")
    assert result.exit_code == 0, result.output
    words = plain(result.output)
    assert "minimum: none found inside the window; choose another --window." in words
    assert "sgd:lr=1 left the window downhill and ended at (-104, -97); widen --window." in words
    assert "not in 100" in words
    assert "left the window" in words
    assert_whole_picture(tmp_path / "paths.png", COLOURS[:2])


def test_a_path_ends_at_the_edge_of_the_domain(tmp_path):
    report = run_json(tmp_path, "-f", "log(x) + y^2", "--start", "1,1", "-o", "sgd:lr=0.3")
    (run,) = report["runs"]
    assert run["status"] == "diverged"
    assert all(x > 0 for x, _ in run["path"])
    assert len(run["path"]) < 10


def test_a_minimum_is_reached_only_if_the_path_stays():
    surface = SURFACES["bowl"]
    through = np.array([[-7.0, 2.0], [0.0, 0.0], [5.0, 0.0], [0.05, 0.0], [0.0, 0.0]])
    assert measure(surface, through, 4, 0.1).reached == 3
    assert measure(surface, through[:3], 2, 0.1).reached is None
    assert measure(surface, through[:2], 4, 0.1).reached is None  # broken off
    assert measure(surface, np.zeros((3, 2)), 2, 0.1).reached == 0


# --- one command, one result ------------------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_result(tmp_path):
    contents = []
    for k in range(2):
        files = [tmp_path / f"{k}.{ending}" for ending in ("json", "png", "gif")]
        result = invoke("-f", "saddle", "-o", "adam,lion", "--steps", 30, *options(*files))
        assert result.exit_code == 0, result.output
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


def options(json_file, picture, animation):
    return "--json", json_file, "--plot", picture, "--animate", animation


def test_an_optimizer_does_not_depend_on_the_others(tmp_path):
    (alone,) = run_json(tmp_path, "-f", "x^4 + y^2", "-o", "adam")["runs"]
    *_, last = run_json(tmp_path, "-f", "x^4 + y^2", "-o", "sgd,rmsprop,adam")["runs"]
    assert alone == last


# --- pictures ---------------------------------------------------------------------------------------------------------


def assert_whole_picture(path, colours):
    """Check that the picture has the expected colours, and that nothing crosses its edges."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    height, width, _ = pixels.shape
    assert width >= 1000
    assert height >= 600
    for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (edge == 255).all()
    drawn = pixels @ (0x10000, 0x100, 1)
    for colour in colours:
        assert (drawn == int(colour[1:], 16)).any()


def test_the_default_picture(tmp_path):
    path = tmp_path / "paths.png"
    result = invoke("--plot", path)
    assert result.exit_code == 0, result.output
    assert f"picture: {path}" in result.output
    assert_whole_picture(path, COLOURS[:4])


def test_svg_names_the_axes_and_every_path(tmp_path):
    path = tmp_path / "paths.svg"
    assert invoke("-f", "himmelblau", "--plot", path).exit_code == 0
    tree = ElementTree.parse(path)
    comments = path.read_text(encoding="utf-8")
    for text in ("x", "y", "f(x, y)", "start", "minimum", "sgd, lr 0.01: 19", "steps to a minimum"):
        assert f"<!-- {text} -->" in comments
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}path"))) > 20


@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "log(x) + y", "--start", "1,1"],
        ["-f", "1/(x*y)", "--start", "1,1"],
        ["-f", "tan(x) + y^2"],
        ["-f", "exp(exp(x)) + y^2", "--start", "1,1"],
        ["-f", "1e-300*x + y*1e-300"],
        ["-f", "1e15 + x + y"],
        ["-f", "x^2 + y^2", "--window", "1000000,1000001,1e-9,2e-9"],
        ["-f", "+".join(["x^2*y^2"] * 30)],
        ["-o", "adam:betas=0.9/0.99:eps=1e-7:weight_decay=0.01:lr=0.25:amsgrad"],
        ["--steps", 1],
        ["-f", "rosenbrock", "--start=-1e3,1e3"],
    ],
)
def test_awkward_functions_are_drawn(tmp_path, arguments):
    path = tmp_path / "paths.png"
    result = invoke(*arguments, "-o", "sgd", "--plot", path)
    assert result.exit_code == 0, result.output
    assert_whole_picture(path, [])
    assert imread(path)[..., :3].std() > 0.05


def test_the_animation_grows(tmp_path):
    path = tmp_path / "paths.gif"
    result = invoke("--steps", 24, "--animate", path)
    assert result.exit_code == 0, result.output
    assert f"animation: {path}" in result.output
    with Image.open(path) as animation:
        assert animation.n_frames == 25
        assert animation.size >= (800, 400)
        assert animation.info["loop"] == 0
        counts = []
        for k in range(animation.n_frames):
            animation.seek(k)
            pixels = np.array(animation.convert("RGB"))
            assert (pixels[:2] == 255).all()
            plot = pixels[: len(pixels), : int(0.66 * pixels.shape[1])]  # exclude the legend
            blue = (plot == [0x00, 0x72, 0xB2]).all(axis=2)
            counts.append(int(blue.sum()))
    assert counts[0] < 200 < 2000 < counts[-1]
    assert (np.diff(counts) > -100).all()  # later paths cover some of it


def test_frames_are_limited():
    def scene(steps):
        return Scene(
            "", *np.zeros((3, 2, 2)), 0.0, (0.0, 0.0), [], {"a": np.zeros((steps + 1, 2)), "b": np.zeros((3, 2))}
        )

    assert frames_of(scene(24)) == list(range(25))
    many = frames_of(scene(100_000))
    assert len(many) == FRAMES
    assert (many[0], many[-1]) == (0, 100_000)


def test_an_interrupted_animation_keeps_the_old_file(tmp_path):
    path = tmp_path / "paths.gif"
    path.write_bytes(b"old")
    surface = SURFACES["bowl"]
    x, y = surface.window.mesh(11)
    scene = Scene(
        "", x, y, surface.f(x, y), 0.0, surface.start, surface.minima, {"sgd": path_of(surface, "sgd", 0.5, 9)}
    )
    made = []

    def interrupt():
        made.append(1)
        if len(made) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        animate_paths(path, scene, interrupt)
    assert path.read_bytes() == b"old"


# --- output -----------------------------------------------------------------------------------------------------------


def test_the_table(tmp_path):
    result = invoke()
    assert result.exit_code == 0
    lines = plain(result.output.replace("\n", " ; "))
    for word in ("f(x, y) = x^2/10 + y^2", "100 steps from (-7, 2)", "minimum: 0 at (0, 0).", "within 0.1 of one"):
        assert word in lines
    for row in ("sgd 0.95 29", "momentum 0.1 77", "adagrad 1.5 32", "adam 0.3 82"):
        assert re.search(rf"; {row} [0-9.e-]+ [0-9.e-]+ ;", lines), lines
    assert "minima: 0 at (3, 2), (-2.805, 3.131)," in plain(invoke("-f", "himmelblau").output)


def test_the_table_fits_eighty_columns():
    result = invoke("-o", "nesterov:lookahead:momentum=0.95:lr=1e9,sgd:lr=1", "--steps", 100, columns=80)
    assert max(map(len, result.output.splitlines())) <= 80
    assert "not in 100" in result.output


def test_tolerance_and_lr(tmp_path):
    loose, tight = (run_json(tmp_path, "-o", "sgd", "--tolerance", near) for near in (1.0, 0.001))
    assert loose["runs"][0]["steps_to_minimum"] < 29 < tight["runs"][0]["steps_to_minimum"]
    runs = run_json(tmp_path, "-o", "sgd,adam:lr=0.2", "--lr", 0.05)["runs"]
    assert [run["lr"] for run in runs] == [0.05, 0.2]


def command(*arguments):
    """Start the command in a separate process."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastopt", "contour", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals need POSIX")
def test_progress_on_a_terminal(tmp_path):
    shown, out = on_terminal("contour", "--steps", "9", "--animate", tmp_path / "paths.gif")
    words = plain(shown)
    assert "9/9 steps" in words
    assert "10/10 frames" in words
    assert "frames" not in out


def test_help_lists_options_and_examples():
    words = plain(invoke("--help").output)
    for option in ("--function", "--optimizer", "--lr", "--steps", "--start", "--window", "--tolerance", "--plot"):
        assert option in words
    for name in ("--animate", "--json", "Examples", *SURFACES, *FUNCTIONS, "x^2/10 + y^2", "rosenbrock 1000"):
        assert name in words
    examples = re.findall(r"fastopt contour (-.*?)(?= fastopt |$)", words)
    assert len(examples) == 5


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["-f", "rosenbrok"], ["--function", "or an expression in x and y such as", "did you mean 'rosenbrock'?"]),
        (["-f", "x^2 + z"], ["--function", "at character 7", "name: must be one of x, y,", "got 'z'"]),
        (["-f", "__import__('os')"], ["--function", 'unexpected "\'"']),
        (["-f", "x.real + y"], ["--function", "attributes are not part"]),
        (["-f", "x^1e9"], ["--function", "a constant exponent must lie within +-100, got 1e+09"]),
        (["-f", "x" * 100_000], ["--function", "must be at most 1000 characters long, got 100000"]),
        (["-f", "7"], ["--function", "must depend on x or y", "got '7'"]),
        (["-f", ""], ["--function", "must be a number"]),
        (["-f", "log(x)"], ["--start", "start: must be a point where log(x) has a finite value", "got (-4, 3)"]),
        (["-f", "sqrt(x^2 + y^2)", "--start", "0,0"], ["--start", "a finite value and gradient, got (0, 0)"]),
        (["-o", "adma"], ["--optimizer", "did you mean", "'adam'"]),
        (["-o", "adam:betas=1.5/0.9"], ["--optimizer", "betas[0]: must be a number in [0, 1), got 1.5"]),
        (["-o", "adam:lr=-1"], ["--optimizer", "lr: must be a finite number from 0, such as 0.001, got -1.0"]),
        (["--lr", "nan"], ["--lr", "learning rate: must be a finite number from 0, such as 0.001, got nan"]),
        (["--start", "1"], ["--start", "must be 2 finite numbers separated by commas, X,Y, got '1'"]),
        (["--start", "1,2,3"], ["--start", "must be 2 finite numbers"]),
        (["--start", "1,inf"], ["--start", "must be 2 finite numbers"]),
        (["--start", "a,b"], ["--start", "must be 2 finite numbers"]),
        (["--start", "1e300,0"], ["--start", "has a finite value and gradient, got (1e+300, 0)"]),
        (["--start", "9,9", "--window", "0,1,0,1"], ["--start", "start: must be inside --window, got (9, 9)"]),
        (["--window", "1,2,3"], ["--window", "must be 4 finite numbers", "LEFT,RIGHT,BOTTOM,TOP"]),
        (["--window", "2,1,0,1"], ["--window", "LEFT below RIGHT"]),
        (["--window=-1e308,1e308,0,1"], ["--window", "LEFT below RIGHT"]),
        (["--tolerance", "0"], ["--tolerance", "a finite number above 0"]),
        (["--tolerance", "nan"], ["--tolerance", "a finite number above 0"]),
        (["--steps", "0"], ["--steps"]),
        (["--steps", "100001"], ["--steps", "100000"]),
        (["--plot", "paths.doc"], ["--plot", "paths.doc", ".png"]),
        (["--plot", "missing/x.png"], ["--plot", "in an existing directory, got missing", "mkdir -p missing"]),
        (["--animate", "paths.png"], ["--animate", "paths.png: must end in .gif, got .png"]),
        (["--animate", "missing/x.gif"], ["--animate", "in an existing directory, got missing"]),
        (["--animate", "-"], ["--animate", "must end in .gif, got no ending"]),
        (["--json", "."], ["--json", "must be a file, got a directory"]),
    ],
)
def test_errors_name_the_option_and_the_remedy(arguments, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    words = plain(result.output)
    assert len(words) < 700
    for message in messages:
        assert message in words
    assert not list(tmp_path.iterdir())


def test_ten_megabytes_are_refused():
    with pytest.raises(ValueError, match="must be at most 1000 characters long, got 10000000"):
        surface_of("rosenbrock" * 1_000_000)


def test_a_start_outside_a_requested_window_is_refused():
    with pytest.raises(ValueError, match=r"must be inside --window, got \(5, 5\)"):
        placed(surface_of("bowl"), Point(5.0, 5.0), Window(-1.0, 1.0, -1.0, 1.0))
