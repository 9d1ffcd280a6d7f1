"""The report of a sweep: report.csv (one row per run), report.md (a table), report.png (a plot)."""

import csv
import dataclasses
import io
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.numbers import NUMBERS
from mocosfl_jax.run.storage import StorageError, write_text, writing
from mocosfl_jax.sweep.definition import check_metrics, counted
from mocosfl_jax.sweep.folder import Record, SweepFolder

_FIELD_LABELS = {"num_clients": "number of clients"}
"""What the table and the plot call a field of the runs, where its name is not clear enough."""


@dataclass(frozen=True)
class Cell:
    """One metric of the runs that differ in their seed only."""

    values: tuple[float, ...]  # of the finished ones that have the metric
    finished: int
    runs: int

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
            return f"{self.mean:.2f} {count}"
        return f"{self.mean:.2f} ± {self.std:.2f} {count}"


@dataclass(frozen=True)
class Table:
    """Metrics by row (the variant and the other fields of the grid) and column."""

    field: str  # of the columns
    columns: tuple[Any, ...]
    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    cells: dict[tuple[str, str, Any], Cell]  # by row, metric, column


def write_report(folder: SweepFolder, columns: str, metrics: Sequence[str]) -> str:
    """Writes the three files from what is finished so far; returns the text of report.md.

    Args:
      folder: of the sweep, which may be running.
      columns: field whose values are the columns and the x axis.
      metrics: names of `NUMBERS`.
    Raises: InputError: there is no sweep in the folder, a run has no such field, there is no such
    number, or a file cannot be written.
    """
    records = _comparable(folder.records())
    _check(records, columns, metrics)
    table = tabulate(records, columns, metrics)
    text = markdown(records, table)
    at_init = _at_init(records)
    try:
        write_text(folder.path / "report.csv", long_form(records, columns, metrics))
        write_text(folder.path / "report.md", text)
        with writing(folder.path / "report.png") as path:
            plot(table, at_init.mean if at_init.values else None, path)
    except StorageError as error:
        allowed = f"the report cannot be written here: {error.reason}"
        raise InputError(str(error.path), None, allowed) from None
    return text


def tabulate(records: Sequence[Record], columns: str, metrics: Sequence[str]) -> Table:
    """Groups runs by row and column."""
    groups: dict[tuple[str, Any], list[Record]] = {}
    for record in records:
        groups.setdefault((_row(record, columns), _value(record, columns)), []).append(record)
    values = _unique(column for _, column in groups)
    if all(isinstance(value, int | float) for value in values):
        values = sorted(values)
    rows = _unique(row for row, _ in groups)
    cells = {
        (row, metric, column): _cell(groups.get((row, column), []), metric)
        for row in rows
        for metric in metrics
        for column in values
    }
    return Table(columns, tuple(values), tuple(rows), tuple(metrics), cells)


def markdown(records: Sequence[Record], table: Table) -> str:
    """The page: how many runs are finished, the table, the unfinished ones."""
    unfinished = [record for record in records if record.summary is None]
    counts = f"{counted(len(records))}: {len(records) - len(unfinished)} finished"
    if unfinished:
        counts += f", {len(unfinished)} unfinished"
    lines = [
        f"{counts}.",
        "",
        f"Mean ± standard deviation over seeds (number of seeds), by {_field_label(table.field)}.",
        "",
        _line(["variant", "", *table.columns]),
        _line(["---"] * 2 + ["---:"] * len(table.columns)),
    ]
    for row in table.rows:
        for metric in table.metrics:
            cells = [table.cells[row, metric, column] for column in table.columns]
            lines.append(_line([row, NUMBERS[metric].title, *cells]))
    if notes := _notes(records, table):
        lines += ["", *notes]
    if unfinished:
        lines += ["", "Unfinished, with the last line of its log:", ""]
        lines += [f"- {record.name}: {record.last_words}" for record in unfinished]
    return "\n".join(lines) + "\n"


def long_form(records: Sequence[Record], columns: str, metrics: Sequence[str]) -> str:
    """CSV, one row per run: its varied fields and the numbers of its summary."""
    fields = _unique([columns, *(name for record in records for name in record.cell)])
    always = [number.name for number in NUMBERS.values() if number.in_csv]
    results = _unique([*metrics, *always, "device"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "variant", *fields, "seed", "status", *results])
    for record in records:
        summary = record.summary or {}
        status = "unfinished" if record.summary is None else "finished"
        settings = [_value(record, name) for name in fields]
        found = [summary.get(name) for name in results]
        seed = record.config["seed"]
        writer.writerow([record.name, record.variant, *settings, seed, status, *found])
    return text.getvalue()


