"""Checkpoints: every optimizer goes on to the bit, damage is found before anything changes, and kills lose nothing.

The file is also the script that two of its tests run in a process of its own: ``python test_checkpoint.py resume
FOLDER`` continues from the checkpoints in FOLDER, ``python test_checkpoint.py kills FOLDER`` kills processes that save
there. Each prints one JSON object.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import random
import re
import signal
import stat
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import BY_NAME, EVERYTHING, PER_RULE
from safetensors.numpy import load_file, save_file
from scripts import compiled, run

import fastopt
from fastopt import checkpoint, schedules
from fastopt.checkpoint import CHECKPOINT_FORMAT, describe
from fastopt.interop import (
    from_keras_state,
    from_optax_state,
    from_torch_state,
    to_keras_state,
    to_optax_state,
    to_torch_state,
)

posix = pytest.mark.skipif(os.name == "nt", reason="of POSIX systems")


def tree(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"W": rng.normal(size=(5, 3)).astype(dtype), "b": rng.normal(size=3).astype(dtype)}


def bits(opt: fastopt.Optimizer) -> dict[str, str]:
    """Digests of all that the optimizer holds."""
    opt.flush_rows()
    buffers = {
        "": opt.flat.data,
        **{f"{name}/": np.concatenate([v.ravel() for v in views]) for name, views in opt.state.arrays.items()},
    }
    return {name: hashlib.sha256(buffer.tobytes()).hexdigest() for name, buffer in buffers.items()}


def same(a: Any, b: Any) -> bool:
    """Whether two states, as `state_dict` gives them, are equal to the bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


# --- a run that is continued ------------------------------------------------------------------------------------------


NAMES = [str(case) for case in PER_RULE]


def make(name: str, seed: int) -> fastopt.Optimizer:
    lr = schedules.exponential(0.05, k=0.1)
    return BY_NAME[name].make(tree(seed), lr=lr, overrides={"W": {"lr": 0.01}}, **EVERYTHING)


def advance(opt: fastopt.Optimizer, first: int) -> None:
    """Four steps, three of them numbered from `first`: in one of these b has no gradient, and the last has a NaN."""
    for number in range(first, first + 3):
        grads = tree(100 + number)
        if number % 3 == 1:
            grads["b"] = None
        opt.step(grads)
    opt.step({"W": np.full((5, 3), np.nan, np.float32), "b": None})
    assert opt.state_dict()["nonfinite"]["consecutive"] == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, fastopt.Optimizer]]:
    """A checkpoint of every optimizer after four steps, and the optimizers themselves, after four more."""
    folder = tmp_path_factory.mktemp("saved")
    optimizers = {}
    for number, name in enumerate(NAMES):
        opt = optimizers[name] = make(name, seed=1)
        advance(opt, 0)
        state = opt.state_dict()
        opt.save(folder / f"{number}.safetensors", extra={"name": name})
        assert same(opt.state_dict(), state)
        advance(opt, 3)
    return folder, optimizers


def resumed(path: Path) -> tuple[str, fastopt.Optimizer]:
    name = describe(path)["extra"]["name"]
    opt = make(name, seed=2)
    assert opt.load(path) == {"name": name}
    return name, opt


@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES)))
def test_every_optimizer_goes_on_to_the_bit(saved, number, name):
    folder, optimizers = saved
    found, opt = resumed(folder / f"{number}.safetensors")
    assert found == name
    assert opt.step_count == 4
    advance(opt, 3)
    assert bits(opt) == bits(optimizers[name])
    assert same(opt.state_dict(), optimizers[name].state_dict())  # missed updates, counters, hyperparameters and all


def test_every_optimizer_goes_on_to_the_bit_in_another_process(saved):
    folder, optimizers = saved
    finished = run(__file__, "resume", folder, timeout=120.0, **compiled())
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == {name: bits(opt) for name, opt in optimizers.items()}


def resume_all(folder: str) -> dict[str, dict[str, str]]:
    found = {}
    for path in Path(folder).iterdir():
        name, opt = resumed(path)
        advance(opt, 3)
        found[name] = bits(opt)
    return found


def test_rows_left_behind_are_brought_up_to_date_and_later_steps_agree(tmp_path):
    def some_rows(opt: fastopt.Optimizer, seed: int) -> None:
        rng = np.random.default_rng(seed)
        opt.step_rows({"W": (rng.integers(0, 5, 2), rng.normal(size=(2, 3)).astype(np.float32))})

    opt, other = (fastopt.Momentum(tree(seed), lr=0.1) for seed in (1, 2))
    for seed in range(3):
        some_rows(opt, seed)
        some_rows(other, seed + 10)
    opt.save(tmp_path / "x")
    other.load(tmp_path / "x")
    assert bits(other) == bits(opt)
    some_rows(opt, 3)
    some_rows(other, 3)
    assert bits(other) == bits(opt)


def test_accumulated_gradients_are_dropped(tmp_path):
    opt = fastopt.SGD(tree(1), lr=0.1)
    opt.save(tmp_path / "x")
    opt.accumulate(tree(2))
    opt.load(tmp_path / "x")
    opt.step(tree(3))  # refused while gradients are waiting
    assert opt.step_count == 1


def test_double_precision_scalars_empty_arrays_and_a_bare_array(tmp_path):
    params = {
        "W": np.arange(6.0).reshape(2, 3),
        "scalar": np.array(math.pi),
        "none": np.zeros((0, 3)),
        "é\n": np.ones(1),
    }
    opt = fastopt.Adam(params)
    opt.step({name: np.ones_like(array) for name, array in params.items()})
    opt.save(tmp_path / "x")
    other = fastopt.Adam({name: np.zeros_like(array) for name, array in params.items()})
    other.load(tmp_path / "x")
    assert bits(other) == bits(opt)
    bare = fastopt.SGD(np.ones(3), lr=0.1)
    bare.save(str(tmp_path / "y"))
    other_bare = fastopt.SGD(np.zeros(3), lr=0.5)
    other_bare.load(os.fsencode(tmp_path / "y"))
    np.testing.assert_array_equal(other_bare.params, np.ones(3))
    assert other_bare.lr == 0.1


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adam() -> fastopt.Optimizer:
    opt = fastopt.Adam(tree(1), ema=0.9, overrides={"b": {"lr": 0.01}})
    opt.step(tree(2))
    return opt


def fresh(**options: Any) -> fastopt.Optimizer:
    return fastopt.Adam(tree(3), **{"ema": 0.9, **options})


