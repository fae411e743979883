"""`fastopt train --compare NAME`: the varied option, its values, the table and the figure of each comparison.

`COMPARISONS` is the list; runs are made, trained, printed and reported by the same code as any `fastopt train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastopt.cli.choices import Choice, parse_optimizers
from fastopt.cli.network import ACTIVATIONS, forward
from fastopt.cli.report import (
    LOSS,
    LR,
    RESULTS,
    SECONDS,
    STEPS,
    TEST,
    TRAIN,
    Activations,
    Column,
    Result,
    named,
)
from fastopt.cli.runs import Plan, Setting

SATURATED = 0.99
"""Absolute value of tanh beyond which its slope, 1 - a^2, is below 0.02."""

MINI_BATCH = 32
OPTIMIZERS = ("sgd", "momentum", "nesterov", "adagrad", "adadelta", "rmsprop", "adam")
SCHEDULES = ("constant", "step_decay", "exponential", "inverse_time", "cyclical", "cosine", "one_cycle")
INITS = ("zeros", "normal", "xavier", "he")
LR_FACTORS = (0.1, 1.0, 10.0, 30.0)
TOO_LARGE = 5.0
"""Multiple of the usual learning rate at which a constant rate overshoots repeatedly, so that schedules differ."""


@dataclass(frozen=True)
class Comparison:
    """One comparison: the plans, the table and the figure."""

    what: str
    """The varied values, for the help."""
    varies: tuple[str, ...]
    """The options, as parameters of `train`, that the comparison sets itself."""
    vary: Callable[[Plan], list[Plan]]
    columns: tuple[Column, ...]
    draw: Callable[[Path, str, Sequence[Result]], None]
    picture: str
    """Name of the figure that `draw` draws."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that replace those of `train`, where those of `train` would show less."""
    look: Callable[[Plan, Setting], Sequence[Activations]] = lambda plan, setting: ()
    """Return what to report about the network before training."""
    rules: bool = False
    """Whether a result has several lines in the table."""
    scans: bool = False
    """Whether the learning rate of each run is chosen by a scan, if none is given."""

    def check(self, given: Iterable[str], choices: Sequence[Choice], hidden: Sequence[int]) -> None:
        """Refuse options that the comparison sets itself or does not support, and more than one optimizer."""
        for name in given:
            option = f"--{name.replace('_', '-')}"
            if name in self.varies:
                raise ValueError(f"{option}: must not be given, the comparison sets it; drop {option} or --compare")
            if name in ("batch_norm", "checkpoint", "resume"):
                raise ValueError(f"{option}: must not be given, no comparison supports it; drop {option} or --compare")
        if len(choices) > 1 and "optimizer" not in self.varies:
            raise ValueError(
                f"--optimizer: must name one optimizer for this comparison, got {len(choices)}; run one comparison "
                "for each"
            )
        if "init" in self.varies and any(choice.auto for choice in choices):
            raise ValueError(
                "--lr: must be a number for this comparison, got auto; some of its initial weights pass almost no "
                "signal, and lambda does not predict a usable step there"
            )
        if not hidden and ("init" in self.varies or "batch_norm" in self.varies):
            raise ValueError("--hidden: must name at least one layer for this comparison, got none")


def own_defaults() -> str:
    """Return the defaults that differ from those of `train`, for the help."""
    parts = []
    for name, comparison in COMPARISONS.items():
        options = (
            f"--{option.replace('_', '-')} {value[0] if option == 'optimizer' else value}"
            for option, value in comparison.defaults.items()
        )
        parts.append(f"{name}: {' '.join(options)}")
    return "; ".join(parts)


# --- plans ------------------------------------------------------------------------------------------------------------


def _without_and_with_norm(plan: Plan) -> list[Plan]:
    without = plan._replace(batch_norm=False)
    return [without, plan._replace(label=f"{plan.label} + batch norm")] if plan.batch_norm else [without]


