"""Convert states to and from ``optimizer.variables`` of Keras 3, without importing Keras."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.interop.core import (
    Demand,
    array_from,
    check_forms,
    check_one_count,
    check_positions,
    check_same_for_all,
    check_uphill,
    count_from,
    decays,
    is_scheduled,
    missed_before,
    number_from,
    of_one_moment,
    order_of,
    put,
    rule_of,
    views_of,
)
from fastopt.optimizer import Optimizer

ITERATION, RATE = "iteration", "learning_rate"

CLASSES = (
    *("sgd", "rm_sprop", "adam", "adam_w", "nadam", "adamax", "adagrad", "adadelta", "adafactor", "ftrl", "lion"),
    *("lamb", "muon", "schedule_free_adam_w"),
)
"""Default names of Keras optimizers, without their number suffix."""

# --- Keras' forms -----------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A Keras class: its name, its default instance name, and its variables.

    blocks : consecutive blocks; each holds, parameter by parameter, our states by the suffix of Keras' name.
    """

    optimizer: str
    name: str
    blocks: tuple[Mapping[str, str], ...] = ()
    counts: bool = False
    """Whether the formula uses the step count, not only a schedule."""


SQUARES, BUFFER, MEAN = {"velocity": "square_avg"}, {"momentum": "buf"}, {"average_gradient": "grad_avg"}
VELOCITY = ({"momentum": "velocity"},)
MOMENTS, LARGEST = {"momentum": "m", "velocity": "v"}, {"velocity_hat": "v_max"}

FORMS = {
    "sgd": Form("SGD", "sgd"),
    "sgd_momentum": Form("SGD", "sgd", VELOCITY),
    "sgd_nesterov": Form("SGD", "sgd", VELOCITY),
    "momentum": Form("SGD", "sgd", VELOCITY),
    "rmsprop": Form("RMSprop", "rm_sprop", (SQUARES,)),
    "rmsprop_centered": Form("RMSprop", "rm_sprop", (SQUARES, MEAN)),
    "rmsprop_momentum": Form("RMSprop", "rm_sprop", (SQUARES, BUFFER)),
    "rmsprop_centered_momentum": Form("RMSprop", "rm_sprop", (SQUARES, BUFFER, MEAN)),
    "adam": Form("Adam", "adam", (MOMENTS,), counts=True),
    "amsgrad": Form("Adam", "adam", (MOMENTS, LARGEST), counts=True),
    "adamw": Form("AdamW", "adam_w", (MOMENTS,), counts=True),
    "adamw_amsgrad": Form("AdamW", "adam_w", (MOMENTS, LARGEST), counts=True),
}

ADAM = {
    "eps_hat": Demand(True, "adds eps to the uncorrected root"),
    "eps_inside": Demand(False, "adds eps to the root, not under it"),
    "bias_correction": Demand(True, "always corrects the bias"),
}
DEMANDS = {
    "SGD": {
        "form": Demand("lr_inside", "its momentum is v = momentum v - lr g, p += v"),
        "lr_inside": Demand(True, "has lr inside the momentum"),
        "dampening": Demand(0.0, "has no dampening"),
    },
    "RMSprop": {
        "eps_inside": Demand(True, "has eps under the root"),
        "lr_inside": Demand(True, "has lr inside the momentum"),
    },
    "Adam": ADAM,
    "AdamW": ADAM,
}


def _form_of(opt: Optimizer) -> Form:
    """Return the form; raise ValueError if Keras has no equal form."""
    form = FORMS.get(rule_of(opt))
    if form is None:
        hint = ", whose Nesterov has lr inside: SGD(momentum=, nesterov=True, lr_inside=True)"
        raise ValueError(
            f"keras.optimizers: no optimizer computes the same as rule {rule_of(opt)!r}"
            f"{hint if 'nesterov' in opt.rule.name else ''}; the supported formats are those of {', '.join(DEMANDS)}"
        )
    other = f"keras.optimizers.{form.optimizer}"
    check_forms(opt, other, DEMANDS[form.optimizer])
    check_uphill(opt, other)
    if not opt.rule.decoupled and decays(opt):
        raise ValueError(
            f"{other}: decays the weights directly, not through the gradient (L2); construct the optimizer with "
            f"decoupled_weight_decay=True"
        )
    check_same_for_all(opt, other)
    return form


# --- to Keras ---------------------------------------------------------------------------------------------------------