def test_the_file_is_a_safetensors_file_that_describes_itself(adam, tmp_path):
    path = tmp_path / "run.safetensors"
    adam.save(path, extra={"losses": [0.1, 1e-300], "epoch": 7, "where": {"nested": [None, True, "é"]}})
    arrays = load_file(path)
    assert sorted(arrays) == ["W", "b", "ema/W", "ema/b", "m/W", "m/b", "v/W", "v/b"]
    np.testing.assert_array_equal(arrays["W"], adam.params["W"])
    np.testing.assert_array_equal(arrays["v/b"], adam.states["v"]["b"])
    np.testing.assert_array_equal(arrays["ema/b"], adam.ema["b"])
    found = describe(path)
    state = adam.state_dict()
    assert found["format"] == CHECKPOINT_FORMAT
    assert (found["fastopt"], found["optimizer"], found["rule"]) == (fastopt.__version__, "Adam", "adam")
    assert (found["dtype"], found["paths"]) == ("float32", ["W", "b"])
    for key in ("step", "missed", "overrides", "nonfinite"):
        assert found[key] == state[key]
    assert found["hyper"] == {**state["hyper"], "betas": [0.9, 0.999]}
    assert found["options"]["ema"] == 0.9
    assert adam.load(path) == found["extra"]
    assert found["extra"] == {"losses": [0.1, 1e-300], "epoch": 7, "where": {"nested": [None, True, "é"]}}


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ([1], TypeError, r"extra: must be a dict with str keys, got \[1\]"),
        ({1: 2}, TypeError, r"extra: must be a dict with str keys"),
        ({"x": math.nan}, ValueError, r"extra\['x'\]: must be JSON data"),
        ({"x": [math.inf]}, ValueError, r"extra\['x'\]: must be JSON data"),
        ({"x": np.ones(2)}, TypeError, r"extra\['x'\]: must be JSON data.*ndarray"),
        ({"x": {(1, 2): 3}}, TypeError, r"extra\['x'\]: must be JSON data"),
    ],
)
def test_an_extra_that_json_cannot_hold_is_refused(adam, tmp_path, extra, error, message):
    with pytest.raises(error, match=message):
        adam.save(tmp_path / "x", extra=extra)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"extra\['deep'\]: must be JSON data"):
        adam.save(tmp_path / "x", extra={"deep": deep})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (("m/W", "W"), r"parameter 'm/W' and 'm' of parameter 'W': must have different .* got 'm/W' for both; rename"),
        (("ema/W", "W"), r"parameter 'ema/W' and 'ema' of parameter 'W': must have different .* got 'ema/W' for both"),
        (("__metadata__",), r"parameter '__metadata__': must have another name"),
        (("\ud800",), r"parameter '\\ud800': must have a name that UTF-8 can encode"),
    ],
)
def test_names_that_the_file_cannot_hold_are_refused(tmp_path, params, message):
    opt = fastopt.Adam({name: np.ones(2, np.float32) for name in params}, ema=0.9)
    with pytest.raises(ValueError, match=message):
        opt.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_saving_and_loading_are_refused_while_the_parameters_are_elsewhere(adam, tmp_path):
    adam.save(tmp_path / "x")
    with adam.swap_ema():
        for call in (adam.save, adam.load):
            with pytest.raises(RuntimeError, match=rf"^{call.__name__}\(\) inside `with opt.swap_ema\(\)`"):
                call(tmp_path / "x")


def test_saving_copies_no_arrays_and_loading_only_once(tmp_path):
    size = 1_000_000
    opt = fastopt.Adam({"w": np.ones(size, np.float32)})
    opt.save(tmp_path / "x")  # imports what there is to import
    total = 3 * opt.flat.data.nbytes
    peaks = []
    for call in (opt.save, opt.load):
        tracemalloc.start()
        call(tmp_path / "x")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 0.02 * total
    assert peaks[1] < 1.02 * total


# --- damage -----------------------------------------------------------------------------------------------------------


def refuses(
    opt: fastopt.Optimizer, path: Any, kinds: Any = ValueError, match: str | None = None, **options: Any
) -> None:
    """`load` raises, and the optimizer stays as it was: arrays, counters and hyperparameters."""
    before, said = (
        bits(opt),
        (
            opt.step_count,
            opt._pipeline.groups.missed,
            opt._pipeline.groups.base,
            opt._pipeline.groups.changes,
            opt._pipeline.nonfinite,
        ),
    )
    with pytest.raises(kinds, match=match) as caught:
        opt.load(path, **options)
    assert os.fsdecode(path) in str(caught.value)
    assert bits(opt) == before
    assert (
        opt.step_count,
        opt._pipeline.groups.missed,
        opt._pipeline.groups.base,
        opt._pipeline.groups.changes,
        opt._pipeline.nonfinite,
    ) == said


def error_of(opt: fastopt.Optimizer, path: Path) -> str:
    """Return the message of the error of `load`, or an empty text."""
    try:
        opt.load(path)
    except ValueError as error:
        return str(error)
    return ""


@posix
def test_no_flipped_bit_goes_unnoticed(adam, tmp_path):
    path = tmp_path / "x"
    adam.save(path)
    good = path.read_bytes()
    opt = fresh()
    before = bits(opt)
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(good):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                assert error_of(opt, path).startswith(f"{path}: "), (position, bit)
            os.pwrite(file.fileno(), bytes([byte]), position)
            assert bits(opt) == before
    opt.load(path)
    assert bits(opt) == bits(adam)


def test_no_lost_or_added_end_goes_unnoticed(adam, tmp_path):
    path = tmp_path / "x"
    adam.save(path)
    good = path.read_bytes()
    opt = fresh()
    before = bits(opt)
    for length in range(len(good) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="must be a fastopt checkpoint, got another or a damaged file"):
            opt.load(path)
    path.write_bytes(good + b"\0")
    refuses(opt, path, match="must be a fastopt checkpoint, got another or a damaged file")
    assert bits(opt) == before


