"""The table of rivals: NumPy, torch, optax, DeepSpeed, thinc and scikit-learn make the same step as fastopt.

A rival takes part in a `Work` only with an optimizer that computes the same: the tests compare the parameters of each
rival with those of fastopt after several steps. A rival that cannot take part raises `Absent` with the reason.

Rivals use as many threads as fastopt, except NumPy, thinc and scikit-learn, which compute these steps on one thread.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastopt import Optimizer, get_num_threads, reference

Array = NDArray[Any]
PATTERN = 2**16
"""Elements after which initial values and gradients repeat: drawing 30M random numbers takes longer than the timing."""


class Absent(Exception):  # noqa: N818 not an error: it carries the reason
    """The reason why a rival does not take part.

    Args:
        reason: a sentence for the table: "torch has no Lion that computes the same".

    Raised by the entries of `RIVALS`, including entries that you add; `enter` collects the reasons.

    >>> try:
    ...     RIVALS["numpy"].enter(Work("SGD", ((1000,),), options={"max_norm": 1.0}))
    ... except Absent as reason:
    ...     print(reason)
    the reference has no max_norm=1.0
    """

    def __init__(self, reason: str):
        super().__init__(reason)


class Contestant(NamedTuple):
    """A contestant: a step, and the parameters it updates."""

    step: Callable[[], object]
    params: Callable[[], list[Array]]
    """Return copies of the parameters, in the order of the shapes."""
    before: Callable[[], object] | None = None
    """Prepare a step; not part of the timed step."""
    optimizer: Optimizer | None = None
    """The optimizer, if the contestant is fastopt."""


@dataclass(frozen=True, eq=False)
class Work:
    """The step that all contestants make.

    Args:
        optimizer: name of a fastopt class, such as ``"AdamW"``.
        shapes: shapes of the parameters, one tuple of ints each.
        dtype: dtype of parameters, gradients and states: ``"float32"`` or ``"float64"``.
        options: options that differ from the defaults of the class, by name.
        groups: number of learning rates, from 1: each of the first ``groups - 1`` parameters has its own.

    >>> work = Work("Adam", ((100, 10), (10,)), options={"betas": (0.9, 0.95)})
    >>> work.kind.__name__, work.size, [grad.shape for grad in work.grads]
    ('Adam', 1010, [(100, 10), (10,)])
    """

    optimizer: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: int = 1

    @property
    def kind(self) -> type[Optimizer]:
        """The class of the optimizer."""
        return Optimizer.classes[self.optimizer]

    @property
    def size(self) -> int:
        """The total number of elements of the parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes_each(self) -> int:
        """The memory of one contestant in bytes: parameters, gradients and states."""
        states = max(len(rule.states) for rule in self.kind.rules)
        return (2 + states) * self.size * np.dtype(self.dtype).itemsize

    def start(self) -> list[Array]:
        """Return new initial parameters, the same for every contestant.

        Returns:
            A list of arrays in the order of `shapes`, drawn from the normal distribution and equal at every call; the
            values repeat after 65,536 elements.

        >>> work = Work("SGD", ((4,), (2, 3)))
        >>> [p.shape for p in work.start()], bool((work.start()[0] == work.start()[0]).all())
        ([(4,), (2, 3)], True)
        """
        return [_repeated(shape, self.dtype, seed) for seed, shape in enumerate(self.shapes)]

    @cached_property
    def grads(self) -> list[Array]:
        """The gradients of every step; do not write to them."""
        return [_repeated(shape, self.dtype, -1 - seed) for seed, shape in enumerate(self.shapes)]

    def values(self) -> Values:
        """Return all hyperparameters, given ones and defaults of the class, as attributes.

        Returns:
            An object that records which attributes were read: ``check_used(whose)`` raises `Absent` for a given
            hyperparameter that a rival did not read.

        >>> Work("Adam", ((4,),), options={"lr": 0.1}).values().some_of(["lr", "betas"])
        {'lr': 0.1, 'betas': (0.9, 0.999)}
        """
        return Values(self.kind, self.options)

    def lr(self, parameter: int) -> float:
        """Return the learning rate of a parameter: the optimizer's, or a fraction of it for a param group.

        Formula: ``lr / (parameter + 2)`` for the first ``groups - 1``, ``lr`` for the rest.

        Args:
            parameter: index of the parameter in `shapes`, from 0.

        Returns:
            A float.

        >>> work = Work("SGD", ((1,), (1,), (1,)), options={"lr": 0.6}, groups=2)
        >>> [work.lr(k) for k in range(3)]
        [0.3, 0.6, 0.6]
        """
        lr = float(self.values().lr)
        return lr / (parameter + 2) if parameter < self.groups - 1 else lr