@of_one_moment
def to_keras_state(opt: Optimizer, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return the optimizer's state as ``{v.path: v.numpy() for v in optimizer.variables}`` of Keras 3, in Keras' order.

    SGD and Momentum (lr_inside) become Keras' SGD; RMSprop, Adam and AdamW become the Keras classes of the same name,
    all in the form of ``convention="keras"``. Weight decay is always decoupled in Keras; ``overrides`` may exclude
    parameters from it.

    Args:
        opt: the optimizer. It is not changed, and shares no memory with the result.
        names: the paths of all parameters in Keras' order, that of ``model.trainable_variables``; None for that of
            ``opt.flat.paths``, which sorts the keys of a dict.

    Returns:
        ``"adam/iteration"``, ``"adam/learning_rate"`` (missing if lr is a schedule, as in Keras), and the states, such
        as ``"adam/dense_kernel_momentum"`` of the parameter ``"dense.kernel"``.

    Raises:
        TypeError, ValueError: `names` that are not the paths, two parameters with the same Keras name, or a form that
            Keras does not have.

    >>> import numpy as np, fastopt
    >>> from fastopt.interop import to_keras_state
    >>> opt = fastopt.Adam({"w": np.ones(2, np.float32)}, convention="keras")
    >>> _ = opt.step({"w": np.ones(2, np.float32)})
    >>> {name: array.tolist() for name, array in to_keras_state(opt).items() if array.ndim == 0 or "mom" in name}
    {'adam/iteration': 1, 'adam/learning_rate': 0.0010000000474974513, 'adam/w_momentum': [0.1..., 0.1...]}

    To load it into a Keras optimizer built for the same variables::

        for variable, array in zip(optimizer.variables, to_keras_state(opt, names).values(), strict=True):
            variable.assign(array)
    """
    form = _form_of(opt)
    if form.counts:
        check_one_count(opt, f"keras.optimizers.{form.optimizer}")
    order = order_of(opt, opt.flat.paths if names is None else names)
    state = {f"{form.name}/{ITERATION}": np.array(opt.step_count, np.int64)}
    if not is_scheduled(opt, "lr"):
        state[f"{form.name}/{RATE}"] = np.array(opt.lr, opt.flat.dtype)
    stems = _stems(opt)
    views = views_of(opt)
    for block in form.blocks:
        for k in order:
            for kind, ours in block.items():
                key = f"{form.name}/{stems[k]}_{kind}"
                if key in state:
                    raise ValueError(
                        f"parameter {opt.flat.paths[k]!r}: must have its own name in Keras, got {key!r} twice; "
                        "rename the parameter"
                    )
                state[key] = views[ours][k].copy()
    return state


def _stems(opt: Optimizer) -> list[str]:
    return [_stem(path) for path in opt.flat.paths]


def _stem(path: str) -> str:
    """Return the stem of Keras' variable names for the parameter with this path."""
    return path.replace("/", "_").replace(".", "_")


# --- from Keras -------------------------------------------------------------------------------------------------------


@of_one_moment
def from_keras_state(
    opt: Optimizer, variables: Mapping[str, Any] | Sequence[Any], names: Sequence[str] | None = None
) -> None:
    """Continue a run of Keras 3: replace the states, the step count and the learning rate by those of Keras.

    Keras' variables hold no other hyperparameters: construct the optimizer with those of the run, most easily with
    ``convention="keras"``. If lr is a schedule here, the schedule stays. The parameters and their moving average do not
    change.

    Args:
        opt: an optimizer of the same form (see `to_keras_state`). It is unchanged after an error.
        variables: ``{v.path: v.numpy() for v in optimizer.variables}`` (or by ``v.name``), or the list
            ``[v.numpy() for v in optimizer.variables]``. Arrays are copied; pass anything that ``np.asarray`` reads, in
            the dtype of the parameters.
        names: the paths of the parameters in Keras' order, that of ``model.trainable_variables``. With None, a dict is
            matched by its names, where ``"dense_kernel_momentum"`` belongs to the parameter ``"dense.kernel"``, and a
            list by the order of ``opt.flat.paths``, which sorts the keys of a dict; that is refused where two
            parameters of one shape are in the order of sorted keys.

    Raises:
        TypeError, ValueError: variables of another class or form (amsgrad, centered, momentum, averages, accumulated
            gradients), other names, shapes, dtypes or counts, or a learning rate out of range; the message names them.

    >>> import numpy as np, fastopt
    >>> from fastopt.interop import from_keras_state
    >>> opt = fastopt.SGD({"w": np.ones(2)}, momentum=0.9, convention="keras")
    >>> from_keras_state(opt, {"sgd/iteration": 7, "sgd/learning_rate": 0.5, "sgd/w_momentum": np.array([-3.0, 4.0])})
    >>> opt.states["velocity"]["w"], opt.step_count, opt.lr
    (array([-3.,  4.]), 7, 0.5)
    """
    form = _form_of(opt)
    order = None if names is None else order_of(opt, names)
    if isinstance(variables, Mapping):
        found, where = _by_name(opt, form, variables, order)
    elif isinstance(variables, list | tuple):
        found, where = _by_place(opt, form, variables, order)
    else:
        raise TypeError(
            f"variables: must be a dict by path or a list of arrays, as of optimizer.variables, got "
            f"{type(variables).__name__}"
        )
    views = opt.flat.arrays
    step = count_from(found[ITERATION], where[ITERATION])
    values = None
    if RATE in found:
        rate = opt.rule.check("lr", number_from(found[RATE], where[RATE]), f"{where[RATE]}: ")
        # Keras stores the rate in float32: keep a rate that differs only by this rounding.
        if not is_scheduled(opt, "lr") and rate not in (opt.lr, float(np.float32(opt.lr))):
            values = [{"lr": rate} for _ in views]
    arrays: dict[str, list[np.ndarray]] = {
        ours: [
            array_from(found[kind, k], f"{where[kind, k]} of parameter {path!r}", views[k])
            for k, path in enumerate(opt.flat.paths)
        ]
        for block in form.blocks
        for kind, ours in block.items()
    }
    put(opt, arrays, step, [0] * len(views) if form.counts else missed_before(opt, step), values)


Found = tuple[dict[Any, Any], dict[Any, str]]
"""Values and their origins, by key: the iteration, the learning rate, and (kind, index of the parameter)."""


def _by_place(opt: Optimizer, form: Form, variables: Sequence[Any], order: Sequence[int] | None) -> Found:
    if order is None and form.blocks:
        check_positions(opt, "Keras")
    numbers = range(len(opt.flat.paths)) if order is None else order
    keys = [(kind, k) for block in form.blocks for k in numbers for kind in block]
    heads = [ITERATION, RATE][: len(variables) - len(keys)]
    if len(variables) != len(heads) + len(keys) or not heads:
        raise ValueError(
            f"variables: must be the iteration, the learning rate unless it is a schedule, and {len(keys)} states of "
            f"{len(opt.flat.paths)} parameters, as in this optimizer ({opt.rule.name}), got {len(variables)} variables"
        )
    found: dict[Any, Any] = dict(zip([*heads, *keys], variables, strict=True))
    return found, {key: f"variables[{place}]" for place, key in enumerate(found)}


def _by_name(opt: Optimizer, form: Form, variables: Mapping[str, Any], order: Sequence[int] | None) -> Found:
    kinds = [kind for block in form.blocks for kind in block]
    found: dict[Any, Any] = {}
    where: dict[Any, str] = {}
    stems: dict[str, int] = {}
    parsed: list[tuple[str, str, str]] = []
    for key, value in variables.items():
        if not isinstance(key, str):
            raise TypeError(f"variables: must have the variables' paths as keys, got {key!r}")
        own, _, last = key.rpartition("/")
        _check_class(opt, form, key, re.sub(r"_\d+$", "", own))
        if last in (ITERATION, RATE):
            if last in found:
                raise ValueError(f"variables[{key!r}]: must be the only {last}; pass the variables of one optimizer")
            found[last], where[last] = value, f"variables[{key!r}]"
            continue
        kind = next((kind for kind in kinds if last.endswith(f"_{kind}")), None)
        if kind is None:
            raise ValueError(
                f"variables[{key!r}]: must be a state of this optimizer ({opt.rule.name}), whose names end in "
                f"{', '.join(f'_{kind}' for kind in kinds) or 'nothing: it has no states'}"
            )
        stem = last[: -len(kind) - 1]
        stems.setdefault(stem, len(stems))
        parsed.append((key, kind, stem))
    if ITERATION not in found:
        raise ValueError(f"variables: must have {form.name + '/' + ITERATION!r}, got {', '.join(variables)}")
    number_of = _numbers(opt, form, list(stems), order)
    for key, kind, stem in parsed:
        place = (kind, number_of[stem])
        found[place], where[place] = variables[key], f"variables[{key!r}]"
    for kind in kinds:
        for stem, k in number_of.items():
            if (kind, k) not in found:
                raise ValueError(f"variables: must have '{form.name}/{stem}_{kind}', got {', '.join(variables)}")
    return found, where


def _check_class(opt: Optimizer, form: Form, key: str, name: str) -> None:
    # Check the class: Keras' RMSprop with momentum has the same variable names as Adam.
    same = ("adam", "adam_w")
    if name in CLASSES and name != form.name and not (name in same and form.name in same):
        raise ValueError(
            f"variables[{key!r}]: must be of Keras' {form.optimizer}, as this optimizer ({opt.rule.name}) is, got "
            f"{name!r}"
        )


def _numbers(opt: Optimizer, form: Form, stems: Sequence[str], order: Sequence[int] | None) -> dict[str, int]:
    """Return the index of the parameter by the stem of Keras' variable names."""
    if not form.blocks:
        return {}
    paths = opt.flat.paths
    if len(stems) != len(paths):
        raise ValueError(
            f"variables: must have states of {len(paths)} parameters, {', '.join(paths)}, got {len(stems)}: "
            f"{', '.join(stems)}"
        )
    if order is not None:
        return dict(zip(stems, order, strict=True))
    own = _stems(opt)
    numbers = {stem: own.index(_stem(stem)) for stem in stems if own.count(_stem(stem)) == 1}
    if sorted(numbers.values()) != list(range(len(paths))):
        raise ValueError(
            f"variables: must have states of the parameters {', '.join(paths)}, got {', '.join(stems)}; "
            f"give names=, the paths here in Keras' order"
        )
    return numbers