OTHER_FILES = {
    "empty": b"",
    "text": b"weights and biases\n" * 100,
    "pickle": pickle.dumps({"W": np.ones(3)}),
    "huge header": (10**18).to_bytes(8, "little") + b"{}" * 50,
    "longest header": b"\xff" * 8 + b"{}" * 50,
    "no header": bytes(8),
    "deep": (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995,
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
def test_files_of_other_kinds_are_refused(content, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(content)
    refuses(fresh(), path, match="must be a fastopt checkpoint, got another or a damaged file")
    with pytest.raises(ValueError, match="must be a fastopt checkpoint, got another or a damaged file"):
        describe(path)


def test_weights_of_another_program_are_refused(tmp_path):
    for metadata in (None, {}, {"format": "pt"}):
        save_file(tree(1), tmp_path / "x", metadata)
        refuses(fresh(), tmp_path / "x", match="a safetensors file of something else; safetensors.numpy.load_file")


def test_what_is_no_file_raises_the_usual_error(adam, tmp_path):
    refuses(adam, tmp_path / "missing", FileNotFoundError)
    refuses(adam, tmp_path, IsADirectoryError)
    with pytest.raises(IsADirectoryError, match="is a directory; give the name of a file in it"):
        adam.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing/x"):
        adam.save(tmp_path / "missing" / "x")
    for call in (adam.save, adam.load, describe):
        with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object, not int"):
            call(3)
        with pytest.raises(ValueError, match="null byte"):
            call("a\0b")
    assert not list(tmp_path.iterdir())


@posix
@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no devices here")
def test_a_device_is_not_replaced(adam):
    with pytest.raises(ValueError, match="/dev/null: must be a regular file, which can be replaced"):
        adam.save("/dev/null")
    refuses(adam, "/dev/null", match="must be a fastopt checkpoint, got a file that is not regular")
    assert not Path("/dev/null").is_file()


# --- files that lie ---------------------------------------------------------------------------------------------------


def forge(opt: fastopt.Optimizer, path: Path, change: Any = None, text: str | None = None, **arrays: Any) -> None:
    """A checkpoint of `opt`, written by another program, with these changes and right digests."""
    opt.save(path)
    held = load_file(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    document = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["fastopt"])
    for key, array in arrays.items():
        held[key] = array
        if array is None:
            del held[key]
    held = {key: np.asarray(array, order="C") for key, array in held.items()}
    document["sha256"] = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in held.items()}
    if callable(change):
        change(document)
    else:
        document.update(change or {})
    text = json.dumps(document) if text is None else text
    save_file(held, path, {"fastopt": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def test_a_file_that_another_program_wrote_is_read(adam, tmp_path):
    forge(adam, tmp_path / "x")
    opt = fresh()
    opt.load(tmp_path / "x")
    assert bits(opt) == bits(adam)


BIG = 10**400
LIES: list[tuple[Any, str]] = [
    ({"step": -1}, "'step': must be in"),
    ({"step": True}, "'step': must be int, got bool"),
    ({"step": 1.0}, "'step': must be int, got float"),
    ({"step": BIG}, "'step': must be in"),
    ({"step": 2**63}, "'step': must be in"),
    ({"step": "1"}, "'step': must be int, got str"),
    ({"missed": {"W": -1}}, r"missed\['W'\]: must be an int from 0, got -1"),
    ({"missed": {"W": 2}}, "must be at most step=1, got 2"),
    ({"missed": {"W": BIG}}, "missed"),
    ({"missed": {"W": True}}, r"missed\['W'\]: must be .*, got True"),
    ({"missed": {"W": [1]}}, r"missed\['W'\]: must be .*, got \[1\]"),
    ({"missed": {"X": 1}}, "missed: must name parameters, got 'X'"),
    ({"missed": []}, "'missed': must be dict, got list"),
    ({"hyper": {}}, "hyper: must hold all hyperparameters, got no"),
    ({"overrides": {"X": {}}}, "overrides: must name parameters, got 'X'"),
    ({"overrides": {"W": 3}}, "overrides of 'W': must be a dict"),
    ({"overrides": {"W": {"lr": -1.0}}}, r"lr: must be a number in \[0, inf\), got -1\.0"),
    ({"overrides": {"W": {"color": 1}}}, "color"),
    ({"nonfinite": {}}, "nonfinite: must be a dict of"),
    ({"nonfinite": {"consecutive": -1, "total": 0}}, "consecutive"),
    ({"options": {}}, "must be saved with ema=0.9, .*, got ema=None"),
    ({"paths": ["W", 3]}, "'paths': must be text, got int"),
    ({"paths": ["W"]}, "lacks 'b'"),
    ({"dtype": "float128"}, "must hold float32 parameters, .*, got float128"),
    ({"rule": "exec"}, "rule 'exec'"),
    ({"format": True}, "description without a format"),
    ({"format": "1"}, "description without a format"),
    (
        {"format": 2, "fastopt": "9.0"},
        "must have checkpoint format 1 .* got format 2, written by fastopt 9.0; upgrade fastopt",
    ),
    ({"state_format": 99}, "format: must be 1 .*, got 99"),
    ({"fastopt": None}, "'fastopt': must be str, got NoneType"),
    ({"extra": []}, "'extra': must be dict, got list"),
    ({"sha256": {}}, "'W': must have the SHA-256 stored in the file, got another"),
    ({"sha256": {"W": 3}}, "'W': must have the SHA-256 stored in the file, got another"),
    (lambda document: document.pop("hyper"), "'hyper': must be dict, got nothing"),
    *[
        (lambda document, name=name, value=value: document["hyper"].update({name: value}), message)
        for name, value, message in [
            ("lr", BIG, "lr: must be"),
            ("lr", None, "lr: must be .*, got None"),
            ("lr", True, "lr: must be .*, got True"),
            ("lr", "0.1", r"lr: must be a number in \[0, inf\), got '0\.1'"),
            (
                "lr",
                {"schedule": "cosine(0.1, 0.0, 10)"},
                r"hyper: lr: must be a schedule .*cosine.*; construct it with the schedule",
            ),
            ("lr", 1e300, "must be in the range of float32"),
            ("betas", [0.9], "betas"),
            ("betas", [0.9, 2.0], r"betas\[1\]: must be .*, got 2.0"),
            ("betas", [[0.9], 0.9], "betas"),
            ("color", 1.0, "color"),
        ]
    ],
]


@pytest.mark.parametrize(("change", "message"), LIES)
def test_a_document_that_lies_changes_nothing(adam, tmp_path, change, message):
    forge(adam, tmp_path / "x", change)
    refuses(fresh(), tmp_path / "x", (ValueError, TypeError), match=message)


@pytest.mark.parametrize(
    ("replace", "by"),
    [
        ('"step": 1,', '"step": 1e400,'),
        ('"step": 1,', f'"step": {"9" * 5000},'),
        ('"lr": 0.001', '"lr": NaN'),
        ('"lr": 0.001', '"lr": -Infinity'),
        ('"lr": 0.001', '"lr": 1e999'),
        ('"extra": {}', '"extra": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        ('"extra": {}', '"extra": {"x": '),
        ("{", "["),
        ("", "[]"),
        ("", "null"),
        ("", "3"),
        ("", ""),
    ],
)
def test_a_document_that_is_no_json_changes_nothing(adam, tmp_path, replace, by):
    def render(document: dict[str, Any]) -> None:
        nonlocal text
        text = json.dumps(document)

    text = ""
    forge(adam, tmp_path / "x", render)
    assert replace in text
    forge(adam, tmp_path / "x", text=text.replace(replace, by, 1) if replace else by)
    refuses(fresh(), tmp_path / "x", (ValueError, TypeError))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"m/W": None}, "array 'm/W': must be in the file, got none"),
        ({"u/W": np.ones(3, np.float32)}, "array 'u/W': must not be in the file, got one"),
        ({"W": np.ones((3, 5), np.float32)}, r"'W': must have shape \(5, 3\) as in this optimizer, got \(3, 5\)"),
        ({"v/b": np.ones(3)}, "'v/b': must be F32 as in this optimizer, got F64"),
        ({"b": np.ones(3, np.int32)}, "'b': must be F32 .*, got I32"),
        ({"b": np.ones(3, np.float16)}, "'b': must be F32 .*, got F16"),
    ],
)
def test_arrays_that_do_not_fit_change_nothing(adam, tmp_path, arrays, message):
    forge(adam, tmp_path / "x", **arrays)
    refuses(fresh(), tmp_path / "x", match=message)


# --- another optimizer ------------------------------------------------------------------------------------------------


def relu(step: int) -> float:
    if step > 0:
        raise IndexError("a schedule that ends")
    return 0.1


OTHERS: list[tuple[Any, str]] = [
    (
        lambda: fastopt.AdamW(tree(3), ema=0.9),
        r"must be saved by AdamW \(rule 'adamw'\), as this optimizer, got Adam \(rule 'adam'\)",
    ),
    (
        lambda: fastopt.Adam(tree(3, np.float64), ema=0.9),
        "must hold float64 parameters, as this optimizer, got float32",
    ),
    (lambda: fresh(ema=0.99), "must be saved with ema=0.99, .*, got ema=0.9; construct the optimizer with the same"),
    (lambda: fresh(ema=None), "must be saved with ema=None, .*, got ema=0.9"),
    (lambda: fresh(maximize=True), "must be saved with maximize=True, .*, got maximize=False"),
    (
        lambda: fresh(decoupled_weight_decay=True),
        "must be saved with decoupled_weight_decay=True, .*, got decoupled_weight_decay=False",
    ),
    (lambda: fresh(lr=schedules.constant(0.1)), "lr: must be 0.001 in this optimizer, .*, got a schedule"),
    (lambda: fresh(amsgrad=True), "rule 'amsgrad'"),
    (
        lambda: fastopt.Adam({"W": tree(3)["W"], "c": np.ones(3, np.float32), "d": np.ones(3, np.float32)}, ema=0.9),
        "must hold the parameters of this optimizer, got a file that lacks 'c', 'd' and also has 'b'",
    ),
    (
        lambda: fastopt.Adam({**tree(3), "W": np.ones((3, 5), np.float32)}, ema=0.9),
        r"'W': must have shape \(3, 5\) as in this optimizer, got \(5, 3\)",
    ),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_an_error_names_what_differs_in_another_optimizer(adam, tmp_path, other, message):
    adam.save(tmp_path / "x")
    refuses(other(), tmp_path / "x", match=message)


def test_a_schedule_that_fails_at_the_step_of_the_file_changes_nothing(tmp_path):
    opt = fastopt.SGD(tree(1), lr=schedules.constant(0.1))
    opt.step(tree(2))
    opt.save(tmp_path / "x")
    refuses(fastopt.SGD(tree(3), lr=relu), tmp_path / "x", match="a schedule that ends", keep={"lr"})


# --- options and schedules --------------------------------------------------------------------------------------------

CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("max_norm", {"max_norm": 1.0}, {"max_norm": 2.0}),
    ("max_norm", {"max_norm": 1.0}, {}),
    ("clip_norm_per_tensor", {"clip_norm_per_tensor": 1.0}, {}),
    ("clip_norm_per_tensor", {}, {"clip_norm_per_tensor": 1.0}),
    ("clip_value", {}, {"clip_value": 0.5}),
    ("nonfinite", {"nonfinite": "skip"}, {"nonfinite": "zero"}),
    ("nonfinite", {}, {"nonfinite": "raise"}),
    ("maximize", {}, {"maximize": True}),
    ("ema", {"ema": 0.9}, {"ema": 0.99}),
    ("decoupled_weight_decay", {}, {"decoupled_weight_decay": True}),
    ("decoupled_weight_decay", {"convention": "keras"}, {}),
    ("lr", {"lr": schedules.cosine(0.1, 0.0, steps=10)}, {"lr": schedules.cosine(0.1, 0.0, steps=20)}),
    ("lr", {"lr": schedules.cosine(0.1, 0.0, steps=10)}, {"lr": schedules.linear(0.1, 0.0, steps=10)}),
    ("lr", {"lr": schedules.constant(0.1)}, {"lr": 0.1}),
    ("lr", {"lr": 0.1}, {"lr": schedules.constant(0.1)}),
    ("lr", {"lr": lambda step: 0.1}, {"lr": math.sqrt}),
    ("weight_decay", {"weight_decay": schedules.constant(0.1)}, {"weight_decay": schedules.constant(0.2)}),
    (
        "lr",
        {"overrides": {"b": {"lr": schedules.constant(0.1)}}},
        {"overrides": {"b": {"lr": schedules.constant(0.2)}}},
    ),
]


@pytest.mark.parametrize("way", ["load", "load_state_dict"])
@pytest.mark.parametrize(("name", "there", "here"), CHANGES)
def test_what_changes_the_run_is_compared_unless_it_is_kept(tmp_path, way, name, there, here):
    saved, opt, kept = (fastopt.Adam(tree(3), **options) for options in (there, here, here))
    saved.step(tree(1))
    saved.save(tmp_path / "x")
    state = saved.state_dict()

    def restore(opt: fastopt.Optimizer, **options: Any) -> None:
        opt.load(tmp_path / "x", **options) if way == "load" else opt.load_state_dict(state, **options)

    before = bits(opt)
    with pytest.raises(ValueError, match=rf"(?=.*\b{name}\b).*must be .*, got .*keep=\{{'{name}'\}}"):
        restore(opt)
    assert (bits(opt), opt.step_count) == (before, 0)
    wanted = [group.values[name] for group in kept._pipeline.groups.list] if name in kept.rule.names() else None
    restore(kept, keep={name, "lr"})
    assert kept.step_count == 1
    assert kept._pipeline.options == opt._pipeline.options
    if wanted is not None:
        assert [group.values[name] for group in kept._pipeline.groups.list] == wanted
    for array, own in zip(saved.states["m"].values(), kept.states["m"].values(), strict=True):
        np.testing.assert_array_equal(own, array)


def test_an_average_that_only_one_of_them_has_cannot_be_kept(adam, tmp_path):
    adam.save(tmp_path / "x")
    for load, source in (("load", tmp_path / "x"), ("load_state_dict", adam.state_dict())):
        with pytest.raises(ValueError, match=r"must be saved with ema=None, .* got ema=0.9; .* with strict=False"):
            getattr(fresh(ema=None), load)(source, keep={"ema"})


@pytest.mark.parametrize("way", ["load", "load_state_dict"])
def test_options_that_leave_the_update_as_it_is_may_differ(adam, tmp_path, way):
    adam.save(tmp_path / "x")
    opt = fresh(zero_grad=True, grad_norm=True)
    opt.load(tmp_path / "x") if way == "load" else opt.load_state_dict(adam.state_dict())
    assert opt.step_count == 1


def test_the_same_function_is_the_same_schedule_in_another_process(tmp_path):
    def schedule(address: int) -> Any:
        class Schedule:
            def __call__(self, step: int) -> float:
                return 0.1

            def __repr__(self) -> str:
                return f"<function schedule at {address:#x}>"

        return Schedule()

    fastopt.SGD(tree(1), lr=schedule(0x7F01)).save(tmp_path / "x")
    fastopt.SGD(tree(1), lr=schedule(0x7F02)).load(tmp_path / "x")


def test_the_states_of_versions_without_options_are_read(adam):
    state = adam.state_dict()
    del state["options"]
    opt = fresh(max_norm=1.0)
    opt.load_state_dict(state)
    assert opt.step_count == 1


def test_keep_leaves_hyperparameters_as_they_are_for_every_parameter(tmp_path):
    saved = fastopt.AdamW(tree(1), lr=0.1, weight_decay=0.1, overrides={"b": {"lr": 0.01, "weight_decay": 0.0}})
    saved.save(tmp_path / "x")
    for keep in ({"lr"}, ["lr"], ("lr",), {"lr": 1}, frozenset({"lr"})):
        opt = fastopt.AdamW(tree(1), lr=0.5, weight_decay=0.5, overrides={"W": {"lr": 0.05, "frozen": True}})
        opt.load(tmp_path / "x", keep=keep)
        assert (opt.lr, opt.weight_decay) == (0.5, 0.1)
        assert (opt.groups["W"].lr, opt.groups["b"].lr) == (0.05, 0.5)
        assert (opt.groups["b"].weight_decay, opt.groups["W"].frozen) == (0.0, False)
    opt = fastopt.AdamW(tree(1), overrides={"W": {"lr_scale": 0.5, "frozen": True}})
    opt.load(tmp_path / "x", keep={"lr_scale", "frozen"})
    assert (opt.groups["W"].lr_scale, opt.groups["W"].frozen, opt.lr) == (0.5, True, 0.1)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ("lr", TypeError, r"keep: must be a set of names, such as \{'lr'\}, got 'lr'"),
        (3, TypeError, "keep: must be a set of names"),
        ({1}, TypeError, "keep: must be a set of names"),
        (
            {"momentum"},
            ValueError,
            r"keep: must name hyperparameters or options \(lr, betas.*max_norm.*\), got 'momentum'",
        ),
        ({"zero_grad"}, ValueError, "keep: must name hyperparameters or options"),
    ],
)
def test_a_keep_that_names_nothing_is_refused(adam, tmp_path, keep, error, message):
    adam.save(tmp_path / "x")
    opt = fresh()
    for call in (
        lambda: opt.load(tmp_path / "x", keep=keep),
        lambda: opt.load_state_dict(adam.state_dict(), keep=keep),
    ):
        with pytest.raises(error, match=message):
            call()
    assert opt.step_count == 0


