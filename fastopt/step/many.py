"""`ManyGroups`: the rows of the table for many param groups at once, by a compiled `prepare`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt.step.groups import Groups
from fastopt.step.prepare import CompiledPrepare, Form, form_of, numbers_of
from fastopt.step.table import Point, Table


class Batch:
    """Rows of the table whose hyperparameters are of one form, so that one compiled call prepares all of them."""

    def __init__(self, compiled: CompiledPrepare | None, rows: list[int], points: list[Point]):
        """compiled : None where Python has to run `prepare`."""
        self.compiled = compiled
        self.rows = np.array(rows, np.int64)
        lines = [[] if compiled is None else numbers_of(points[row].arguments) for row in rows]
        self.numbers = np.array(lines, np.float64).reshape(len(rows), -1)


class ManyGroups:
    """Writes the rows of all param groups."""

    def __init__(self, table: Table, groups: Groups, hyper: Any, step: int):
        """step : the number of updates made so far."""
        self.changes = groups.changes_made
        """Those of the groups when this was made. After another change it is made again."""
        self._table = table
        self._groups = groups.list
        self._points = [group.point(step) for group in groups.list]
        self._missed = np.array([group.missed for group in groups.list], np.int64)
        by_form: dict[Form | None, list[int]] = {}
        for row, point in enumerate(self._points):
            by_form.setdefault(form_of(point.arguments), []).append(row)
        self._batches = []
        for form, rows in by_form.items():
            compiled = None
            if form is not None and not table.rule.inputs:
                arguments = self._points[rows[0]].arguments
                compiled = CompiledPrepare.of(table.rule, hyper, table.by_group.dtype, arguments)
            self._batches.append(Batch(compiled, rows, self._points))
        self._scheduled = [
            (batch, k, row)
            for batch in self._batches
            for k, row in enumerate(batch.rows.tolist())
            if groups.list[row].scheduled
        ]
        self._heads = table.heads(self._points)

    def write(self, t: int, unscale: float) -> None:
        """Write the row of every group for update number `t`, less those that the group has missed.

        Raises ValueError as `Table.write`.
        """
        table = self._table
        for batch, k, row in self._scheduled:
            point = self._points[row] = self._groups[row].point(t - 1)
            if batch.compiled is not None:
                batch.numbers[k] = numbers_of(point.arguments)
        if self._scheduled:
            self._heads = table.heads(self._points)
        left = table.write_heads(self._heads, unscale)
        ts = t - self._missed
        for batch in self._batches:
            first = 0
            while batch.compiled is not None and first < len(batch.rows):
                rows = batch.rows[first:]
                found = batch.compiled.fill(table.by_group, rows, ts[rows], batch.numbers[first:])
                if found < 0:
                    break
                left.append(int(rows[found]))  # Python raises the error, or finds that there is none
                first += found + 1
            if batch.compiled is None:
                left.extend(batch.rows.tolist())
        for row in left:
            table.write(row, int(ts[row]), self._points[row], unscale)
