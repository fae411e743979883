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


OF_GROUPS = "tests/test_sums.py -k param_groups"
OF_VECTORS = "tests/test_wrap.py -k vectors_are_not"
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
        "fastopt/rules/sophia.py",
        "tests/test_inputs.py -k library",
        ("betas[1] if hessian else 1.0", "betas[1]"),
        ("h.one_minus_b2 * hessian", "h.one_minus_b2 * hessian * hessian"),
        ("-h.one if u < -h.one else u", "u"),
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
        ("if sums.p > 0.0 and sums.u > 0.0 else 1.0", "if sums.u > 0.0 else 1.0"),
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
            "if sums.p > 0.0 and sums.g > 0.0:",
            "if sums.p > 0.0:",
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
        ("MAX_STATES = 13", "MAX_STATES = 14", "tests/test_many_states.py -k vectorised"),
        ("return average + step.ema_weight * (p - average)", "return p + step.ema_weight * (p - average)"),
        (
            "return p if N_STATES == 0 else (p, *rest[:-1])",
            "return p if N_STATES == 0 else (g, *rest[:-1])",
            SIMULATED + "tests/test_cuda.py -k skipped_step_changes_nothing",
        ),
        (
            "        g = step.coefficient * g\n",
            "        g = g\n",
            "tests/test_rule_kinds.py -k clipping_changes_the_norm",
        ),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        "tests/test_optimizer.py tests/test_tail.py",
        (
            "        self.steps += 1\n        self.pending = None",
            "        self.steps += 1",
            "tests/test_tail.py -k in_any_micro_batch",
        ),
        (
            "            self.groups.miss(present, None if skipped is False else skipped)\n        return self._info",
            "            pass\n        return self._info",
            "tests/test_optimizer.py -k without_gradient",
        ),
        (
            "self.steps + 1 - group.missed, group.point",
            "self.steps + 1, group.point",
            "tests/test_rows.py -k missed_as_a_whole",
        ),
        (
            'number: float = POSITIVE_OR_ZERO.check("weight", weight)',
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
            "                self.backend.copy(own, array)\n            self.held",
            "                pass\n            self.held",
            "tests/test_optimizer.py -k lookahead_restores",
        ),
        (
            "            if own and self.pending is None and self.options.zero_grad:",
            "            if self.options.zero_grad:",
            "tests/test_tail.py -k are_not_zeroed",
        ),
    ),
    *faults_of(
        "fastopt/step/info.py",
        "tests/test_tail.py -k rate_that_it_would",
        ("self.step if skipped else self.step - 1", "self.step - 1"),
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
        (
            "values[name] = values[name] * self.scale",
            "values[name] = self.scale",
            "tests/test_groups.py -k scale_multiplies",
        ),
        (
            "            if name not in group.changes:\n                group.put",
            "            if True:\n                group.put",
            "tests/test_optimizer.py -k outlives",
        ),
        (
            "twin = self._group(group.changes, group.missed)",
            "twin = self._group(group.changes, 0)",
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
        "fastopt/kernels/bind.py",
        "tests/test_bind.py -k behind_modules",
        ("            path = (*path, each.argval)", "            path = (each.argval,)"),
        ("return _Module(module, found) if found else module", "return module"),
    ),
    *faults_of(
        "fastopt/step/inputs.py",
        "tests/test_inputs.py",
        ("name in given for name in rule.inputs", "True for name in rule.inputs"),
        ("if name not in given and name not in rule.inputs:", "if False:"),
        ("if leaf is None and (present is None or present[k]):", "if leaf is None and present is None:"),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        "tests/test_inputs.py",
        ("                if leaf is not None:\n                    self.backend.copy(view, array)\n", ""),
        ("extra is not None or loss is not None or self.takes_more:", "extra is not None or loss is not None:"),
    ),
    *faults_of(
        "fastopt/step/many.py",
        "tests/test_inputs.py -k every_step_has",
        ("if compiles and form is not None and not table.rule.inputs:", "if compiles and form is not None:"),
    ),
    *faults_of(
        "fastopt/wrap.py",
        "tests/test_wrap.py -k 'numpy_and_go_on and lookahead'",
        ('first = "kept_[0]" if self.parts.own', 'first = "proposed_" if self.parts.own'),
        ('"given_ = kept_[0]"]', '"given_ = g"]', "tests/test_wrap.py -k 'before_returns and lamb'"),
        (
            "lines = [*self.given(), f\"return {_call('TERM', 'p', 'given_'",
            "lines = [*self.given(), f\"return {_call('TERM', 'p', 'g'",
            "tests/test_wrap.py -k 'before_returns and stable'",
        ),
        (
            '(self.proposed(), ("p", "proposed_", "g"))',
            '(self.proposed(), ("p", "p", "g"))',
            "tests/test_wrap.py -k 'go_on_after and cautious'",
        ),
        (
            "[*own[:place], *others, *own[place:]]",
            "[*others, *own]",
            "tests/test_wrap.py -k 'centred_gradients and Stable'",
        ),
        (
            "for name, value in keywords.items() if name in known}",
            "for name, value in keywords.items()}",
            "tests/test_wrap.py -k 'before_returns and centred'",
        ),
        ("initial={**rule.initial, **(initial or {})}", "initial=rule.initial"),
        ("made._made_by = (", "made.made_by = ("),
    ),
    *faults_of(
        "fastopt/wrappers.py",
        "tests/test_wrap.py -k go_on_after",
        ("t % lookahead_k == 0.0", "t % lookahead_k == 1.0"),
        ("slow + h.lookahead_weight * (new_p - slow)", "slow + h.lookahead_weight * (new_p - p)"),
        ("max(share, 1e-3)", "max(share, 1.0)"),
        ("(new_p > p and g < 0)", "(new_p > p and g > 0)"),
        ("p + h.cautious_zero * (new_p - p)  #", "p  #", "tests/test_wrap.py -k keeps_a_nan"),
        ("t - average_from + 1.0", "t - average_from + 2.0"),
        ("sums.gradient / size if h.centralize > 0.0 else 0.0", "h.centralize * sums.gradient / size", OF_VECTORS),
        ('for_matrices=("centralize",),', "", OF_VECTORS),
        ("over=over),", 'over="row"),', "tests/test_wrap.py -k 'centred_gradients and SGD'"),
    ),
    *faults_of(
        "fastopt/step/groups.py",
        OF_VECTORS,
        ("rule.for_matrices if len(shape) < 2", "rule.for_matrices if len(shape) < 1"),
        ("rule.for_matrices if len(shape) < 2", "rule.for_matrices if len(shape) < 3"),
    ),
    *faults_of("fastopt/bare.py", OF_VECTORS, ("{**dict.fromkeys(rule.for_matrices, False), **hyper}", "hyper")),
    *faults_of("fastopt/rule.py", OF_VECTORS, ("                for_matrices=self.for_matrices,\n", "")),
    *faults_of(
        "fastopt/closed_forms/linear.py",
        "tests/test_rows.py -k 'rowwise_steps_equal and SGD'",
        ("np.isfinite(lines).all(1)", "np.ones(ages.size, np.bool_)", "tests/test_rows.py -k product_no_number"),
        ("matrix[inner, inner] = 1.0 - self._ema_weight", "matrix[inner, inner] = self._ema_weight"),
        (
            'f"h.{row}_{column} * {column}"',
            'f"h.{column}_{row} * {column}"',
            "tests/test_many_states.py -k rowwise",
        ),
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
        ("return math.sqrt(_summed(partials, 0)), mark", "return _summed(partials, 0), mark"),
        ("return math.sqrt(_summed(partials, 0)), mark == 0.0", "return math.sqrt(_summed(partials, 0)), True"),
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
            "tests/test_flat.py -k chunk_invariants",
        ),
    ),
)