# --- what fits --------------------------------------------------------------------------------------------------------


def trained(opt: fastopt.Optimizer, steps: int = 3) -> fastopt.Optimizer:
    for number in range(steps):
        opt.step({path: np.full_like(array, 1 + number) for path, array in opt.params.items()})
    return opt


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_is_everything_for_an_equal_optimizer(saved, name):
    folder, _ = saved
    path = folder / f"{NAMES.index(name)}.safetensors"
    strict, loose = (make(name, seed=2) for _ in range(2))
    strict.load(path)
    report = loose.load(path, strict=False)
    assert set(report.loaded) == set(load_file(path))
    assert (report.missing, report.unexpected, report.kept) == ({}, {}, {})
    assert report.extra == {"name": name}
    assert bits(loose) == bits(strict)
    assert same(loose.state_dict(), strict.state_dict())
    assert repr(report) == f"<loaded {len(report.loaded)} arrays>"


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_was_added_goes_on_as_after_add(tmp_path, name):
    case = BY_NAME[name]
    grown, opt = (case.make(tree(1), lr=0.01) for _ in range(2))
    for one in (grown, opt):
        trained(one)
    opt.save(tmp_path / "x")
    head = np.full((2, 3), 0.5, np.float32)
    grown.add({"head": head}, lr_scale=0.5)
    loaded = case.make({**tree(9), "head": head}, lr=0.01, overrides={"head": {"lr_scale": 0.5}})
    report = loaded.load(tmp_path / "x", strict=False)
    states = (*case.rule.states, *case.rule.numbers, *case.rule.matrices)
    assert set(report.missing) == {"head", *(f"{state}/head" for state in states)}
    assert report.missing["head"] == "none was saved"
    assert report.unexpected == {}
    for _ in range(2):
        assert loaded.step_count == grown.step_count
        for name, array in checkpoint._arrays_of(grown.state).items():
            np.testing.assert_array_equal(checkpoint._arrays_of(loaded.state)[name], array, err_msg=name)
        for one in (grown, loaded):
            trained(one)


