"""The named optimizers: each joins one of ours to the torch class of the same name, where torch has one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import fastopt
from fastopt.interop.torch import FORMS
from fastopt.rule import Rule
from fastopt.torch.optimizer import Optimizer
from fastopt.torch.signatures import EPS_PAIR


def _as(rule: str) -> dict[str, str]:
    """Torch's names of the states of a rule."""
    return dict(FORMS[rule].states)


class SGD(Optimizer, ours=fastopt.SGD, theirs=torch.optim.SGD, names=_as("sgd_momentum"), counts=False):
    """`torch.optim.SGD`, by the rule of `fastopt.SGD`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.SGD`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Robbins & Monro 1951, https://doi.org/10.1214/aoms/1177729586

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.SGD([w], lr=0.5)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.5000, 0.5000])
    """

    sparse = True


class Adagrad(Optimizer, ours=fastopt.Adagrad, theirs=torch.optim.Adagrad, names=_as("adagrad")):
    """`torch.optim.Adagrad`, by the rule of `fastopt.Adagrad`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.Adagrad`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Adagrad([w], lr=0.5)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.5000, 0.5000])
    """

    sparse = True

    def _start(self, group: dict[str, Any]) -> None:
        """As in torch, states are there from the beginning."""
        for p in group["params"]:
            if not torch.nn.parameter.is_lazy(p):
                start = torch.full_like(p.detach(), group["initial_accumulator_value"])
                self.state[p].update(step=torch.tensor(0.0), sum=start)


class Adadelta(Optimizer, ours=fastopt.Adadelta, theirs=torch.optim.Adadelta, names=_as("adadelta")):
    """`torch.optim.Adadelta`, by the rule of `fastopt.Adadelta`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.Adadelta`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Zeiler 2012, https://arxiv.org/abs/1212.5701

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Adadelta([w], lr=1.0)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9968, 0.9968])
    """


class RMSprop(Optimizer, ours=fastopt.RMSprop, theirs=torch.optim.RMSprop, names=_as("rmsprop_centered_momentum")):
    """`torch.optim.RMSprop`, by the rule of `fastopt.RMSprop`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.RMSprop`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Tieleman & Hinton 2012, lecture 6e; centered: Graves 2013, https://arxiv.org/abs/1308.0850

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.RMSprop([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([5.9605e-08, 5.9605e-08])
    """


