"""What an unknown name was probably meant to be: words of other libraries, and near misses."""

from __future__ import annotations

from collections.abc import Collection, Mapping

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "eta", "eta0", "step_size", "alpha", "init_lr", "rate"), ("lr",)),
    **dict.fromkeys(("beta1", "beta_1", "b1", "beta2", "beta_2", "b2", "beta3", "beta_3", "b3"), ("betas",)),
    **dict.fromkeys(("beta", "gamma", "mu", "nu"), ("momentum", "betas", "rho", "alpha")),
    **dict.fromkeys(("decay_rate", "rho", "discounting_factor"), ("rho", "alpha")),
    **dict.fromkeys(("epsilon", "eps1"), ("eps",)),
    **dict.fromkeys(("decay", "wd", "l2", "lambda_", "lamb", "weight_decay_rate", "reg"), ("weight_decay",)),
    "clipnorm": ("clip_norm_per_tensor",),
    **dict.fromkeys(
        ("global_clipnorm", "clip_norm", "max_grad_norm", "clip_grad_norm", "grad_clip", "clip"), ("max_norm",)
    ),
    **dict.fromkeys(("clipvalue", "clip_grad_value"), ("clip_value",)),
    **dict.fromkeys(("use_ema", "ema_momentum", "ema_decay"), ("ema",)),
    **dict.fromkeys(("parameters", "weights", "model", "var_list"), ("params",)),
    **dict.fromkeys(("param_groups", "mask", "multipliers"), ("overrides",)),
    "acc_dtype": ("states",),
    "device": ("backend",),
    "ascent": ("maximize",),
    "decoupled": ("decoupled_weight_decay",),
}
"""For arguments of torch, Keras, optax and textbooks: ours that mean the same, the first that exists."""

ATTRIBUTES: Mapping[str, str] = {
    **dict.fromkeys(("apply_gradients", "apply", "apply_grads", "apply_updates", "optimize"), "opt.step(grads)"),
    **dict.fromkeys(("update_params", "update_weights", "update_parameters"), "opt.step(grads)"),
    "minimize": "opt.step(grads), with gradients that you compute",
    **dict.fromkeys(("zero_grad_", "zero_grads", "zero_gradients", "clear_grad", "cleargrads"), "opt.zero_grad()"),
    **dict.fromkeys(("parameters", "weights", "trainable_variables", "model"), "opt.params"),
    **dict.fromkeys(("grad", "gradients", "gradient"), "opt.grads"),
    **dict.fromkeys(("param_groups", "parameter_groups"), "opt.groups"),
    "add_param_group": "opt.add(params)",
    **dict.fromkeys(("defaults", "hyperparameters", "hyperparams", "get_config"), "opt.hyper"),
    **dict.fromkeys(("learning_rate", "alpha", "get_lr", "get_last_lr", "eta"), "opt.lr"),
    **dict.fromkeys(("set_lr", "set_learning_rate"), "opt.lr = value"),
    **dict.fromkeys(("iterations", "iteration", "iter", "t", "steps", "count"), "opt.step_count"),
    **dict.fromkeys(("variables", "slots", "opt_state", "get_slot", "m", "v", "cache", "velocity"), "opt.states"),
    **dict.fromkeys(("init", "build"), "the constructor, which makes the states; or opt.update(params, grads)"),
    "reset": "opt.restart()",
    **dict.fromkeys(("save_state", "save_own_variables", "get_weights", "dump"), "opt.save(path), or opt.state_dict()"),
    **dict.fromkeys(
        ("load_state", "load_own_variables", "set_weights", "from_config"), "opt.load(path), or opt.load_state_dict()"
    ),
    "clip_grad_norm_": "max_norm= at construction",
    "clip_grad_value_": "clip_value= at construction",
    **dict.fromkeys(("ema_params", "average", "averaged_params"), "opt.ema, with ema= at construction"),
    **dict.fromkeys(("train", "eval", "fit", "backward"), "opt.step(grads), in a loop of your own"),
}
"""For attributes of torch, Keras, optax and textbooks: what does the same here."""


def argument(name: str, allowed: Collection[str]) -> str | None:
    """Return the allowed argument that an unknown one probably means; None where there is none.

    >>> argument("learning_rate", ["lr", "eps"]), argument("wieght_decay", ["lr", "weight_decay"])
    ('lr', 'weight_decay')
    """
    known = [each for each in ARGUMENTS.get(name.lower(), ()) if each in allowed]
    near = [each for each in allowed if each.lower() == name.lower()]
    return next(iter([*known, *near, *_nearest(name, allowed, 1)]), None)


def attribute(name: str, allowed: Collection[str]) -> str | None:
    """Return the code that does what an unknown attribute of an optimizer probably means; None where there is none.

    >>> attribute("apply_gradients", []), attribute("step_cuont", ["step", "step_count"])
    ('opt.step(grads)', 'opt.step_count')
    """
    if name in ATTRIBUTES:
        return ATTRIBUTES[name]
    near = argument(name, allowed)
    return f"opt.{near}" if near else None


def near_misses(name: str, allowed: Collection[str]) -> str:
    """Return the end of an error about an unknown name: the nearest ones, or nothing.

    >>> near_misses("digts", ["digits", "breast-cancer"])
    "; did you mean 'digits'?"
    """
    near = _nearest(name, allowed, 3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _nearest(name: str, allowed: Collection[str], most: int) -> list[str]:
    from difflib import get_close_matches  # 1.5 ms, for those who have misspelt something

    return get_close_matches(name, allowed, n=most)
