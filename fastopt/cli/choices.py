"""The values that options accept: optimizers and their options, schedules, initialisations, batch sizes.

Every parser here raises ValueError with a message that lists the allowed values and suggests close matches.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastopt import SGD, Momentum, Nesterov, Optimizer, init, pack, schedules
from fastopt.suggest import near_misses

# --- optimizers -------------------------------------------------------------------------------------------------------

FORMS = ("momentum:ema", "momentum:lr_inside", "nesterov:lookahead")
"""Entries that ``all`` adds to the classes: other forms of the same optimizers."""

LEARNING_RATES = {
    "sgd": 0.1,
    "momentum": 0.01,
    "momentum:ema": 0.1,
    "nesterov": 0.01,
    "adagrad": 0.02,
    "adabound": 0.002,
    "adadelta": 1.0,
    "rmsprop": 0.001,
    "adam": 0.002,
    "adammini": 0.002,
    "adamw": 0.002,
    "asgd": 0.1,
    "ftrl": 0.2,
    "lamb": 0.003,
    "adabelief": 0.002,
    "adamax": 0.005,
    "adan": 0.003,
    "ademamix": 0.001,
    "adopt": 0.003,
    "lars": 0.5,
    "muon": 0.003,
    "novograd": 0.003,
    "radam": 0.002,
    "rprop": 0.001,
    "schedulefreeadamw": 0.005,
    "yogi": 0.003,
}
"""Learning rates that suit the network and the data of ``fastopt train`` at mini-batches of `REFERENCE_BATCH` rows, by
name or by ``name:form``. An optimizer without an entry uses the default of its class."""

REFERENCE_BATCH = 32

Rate = float | Literal["auto"]
"""A requested learning rate; `Choice.auto_lr` computes ``auto`` from the curvature of the loss."""

GRADIENT_DESCENT = (SGD, Momentum, Nesterov)
"""Optimizers that step along unscaled gradients; for them the curvature bounds the length of a step."""


@dataclass(frozen=True)
class Choice:
    """A requested optimizer and its options."""

    label: str
    kind: type[Optimizer]
    options: dict[str, Any]
    given_lr: float | None
    auto: bool = False
    """Whether the learning rate comes from `auto_lr`."""

    def lr(self, rows: int) -> float:
        """Return the learning rate for mini-batches of `rows`: the given one, else the usual one for that batch size.

        The usual rate grows with the square root of `rows`, as the standard deviation of the mean gradient falls.
        """
        if self.given_lr is not None:
            return self.given_lr
        name = self.kind.__name__.lower()
        usual = LEARNING_RATES.get(name, _options_of(self.kind)["lr"])
        usual = LEARNING_RATES.get(f"{name}:{self.options.get('form')}", usual)
        return float(f"{usual * math.sqrt(rows / REFERENCE_BATCH):.2g}")

    def auto_lr(self, eigenvalue: float) -> float:
        """Return 1/lambda, the step of ``--lr auto``; `eigenvalue` is lambda, the largest of the Hessian.

        A velocity that sums gradients multiplies the step along a steady gradient by 1/(1 - momentum), so the rate is
        (1 - momentum)/lambda there: with 1/lambda the network does not learn.
        """
        momentum = self.options.get("momentum", _options_of(self.kind).get("momentum", 0.0))
        adds_up = isinstance(momentum, float) and self.options.get("form") != "ema"
        return (1.0 - momentum if adds_up else 1.0) / eigenvalue

    @property
    def looks_ahead(self) -> bool:
        """Whether gradients must be taken inside ``with opt.lookahead()``."""
        return self.options.get("form") == "lookahead"


def optimizers() -> dict[str, type[Optimizer]]:
    """Return the named optimizers of the library, by name in lower case, but those that take more than gradients."""
    kinds = {
        name.lower(): kind for name, kind in Optimizer.classes.items() if not any(rule.extra for rule in kind.rules)
    }
    return dict(sorted(kinds.items()))


def parse_optimizers(texts: Iterable[str], lr: Rate | None = None, *, auto: bool = False) -> list[Choice]:
    """Return the optimizers named in `texts`, each a comma-separated list; ``all`` means every class and `FORMS`.

    An optimizer is ``name``, or ``name:option:...``, where an option is ``option=value``, the bare name of a flag
    (``adam:amsgrad``), or the bare name of a form (``momentum:ema``). `lr` applies to optimizers without their own
    ``lr=``. `auto` allows ``auto`` as a learning rate.
    """
    words = [word.strip() for text in texts for word in text.split(",")]
    names: list[str] = []
    for word in words:
        names.extend(sorted([*optimizers(), *FORMS]) if word.lower() == "all" else [word])
    chosen = [parse_optimizer(name, lr, auto=auto) for name in names]
    return list({choice.label: choice for choice in chosen}.values())


def parse_optimizer(text: str, lr: Rate | None = None, *, auto: bool = False) -> Choice:
    """Return one optimizer; see `parse_optimizers` for the syntax."""
    head, *rest = text.split(":")
    name = one_of(head.strip().lower(), [*optimizers(), "all"], "optimizer")
    if name == "all":
        raise ValueError(f"{text!r}: must be 'all' without options, got options; give options to named optimizers")
    kind = optimizers()[name]
    known = _options_of(kind)
    options: dict[str, Any] = {}
    for part in rest:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if equals:
            one_of(key, known, f"{text!r}: option")
            options[key] = _value(value)
        elif isinstance(known.get(key), bool):
            options[key] = True
        elif "form" in known:
            options["form"] = key
        else:
            one_of(key, known, f"{text!r}: option")
            raise ValueError(f"{text!r}: option {key} must have a value, got none; write {name}:{key}={known[key]}")
    label = ":".join([name, *(_spelled(key, value) for key, value in options.items())])
    given = options.pop("lr", lr)
    if given != "auto" or not auto:
        return Choice(label, kind, options, None if given is None else check_lr(given, f"{text!r}: lr"))
    if kind not in GRADIENT_DESCENT:
        able = ", ".join(kind.__name__.lower() for kind in GRADIENT_DESCENT)
        raise ValueError(
            f"{text!r}: lr must be a number, got auto: auto is 1/lambda, a step length along the gradient itself, and "
            f"{name} does not step along the gradient; use {name}:lr=0.01, or one of {able}"
        )
    return Choice(label, kind, options, None, auto=True)


def parse_lr(text: str) -> Rate:
    """Return ``auto``, or a finite number from 0."""
    try:
        return "auto" if text == "auto" else check_lr(float(text), "learning rate")
    except ValueError:
        raise ValueError(f"learning rate: must be a finite number from 0, such as 0.001, or auto, got {text}") from None


def check_lr(lr: Any, what: str) -> float:
    """Return `lr` if it is a finite number from 0; otherwise raise ValueError."""
    if isinstance(lr, float) and math.isfinite(lr) and lr >= 0.0:
        return lr
    raise ValueError(f"{what}: must be a finite number from 0, such as 0.001, got {lr}")


def _options_of(kind: type[Optimizer]) -> dict[str, Any]:
    """Return the options of an optimizer and their defaults."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "params" and p.kind is not p.VAR_KEYWORD}


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        numbers = tuple(float(number) for number in text.split("/"))
    except ValueError:
        return text
    return numbers if len(numbers) > 1 else numbers[0]