def test_a_layer_that_was_removed_or_has_another_shape_is_reported(tmp_path):
    trained(fastopt.Adam({**tree(1), "head": np.ones(4, np.float32)}, ema=0.9)).save(tmp_path / "x")
    opt = fastopt.Adam({"W": tree(2)["W"], "b": np.ones(5, np.float32)}, ema=0.9)
    before = opt.state_dict()
    report = opt.load(tmp_path / "x", strict=False)
    assert set(report.loaded) == {"W", "m/W", "v/W", "ema/W"}
    assert report.missing == dict.fromkeys(["b", "m/b", "v/b", "ema/b"], "shape (3,) was saved, not (5,)")
    gone = "has no place in this optimizer"
    assert report.unexpected == dict.fromkeys(["head", "m/head", "v/head", "ema/head"], gone)
    assert repr(report).startswith("<loaded 4 arrays; missing: b, m/b, v/b, ema/b; unexpected: head")
    np.testing.assert_array_equal(opt.states["m"]["b"], before["state"]["m"]["b"])
    assert opt.step_count == 3
    assert opt.state_dict()["missed"] == {"b": 3}  # its states begin here, and so does its bias correction


def test_a_parameter_has_all_its_states_from_one_place():
    """The norm of NovoGrad is one number, whatever the shape."""
    saved = trained(fastopt.NovoGrad(tree(1)))
    opt = fastopt.NovoGrad({**tree(2), "b": np.ones(5, np.float32)})
    report = opt.load_state_dict(saved.state_dict(), strict=False)
    shape, others = "shape (3,) was saved, not (5,)", "the other states of its parameter do not fit"
    assert report.missing == {"m/b": shape, "v/b": others}
    assert opt.states["v"]["b"] == 0.0


