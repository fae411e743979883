"""The faults that bench/mutants.py plants: each one small change of the source, and the tests that ought to notice.

They are of the kinds that numerical libraries have shipped: a sign, a bound, an index, an order of two operations, a
branch that is rarely taken, a thing that is remembered too long or forgotten too soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Fault(NamedTuple):
    """One small change of the source."""

    file: str
    old: str
    """Stands once in the file."""
    new: str
    tests: str
    """What pytest is given, as on a command line; environment variables may come first."""
    equivalent: str = ""
    """Why no test can notice it, where that is so."""


def faults_of(file: str, tests: str, *changes: tuple[str, str] | tuple[str, str, str]) -> list[Fault]:
    """Faults of one file: (old, new), or (old, new, tests) where other tests ought to notice it."""
    return [Fault(file, change[0], change[1], change[2] if len(change) == 3 else tests) for change in changes]


def parity(rule: str) -> str:
    """The comparison of a rule's cases with the reference, in float64."""
    return f"tests/test_rules.py -k 'float64_equals and {rule}'"


SIMULATED = "NUMBA_ENABLE_CUDASIM=1 "

RULES: Sequence[Fault] = (
    *faults_of(
        "fastopt/rules/sgd.py",
        parity("SGD"),
        ("1.0 if t == 1 else 1.0 - dampening", "1.0 - dampening"),
        ("MomentumHyper(momentum, -lr * weight, -1.0)", "MomentumHyper(momentum, -lr, -1.0)"),
        ("return p - h.lr * g", "return p + h.lr * g"),
    ),
    *faults_of(
        "fastopt/rules/momentum.py",
        parity("Momentum"),
        ("Hyper(momentum, 1.0 - momentum, lr)", "Hyper(momentum, 1.0, lr)"),
        ("return p - h.rate * velocity, velocity", "return p - h.rate * g, velocity"),
    ),
    *faults_of(
        "fastopt/rules/nesterov.py",
        parity("Nesterov"),
        ("h.weight * g + h.momentum * velocity)", "h.weight * g + velocity)"),
        ("return Hyper(momentum, lr, 1.0)", "return Hyper(momentum, 1.0, lr)", parity("lookahead")),
    ),
    *faults_of(
        "fastopt/rules/adagrad.py",
        parity("Adagrad"),
        ("(t - 1) * lr_decay", "t * lr_decay"),
        ("sum_sq = sum_sq + g * g", "sum_sq = sum_sq + abs(g)"),
        ('initial={"sum_sq": INITIAL}', "initial={}"),
    ),
    *faults_of(
        "fastopt/rules/adadelta.py",
        parity("Adadelta"),
        ("h.one_minus_rho * delta * delta", "h.one_minus_rho * g * g"),
        ("math.sqrt(acc_delta + h.eps)", "math.sqrt(acc_delta) + h.eps"),
    ),
    *faults_of(
        "fastopt/rules/rmsprop.py",
        parity("RMSprop"),
        (
            "return difference if difference > h.zero else h.zero",
            "return difference",
            "tests/test_rule_kinds.py -k variance_never",
        ),
        (
            "h.momentum * buf + h.weight * normalized(g, square_avg, h)",
            "h.momentum * buf + normalized(g, square_avg, h)",
        ),
        ("(eps, 0.0) if eps_inside", "(0.0, eps) if eps_inside"),
    ),
    *faults_of(
        "fastopt/rules/adam.py",
        parity("Adam"),
        ("(1.0 - b1**t, 1.0 - b2**t) if bias_correction", "(1.0 - b1**t, 1.0 - b2**t) if t < 90"),
        ("corrected = 1.0 if eps_hat else root", "corrected = root"),
        ("(corrected**2 * eps, 0.0) if eps_inside", "(corrected * eps, 0.0) if eps_inside"),
        ("v_max = v_max if v_max > v else v", "v_max = v_max if v_max < v else v"),
    ),
    *faults_of(
        "fastopt/rules/lamb.py",
        "tests/test_rules.py -k 'lamb or (float64_equals and LAMB)'",
        ("if norm_p > 0.0 and norm_u > 0.0 else 1.0", "if norm_u > 0.0 else 1.0"),
        ("+ h.weight_decay * p\n", "+ h.weight_decay * m\n"),
    ),
    *faults_of(
        "fastopt/rules/nadam.py",
        parity("NAdam"),
        ("product(t + 1, b1, momentum_decay))", "product(t, b1, momentum_decay))"),
        ("0.5 * 0.96 ** (t * momentum_decay)", "0.5 * 0.96 ** momentum_decay"),
    ),
    *faults_of(
        "fastopt/rules/radam.py",
        parity("RAdam"),
        ("if rho > 5.0:", "if rho > 4.0:"),
        ("rho = rho_max - 2.0 * t * b2**t / bc2", "rho = rho_max - 2.0 * b2**t / bc2"),
    ),
    *faults_of(
        "fastopt/rules/adamax.py",
        parity("Adamax"),
        ("decayed if decayed > new else new", "decayed"),
        ("abs(g) + h.eps_in", "abs(g)"),
    ),
    *faults_of(
        "fastopt/rules/lion.py",
        parity("Lion"),
        (
            "-length if direction < zero else length * direction",
            "-length if direction < zero else zero",
            "tests/test_rules.py -k 'nan_reaches and Lion'",
        ),
        ("h.b2 * m + h.one_minus_b2 * g", "h.b1 * m + h.one_minus_b1 * g"),
    ),
    *faults_of(
        "fastopt/rules/adabelief.py",
        parity("AdaBelief"),
        ("surprise * surprise + h.eps_in", "surprise * surprise"),
        ("surprise = g - m", "surprise = g"),
    ),
    *faults_of(
        "fastopt/rules/adan.py",
        parity("Adan"),
        ("known = 0.0 if t == 1 else 1.0", "known = 1.0"),
        ("keep = 1.0 / (1.0 + lr * weight_decay)", "keep = 1.0 - lr * weight_decay"),
    ),
    *faults_of(
        "fastopt/rules/ademamix.py",
        parity("AdEMAMix"),
        ("if t < warmup_steps:", "if t <= 1:"),
        ("return min(math.exp(", "return max(math.exp("),
    ),
    *faults_of(
        "fastopt/rules/lars.py",
        parity("LARS"),
        (
            "if norm_p > 0.0 and norm_g > 0.0:",
            "if norm_p > 0.0:",
            "tests/test_rule_kinds.py -k 'zero_gradient_leaves and LARS'",
        ),
        ("(1.0, momentum) if nesterov", "(0.0, 1.0) if nesterov"),
    ),
    *faults_of(
        "fastopt/rules/novograd.py",
        parity("NovoGrad"),
        ("(0.0, 1.0) if t == 1 else", "(b2, 1.0 - b2) if t == 1 else"),
        ("h.inverse * g + h.weight_decay * p", "h.inverse * (g + h.weight_decay * p)"),
    ),
    *faults_of(
        "fastopt/rules/yogi.py",
        parity("Yogi"),
        ("change = h.one_minus_b2 * square", "change = h.one_minus_b1 * square"),
        ("v = v - change if v > square", "v = v + change if v > square"),
    ),
    *faults_of(
        "fastopt/rules/rprop.py",
        parity("Rprop"),
        ("(high if x > high else x)", "x"),
        ("return low if x < low", "return low if x > low"),
        ("g = h.zero if product < h.zero else g", "g = g"),
    ),
    *faults_of(
        "fastopt/rules/schedule_free_adamw.py",
        parity("ScheduleFree"),
        ("gamma * (1.0 - b1 * (1.0 - c))", "gamma * (1.0 - b1)"),
        ("min(1.0, t / warmup_steps)", "t / warmup_steps"),
    ),
    *faults_of(
        "fastopt/rules/muon.py",
        "tests/test_rule_kinds.py -k muon",
        ("math.sqrt(max(1.0, rows / columns))", "math.sqrt(rows / columns)"),
        ("b * A + c * (A @ A)", "b * A + c * A"),
        ("X = u / max(norm, eps) if rows <= columns else u.T", "X = u / max(norm, eps) if rows < columns else u.T"),
    ),
)