class Values:
    """The hyperparameters of an optimizer as attributes; the object records which were read."""

    def __init__(self, kind: type[Optimizer], options: Mapping[str, Any]):
        parameters = inspect.signature(kind).parameters.values()
        self._all = {each.name: each.default for each in parameters if each.default is not each.empty} | dict(options)
        self._given = options
        self._used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        try:
            value = self._all[name]
        except KeyError:
            raise AttributeError(name) from None
        self._used.add(name)
        return value

    def some_of(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the hyperparameters among `names` that exist."""
        return {name: getattr(self, name) for name in names if name in self._all}

    def check_used(self, whose: str) -> None:
        """Raise Absent if an option was given that the rival did not read."""
        for name, value in self._given.items():
            if name not in self._used:
                raise Absent(f"{whose} has no {name}={value}")


def _repeated(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Return numbers from the normal distribution, repeated after `PATTERN` elements."""
    size = math.prod(shape)
    numbers = np.random.default_rng(abs(seed) * 2 + (seed < 0)).standard_normal(min(size, PATTERN)).astype(dtype)
    return np.resize(numbers, shape)


# --- fastopt ----------------------------------------------------------------------------------------------------------


def of_fastopt(work: Work) -> Contestant:
    """Return fastopt's step, on gradients already in ``opt.grads``."""
    overrides = {str(k): {"lr": work.lr(k)} for k in range(work.groups - 1)}
    optimizer = work.kind(work.start(), **work.options, overrides=overrides)
    optimizer._running.gradients_in = None  # no gradients are computed: there is nothing to warn of
    flat = optimizer.flat
    for view, grad in zip(flat.views(flat.grad), work.grads, strict=True):
        view[...] = grad
    return Contestant(optimizer.step, lambda: [view.copy() for view in flat.views(flat.data)], None, optimizer)


# --- the rivals -------------------------------------------------------------------------------------------------------

STEPS = 10
"""Largest step number passed to the reference: some of its formulas sum over all steps at every call, and the cost of
thousands of terms would not be NumPy's."""


def _numpy(work: Work) -> Contestant:
    names = {name.replace("_", ""): name for name in reference.OPTIMIZERS}
    name = names[work.optimizer.lower()]
    update = reference.OPTIMIZERS[name]
    values = work.values()
    hyper = values.some_of(inspect.signature(update).parameters)
    values.check_used("the reference")
    params = work.start()
    states = [reference.init_state(name, p, **hyper) for p in params]
    options = [{**hyper, "lr": work.lr(k)} for k in range(len(params))]
    count = 0

    def step() -> None:
        nonlocal count
        count = min(count + 1, STEPS)
        for p, g, state, each in zip(params, work.grads, states, options, strict=True):
            update(p, g, state, count, **each)

    return Contestant(step, lambda: [p.copy() for p in params])


def _sgd(h: Values) -> dict[str, Any]:
    if h.form != "heavy_ball":
        raise Absent(f"has no form={h.form}")
    return {"momentum": h.momentum, "weight_decay": h.weight_decay}


def _nesterov(h: Values) -> dict[str, Any]:
    if h.form != "reformulated":
        raise Absent(f"has no form={h.form}")
    return {"momentum": h.momentum, "weight_decay": h.weight_decay, "nesterov": True}


ADAM = ("betas", "eps", "weight_decay", "amsgrad")
TORCH: dict[str, tuple[str, Callable[[Values], dict[str, Any]]]] = {
    "SGD": ("SGD", lambda h: h.some_of(("momentum", "dampening", "nesterov", "weight_decay"))),
    "Momentum": ("SGD", _sgd),
    "Nesterov": ("SGD", _nesterov),
    "Adagrad": ("Adagrad", lambda h: h.some_of(("lr_decay", "weight_decay", "eps", "initial_accumulator_value"))),
    "Adadelta": ("Adadelta", lambda h: h.some_of(("rho", "eps", "weight_decay"))),
    "RMSprop": ("RMSprop", lambda h: h.some_of(("alpha", "eps", "weight_decay", "momentum", "centered"))),
    "Adam": ("Adam", lambda h: h.some_of(ADAM)),
    "AdamW": ("AdamW", lambda h: h.some_of(ADAM)),
    "NAdam": ("NAdam", lambda h: h.some_of(("betas", "eps", "weight_decay", "momentum_decay"))),
    "RAdam": ("RAdam", lambda h: h.some_of(("betas", "eps", "weight_decay"))),
    "Adamax": ("Adamax", lambda h: h.some_of(("betas", "eps", "weight_decay"))),
    "Rprop": ("Rprop", lambda h: h.some_of(("etas", "step_sizes"))),
    "ASGD": ("ASGD", lambda h: h.some_of(("lambd", "alpha", "t0", "weight_decay"))),
}
"""The classes of torch.optim that compute the same, and their arguments except lr."""

FUSED = ("SGD", "Adagrad", "Adam", "AdamW")
"""The torch classes with a fused CPU kernel."""


_torchs_own: list[int] = []
"""Torch's number of threads before the measurement; empty if unknown."""


def torch_on_our_threads() -> Any:
    """Return torch, set to fastopt's number of threads."""
    torch = import_module("torch")
    if not _torchs_own:
        _torchs_own.append(torch.get_num_threads())
    torch.set_num_threads(get_num_threads())
    return torch


@contextmanager
def torch_as_before() -> Iterator[None]:
    """Restore torch's number of threads after a ``with`` block that measures torch."""
    _torchs_own.clear()
    try:
        yield
    finally:
        if _torchs_own:
            import_module("torch").set_num_threads(_torchs_own.pop())


def _torch_params(work: Work) -> tuple[Any, list[Any], list[dict[str, Any]]]:
    """Return torch, its parameters with their gradients, and their param groups."""
    torch = torch_on_our_threads()
    params = [torch.nn.Parameter(torch.from_numpy(p)) for p in work.start()]
    for param, grad in zip(params, work.grads, strict=True):
        param.grad = torch.from_numpy(grad)
    own = work.groups - 1
    groups = [{"params": [param], "lr": work.lr(k)} for k, param in enumerate(params[:own])]
    return torch, params, [*groups, {"params": params[own:], "lr": work.lr(own)}]


def _torch(work: Work, **how: Any) -> Contestant:
    if work.optimizer not in TORCH:
        raise Absent(f"torch has no {work.optimizer} that computes the same")
    name, translate = TORCH[work.optimizer]
    if how and name not in FUSED:
        raise Absent(f"torch has no fused {name}")
    values = work.values()
    options = translate(values)
    _ = values.lr
    values.check_used("torch")
    torch, params, groups = _torch_params(work)
    optimizer = getattr(torch.optim, name)(groups, lr=work.lr(len(params)), **options, **how)
    return Contestant(optimizer.step, lambda: [param.detach().numpy().copy() for param in params])


OPTAX: dict[str, Callable[[Any, Values], Any]] = {
    "SGD": lambda optax, h: optax.sgd(h.lr, momentum=h.momentum or None, nesterov=h.nesterov),
    "Momentum": lambda optax, h: optax.sgd(h.lr, momentum=_sgd(h)["momentum"]),
    "Nesterov": lambda optax, h: optax.sgd(h.lr, momentum=_nesterov(h)["momentum"], nesterov=True),
    "Adadelta": lambda optax, h: optax.adadelta(h.lr, h.rho, h.eps),
    "RMSprop": lambda optax, h: optax.rmsprop(h.lr, h.alpha, h.eps, eps_in_sqrt=False, centered=h.centered),
    "Adam": lambda optax, h: optax.adam(h.lr, *h.betas, eps=h.eps),
    "AdamW": lambda optax, h: optax.adamw(h.lr, *h.betas, eps=h.eps, weight_decay=h.weight_decay),
    "Adamax": lambda optax, h: optax.adamax(h.lr, *h.betas, eps=h.eps),
    "LAMB": lambda optax, h: optax.lamb(h.lr, *h.betas, eps=h.eps, weight_decay=h.weight_decay),
    "Lion": lambda optax, h: optax.lion(h.lr, *h.betas, weight_decay=h.weight_decay),
    "AdaBelief": lambda optax, h: optax.adabelief(h.lr, *h.betas, eps=h.eps, eps_root=h.eps),
    "RAdam": lambda optax, h: optax.radam(h.lr, *h.betas, eps=h.eps),
    "Adan": lambda optax, h: optax.adan(h.lr, *h.betas, eps=h.eps, eps_root=0.0, weight_decay=h.weight_decay),
    "LARS": lambda optax, h: optax.lars(
        h.lr, h.weight_decay, trust_coefficient=h.trust_coefficient, eps=h.eps, momentum=h.momentum
    ),
    "AdEMAMix": lambda optax, h: optax.contrib.ademamix(
        h.lr, *h.betas, alpha=h.alpha, eps=h.eps, weight_decay=h.weight_decay
    ),
}
"""The optimizers of optax that compute the same. Its yogi, rprop, adagrad, nadam and novograd do not."""


def _optax(work: Work) -> Contestant:
    # Set it before the import: XLA reads this variable once, at its start.
    os.environ.setdefault("NPROC", str(get_num_threads()))
    optax, jax = import_module("optax"), import_module("jax")
    if work.optimizer not in OPTAX:
        raise Absent(f"optax has no {work.optimizer} that computes the same")
    if work.groups > 1:
        raise Absent("optax has one learning rate for all parameters")
    values = work.values()
    transform = OPTAX[work.optimizer](optax, values)
    values.check_used("optax")
    jax.config.update("jax_enable_x64", work.dtype == "float64")
    params = [jax.numpy.array(p) for p in work.start()]
    grads = [jax.numpy.array(g) for g in work.grads]
    state = transform.init(params)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal params, state
        params, state = jitted(params, state, grads)
        jax.block_until_ready(params)

    return Contestant(step, lambda: [np.array(p) for p in params])


DEEPSPEED: dict[str, tuple[str, str, Callable[[Values], dict[str, Any]]]] = {
    "Adam": ("adam", "DeepSpeedCPUAdam", lambda h: {**h.some_of(ADAM[:3]), "adamw_mode": False}),
    "AdamW": ("adam", "DeepSpeedCPUAdam", lambda h: {**h.some_of(ADAM[:3]), "adamw_mode": True}),
    "Lion": ("lion", "DeepSpeedCPULion", lambda h: h.some_of(("betas", "weight_decay"))),
}
"""The modules and classes of deepspeed.ops, without its Adagrad, which computes something else (0.19.8)."""


def _deepspeed(work: Work) -> Contestant:
    if work.optimizer not in DEEPSPEED:
        raise Absent(f"DeepSpeed has no {work.optimizer} for the CPU that computes the same")
    if work.dtype != "float32":
        raise Absent("DeepSpeed computes in float32 only")
    module, name, translate = DEEPSPEED[work.optimizer]
    kind = getattr(import_module(f"deepspeed.ops.{module}"), name)
    values = work.values()
    options = translate(values)
    _ = values.lr
    values.check_used("DeepSpeed")
    _torch_module, params, groups = _torch_params(work)
    try:
        optimizer = kind(groups, lr=work.lr(len(params)), **options)  # the first call compiles the kernel
    except Exception as error:  # a missing compiler, or any other failure to build C++
        raise Absent(f"DeepSpeed could not build its kernel: {' '.join(str(error).split())[:200]}") from None
    return Contestant(optimizer.step, lambda: [param.detach().numpy().copy() for param in params])


THINC = ("SGD", "Adam")
SKLEARN = ("SGD", "Momentum", "Nesterov", "Adam")
NEGLIGIBLE = 1e-7


def _check_eps(h: Values, whose: str) -> None:
    """Raise Absent unless eps is negligible: the rival adds eps to the uncorrected root."""
    if h.eps > NEGLIGIBLE:
        raise Absent(f"{whose} adds eps to the uncorrected root, which makes a difference with eps={h.eps:g}")


def _thinc(work: Work) -> Contestant:
    api = import_module("thinc.api")
    if work.optimizer not in THINC:
        raise Absent(f"thinc has no {work.optimizer} that computes the same")
    if work.dtype != "float32":
        raise Absent("thinc computes in float32 only")
    if work.groups > 1:
        raise Absent("thinc has one learning rate for all parameters")
    h = work.values()
    plain = {"L2": 0.0, "grad_clip": 0.0, "use_averages": False}
    if work.optimizer == "Adam":
        _check_eps(h, "thinc")
        optimizer = api.Adam(h.lr, beta1=h.betas[0], beta2=h.betas[1], eps=h.eps, **plain)
    else:
        optimizer = api.SGD(h.lr, **plain)
    h.check_used("thinc")
    params = [p.reshape(-1) for p in work.start()]
    grads = [g.reshape(-1).copy() for g in work.grads]

    def step() -> None:
        for k, (p, g) in enumerate(zip(params, grads, strict=True)):
            optimizer((k, ""), p, g)

    def write() -> None:  # thinc zeroes the gradients
        for g, grad in zip(grads, work.grads, strict=True):
            g[...] = grad.reshape(-1)

    return Contestant(
        step, lambda: [p.reshape(shape).copy() for p, shape in zip(params, work.shapes, strict=True)], write
    )


def _sklearn(work: Work) -> Contestant:
    module = import_module("sklearn.neural_network._stochastic_optimizers")
    if work.optimizer not in SKLEARN:
        raise Absent(f"scikit-learn has no {work.optimizer} that computes the same")
    if work.groups > 1:
        raise Absent("scikit-learn has one learning rate for all parameters")
    params = work.start()
    h = work.values()
    if work.optimizer == "Adam":
        _check_eps(h, "scikit-learn")
        b1, b2 = h.betas
        optimizer = module.AdamOptimizer(params, h.lr, beta_1=b1, beta_2=b2, epsilon=h.eps)
    else:
        if work.optimizer != "SGD":
            (_sgd if work.optimizer == "Momentum" else _nesterov)(h)
        nesterov = work.optimizer == "Nesterov" or (work.optimizer == "SGD" and bool(h.nesterov))
        optimizer = module.SGDOptimizer(params, h.lr, momentum=h.momentum, nesterov=nesterov)
    h.check_used("scikit-learn")
    return Contestant(lambda: optimizer.update_params(params, work.grads), lambda: [p.copy() for p in params])


class Rival(NamedTuple):
    """An entry of `RIVALS`."""

    package: str
    """The package on PyPI."""
    imports: str
    """The module whose import shows that the package is installed."""
    enter: Callable[[Work], Contestant]
    """Return the contestant, or raise Absent."""
    optimizers: Collection[str] | None = None
    """The optimizers that the rival has, by fastopt's names; None means all."""

    def makes(self, optimizer: str) -> bool:
        """Return whether the rival has an optimizer; `enter` may still raise Absent for an option or a dtype.

        >>> RIVALS["torch"].makes("Adam"), RIVALS["torch"].makes("Lion")
        (True, False)
        """
        return self.optimizers is None or optimizer in self.optimizers


_FUSED_BY_TORCH = [name for name, (theirs, _) in TORCH.items() if theirs in FUSED]

RIVALS: dict[str, Rival] = {
    "numpy": Rival("numpy", "numpy", _numpy),
    "torch fused": Rival("torch", "torch", lambda work: _torch(work, fused=True), _FUSED_BY_TORCH),
    "torch": Rival("torch", "torch", _torch, TORCH),
    "optax": Rival("optax", "optax", _optax, OPTAX),
    "deepspeed": Rival("deepspeed", "deepspeed", _deepspeed, DEEPSPEED),
    "thinc": Rival("thinc", "thinc", _thinc, THINC),
    "scikit-learn": Rival("scikit-learn", "sklearn", _sklearn, SKLEARN),
}
"""All rivals, in the order of the tables' columns."""


def enter(work: Work, names: Iterable[str] = tuple(RIVALS)) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return the rivals that take part in a step, and the reasons of the others.

    Args:
        work: the step.
        names: names in `RIVALS`, all by default; KeyError for another name.

    Returns:
        A tuple of two dicts by name: contestants, each with ``step()``, ``params()`` (copies, in the order of the
        shapes) and ``before`` (None, or a function to call before a step); and reasons. A package that is not
        installed is a reason.

    >>> work = Work("Lion", ((1000,),))
    >>> contestants, absent = enter(work, ["numpy", "scikit-learn"])
    >>> list(contestants), absent
    (['numpy'], {'scikit-learn': 'scikit-learn has no Lion that computes the same'})
    """
    contestants: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    for name in names:
        rival = RIVALS[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # import warnings of other packages do not concern our users
                import_module(rival.imports)
                contestants[name] = rival.enter(work)
        except Absent as reason:
            absent[name] = str(reason)
        except ImportError as error:
            missing = (error.name or rival.imports).partition(".")[0]
            absent[name] = f"{rival.package if missing == rival.imports else missing} is not installed"
    return contestants, absent