class Adam(Optimizer, ours=fastopt.Adam, theirs=torch.optim.Adam, names=_as("amsgrad")):
    """`torch.optim.Adam`, by the rule of `fastopt.Adam`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.Adam`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Adam([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class AdamW(Optimizer, ours=fastopt.AdamW, theirs=torch.optim.AdamW, names=_as("adamw_amsgrad")):
    """`torch.optim.AdamW`, by the rule of `fastopt.AdamW`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.AdamW`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101

    >>> import torch, fastopt.torch
    >>> model = torch.nn.Linear(2, 1)
    >>> opt = fastopt.torch.AdamW(model.parameters(), lr=0.1, max_norm=1.0, ema=0.99)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> opt.step()
    >>> sorted(opt.state[model.bias])
    ['ema', 'exp_avg', 'exp_avg_sq', 'step']
    """


class Adafactor(
    Optimizer,
    ours=fastopt.Adafactor,
    theirs=torch.optim.Adafactor,
    renamed={"d": "clip_threshold", "eps": EPS_PAIR},
):
    """`torch.optim.Adafactor`, by the rule of `fastopt.Adafactor`, for parameters of up to two axes.

    ``state[p]`` has torch's ``row_var`` and ``col_var`` for a matrix, ``variance`` for others, in float64.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.Adafactor`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`; a parameter has more than two axes. Torch's class factors the last two of
            them, our rule the first and the others: ``from_rule(fastopt.rules.adafactor)`` takes such parameters.

    Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, 3, requires_grad=True)
    >>> opt = fastopt.torch.Adafactor([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data[0], opt.state[w]["row_var"].shape, opt.state[w]["col_var"].shape
    (tensor([0.9000, 0.9000, 0.9000]), torch.Size([2, 1]), torch.Size([1, 3]))
    """

    def _arguments(self, group: Mapping[str, Any]) -> dict[str, Any]:
        found = super()._arguments(group)
        eps, min_rms = found.pop(EPS_PAIR)
        if eps is None:
            dtype = next((p.dtype for p in group["params"]), torch.float32)
            eps = torch.finfo(dtype).eps
        return {**found, "eps": eps, "min_rms": min_rms}

    @classmethod
    def _numbered(cls, name: str, shape: torch.Size, number: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        if len(shape) == 2:
            return name, number.unsqueeze(1 if name == "row_var" else 0)
        return ("variance", number.view(shape)) if name == "col_var" else None

    def _check_param(self, name: str, p: torch.Tensor) -> None:
        super()._check_param(name, p)
        if not torch.nn.parameter.is_lazy(p) and p.ndim > 2:
            raise ValueError(
                f"{name}: must have at most two axes, of which torch's states are, got shape {tuple(p.shape)}; use "
                f"from_rule(fastopt.rules.adafactor)"
            )


class NAdam(Optimizer, ours=fastopt.NAdam, theirs=torch.optim.NAdam, names=_as("nadam")):
    """`torch.optim.NAdam`, by the rule of `fastopt.NAdam`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.NAdam`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.NAdam([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.8944, 0.8944])
    """


class RAdam(Optimizer, ours=fastopt.RAdam, theirs=torch.optim.RAdam, names=_as("radam")):
    """`torch.optim.RAdam`, by the rule of `fastopt.RAdam`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.RAdam`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Liu et al. 2020, https://arxiv.org/abs/1908.03265

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.RAdam([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class Adamax(Optimizer, ours=fastopt.Adamax, theirs=torch.optim.Adamax, names=_as("adamax")):
    """`torch.optim.Adamax`, by the rule of `fastopt.Adamax`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.Adamax`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, section 7.1

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Adamax([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class Rprop(
    Optimizer,
    ours=fastopt.Rprop,
    theirs=torch.optim.Rprop,
    names={"prev_grad": "prev", "step_size": "step_size"},
):
    """`torch.optim.Rprop`, by the rule of `fastopt.Rprop`.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.Rprop`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Rprop([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class ASGD(Optimizer, ours=fastopt.ASGD, theirs=torch.optim.ASGD, names={}):
    """`torch.optim.ASGD`, by the rule of `fastopt.ASGD`.

    A new lr counts in the next step, in torch in the one after it. The states ``eta`` and ``mu`` follow from the step.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.ASGD`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.ASGD([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> opt.state[w]["ax"]
    tensor([0.9000, 0.9000])
    """


class Muon(
    Optimizer,
    ours=fastopt.Muon,
    theirs=getattr(torch.optim, "Muon", None),
    names={"m": "momentum_buffer"},
    renamed={"adjust_lr_fn": "adjust_lr"},
):
    """Muon for matrices, by the rule of `fastopt.Muon`, with the arguments of `torch.optim.Muon` (where torch has it).

    torch makes matrices orthogonal in bfloat16, this in the parameters' own precision: results differ by 1e-2 of a
    step. Parameters that are not 2-D, which torch refuses, are updated by AdamW with lr 3e-4.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `torch.optim.Muon`, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Muon([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9997, 0.9997])
    """


class Momentum(Optimizer, ours=fastopt.Momentum):
    """`fastopt.Momentum` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.Momentum` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Momentum([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class Nesterov(Optimizer, ours=fastopt.Nesterov):
    """`fastopt.Nesterov` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.Nesterov` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Sutskever et al. 2013, http://proceedings.mlr.press/v28/sutskever13.html

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Nesterov([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.8100, 0.8100])
    """

    @contextmanager
    def lookahead(self) -> Iterator[None]:
        """Hold the parameters at the look-ahead point inside a ``with`` block, in which the loss is computed.

        Raises:
            TypeError: the form is ``"reformulated"``, which needs no look-ahead.
            RuntimeError: inside another such block.
            ValueError: as `step`.

        >>> import torch, fastopt.torch
        >>> w = torch.ones(1, requires_grad=True)
        >>> opt = fastopt.torch.Nesterov([w], lr=0.5, momentum=0.5, form="lookahead")
        >>> w.sum().backward()
        >>> opt.step()
        >>> with opt.lookahead():
        ...     print(w.data)
        tensor([0.2500])
        """
        with self._held("lookahead"):
            yield


class Lion(Optimizer, ours=fastopt.Lion):
    """`fastopt.Lion` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.Lion` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Chen et al. 2023, https://arxiv.org/abs/2302.06675

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Lion([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class AdaBelief(Optimizer, ours=fastopt.AdaBelief):
    """`fastopt.AdaBelief` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.AdaBelief` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Zhuang et al. 2020, https://arxiv.org/abs/2010.07468

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.AdaBelief([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.8889, 0.8889])
    """


class Adan(Optimizer, ours=fastopt.Adan):
    """`fastopt.Adan` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.Adan` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Xie et al. 2022, https://arxiv.org/abs/2208.06677

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Adan([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class AdEMAMix(Optimizer, ours=fastopt.AdEMAMix):
    """`fastopt.AdEMAMix` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.AdEMAMix` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.AdEMAMix([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class LAMB(Optimizer, ours=fastopt.LAMB):
    """`fastopt.LAMB` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.LAMB` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: You et al. 2020, https://arxiv.org/abs/1904.00962v3

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.LAMB([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class LARS(Optimizer, ours=fastopt.LARS):
    """`fastopt.LARS` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.LARS` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: You et al. 2017, https://arxiv.org/abs/1708.03888

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.LARS([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9999, 0.9999])
    """


class NovoGrad(Optimizer, ours=fastopt.NovoGrad):
    """`fastopt.NovoGrad` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.NovoGrad` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Ginsburg et al. 2019, https://arxiv.org/abs/1905.11286

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.NovoGrad([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9293, 0.9293])
    """


class Shampoo(Optimizer, ours=fastopt.Shampoo):
    """`fastopt.Shampoo` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.Shampoo` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Gupta et al. 2018, https://arxiv.org/abs/1802.09568

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, 2, requires_grad=True)
    >>> opt = fastopt.torch.Shampoo([w], lr=0.1)
    >>> w.trace().backward()
    >>> opt.step()
    >>> w.data
    tensor([[0.9000, 1.0000],
            [1.0000, 0.9000]])
    """


class SOAP(Optimizer, ours=fastopt.SOAP):
    """`fastopt.SOAP` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.SOAP` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Vyas et al. 2024, https://arxiv.org/abs/2409.11321

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, 2, requires_grad=True)
    >>> opt = fastopt.torch.SOAP([w], lr=0.1, weight_decay=0.0)
    >>> for _ in range(2):
    ...     w.grad = torch.eye(2)
    ...     opt.step()
    >>> w.data
    tensor([[0.9000, 1.0000],
            [1.0000, 0.9000]])
    """


class StableAdamW(Optimizer, ours=fastopt.StableAdamW):
    """`fastopt.StableAdamW` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.StableAdamW` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Wortsman et al. 2023, https://arxiv.org/abs/2304.13013

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.StableAdamW([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.8990, 0.8990])
    """


class ADOPT(Optimizer, ours=fastopt.ADOPT):
    """`fastopt.ADOPT` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.ADOPT` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.ADOPT([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([1., 1.])
    """


class AdaBound(Optimizer, ours=fastopt.AdaBound):
    """`fastopt.AdaBound` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.AdaBound` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Luo et al. 2019, https://openreview.net/forum?id=Bkg3g2R9FX

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.AdaBound([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class FTRL(Optimizer, ours=fastopt.FTRL):
    """`fastopt.FTRL` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.FTRL` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: McMahan et al. 2013, https://doi.org/10.1145/2487575.2488200

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.FTRL([w], lr=0.5)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.7500, 0.7500])
    """


class Prodigy(Optimizer, ours=fastopt.Prodigy):
    """`fastopt.Prodigy` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.Prodigy` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Mishchenko & Defazio 2024, https://arxiv.org/abs/2306.06101

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Prodigy([w], d0=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.6838, 0.6838])
    """


class MARS(Optimizer, ours=fastopt.MARS):
    """`fastopt.MARS` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.MARS` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Yuan et al. 2024, https://arxiv.org/abs/2411.10438

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.MARS([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class AdamMini(Optimizer, ours=fastopt.AdamMini):
    """`fastopt.AdamMini` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.AdamMini` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2406.16793

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.AdamMini([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """


class Yogi(Optimizer, ours=fastopt.Yogi):
    """`fastopt.Yogi` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.Yogi` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Zaheer et al. 2018, https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.Yogi([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9001, 0.9001])
    """


class ScheduleFreeAdamW(Optimizer, ours=fastopt.ScheduleFreeAdamW):
    """`fastopt.ScheduleFreeAdamW` for torch.

    Args:
        params: an iterable of tensors, of named tensors, or of param groups.
        *args, **kwargs: those of `fastopt.ScheduleFreeAdamW` after params, and those of `Optimizer`.

    Raises:
        TypeError, ValueError: as `Optimizer`.

    Source: Defazio et al. 2024, https://arxiv.org/abs/2405.15682

    >>> import torch, fastopt.torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.ScheduleFreeAdamW([w], lr=0.1)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.9000, 0.9000])
    """

    @contextmanager
    def eval_params(self) -> Iterator[None]:
        """Hold the parameters at their average inside a ``with`` block, to evaluate and to save the model.

        Raises:
            RuntimeError: inside another such block.
            TypeError, ValueError: as `step`.

        >>> import torch, fastopt.torch
        >>> w = torch.zeros(1, requires_grad=True)
        >>> opt = fastopt.torch.ScheduleFreeAdamW([w], lr=0.1, betas=(0.5, 0.0))
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([5.0])
        ...     opt.step()
        >>> with opt.eval_params():
        ...     print(w.data)
        tensor([-0.1500])
        """
        with self._held("eval_params"):
            yield


def from_rule(rule: Rule) -> type[Optimizer]:
    """Make a torch optimizer of a rule.

    Args:
        rule: a `fastopt.Rule`, made by `fastopt.rule`.

    Returns:
        A class. Its arguments are the parameters, the hyperparameters of the rule, ``weight_decay`` and those of
        `fastopt.torch.Optimizer`. Its states have the rule's names, but for ``exp_avg`` (m), ``exp_avg_sq`` (v) and
        ``momentum_buffer`` (velocity).

    Raises:
        TypeError: `rule` is not a `Rule`.

    >>> import math, torch, fastopt.torch
    >>> from typing import NamedTuple
    >>> class Hyper(NamedTuple):
    ...     lr: float
    >>> @fastopt.rule(lambda t, lr=0.1: Hyper(lr))
    ... def sign_descent(p, g, h):
    ...     return p - math.copysign(h.lr, g)
    >>> w = torch.ones(2, requires_grad=True)
    >>> opt = fastopt.torch.from_rule(sign_descent)([w], lr=0.25)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.data
    tensor([0.7500, 0.7500])
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: must be a Rule, made by @fastopt.rule(prepare), got {type(rule).__name__}")
    known = _made.get(rule)
    if known is not None:
        return known

    def ours(params: Any, **options: Any) -> fastopt.Optimizer:
        return fastopt.Optimizer(params, rule, **options)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults = {"weight_decay": 0.0, **rule.defaults}
    arguments = [
        inspect.Parameter(name, kind, default=defaults.get(name, inspect.Parameter.empty))
        for name in sorted(rule.names(), key=lambda name: name in defaults)
    ]
    options = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
    ours.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("params", kind), *arguments, options]
    )

    def reduced(self: Optimizer) -> tuple[Any, ...]:
        return _unpickled, (rule,), self.__getstate__()

    namespace = {"__doc__": rule.__doc__, "__module__": rule.__module__, "__reduce__": reduced}
    found: type[Optimizer] = type(rule.name, (Optimizer,), namespace, ours=ours)
    _made[rule] = found
    return found


_made: dict[Rule, type[Optimizer]] = {}


def _unpickled(rule: Rule) -> Optimizer:
    kind = from_rule(rule)
    return kind.__new__(kind)