STEP: Sequence[Fault] = (
    *faults_of(
        "fastopt/kernels/elements.py",
        "tests/test_tail.py -k 'flag or not_finite_is_zeroed'",
        ("g = g if abs(g) <= LARGEST else ZERO", "g = g if abs(g) < LARGEST else ZERO"),
        ("g = -step.clip_value if g < -step.clip_value else g", "g = -step.clip_value if g < step.clip_value else g"),
        ("g = g + step.weight_decay * p", "g = g + p", parity("SGD")),
        ("return average + step.ema_weight * (p - average)", "return p + step.ema_weight * (p - average)"),
        (
            "return p if N_STATES == 0 else (p, *rest[:-1])",
            "return p if N_STATES == 0 else (g, *rest[:-1])",
            SIMULATED + "tests/test_cuda.py -k skipped_step_changes_nothing",
        ),
        (
            "        norm_g = step.coefficient * norm_g\n",
            "        norm_p = step.coefficient * norm_p\n",
            "tests/test_rule_kinds.py -k clipping_changes_the_norm",
        ),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        "tests/test_optimizer.py tests/test_tail.py",
        (
            "        self.steps += 1\n        self.pending = None",
            "        self.steps += 1",
            "tests/test_tail.py -k accumulated",
        ),
        (
            "            self.groups.miss(present)\n        return StepInfo",
            "            pass\n        return StepInfo",
            "tests/test_optimizer.py -k without_gradient",
        ),
        (
            "self.steps + 1 - group.missed, group.point",
            "self.steps + 1, group.point",
            "tests/test_rows.py -k missed_as_a_whole",
        ),
        (
            'number = positive("weight", weight)',
            "number = 1.0",
            "tests/test_tail.py -k 'accumulated_gradients_equal or bad_calls'",
        ),
        ("pending.present |= present", "pending.present &= present", "tests/test_tail.py -k in_any_micro_batch"),
        (
            "missed[old_numbers[path]] if path in old_numbers else self.steps",
            "missed[old_numbers[path]] if path in old_numbers else 0",
            "tests/test_groups.py -k added_parameters",
        ),
        (
            "            self.put_params(backup)\n",
            "            pass\n",
            "tests/test_optimizer.py -k lookahead_restores",
        ),
        (
            "            if own and self.options.zero_grad:",
            "            if self.options.zero_grad:",
            "tests/test_tail.py -k are_not_zeroed",
        ),
    ),
    *faults_of(
        "fastopt/step/info.py",
        "tests/test_tail.py -k rate_that_it_would",
        ("self.step if self.skipped else self.step - 1", "self.step - 1"),
    ),
    *faults_of(
        "fastopt/step/table.py",
        "tests/test_tail.py -k 'bad or flag' tests/test_rules.py -k AdamW",
        (
            'keep = 1.0 - values["lr"] * decay if rule.decoupled',
            "keep = 1.0 - decay if rule.decoupled",
            parity("AdamW"),
        ),
        (
            "return 1.0 / (number * divisor)\n        raise",
            "return 1.0 / number\n        raise",
            "tests/test_tail.py -k accumulated_gradients_equal",
        ),
        ("0.0 if ema is None else 1.0 - ema", "0.0 if ema is None else ema", "tests/test_tail.py -k average_begins"),
    ),
    *faults_of(
        "fastopt/step/groups.py",
        "tests/test_groups.py",
        ("values[name] *= self.scale", "values[name] = self.scale", "tests/test_groups.py -k scale_multiplies"),
        (
            "            if name not in group.changes:\n                group.put",
            "            if True:\n                group.put",
            "tests/test_optimizer.py -k outlives",
        ),
        (
            "twin = ParamGroup(self.rule, self.base, group.changes, group.missed)",
            "twin = ParamGroup(self.rule, self.base, group.changes, 0)",
            "tests/test_optimizer.py -k without_gradient",
        ),
        (
            "            found[k].update(values)",
            "            found[k] = dict(values)",
            "tests/test_optimizer.py -k overrides",
        ),
    ),
    *faults_of(
        "fastopt/step/rows.py",
        "tests/test_rows.py",
        (
            "range(0, behind.size, ROWS_AT_ONCE)",
            "range(0, behind.size - 1, ROWS_AT_ONCE)",
            "tests/test_rows.py -k no_row_is_lost",
        ),
        (
            "behind[first : first + ROWS_AT_ONCE]",
            "behind[first + 1 : first + ROWS_AT_ONCE]",
            "tests/test_rows.py -k no_row_is_lost",
        ),
        (
            "if k in self.clocks and self.clocks[k].now >= MOST:",
            "if k in self.clocks and self.clocks[k].now >= 2 * MOST:",
            "tests/test_rows.py -k clocks_begin_anew",
        ),
        (
            "        clock.last[indices] = clock.now",
            "        clock.last[indices] = 0",
            "tests/test_rows.py -k rows_read",
        ),
        ("row_grads = row_grads.copy()", "row_grads = row_grads", "tests/test_rows.py -k may_be_their_gradients"),
    ),
    *faults_of(
        "fastopt/closed_forms/linear.py",
        "tests/test_rows.py -k 'rowwise_steps_equal and SGD'",
        ("np.isfinite(lines).all(1)", "np.ones(ages.size, np.bool_)", "tests/test_rows.py -k product_no_number"),
        ("matrix[inner, inner] = 1.0 - self._ema_weight", "matrix[inner, inner] = self._ema_weight"),
    ),
    *faults_of(
        "fastopt/closed_forms/adam.py",
        "tests/test_rows.py -k 'adams_closed_form or missed_as_a_whole'",
        ("self._b2**k, center", "self._b1**k, center"),
        ("(1.0 - b1**t, 1.0 - b2**t) if values", "(1.0 - b1, 1.0 - b2) if values"),
        ("truncated <= 1e-8 * f[0]", "truncated <= 1e8 * f[0]", "tests/test_rows.py -k 'rowwise_steps_equal and Adam'"),
    ),
    *faults_of(
        "fastopt/step/norms.py",
        "tests/test_tail.py -k 'flag or finite'",
        ("math.sqrt(total)", "total"),
        ("mark == 0.0", "True"),
    ),
    *faults_of(
        "fastopt/storage/layout.py",
        "tests/test_flat.py",
        ("end += -(-size // step) * step", "end += size", "tests/test_flat.py -k 64_byte"),
        ("stop = min(start + length, size)", "stop = start + length", "tests/test_flat.py -k chunk_invariants"),
        ("and runs[-1][2] == group", "", "tests/test_flat.py -k neighbours_of_its_group"),
        (
            "block += -(-(stop - start) // BLOCK)",
            "block += (stop - start) // BLOCK",
            "tests/test_flat.py -k partial_sums",
        ),
    ),
)