@pytest.mark.parametrize("way", ["load", "load_state_dict"])
def test_a_parameter_that_is_not_loaded_keeps_its_own_hyperparameters(tmp_path, way):
    """A vector in place of a matrix, which Muon would take for one."""
    saved = trained(fastopt.Muon(tree(1)))
    saved.save(tmp_path / "x")
    params = {"W": np.ones(4, np.float32), "b": tree(2)["b"]}
    opt = fastopt.Muon(params, overrides={"W": {"frozen": True}})
    source = tmp_path / "x" if way == "load" else saved.state_dict()
    assert "m/b" in getattr(opt, way)(source, strict=False).loaded
    assert (opt.groups["W"].orthogonal, opt.groups["W"].frozen, opt.groups["b"].orthogonal) == (False, True, False)
    trained(opt)
    np.testing.assert_array_equal(opt.params["W"], 1.0)


def test_an_average_that_is_new_begins_at_the_loaded_parameters(tmp_path):
    trained(fastopt.Adam(tree(1))).save(tmp_path / "x")
    opt = fastopt.Adam(tree(2), ema=0.9)
    report = opt.load(tmp_path / "x", strict=False)
    assert report.missing == {"ema/W": "none was saved", "ema/b": "none was saved"}
    assert report.kept == {"ema": "None was saved"}
    for path in ("W", "b"):
        np.testing.assert_array_equal(opt.ema[path], opt.params[path])
    opt.save(tmp_path / "y")
    report = fastopt.Adam(tree(2)).load(tmp_path / "y", strict=False)
    assert set(report.unexpected) == {"ema/W", "ema/b"}


def test_states_that_begin_at_the_parameters_begin_at_the_loaded_ones(tmp_path):
    trained(fastopt.Adam(tree(1))).save(tmp_path / "x")
    opt = fastopt.ScheduleFreeAdamW(tree(2))
    report = opt.load(tmp_path / "x", strict=False)
    assert report.loaded == ("W", "b")
    assert report.missing["z/W"] == "none was saved"
    np.testing.assert_array_equal(opt.states["z"]["W"], opt.params["W"])
    assert opt.state_dict()["missed"] == {"W": 3, "b": 3}


def test_adamw_goes_on_with_the_states_of_adam_and_its_own_hyperparameters(tmp_path):
    adam = trained(fastopt.Adam(tree(1), lr=0.1, betas=(0.5, 0.75)))
    adam.save(tmp_path / "x")
    opt = fastopt.AdamW(tree(2), lr=0.3, weight_decay=0.2)
    report = opt.load(tmp_path / "x", strict=False)
    assert set(report.loaded) == {"W", "b", "m/W", "m/b", "v/W", "v/b"}
    assert report.kept["rule"] == "the saved hyperparameters are of rule 'adam', not 'adamw'"
    assert report.kept["decoupled_weight_decay"] == "False was saved"
    assert bits(opt) == bits(adam)
    assert (opt.step_count, opt.lr, opt.betas, opt.weight_decay) == (3, 0.3, (0.9, 0.999), 0.2)
    opt.load_state_dict(adam.state_dict(), strict=False)
    assert (opt.step_count, opt.lr) == (3, 0.3)


@pytest.mark.parametrize(("there", "here"), [("SGD", "Adam"), ("Adam", "Lion"), ("Lion", "Adam"), ("Adan", "Adam")])
def test_states_of_a_rule_with_other_states_begin_anew(tmp_path, there, here):
    """A first moment without its second would make steps that are many times too long."""
    trained(getattr(fastopt, there)(tree(1), lr=0.01)).save(tmp_path / "x")
    opt, new = (getattr(fastopt, here)(tree(2), lr=0.01) for _ in range(2))
    report = opt.load(tmp_path / "x", strict=False)
    assert report.loaded == ("W", "b")
    new.flat.data[...] = opt.flat.data
    assert bits(opt) == bits(new)
    for one in (opt, new):
        trained(one, 2)
    assert bits(opt) == bits(new)
    assert (opt.step_count, new.step_count) == (5, 2)


def test_what_fits_of_a_state_dict(adam):
    opt = fastopt.Adam({**tree(2), "head": np.ones(1, np.float32)}, lr=schedules.constant(0.5), max_norm=1.0)
    params = opt.flat.data.copy()
    report = opt.load_state_dict(adam.state_dict(), strict=False)
    assert set(report.loaded) == {"m/W", "m/b", "v/W", "v/b"}
    assert set(report.missing) == {"m/head", "v/head"}
    assert set(report.unexpected) == {"ema/W", "ema/b"}
    said = {"lr": "0.001 was saved", "b: lr": "0.01 was saved", "ema": "0.9 was saved", "max_norm": "None was saved"}
    assert report.kept == said
    assert (opt.lr, opt.groups["b"].lr(0)) == (0.5, 0.5)
    np.testing.assert_array_equal(opt.flat.data, params)
    np.testing.assert_array_equal(opt.states["m"]["W"], adam.states["m"]["W"])


def test_a_parameter_is_not_taken_for_a_state_of_its_name(tmp_path):
    fastopt.SGD({"w": np.ones(2), "m/w": np.full(2, 7.0), "v/w": np.full(2, 7.0)}).save(tmp_path / "x")
    opt = fastopt.Adam({"w": np.zeros(2)})
    report = opt.load(tmp_path / "x", strict=False)
    assert report.loaded == ("w",)
    assert set(report.unexpected) == {"m/w", "v/w"}
    assert not opt.states["m"]["w"].any()
    trained(opt)
    opt.save(tmp_path / "y")
    sgd = fastopt.SGD({"w": np.zeros(2), "m/w": np.full(2, 7.0)})
    report = sgd.load(tmp_path / "y", strict=False)
    assert report.loaded == ("w",)
    assert set(report.missing) == {"m/w"}
    np.testing.assert_array_equal(sgd.params["m/w"], 7.0)


def test_paths_that_end_alike_are_told_apart(tmp_path):
    params = {"b": np.ones(1), "c/b": np.full(1, 2.0), "m": np.full(1, 3.0)}
    trained(fastopt.Adam(params)).save(tmp_path / "x")
    opt = fastopt.Adam({path: np.zeros(1) for path in params})
    report = opt.load(tmp_path / "x", strict=False)
    assert (len(report.loaded), report.missing, report.unexpected) == (9, {}, {})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: fastopt.Adam(tree(3, np.float64)), "must hold float64 parameters"),
        (
            lambda: fastopt.Adam({"c": np.ones(3, np.float32)}),
            "must share a parameter with this optimizer .'c'., got 'W', 'b'",
        ),
        (lambda: fastopt.Adam({"b": np.ones(4, np.float32)}), "must share a parameter"),
    ],
)
def test_a_file_of_which_nothing_fits_is_refused(adam, tmp_path, other, message):
    adam.save(tmp_path / "x")
    refuses(other(), tmp_path / "x", match=message, strict=False)