LOOPS: Sequence[Fault] = (
    *faults_of(
        "fastopt/kernels/cpu/elementwise.py",
        "tests/test_driver.py -k chunk_length tests/test_rules.py -k Adam",
        ("c = first - 1 - k if backwards", "c = first - k if backwards", "tests/test_driver.py -k any_chunk_length"),
        (
            "                g[0][i] = G_TYPE(0)\n",
            "                p[i] = P_TYPE(0)\n",
            "tests/test_tail.py -k each_flag_alone",
        ),
        (
            "g = (at_address(G_TYPE, place.g, chunk.grad, size),)",
            "g = (at_address(G_TYPE, place.g, chunk.start, size),)",
            "tests/test_rows.py -k repeated_rows",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cpu/norms.py",
        "tests/test_tail.py",
        (
            "size = min(BLOCK, chunk.stop - start)\n            x",
            "size = BLOCK - 1\n            x",
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
        "fastopt/kernels/cpu/norms.py",
        "tests/test_rules.py -k lamb_takes_the_ratio",
        ("if chunk.place != place:", "if False:"),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        "tests/test_ascent.py",
        ("weight = self.sign * rho / norm if norm != 0.0 else 0.0", "weight = rho / norm if norm != 0.0 else 0.0"),
        ("self._without_frozen(taken.present) if self.groups.frozen else taken.present", "taken.present"),
        (
            "return 0.0 if abs(weight) > np.finfo(self.flat.compute).max else weight",
            "return weight",
        ),
        ("rows = [row if own else -1 for row, own in zip(plan.of, here.tolist(), strict=True)]", "rows = plan.of"),
        ("measuring = self.backend.norm(flat.compute, Features())", "measuring = plan.norm_kernel(scaled=False)"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/sums.py",
        "tests/test_sums.py -k 'of_each_tensor or over_all_parameters'",
        ("            block += 1\n", "            pass\n"),
        ("chunk.grad + start - chunk.start", "chunk.grad"),
        ("                    found[k] += total", "                    found[k] = total"),
        ("rows[place, column] = table[chunk.group, column]", "rows[place, column] = table[0, column]", OF_GROUPS),
        (
            "if own_network != network or not OVER_ALL:",
            "if True:",
            "tests/test_sums.py -k 'over_all_parameters or no_sum'",
        ),
        (
            "for k in range(own_network * count, (own_network + 1) * count):",
            "for k in range(own_network * count, place + 1):",
            "tests/test_sums.py -k 'over_all_parameters or no_sum'",
        ),
        ("table, whole = rows, own_rows", "table, whole = table, own_rows"),
        (
            "    table[0, PROCEEDS] = ZERO\n",
            "",
            'tests/test_interrupts.py -k "raises and serial and sums"',
        ),
        (
            "        with deferred_signals:\n            for stage",
            "        if True:\n            for stage",
            'tests/test_interrupts.py -k "raises and serial and sums"',
        ),
    ),
    *faults_of(
        "fastopt/kernels/cpu/lines.py",
        "tests/test_sums.py -k over_rows",
        (
            "of_row = OF_ROW(h, of_rows, tile.row_line + row)\n        if BY",
            "of_row = OF_ROW(h, of_rows, row)\n        if BY",
        ),
        (
            "of_row = OF_ROW(h, of_rows, tile.row_line + row)\n            for j",
            "of_row = OF_ROW(h, of_rows, tile.row + row)\n            for j",
        ),
        (
            "by_column = windows(parts, tile.column_part, tile.width)",
            "by_column = windows(parts, tile.column, tile.width)",
        ),
        ("number = line.tile + other * line.stride", "number = line.tile + other"),
        ("own_h = OF_LINE(h, of_lines, line.first + i)", "own_h = OF_LINE(h, of_lines, i)"),
        (
            "h = OF_TENSOR(h, of_tensors, tile.place)\n        columns = windows(of_columns, tile.column_line, tile.width)\n        for row",
            "h = OF_TENSOR(h, of_tensors, 0)\n        columns = windows(of_columns, tile.column_line, tile.width)\n        for row",
        ),
        ('if over == "all":', "if False:"),
        ("table[0, PROCEEDS] = 0.0", "pass", 'tests/test_interrupts.py -k "raises and serial and rows"'),
    ),
    *faults_of(
        "fastopt/storage/layout.py",
        "tests/test_sums.py -k over_rows",
        ("first_tile + k, len(down), stride", "first_tile + k, len(down), 1"),
        ('                    parts["column"] += width\n', ""),
        ("as_matrix(shape) if len(shape) > 1", "as_matrix(shape) if len(shape) == 2"),
        ("return shape[0], math.prod(shape[1:])", "return shape[0], shape[1]", "tests/test_matrices.py"),
        (
            "if size == 0 or group < 0:\n                continue\n            first_row",
            "if size == 0:\n                continue\n            first_row",
            "tests/test_sums.py -k keeps_its_rows",
        ),
    ),
    *faults_of(
        "fastopt/rules/adafactor.py",
        "tests/test_rule_kinds.py -k adafactor_equals",
        ("lr=min(lr, 1.0 / math.sqrt(t))", "lr=lr"),
        ("/ (1.0 if excess < 1.0 else excess)", "/ excess"),
        ("max(eps, SMALLEST) if bound_mean", "SMALLEST if bound_mean"),
        ('    for_matrices=("bound_mean",),\n', ""),
        ("keep=1.0 - lr * weight_decay", "keep=1.0 - min(lr, 1.0 / math.sqrt(t)) * weight_decay"),
    ),
    *faults_of(
        "fastopt/rules/stable_adamw.py",
        parity("StableAdamW"),
        ("return 1.0 if mean <= 1.0 else 1.0 / math.sqrt(mean)", "return 1.0 / math.sqrt(mean)"),
        ("return b * (1.0 - b ** (t - 1)) / (1.0 - b**t)", "return b"),
        (
            "h.eps_squared if new_v < h.eps_squared else new_v",
            "new_v if new_v > h.eps_squared else h.eps_squared",
            "tests/test_rule_kinds.py -k nan_in_the_average",
        ),
    ),
    *faults_of(
        "fastopt/rules/shampoo.py",
        "tests/test_matrices.py -k shampoo",
        ("R += g.T @ g", "R += g.T @ m"),
        ("values **= -exponent", "values **= -0.25"),
        ("(t - 1) % precondition_frequency == 0", "t % precondition_frequency == 0"),
        ("not L_root[0].any()", "False", "tests/test_matrices.py -k late_choice"),
        ("return p - h.lr * v, m, m * m", "return p - h.lr * v, m, v", "tests/test_matrices.py -k late_choice"),
        ("return matrix * math.nan", "pass", "tests/test_matrices.py -k late_choice"),
        ("v = v + g * g", "v = g * g", parity("Shampoo")),
    ),
    *faults_of(
        "fastopt/rules/soap.py",
        "tests/test_matrices.py -k soap",
        ("k = t - 1 if precondition and t > 1 else t", "k = t"),
        ("keep=1.0 if first else", "keep="),
        ("S[...] = S[rows][:, columns]", "S[...] = S[rows]"),
        ("new_QL.T @ (QL @ m @ QR.T) @ new_QR", "m"),
        ("(Q * product).sum(axis=0)", "product.sum(axis=0)"),
        ("turned *= 1.0 - b2", "turned *= 1.0 - b1"),
        ("product *= 1.0 - shampoo_beta", "product *= 1.0 - b2"),
        ("m.fill(0)", "pass", "tests/test_matrices.py -k late_choice"),
        ("return h.keep * p, m, v", "return p, m, v", parity("SOAP")),
    ),
    *faults_of(
        "fastopt/step/matrices.py",
        "tests/test_matrices.py",
        ("bool(callable(flag) or flag)", "bool(not callable(flag) and flag)"),
        ("if kept is not None and kept[name][k].shape == shape:", "if False:"),
        ("max(as_matrix(shape)) <= whole.largest", "as_matrix(shape)[0] < whole.largest"),
        ('f"{t} {path}"', "path"),
        ("                array.fill(0)", "                pass"),
    ),
    *faults_of(
        "fastopt/state.py",
        "tests/test_matrices.py",
        ("views = here.expecting(state).arrays", "views = here.arrays"),
        ("whole.chosen in keep or ", ""),
        (
            "expected = get_backend(here.flat.backend).host, here.expecting(state).arrays",
            "expected = get_backend(here.flat.backend).host, here.arrays",
        ),
        ("                held[name][path] = own\n", "                pass\n"),
    ),
    *faults_of(
        "fastopt/rules/adopt.py",
        parity("ADOPT"),
        ("u = g / (h.eps if root < h.eps else root)", "u = g / (root + h.eps)"),
        ("float(t - 1) ** clip_exp", "float(t) ** clip_exp"),
    ),
    *faults_of(
        "fastopt/rules/adabound.py",
        parity("AdaBound"),
        ("(1.0 + 1.0 / (gamma * t))", "(1.0 + 1.0 / (gamma * t + 1.0))"),
        ("h.lower, h.upper) * m", "h.eps, h.upper) * m"),
    ),
    *faults_of(
        "fastopt/rules/ftrl.py",
        parity("FTRL"),
        ("math.sqrt(initial_accumulator_value) if t == 1 else 0.0", "math.sqrt(initial_accumulator_value)"),
        ("beta + lr * l2, lr * l1,", "beta + l2, lr * l1,"),
        ("z + h.lr * g - (h.start", "z + h.lr * g + (h.start"),
    ),
    *faults_of(
        "fastopt/rules/asgd.py",
        parity("ASGD"),
        ("lambd * lr * (t - 1)", "lambd * lr * t"),
        ("return p, h.old * ax + h.new * p", "return p, ax + h.new * p"),
    ),
    *faults_of(
        "fastopt/rules/prodigy.py",
        parity("Prodigy"),
        ("h.b3 * numbers.numerator + h.relative", "numbers.numerator + h.relative"),
        ("math.sqrt(v) + h.next_d * h.eps", "math.sqrt(v) + h.d * h.eps", "tests/test_implementations.py -k Prodigy"),
        ("1.0 if safeguard_warmup else rate", "rate", "tests/test_implementations.py -k Prodigy"),
        (
            'numbers=("d", "numerator"),\n            over="all"',
            'numbers=("d", "numerator")',
            "tests/test_implementations.py -k Prodigy",
        ),
    ),
    *faults_of(
        "fastopt/rules/mars.py",
        parity("MARS"),
        ("1.0 if sums.square <= 1.0 else 1.0 / math.sqrt(sums.square)", "1.0 / math.sqrt(sums.square)"),
        ("0.0 if t == 1 else gamma", "gamma"),
        ("(math.sqrt(v) + h.eps), m, v, g", "(math.sqrt(v) + h.eps), m, v, c"),
    ),
    *faults_of(
        "fastopt/rules/adam_mini.py",
        parity("AdamMini"),
        ("h.one_minus_b2 * sums.square / size", "h.one_minus_b2 * sums.square"),
        (
            "math.sqrt(v) / h.root + h.eps",
            "(math.sqrt(v) + h.eps) / h.root",
            "tests/test_implementations.py -k AdamMini",
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
            "tests/test_batchnorm.py -k y_is_zero",
        ),
        ("y = ZERO if y < ZERO else y", "y = y if y > ZERO else ZERO", "tests/test_batchnorm.py -k not_a_number"),
        ("return q - s * (s * share)", "return q - s"),
        ("return s * share + center,", "return s * share,"),
        (
            "delta * (n * more / total) * delta",
            "delta * delta",
            SIMULATED + "tests/test_cuda_batchnorm.py -k faults_are_found",
        ),
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
            "(q <= GUARD * squares_about_mean(s, q, share)) & (q <= largest)",
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
        "fastopt/kernels/cuda/kept.py",
        SIMULATED + "tests/test_cuda_streams.py -k sent_on_one_stream",
        ("            stream.wait_event(entry.event)", "            pass"),
        (
            "            key = (device, id(array))",
            "            key = (0, id(array))",
            SIMULATED + "tests/test_cuda_streams.py -k each_device_has_tables",
        ),
        (
            "            if oldest.shared:",
            "            if False:",
            SIMULATED + "tests/test_cuda_streams.py -k several_streams_have_used",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cuda/lines.py",
        SIMULATED + "tests/test_cuda.py -k 'settled_one_after_the_other and rows'",
        ("FOLD(left, right, i, down, across)", "FOLD(left, right, i, down, 1)"),
        ("partials[PAIR * (tile.row_part + first + i)] =", "partials[PAIR * tile.row_part] ="),
        ("totals[N_TOTALS * (line.first + i) + pair] = s", "totals[N_TOTALS * (line.first + i)] = s"),
        ("            stop = together\n", ""),
        ("if N_NUMBERS > 0 and (not GATED or step.proceeds != ZERO):", "if N_NUMBERS > 0:"),
        ("row = element // tile.width", "row = element // tile.columns"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/decisions.py",
        SIMULATED + "tests/test_cuda_streams.py -k slot_is_used_again",
        ("if slot.stream is not stream and not slot.event.done:", "if slot is None:"),
        (
            "            self._slots.put_back(self._slot)",
            "            pass",
            SIMULATED + "tests/test_cuda_streams.py -k nobody_waits_for",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cuda/batchnorm.py",
        SIMULATED + "tests/test_cuda_streams.py -k captured_backward",
        ("            backend.keep(state).room.stream = None", "            pass"),
        (
            "        self._rooms = None\n        return self.stats",
            "        return self.stats",
            SIMULATED + "tests/test_cuda_batchnorm.py -k were_read",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cuda/launcher.py",
        SIMULATED + "tests/test_cuda_streams.py -k 'a_room_is_used_again'",
        ("if room.stream is stream and room.device == device:", "if room.device == device:"),
        ("if room.stream is stream and room.device == device:", "if room.stream is stream:"),
        (
            "            return Room(self._made(), device, None)",
            "            return Room(self._made(), device, stream)",
            SIMULATED + "tests/test_cuda_streams.py -k captured_forward",
        ),
    ),
    *faults_of(
        "fastopt/batchnorm/functional.py",
        SIMULATED + "tests/test_cuda_bad_input.py -k such_a_pass",
        ("        if address < end:\n            return False", "        if address < end:\n            pass"),
        ("address + size <= start or start + length <= address", "address != start"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/backend.py",
        SIMULATED + "tests/test_cuda_bad_input.py -k cupy_would_copy",
        (
            "if array.size and self.address(array) != interface",
            "if not array.size and self.address(array) != interface",
        ),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        SIMULATED + "tests/test_cuda.py -k 'nobody_waits and SGD or unknown_steps'",
        ("            tables[1:] = tables[:-1]", "            tables[:-1] = tables[1:]"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/elementwise.py",
        SIMULATED + "tests/test_cuda.py -k 'elements_left_over or every_rule_with and SGD'",
        ("        c += cuda.gridDim.x\n\n\n# --- the launch", "        c += n\n\n\n# --- the launch"),
        (
            "g = OPAQUE(place.g + G_BYTES * chunk.grad - (first >> G_SHIFT))",
            "g = OPAQUE(place.g + G_BYTES * chunk.start - (first >> G_SHIFT))",
            SIMULATED + "tests/test_cuda_places.py -k gradients_are_elsewhere",
        ),
        (
            "return (*kept, ZERO), ZERO, ZERO",
            "return (*kept, values[-1]), ZERO, ZERO",
            SIMULATED + "tests/test_cuda.py -k 'every_rule_with and SGD'",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cpu/sums.py",
        "tests/test_sums.py -k 'whether_or_not and chunks'",
        ("                if right:\n", "                if not right:\n"),
        ("right = right and in_range(totals[k])", "right = right or in_range(totals[k])"),
        (
            "partials[block, N_TERMS + 2 * k + 1] = rescaled(total, SCALE_DOWN)",
            "partials[block, N_TERMS + 2 * k + 1] = rescaled(total, SCALE_UP)",
            "tests/test_sums.py -k different_magnitudes",
        ),
        (
            "for k in range(N_TOTALS):\n                    total, _",
            "for k in range(N_TERMS):\n                    total, _",
        ),
        ("for i in range(RUN):\n        total =", "for i in range(RUN - 1):\n        total ="),
    ),
    *faults_of(
        "fastopt/kernels/cpu/lines.py",
        "tests/test_sums.py -k 'whether_or_not and tiles'",
        ("            if not right:\n", "            if right:\n"),
        (
            "part, count = tile.column_part, tile.width",
            "part, count = tile.column_part, 1",
            "tests/test_sums.py -k different_magnitudes",
        ),
        ("                    put_values(parts[N_TERMS:], k, scaled)\n", "                    pass\n"),
    ),
    *faults_of(
        "fastopt/kernels/elements.py",
        "tests/test_sums.py -k 'whether_or_not'",
        ("    wide = np.float64(value)\n", "    wide = value\n"),
        ("totals[{scaled + 2 * k + 1}]", "totals[{scaled + 2 * k}]"),
        ("SQUARE({value}, UP), SQUARE({value}, DOWN)", "SQUARE({value}, DOWN), SQUARE({value}, UP)"),
        ("range(len(names))[field] if", "0 if", "tests/test_sums.py -k several_numbers"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/sums.py",
        SIMULATED + "tests/test_cuda.py -k 'beyond_the_squares'",
        ("        if not in_range(squares):\n", "        if in_range(squares):\n"),
        ("known = partials[number // PAIR], number % PAIR", "known = partials[number // PAIR], 0"),
    ),
    *faults_of(
        "fastopt/rule.py",
        "tests/test_sums.py -k 'layerwise or several_numbers'",
        ('more = "" if _takes(self.ratio, 2) else ", size, h"', 'more = ""'),
        ('g = () if _takes(self.apply, len(states) + 3) else ("g",)', "g = ()"),
        ('size = () if _takes(self.scale, 3 + len(numbers)) else ("size",)', "size = ()"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/sums.py",
        SIMULATED + "tests/test_cuda.py -k settled_one_after_the_other",
        ("size += Span(*UNPACK_SPAN(spans, N_SPAN * (together * k + other))).size", "size += 1"),
        ("PACK_VALUES(values, N_VALUES * k,", "PACK_VALUES(values, k,"),
        ("row = N_ROW * (span.place if OWN_ROWS else span.group)\n        line", "row = 0\n        line"),
        ("while k < n // together * count:", "while k < n:"),
        (
            "if N_NUMBERS > 0 and not OVER_ALL and (not GATED or table[row + PROCEEDS] != ZERO):",
            "if N_NUMBERS > 0 and not OVER_ALL:",
        ),
        ("together, made, PAIR * number, totals", "together, made, 0, totals"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/decisions.py",
        SIMULATED + "tests/test_cuda.py -k 'wait or skipped'",
        ("behind = skipped[0] - known", "behind = 0"),
        (
            "norm = factor * math.sqrt(squares)",
            "norm = math.sqrt(squares)",
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
        "fastopt/files.py",
        "tests/test_checkpoint.py",
        ("                temporary.unlink()", "                pass", "tests/test_checkpoint.py -k save_that_fails"),
        (
            "temporary.chmod(stat.S_IMODE(old.st_mode))",
            "pass",
            "tests/test_checkpoint.py -k mode_of_the_old_file",
        ),
    ),
)

TRUST: Sequence[Fault] = (
    *faults_of(
        "fastopt/bare.py",
        "tests/test_memory.py -k bare_updates",
        ("@lru_cache(maxsize=64)", "@lru_cache(maxsize=None)"),
        (
            "    check_apart(dict(zip((*named, *rule.numbers), (*vectors, *numbers), strict=True)), backend)\n",
            "    check_apart(named, backend)\n",
            "tests/test_bad_input.py -k number_of_a_rule",
        ),
    ),
    *faults_of(
        "fastopt/batchnorm/fold.py",
        "tests/test_batchnorm.py -k 'fold or certain or no_statistics'",
        ("if chosen in fitting and others and channels > 1:", "if chosen in fitting and others and channels > 9:"),
        ("if chosen in fitting and others and channels > 1:", "if chosen in fitting and others:"),
        ("repeat(weight.shape[axis - 1] // groups, axis=0)", "repeat(weight.shape[axis - 1] // groups, axis=1)"),
        ("scale.reshape(groups, -1)", "scale.reshape(-1, groups).T"),
        ("others = {*fitting, *fitting_grouped} - {chosen}", "others = {*fitting} - {chosen}"),
        (" and shape[k - 1] % groups == 0]", "]", "tests/test_batchnorm_bad_input.py -k fold"),
    ),
    *faults_of(
        "fastopt/batchnorm/formulas.py",
        "tests/test_batchnorm.py -k stay_finite",
        ("return (mean - mean == 0.0) & (var - var == 0.0)", "return mean - mean == 0.0"),
    ),
    *faults_of(
        "fastopt/batchnorm/functional.py",
        "tests/test_copies.py -k batchnorm_goes_on",
        ("relu=activation is not None, residual=residual)", "relu=False, residual=residual)"),
        (
            '        if not np.isfinite(array).all():\n            raise ValueError(f"{name}: must be finite, got {array[~np.isfinite(array)][0]}")\n    if not (var >= 0.0).all():',
            '        if False:\n            raise ValueError(f"{name}: must be finite, got {array[~np.isfinite(array)][0]}")\n    if not (var >= 0.0).all():',
            "tests/test_batchnorm.py -k 'fold or certain or no_statistics'",
        ),
        (
            'check_axis(axis), scalars.flag("training", training)',
            "check_axis(axis), bool(training)",
            "tests/test_scalars.py -k flags",
        ),
        (
            "                    if array is not None and backend.overlap(written, array):",
            "                    if array is not None and written is array:",
            "tests/test_batchnorm_bad_input.py -k refused_and_changes",
        ),
    ),
    *faults_of(
        "fastopt/batchnorm/layer.py",
        "tests/test_batchnorm.py -k count_of_momentum_none",
        ('self._count = params.get("running_count", self._count)', "self._count = self._count.copy()"),
        (
            "            if self.momentum is None:\n                state.update",
            "            if self.momentum is not None:\n                state.update",
        ),
        ("        check_apart(apart, self._backend)\n", "", "tests/test_batchnorm_bad_input.py -k attached"),
        (
            "            apart |= {key: own[key] for key in set(own) - keys}\n",
            "            pass\n",
            "tests/test_batchnorm_bad_input.py -k attached",
        ),
        (
            'self._count[...] = float(scalars.count("num_batches_tracked", count, 0))',
            "self._count[...] = float(count > 0)",
            "tests/test_batchnorm.py -k 'count_may_be_set or from_one_layer'",
        ),
    ),
    *faults_of(
        "fastopt/checkpoint.py",
        "tests/test_checkpoint.py -k read_back",
        ("replace_file(target, write, check)", "replace_file(target, write)"),
        ("if not wrong and digest != digests[key]:", "if False:"),
        (
            'wrong = "the description" if file.read(len(header)) != header else ""',
            "wrong = file.read(len(header)).decode()[:0]",
        ),
        (
            '            for _, wrong in other_options(document["options"], here, keep):',
            "            for _, wrong in ():",
            "tests/test_checkpoint.py -k only_one_of_them",
        ),
        ("(mine.get(key) == place and", "(key in mine and", "tests/test_checkpoint.py -k taken_for_a_state"),
        ("of_name.keys() <= others:", "True:", "tests/test_checkpoint.py -k end_alike"),
        ("    if not params and paths:", "    if False:", "tests/test_checkpoint.py -k nothing_fits"),
    ),
    *faults_of(
        "fastopt/cli/__init__.py",
        "tests/test_cli_output.py -k standard_output",
        ("if error.errno not in FULL or error.filename is not None:", "if True:"),
        ("        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())", "        pass"),
        ("            sys.stdout.flush()", "            pass"),
    ),
    *faults_of(
        "fastopt/cli/contour.py",
        "tests/test_cli_output.py -k full_disk",
        ('with writing("--plot"):', 'with blame("--plot"):'),
    ),
    *faults_of(
        "fastopt/cli/cache.py",
        "tests/test_cli_cache.py tests/test_cli_info.py -k 'can_only_be_read or cannot_be_written'",
        ("    if not os.access(directory, os.W_OK):", "    if False:"),
        (
            "    except (OSError, RuntimeError) as error:",
            "    except OSError as error:",
            "tests/test_cli_info.py tests/test_cli_cache.py -k 'is_none or exit_code_1'",
        ),
    ),
    *faults_of(
        "fastopt/cli/output.py",
        "tests/test_cli_output.py -k full_disk",
        ("raise typer.Exit(1) from None", "raise typer.Exit(2) from None"),
        ("        write_file(path, text.encode())", "        path.write_bytes(text.encode())"),
        (
            "                if same_file(path, taken):",
            "                if path == taken:",
            "tests/test_cli_output.py -k name_one_file",
        ),
    ),
    *faults_of(
        "fastopt/cli/plots/paths.py",
        "tests/test_cli_output.py -k interrupt_keeps",
        ("    write_file(path, content.getvalue())", "    path.write_bytes(content.getvalue())"),
    ),
    *faults_of(
        "fastopt/cli/plots/style.py",
        "tests/test_cli_output.py -k interrupt_keeps",
        ("    write_file(path, content.getvalue())", "    path.write_bytes(content.getvalue())"),
    ),
    *faults_of(
        "fastopt/cli/resume.py",
        'tests/test_cli_train.py -k "ctrl_c"',
        ('["progress"]).epochs\n', '["progress"]).epochs + 1\n'),
    ),
    *faults_of(
        "fastopt/cli/runs.py",
        "tests/test_cli_output.py -k full_disk",
        ('with writing("--checkpoint"):', 'with blame("--checkpoint"):'),
    ),
    *faults_of(
        "fastopt/cli/train.py",
        'tests/test_cli_train.py -k "first_epoch_keeps"',
        (
            ', "--checkpoint": checkpoint, **second}',
            ', "--checkpoint": checkpoint}',
            "tests/test_cli_output.py -k second_checkpoint",
        ),
        (', "--checkpoint": checkpoint, **second}', ", **second}", "tests/test_cli_output.py -k name_one_file"),
        ("raise typer.Exit(INTERRUPTED) from None", "raise typer.Exit(1) from None"),
        ("if not kept:", "if False:"),
    ),
    *faults_of(
        "fastopt/curvature.py",
        "tests/test_curvature.py -k do_not_hide",
        ("LONGEST = 0.05", "LONGEST = 1e-8"),
        (
            "ROUNDED, ROUNDING, REFUSED = 1e-3, 1e-5, 1e-2",
            "ROUNDED, ROUNDING, REFUSED = 1e-1, 1e-5, 1e-2",
            "tests/test_curvature.py -k 'do_not_hide or or_an_error'",
        ),
        (
            "ROUNDED, ROUNDING, REFUSED = 1e-3, 1e-5, 1e-2",
            "ROUNDED, ROUNDING, REFUSED = 1e-3, 1e-5, 1e9",
            "tests/test_curvature.py -k 'or_an_error or lost'",
        ),
        (
            "REFUSED * length if length > 0.0 else FLAT * distance",
            "REFUSED * length if length > 0.0 else rounding",
            "tests/test_curvature.py -k lost",
        ),
        ("FLAT = 1e-3", "FLAT = 1e-12", "tests/test_curvature.py -k constant_gradient"),
        ("if length > 0.0 else 1000.0))", "if length > 0.0 else 1.0001))", "tests/test_curvature.py -k longer_step"),
        (
            "float(moved / distance @ change) / distance",
            "float(moved @ change) / float(moved @ moved)",
            "tests/test_curvature.py -k large_parameters",
        ),
        (
            "scale = max(1.0, norm_of_array(centre))",
            "scale = max(1.0, float(np.linalg.norm(centre)))",
            "tests/test_curvature.py -k large_parameters",
        ),
        ("rounding = epsilon * norm_of_array(gradient_after)", "rounding = 0.0 * norm_of_array(gradient_after)"),
    ),
    *faults_of(
        "fastopt/files.py",
        "tests/test_files.py -k failure_leaves",
        ("            os.fsync(file.fileno())\n", ""),
        (
            "        os.replace(temporary, target)  # noqa: PTH105 what a test makes fail",
            "        target.write_bytes(temporary.read_bytes()); temporary.unlink()",
        ),
        (
            "if os.path.realpath(one) == os.path.realpath(other):",
            "if one == other:",
            "tests/test_files.py -k two_names",
        ),
        ("return one.samefile(other)", "return False", "tests/test_files.py -k two_names"),
        ("(path.exists() and not path.is_file() and not path.is_dir())", "False", "tests/test_files.py -k directly"),
        ("str(path).startswith(OPEN_FILES)", "False", "tests/test_files.py -k directly"),
        (
            "                temporary.chmod(stat.S_IMODE(old.st_mode))",
            "                pass",
            "tests/test_files.py -k modes",
        ),
        ("with deferred_signals:  # a file", "if True:  # a file", "tests/test_interrupts.py -k old_or_the_new"),
    ),
    *faults_of(
        "fastopt/interop/core.py",
        "tests/test_interop.py -k position",
        ("with opt._running.gate.take(function.__name__):", "if True:", "tests/test_checkpoint.py -k first_look"),
        ("and not issubclass(parting.type, OrderedDict):", "and issubclass(parting.type, OrderedDict):"),
        ("if isinstance(parting, optree.MappingEntry) and not issubclass", "if not issubclass"),
        (
            "        last[shape] = k\n",
            "        last.setdefault(shape, k)\n",
            "tests/test_interop.py -k told_from_the_one_before",
        ),
    ),
    *faults_of(
        "fastopt/interop/keras.py",
        "tests/test_interop.py -k position",
        ("    if order is None and form.blocks:\n", "    if order is None and not form.blocks:\n"),
    ),
    *faults_of(
        "fastopt/interop/torch.py",
        "tests/test_interop.py -k position",
        ("positions_matter = bool(form.states) or len(groups) > 1", "positions_matter = bool(form.states)"),
        ("bool(form.states) or len(groups) > 1", "True"),
    ),
    *faults_of(
        "fastopt/kernels/__init__.py",
        "tests/test_copies.py -k 'everything_public or batchnorm'",
        ("                copyreg.pickle(type(backend), _by_name)\n", ""),
    ),
    *faults_of(
        "fastopt/kernels/cache.py",
        "tests/test_cache.py",
        ("    if name not in _reported:", "    if True:", "tests/test_cache.py -k one_warning"),
        (
            "    except SharedCacheError as error:\n        if os.environ.get(VARIABLE):\n            raise\n",
            "    except SharedCacheError as error:\n",
            "tests/test_cache.py -k is_refused",
        ),
        (
            "        if os.environ.get(VARIABLE):\n            raise\n        _go_on_without(error)",
            "        if os.environ.get(VARIABLE):\n            raise",
            "tests/test_cache.py -k nobody_named",
        ),
        ("            raise SharedCacheError(", "            raise OSError(", "tests/test_cache.py -k is_refused"),
        (
            "    except (OSError, RuntimeError) as error:\n        _go_on_without(error)",
            "    except OSError as error:\n        _go_on_without(error)",
            "tests/test_cache.py -k cannot_be_made",
        ),
        (
            "    except Exception as error:  # numba and pickle fail with errors of many types\n        _go_on_without(error)",
            "    except Exception as error:  # numba and pickle fail with errors of many types\n        pass",
            "tests/test_cache.py -k one_warning",
        ),
        (
            "    if content[:head] != MAGIC + hashlib.sha256(body).digest():",
            "    if content[:head] == b'':",
            "tests/test_cache.py -k 'damaged_kernel'",
        ),
        (
            "    except Exception:  # of a module",
            "    except OSError:  # of a module",
            "tests/test_cache.py -k numba_cannot_read",
        ),
        ("status.st_uid not in (os.getuid(), 0)", "status.st_uid is None", "tests/test_cache.py -k somebody_else"),
        ("        shrink(folder)\n", "        pass\n", "tests/test_cache.py -k 'bound_is_kept or is_killed'"),
        ("key=lambda file: (-file.used", "key=lambda file: (file.used", "tests/test_cache.py -k bound_is_kept"),
        ("            os.utime(path)\n", "            pass\n", "tests/test_cache.py -k counts_as_new"),
        ("time.time() - path.stat().st_mtime > STALE", "True", "tests/test_cache.py -k is_killed"),
        ("        temporary.write_bytes(", "        (folder / name).write_bytes(", "tests/test_cache.py -k is_killed"),
        ('f"{_machine()}|{label}|{signature}|', 'f"{_machine()}|{label}|', "tests/test_cache.py -k are_in_the_name"),
        ('f"{_machine()}|{label}|', 'f"{label}|', "tests/test_cache.py -k is_in_the_name"),
        ("sorted(value) if isinstance(value, set) else value", "value", "tests/test_cache.py -k are_in_the_name"),
    ),
    *faults_of(
        "fastopt/kernels/bind.py",
        "tests/test_cache.py",
        ("        if check is not None:\n            check()\n", "", "tests/test_cache.py -k refused_again"),
        ("        self._told = True\n", "", "tests/test_cache.py -k told_once"),
        ("or not sys.stderr.isatty()", "", "tests/test_cache.py -k nobody_is_told"),
    ),
    *faults_of(
        "fastopt/kernels/contract.py",
        "tests/test_tail.py -k whole_range",
        ("return (total >= SMALLEST_SUM) & (total - total == 0.0)", "return total - total == 0.0"),
        ("return (total >= SMALLEST_SUM) & (total - total == 0.0)", "return total >= SMALLEST_SUM"),
        (
            "SCALE_UP, SCALE_DOWN = 2.0**600, 2.0**-600",
            "SCALE_UP, SCALE_DOWN = 2.0**440, 2.0**-440",
            "tests/test_tail.py -k 'whole_range or power_of_2'",
        ),
        ("    return total * scale * scale\n", "    return total * scale\n", "tests/test_tail.py -k all_magnitudes"),
        ("return math.sqrt(up) * SCALE_DOWN", "return math.sqrt(up) * SCALE_UP"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/batchnorm.py",
        "tests/test_batchnorm.py -k momentum_none_averages",
        ("                count[0] += 1\n", "                count[0] += 2\n"),
        ("1.0 / (float(count[0]) + 1.0)", "1.0 / (float(count[0]) + 2.0)"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/batchnorm_loops.py",
        "tests/test_batchnorm.py -k one_bad_value",
        ("if recordable < channels:", "if recordable == 0:"),
        ("    if pointer(np.int64, workspace.unrecordable, 0)[0] != 0:\n        return -1\n", ""),
        ("        words[k] = 0\n", "        words[k] = 1\n", "tests/test_batchnorm.py"),
        ("if TRAINING or arrays.y != arrays.x:", "if arrays.y != arrays.x:", "tests/test_batchnorm_bad_input.py"),
        (
            "        if arrays.y != arrays.residual:\n            return REFUSED\n",
            "",
            "tests/test_batchnorm_bad_input.py",
        ),
        (
            "    for vector in (arrays.gamma, arrays.beta, mean, var):",
            "    for vector in (arrays.gamma, arrays.beta, mean):",
            "tests/test_batchnorm_bad_input.py",
        ),
        ("clash = OVERLAP(mean, channels, var, channels)", "clash = False", "tests/test_batchnorm_bad_input.py"),
        (" & (variances[c] >= ZERO)", "", "tests/test_batchnorm_bad_input.py"),
        ("(variances[c] - variances[c] == ZERO) & ", "", "tests/test_batchnorm_bad_input.py"),
        (
            "            if arrays.dx != array:\n                return REFUSED\n",
            "",
            "tests/test_batchnorm_bad_input.py",
        ),
        (
            "clash = OVERLAP(arrays.dgamma, channels, arrays.dbeta, channels)",
            "clash = False",
            "tests/test_batchnorm_bad_input.py",
        ),
        (
            "for array in (arrays.x, arrays.dy, arrays.y, arrays.dx):",
            "for array in (arrays.x, arrays.y, arrays.dx):",
            "tests/test_batchnorm_bad_input.py",
        ),
        ("            invoke(fixed.wide_sum_loop, arguments)\n", "", "tests/test_batchnorm.py"),
        (
            "                pointer(np.int64, workspace.waiting, t % fixed.groups)[0] = 1\n",
            "",
            "tests/test_batchnorm.py",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cpu/batchnorm_tiles.py",
        "tests/test_memory.py -k bare_updates",
        ("@lru_cache(maxsize=256)", "@lru_cache(maxsize=None)"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/elementwise.py",
        'tests/test_interrupts.py -k "raises and serial and grads"',
        ("    table[0, PROCEEDS] = ZERO\n", ""),
    ),
    *faults_of(
        "fastopt/kernels/cpu/norms.py",
        'tests/test_tail.py -k "equal_separate_passes"',
        ("    weight[1] = DTYPE(1)\n", ""),
        (
            "                up += scaled_square(value, SCALE_UP)\n",
            "                up += scaled_square(x[i], SCALE_UP)\n",
            "tests/test_tail.py -k all_magnitudes",
        ),
        (
            "        if not in_range(total):\n",
            "        if False:\n",
            "tests/test_tail.py -k whole_range",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cuda/backend.py",
        "NUMBA_ENABLE_CUDASIM=1 tests/test_cuda.py -k without_any_gradient",
        ("last = np.append(first, len(lines))[1:] - 1", "last = np.append(first[1:], len(lines)) - 1"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/batchnorm.py",
        SIMULATED + "tests/test_cuda_batchnorm.py -k 'one_bad_value and two'",
        ("if not cuda.syncthreads_or(unrecordable):", "if cuda.syncthreads_or(1):"),
        ("weight = 1.0 / (float64(count[0]) + 1.0)", "weight = 1.0 / (float64(count[0]) + 2.0)"),
        ("            count[0] += 1\n", "            count[0] += 2\n"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/decisions.py",
        SIMULATED + "tests/test_cuda.py -k 'whole_range and 1e+200'",
        ("        if not in_range(squares):\n", "        if in_range(squares):\n"),
    ),
    *faults_of(
        "bench/gpu.py",
        SIMULATED + "tests/test_cuda_bench.py -k kept_on_the_device",
        ("functional.KINDS.clear()  # which", "pass  # which"),
        ('kernels._made.pop("cuda", None)', 'kernels._made.get("cuda", None)'),
    ),
    *faults_of(
        "bench/on_gpu.sh",
        "tests/test_on_gpu.py -k 'too_long or beside or missing'",
        ('timeout --kill-after=5 "$limit" "$@"', '"$@"'),
        ('"$python" bench/gpu.py --json "$out/gpu.json"\n', '"$python" bench/gpu.py --json "$out/gpu.json" &\n'),
        ('if [ -n "$lacking" ]; then', 'if [ -z "$lacking" ]; then'),
    ),
    *faults_of(
        "fastopt/kernels/cuda/norms.py",
        SIMULATED + "tests/test_cuda.py -k 'whole_range and 1e+200'",
        ("LEAVE_SUMS(above, below, s, t, partials, at + 2)", "LEAVE_SUMS(below, above, t, s, partials, at + 2)"),
    ),
    *faults_of(
        "fastopt/kernels/driver.py",
        'tests/test_interrupts.py -k "raises and executor and step"',
        ("with deferred_signals:\n            submit", "if True:\n            submit"),
    ),
    *faults_of(
        "fastopt/kernels/elements.py",
        "tests/test_tail.py -k all_magnitudes",
        ('    "fastmath": False,\n', ""),
        ('"forceinline": True', '"forceinline": False', "tests/test_math.py -k 'vectorised and pow_of'"),
    ),
    *faults_of(
        "fastopt/optimizer.py",
        "tests/test_state.py -k 'states_and_the_average and at_once'",
        ("        pipeline.begin(show=True)\n", ""),
        ("        pipeline.keep_written()\n", "", "tests/test_state.py -k what_the_caller_writes"),
        (
            "if context is not None and not hasattr(type(self), context):",
            'if context is not None and not hasattr(type(self), "step"):',
            "tests/test_optimizer.py -k 'context_that'",
        ),
        ("if name not in SHARED})", 'if name == "_pipeline"})', "tests/test_copies.py -k subclass_keeps"),
        (
            '            view = self.__dict__["_groups"] = GroupsView(self._running)',
            '            view = self.__dict__["_groups"] = GroupsView(self._running)\n            self._running.owner = self  # type: ignore[attr-defined]',
            "tests/test_memory.py -k 'freed and with_groups'",
        ),
        ("            if gate.taken:\n                gate.wait()\n", "", "tests/test_checkpoint.py -k for_a_save"),
        ('with self._running.gate.take("state_dict"):', "if True:", "tests/test_checkpoint.py -k first_look"),
        (
            'with pipeline.gate.take("restore"), deferred_signals:',
            "with deferred_signals:",
            "tests/test_checkpoint.py -k uses_the_state",
        ),
    ),
    *faults_of(
        "fastopt/optimizers/ademamix.py",
        "tests/test_interop.py -k AdEMAMix-optax",
        ('{"alpha": 5.0}', "{}"),
    ),
    *faults_of(
        "fastopt/optimizers/lamb.py",
        "tests/test_interop.py -k decoupled_in_all",
        ('"keras": {"eps": 1e-7, "weight_decay": NONE}', '"keras": {"eps": 1e-7, "weight_decay": 0.0}'),
    ),
    *faults_of(
        "fastopt/optimizers/muon.py",
        "tests/test_rule_kinds.py -k muon_without",
        (
            'adjust_lr="original" if adjust_lr is None else adjust_lr',
            'adjust_lr="match_rms_adamw" if adjust_lr is None else adjust_lr',
        ),
    ),
    *faults_of(
        "fastopt/optimizers/novograd.py",
        "tests/test_interop.py -k NovoGrad-optax",
        ('"betas": (0.9, 0.25), "eps": 1e-6', '"betas": (0.9, 0.25)'),
    ),
    *faults_of(
        "fastopt/optimizers/sgd.py",
        "tests/test_interop.py -k SGD-keras",
        ("((plain and not lr_inside) or", "(plain or"),
    ),
    *faults_of(
        "fastopt/optimizers/yogi.py",
        "tests/test_interop.py -k Yogi-optax",
        ('{"initial_momentum": 1e-6}', "{}"),
    ),
    *faults_of(
        "fastopt/rule.py",
        "tests/test_copies.py -k pickled_by_name",
        (
            "                gradients_in=self.gradients_in,\n",
            "",
            "tests/test_optimizer.py -k 'context_that_this_one_lacks'",
        ),
        (
            "            return Rule.decaying, (self._plain, self.decoupled)\n",
            "            return Rule.decaying, (self._plain, not self.decoupled)\n",
        ),
        ("self._twin._twin = self._twin._plain = self", "self._twin._twin = self"),
        (
            "        if dtype is not None and name in EPS:",
            '        if dtype is not None and name == "eps":',
            "tests/test_scalars.py -k eps",
        ),
    ),
    *faults_of(
        "fastopt/rules/adan.py",
        "tests/test_interop.py -k Adan-optax",
        ('    ahead = b2 if form == "paper" else 1.0 - b2\n', "    ahead = b2\n"),
        ("        root * root * eps_root,\n", "        eps_root,\n"),
    ),
    *faults_of(
        "fastopt/rules/muon.py",
        "tests/test_tail.py -k beyond_the_squares",
        ("scale = 2.0 ** (math.frexp(float(abs(wide).max()))[1] - 1)", "scale = 1.0"),
        (
            "Interval(1.0, 100.0, open=True, whole=True)",
            "Interval(1.0, 100.0, whole=True)",
            "tests/test_rule_kinds.py -k what_torch",
        ),
        (
            "Interval(1.0, 100.0, open=True, whole=True)",
            "Interval(1.0, 100.0, open=True)",
            "tests/test_rule_kinds.py -k every_door",
        ),
    ),
    *faults_of(
        "fastopt/rules/nesterov.py",
        "tests/test_optimizer.py -k 'ahead or looked or context_that'",
        (', gradients_in="lookahead"', ""),
    ),
    *faults_of(
        "fastopt/rules/radam.py",
        "tests/test_interop.py -k RAdam-optax",
        ("        eps = eps if eps_hat else math.sqrt(bc2) * eps\n", ""),
    ),
    *faults_of(
        "fastopt/rules/rprop.py",
        "tests/test_rule_kinds.py -k what_torch",
        (
            "Pair(Interval(0.0, 1.0, open=True, open_low=True), Interval(1.0, open_low=True))",
            "Pair(Interval(0.0, 1.0, open=True), Interval(1.0, open_low=True))",
        ),
        ("ascending=True", "ascending=False", "tests/test_rule_kinds.py -k every_door"),
    ),
    *faults_of(
        "fastopt/rules/schedule_free_adamw.py",
        "tests/test_interop.py -k ScheduleFreeAdamW-optax",
        ('        late = 1 if form == "optax" else 0', "        late = 0"),
        (
            '        averaged = warmup_steps if form == "optax" else 0.0\n',
            "        averaged = warmup_steps\n",
            "tests/test_interop.py -k ScheduleFreeAdamW-keras",
        ),
        ("weight_decay / root\n", "weight_decay\n"),
    ),
    *faults_of(
        "fastopt/rules/sgd.py",
        "tests/test_rule_kinds.py -k every_door",
        ('domains={"dampening": NONE}', "domains={}"),
    ),
    *faults_of(
        "fastopt/scalars.py",
        "tests/test_scalars.py -k no_number",
        (
            "    if isinstance(value, bool):\n        return None\n    if isinstance(value, Integral)",
            "    if isinstance(value, Integral)",
        ),
        ("    if type(value) in PLAIN or is_masked(value):", "    if type(value) in PLAIN:"),
        ('if getattr(value, "shape", None) != ():', 'if getattr(value, "shape", None) not in ((), (1,)):'),
        ("    if found < least:", "    if found < least - 1:", "tests/test_bad_input.py -k bare_arrays"),
        (
            "    if not isinstance(found, bool):\n",
            "    if not isinstance(found, bool | int):\n",
            "tests/test_scalars.py -k no_flags",
        ),
        (
            "    if eps != 0.0 and dtype.type(eps) == 0.0:",
            "    if eps != 0.0 and float(eps) == 0.0:",
            "tests/test_scalars.py -k eps",
        ),
        (
            "    if not dtype.isnative:\n        return repr(dtype.str)\n",
            "",
            "tests/test_door.py -k gradients_that_are_refused",
        ),
        ("isinstance(held, bool | str | bytes | complex)", "isinstance(held, str | bytes | complex)"),
    ),
    *faults_of(
        "fastopt/schedules.py",
        "tests/test_scalars.py -k part_of_a_schedule",
        ('scalars.number(f"schedule at step {step}", part(step))', "float(part(step))"),
    ),
    *faults_of(
        "fastopt/signals.py",
        'tests/test_interrupts.py -k "end_of_the_outermost"',
        ("            self._held[number] = frame", "            pass"),
        ("        if self._depth > 1:\n            self._depth -= 1\n            return\n", ""),
        ("if self._replaced:  # the handler", "if False:  # the handler", 'tests/test_interrupts.py -k "no_moment"'),
        (
            "            self.__exit__()\n            raise",
            "            raise",
            'tests/test_interrupts.py -k "no_moment"',
        ),
        (
            "            finally:\n                self._handle_held()",
            "            finally:\n                self._held.clear()",
            'tests/test_interrupts.py -k "one_of_them_raises"',
        ),
        ("if _signal.getsignal(number) == self._hold:", "if True:", 'tests/test_interrupts.py -k "block_sets_stays"'),
        (
            "if self._depth and threading.get_ident() != self._thread:",
            "if self._depth and threading.get_ident() == self._thread:",
            'tests/test_interrupts.py -k "forked_child"',
        ),
        (
            "        if threading.get_ident() != threading.main_thread().ident:\n            return\n        try:\n            self._depth",
            "        try:\n            self._depth",
            'tests/test_interrupts.py -k "other_threads"',
        ),
    ),
    *faults_of(
        "fastopt/state.py",
        "tests/test_checkpoint.py -k unless_it",
        ('FREE = ("zero_grad", "grad_norm")', 'FREE = ("zero_grad", "grad_norm", "max_norm")'),
        ('ADDRESS.sub("", text) != ADDRESS.sub("", repr(present))', "False"),
        (
            'ADDRESS.sub("", text) != ADDRESS.sub("", repr(present))',
            "text != repr(present)",
            "tests/test_checkpoint.py -k same_function",
        ),
        (
            "structure = name == EMA and None in (mine, theirs)",
            "structure = False",
            "tests/test_checkpoint.py -k only_one_of_them",
        ),
        ("            change.pop(name, None)\n", "            pass\n", "tests/test_checkpoint.py -k keep_leaves"),
        ("overrides.setdefault(path, {})[name] = change[name]", "pass", "tests/test_checkpoint.py -k keep_leaves"),
        (
            'reason = wrong[name] or (partial if name != EMA else "")',
            "reason = wrong[name]",
            "tests/test_checkpoint.py -k one_place",
        ),
        (
            "        if partial:\n            count = np.maximum",
            "        if False:\n            count = np.maximum",
            "tests/test_checkpoint.py -k after_add",
        ),
        (
            'foreign = other if set(names) != set(state["state"]) else ""',
            'foreign = ""',
            "tests/test_checkpoint.py -k anew",
        ),
        (
            "begins_at_params = name == EMA or here.rule",
            "begins_at_params = here.rule",
            "tests/test_checkpoint.py -k average_that_is_new",
        ),
        (
            'begins_at_params = name == EMA or here.rule.initial.get(name) == "p"',
            "begins_at_params = name == EMA",
            "tests/test_checkpoint.py -k begin_at_the_parameters",
        ),
        (
            'fitted |= {"rule": here.rule.name, "hyper": own, "overrides": changes}',
            'fitted |= {"rule": here.rule.name, "hyper": {**own, **{k: v for k, v in hyper.items() if k in own}}, "overrides": changes}',
            "tests/test_checkpoint.py -k adamw_goes",
        ),
        ('        scalars.refuse_masked(f"state: {name}[{path!r}]", array)\n', "", "tests/test_scalars.py -k masked"),
        (
            "                restored.setdefault(name, rule.defaults[name])",
            "                restored.setdefault(name, values[name])",
            "tests/test_rule_kinds.py -k before_a_form",
        ),
    ),
    *faults_of(
        "fastopt/step/born.py",
        "tests/test_state.py -k what_the_caller_writes",
        (
            "                    self.shown[key] = None\n                    continue\n",
            "                    self.shown[key] = None\n",
        ),
        (
            "                if show or key in self.shown:\n",
            "                if show:\n",
            "tests/test_state.py -k shown_and_not_written",
        ),
        ("self.names = (*self.names, EMA)", "self.names = self.names", "tests/test_state.py -k test_the_average_and_z"),
    ),
    *faults_of(
        "fastopt/step/device.py",
        "NUMBA_ENABLE_CUDASIM=1 tests/test_cuda.py -k 'unknown_steps'",
        ("            self.skipped += skip\n", "            pass\n"),
        ("self.known_skips - known)", "self.known_skips)", "NUMBA_ENABLE_CUDASIM=1 tests/test_cuda.py -k 'outlive'"),
        (
            "        if not self.in_flight:\n            self.nonfinite = nonfinite\n",
            "",
            "NUMBA_ENABLE_CUDASIM=1 tests/test_cuda.py -k 'outlive or unknown_steps'",
        ),
        (
            " and options.clip_norm_per_tensor is None",
            "",
            "NUMBA_ENABLE_CUDASIM=1 tests/test_cuda.py -k 'clipped_by_its_own and SGD'",
        ),
        (
            "        if self.options.clip_norm_per_tensor is not None:\n            raise",
            "        if self.options.clip_norm_per_tensor == 0.0:\n            raise",
            "NUMBA_ENABLE_CUDASIM=1 tests/test_cuda.py -k captured_or_replayed",
        ),
    ),
    *faults_of(
        "fastopt/step/gate.py",
        "tests/test_checkpoint.py -k for_a_save",
        ("while self.stepping in sys._current_frames():", "while False:", "tests/test_checkpoint.py -k one_moment"),
        ("            self.taken = True\n", "            self.taken = False\n"),
        ("if gate.taken and outer != thread:", "if False:"),
        ("if self._process != os.getpid():", "if False:", "tests/test_checkpoint.py -k fork"),
        (
            "        with self._own_lock():\n            self.stepping = thread",
            "        if True:\n            self.stepping = thread",
        ),
    ),
    *faults_of(
        "fastopt/step/groups.py",
        "tests/test_memory.py -k globs",
        ("                if len(self._by_glob) >= MOST_UNIONS:\n                    self._by_glob.clear()\n", ""),
        (
            "            if len(self._unions) == MOST_UNIONS:\n                self._unions.clear()\n",
            "",
            "tests/test_memory.py -k 'bare_updates or globs'",
        ),
        (
            "with deferred_signals:\n            for number in sorted",
            "if True:\n            for number in sorted",
            'tests/test_interrupts.py -k "raises and serial and without and some"',
        ),
        (
            "                self._assign(name, before)",
            "                pass",
            'tests/test_interrupts.py -k "raises and serial and lr"',
        ),
        (
            "with deferred_signals:\n            self.changes_made += 1\n            for group in self._union",
            "if True:\n            self.changes_made += 1\n            for group in self._union",
            'tests/test_interrupts.py -k "raises and serial and decay and some"',
        ),
        (
            "with deferred_signals:\n            for group in self._union",
            "if True:\n            for group in self._union",
            'tests/test_interrupts.py -k "raises and serial and released"',
        ),
        (
            "values[name](step), where, self.dtype, self.networks)",
            "values[name](step), where, None, self.networks)",
            "tests/test_scalars.py -k eps",
        ),
    ),
    *faults_of(
        "fastopt/step/norms.py",
        "tests/test_tail.py -k each_float64_gradient",
        (
            "root_of_squares(total, _summed(partials, 2), _summed(partials, 3))",
            "root_of_squares(total, _summed(partials, 3), _summed(partials, 2))",
            "tests/test_tail.py -k whole_range",
        ),
        (
            "sums = np.add.reduceat(partials[:, :4], chunks[first, LINE], axis=0)",
            "sums = partials[chunks[first, LINE], :4]",
            "tests/test_tail.py -k every_way_of_a_step",
        ),
        (
            "for k in np.flatnonzero(~in_range(sums[:, 0])).tolist():",
            "for k in np.flatnonzero(np.isinf(sums[:, 0])).tolist():",
        ),
        ("root_of_squares(sums[k, 0], sums[k, 2], sums[k, 3])", "root_of_squares(sums[k, 0], sums[k, 3], sums[k, 2])"),
    ),
    *faults_of(
        "fastopt/step/options.py",
        "tests/test_interop.py -k clipping_per_tensor",
        ("limit / np.maximum(norms, limit))", "limit / (norms + 1e-6))"),
        (
            "limit / np.maximum(norms, limit))",
            "limit / np.fmax(norms, limit))",
            "tests/test_tail.py -k does_not_reach_the_others",
        ),
        (
            "        if max_norm is not None and clip_norm_per_tensor is not None:\n",
            "        if max_norm is None and clip_norm_per_tensor is not None and clip_norm_per_tensor < 0:\n",
            "tests/test_tail.py -k bad_options",
        ),
        (
            'positive("clip_norm_per_tensor", clip_norm_per_tensor)',
            "float(clip_norm_per_tensor)",
            "tests/test_tail.py -k bad_options",
        ),
        (
            "return self.max_norm is not None or self.clip_norm_per_tensor is not None",
            "return self.max_norm is not None",
        ),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        "tests/test_optimizer.py -k 'ahead or looked'",
        (
            "        if self.born.waiting:\n            self.begin(present)\n        if device is not None:\n            return self._step_on_device",
            "        if device is not None:\n            return self._step_on_device",
            "tests/test_state.py -k 'test_the_average_and_z or states_and_the_average'",
        ),
        (
            "                found = [k for k in found if present[k]]\n",
            "                found = [k for k in found if not present[k]]\n",
            "tests/test_state.py -k 'states_and_the_average and at_once'",
        ),
        (
            "if missed == self.steps]",
            "if missed < self.steps]",
            "tests/test_state.py -k 'test_what_has_begun or test_the_average_and_z'",
        ),
        (
            "        self.collect()\n        if self.born.waiting:\n            self.begin(present)\n",
            "        self.collect()\n",
            "tests/test_state.py -k test_rows_begin",
        ),
        (
            "        self.born.shown.clear()\n        self.born.wait(len(self.flat.paths))\n        if self.device",
            "        self.born.shown.clear()\n        if self.device",
            "tests/test_state.py -k goes_back",
        ),
        (
            "(name == LR_SCALE or name in self.rule.initial.values())",
            "name in self.rule.initial.values()",
            "tests/test_state.py -k hyperparameter",
        ),
        (
            "        self.groups.release(members, name)\n        self._begin_again(name)\n",
            "        self.groups.release(members, name)\n",
            "tests/test_state.py -k hyperparameter",
        ),
        (
            "            self.groups.regroup(self.groups.changes, [0] * len(self.flat.paths))\n",
            "            pass\n",
            "tests/test_state.py -k restart",
        ),
        (
            "self.steps, self.nonfinite, self.pending, self.entered_at = 0, self._no_steps(), None, -1",
            "self.steps, self.nonfinite, self.entered_at = 0, self._no_steps(), -1",
            "tests/test_state.py -k restart",
        ),
        ("                self.entered_at = self.steps\n", "                pass\n"),
        ("        if 0 < self.steps != self.entered_at:", "        if self.steps != self.entered_at:"),
        ("            self.gradients_in = None\n", ""),
        (
            "        if self.gradients_in:\n            self._check_context()\n        if self.watched",
            "        if self.watched",
        ),
        (
            "        if self.gradients_in:\n            self._check_context()\n        if self.device is not None:\n",
            "        if self.device is not None:\n",
        ),
        ("            if context == self.gradients_in:\n", "            if context != self.gradients_in:\n"),
        ('        self.refuse_while_held("deepcopy")\n', "", "tests/test_copies.py -k inside_a_context"),
        (
            '            self.refuse_while_held("pickle")\n',
            "            pass\n",
            "tests/test_copies.py -k inside_a_context",
        ),
        (
            '        self.groups.regroup(self.groups.changes, state["missed"])\n',
            "",
            "tests/test_copies.py -k 'same_point and AdamW'",
        ),
        (
            '("pending", "born", "gradients_in", "entered_at")',
            '("born", "gradients_in", "entered_at")',
            "tests/test_copies.py -k 'same_point and AdamW'",
        ),
        ("        twin.born = copy.deepcopy(self.born)\n", "", "tests/test_copies.py -k 'before_its_first_step'"),
        (
            "self.entered_at = 0, self._no_steps(), None, -1",
            "self.entered_at = 0, self._no_steps(), None, self.entered_at",
        ),
        ("        self.steps = steps\n        self.entered_at = -1\n", "        self.steps = steps\n"),
        ("    @through_gate\n    def step_rows(", "    def step_rows(", "tests/test_checkpoint.py -k uses_the_state"),
        ("    @through_gate\n    def _override(", "    def _override(", "tests/test_checkpoint.py -k uses_the_state"),
        ("    @through_gate\n    def update(", "    def update(", "tests/test_checkpoint.py -k update_waits"),
        ("with self.gate.take(context):", "if True:", "tests/test_checkpoint.py -k uses_the_state"),
        (
            "if table[0, PROCEEDS] == 0.0:",
            "if table[0, PROCEEDS] != 0.0:",
            'tests/test_interrupts.py -k "raises and serial and grads"',
        ),
        (
            "self.steps + 1, None, nonfinite\n            raise",
            "self.steps + 1, None, self.nonfinite\n            raise",
            'tests/test_interrupts.py -k "raises and serial and after and skipped and one"',
        ),
        (
            "self.steps + 1, None, nonfinite\n            raise",
            "self.steps + 1, self.pending, nonfinite\n            raise",
            'tests/test_interrupts.py -k "raises and serial and after and accumulate and not some"',
        ),
        (
            "        finally:  # also after an exception of a signal's handler, as in `step`\n            if factor[1] != 0.0:\n                pending.present |= present\n                pending.weight += weight\n                self.pending = pending\n",
            "        finally:\n            pass\n        if factor[1] != 0.0:\n            pending.present |= present\n            pending.weight += weight\n            self.pending = pending\n",
            'tests/test_interrupts.py -k "raises and serial and accumulate and more"',
        ),
        (
            "with deferred_signals:\n                self._put(further)\n                self._transform(plan",
            "if True:\n                self._put(further)\n                self._transform(plan",
            'tests/test_interrupts.py -k "raises and serial and Muon"',
        ),
        (
            "if self.several or present is not None:",
            "if self.several:",
            'tests/test_optimizer.py -k "without_gradient_is_as_if"',
        ),
        (
            "with deferred_signals:\n            if len(chunks):",
            "if True:\n            if len(chunks):",
            'tests/test_interrupts.py -k "raises and serial and step_rows"',
        ),
        (
            "if self.held:  # an interrupt came",
            "if False:  # an interrupt came",
            'tests/test_interrupts.py -k "raises and serial and swap_ema"',
        ),
        (
            "with deferred_signals:\n            for own, array in zip(self._parameters(), backup, strict=True):",
            "if True:\n            for own, array in zip(self._parameters(), backup, strict=True):",
            'tests/test_interrupts.py -k "second_interrupt"',
        ),
        (
            "with deferred_signals:\n                self.flat.zero_grad()",
            "if True:\n                self.flat.zero_grad()",
            'tests/test_interrupts.py -k "raises and serial and zero_grad"',
        ),
        (
            "places, kept = self._places_of_sums()",
            "places, kept = self.flat.places, None",
            "tests/test_tail.py -k written_into_opt_grads",
        ),
        (
            "places = flat.split.places(self._places_of_sums()[0][:, 1], given.places[:, 1])",
            "places = flat.split.places(flat.places[:, 1], given.places[:, 1])",
            "tests/test_batchnorm.py -k attached_layer_are_accumulated",
        ),
        (
            "            twin.sums[...] = self.sums\n",
            "            pass\n",
            "tests/test_tail.py -k accumulated_is_part_of_a_copy",
        ),
        (
            "            twin.sums = twin.flat.new_buffer(twin.flat.compute)\n            twin.sums[...] = self.sums\n",
            "            twin.sums = self.sums\n",
            "tests/test_tail.py -k accumulated_is_part_of_a_copy",
        ),
        (
            "flat, groups, flat.size, None\n",
            "flat, groups, flat.size, self.sums\n",
            "tests/test_groups.py -k added_after_some_were_accumulated",
        ),
        (
            "        self._sums_at: tuple[np.ndarray, list[Any]] | None = None\n",
            '        self._sums_at: Any = self.__dict__.get("_sums_at")\n',
            "tests/test_optimizer.py -k follow_them_to_other_arrays",
        ),
        (
            "present = None if pending.present.all() else pending.present.tolist()",
            "present = None",
            "tests/test_tail.py -k without_a_gradient_in_any_micro_batch",
        ),
        (
            "        if self.sums is None:\n            self.sums = flat.new_buffer(flat.compute)\n        if self._sums_at",
            "        self.sums = flat.new_buffer(flat.compute)\n        if self._sums_at",
            "tests/test_in_place.py -k makes_one_buffer",
        ),
        (
            "            self.sums = flat.new_buffer(flat.compute)\n        if self._sums_at",
            "            self.sums = flat.grad\n        if self._sums_at",
            "tests/test_batchnorm.py -k attached_layer_are_accumulated",
        ),
        (
            "            if not callable(value):  # the first plan evaluates schedules\n                rule.check(name, value, dtype=flat.compute, members=flat.members)",
            "            pass",
            "tests/test_scalars.py -k eps",
        ),
        (
            "return present & (weight != 0.0)  # 0 times NaN, the mean over no samples, is no part of the sum",
            "return present",
            "tests/test_scalars.py -k without_weight",
        ),
        ("(pending.weight or 1.0)", "pending.weight", "tests/test_scalars.py -k without_weight"),
        (
            "before.extended(params, (*self.buffers, *before.grad_buffers) if before.in_place else ())",
            "before.extended(params)",
            "tests/test_bad_input.py -k must_not_lie",
        ),
        (
            "self.options.coefficients(factor * norms)",
            "self.options.coefficients(norms)",
            "tests/test_tail.py -k 'each_accumulated'",
        ),
        (
            "coefficient = float(coefficients.min())",
            "coefficient = float(coefficients.max())",
            "tests/test_interop.py -k clipping_per_tensor",
        ),
        (
            "coefficients[own_rows] = self",
            "coefficients[: len(own_rows)] = self",
            "tests/test_tail.py -k missing_gradients_keep",
        ),
        (
            "self.pending.partials, plan.blocks, abs(unscale)",
            "self.pending.partials, plan.chunks(rows, whole=True), abs(unscale)",
            "tests/test_tail.py -k each_accumulated",
        ),
        (
            "                parts.append((measure.launch(run, table, run_chunks, g.size), run_chunks))\n",
            "                parts.append((measure.launch(run, table, run_chunks, g.size), chunks))\n",
            "tests/test_rows.py -k all_flags",
        ),
        (
            "group, line = self.groups.list[self.groups.of[k]], table[mapped[k]]",
            "group, line = self.groups.list[self.groups.of[k]], table[0]",
            "tests/test_rows.py -k two_parameters",
        ),
        (
            "values = [by_group[number] for number in self.groups.of]",
            "values = [by_group[0] for number in self.groups.of]",
            "tests/test_tail.py -k 'every_way_of_a_step and Muon'",
        ),
        (
            "self.options.clip_value is None and not self.groups.frozen:",
            "self.options.clip_value is None:",
            "tests/test_groups.py -k frozen",
        ),
        (
            "            self.flush_rows()\n            self.begin()\n            backup",
            "            self.flush_rows()\n            backup",
            "tests/test_state.py -k test_the_average_and_z",
        ),
        (
            "            self._override(members, name, checked)\n        self._begin_again(name)",
            "            self._override(members, name, checked)",
            "tests/test_state.py -k hyperparameter",
        ),
        (
            "            self.put_params(arrays)\n            if self.formats.keeps == REST:",
            "            self.put_params(arrays)\n            return\n            if self.formats.keeps == REST:",
            "tests/test_state.py -k set_params",
        ),
        (
            "            for buffer in self.buffers:\n                buffer.fill(0)\n",
            "",
            "tests/test_state.py -k restart",
        ),
        (
            "            self.nonfinite = self._counted(finite)\n            if own and",
            "            self.nonfinite = self._counted(True)\n            if own and",
            "tests/test_tail.py -k counted",
        ),
    ),
    *faults_of(
        "fastopt/step/plan.py",
        "tests/test_memory.py -k masks",
        (
            "        if len(self.rows) >= MOST_MASKS:\n            self.rows.clear()\n            self._chunks.clear()  # whose keys are the ids of the rows\n            self._dense.clear()\n",
            "",
        ),
        (
            "            self._chunks.clear()  # whose keys are the ids of the rows\n            self._dense",
            "            self._dense",
        ),
        ("            self.rows.clear()\n            self._chunks", "            self._chunks"),
        (
            "            if len(self._dense) >= MOST_MASKS:\n                self._dense.clear()\n",
            "",
            "tests/test_memory.py -k 'masks_of_other_steps'",
        ),
        ("MOST_MASKS = 128", "MOST_MASKS = 128_000"),
        (
            "        if self._per_tensor:\n            self.table.spread()\n",
            "        if self._per_tensor and len(groups.list) < MANY:\n            self.table.spread()\n",
            "tests/test_tail.py -k missing_gradients_keep",
        ),
        (
            "clip_norm=self.options.clips)",
            "clip_norm=self.options.max_norm is not None)",
            "tests/test_tail.py -k of_matrices_are_clipped",
        ),
        (
            "self.of = list(range(len(by_group))) if self._per_tensor else by_group",
            "self.of = by_group",
            "tests/test_tail.py -k every_way_of_a_step",
        ),
    ),
    *faults_of(
        "fastopt/step/rows.py",
        'tests/test_interrupts.py -k "raises and serial and flush_rows"',
        ("with deferred_signals:\n            lines, coefficients", "if True:\n            lines, coefficients"),
    ),
    *faults_of(
        "fastopt/step/table.py",
        "tests/test_tail.py -k missing_gradients_keep",
        ("np.take(self.by_group, self._of, axis=0, out=self.array)", "self.array[...] = self.by_group[0]"),
        ("        self.by_group[:, UNSCALE] = unscale\n", "        self.array[:, UNSCALE] = unscale\n"),
    ),
    *faults_of(
        "fastopt/storage/door.py",
        "tests/test_door.py -k views_share",
        ("    scalars.refuse_masked(what, leaf)\n", "", "tests/test_scalars.py -k masked"),
        (
            "    if shape == () and not writeable and not (isinstance(leaf, np.ndarray) and leaf.dtype == dtype):",
            "    if shape == () and not writeable and not isinstance(leaf, np.ndarray):",
            "tests/test_scalars.py -k 0_d_parameter",
        ),
        (
            "                if np.shares_memory(arrays[other], arrays[k], max_work=HARD):",
            "                if np.may_share_memory(arrays[other], arrays[k]):",
            "tests/test_bad_input.py -k share_no_element",
        ),
        ("            active.append(k)\n", "            active = [k]\n"),
        (
            "        if within and protected.overlaps(*runs_of(leaf)).any():",
            "        if within:",
            "tests/test_bad_input.py -k gaps",
        ),
        ("np.arange(count if stride else 1)", "np.arange(count)[: max(1, count - 1)]"),
        ("    left = FEW_PAIRS * len(cluster).bit_length()", "    left = 10**12", "tests/test_door.py -k interleaved"),
    ),
    *faults_of(
        "fastopt/storage/flat.py",
        "tests/test_copies.py -k keep_the_tie",
        (
            "                array.copy()\n                if any(",
            "                array\n                if any(",
            "tests/test_state.py -k set_params_converts",
        ),
        ("        twin = twin._using([memo.get(id(array)) for array in self.arrays], self._copied_grads(memo))\n", ""),
        (
            "            memo.update({id(own): copied for own, copied in zip(mine, theirs, strict=True)})",
            "            pass",
        ),
        (
            "pairs = [(self.arrays, twin.arrays), (containers(self.params), containers(twin.params))]",
            "pairs = [(self.arrays, twin.arrays)]",
            "tests/test_copies.py -k hands_out_containers",
        ),
        (
            "flat.in_place = in_place\n    if grads",
            "flat.in_place = True\n    if grads",
            "tests/test_copies.py -k rows_that_are_behind",
        ),
        (
            'return array if usable else np.array(array, order="C")',
            "return array",
            "tests/test_copies.py -k 'cannot_be_written'",
        ),
        (
            "with deferred_signals:\n            self.arrays,",
            "if True:\n            self.arrays,",
            'tests/test_interrupts.py -k "other_arrays_are"',
        ),
        ("    _refuse_sharing(leaves, memory, paths)\n", "", "tests/test_bad_input.py -k two_views"),
        (
            "        _refuse_sharing([*given, *apart_from], self._backend, (*paths, *_own(apart_from)))\n",
            "",
            "tests/test_bad_input.py -k must_not_lie",
        ),
        (
            "                leaf = given[k] = leaf if isinstance(leaf, np.ndarray) else leaves[k]\n",
            "                leaf = given[k] = leaves[k]\n",
            "tests/test_bad_input.py -k gaps",
        ),
    ),
    *faults_of(
        "fastopt/storage/trees.py",
        "tests/test_scalars.py -k subtree",
        (
            "    if tree is None or node is None:\n        return tree is None\n",
            "    if node is None:\n        return tree is None\n    if tree is None:\n        return False\n",
        ),
        ("        if not field.init:", "        if False:", "tests/test_scalars.py -k dropped"),
        ("    scalars.refuse_masked(code, value)\n", "", "tests/test_scalars.py -k masked"),
    ),
)

MATHEMATICS: Sequence[Fault] = (
    *faults_of(
        "fastopt/math.py",
        "tests/test_math.py -k about_one_unit",
        ("return n - WHERE(denormal, LIFTED, ZERO), m", "return n, m"),
        ("return x * POWER_OF_TWO(first) * POWER_OF_TWO(n - first)", "return x * POWER_OF_TWO(n)"),
        ("((f - s_high * divisor_high) - s_high * divisor_low) * inverse", "(f - s_high * divisor_high) * inverse"),
        ("exponent_low = (power - power_high) * high + power * low", "exponent_low = power * low"),
        ("small = size <= SMALL_TANH", "small = size < ZERO"),
        (
            "odd = (FLOOR(half) != half) & (FLOOR(y) == y)",
            "odd = FLOOR(half) != half",
            "tests/test_math.py -k ieee_754",
        ),
        ("    result = WHERE(x < INFINITY, result, x)\n", "", "tests/test_math.py -k ieee_754"),
        ("return WHERE((y == ZERO) | (x == ONE), ONE, result)", "return result", "tests/test_math.py -k ieee_754"),
    ),
    *faults_of(
        "fastopt/random.py",
        "tests/test_math.py -k known_answers",
        ("k1 = (k1 + SECOND_STEP) & LOW", "k1 = k1 & LOW"),
        ("ROUNDS = 10", "ROUNDS = 9"),
        ("key & LOW, key >> WORD)", "key & LOW, NONE)", "tests/test_math.py -k any_kind"),
    ),
    *faults_of(
        "fastopt/kernels/operations.py",
        "tests/test_math.py -k any_number_of_threads",
        ("word(~form.low_half)", "word(-1)"),
        ("bits.type(64 - form.stored)", "bits.type(63 - form.stored)"),
        ("return np.uint64(np.int64(number))", "return np.uint64(np.int32(number) + np.int64(1))"),
    ),
    *faults_of(
        "fastopt/kernels/typed.py",
        "tests/test_math.py -k follow_the_same",
        ("types.Float)} or {64}", "types.Float)} or {32}"),
        ("if wrong:\n", "if not own and wrong:\n", "tests/test_math.py -k are_refused"),
    ),
    *faults_of(
        "fastopt/rule.py",
        "tests/test_bad_input.py -k declared",
        (
            '        _check_call("Layerwise: ratio", self.ratio, ("norm_p", "norm_u"), longer=("norm_p", "norm_u", "size", "h"))\n',
            "        pass\n",
        ),
        ('        _check_call("Scaling: scale", self.scale, names, longer=(*names[:2], "size", *names[2:]))\n', ""),
        (
            '        _check_call(f"{where}: apply", self.apply, ("p", *states, "ratio", "h"), longer=(*names[:-1], "ratio", "h"))\n',
            "",
        ),
        ("kind(*own, *of_rule)", "kind(*of_rule, *own)", "tests/test_wrap.py -k 'nothing_changes_no_bit and LARS'"),
        ("scalars.number(where, value, expected)", "scalars.number(where, 0.0, expected)"),
        ('co_varnames[:2] == ("p", "g")', 'co_varnames[:2] == ("g", "p")'),
    ),
    *faults_of(
        "fastopt/step/globs.py",
        "tests/test_groups.py -k many_globs",
        ("        if exact is not None:\n", "        if False:\n", "tests/test_groups.py -k exact_path"),
        ("    shortest = sum(map(len, (first, *inner, last)))", "    shortest = 0"),
        ("            at = found + len(piece)", "            at = found"),
        ('if bracket else f"{END}{literal}{END}"', 'if False else f"{END}{literal}{END}"'),
        ("return min(found, key=len,", "return max(found, key=len,", "tests/test_groups.py -k few_paths"),
    ),
    *faults_of(
        "fastopt/kernels/bind.py",
        "tests/test_math.py -k name_of_a_kernel",
        ("if isinstance(digest, str):", "if isinstance(digest, bytes):"),
    ),
)

IN_TORCH = "tests/test_torch_optim.py "
IN_BATCHNORM = "tests/test_torch_batchnorm.py "
ON_DEVICE = SIMULATED + "tests/test_cuda_torch.py "

TORCH: Sequence[Fault] = (
    *faults_of(
        "fastopt/torch/optimizer.py", IN_TORCH + "-k transposed_matrix", ("is not None or rule.lined", "is not None")
    ),
    *faults_of(
        "fastopt/torch/part.py",
        IN_TORCH,
        ("        increment_version(updated)\n", "", IN_TORCH + "-k autograd_sees"),
        (
            "                    if at != self.at:\n                        self._follow()\n",
            "",
            IN_TORCH + "-k that_move",
        ),
        (
            "numbers += 1.0 if present is None else np.array(present, np.float32)",
            "numbers += 1.0",
            IN_TORCH + "-k stay_as_they_are",
        ),
        ("if self._bytes_now != self._bytes:", "if False:", IN_TORCH + "-k step-in-place"),
        (
            "                        return self._take_each(optimizer)\n",
            "                        pass\n",
            IN_TORCH + "-k conjugated",
        ),
        ("            shadow.copy_(self.params[k].detach())\n", "            pass\n", IN_TORCH + "-k any_strides"),
        ("if self.on_host and given.is_shared():", "if False:", IN_TORCH + "-k shared_one_by_one"),
        ("            self.places = self.places.copy()\n", "", ON_DEVICE + "-k sent_again"),
        (
            "            if device_of(p) != self.memory.device or p.shape",
            "            if p.shape",
            ON_DEVICE + "-k another_device",
        ),
        ("if device_of(g) != self.memory.device and", "if False and", ON_DEVICE + "-k gradient_of_another"),
        ("self.by_rows = sparse and self.on_host", "self.by_rows = sparse", ON_DEVICE + "-k sparse"),
        (
            "            with self.memory.current():  # torch's",
            "            if True:  # torch's",
            ON_DEVICE + "-k is_left_on",
        ),
    ),
    *faults_of(
        "fastopt/torch/memory.py",
        ON_DEVICE,
        (
            "self._xp.cuda.Device(self.device.index), stream:",
            "self._xp.cuda.Device(self.device.index):",
            ON_DEVICE + "-k work_of",
        ),
        ("with self._xp.cuda.Device(self.device.index), stream:", "with stream:", ON_DEVICE + "-k several_devices"),
        ("            if stream.is_capturing():", "            if False:", ON_DEVICE + "-k captures"),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        ON_DEVICE,
        (
            "own = type(grads) is not Taken if device is not None else",
            "own = True if device is not None else",
            ON_DEVICE + "-k 'the_cpu and AdamW'",
        ),
        (
            "or not self.options.skips) and beside is ALONE",
            "or not self.options.skips)",
            ON_DEVICE + "-k several_devices",
        ),
    ),
    *faults_of(
        "fastopt/torch/optimizer.py",
        IN_TORCH,
        ("            self._shares = False\n", "", IN_TORCH + "-k loaded_state_is_a_copy"),
        (
            "if len(own) != len(params) or not all(map(is_, own, params)):",
            "if False:",
            IN_TORCH + "-k list_of_parameters",
        ),
        ("key = tuple(map(_number, key))", "key = tuple(key)", IN_TORCH + "-k rate_in_a_tensor"),
        ("key=lambda k: measured[k][1]", "key=lambda k: not measured[k][1]", IN_TORCH + "-k whole_or_not"),
        (
            "                group.setdefault(name, value)\n",
            "                pass\n",
            IN_TORCH + "-k continues_in_the_other",
        ),
        ("            self.__dict__.update(before)\n", "", IN_TORCH + "-k leaves_the_optimizer_as_it_was"),
        (
            "    @torch.inference_mode(mode=False)",
            "    @torch.inference_mode(mode=True)",
            "tests/test_torch_situations.py -k inside_a_mode",
        ),
    ),
    *faults_of(
        "fastopt/torch/signatures.py",
        "tests/test_torch_signatures.py",
        ("own[0].replace(default=empty)", "own[0]"),
        ("if theirs is None else ()), *OPTIONS)", "if False else ()), *OPTIONS)"),
        ('text = aside.sub("", " ".join', 'text = (" ".join'),
    ),
    *faults_of(
        "fastopt/torch/states.py",
        IN_TORCH,
        ("        self.mark.changed = True\n", "", IN_TORCH + "-k changes_of_a_state"),
        ("            or tensor.storage_offset() != own.storage_offset()\n", "", IN_TORCH + "-k list_of_parameters"),
    ),
    *faults_of(
        "fastopt/torch/parameters.py",
        IN_TORCH,
        (
            "return g.stride() == p.stride() or (g.is_contiguous() and p.is_contiguous())",
            "return True",
            IN_TORCH + "-k any_strides",
        ),
        ("reverse=True", "reverse=False", IN_TORCH + "-k any_strides"),
    ),
    *faults_of(
        "fastopt/torch/batchnorm.py",
        IN_BATCHNORM,
        ("        increment_version((mean, var))\n", "", IN_BATCHNORM + "-k seen_by_autograd"),
        ("        if count[0] and tracked", "        if tracked", IN_BATCHNORM + "-k nan"),
        ("y if made.kind.activation is None else y.relu()", "y", IN_BATCHNORM + "-k graph_of_their_own"),
        ("y, made.y = made.y, None", "y = made.y", IN_BATCHNORM + "-k output_is_freed"),
        ("        or transforming()\n", "", IN_BATCHNORM + "-k transforms_or_observes"),
        ("        or forward_ad._current_level >= 0\n", "", IN_BATCHNORM + "-k transforms_or_observes"),
        ("        or torch._C._len_torch_dispatch_stack() > 0\n", "", IN_BATCHNORM + "-k transforms_or_observes"),
        ("            dy = dy.resolve_neg()\n", "            pass\n", IN_BATCHNORM + "-k transforms_or_observes"),
        (
            "x, dy = x.movedim(1, -1).contiguous(), dy.movedim(1, -1).contiguous()",
            "x, dy = x.movedim(1, -1).contiguous(), dy.contiguous()",
            IN_BATCHNORM + "-k statistics_and_gradients",
        ),
    ),
)

OF_POPULATIONS = "tests/test_population.py "

POPULATIONS: Sequence[Fault] = (
    *faults_of(
        "fastopt/hyper.py",
        OF_POPULATIONS + "-k 'refused_when_made or extremes or hyper_reads'",
        ("(int(numbers.argmin()), int(numbers.argmax()))", "(int(numbers.argmin()),)"),
        ("range(len(numbers)) if domain.whole else", ""),
        ("array.shape != (members,)", "array.ndim != 1"),
        ("    found.flags.writeable = False\n", ""),
    ),
    *faults_of(
        "fastopt/storage/layout.py",
        OF_POPULATIONS + "-k optimizers_of_their_own",
        ("offset + member * size", "offset"),
        (
            "Layout(shapes * members, sizes * members, offsets, self.size, networks=members)",
            "Layout(shapes * members, sizes * members, offsets, self.size)",
        ),
        ("place // together, []", "0, []", OF_POPULATIONS + "-k all_are_all"),
    ),
    *faults_of(
        "fastopt/storage/flat.py",
        OF_POPULATIONS + "-k optimizers_of_their_own",
        ("np.arange(self.members or 1)[:, None] * strides", "np.zeros((self.members or 1, 1), np.int64) * strides"),
        ("if self.members is not None:  # those of a member follow each other", "if False:"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/sums.py",
        OF_POPULATIONS + "-k all_are_all",
        ("record(Place, places, of_parameter * N_PLACE).network != own_network", "False"),
        ("            network = own_network\n", "            network = 0\n"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/sums.py",
        SIMULATED + "tests/test_cuda_population.py -k of_all",
        ("N_SPAN * (together * k + together - 1)", "N_SPAN * (n - 1)"),
        ("span.place - span.place % count + k % count", "k"),
        ("FINISHED(UNPACK_SUMS(totals, N_TOTALS * k))", "FINISHED(UNPACK_SUMS(totals, 0))"),
        ("line = N_VALUES * (k // together)", "line = 0"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/lines.py",
        SIMULATED + "tests/test_cuda_population.py -k of_all",
        ("SETTLED_AT(line.first, line, totals", "SETTLED_AT(0, line, totals"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/lines.py",
        OF_POPULATIONS + "-k all_are_all",
        ("by_network[moving, 1:] = by_network[moving, :1]", "by_network[0, 1:] = by_network[0, :1]"),
    ),
    *faults_of(
        "fastopt/step/many.py",
        OF_POPULATIONS + "-k 'may_differ or schedules'",
        ("self._points[row // members], row % members", "self._points[row // members], 0"),
        ("            batch.put(k, point)\n", "            pass\n"),
        ("lines = self.numbers[k * count : (k + 1) * count]", "lines = self.numbers[k : k + 1]"),
    ),
    *faults_of(
        "fastopt/step/table.py",
        OF_POPULATIONS + "-k may_differ",
        ("= point.weight_decay, point.keep", "= point.of_member(0).weight_decay, point.keep"),
        ("= point.weight_decay, point.keep", "= point.weight_decay, point.of_member(0).keep"),
    ),
    *faults_of(
        "fastopt/step/norms.py",
        OF_POPULATIONS + "-k every_option",
        ("return norms, summed(1) == 0.0", "return norms, summed(0) == summed(0)"),
        ("np.where(finite, 0, consecutive + 1)", "consecutive + ~finite"),
    ),
    *faults_of(
        "fastopt/step/options.py",
        OF_POPULATIONS + "-k every_option",
        ("np.minimum(rescaling(norms, self.max_norm), 1.0)", "rescaling(norms, self.max_norm)"),
    ),
    *faults_of(
        "fastopt/step/groups.py",
        OF_POPULATIONS + "-k 'every_option or copied_member or overrides'",
        ("                group.missed = group.missed + skipped\n", "                pass\n"),
        ("            missed[target] = missed[source]\n", ""),
        ("held = count.tobytes()", "held = 0", OF_POPULATIONS + "-k 'goes_on_from and Adam'"),
    ),
    *faults_of(
        "fastopt/step/matrices.py",
        OF_POPULATIONS + "-k 'transforms_of_matrices'",
        ("own_part = ... if member is None else member", "own_part = ... if member is None else 0"),
        ("{name: of_member(value, member) for", "{name: of_member(value, 0) for"),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        OF_POPULATIONS + "-k 'every_option or no_member or zeroed'",
        ("plan.table.clip(np.tile(coefficients, len(self.groups.list)))", "plan.table.clip(coefficients[0])"),
        ("                    grad[self.backend.adopt(skipped)] = 0\n", "                    pass\n"),
        ("            self._skip(finite=proceeds, own=own)\n", ""),
        ("return self._rows_of(present, proceeds), proceeds", "return plan.of, proceeds"),
        ("            self.groups.copy_missed(source, target)\n", "", OF_POPULATIONS + "-k copied_member"),
        (
            "matrices.transform(k, views, int(t[member]), values[k], member)",
            "matrices.transform(k, views, self.steps + 1, values[k], member)",
            OF_POPULATIONS + "-k transforms_of_matrices",
        ),
    ),
    *faults_of(
        "fastopt/state.py",
        OF_POPULATIONS + "-k 'file or counts'",
        ("MEMBERS: self.flat.members}", "MEMBERS: None}"),
        ("if np.any(count > step)", "if np.all(count > step)"),
    ),
)

OF_FORMATS = "tests/test_formats.py "
OF_FORMATS_THERE = SIMULATED + "tests/test_cuda_formats.py "
ROUNDED_ONCE = OF_FORMATS + "-k 'float32_rounded and Adam and not AdamW and not AdamMini'"

FORMATS: Sequence[Fault] = (
    *faults_of(
        "fastopt/kernels/formats.py",
        ROUNDED_ONCE,
        ("builder.add(odd, INT32(0x7FFF))", "INT32(0x8000)"),
        ("builder.shl(builder.zext(stored, INT32), INT32(16))", "builder.shl(builder.sext(stored, INT32), INT32(15))"),
        (
            'builder.select(builder.fcmp_unordered("uno", number, number), INT32(NAN), builder.bitcast(number, INT32))',
            "builder.bitcast(number, INT32)",
            OF_FORMATS + "-k nan_of_any",
        ),
        (
            "builder.add(bits, noise), INT32(-0x10000)",
            "builder.add(bits, INT32(0x8000)), INT32(-0x10000)",
            OF_FORMATS + "-k average",
        ),
        ("builder.lshr(noise, INT32(3))", "noise", OF_FORMATS + "-k average"),
        ('builder.icmp_unsigned("<", size, INT32(0x38800000))', "ir.IntType(1)(0)", OF_FORMATS + "-k average"),
        ("seed, index, count // 2)", "seed, index, 0)", OF_FORMATS + "-k drawn_apart"),
        (
            "params = FLOAT32 if storage.keeps == MASTER else storage.params",
            "params = storage.params",
            OF_FORMATS + "-k beside_a_master",
        ),
    ),
    *faults_of(
        "fastopt/kernels/elements.py",
        ROUNDED_ONCE,
        ("return kept if ROUNDED(kept) == p else p", "return kept", OF_FORMATS + "-k that_is_written"),
        ("return (rounded, *new[1:], new[0] - rounded)", "return (rounded, *new[1:], new[0] - p)"),
        ("        return (*new, new[0])\n", "        return (*new, ROUNDED(new[0]))\n"),
        (
            "return ELEMENT(step, EXACT(p, rest[-2]), g, *rest[:-2], rest[-1])",
            "return ELEMENT(step, p, g, *rest[:-2], rest[-1])",
            OF_FORMATS + "-k 'float32_rounded and LAMB'",
        ),
    ),
    *faults_of(
        "fastopt/kernels/codes.py",
        OF_FORMATS + "-k 'float32_encoded and Adam'",
        ("    return unit, inverse\n", "    return OF_BITS(largest), inverse\n"),
        ("INT32(0x7FFFF)", "INT32(0)"),
        ("builder.fadd(root, FLOAT(0.5))", "root"),
        ("MAX_STATES + place", "0", OF_FORMATS + "-k drawn_apart"),
        (
            'builder.select(builder.icmp_signed("<", code, INT32(1)), INT32(1), code)',
            "code",
            OF_FORMATS + "-k never_becomes_zero",
        ),
        (
            'builder.fcmp_ordered("<", builder.fmul(drawn, width), over)',
            'builder.fcmp_ordered("<", drawn, over)',
            OF_FORMATS + "-k codes_are_right_on_average",
        ),
    ),
    *faults_of(
        "fastopt/kernels/cpu/coded.py",
        OF_FORMATS + "-k 'float32_encoded and Adam'",
        (
            "windows(units, at - all_codes + all_codes // CODES, size)\n                for i in range(size):\n                    put_values(numbers",
            "windows(units, at - all_codes, size)\n                for i in range(size):\n                    put_values(numbers",
        ),
        (
            "step.noise, at + i))\n            else:",
            "step.noise, i))\n            else:",
            OF_FORMATS + "-k codes_are_right_on_average",
        ),
        ("                largest = LARGER_OF(largest, new)\n", "                largest = LARGER_OF(NO_BITS, new)\n"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/coded.py",
        OF_FORMATS_THERE + "-k of_8_bits",
        ("at + i, i == 0, rooms", "at + i, i == 1, rooms"),
        ("MERGED(maxima, thread, thread + width)", "MERGED(maxima, thread, thread)"),
        ("UNIT_BYTES * (at - coded + coded // CODES))[0][0]", "UNIT_BYTES * (at - coded))[0][0]"),
        ("context[0].noise, at + i)[0]", "context[0].noise, i)[0]"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/memory.py",
        OF_FORMATS_THERE + "-k 'of_the_cpu and Adam'",
        ("context[0].noise, i // ITEMSIZE)", "context[0].noise, i)"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/lines.py",
        OF_FORMATS_THERE + "-k rows_and_columns",
        ("step.noise, of_states // ITEMSIZE)[0]", "step.noise, i // ITEMSIZE)[0]"),
        ("            own = (*own, buffers[end - 1])\n", "            own = (*own, buffers[end - 2])\n"),
    ),
    *faults_of(
        "fastopt/kernels/cuda/sums.py",
        OF_FORMATS_THERE + "-k 'of_the_cpu and LAMB'",
        ("            own = (*own, buffers[end - 1])\n", "            own = (*own, buffers[end - 2])\n"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/elementwise.py",
        OF_FORMATS + "-k threads_or_chunks",
        ("DITHERED(new, step.noise, start + i)", "DITHERED(new, step.noise, i)"),
    ),
    *faults_of(
        "fastopt/step/plan.py",
        OF_FORMATS + "-k average",
        (
            "self.table.array[:, NOISE] = noise_of(self._seed, t)",
            "self.table.array[:, NOISE] = noise_of(self._seed, 1)",
        ),
    ),
    *faults_of(
        "fastopt/step/pipeline.py",
        OF_FORMATS + "-k 'come_back or copies_and_files'",
        ("return [*self.flat.arrays, *(() if self.kept is None else (self.kept,))]", "return list(self.flat.arrays)"),
        ("self.kernel_buffers(ema=False), plan", "self.kernel_buffers(), plan"),
        (
            "own=own, summed=self.pending is not None)\n            chunks",
            "own=own)\n            chunks",
            OF_FORMATS_THERE + "-k 'of_the_cpu and Adam'",
        ),
        ("                self.kept.fill(0)\n", "                pass\n", OF_FORMATS + "-k set_params_forgets"),
    ),
    *faults_of(
        "fastopt/storage/layout.py",
        OF_FORMATS + "-k alone",
        ("return max(self.coded, *ends)", "return max(ends)"),
        ("CODES if self.coded else ALIGNMENT // 4", "ALIGNMENT // 4", OF_FORMATS + "-k threads_or_chunks"),
    ),
    *faults_of(
        "fastopt/storage/conversion.py",
        OF_FORMATS + "-k is_converted",
        ("return np.where(known, master, p)", "return p"),
        ("numbers = exact - _rounded(", "numbers = 0 * exact - _rounded("),
    ),
    *faults_of(
        "fastopt/scaling.py",
        OF_FORMATS + "-k loss_scale",
        ("self.scale * self.backoff_factor, 0", "self.scale * self.backoff_factor, self.growth_tracker"),
        ("            if 1.0 / grown >= SMALLEST:\n", "            if True:\n"),
        ("self.growth_tracker == self.growth_interval", "self.growth_tracker > self.growth_interval"),
    ),
)

OF_RANKS = "tests/test_distributed.py "

RANKS = (
    *faults_of(
        "fastopt/step/ranks.py",
        OF_RANKS + "-k 'test_rules and (adan or Adan)'",
        ("                total += line\n", "                total = line\n"),
        (
            "min(start + width, rank * part + part, array.size)",
            "min(start + width, array.size)",
            OF_RANKS + "-k order_of_ranks",
        ),
        ("(high != ~low)", "(high != high)", OF_RANKS + "-k errors_of_one_rank"),
        ("if differ and differ[0] == 0:", "if differ:", OF_RANKS + "-k errors_of_one_rank"),
        ("given[self.rank] = numbers", "given[self.rank] = 1.0", OF_RANKS + "-k own_gradients_weights"),
        ("begin, end = max(start, self._first)", "begin, end = max(0, self._first)", OF_RANKS + "-k full_disk"),
        ("zip(everyone, counts, strict=True)", "zip(everyone[::-1], counts[::-1], strict=True)", OF_RANKS + "-k LAMB"),
    ),
    *faults_of(
        "fastopt/step/together.py",
        OF_RANKS + "-k 'test_rules and Adan'",
        ("views[k].fill(-0.0)", "views[k].fill(0.0)"),
        ("                views[k].fill(-0.0)", "                pass"),
        ("pending.present, pending.weight = votes.mask, total", "pending.present, pending.weight = votes.mask, 1.0"),
        (
            "pending.present, pending.weight = votes.mask, total",
            "pending.present, pending.weight = offer.present, total",
        ),
        ("                if info.skipped is False:\n                    self.spread()\n", ""),
        (
            "                    self.flat.zero_grad()\n",
            "                    pass\n",
            OF_RANKS + "-k own_gradients_weights",
        ),
        (
            'np.searchsorted(chunks[:, LINE], block, side="right") - 1',
            'np.searchsorted(chunks[:, LINE], block, side="left") - 1',
            OF_RANKS + "-k not_finite",
        ),
        ("self._of_this_rank(super()._chosen())", "super()._chosen()", OF_RANKS + "-k those_of_a_part"),
        ("            rows = plan.held(rows)\n", "", OF_RANKS + "-k 'test_rules and Muon'"),
        ("if is_chosen and is_cut:", "if False:", OF_RANKS + "-k refusals"),
        ("return super().chunks(self.held(rows))", "return super().chunks(rows)", OF_RANKS + "-k Adafactor"),
        ("grad_scale * ranks.size)", "grad_scale)", OF_RANKS + "-k check_rows"),
        ("self.rows.catch_up(k, everything,", "self.rows.catch_up(k, np.unique(found),", OF_RANKS + "-k check_rows"),
        ("        self.begin_together(context)\n", "", OF_RANKS + "-k no_rank_goes_elsewhere_alone"),
    ),
    *faults_of(
        "fastopt/storage/layout.py",
        OF_RANKS + "-k 'parts_cover or test_rules and LAMB'",
        ("        own[:, LINE] -= own[:1, LINE]\n", ""),
        ("        own[:, GRAD] += first - chunks[:, START]\n", ""),
        ("np.subtract(self.offsets, self.start) if", "self.offsets if"),
        ("unit = length if uncut and uncut[k] else BLOCK", "unit = BLOCK", OF_RANKS + "-k must_not_be_cut"),
        ("-(-end // unit) * unit", "end", OF_RANKS + "-k parts_cover"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/sums.py",
        OF_RANKS + "-k 'test_rules and LAMB'",
        ("                    chunks[:, GROUP] = chunks[:, PLACE]\n", ""),
        ("                        partials = gathered(partials)\n", "                        pass\n"),
        ("        if whole.shape[0] == 0:", "        if chunks.shape[0] == 0:", OF_RANKS + "-k more_ranks_than_blocks"),
    ),
    *faults_of(
        "fastopt/checkpoint.py",
        OF_RANKS + "-k 'any_number or full_disk'",
        ("        for _ in windows:  # which", "        for _ in ():  # which"),
        ("                digests[key] = digest.hexdigest()\n", ""),
        ("start, stop = (8 + length + offset", "start, stop = (16 + length + offset"),
    ),
    *faults_of(
        "fastopt/files.py",
        "tests/test_files.py -k 'left_behind or locked'",
        ("                if _locked(handle):\n", "                if True:\n"),
        ("            _remove_left_behind(target)\n", ""),
    ),
    *faults_of(
        "fastopt/batches.py",
        "tests/test_batches.py -k parts_of_a_batch",
        ("count = min(size, last - start)", "count = size"),
        ("start + count * (rank + 1) // parts", "start + count * rank // parts + count // parts"),
    ),
    *faults_of(
        "fastopt/communicators/threads.py",
        "tests/test_communicators.py -k threads",
        ("        self._meeting.wait()  # before anybody writes\n", ""),
        ("if self._met == before:", "if False:"),
        ("key=lambda error: isinstance(error, CommunicatorError)", "key=lambda error: 0"),
    ),
)

OF_WIRE, OF_LOCAL_SGD = "tests/test_distributed_wire.py ", "tests/test_distributed_local_sgd.py "

BETWEEN_RANKS = (
    *faults_of(
        "fastopt/batchnorm/synchronized.py",
        "tests/test_distributed_batchnorm.py -k 'threads and parts_of_a_batch'",
        ("return float(found.sum()), np.add.reduce(everyone", "return float(found[0]), np.add.reduce(everyone"),
        (
            "count, *own = merged(counts, partials.swapaxes(0, 1))",
            "count, *own = merged(counts, partials.swapaxes(0, 1)[::-1])",
        ),
        (
            "            if not self._made:\n",
            "            if False:\n",
            "tests/test_distributed_batchnorm.py -k errors_of_one_rank",
        ),
        ("if total < 2.0:", "if total < 1.0:", "tests/test_distributed_batchnorm.py -k errors_of_one_rank"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/batchnorm.py",
        "tests/test_distributed_batchnorm.py -k 'threads and parts_of_a_batch'",
        ("        partials[...] = 0.0\n        return np.zeros_like", "        return np.zeros_like"),
        ("._replace(dgamma=of_gamma, dbeta=of_beta)", ""),
        ("fixed[BLOCKS], fixed[COUNTS] = 1, counts.ctypes.data", "fixed[BLOCKS] = 1"),
        (
            "            self._compile_wide_sums()\n            waiting[:] = 0\n",
            "            waiting[:] = 0\n",
            "tests/test_distributed_batchnorm.py -k need_float64",
        ),
    ),
    *faults_of(
        "fastopt/distributed/local_sgd.py",
        OF_LOCAL_SGD + "-k 'threads and formula'",
        ("            change -= after\n", "            change += after\n"),
        ("        self._take_outer()\n", ""),
        ("        self._since = 0\n        return info", "        return info"),
        ('"since": self._since}', '"since": 0}', OF_LOCAL_SGD + "-k from_its_files"),
        ("                if old != own:\n", "                if True:\n", OF_LOCAL_SGD + "-k from_its_files"),
        ("copy.deepcopy(self.inner).load(own)", "self.inner.load(own)", OF_LOCAL_SGD + "-k lacking"),
        ('kept["ranks"] != self._ranks.size', "False", OF_LOCAL_SGD + "-k as_many_ranks"),
    ),
    *faults_of(
        "fastopt/kernels/cpu/wire.py",
        OF_WIRE + "-k 'numpy or finite'",
        ("            room[i] = room[i] + given[i]\n", "            room[i] = given[i]\n", OF_WIRE + "-k sent_later"),
        ("                room[i] = ZERO\n", "                pass\n"),
        ("blocks * (CODES + 4) if", "blocks * CODES if", OF_WIRE + "-k short"),
        ("room[i] + value if ADDS else value\n\n\ndef encode", "value\n\n\ndef encode"),
    ),
    *faults_of(
        "fastopt/step/wire.py",
        OF_WIRE + "-k 'check_sums or window or sent_later'",
        ("(rank + 1) * part, array.size)", "array.size)"),
        ('self._kept("sums", part)[first : first + count]', 'self._kept("sums", part)[:count]'),
        ("add=rank > 0", "add=True"),
        ("message, errors[piece])", "message, errors[piece].copy())"),
        ("        twin._errors = {", "        twin._errors = {} and {", OF_WIRE + "-k copy_keeps"),
    ),
    *faults_of(
        "fastopt/step/together.py",
        OF_WIRE + "-k not_finite",
        ("                self._clear(votes.mask)\n", "                pass\n"),
        ("                self.sums[end:offset] = 0.0\n", ""),
        (
            "            self._wire.forget()\n\n    def restore",
            "            pass\n\n    def restore",
            OF_WIRE + "-k restart",
        ),
    ),
    *faults_of(
        "fastopt/cli/trainer.py",
        "tests/test_cli_ranks.py -k threads",
        ('partial(opt.step, reduction="sum")', "opt.step"),
        ("of_batch = min(most, rows - number * most)", "of_batch = most"),
    ),
)

FAULTS: tuple[Fault, ...] = (
    *(*RULES, *STEP, *LOOPS, *BATCHNORM, *DEVICE, *AROUND, *TRUST, *MATHEMATICS, *TORCH, *POPULATIONS, *FORMATS),
    *(*RANKS, *BETWEEN_RANKS),
)