def _batch_sizes(plan: Plan) -> list[Plan]:
    return [
        plan._replace(label="all rows", batch_size="full"),
        plan._replace(label=f"mini-batches of {MINI_BATCH}", batch_size=MINI_BATCH),
        plan._replace(label="single rows", batch_size=1),
    ]


def _optimizers(plan: Plan) -> list[Plan]:
    choices = parse_optimizers(OPTIMIZERS, "auto" if plan.choice.auto else plan.choice.given_lr, auto=True)
    return [plan._replace(label=choice.label, choice=choice) for choice in choices]


def _schedules(plan: Plan) -> list[Plan]:
    factor = TOO_LARGE if plan.choice.given_lr is None and not plan.choice.auto else 1.0
    return [plan._replace(label=name, schedule=name, lr_factor=factor) for name in SCHEDULES]


def _inits(plan: Plan) -> list[Plan]:
    return [
        plan._replace(label=f"{init}, {activation}", init=init, activation=activation)
        for activation in reversed(ACTIVATIONS)
        for init in INITS
    ]


def _batch_norm(plan: Plan) -> list[Plan]:
    return [
        plan._replace(
            label=f"{'batch norm' if normed else 'without'}, lr x {factor:g}", batch_norm=normed, lr_factor=factor
        )
        for normed in (False, True)
        for factor in LR_FACTORS
    ]


# --- activations before training --------------------------------------------------------------------------------------


def _activations(plan: Plan, setting: Setting) -> list[Activations]:
    """Return the output of each hidden layer at the initial weights, over all training rows."""
    layers, norms = setting.network(plan)
    _, *hidden, _ = forward(layers, setting.rows.x_train, norms, activation=plan.activation)
    return [
        Activations(
            values,
            mean=float(values.mean(dtype=np.float64)),
            std=float(values.std(dtype=np.float64)),
            dead=float((values == 0.0).all(axis=0).mean()),
            saturated=float((abs(values) > SATURATED).mean()) if plan.activation == "tanh" else None,
        )
        for values in hidden
    ]


def _per_layer(heading: str, shown: Callable[[Activations], str], note: str = "") -> Column:
    return Column(heading, lambda result: "\n".join(map(shown, result.layers)), note)


def _layer_numbers(result: Result) -> str:
    return "\n".join(str(number) for number, _ in enumerate(result.layers, 1))


# --- figures ----------------------------------------------------------------------------------------------------------
# Importing matplotlib takes 0.5 s: import it only for a figure.


def _losses_with_lr(results: Sequence[Result]) -> dict[str, list[float]]:
    losses = {}
    for run, outcome, _ in results:
        label = run.plan.label
        losses[label if "lr=" in label else f"{label}, lr {run.lr:.4g}"] = outcome.losses
    return losses


def _draw_losses(path: Path, title: str, results: Sequence[Result]) -> None:
    from fastopt.cli.plots.losses import draw_losses

    draw_losses(path, title, _losses_with_lr(results))


def _draw_batch_sizes(path: Path, title: str, results: Sequence[Result]) -> None:
    from fastopt.cli.plots.comparisons import draw_batch_sizes

    losses = _losses_with_lr(results)
    draw_batch_sizes(
        path, title, losses, dict(zip(losses, (run.steps_per_epoch for run, _, _ in results), strict=True))
    )


def _draw_optimizers(path: Path, title: str, results: Sequence[Result]) -> None:
    from fastopt.cli.plots.comparisons import draw_optimizers

    losses = _losses_with_lr(results)
    accuracies = [(outcome.train_accuracy, outcome.test_accuracy) for _, outcome, _ in results]
    draw_optimizers(path, title, losses, dict(zip(losses, accuracies, strict=True)))


def _draw_schedules(path: Path, title: str, results: Sequence[Result]) -> None:
    from fastopt.cli.plots.comparisons import draw_schedules

    losses = {run.plan.label: outcome.losses for run, outcome, _ in results}
    rates = {}
    for run, outcome, _ in results:
        lr = run.schedule
        rates[run.plan.label] = [lr(step) if callable(lr) else lr for step in range(outcome.steps)]
    draw_schedules(path, title, losses, rates)


