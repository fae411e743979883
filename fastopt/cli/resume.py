"""`Keeper`: saves a run after every epoch for ``--checkpoint``, and restores it for ``--resume``."""

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
"""The settings that must equal those of the run in the file, and the options that set them."""


class Keeper:
    """The checkpoint of one run: its optimizer, its norms' running statistics, its losses and its settings.

    settings: the settings in `OPTIONS`, and ``epochs``.
    """

    def __init__(self, path: Path, settings: dict[str, Any], opt: Optimizer, norms: Sequence[BatchNorm]):
        self.path = path
        self._settings = json.loads(json.dumps(settings))  # the form in which a file returns them
        self._opt = opt
        self._norms = norms

    def keep(self, outcome: Outcome) -> None:
        """Write the file; it replaces that of the previous epoch."""
        progress = {
            "losses": [loss if math.isfinite(loss) else None for loss in outcome.losses],
            "steps": outcome.steps,
            "seconds": outcome.seconds,
            "timed": [outcome.timed_seconds, outcome.timed_steps],
            "norms": [_statistics(norm) for norm in self._norms],
        }
        self._opt.save(self.path, extra={"fastopt train": {"settings": self._settings, "progress": progress}})

    @property
    def epochs(self) -> int:
        """The number of finished epochs in the file; 0 without a file."""
        from fastopt.checkpoint import describe  # imports safetensors

        if not self.path.exists():
            return 0
        return _outcome_of(describe(self.path)["extra"]["fastopt train"]["progress"]).epochs

    def resume(self) -> Outcome:
        """Restore the optimizer and its norms from the file; return the outcome of the run so far.

        Raise ValueError or OSError that names the file and the problem, such as different settings.
        """
        from fastopt.checkpoint import describe  # imports safetensors: only for --resume

        kept = describe(self.path)["extra"].get("fastopt train")
        if not isinstance(kept, dict) or not isinstance(kept.get("settings"), dict):
            raise ValueError(
                f"{self.path}: must be a checkpoint of fastopt train, got another checkpoint; choose another "
                "--checkpoint FILE"
            )
        self._refuse_other_settings({"backend": "cpu", **kept["settings"]})  # older files hold no backend
        try:
            outcome = _outcome_of(kept["progress"])
            statistics = [_parsed(norm, one) for norm, one in zip(self._norms, kept["progress"]["norms"], strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: the data of fastopt train in the file is damaged: {error!r}") from None
        if outcome.epochs > self._settings["epochs"]:
            raise ValueError(
                f"{self.path}: must hold at most --epochs {self._settings['epochs']} epochs, got {outcome.epochs}; "
                f"raise --epochs, or choose another --checkpoint FILE"
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
                    f"{option}: must be {_shown(name, there.get(name))} as in {self.path}, got "
                    f"{_shown(name, here[name])}; use the same value, or choose another --checkpoint FILE"
                )
        if here["schedule"] != "constant" and there.get("epochs") != here["epochs"]:
            raise ValueError(
                f"--epochs: must be {there.get('epochs')} as in {self.path}, because schedule {here['schedule']} spans "
                f"that many, got {here['epochs']}; use the same value (only a constant schedule can be extended), or "
                f"choose another --checkpoint FILE"
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
    """Return the exact bits of the running statistics: a diverging run may hold NaN, which JSON cannot store."""
    state = norm.state_dict()
    return [*(state[name].tobytes().hex() for name in ("running_mean", "running_var")), norm.num_batches_tracked]


def _parsed(norm: BatchNorm, kept: list[Any]) -> tuple[np.ndarray, np.ndarray, int]:
    *texts, count = kept
    mean, var = (np.frombuffer(bytes.fromhex(text), norm.dtype) for text in texts)
    if mean.shape != (norm.num_features,) or var.shape != mean.shape:
        raise ValueError(f"running statistics: must have {norm.num_features} channels, got {mean.size} and {var.size}")
    return mean, var, int(count)
