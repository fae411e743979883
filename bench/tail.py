"""torch's sequence of calls for a step with all options, on any device: the rival of bench_tail.py and gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

SCALE, MAX_NORM, EMA, LR, DECAY = 1024.0, 1.0, 0.999, 1e-3, 0.01


def torch_sequence(torch: Any, grads: Sequence[Any]) -> tuple[Callable[[], None], Callable[[], None], list[Any]]:
    """Return the step (unscale, clip, AdamW, moving average, zero), a function to write gradients, the parameters."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones_like(grad)) for grad in grads])
    params = list(model.parameters())
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA))

    def write() -> None:
        torch._foreach_copy_([param.grad for param in params], list(grads))

    def step() -> None:
        torch._foreach_mul_([param.grad for param in params], 1.0 / SCALE)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        average.update_parameters(model)
        optimizer.zero_grad(set_to_none=False)

    return step, write, [param.detach() for param in params]