def test_damage_is_found_where_not_everything_fits(adam, tmp_path):
    path = tmp_path / "x"
    forge(adam, path, {"sha256": {}})
    refuses(fresh(ema=None), path, match="must have the SHA-256 stored in the file", strict=False)
    forge(adam, path, **{"m/W": None})
    refuses(
        fresh(ema=None),
        path,
        match="array 'm/b': must be that of a parameter in 'paths'; the file is damaged",
        strict=False,
    )
    forge(adam, path, W=None)
    refuses(fresh(ema=None), path, match="the file is damaged", strict=False)
    forge(adam, path, {"hyper": {"lr": -1.0}})
    refuses(fresh(), path, match="lr: must be", strict=False)
    forge(adam, path, {"missed": {"W": 5}})
    refuses(fresh(), path, match="must be at most step=1, got 5", strict=False)


# --- saving while another thread trains -------------------------------------------------------------------------------


def grads_of(number: int, size: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {"W": rng.normal(size=(size, size)).astype(np.float32), "b": rng.normal(size=size).astype(np.float32)}


@pytest.mark.parametrize("name", NAMES[::4])
def test_what_is_saved_or_copied_in_a_thread_is_of_one_moment(tmp_path, name):
    """One thread saves, copies and takes states while another one trains: each result is that after some step."""
    size, steps = 120, 8
    opt, twin, reader = (BY_NAME[name].make(grads_of(99, size), **EVERYTHING) for _ in range(3))
    moments = {0: bits(twin)}
    for number in range(steps):
        twin.step(grads_of(number, size))
        moments[number + 1] = bits(twin)
    grads = [grads_of(number, size) for number in range(steps)]
    done, saved, found = threading.Event(), [], []

    def save() -> None:
        while not done.is_set():
            saved.append(tmp_path / str(len(saved)))
            opt.save(saved[-1])
            found.append(copy.deepcopy(opt))
            reader.load_state_dict(opt.state_dict())
            arrays = {name: value for name, value in bits(reader).items() if name}
            assert arrays == {name: value for name, value in moments[reader.step_count].items() if name}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            saving = pool.submit(save)
            for each in grads:
                opt.step(each)
            while len(saved) < 3 and not saving.done():
                time.sleep(1e-3)
            done.set()
            saving.result()
    finally:
        sys.setswitchinterval(interval)
    for path in saved:
        reader.load(path)
        assert bits(reader) == moments[reader.step_count]
    for one in found:
        assert bits(one) == moments[one.step_count]
    assert bits(opt) == moments[steps]


def test_saves_of_large_arrays_in_a_thread_can_be_read(tmp_path):
    """Six of six such files were unreadable."""
    opt = fastopt.SGD({"w": np.zeros(1_000_000, np.float32)}, lr=1.0)
    grads = {"w": np.ones(1_000_000, np.float32)}
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(lambda: [opt.save(tmp_path / str(k)) for k in range(6)])
        while not saving.done():
            opt.step(grads)
        saving.result()
    reader = fastopt.SGD({"w": np.ones(1_000_000, np.float32)}, lr=1.0)
    for k in range(6):
        reader.load(tmp_path / str(k))
        assert (reader.params["w"] == -reader.step_count).all()


def waits_for_a_save(opt: fastopt.Optimizer, path: Path, monkeypatch: Any, call: Any) -> None:
    """While one thread is within a save, another one does not get on with `call`."""
    writing, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        writing.set()
        assert go_on.wait(60.0)
        fsync(descriptor)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(os, "fsync", slow)
        saving = pool.submit(opt.save, path)
        assert writing.wait(60.0)
        other = pool.submit(call)
        time.sleep(0.05)
        went_on = other.done()
        go_on.set()
        saving.result(60.0)
        other.result(60.0)
    assert not went_on


def test_all_that_uses_the_state_waits_for_a_save(adam, tmp_path, monkeypatch):
    adam.save(tmp_path / "y")
    state, snapshot = adam.state_dict(), fastopt.state.Snapshot.of(adam.state_dict(), adam.state)

    def swap() -> None:
        with adam.swap_ema():
            pass

    calls = [
        lambda: adam.step(tree(1)),
        lambda: adam.accumulate(tree(1)),
        lambda: adam.step(),
        lambda: adam.step_rows({"W": (np.array([1]), np.ones((1, 3), np.float32))}),
        lambda: adam.read_rows("W", [1]),
        adam.flush_rows,
        lambda: setattr(adam.groups["b"], "lr", 0.5),
        lambda: delattr(adam.groups["b"], "lr"),
        lambda: adam.load_state_dict(state),
        lambda: adam.load(tmp_path / "y"),
        lambda: adam.restore(snapshot),
        swap,
        lambda: adam.add({"c": np.ones(1, np.float32)}),
        lambda: copy.deepcopy(adam),
        adam.state_dict,
    ]
    for call in calls[:6]:
        call()  # compiles what there is to compile
    for call in calls:
        waits_for_a_save(adam, tmp_path / "x", monkeypatch, call)


def test_steps_wait_from_the_first_look_at_the_state_on(tmp_path, monkeypatch):
    opt, keras = fastopt.Adam(tree(1)), fastopt.Adam(tree(1), convention="keras")
    opt.save(tmp_path / "x")
    state, seen, plain = opt.state_dict(), [], fastopt.Optimizer.state.fget

    def watched(opt: fastopt.Optimizer) -> Any:
        seen.append(opt._pipeline.gate.taken)
        return plain(opt)

    monkeypatch.setattr(fastopt.Optimizer, "state", property(watched))
    for call in (
        lambda: opt.save(tmp_path / "x"),
        lambda: opt.load(tmp_path / "x"),
        lambda: opt.state_dict(),
        lambda: opt.load_state_dict(state),
        lambda: from_torch_state(opt, to_torch_state(opt)),
        lambda: from_optax_state(opt, to_optax_state(opt)),
        lambda: from_keras_state(keras, to_keras_state(keras)),
    ):
        seen.clear()
        call()
        assert seen
        assert all(seen)


@pytest.mark.parametrize(
    "call",
    [
        to_torch_state,
        to_optax_state,
        lambda opt: from_torch_state(opt, to_torch_state(opt)),
        lambda opt: from_optax_state(opt, to_optax_state(opt)),
    ],
)
def test_states_of_other_frameworks_wait_for_a_save(tmp_path, monkeypatch, call):
    opt = fastopt.Adam(tree(1))
    waits_for_a_save(opt, tmp_path / "x", monkeypatch, lambda: call(opt))


def test_variables_of_keras_wait_for_a_save(tmp_path, monkeypatch):
    opt = fastopt.Adam(tree(1), convention="keras")
    waits_for_a_save(opt, tmp_path / "x", monkeypatch, lambda: from_keras_state(opt, to_keras_state(opt)))


def test_update_waits_for_a_save_as_well(tmp_path, monkeypatch):
    opt = fastopt.SGD(lr=1.0)
    params = {"w": np.zeros(2)}
    opt.update(params, {"w": np.ones(2)})
    seen = []

    def fsync(descriptor: int) -> None:
        if not seen:
            other = pool.submit(opt.update, params, {"w": np.ones(2)})
            time.sleep(0.02)
            seen.append((other, other.done()))

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(os, "fsync", fsync)
        opt.save(tmp_path / "x")
        assert not seen[0][1]
        seen[0][0].result(60.0)
    assert opt.step_count == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.parametrize("what", ["step", "save"])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_fork_does_not_wait_for_a_thread_that_it_does_not_have(tmp_path, monkeypatch, what):
    """The parent forks while another of its threads is within a step or a save."""
    inside, go_on = threading.Event(), threading.Event()

    def stop(*arguments: Any) -> float:
        inside.set()
        assert go_on.wait(60.0)
        return 1.0

    go_on.set()  # a schedule is evaluated at construction
    opt = fastopt.SGD({"w": np.zeros(2)}, lr=stop if what == "step" else 1.0)
    if what == "save":
        monkeypatch.setattr(os, "fsync", stop)
    opt.step({"w": np.ones(2)})
    inside.clear()
    go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(*((opt.step, {"w": np.ones(2)}) if what == "step" else (opt.save, tmp_path / "x")))
        assert inside.wait(60.0)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            go_on.set()
            opt.save(tmp_path / "child")
            opt.step({"w": np.ones(2)})
            os._exit(0 if opt.step_count == 2 else 1)
        go_on.set()
        other.result(60.0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_save_within_a_step_is_refused(tmp_path):
    """From a schedule, as from a signal handler, the optimizer is half way between two states."""

    def schedule(step: int) -> float:
        if opt is not None and inside:
            call()
        return 1.0

    opt: Any = None
    inside = False
    opt = fastopt.SGD({"w": np.zeros(1)}, lr=schedule, momentum=0.5)
    calls = {
        "save": lambda: opt.save(tmp_path / "x"),
        "state_dict": lambda: opt.state_dict(),
        "copy.deepcopy": lambda: copy.deepcopy(opt),
    }
    for name, call in calls.items():  # noqa: B007 the schedule calls it
        inside = True
        with pytest.raises(RuntimeError, match=rf"^{re.escape(name)}\(\): must be called outside a step"):
            opt.step({"w": np.ones(1)})
        inside = False
        opt.step({"w": np.ones(1)})
    opt.save(tmp_path / "x")
    assert listing(tmp_path) == ["x"]


@pytest.mark.parametrize("end", ["array", "description"])
def test_what_was_written_is_read_back_before_it_replaces_the_old_file(adam, tmp_path, monkeypatch, end):
    path = tmp_path / "x"
    adam.save(path)
    before = path.read_bytes()
    adam.step(tree(5))
    fsync = os.fsync

    def damage(descriptor: int) -> None:
        fsync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            at = len(before) - 1 if end == "array" else 100
            os.pwrite(descriptor, b"\xfe", at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", damage)
        with pytest.raises(RuntimeError, match=r"must be in the new file .*, got other bytes.*old file was kept"):
            adam.save(path)
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["x"]


def test_a_write_into_the_parameters_during_a_save_is_noticed(adam, tmp_path, monkeypatch):
    header = checkpoint._header

    def late(*arguments: Any) -> bytes:
        adam.params["W"][0, 0] += 1.0  # as another thread could, after the digests were taken
        return header(*arguments)

    monkeypatch.setattr(checkpoint, "_header", late)
    with pytest.raises(RuntimeError, match=r"^'W': must be in the new file as it was given"):
        adam.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


# --- failures and kills while saving ----------------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(adam, tmp_path, monkeypatch, function, error):
    path = tmp_path / "x"
    adam.save(path)
    before = path.read_bytes()
    adam.step(tree(5))

    def fail(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(type(error)) as caught:
            adam.save(path)
        with pytest.raises(type(error)):
            adam.save(tmp_path / "new")
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["x"]
    adam.save(path)
    assert path.read_bytes() != before


@posix
def test_the_mode_of_the_old_file_is_kept_and_a_new_one_gets_the_usual(adam, tmp_path):
    path = tmp_path / "x"
    mask = os.umask(0o027)
    try:
        adam.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o400):
            path.chmod(mode)
            adam.save(path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(mask)


@posix
def test_a_symbolic_link_stays_one(adam, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = tmp_path / "latest"
    link.symlink_to(folder / "run")
    for _ in range(2):  # to nothing at first, then to the file
        adam.save(link)
        assert link.is_symlink()
        assert listing(folder) == ["run"]
        adam.load(link)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for call in (adam.save, adam.load):
        with pytest.raises(OSError, match="loop"):
            call(loop)
    assert loop.is_symlink()


def test_long_names_are_no_problem(adam, tmp_path):
    path = tmp_path / ("é" * 127)  # 254 bytes of UTF-8
    adam.save(path)
    adam.load(path)
    assert listing(tmp_path) == [path.name]


@posix
def test_a_kill_at_any_moment_leaves_one_of_the_two_states(tmp_path):
    """200 times: two processes save alternating states to one file, and are killed after a random time."""
    finished = run("-W", "ignore", __file__, "kills", tmp_path, timeout=120.0, OPENBLAS_NUM_THREADS="1", **compiled())
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["kills"] == 200
    assert report["neither"] == 0
    assert min(report["first"], report["second"]) > 10
    assert report["interrupted"] > 20  # temporary files that were left behind: the kills did hit


def kill_all(folder: str, kills: int = 200) -> dict[str, int]:
    path = Path(folder) / "run.safetensors"
    size = 20_000

    def state(value: float) -> fastopt.Optimizer:
        opt = fastopt.SGD({"w": np.full(size, value)}, lr=value, momentum=0.5)
        opt._pipeline.steps = int(value)
        return opt

    states = [state(1.0), state(2.0)]
    wanted = [(bits(opt), opt.step_count, opt.lr) for opt in states]
    reader = state(3.0)
    states[0].save(path)
    rng = random.Random(0)
    started = time.perf_counter()
    states[1].save(path)
    one_save = time.perf_counter() - started
    counts = {"kills": 0, "first": 0, "second": 0, "neither": 0, "interrupted": 0}
    while counts["kills"] < kills:
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                while True:
                    for opt in states:
                        opt.save(path)
            children.append(child)
        time.sleep(rng.uniform(0.0, 8.0 * one_save))
        for child in children:
            os.kill(child, signal.SIGKILL)
            counts["kills"] += 1
        for child in children:
            os.waitpid(child, 0)
        reader.load(path)
        found = (bits(reader), reader.step_count, reader.lr)
        counts["neither" if found not in wanted else ("first", "second")[wanted.index(found)]] += 1
        for left in path.parent.iterdir():
            if left != path:
                assert re.fullmatch(r"\.run\.safetensors\.[0-9a-f]{16}\.tmp", left.name), left.name
                counts["interrupted"] += 1
                left.unlink()
    return counts


if __name__ == "__main__":
    print(json.dumps({"resume": resume_all, "kills": kill_all}[sys.argv[1]](sys.argv[2])))
