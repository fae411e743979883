"""The names that options may take: optimizers and their options, schedules, initialisations, batch sizes.

Every function here raises ValueError with a message that lists what is allowed and, where one is near, what was meant.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastopt import SGD, Momentum, Nesterov, Optimizer, init, pack, schedules

# --- optimizers -------------------------------------------------------------------------------------------------------

FORMS = ("momentum:ema", "momentum:lr_inside", "nesterov:lookahead")
"""What ``all`` adds to the classes: the same optimizer, written another way."""

LEARNING_RATES = {
    "sgd": 0.1,
    "momentum": 0.01,
    "momentum:ema": 0.1,
    "nesterov": 0.01,
    "adagrad": 0.02,
    "adadelta": 1.0,
    "rmsprop": 0.001,
    "adam": 0.002,
    "adamw": 0.002,
    "lamb": 0.003,
    "adabelief": 0.002,
    "adamax": 0.005,
    "adan": 0.003,
    "ademamix": 0.001,
    "lars": 0.5,
    "muon": 0.003,
    "novograd": 0.003,
    "radam": 0.002,
    "rprop": 0.001,
    "schedulefreeadamw": 0.005,
    "yogi": 0.003,
}
"""Learning rates that suit the network and the data of ``fastopt train`` at mini-batches of `REFERENCE_BATCH` rows, by
name or by ``name:form``. An optimizer that is not here takes the default of its class."""

REFERENCE_BATCH = 32

Rate = float | Literal["auto"]
"""A learning rate as it is asked for; ``auto`` is what `Choice.auto_lr` makes of the curvature of the loss."""

GRADIENT_DESCENT = (SGD, Momentum, Nesterov)
"""Those whose steps are along gradients as they are, for which a curvature says how long a step may be."""


@dataclass(frozen=True)
class Choice:
    """An optimizer as it was asked for."""

    label: str
    kind: type[Optimizer]
    options: dict[str, Any]
    given_lr: float | None
    auto: bool = False
    """Whether the learning rate is to be that of `auto_lr`."""

    def lr(self, rows: int) -> float:
        """The learning rate for mini-batches of `rows`: the one given, else the usual one for so many rows.

        It grows with the square root of the rows, as the deviation of their mean gradient falls. Tried for 1, 8, 32 and
        all rows: every optimizer learns; with one number for all, plain gradient descent fails on single rows.
        """
        if self.given_lr is not None:
            return self.given_lr
        name = self.kind.__name__.lower()
        usual = LEARNING_RATES.get(name, _options_of(self.kind)["lr"])
        usual = LEARNING_RATES.get(f"{name}:{self.options.get('form')}", usual)
        return float(f"{usual * math.sqrt(rows / REFERENCE_BATCH):.2g}")

    def auto_lr(self, eigenvalue: float) -> float:
        """1/lambda, where `eigenvalue` is lambda, the largest of the Hessian: the step of ``--lr auto``.

        A velocity that adds up gradients makes of a steady one 1/(1 - momentum) times as long a step, so there it is
        (1 - momentum)/lambda: tried with 1/lambda, the network does not learn.
        """
        momentum = self.options.get("momentum", _options_of(self.kind).get("momentum", 0.0))
        adds_up = isinstance(momentum, float) and self.options.get("form") != "ema"
        return (1.0 - momentum if adds_up else 1.0) / eigenvalue

    @property
    def looks_ahead(self) -> bool:
        """Whether the gradient is to be taken inside ``with opt.lookahead()``."""
        return self.options.get("form") == "lookahead"


def optimizers() -> dict[str, type[Optimizer]]:
    """Every named optimizer of the library, by its name in lower case."""
    return dict(sorted((name.lower(), kind) for name, kind in Optimizer.classes.items()))


def parse_optimizers(texts: Iterable[str], lr: Rate | None = None, *, auto: bool = False) -> list[Choice]:
    """The optimizers named in `texts`, each a list separated by commas; ``all`` is every class and `FORMS`.

    An optimizer is ``name``, or ``name:option:...``, where an option is ``option=value``, the bare name of a flag
    (``adam:amsgrad``), or the bare name of a form (``momentum:ema``). `lr` is for those that name no ``lr=``.
    `auto` allows ``auto`` for a learning rate.
    """
    words = [word.strip() for text in texts for word in text.split(",")]
    names: list[str] = []
    for word in words:
        names.extend(sorted([*optimizers(), *FORMS]) if word.lower() == "all" else [word])
    chosen = [parse_optimizer(name, lr, auto=auto) for name in names]
    return list({choice.label: choice for choice in chosen}.values())


def parse_optimizer(text: str, lr: Rate | None = None, *, auto: bool = False) -> Choice:
    """One optimizer, as `parse_optimizers` describes it."""
    head, *rest = text.split(":")
    name = one_of(head.strip().lower(), [*optimizers(), "all"], "optimizer")
    if name == "all":
        raise ValueError(f"{text!r}: all takes no options; name the optimizers that are to have them")
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
            raise ValueError(f"{text!r}: the option {key} needs a value: {name}:{key}={known[key]}")
    label = ":".join([name, *(_spelled(key, value) for key, value in options.items())])
    given = options.pop("lr", lr)
    if given != "auto" or not auto:
        return Choice(label, kind, options, None if given is None else check_lr(given, f"{text!r}: lr"))
    if kind not in GRADIENT_DESCENT:
        able = ", ".join(kind.__name__.lower() for kind in GRADIENT_DESCENT)
        raise ValueError(
            f"{text!r}: lr auto is 1/lambda, the length of a step along the gradient itself, and the steps of {name} "
            f"are not along it; give it a number, as in {name}:lr=0.01, or choose from {able}"
        )
    return Choice(label, kind, options, None, auto=True)


def parse_lr(text: str) -> Rate:
    """``auto``, or a finite number from 0."""
    try:
        return "auto" if text == "auto" else check_lr(float(text), "the learning rate")
    except ValueError:
        raise ValueError(f"the learning rate is {text}; it is a finite number from 0, such as 0.001, or auto") from None


def check_lr(lr: Any, what: str) -> float:
    """`lr`, where it is a finite number from 0."""
    if isinstance(lr, float) and math.isfinite(lr) and lr >= 0.0:
        return lr
    raise ValueError(f"{what} is {lr}; a learning rate is a finite number from 0, such as 0.001")


def _options_of(kind: type[Optimizer]) -> dict[str, Any]:
    """The options of an optimizer, and their defaults."""
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
    "constant": ("lr throughout", lambda lr, steps: lr),
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
"""What each name does, and the schedule it stands for, given the learning rate and the number of steps of the run."""

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
    """``full``, or a whole number from 1."""
    if text == "full":
        return "full"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise ValueError(f"{text!r} is no batch size; give a whole number from 1, or 'full' for all rows in every step")


def parse_backend(text: str) -> str:
    """``cpu``, or ``cuda`` where that works; ``auto`` is cuda where it works, else cpu."""
    if one_of(text, ["cpu", "cuda", "auto"], "backend") == "cpu":
        return "cpu"
    try:
        ones = pack([np.ones((1, 1), np.float32)], backend="cuda").params[0]
        try:
            (ones @ ones).tobytes()
        except (RuntimeError, ImportError, OSError) as error:  # our kernels need fewer of NVIDIA's libraries
            raise RuntimeError(
                f"backend='cuda': CuPy cannot multiply matrices here: {error}; pip install 'cupy-cuda13x[ctk]'"
            ) from None
    except RuntimeError as error:
        if text == "auto":
            return "cpu"
        raise ValueError(str(error)) from None
    return "cuda"


def parse_hidden(text: str) -> list[int]:
    """The widths of the hidden layers: whole numbers from 1, separated by commas; ``none`` for no hidden layer."""
    if text == "none":
        return []
    widths = [word.strip() for word in text.split(",")]
    if all(word.isascii() and word.isdigit() and int(word) > 0 for word in widths):
        return [int(word) for word in widths]
    raise ValueError(f"{text!r}: give the width of each hidden layer, as in 64,32, or 'none' for no hidden layer")


MOST_PARAMETERS = 10**10
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def parse_sizes(text: str) -> list[int]:
    """Whole numbers from 1, separated by commas, in ascending order; k, M and G stand for 1e3, 1e6 and 1e9."""
    return sorted({_size(word.strip()) for word in text.split(",")})


def _size(word: str) -> int:
    unit = UNITS.get(word[-1:].lower(), 1)
    try:
        number = float(word[:-1] if unit > 1 else word) * unit
    except ValueError:
        number = math.nan
    if not (1 <= number <= MOST_PARAMETERS and number == round(number)):
        raise ValueError(
            f"{word!r} is no number of parameters; give whole numbers from 1 to 10G, such as 1000, 1k, 2.5M, 1e6"
        )
    return round(number)


def one_of(name: str, names: Iterable[str], what: str) -> str:
    """`name`, where it is one of `names`; else a ValueError that lists them and suggests the nearest."""
    allowed: Sequence[str] = list(names)
    if name in allowed:
        return name
    near = get_close_matches(name, allowed, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"{what} {name!r} is unknown; {hint}choose from {', '.join(allowed)}")