def plot(table: Table, untrained: float | None, path: os.PathLike[str]) -> None:
    """Each metric over the field of the columns, one line per row, error bars over seeds.

    Args:
      table: what is plotted.
      untrained: kNN before the first step, percent, mean of all runs; drawn as a dotted line.
      path: of the PNG file.
    """
    from matplotlib.figure import Figure

    numbers = all(isinstance(x, int | float) and x > 0 for x in table.columns)
    x_of = {value: value if numbers else i for i, value in enumerate(table.columns)}
    figure = Figure(figsize=(4.8 * len(table.metrics), 3.6), dpi=150, layout="constrained")
    for index, metric in enumerate(table.metrics):
        axes = figure.add_subplot(1, len(table.metrics), index + 1)
        for row in table.rows:
            cells = {x: table.cells[row, metric, x] for x in table.columns}
            points = [(x_of[x], c.mean, c.std or math.nan) for x, c in cells.items() if c.values]
            x, mean, std = zip(*points, strict=True) if points else ([], [], [])
            label = row if points else None  # colours follow the table, with or without points
            axes.errorbar(x, mean, std, marker="o", markersize=4, capsize=3, label=label)
        if numbers:
            axes.set_xscale("log")
        axes.set_xticks(list(x_of.values()), [str(value) for value in x_of])
        axes.minorticks_off()
        axes.set_xlabel(_field_label(table.field))
        axes.set_ylabel(NUMBERS[metric].title)
        if metric == "knn_top1" and untrained is not None:
            axes.axhline(untrained, color="grey", linestyle=":", label="untrained")
        if NUMBERS[metric].is_accuracy:
            _widen(axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        shown, _ = axes.get_legend_handles_labels()
        if len(shown) > 1:
            axes.legend(frameon=False)
    figure.savefig(path)


# --------------------------------------------------------------------------------------- pieces


def _check(records: Sequence[Record], columns: str, metrics: Sequence[str]) -> None:
    """Raises: InputError: no such field or number, or a summary that has no number there."""
    check_metrics(metrics)
    for record in records:
        if columns not in record.config:
            raise InputError("config.columns", columns, "a field of the runs is needed")
        for metric in metrics:
            value = (record.summary or {}).get(metric)
            if not isinstance(value, int | float | None):
                where = f"summary.json of run {record.name}"
                raise InputError(where, f"{metric} {value!r}", "a number is needed")


def _comparable(records: list[Record]) -> list[Record]:
    """Leaves out images/s of runs that counted padding (version 0.1.0) if others did not."""
    counts = {r.name: (r.summary or {}).get("padding_counted", True) for r in records if r.summary}
    if len(set(counts.values())) < 2:
        return records
    return [
        dataclasses.replace(r, summary={**r.summary, "images_per_second": None})
        if r.summary is not None and counts[r.name]
        else r
        for r in records
    ]


def _widen(axes: Any) -> None:
    """Shows at least ten points of accuracy, so that chance does not look like a trend."""
    low, high = axes.get_ylim()
    missing = max(0.0, 10.0 - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def _cell(records: Sequence[Record], metric: str) -> Cell:
    found = [record.summary.get(metric) for record in records if record.summary is not None]
    values = tuple(value for value in found if value is not None)
    return Cell(values, len(found), len(records))


def _notes(records: Sequence[Record], table: Table) -> list[str]:
    """What a reader needs to judge the numbers."""
    summaries = [record.summary for record in records if record.summary is not None]
    notes = []
    accuracies = [
        cell for (_, metric, _), cell in table.cells.items() if NUMBERS[metric].is_accuracy
    ]
    sizes = sorted({s["test_images"] for s in summaries if s.get("test_images")})
    if sizes and any(cell.values for cell in accuracies):
        notes.append(f"Accuracy on {' or '.join(f'{n:,}' for n in sizes)} test images.")
    if "knn_top1" in table.metrics and (at_init := _at_init(records)).values:
        notes.append(f"kNN of the untrained encoders, top-1 %: {at_init}.")
    if any(cell.finished and not cell.values for cell in table.cells.values()):
        notes.append(
            "-: finished without this number, which needs labels, is switched off, or (images/s of"
            " version 0.1.0) counted padding."
        )
    return notes


def _at_init(records: Sequence[Record]) -> Cell:
    return _cell([r for r in records if r.summary is not None], "knn_top1_at_init")


def _row(record: Record, columns: str) -> str:
    """The variant and the cell, without the field of the columns."""
    parts = [f"{name}={_plain(value)}" for name, value in record.cell.items() if name != columns]
    if record.variant:
        parts.insert(0, record.variant)
    return ", ".join(parts) or "all"


def _value(record: Record, field: str) -> Any:
    return _plain(record.config[field])


def _plain(value: Any) -> Any:
    """A value as tables print it, which may be a key: JSON lists become text."""
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "unset" if value is None else value


def _field_label(field: str) -> str:
    return _FIELD_LABELS.get(field, field)


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
