"""The plots of a sweep's report."""

import math
import os
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mocosfl_jax.evaluation.numbers import number_of
from mocosfl_jax.sweep.checks import METRICS
from mocosfl_jax.sweep.table import Cell, Table

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX"
"""Of lines and points: each marker comes in all ten colours before the next one."""

_AT_START = "at the start"
"""Label of the line that shows what the untrained networks had."""


def plot(table: Table, at_start: float | None, path: os.PathLike[str]) -> None:
    """Each metric over the field of the columns, one line per row, error bars over seeds; where the
    metrics are the columns, one point per row.

    Args:
      table: what is plotted.
      at_start: kNN before the first step, percent, mean of all runs; drawn as a dotted line.
      path: of the PNG file.
    """
    from matplotlib.figure import Figure

    by_row = table.field == METRICS
    figure = Figure(figsize=_size(table), dpi=150, layout="constrained")
    every = figure.subplots(1, len(table.metrics), sharey=by_row, squeeze=False)[0]
    for axes, metric in zip(every, table.metrics, strict=True):
        at_init = at_start if metric == "knn_top1" else None
        (_draw_points if by_row else _draw_lines)(axes, table, metric, at_init)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if not by_row:
        _add_legend(figure, every, table)
    figure.savefig(path)


def scatter(table: Table, path: os.PathLike[str]) -> None:
    """The second metric of a table over the first: one point per row and column, error bars over
    seeds.

    Args: path: of the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (label, x, y) in enumerate(_points(table)):
        if x.values and y.values:
            axes.errorbar(
                x.mean,
                y.mean,
                yerr=y.std or math.nan,
                xerr=x.std or math.nan,
                label=label,
                color=f"C{index % 10}",
                marker=_marker(index),
                linestyle="",
                capsize=3,
            )
    for metric, axis in zip(table.metrics, (axes.xaxis, axes.yaxis), strict=True):
        axis.set_label_text(number_of(metric).title)
    _widen(axes, *table.metrics)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)


# --------------------------------------------------------------------------------------- pieces

_LETTER, _LINE = 0.085, 0.22
"""Inches that a letter and a line of text take."""


def _size(table: Table) -> tuple[float, float]:
    """Width and height of the figure in inches: names of rows stand beside the panels."""
    names = [line for row in table.rows for line in _name(row).split("\n")]
    beside = 0.8 + _LETTER * max(map(len, [*names, _AT_START]))
    panels, lines = len(table.metrics), len(names) + 2
    if table.field == METRICS:
        return beside + 2.4 * panels, 1.2 + 0.3 * lines
    return beside + 4.2 * panels, max(3.6, _LINE * lines)


def _name(row: str) -> str:
    """Of a row, on several lines where it is long."""
    return _filled(row, 36)


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False)


def _draw_lines(axes: "Axes", table: Table, metric: str, at_start: float | None) -> None:
    """Over the values of the columns."""
    numbers = all(isinstance(x, int | float) and x > 0 for x in table.columns)
    x_of = {value: value if numbers else i for i, value in enumerate(table.columns)}
    for index, row in enumerate(table.rows):
        cells = {x_of[x]: table.cells[row, metric, x] for x in table.columns}
        _draw(axes, cells, _name(row), _marker(index))
    if numbers:
        axes.set_xscale("log")
    axes.set_xticks(list(x_of.values()), [str(value) for value in x_of])
    axes.minorticks_off()
    axes.set_xlabel(table.field_label)
    axes.set_ylabel(_filled(number_of(metric).title, 34))
    if at_start is not None:
        axes.axhline(at_start, color="grey", linestyle=":", label=_AT_START)
    _widen(axes, None, metric)


def _draw(axes: "Axes", cells: dict[Any, Cell], label: str, marker: str) -> None:
    """One line through the cells that have values. Args: cells: by x."""
    points = [(x, cell.mean, cell.std or math.nan) for x, cell in cells.items() if cell.values]
    x, mean, std = zip(*points, strict=True) if points else ([], [], [])
    shown = label if points else None  # colours follow the table, with or without points
    axes.errorbar(x, mean, std, marker=marker, markersize=4, capsize=3, label=shown)


def _draw_points(axes: "Axes", table: Table, metric: str, at_start: float | None) -> None:
    """Beside the names of the rows, the first at the top."""
    cells = {y: table.cells[row, metric, ""] for y, row in enumerate(table.rows)}
    points = [(cell.mean, y, cell.std or math.nan) for y, cell in cells.items() if cell.values]
    x, y, std = zip(*points, strict=True) if points else ([], [], [])
    axes.errorbar(x, y, xerr=std, marker="o", markersize=4, capsize=3, linestyle="")
    axes.set_yticks(range(len(table.rows)), [_name(row) for row in table.rows])
    axes.set_ylim(len(table.rows) - 0.5, -0.5)
    axes.set_xlabel(_filled(number_of(metric).title, 22))
    if at_start is not None:
        axes.axvline(at_start, color="grey", linestyle=":", label=_AT_START)
        axes.legend(frameon=False)
    _widen(axes, metric, None)


def _add_legend(figure: "Figure", every: Iterable["Axes"], table: Table) -> None:
    """One for all panels, beside them, if there is more to tell apart than one row."""
    shown: dict[str, Artist] = {}
    for axes in every:
        shown |= {
            label: artist for artist, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    labels = [label for label in (*map(_name, table.rows), _AT_START) if label in shown]
    if len(labels) > 1:
        handles = [shown[label] for label in labels]
        figure.legend(handles, labels, loc="outside right upper", frameon=False)


def _marker(index: int) -> str:
    return _MARKERS[index // 10 % len(_MARKERS)]


def _points(table: Table) -> Iterator[tuple[str, Cell, Cell]]:
    """Label, x and y of each row and column that has runs."""
    for row in table.rows:
        for column in table.columns:
            x, y = (table.cells[row, metric, column] for metric in table.metrics)
            several = len(table.columns) > 1
            if x.runs:
                yield f"{row}, {table.field_label} {column}" if several else row, x, y


def _widen(axes: "Axes", x_metric: str | None, y_metric: str | None) -> None:
    """Shows at least ten points of accuracy, so that chance does not look like a trend."""
    for metric, axis in ((x_metric, axes.xaxis), (y_metric, axes.yaxis)):
        if metric is not None and number_of(metric).is_accuracy:
            low, high = axis.get_view_interval()
            missing = max(0.0, 10.0 - (high - low)) / 2
            (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(low - missing, high + missing)
