"""`ManyGroups`: the rows of the table for many param groups at once, by a compiled `prepare`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt.step.groups import Groups
from fastopt.step.prepare import CompiledPrepare, Form, form_of, numbers_of
from fastopt.step.table import Point, Table


class Batch:
    """Rows of the table whose hyperparameters are of one form, so that one compiled call prepares all of them."""

    def __init__(self, compiled: CompiledPrepare | None, groups: list[int], points: list[Point], members: int | None):
        """compiled : None where Python has to run `prepare`. groups : their numbers. members : of a population."""
        self.compiled = compiled
        self.members = members
        self.groups = groups
        each = np.arange(members or 1)
        self.rows = (np.array(groups, np.int64)[:, None] * (members or 1) + each).reshape(-1)
        width = 0 if compiled is None else len(numbers_of(points[groups[0]].arguments))
        self.numbers = np.zeros((len(self.rows), width))
        if compiled is not None and members is None:
            self.numbers[:] = [numbers_of(points[group].arguments) for group in groups]
        elif compiled is not None:
            for k, group in enumerate(groups):
                self.put(k, points[group])

    def put(self, k: int, point: Point) -> None:
        """Take the hyperparameters of the group at index `k`."""
        if self.compiled is not None:
            count = self.members or 1
            lines = self.numbers[k * count : (k + 1) * count]
            for column, number in enumerate(numbers_of(point.arguments)):
                lines[:, column] = number


class ManyGroups:
    """Writes the rows of all param groups; in a population, those of each group for all members."""

    def __init__(
        self, table: Table, groups: Groups, hyper: Any, step: int, known: ManyGroups | None = None, *, compiles: bool
    ):
        """step : the number of updates made so far. known : what this replaces. compiles : whether it pays."""
        self.changes = groups.changes_made
        """Those of the groups when this was made. After another change it is made again."""
        self._table = table
        self._groups = groups.list
        self._members = groups.networks
        self._points = [group.point(step) for group in groups.list]
        self._missed = np.array([group.missed for group in groups.list], np.int64).reshape(-1)
        self._compiled: dict[Form, CompiledPrepare | None] = {} if known is None else known._compiled
        by_form: dict[Form | None, list[int]] = {}
        for number, point in enumerate(self._points):
            by_form.setdefault(form_of(self._of_one(point).arguments), []).append(number)
        self._batches = []
        for form, numbers in by_form.items():
            compiled = None
            if compiles and form is not None and not table.rule.inputs:
                if form not in self._compiled:
                    arguments = self._of_one(self._points[numbers[0]]).arguments
                    self._compiled[form] = CompiledPrepare.of(table.rule, hyper, table.by_group.dtype, arguments)
                compiled = self._compiled[form]
            self._batches.append(Batch(compiled, numbers, self._points, self._members))
        self._scheduled = [
            (batch, k, number)
            for batch in self._batches
            for k, number in enumerate(batch.groups)
            if groups.list[number].scheduled
        ]
        self._take_heads()

    def _take_heads(self) -> None:
        self._heads = self._table.heads(self._points, self._members)
        self._unfit = np.flatnonzero(~np.isfinite(self._heads).all(axis=1)).tolist()
        """The rows whose numbers leave the range of the dtype."""

    def _of_one(self, point: Point, member: int = 0) -> Point:
        return point if self._members is None else point.of_member(member)

    def write(self, t: int, unscale: float) -> None:
        """Write the row of every group for update number `t`, less those that the group has missed.

        Raises ValueError as `Table.write`.
        """
        table, members = self._table, self._members or 1
        for batch, k, number in self._scheduled:
            point = self._points[number] = self._groups[number].point(t - 1)
            batch.put(k, point)
        if self._scheduled:
            self._take_heads()
        table.write_heads(self._heads, unscale)
        left = list(self._unfit)
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
            table.write(row, int(ts[row]), self._of_one(self._points[row // members], row % members), unscale)