LOOPS: Sequence[Fault] = (
    *faults_of(
        "fastopt/kernels/cpu/elementwise.py",
        "tests/test_driver.py -k chunk_length tests/test_rules.py -k Adam",
        ("c = first - 1 - k if backwards", "c = first - k if backwards", "tests/test_driver.py -k any_chunk_length"),
        ("                g[i] = ZERO\n", "                p[i] = ZERO\n", "tests/test_tail.py -k each_flag_alone"),
        (
            "g = at_address(DTYPE, place.g, chunk.grad, size)",
            "g = at_address(DTYPE, place.g, chunk.start, size)",
            "tests/test_rows.py -k repeated_rows",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cpu/norms.py",
        "tests/test_tail.py",
        (
            "size = min(BLOCK, chunk.stop - start)\n            if OF",
            "size = BLOCK - 1\n            if OF",
            "tests/test_tail.py -k norm_does_not_depend",
        ),
        (
            "                if overwrite[chunk.place]:",
            "                if False:",
            "tests/test_tail.py -k accumulated_gradients",
        ),
        ("chunk.grad + start - chunk.start, size)", "chunk.grad, size)", "tests/test_tail.py -k norm_does_not_depend"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/layerwise.py",
        "tests/test_rules.py -k LAMB",
        (
            "pp += np.float64(p[i]) * np.float64(p[i])",
            "pp += np.float64(p[i] * p[i])",
            "tests/test_rules.py -k 'lamb_norms'",
        ),
        (
            "                if ZERO_GRAD:\n                    g[i] = ZERO\n                pp",
            "                pp",
            "tests/test_tail.py -k 'each_flag_alone or all_flags_at_once'",
        ),
        ("if chunk.place != place:", "if False:", "tests/test_rules.py -k lamb_takes_the_ratio"),
        (
            "average[i] = AVERAGED(step, p[i], average[i])",
            "average[i] = p[i]",
            "tests/test_tail.py -k 'all_flags_at_once_equal and LAMB'",
        ),
    ),
    *faults_of(
        "fastopt/kernels/pool.py",
        "tests/test_pool.py",
        ("if replace(claim, word, word - 1):", "if True:", "tests/test_pool.py -k 'every_rule or stress'"),
        ("units * (of + 1) // threads", "units * (of + 1) // threads - 1", "tests/test_pool.py -k every_rule_and_flag"),
        ("        set_arithmetic_modes(modes)", "        pass", "tests/test_pool.py -k workers_compute"),
        ("    while load(control + PENDING) != 0:", "    while False:", "tests/test_pool.py -k 'every_rule or stress'"),
        ("    if wait > 0:\n        store(site + WAIT, wait - 1)", "", "tests/test_pool.py -k quiet_gets_its_threads"),
    ),
)

BATCHNORM: Sequence[Fault] = (
    *faults_of(
        "fastopt/batchnorm/formulas.py",
        "tests/test_batchnorm.py -k float64_is_the_reference",
        (
            "return ZERO if affine(x, h) <= ZERO else dy",
            "return ZERO if affine(x, h) < ZERO else dy",
            "tests/test_batchnorm.py",
        ),
        ("y = ZERO if y < ZERO else y", "y = y if y > ZERO else ZERO", "tests/test_batchnorm.py -k not_a_number"),
        ("return q - s * (s / count)", "return q - s"),
        ("return s / count + center,", "return s / count,"),
        ("delta * (n * more / total) * delta", "delta * delta"),
        ("return squares / (count - 1.0)", "return squares / count"),
        ("new = (1.0 - momentum) * running + momentum * batch", "new = momentum * running + (1.0 - momentum) * batch"),
        ("return largest if new > largest else new", "return new", "tests/test_batchnorm.py -k 1e30"),
        ("return 1.0 / math.sqrt(var + eps)", "return 1.0 / (math.sqrt(var) + eps)"),
        ("return sum_g_xhat - lost * sum_g", "return sum_g_xhat", "tests/test_batchnorm.py -k gradients_of_float32"),
        (
            "-dy_scale * (sum_g / count) - xhat_scale * lost",
            "-dy_scale * (sum_g / count)",
            "tests/test_batchnorm.py -k gradients_of_float32",
        ),
        ("beta - gamma * rounding(mean, center, inv_std)", "beta", "tests/test_batchnorm.py -k far_from_zero"),
        (
            "    if not training:\n        return dy_scale, 0.0, 0.0\n",
            "",
            "tests/test_batchnorm.py -k inference_and_its_gradients",
        ),
        (
            "(q <= GUARD * squares_about_mean(s, q, count)) & (q <= largest)",
            "q <= largest",
            "tests/test_batchnorm.py -k outlier",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cpu/batchnorm_tiles.py",
        "tests/test_batchnorm.py -k tiles_hold_every_element",
        ("rest = present % per_row_here * sample", "rest = 0"),
        ("min(rows, samples - n), row, (d - c) * spatial, 0, c", "rows, row, (d - c) * spatial, 0, c"),
    ),
    *faults_of(
        "fastopt/batchnorm/fold.py",
        "tests/test_batchnorm.py -k folded",
        ("formulas.inverse_std(var, eps)", "formulas.inverse_std(var, 0.0)"),
        ("(weight * scale.reshape(along))", "(weight * scale[0])"),
    ),
)

DEVICE: Sequence[Fault] = (
    *faults_of(
        "fastopt/kernels/cuda/elementwise.py",
        SIMULATED + "tests/test_cuda.py -k 'elements_left_over or every_rule_with and SGD'",
        ("        c += cuda.gridDim.x\n\n\n# --- the launch", "        c += n\n\n\n# --- the launch"),
        (
            "g = OPAQUE(place.g + ITEMSIZE * chunk.grad - first)",
            "g = OPAQUE(place.g + ITEMSIZE * chunk.start - first)",
            SIMULATED + "tests/test_cuda_places.py -k gradients_are_elsewhere",
        ),
        (
            "return (*kept, ZERO), ZERO, ZERO",
            "return (*kept, values[-1]), ZERO, ZERO",
            SIMULATED + "tests/test_cuda.py -k 'every_rule_with and SGD'",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cuda/layerwise.py",
        SIMULATED + "tests/test_cuda.py -k 'every_rule_with and (LAMB or NovoGrad or LARS)'",
        ("t += right[2 * block + right_column]", "t += right[2 * block + left_column]"),
        (
            "after = before if step.proceeds == ZERO else after",
            "pass",
            SIMULATED + "tests/test_cuda.py -k skipped_step_changes_nothing",
        ),
        ("return (p, AVERAGED(step, p, values[1])), ZERO, ZERO", "return (p, values[1]), ZERO, ZERO"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/decisions.py",
        SIMULATED + "tests/test_cuda.py -k 'wait or skipped'",
        ("behind = skipped[0] - known", "behind = 0"),
        (
            "norm = factor * math.sqrt(total[0])",
            "norm = math.sqrt(total[0])",
            SIMULATED + "tests/test_cuda.py -k accumulated",
        ),
        ("            skipped[0] += 1", "            skipped[0] += 2"),
    ),
)

AROUND: Sequence[Fault] = (
    *faults_of(
        "fastopt/schedules.py",
        "tests/test_schedules.py",
        ("return self.lr * math.exp(-self.k * step)", "return self.lr * math.exp(-self.k * (step + 1))"),
        (
            "return self.values[bisect_right(self.boundaries, step)]",
            "return self.values[bisect_right(self.boundaries, step - 1)]",
        ),
        ("height *= 0.5**cycle", "height *= 0.5**step"),
        ("_value(self.schedule, 0) * (step + 1) / (self.steps + 1)", "_value(self.schedule, 0) * step / self.steps"),
        ("step - (self.boundaries[index - 1] if index else 0)", "step"),
        ("peak = max(0.0, self.pct_start * self.steps - 1.0)", "peak = self.pct_start * self.steps"),
    ),
    *faults_of(
        "fastopt/init.py",
        "tests/test_init.py",
        (
            "math.sqrt(2.0) / math.hypot(1.0, slope) / math.sqrt(fan_in)",
            "math.sqrt(2.0) / math.hypot(1.0, slope) / fan_in",
        ),
        ("return _draw(w, rng.random, 2.0 * bound, -bound)", "return _draw(w, rng.random, bound, -bound)"),
        ("if w.flags.c_contiguous and w.flags.aligned:", "if w.flags.forc and w.flags.aligned:"),
    ),
    *faults_of(
        "fastopt/batches.py",
        "tests/test_batches.py",
        ("rows - rows % size if drop_last else rows", "rows - rows % size"),
        (
            "self._rng.permutation(len(self._arrays[0]))",
            "self._rng.integers(0, len(self._arrays[0]), len(self._arrays[0]))",
        ),
        ("return -(-self._stop // self.batch_size)", "return self._stop // self.batch_size"),
    ),
    *faults_of(
        "fastopt/interop/torch.py",
        "tests/test_interop.py -k torch",
        ("opt.rule.initial.get(name, 0.0)", "0.0", "tests/test_interop.py -k without_an_entry"),
        ("return step, [step - count for count in counts]", "return step, [0 for count in counts]"),
    ),
    *faults_of(
        "fastopt/checkpoint.py",
        "tests/test_checkpoint.py",
        ("            os.fsync(file.fileno())\n", "", "tests/test_checkpoint.py -k 'save_that_fails or kill'"),
        ("                temporary.unlink()", "                pass", "tests/test_checkpoint.py -k save_that_fails"),
        ("temporary.chmod(stat.S_IMODE(old.st_mode))", "pass", "tests/test_checkpoint.py -k mode_of_the_old_file"),
    ),
)

FAULTS: tuple[Fault, ...] = (*RULES, *STEP, *LOOPS, *BATCHNORM, *DEVICE, *AROUND)
