"""What `help()`, `inspect.signature` and editors show of the optimizers, made of torch's classes and of ours."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch

import fastopt

OPTIONS = (
    *("max_norm", "clip_norm_per_tensor", "clip_value", "nonfinite", "ema", "grad_norm"),
    *("states", "master", "rounding", "compensated", "seed"),
)
"""Arguments of ours that torch has not: what surrounds the rule in a step. They are the same for all param groups."""

ALSO = ("maximize", "decoupled_weight_decay")
"""Arguments of `fastopt.Optimizer` that every optimizer here has."""

IMPLEMENTATION = {
    "foreach": "no effect: there is one implementation.",
    "fused": "no effect: there is one implementation.",
    "capturable": "must be False: a step is not recorded in a graph.",
    "differentiable": "must be False: a step has no gradient.",
}
"""Arguments of torch that select an implementation. Ours has one."""

EPS_PAIR = "eps and min_rms"
"""For torch's ``eps`` of two numbers, which are two arguments of ours."""

HERE = {
    **IMPLEMENTATION,
    "clip_norm_per_tensor": "> 0. Each parameter's gradient is multiplied by ``c / max(norm, c)``, `norm` being that "
    "of this gradient and c the option. Not together with `max_norm`.",
    "ema": "decay rate, in (0, 1), of a moving average of the parameters: it begins at each parameter as it is at its "
    "first update, and `swap_ema` evaluates with it.",
    EPS_PAIR: "a pair, each >= 0. The second moment is at least the square of the first, and the mean of ``row_var`` "
    "at least the first; None is the eps of the dtype of the group's first parameter. The second is the least scale of "
    "a step, in units of the parameter.",
    "states": 'the format of states, ``"bfloat16"`` or ``"float16"``, or a dict of these by our names of '
    "states; None for float32. They are computed in float32.",
    "grad_norm": "measure the norm of the gradients in every step, for ``opt.info.grad_norm``.",
}
"""What is said of arguments here, in the place of what `fastopt.Optimizer` says."""

PLACEHOLDER = re.compile(r"^( *)\*args, \*\*kwargs: .*(?:\n\1 +\S.*)*\n", flags=re.MULTILINE)
"""The entry of a docstring in whose place the arguments are listed."""

ENTRY = re.compile(r"^    ([\w*]+(?:, [\w*]+)*): (.*(?:\n {5,}\S.*)*)", flags=re.MULTILINE)
"""An entry in the `Args` of a docstring: names, and what is said of them."""


def full_signature(
    ours: Callable[..., fastopt.Optimizer], theirs: type[torch.optim.Optimizer] | None
) -> inspect.Signature:
    """The arguments of torch's class where torch has the optimizer, else of ours; and the options of a step."""
    shared = inspect.signature(fastopt.Optimizer).parameters
    of = inspect.signature(ours if theirs is None else theirs).parameters.values()
    own = [parameter for parameter in of if parameter.kind is not parameter.VAR_KEYWORD]
    more = [shared[name] for name in (*(ALSO if theirs is None else ()), *OPTIONS)]
    empty = inspect.Parameter.empty
    parameters = [own[0].replace(default=empty), *own[1:], *more]
    return inspect.Signature(
        [p.replace(annotation=empty if p.annotation == "Any" else p.annotation) for p in parameters]
    )


def entries(doc: str) -> dict[str, str]:
    """What the `Args` of a docstring say, by name."""
    found = {}
    for names, text in ENTRY.findall(inspect.cleandoc(doc)):
        of = re.fullmatch(r"as for `(\w+)`\.", text)
        other = entries(getattr(fastopt, of[1]).__doc__ or "") if of else {}
        found.update({name: other.get(name, text) for name in names.split(", ")})
    return found


def documented(doc: str, signature: inspect.Signature, ours: Any, renamed: Mapping[str, str]) -> str:
    """A docstring that lists every argument with its default in the place of ``*args, **kwargs``."""
    if not PLACEHOLDER.search(doc):  # that of a rule of one's own, which tells what it tells
        return doc
    told = {**entries(fastopt.Optimizer.__doc__ or ""), **HERE, **entries(ours.__doc__ or "")}
    shown = [renamed.get(name, name) for name in signature.parameters]
    hidden = [name for name in inspect.signature(ours).parameters if name not in (*shown, "options")]
    aside = re.compile(rf" \([^()]*\b(?:{'|'.join(hidden)})\b[^()]*\)" if hidden else r"(?!)")
    lines = []
    for name, parameter in list(zip(shown, signature.parameters.values(), strict=True))[1:]:
        text = aside.sub("", " ".join(told[name].split()))
        lines.append(f"{parameter.name}: {text} Default: {parameter.default!r}.")

    def listed(place: re.Match[str]) -> str:
        wrap = textwrap.TextWrapper(
            120, initial_indent=place[1], subsequent_indent=f"{place[1]}    ", break_on_hyphens=False
        )
        return "".join(f"{wrap.fill(line)}\n" for line in lines)

    return PLACEHOLDER.sub(listed, doc)