def _spelled(key: str, value: Any) -> str:
    if key == "form":
        return str(value)
    if value is True:
        return key
    numbers = value if isinstance(value, tuple) else (value,)
    return f"{key}={'/'.join(f'{n:g}' if isinstance(n, float) else str(n).lower() for n in numbers)}"


# --- schedules --------------------------------------------------------------------------------------------------------

Schedule = Callable[[int], float]

SCHEDULES: dict[str, tuple[str, Callable[[float, int], Schedule | float]]] = {
    "constant": ("lr in every step", lambda lr, steps: lr),
    "linear": ("a straight line from lr to 0", lambda lr, steps: schedules.linear(lr, 0.0, steps)),
    "polynomial": (
        "from lr to 0 with the square of the time left",
        lambda lr, steps: schedules.polynomial(lr, 0.0, steps, power=2.0),
    ),
    "cosine": ("half a cosine from lr to 0", lambda lr, steps: schedules.cosine(lr, 0.0, steps)),
    "exponential": (
        "to lr/100, by the same factor every step",
        lambda lr, steps: schedules.exponential(lr, k=math.log(100.0) / steps),
    ),
    "inverse_time": ("lr/(1 + k t), to lr/10", lambda lr, steps: schedules.inverse_time(lr, k=9.0 / steps)),
    "step_decay": (
        "halved after every fifth of the run",
        lambda lr, steps: schedules.step_decay(lr, factor=0.5, every=-(-steps // 5)),
    ),
    "cyclical": (
        "four triangles between lr/10 and lr",
        lambda lr, steps: schedules.cyclical(lr / 10.0, lr, period=max(2, -(-steps // 4))),
    ),
    "one_cycle": (
        "up to lr over 30 % of the run, then down to almost 0",
        lambda lr, steps: schedules.one_cycle(lr, max(2, steps)),
    ),
    "warmup": (
        "up to lr over 10 % of the run, then half a cosine to 0",
        lambda lr, steps: schedules.warmup(schedules.cosine(lr, 0.0, steps - steps // 10), steps // 10),
    ),
}
"""By name: a description, and a function from the learning rate and the number of steps to the schedule."""

# --- initialisations, batch sizes, layers -----------------------------------------------------------------------------

INITS: dict[str, Callable[..., NDArray[Any]]] = {
    "he": init.he_normal_,
    "he_normal": init.he_normal_,
    "he_uniform": init.he_uniform_,
    "xavier": init.xavier_normal_,
    "xavier_normal": init.xavier_normal_,
    "xavier_uniform": init.xavier_uniform_,
    "normal": lambda w, rng: init.normal_(w, rng=rng),
    "zeros": lambda w, rng: init.zeros_(w),
}


def parse_batch_size(text: str) -> int | Literal["full"]:
    """Return ``full``, or a whole number from 1."""
    if text == "full":
        return "full"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise ValueError(f"must be a whole number from 1, or 'full' for all rows in every step, got {text!r}")


def parse_backend(text: str) -> str:
    """Return ``cpu``, or ``cuda`` if it works here; ``auto`` becomes cuda if it works here, else cpu."""
    if one_of(text, ["cpu", "cuda", "auto"], "backend") == "cpu":
        return "cpu"
    try:
        ones = pack([np.ones((1, 1), np.float32)], backend="cuda").params[0]
        try:
            (ones @ ones).tobytes()
        except (RuntimeError, ImportError, OSError) as error:  # matmuls need NVIDIA libraries that our kernels do not
            raise RuntimeError(
                f"backend='cuda': CuPy cannot multiply matrices here: {error}; pip install 'cupy-cuda13x[ctk]'"
            ) from None
    except RuntimeError as error:
        if text == "auto":
            return "cpu"
        raise ValueError(str(error)) from None
    return "cuda"


def parse_hidden(text: str) -> list[int]:
    """Return the widths of the hidden layers: whole numbers from 1, separated by commas; ``none`` means no layer."""
    if text == "none":
        return []
    widths = [word.strip() for word in text.split(",")]
    if all(word.isascii() and word.isdigit() and int(word) > 0 for word in widths):
        return [int(word) for word in widths]
    raise ValueError(
        f"must be the width of each hidden layer, such as 64,32, or 'none' for no hidden layer, got {text!r}"
    )


MOST_PARAMETERS = 10**10
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def parse_sizes(text: str) -> list[int]:
    """Return the comma-separated whole numbers from 1 in ascending order; k, M and G stand for 1e3, 1e6 and 1e9."""
    return sorted({_size(word.strip()) for word in text.split(",")})


def _size(word: str) -> int:
    unit = UNITS.get(word[-1:].lower(), 1)
    try:
        number = float(word[:-1] if unit > 1 else word) * unit
    except ValueError:
        number = math.nan
    if not (1 <= number <= MOST_PARAMETERS and number == round(number)):
        raise ValueError(f"must be whole numbers from 1 to 10G, such as 1000, 1k, 2.5M, 1e6, got {word!r}")
    return round(number)


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """Return the comma-separated shapes, such as 256x1024 or 32x256x14x14, each once."""
    return list(dict.fromkeys(_shape(word.strip()) for word in text.split(",")))


def _shape(word: str) -> tuple[int, ...]:
    lengths = word.split("x")
    shape = tuple(int(length) for length in lengths if length.isascii() and length.isdigit())
    if len(shape) == len(lengths) >= 2 and all(shape) and 2 * shape[1] <= math.prod(shape) <= MOST_PARAMETERS:
        return shape
    raise ValueError(
        f"must be shapes (N, C) or (N, C, H, W) with at least 2 values per channel, such as 256x1024 or 32x256x14x14, "
        f"got {word!r}"
    )


def one_of(name: str, names: Iterable[str], what: str, also: str = "") -> str:
    """Return `name` if it is one of `names`; otherwise raise a ValueError that lists them and suggests the nearest.

    `also` describes values that are allowed beside `names`, for the message.
    """
    allowed: Sequence[str] = list(names)
    if name in allowed:
        return name
    other = f", or {also}" if also else ""
    hint = near_misses(name, allowed)
    raise ValueError(f"{what}: must be one of {', '.join(allowed)}{other}, got {name!r}{hint}")
