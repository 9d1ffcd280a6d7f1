"""What a sweep found, as a table: numbers by variant and column, over seeds."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mocosfl_jax.evaluation.numbers import number_of
from mocosfl_jax.sweep.checks import METRICS
from mocosfl_jax.sweep.folder import Record

_FIELD_LABELS = {"num_clients": "number of clients"}
"""What the table and the plot call a field of the runs, where its name is not clear enough."""


@dataclass(frozen=True)
class Cell:
    """One metric of the runs that differ in their seed only."""

    values: tuple[float, ...]  # of the trained ones that have the metric
    finished: int
    runs: int
    digits: int = 2  # decimals

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        if not self.runs:
            return ""
        seeds = len(self.values) or self.finished  # a finished run may lack the metric
        count = f"({seeds})" if seeds == self.runs else f"({seeds} of {self.runs})"
        if not self.values:
            return f"- {count}"
        if len(self.values) == 1:
            return f"{self.mean:,.{self.digits}f} {count}"
        return f"{self.mean:,.{self.digits}f} ± {self.std:,.{self.digits}f} {count}"


@dataclass(frozen=True)
class Table:
    """Metrics by row (the variant and the other fields of the grid) and column."""

    field: str  # of the columns, or METRICS: the values of no field are, and `columns` has one, ""
    columns: tuple[Any, ...]
    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    cells: dict[tuple[str, str, Any], Cell]  # by row, metric, column

    @property
    def field_label(self) -> str:
        return _FIELD_LABELS.get(self.field, self.field)


def tabulate(records: Sequence[Record], columns: str, metrics: Sequence[str]) -> Table:
    """Groups runs by row and column."""
    groups: dict[tuple[str, Any], list[Record]] = {}
    for record in records:
        groups.setdefault((_row(record, columns), _column(record, columns)), []).append(record)
    values = unique(column for _, column in groups)
    if all(isinstance(value, int | float) for value in values):
        values = sorted(values)
    rows = unique(row for row, _ in groups)
    cells = {
        (row, metric, column): cell_of(groups.get((row, column), []), metric)
        for row in rows
        for metric in metrics
        for column in values
    }
    return Table(columns, tuple(values), tuple(rows), tuple(metrics), cells)


def cell_of(records: Sequence[Record], metric: str) -> Cell:
    """A metric of these runs, named as in `number_of`."""
    found = [record.numbers.get(metric) for record in records]
    values = tuple(value for value in found if value is not None)
    finished = sum(record.finished for record in records)
    return Cell(values, finished, len(records), number_of(metric).digits)


def plain(value: Any) -> Any:
    """A value as tables print it, which may be a key: JSON lists become text."""
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "unset" if value is None else value


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of their first occurrence."""
    return list(dict.fromkeys(values))


def _row(record: Record, columns: str) -> str:
    """The variant and the cell, without the field of the columns."""
    parts = [f"{name}={plain(value)}" for name, value in record.cell.items() if name != columns]
    if record.variant:
        parts.insert(0, record.variant)
    return ", ".join(parts) or "all"


def _column(record: Record, columns: str) -> Any:
    return "" if columns == METRICS else plain(record.config[columns])
