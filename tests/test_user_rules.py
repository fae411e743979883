"""Twenty known optimizers as a user would write them: each in 20 lines at most, with public names only.

A rule is a scalar function ``(p, g, *states, h)``, and `h` is what its ``prepare(t, ...)`` returned for this step.
There are rules of every kind: with sums over tensors, rows, columns or all parameters (`Sums`), with linear algebra
(`Matrixwise`), with a further input of the step, and around another rule (`wrap`). The tests at the end compare each of
them with the optimizer of that name in the library, or with the formula in NumPy that stands beside it, and resume and
copy them all.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt
from fastopt import Matrixwise, Sums

# --- AdaBelief --------------------------------------------------------------------------------------------------------
# Adam that divides by how far gradients are from their mean (Zhuang et al. 2020, https://arxiv.org/abs/2010.07468).

Belief = namedtuple("Belief", "b1 f1 b2 f2 step eps_in eps_out")


def prepare_adabelief(t, lr=1e-3, betas=(0.9, 0.999), eps=1e-16):
    (b1, b2), root = betas, math.sqrt(1 - betas[1] ** t)
    return Belief(b1, 1 - b1, b2, 1 - b2, lr * root / (1 - b1**t), eps, root * eps)


@fastopt.rule(prepare_adabelief)
def adabelief(p, g, m, s, h):
    m = h.b1 * m + h.f1 * g
    s = h.b2 * s + h.f2 * (g - m) ** 2 + h.eps_in
    return p - h.step * m / (math.sqrt(s) + h.eps_out), m, s


# --- AdaBound ---------------------------------------------------------------------------------------------------------
# Adam whose rates have bounds that close in on one rate, that of SGD (Luo et al. 2019,
# https://openreview.net/forum?id=Bkg3g2R9FX).

Bounded = namedtuple("Bounded", "b1 f1 b2 f2 step eps lower upper")


def prepare_adabound(t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, final_lr=0.1, gamma=1e-3):
    (b1, b2), step = betas, lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
    lower, upper = final_lr * (1 - 1 / (gamma * t + 1)), final_lr * (1 + 1 / (gamma * t))
    return Bounded(b1, 1 - b1, b2, 1 - b2, step, eps, lower, upper)


@fastopt.rule(prepare_adabound)
def adabound(p, g, m, v, h):
    m = h.b1 * m + h.f1 * g
    v = h.b2 * v + h.f2 * g * g
    return p - min(max(h.step / (math.sqrt(v) + h.eps), h.lower), h.upper) * m, m, v


# --- Adafactor --------------------------------------------------------------------------------------------------------
# The second moment is a product of averages over rows and over columns, two vectors in place of a matrix; the step is
# relative to the size of the parameter, and bounded (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235). The mean
# of the averages of the rows is that over the tensor.

Factored = namedtuple("Factored", "b2 f2 rate least min_rms row column tensor step")


def prepare_adafactor(t, lr=0.01, min_rms=1e-3):
    return Factored(1 - t**-0.8, t**-0.8, min(lr, t**-0.5), 1e-30, min_rms, 1.0, 1.0, 1.0, 1.0)


def square(p, g, h):
    return g * g


def average(sums, numbers, size, h):
    mean = h.b2 * numbers[0] + h.f2 * sums.square / size
    return mean, mean


def square_of_p(p, g, h):
    return p * p


def second_moment_of(h):
    return max(h.row / h.tensor * h.column, h.least)


def square_of_u(p, g, h):
    return g * g / second_moment_of(h)


def relative(sums, numbers, size, h):
    return h.rate * max(h.min_rms, math.sqrt(sums.p / size)) / max(1.0, math.sqrt(sums.u / size))


means = [Sums({"square": square}, average, (over,), (f"{over}_var",), over) for over in ("row", "column", "tensor")]


@fastopt.rule(prepare_adafactor, sums=(*means, Sums({"p": square_of_p, "u": square_of_u}, relative, ("step",))))
def adafactor(p, g, h):
    return p - h.step * g / math.sqrt(second_moment_of(h))


# --- Adam-mini --------------------------------------------------------------------------------------------------------
# AdamW with one second moment for each tensor (Zhang et al. 2024, https://arxiv.org/abs/2406.16793). The sum is taken
# before the update, so that its result may be the step size.

Mini = namedtuple("Mini", "b1 f1 b2 f2 root eps step")


def prepare_adam_mini(t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
    b1, b2 = betas
    return Mini(b1, 1 - b1, b2, 1 - b2, math.sqrt(1 - b2**t), eps, lr / (1 - b1**t))


def square_of_g(p, g, m, h):
    return g * g


def divided(sums, numbers, size, h):
    v = h.b2 * numbers.v + h.f2 * sums.square / size
    return h.step / (math.sqrt(v) / h.root + h.eps), v


@fastopt.rule(prepare_adam_mini, decoupled=True, sums=Sums({"square": square_of_g}, divided, ("step",), ("v",)))
def adam_mini(p, g, m, h):
    m = h.b1 * m + h.f1 * g
    return p - h.step * m, m


# --- Adan -------------------------------------------------------------------------------------------------------------
# Nesterov's momentum by the difference of gradients (Xie et al. 2022, https://arxiv.org/abs/2208.06677). The last
# gradient is a state as any other.

Adan = namedtuple("Adan", "b1 f1 b2 f2 b3 f3 known m_step v_step eps keep")


def prepare_adan(t, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0):
    (b1, b2, b3), root, keep = betas, math.sqrt(1 - betas[2] ** t), 1 / (1 + lr * weight_decay)
    m_step, v_step = lr * root / (1 - b1**t), lr * root * b2 / (1 - b2**t)
    return Adan(b1, 1 - b1, b2, 1 - b2, b3, 1 - b3, float(t > 1), m_step, v_step, root * eps, keep)


@fastopt.rule(prepare_adan, domains={"betas": fastopt.Interval(0.0, 1.0, open=True, length=3)})
def adan(p, g, m, v, n, last, h):
    d = h.known * (g - last)
    m, v = h.b1 * m + h.f1 * g, h.b2 * v + h.f2 * d
    n = h.b3 * n + h.f3 * (g + h.b2 * d) ** 2
    return h.keep * (p - (h.m_step * m + h.v_step * v) / (math.sqrt(n) + h.eps)), m, v, n, g


# --- ADOPT ------------------------------------------------------------------------------------------------------------
# Adam that divides by the second moment of the step before (Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853).
# The first update only makes that moment: its bound on the step is 0.

Adopt = namedtuple("Adopt", "lr b1 f1 b2 f2 eps most")


def prepare_adopt(t, lr=1e-3, betas=(0.9, 0.9999), eps=1e-6):
    b1, b2 = betas if t > 1 else (betas[0], 0.0)
    return Adopt(lr, b1, 1 - b1, b2, 1 - b2, eps, (t - 1) ** 0.25)


@fastopt.rule(prepare_adopt)
def adopt(p, g, m, v, h):
    u = min(max(g / max(math.sqrt(v), h.eps), -h.most), h.most)
    m = h.b1 * m + h.f1 * u
    return p - h.lr * m, m, h.b2 * v + h.f2 * g * g


# --- ASGD -------------------------------------------------------------------------------------------------------------
# SGD with a mean of its iterates (Polyak & Juditsky 1992, https://doi.org/10.1137/0330046). The mean begins at p.

Averaged = namedtuple("Averaged", "eta shrink old new")


def prepare_asgd(t, lr=0.01, lambd=1e-4, alpha=0.75, t0=1e6):
    eta, new = lr / (1 + lambd * lr * (t - 1)) ** alpha, 1 / max(1, t - 1 - t0)
    return Averaged(eta, 1 - lambd * eta, 1 - new, new)


@fastopt.rule(prepare_asgd, initial={"ax": "p"})
def asgd(p, g, ax, h):
    p = h.shrink * p - h.eta * g
    return p, h.old * ax + h.new * p


# --- Cautious ---------------------------------------------------------------------------------------------------------
# Any rule, where its step goes against the gradient (Liang et al. 2024, https://arxiv.org/abs/2411.16085). What is left
# of the step is scaled up by the share of the tensor that is left, a sum of what the rule proposes.

Agreement = namedtuple("Agreement", "scale")


def prepare_cautious(t):
    return Agreement(1.0)


def agrees(p, new_p, g, h):
    return (p - new_p) * g > 0


def rescale(sums, numbers, size, h):
    return 1.0 / max(sums.agrees / size, 1e-3)


def cautious(p, new_p, g, h):
    return p + h.scale * (new_p - p) if agrees(p, new_p, g, h) else p


share = Sums({"agrees": agrees}, rescale, results=("scale",))
cautious_adamw = fastopt.wrap(fastopt.rules.adamw, after=cautious, prepare=prepare_cautious, sums=share)


# --- FTRL -------------------------------------------------------------------------------------------------------------
# Parameters are at exactly 0 where the sum of gradients is small (McMahan et al. 2013,
# https://doi.org/10.1145/2487575.2488200). z has the units of the step, and begins where p does.

Ftrl = namedtuple("Ftrl", "lr start more l1")


def prepare_ftrl(t, lr=0.1, beta=1.0, l1=0.0, l2=0.0, initial_accumulator_value=0.0):
    start = beta + math.sqrt(initial_accumulator_value) if t == 1 else 0.0
    return Ftrl(lr, start, beta + lr * l2, lr * l1)


@fastopt.rule(prepare_ftrl, initial={"n": "initial_accumulator_value"})
def ftrl(p, g, z, n, h):
    root, new_root = math.sqrt(n), math.sqrt(n + g * g)
    z = z + h.lr * g - (h.start + (new_root - root)) * p
    return (min(max(z, -h.l1), h.l1) - z) / (h.more + new_root), z, n + g * g


# --- Gradient centralization ------------------------------------------------------------------------------------------
# Any rule, of gradients without the mean of their row: of the weights of one output (Yong et al. 2020,
# https://arxiv.org/abs/2004.01461). Vectors keep their gradients: a flag in `for_matrices` is False for them.

Centre = namedtuple("Centre", "centralize mean")


def prepare_centre(t, centralize=True):
    return Centre(float(centralize), 0.0)


def gradient(p, g, h):
    return g


def mean_of_row(sums, numbers, size, h):
    return sums.gradient / size if h.centralize > 0 else 0.0


def centralized(p, g, h):
    return g - h.mean


centre = {"prepare": prepare_centre, "sums": Sums({"gradient": gradient}, mean_of_row, ("mean",), over="row")}
centralized_adamw = fastopt.wrap(fastopt.rules.adamw, before=centralized, for_matrices=("centralize",), **centre)


# --- Lion -------------------------------------------------------------------------------------------------------------
# Steps of one size, with the sign of a mean of gradients (Chen et al. 2023, https://arxiv.org/abs/2302.06675).

Lion = namedtuple("Lion", "lr b1 f1 b2 f2")


def prepare_lion(t, lr=1e-4, betas=(0.9, 0.99)):
    return Lion(lr, betas[0], 1 - betas[0], betas[1], 1 - betas[1])


@fastopt.rule(prepare_lion, decoupled=True)
def lion(p, g, m, h):
    return p - math.copysign(h.lr, h.b1 * m + h.f1 * g), h.b2 * m + h.f2 * g


# --- Lookahead --------------------------------------------------------------------------------------------------------
# Any rule, whose weights are pulled back to slow ones every k steps (Zhang et al. 2019, https://arxiv.org/abs/1907.08610).

Pull = namedtuple("Pull", "pulls pull")


def prepare_lookahead(t, k=5, alpha=0.5):
    return Pull(float(t % k == 0), alpha)


def lookahead(p, new_p, g, slow, h):
    slow = slow + h.pull * (new_p - slow) if h.pulls > 0 else slow
    return slow if h.pulls > 0 else new_p, slow


begins = {"states": ("slow",), "initial": {"slow": "p"}}
lookahead_adamw = fastopt.wrap(fastopt.rules.adamw, after=lookahead, prepare=prepare_lookahead, **begins)


# --- MARS -------------------------------------------------------------------------------------------------------------
# AdamW of gradients whose variance their last change reduces, of norm 1 at most (Yuan et al. 2024,
# https://arxiv.org/abs/2411.10438).

Mars = namedtuple("Mars", "b1 f1 b2 f2 step eps ahead bound")


def prepare_mars(t, lr=3e-3, betas=(0.9, 0.99), eps=1e-8, gamma=0.025):
    (b1, b2), root = betas, math.sqrt(1 - betas[1] ** t)
    ahead = gamma * b1 / (1 - b1) if t > 1 else 0.0
    return Mars(b1, 1 - b1, b2, 1 - b2, lr * root / (1 - b1**t), root * eps, ahead, 1.0)


def square_of_c(p, g, m, v, last, h):
    return (g + h.ahead * (g - last)) ** 2


def bound(sums, numbers, size, h):
    return 1.0 / max(1.0, math.sqrt(sums.square))


@fastopt.rule(prepare_mars, decoupled=True, sums=Sums({"square": square_of_c}, bound, results=("bound",)))
def mars(p, g, m, v, last, h):
    c = h.bound * (g + h.ahead * (g - last))
    m, v = h.b1 * m + h.f1 * c, h.b2 * v + h.f2 * c * c
    return p - h.step * m / (math.sqrt(v) + h.eps), m, v, g


# --- Prodigy ----------------------------------------------------------------------------------------------------------
# Adam that finds its learning rate d: its distance from the start, which sums over all parameters bound from below
# (Mishchenko & Defazio 2024, https://arxiv.org/abs/2306.06101, algorithm 4). d and r persist.

Prodigy = namedtuple("Prodigy", "lr b1 f1 b2 f2 b3 eps d0 d")


def prepare_prodigy(t, lr=1.0, betas=(0.9, 0.999), eps=1e-8, d0=1e-6):
    return Prodigy(lr, betas[0], 1 - betas[0], betas[1], 1 - betas[1], math.sqrt(betas[1]), eps, d0, d0)


def known(sums, numbers, size, h):
    return max(numbers.d, h.d0), max(numbers.d, h.d0)


def towards_start(p, g, m, v, s, p0, h):
    return g * (p0 - p)


def magnitude(p, g, m, v, s, p0, h):
    return abs(h.b3 * s + h.d**2 * h.lr * g)


def estimate(sums, numbers, size, h):
    r = h.b3 * numbers.r + h.d**2 * h.lr * sums.towards
    return max(h.d, r / sums.magnitude), r


before = Sums({}, known, results=("d",), numbers=("d",), over="all")
after = Sums({"towards": towards_start, "magnitude": magnitude}, estimate, numbers=("d", "r"), over="all")


@fastopt.rule(prepare_prodigy, initial={"p0": "p"}, sums=(before, after))
def prodigy(p, g, m, v, s, p0, h):
    m, v = h.b1 * m + h.f1 * (h.d * g), h.b2 * v + h.f2 * (h.d * g) ** 2
    return p - h.d * h.lr * m / (math.sqrt(v) + h.d * h.eps), m, v, h.b3 * s + h.d**2 * h.lr * g, p0


# --- SAM --------------------------------------------------------------------------------------------------------------
# Any rule, with the gradient of a point further up the loss (Foret et al. 2021, https://arxiv.org/abs/2010.01412).
# Where gradients are computed is not up to a rule: `Optimizer.ascent` moves the parameters there, and back.

Ball = namedtuple("Ball", "lr mu")


def prepare_momentum(t, lr=0.01, momentum=0.9):
    return Ball(lr, momentum)


@fastopt.rule(prepare_momentum)
def momentum(p, g, velocity, h):
    velocity = h.mu * velocity + g
    return p - h.lr * velocity, velocity


def sam_step(opt, t):
    with opt.ascent(0.05, gradients_at(opt.params, t)) as there:
        grads = gradients_at(there, t)
    opt.step(grads)


def sam_in_numpy(params, states, t):
    grads = gradients_at(params, t)
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    grads = gradients_at({path: p + 0.05 * grads[path] / norm for path, p in params.items()}, t)
    for path, p in params.items():
        states[path] = 0.9 * states.get(path, 0.0) + grads[path]
        p -= 0.01 * states[path]


# --- Shampoo ----------------------------------------------------------------------------------------------------------
# A matrix is multiplied from both sides by inverse roots of sums of its products (Gupta et al. 2018,
# https://arxiv.org/abs/1802.09568); other parameters have Adagrad, which is its form for one axis. L and R are states.

Shampoo = namedtuple("Shampoo", "lr eps decay matrix")
SIDES = {"L": ("rows", "rows"), "R": ("columns", "columns")}


def prepare_shampoo(t, lr=0.1, eps=1e-4, matrix=True, weight_decay=0.0):
    return Shampoo(lr, eps, weight_decay, float(matrix))


@fastopt.rule(prepare_shampoo)
def decayed(p, g, u, h):
    return p, g + h.decay * p


def root(matrix, eps):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * (values.clip(0) + eps) ** -0.25) @ vectors.T


def precondition(u, L, R, eps, **others):
    L += u @ u.T
    R += u.T @ u
    u[...] = root(L, eps) @ u @ root(R, eps)


@fastopt.rule(prepare_shampoo, matrixwise=Matrixwise(decayed, "u", precondition, "matrix", matrices=SIDES))
def shampoo(p, g, u, h):
    if h.matrix > 0:
        return p - h.lr * u, u
    u = u + (g + h.decay * p) ** 2
    return p - h.lr * (g + h.decay * p) / math.sqrt(u + h.eps), u


# --- SM3 --------------------------------------------------------------------------------------------------------------
# Adagrad whose sums are the least of a number per row and one per column, each the largest sum in there (Anil et al.
# 2019, https://arxiv.org/abs/1901.11150, SM3-II). `Sums` add and know no maximum, so that this takes a `Matrixwise`,
# whose `u` has the size of the parameter: the states are those of SM3, but the memory that it saves is not saved.

Cover = namedtuple("Cover", "lr eps decay matrix")
COVERS = {"row": ("rows", 1), "column": (1, "columns")}


def prepare_sm3(t, lr=0.1, matrix=True, weight_decay=0.0):
    return Cover(lr, 1e-30, weight_decay, float(matrix))


@fastopt.rule(prepare_sm3)
def gradient_of_sm3(p, g, u, h):
    return p, g + h.decay * p


def divide(u, row, column, **others):
    sums = np.minimum(row, column) + u * u
    row[...] = sums.max(axis=1, keepdims=True, initial=0.0)
    column[...] = sums.max(axis=0, keepdims=True, initial=0.0)
    u /= np.sqrt(sums + 1e-30)


@fastopt.rule(prepare_sm3, matrixwise=Matrixwise(gradient_of_sm3, "u", divide, "matrix", matrices=COVERS))
def sm3(p, g, u, h):
    if h.matrix > 0:
        return p - h.lr * u, u
    u = u + (g + h.decay * p) ** 2
    return p - h.lr * (g + h.decay * p) / math.sqrt(u + h.eps), u


def sm3_in_numpy(params, states, t):
    for path, g in gradients_at(params, t).items():
        if g.ndim == 2:
            row, column = states.get(path, (np.zeros(g.shape[0]), np.zeros(g.shape[1])))
            sums = np.minimum.outer(row, column) + g * g
            states[path] = sums.max(axis=1), sums.max(axis=0)
        else:
            sums = states[path] = states.get(path, 0.0) + g * g
        params[path] -= 0.1 * g / np.sqrt(sums)


# --- SOAP -------------------------------------------------------------------------------------------------------------
# Adam in the bases in which Shampoo's L and R are diagonal (Vyas et al. 2024, https://arxiv.org/abs/2409.11321,
# algorithm 3). The first update of a matrix only makes its bases, which are 0 before that. Other parameters are updated
# by Adam: a rule can call another one as a function.

Soap = namedtuple("Soap", "b1 one_minus_b1 b2 one_minus_b2 step_size eps_in eps_out keep matrix")
BASES = {"L": ("rows", "rows"), "R": ("columns", "columns"), "QL": ("rows", "rows"), "QR": ("columns", "columns")}


def prepare_soap(t, lr=3e-3, betas=(0.95, 0.95), eps=1e-8, beta=0.95, matrix=True, weight_decay=0.0):
    (b1, b2), f1, k, keep = betas, (1 - betas[0]) * (t > matrix), max(1, t - matrix), 1 - lr * weight_decay
    return Soap(b1, f1, b2, 1 - b2, lr * math.sqrt(1 - b2**k) / (1 - b1**k), 0.0, eps, keep, float(matrix))


@fastopt.rule(prepare_soap)
def mean_and_gradient(p, g, m, v, u, h):
    return p, h.b1 * m + h.one_minus_b1 * g, v, g


def in_eigenbases(u, m, v, L, R, QL, QR, t, betas, eps, beta, **others):
    products = u @ u.T, u.T @ u
    v[...] = betas[1] * v + (1 - betas[1]) * (QL.T @ u @ QR) ** 2
    u[...] = QL @ (QL.T @ m @ QR / (np.sqrt(v) + eps)) @ QR.T
    for matrix, Q, product in ((L, QL, products[0]), (R, QR, products[1])):
        matrix[...] = beta * matrix + (1 - beta) * product
        Q[...] = np.linalg.qr(matrix @ Q)[0] if t > 1 else np.linalg.eigh(matrix)[1][:, ::-1]


@fastopt.rule(prepare_soap, matrixwise=Matrixwise(mean_and_gradient, "u", in_eigenbases, "matrix", matrices=BASES))
def soap(p, g, m, v, u, h):
    if h.matrix > 0:
        return h.keep * p - h.step_size * u, m, v, u
    return (*fastopt.rules.adam(h.keep * p, g, m, v, h), u)


# --- Sophia -----------------------------------------------------------------------------------------------------------
# The mean gradient over a mean of the Hessian's diagonal, with steps of lr at most (Liu et al. 2023,
# https://arxiv.org/abs/2305.14342). Only some steps are given a Hessian, which `prepare` is told.

Sophia = namedtuple("Sophia", "lr b1 f1 b2 f2 gamma eps one")


def prepare_sophia(t, hessian, lr=0.01, betas=(0.96, 0.99), gamma=0.01, eps=1e-12):
    b1, b2 = betas if hessian else (betas[0], 1.0)
    return Sophia(lr, b1, 1 - b1, b2, 1 - b2, gamma, eps, 1.0)


@fastopt.rule(prepare_sophia, extra=("hessian",), decoupled=True)
def sophia(p, g, hessian, m, v, h):
    m = h.b1 * m + h.f1 * g
    v = h.b2 * v + h.f2 * hessian
    return p - h.lr * min(max(m / max(h.gamma * v, h.eps), -h.one), h.one), hessian, m, v


def sophia_step(opt, t):
    hessians = {path: 1.0 + p * p for path, p in opt.params.items()}
    opt.step(gradients_at(opt.params, t), extra={"hessian": hessians} if t % 3 == 1 else None)


# --- StableAdamW ------------------------------------------------------------------------------------------------------
# AdamW whose rate falls where the second moment lags behind the gradients of a tensor (Wortsman et al. 2023,
# https://arxiv.org/abs/2304.13013). The sum is one of what the rule computes as well: both call `second_moment`.

Stable = namedtuple("Stable", "lr b1 f1 b2 f2 eps decay least bound")


def prepare_stable_adamw(t, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01):
    b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
    return Stable(lr, b1, 1 - b1, b2, 1 - b2, eps, weight_decay, eps * eps, 1.0)


def second_moment(g, v, h):
    return h.b2 * v + h.f2 * g * g


def excess(p, g, m, v, h):
    return g * g / max(second_moment(g, v, h), h.least)


def at_most(sums, numbers, size, h):
    return 1.0 / max(1.0, math.sqrt(sums.excess / size))


@fastopt.rule(prepare_stable_adamw, sums=Sums({"excess": excess}, at_most, results=("bound",)))
def stable_adamw(p, g, m, v, h):
    m, v = h.b1 * m + h.f1 * g, second_moment(g, v, h)
    return p - h.lr * h.bound * (m / (math.sqrt(v) + h.eps) + h.decay * p), m, v


# --- the twenty, and what they are held to ----------------------------------------------------------------------------


class Known(NamedTuple):
    """A rule from above, and the same of the library: an optimizer or a wrapped rule; or a function in NumPy."""

    rule: fastopt.Rule
    same: Callable[..., Any] | fastopt.Rule
    own: dict[str, Any] = {}  # noqa: RUF012
    """Hyperparameters of the rule ..."""
    other: dict[str, Any] | None = None
    """... and those of the other one, where it has other names for them."""
    step: Callable[..., None] | None = None
    """How to make a step, where it takes more than gradients."""


FLAT = {"overrides": {"conv": {"precondition": False}}}  # as a Matrixwise without `reshape`
TWENTY = {
    "AdaBelief": Known(adabelief, fastopt.AdaBelief, {"lr": 0.1}),
    "AdaBound": Known(adabound, fastopt.AdaBound, {"lr": 0.1, "gamma": 0.25}),
    "Adafactor": Known(adafactor, fastopt.Adafactor, {"lr": 0.3}),
    "Adam-mini": Known(adam_mini, fastopt.AdamMini, {"lr": 0.1, "weight_decay": 0.1}),
    "Adan": Known(adan, fastopt.Adan, {"lr": 0.1, "weight_decay": 0.1}),
    "ADOPT": Known(adopt, fastopt.ADOPT, {"lr": 0.1}),
    "ASGD": Known(asgd, fastopt.ASGD, {"lr": 0.1, "lambd": 0.01, "t0": 3.0}),
    "Cautious": Known(cautious_adamw, fastopt.wrappers.cautious(fastopt.rules.adamw), {"lr": 0.1, "weight_decay": 0.1}),
    "FTRL": Known(ftrl, fastopt.FTRL, {"lr": 0.1, "l1": 0.1, "l2": 0.1}),
    "Gradient centralization": Known(
        centralized_adamw,
        fastopt.wrappers.centralized(fastopt.rules.adamw),
        {"lr": 0.1, "weight_decay": 0.1},
    ),
    "Lion": Known(lion, fastopt.Lion, {"lr": 0.1, "weight_decay": 0.1}),
    "Lookahead": Known(
        lookahead_adamw,
        fastopt.wrappers.lookahead(fastopt.rules.adamw),
        {"lr": 0.1, "k": 3, "alpha": 0.75},
        {"lr": 0.1, "lookahead_k": 3, "lookahead_alpha": 0.75},
    ),
    "MARS": Known(mars, fastopt.MARS, {"lr": 0.1, "weight_decay": 0.1}),
    "Prodigy": Known(prodigy, fastopt.Prodigy, {"d0": 0.01, "eps": 0.0}),
    "SAM": Known(momentum, sam_in_numpy, step=sam_step),
    "Shampoo": Known(shampoo, fastopt.Shampoo, {"lr": 0.1, "eps": 1e-3}, {"lr": 0.1, "eps": 1e-3, **FLAT}),
    "SM3": Known(sm3, sm3_in_numpy),
    "SOAP": Known(
        soap, fastopt.SOAP, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.0, "precondition_frequency": 1, **FLAT}
    ),
    "Sophia": Known(sophia, fastopt.Sophia, {"lr": 0.1, "weight_decay": 0.1}, step=sophia_step),
    "StableAdamW": Known(stable_adamw, fastopt.StableAdamW, {"lr": 0.1, "weight_decay": 0.1}),
}

SHAPES = {"W": (4, 5), "conv": (3, 2, 2), "b": (5,), "scale": ()}
START = {path: np.random.default_rng(k).normal(size=shape) for k, (path, shape) in enumerate(SHAPES.items())}
MINIMUM = {path: 4.0 * np.exp(-np.arange(p.size)).reshape(p.shape) for path, p in START.items()}


def gradients_at(params: Any, t: int) -> dict[str, np.ndarray]:
    """Those of a bowl around the minimum, with noise of its own in every step."""
    rng = np.random.default_rng(t)
    return {
        path: (p - MINIMUM[path] + rng.normal(scale=0.1, size=p.shape)).astype(p.dtype) for path, p in params.items()
    }


def plain_step(opt: fastopt.Optimizer, t: int) -> None:
    opt.step(gradients_at(opt.params, t))


def begun(known: Known, dtype: Any = np.float64) -> fastopt.Optimizer:
    return fastopt.Optimizer({path: p.astype(dtype) for path, p in START.items()}, known.rule, **known.own)


def bits(opt: fastopt.Optimizer) -> dict[str, bytes]:
    trees = {"p": opt.params, **opt.states}
    return {f"{name}/{path}": leaf.tobytes() for name, found in trees.items() for path, leaf in found.items()}


each = pytest.mark.parametrize("name", TWENTY)


@each
def test_it_computes_what_the_library_or_numpy_computes(name):
    known = TWENTY[name]
    opt, step, hyper = begun(known), known.step or plain_step, known.own if known.other is None else known.other
    params = {path: p.copy() for path, p in START.items()}
    if isinstance(known.same, fastopt.Rule):
        other = fastopt.Optimizer(params, known.same, **hyper)
    elif isinstance(known.same, type):
        other = known.same(params, **hyper)
    else:
        other = None
    states: dict[str, Any] = {}
    for t in range(1, 21):
        step(opt, t)
        if other is None:
            known.same(params, states, t)
        else:
            step(other, t)
    for path, expected in (params if other is None else other.params).items():
        assert not np.allclose(expected, START[path], rtol=0.01), path
        np.testing.assert_allclose(opt.params[path], expected, rtol=1e-12, atol=1e-14, err_msg=path)


@each
def test_a_saved_and_a_copied_run_go_on_bit_for_bit(name, tmp_path):
    known = TWENTY[name]
    opt, loaded, step = begun(known), begun(known), known.step or plain_step
    for t in range(1, 6):
        step(opt, t)
    opt.save(tmp_path / "run")
    loaded.load(tmp_path / "run")
    copied = copy.deepcopy(opt)
    for t in range(6, 11):
        for each_opt in (opt, loaded, copied):
            step(each_opt, t)
    assert bits(loaded) == bits(copied) == bits(opt)
    assert bits(opt) != bits(begun(known))


@each
def test_float32_is_float64_but_for_its_rounding(name):
    known = TWENTY[name]
    single, double, step = begun(known, np.float32), begun(known), known.step or plain_step
    for t in range(1, 6):
        step(single, t)
        step(double, t)
    for path, expected in double.params.items():
        assert single.params[path].dtype == np.float32
        np.testing.assert_allclose(single.params[path], expected, rtol=1e-4, atol=1e-4, err_msg=path)


def sections() -> dict[str, list[str]]:
    """The lines of each rule, without blank ones, comments, and the formula in NumPy."""
    source = inspect.getsource(sys.modules[__name__])
    parts = re.split(r"^# --- (.+?) -+\n", source, flags=re.MULTILINE)[1:]
    found = {}
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        rule = re.split(r"^def \w+_in_numpy\(", part, maxsplit=1, flags=re.MULTILINE)[0]
        found[name] = [line for line in rule.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return found


def test_each_of_the_twenty_takes_twenty_lines_at_most():
    found = sections()
    assert len(TWENTY) == 20
    assert list(TWENTY) == list(found)[:-1]
    too_long = {name: len(lines) for name, lines in found.items() if name in TWENTY and len(lines) > 20}
    assert not too_long


@each
def test_it_is_written_without_closures(name):
    source = "\n".join(sections()[name])
    assert not re.search(r"^\s+def |\b(lambda|global|nonlocal)\b", source, flags=re.MULTILINE)
