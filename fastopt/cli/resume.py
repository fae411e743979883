"""`Keeper`: what ``--checkpoint`` keeps of a run after every epoch, and how ``--resume`` goes on from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastopt import BatchNorm, Optimizer
from fastopt.cli.network import module_of
from fastopt.cli.trainer import Outcome

OPTIONS = {
    "data": "--data",
    "layers": "--hidden",
    "batch_size": "--batch-size",
    "schedule": "--schedule",
    "init": "--init",
    "activation": "--activation",
    "seed": "--seed",
    "optimizer": "--optimizer",
    "options": "--optimizer",
    "lr": "--lr",
    "backend": "--backend",
    "batch_norm": "--batch-norm",
}
"""The settings that must be those of the run in the file, and the options that set them."""


class Keeper:
    """The checkpoint of one run: its optimizer, its norms' running statistics, its losses and its settings.

    settings: those of `OPTIONS`, and ``epochs``.
    """

    def __init__(self, path: Path, settings: dict[str, Any], opt: Optimizer, norms: Sequence[BatchNorm]):
        self.path = path
        self._settings = json.loads(json.dumps(settings))  # in the form in which they come back
        self._opt = opt
        self._norms = norms

    def keep(self, outcome: Outcome) -> None:
        """Write the file, over that of the epoch before."""
        progress = {
            "losses": [loss if math.isfinite(loss) else None for loss in outcome.losses],
            "steps": outcome.steps,
            "seconds": outcome.seconds,
            "timed": [outcome.timed_seconds, outcome.timed_steps],
            "norms": [_statistics(norm) for norm in self._norms],
        }
        self._opt.save(self.path, extra={"fastopt train": {"settings": self._settings, "progress": progress}})

    def resume(self) -> Outcome:
        """Put the optimizer and its norms where the file left them; what came of the run so far.

        Raises ValueError or OSError that names the file and what is wrong: other settings, above all.
        """
        from fastopt.checkpoint import describe  # and safetensors, only for those who resume

        kept = describe(self.path)["extra"].get("fastopt train")
        if not isinstance(kept, dict) or not isinstance(kept.get("settings"), dict):
            raise ValueError(f"{self.path}: a checkpoint, but none of fastopt train; choose another --checkpoint FILE")
        self._refuse_other_settings({"backend": "cpu", **kept["settings"]})  # it was, before there was a choice
        try:
            outcome = _outcome_of(kept["progress"])
            statistics = [_parsed(norm, one) for norm, one in zip(self._norms, kept["progress"]["norms"], strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: what fastopt train keeps in it is damaged: {error!r}") from None
        if outcome.epochs > self._settings["epochs"]:
            raise ValueError(
                f"{self.path} is {outcome.epochs} epochs in, more than --epochs {self._settings['epochs']}; ask for "
                f"as many, or choose another --checkpoint FILE"
            )
        self._opt.load(self.path)
        for norm, (mean, var, count) in zip(self._norms, statistics, strict=True):
            for own, kept_there in ((norm.running_mean, mean), (norm.running_var, var)):
                assert own is not None
                own[...] = module_of(own).asarray(kept_there)
            norm.num_batches_tracked = count
        return outcome

    def _refuse_other_settings(self, there: dict[str, Any]) -> None:
        here = self._settings
        for name, option in OPTIONS.items():
            if there.get(name) != here[name]:
                raise ValueError(
                    f"{self.path} is of a run with {option} {_shown(name, there.get(name))}, and this one has "
                    f"{_shown(name, here[name])}; give the same, or choose another --checkpoint FILE"
                )
        if here["schedule"] != "constant" and there.get("epochs") != here["epochs"]:
            raise ValueError(
                f"{self.path} is of a run with --epochs {there.get('epochs')}, over which its schedule "
                f"{here['schedule']} is laid out, and this one has {here['epochs']}; give the same (only a constant "
                f"schedule can be extended), or choose another --checkpoint FILE"
            )


def _shown(name: str, value: Any) -> str:
    if name == "layers" and isinstance(value, list):
        return ",".join(map(str, value[1:-1])) or "none"
    if name == "batch_norm":
        return "on" if value else "off"
    return str(value)


def _outcome_of(progress: dict[str, Any]) -> Outcome:
    losses = [math.nan if loss is None else float(loss) for loss in progress["losses"]]
    seconds, steps = progress["timed"]
    outcome = Outcome(losses, steps=int(progress["steps"]), seconds=float(progress["seconds"]))
    outcome.timed_seconds, outcome.timed_steps = float(seconds), int(steps)
    if not losses:
        raise ValueError("no losses")
    if not math.isfinite(losses[-1]):
        outcome.diverged_in_epoch = outcome.epochs
    return outcome


def _statistics(norm: BatchNorm) -> list[Any]:
    """Running statistics to the bit: of a run that diverges they need not be numbers, which JSON could not hold."""
    state = norm.state_dict()
    return [*(state[name].tobytes().hex() for name in ("running_mean", "running_var")), norm.num_batches_tracked]


def _parsed(norm: BatchNorm, kept: list[Any]) -> tuple[np.ndarray, np.ndarray, int]:
    *texts, count = kept
    mean, var = (np.frombuffer(bytes.fromhex(text), norm.dtype) for text in texts)
    if mean.shape != (norm.num_features,) or var.shape != mean.shape:
        raise ValueError(f"running statistics of {mean.size} and {var.size} channels for {norm.num_features}")
    return mean, var, int(count)