def _draw_inits(path: Path, title: str, results: Sequence[Result]) -> None:
    from fastopt.cli.plots.comparisons import draw_activations

    panels = {
        (run.plan.init, run.plan.activation): ([layer.values for layer in layers], outcome.losses[-1])
        for run, outcome, layers in results
    }
    draw_activations(path, title, panels)


def _draw_batch_norm(path: Path, title: str, results: Sequence[Result]) -> None:
    from fastopt.cli.plots.comparisons import draw_batch_norm

    panels: dict[str, dict[str, list[float]]] = {"without batch normalisation": {}, "with batch normalisation": {}}
    for run, outcome, _ in results:
        panels[f"{'with' if run.norms else 'without'} batch normalisation"][f"lr {run.lr:.4g}"] = outcome.losses
    draw_batch_norm(path, title, panels)


# --- the comparisons --------------------------------------------------------------------------------------------------

PLAIN = Comparison(
    what="the named optimizers",
    varies=("optimizer",),
    vary=_without_and_with_norm,
    columns=(named("optimizer"), *RESULTS),
    draw=_draw_losses,
    picture="loss curves",
)
"""Training without ``--compare``."""

COMPARISONS: dict[str, Comparison] = {
    "batch-sizes": Comparison(
        what=f"gradient descent on all rows, mini-batches of {MINI_BATCH}, single rows",
        varies=("batch_size",),
        vary=_batch_sizes,
        columns=(named("batch size"), STEPS, LR, LOSS, TRAIN, TEST, SECONDS),
        draw=_draw_batch_sizes,
        picture="loss against epochs and steps",
        defaults={"optimizer": ["sgd"], "epochs": 20},
    ),
    "optimizers": Comparison(
        what=", ".join(OPTIMIZERS),
        varies=("optimizer",),
        vary=_optimizers,
        columns=(named("optimizer"), *RESULTS),
        draw=_draw_optimizers,
        picture="loss curves and accuracies",
        defaults={"optimizer": ["sgd"]},
        scans=True,
    ),
    "schedules": Comparison(
        what=f"{', '.join(SCHEDULES)}, at {TOO_LARGE:g} times the usual learning rate if none is given",
        varies=("schedule",),
        vary=_schedules,
        columns=(named("schedule"), *RESULTS[:-1]),
        draw=_draw_schedules,
        picture="learning rates and loss curves",
        defaults={"optimizer": ["sgd"], "batch_size": "8", "epochs": 20},
    ),
    "inits": Comparison(
        what=f"{', '.join(INITS)}, each under tanh and ReLU",
        varies=("init", "activation"),
        vary=_inits,
        columns=(
            named("init"),
            Column("layer", _layer_numbers),
            _per_layer("mean", lambda layer: f"{layer.mean:.2g}"),
            _per_layer("std", lambda layer: f"{layer.std:.2g}"),
            _per_layer(
                "dead",
                lambda layer: f"{layer.dead:.0%}",
                "mean, std: of the activations before training. dead: units that are 0 on every row.",
            ),
            _per_layer(
                "satu-\nrated",
                lambda layer: "-" if layer.saturated is None else f"{layer.saturated:.1%}",
                f"saturated: activations beyond {SATURATED}, where the slope of tanh is below 0.02.",
            ),
            LOSS,
            TEST,
        ),
        draw=_draw_inits,
        picture="distributions of activations",
        defaults={"optimizer": ["sgd"], "hidden": "64,64,64,64,64", "epochs": 10},
        look=_activations,
        rules=True,
    ),
    "batch-norm": Comparison(
        what="without and with batch normalisation, at "
        + ", ".join(f"{factor:g}" for factor in LR_FACTORS)
        + " times the usual or given learning rate",
        varies=("batch_norm",),
        vary=_batch_norm,
        columns=(named("batch norm"), *RESULTS[:-1]),
        draw=_draw_batch_norm,
        picture="loss curves without and with batch norm",
        defaults={"optimizer": ["sgd"]},
    ),
}
