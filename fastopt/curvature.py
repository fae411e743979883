"""The largest eigenvalue of a loss's Hessian, computed from gradients: the curvature that bounds the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastopt import scalars
from fastopt.init import generator
from fastopt.kernels import get_backend
from fastopt.kernels.contract import norm_of_array
from fastopt.storage.flat import FlatParams, pack

__all__ = ["dominant_eigenvalue"]

STEPS = {
    np.dtype(np.float32): float(np.finfo(np.float32).eps) ** (1 / 3),
    np.dtype(np.float64): float(np.finfo(np.float64).eps) ** (2 / 3),
}
"""Length of a difference step, relative to the norm of the parameters.

In float32 the cube root balances the rounding error and the difference error; its steps cross many ReLU kinks, which
count as their average curvature. In float64 a step of 4e-11 crosses hardly any kink and leaves 5 digits; a longer step
crosses a few, and one kink in a short step looks like a huge curvature."""

LONGEST = 0.05
"""The longest step, on the same scale: where gradients are large, their rounding hides what a shorter step changes."""

ROUNDED, ROUNDING, REFUSED = 1e-3, 1e-5, 1e-2
"""The rounding of gradients, relative to their change: above the first, the step is made longer, so that it is about
the second; above the third the result would be rounding."""

FLAT = 1e-3
"""An eigenvalue that is 0 where one above this would be seen."""


def dominant_eigenvalue(
    grad: Callable[[Any], Any],
    params: Any,
    iterations: int = 20,
    rng: int | np.random.Generator | None = None,
) -> float:
    """Return the Hessian's eigenvalue of largest magnitude at `params`, by power iteration on gradient differences.

    Formula: ``d = 2 h v``; ``y = grad(w + h v) - grad(w - h v)``, which is about ``H d``; ``lambda = d.y / d.d``;
    ``v = y / |y|``, and again; with ``h = s max(1, |w|)``, where `s` is 5e-3 in float32 and 4e-11 in float64. Where the
    rounding of large gradients would be more than a thousandth of `y`, `s` becomes larger, up to 0.05.

    The result is the last Rayleigh quotient ``lambda``, in units of the loss over those of the parameters squared. No
    Hessian is stored: an iteration costs two gradients and needs a few vectors of the size of the buffer, and sums and
    differences are computed in float64. If the loss has kinks, as with ReLU, the float32 result is the average
    curvature over the difference step, including the kinks; pass float64 parameters
    (`pack(params, dtype=np.float64)`) for the Hessian at the point itself.

    Use: full-batch gradient descent converges to a minimum whose largest Hessian eigenvalue is ``lambda`` only if
    ``lr < 2 / lambda``; ``1 / lambda`` is the usual choice.

    Args:
        grad: function from the parameters to their gradients: its argument is a tree with the structure of `params`,
            its result a tree like it, of arrays of the same shapes and dtype (None for a missing gradient). It is
            called `2 * iterations` times, and twice more for each longer step; it must be the gradient of one function:
            use the same rows in every call.
        params: the point of the Hessian: a tree of float32 or float64 arrays, as for `fastopt.pack`, of which `grad`
            receives copies; or a `FlatParams`, such as `opt.flat`. Then `grad` receives `flat.params` itself, changed
            in place, so that layers that hold views of the buffer see the change. Afterwards, even after an error, the
            parameters have their original bits. Values that `grad` writes into `flat.grads` stay there.
        iterations: int >= 1. The error falls as ``|lambda2 / lambda1|**(2 iterations)``: 20 suffice for 1 %
            if the second largest magnitude is 9/10 of the largest. The result never exceeds the largest magnitude
            (except for the difference error).
        rng: source of the start vector: None (fresh entropy), an int seed >= 0, or a numpy.random.Generator, which is
            advanced.

    Returns:
        The eigenvalue; negative if the loss curves downwards most, 0.0 if the gradient does not change (where an
        eigenvalue of 0.001 would change it). If one
        eigenvalue and its negative both have the largest magnitude, the iteration does not converge, and the result
        lies between the two.

    Raises:
        ValueError: `iterations` < 1; a parameter or a gradient that is not finite, or a gradient of another structure
            or shape, with its path; parameters without elements; gradients so large that their rounding hides the
            curvature, also with the longest step.
        TypeError: `grad` is not callable, a gradient is not an array or has another dtype, or `pack` refuses `params`.
        RuntimeError: the parameters are on a device, and the CUDA backend cannot work here.

    >>> import numpy as np
    >>> curvatures = np.array([1.0, -2.0, 7.0])
    >>> round(dominant_eigenvalue(lambda p: {"w": curvatures * p["w"]}, {"w": np.ones(3)}, rng=0), 3)
    7.0

    Source: LeCun, Simard & Pearlmutter, "Automatic Learning Rate Maximization by On-Line Estimation of the Hessian's
    Eigenvectors" (NIPS 1992, https://papers.nips.cc/paper/1992/hash/30bb3825e8f631cc6075c0f87bb4978c-Abstract.html);
    the product by differences and an exact alternative: Pearlmutter, "Fast Exact Multiplication by the Hessian" (Neural
    Computation 6, 1994, https://doi.org/10.1162/neco.1994.6.1.147).
    """
    if not callable(grad):
        raise TypeError(f"grad: must be a function of the parameters, got {type(grad).__name__}")
    iterations = scalars.count("iterations", iterations, 1)
    source = generator(rng)
    flat = params if isinstance(params, FlatParams) else pack(params)
    if not sum(flat.layout.sizes):
        raise ValueError("params: must have at least one element, got none")
    backend = get_backend(flat.backend)
    kept = np.zeros(flat.size, flat.dtype)
    for part, array in zip(flat.views(kept), flat.arrays, strict=True):
        part[...] = backend.host(array)
    centre = kept.astype(np.float64)
    _check_finite(flat, centre, "parameter", "")
    scale = max(1.0, norm_of_array(centre))
    step, longest = STEPS[flat.dtype] * scale, LONGEST * scale
    epsilon = float(np.finfo(flat.dtype).eps)
    direction = np.zeros_like(centre)
    for part in flat.views(direction):  # leave the padding at 0: it holds no parameters
        part[...] = source.standard_normal(part.shape)
    direction /= norm_of_array(direction)
    eigenvalue = 0.0
    try:
        for k in range(iterations):
            while True:
                before, gradient_before = _look(grad, flat, centre - step * direction, k)
                after, gradient_after = _look(grad, flat, centre + step * direction, k)
                # The exact difference of the two rounded points; in float32 it differs slightly from 2 h v.
                moved = after - before
                change = gradient_after - gradient_before
                length, distance = norm_of_array(change), norm_of_array(moved)
                rounding = epsilon * norm_of_array(gradient_after)
                if rounding <= ROUNDED * length or step == longest:
                    break
                step = min(longest, step * (rounding / (ROUNDING * length) if length > 0.0 else 1000.0))
            if rounding > (REFUSED * length if length > 0.0 else FLAT * distance):
                raise ValueError(
                    f"grad: must be small enough for its rounding not to hide the curvature, got gradients of norm "
                    f"{rounding / epsilon:.3g}, whose change over a step of {distance:.3g} is {length:.3g}; pass the "
                    f"parameters in float64, or a point nearer to a minimum"
                )
            if length == 0.0:
                return 0.0
            eigenvalue = float(moved / distance @ change) / distance
            direction = change / length
    finally:
        _move(flat, kept)
    return eigenvalue


def _move(flat: FlatParams, point: NDArray[Any]) -> None:
    """Write a point, a buffer with the layout of the parameters, into the parameters."""
    backend = get_backend(flat.backend)
    if not flat.in_place:
        backend.copy(flat.data, point)
        return
    for array, part in zip(flat.arrays, flat.views(point), strict=True):
        backend.copy(array, part)


def _look(
    grad: Callable[[Any], Any], flat: FlatParams, point: NDArray[np.float64], iteration: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the point, rounded to the buffer's dtype, and the gradient there, both in float64."""
    backend = get_backend(flat.backend)
    rounded = point.astype(flat.dtype)
    _move(flat, rounded)
    gradient = np.zeros_like(point)
    leaves = flat.check_grads(grad(flat.params))
    for part, leaf in zip(flat.views(gradient), leaves, strict=True):
        if leaf is not None:
            part[...] = backend.host(leaf)
    _check_finite(flat, gradient, "gradient", f" near the given point, in iteration {iteration + 1}")
    return rounded.astype(np.float64), gradient


def _check_finite(flat: FlatParams, buffer: NDArray[np.float64], what: str, when: str) -> None:
    for path, part in zip(flat.paths, flat.views(buffer), strict=True):
        if not np.isfinite(part).all():
            raise ValueError(f"{what} {path!r}: must be finite{when}, got NaN or infinity")
