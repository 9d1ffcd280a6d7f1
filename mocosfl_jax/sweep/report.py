"""The report of a sweep: report.csv (one row per run), report.md (a table), report.png (a plot) and
scatter.png (one number over another)."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.numbers import (
    ATTACK_NUMBERS,
    NUMBERS,
    TRANSFER_NUMBERS,
    images_behind,
    number_of,
)
from mocosfl_jax.run.storage import StorageError, write_text
from mocosfl_jax.run.summary import by_transfer
from mocosfl_jax.sweep.checks import METRICS, check_metrics, check_scatter
from mocosfl_jax.sweep.definition import counted
from mocosfl_jax.sweep.folder import Record, SweepFolder
from mocosfl_jax.sweep.plots import plot, scatter
from mocosfl_jax.sweep.table import Cell, Table, cell_of, plain, tabulate, unique

_UNWRITTEN = "the report cannot be written here"


def write_report(
    folder: SweepFolder, columns: str, metrics: Sequence[str], xy: Sequence[str] = ()
) -> str:
    """Writes the files from what is finished so far; returns the text of report.md.

    Args:
      folder: of the sweep, which may be running.
      columns: field whose values are the columns and the x axis; or METRICS.
      metrics: names of numbers, as in `number_of`.
      xy: the two of the scatter plot; empty: none is drawn.
    Raises: InputError: there is no sweep in the folder, a run has no such field, there is no such
    number, or a file cannot be written.
    """
    records = _comparable(folder.records())
    _check(records, columns, metrics, xy)
    table = tabulate(records, columns, metrics)
    text = markdown(records, table)
    at_init = _at_init(records)
    try:
        write_text(folder.path / "report.csv", long_form(records, columns, [*metrics, *xy]))
        write_text(folder.path / "report.md", text)
        plot(table, at_init.mean if at_init.values else None, folder.path / "report.png")
        if xy:
            scatter(tabulate(records, columns, xy), folder.path / "scatter.png")
    except StorageError as error:
        raise InputError(str(error.path), None, f"{_UNWRITTEN}: {error.reason}") from None
    except OSError as error:
        path = str(error.filename or folder.path)
        raise InputError(path, None, f"{_UNWRITTEN}: {error.strerror}") from None
    return text


def markdown(records: Sequence[Record], table: Table) -> str:
    """The page: how many runs are finished, the table, the unfinished ones."""
    unfinished = [record for record in records if not record.finished]
    counts = f"{counted(len(records))}: {len(records) - len(unfinished)} finished"
    if unfinished:
        counts += f", {len(unfinished)} unfinished"
    by = "" if table.field == METRICS else f", by {table.field_label}"
    lines = [
        f"{counts}.",
        "",
        f"Mean ± standard deviation over seeds (number of seeds){by}.",
        "",
        *(_a_column_a_metric(table) if table.field == METRICS else _a_line_a_metric(table)),
    ]
    if notes := _notes(records, table):
        lines += ["", *notes]
    if unfinished:
        lines += ["", "Unfinished, with the last line of its log:", ""]
        lines += [f"- {record.name}: {record.last_words}" for record in unfinished]
    return "\n".join(lines) + "\n"


def long_form(records: Sequence[Record], columns: str, metrics: Sequence[str]) -> str:
    """CSV, one row per run: its varied fields, the numbers of its summary, those of transfers among
    them, and of attacks on it."""
    varied = [name for record in records for name in record.cell]
    fields = unique(varied if columns == METRICS else [columns, *varied])
    always = [number.name for number in NUMBERS.values() if number.in_csv]
    further = [*_of_transfers(records), *_of_attacks(records), "epsilon_scope", "device"]
    results = unique([*metrics, *always, *further])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "variant", *fields, "seed", "status", *results])
    for record in records:
        status = "finished" if record.finished else "unfinished"
        settings = [plain(record.config[name]) for name in fields]
        found = [record.numbers.get(name) for name in results]
        seed = record.config["seed"]
        writer.writerow([record.name, record.variant, *settings, seed, status, *found])
    return text.getvalue()


# --------------------------------------------------------------------------------------- pieces


def _check(
    records: Sequence[Record], columns: str, metrics: Sequence[str], xy: Sequence[str]
) -> None:
    """Raises: InputError: no such field or number, or a file that has no number there."""
    check_metrics(metrics)
    check_scatter(xy)
    for record in records:
        if columns != METRICS and columns not in record.config:
            allowed = f"a field of the runs, or {METRICS}, is needed"
            raise InputError("config.columns", columns, allowed)
        for metric in (*metrics, *xy):
            value = record.numbers.get(metric)
            if not isinstance(value, int | float | None):
                file = "attack" if metric.startswith("attack/") else "summary"
                where = f"{file}.json of run {record.name}"
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


def _a_line_a_metric(table: Table) -> list[str]:
    lines = [
        _line(["variant", "", *table.columns]),
        _line(["---"] * 2 + ["---:"] * len(table.columns)),
    ]
    for row in table.rows:
        for metric in table.metrics:
            cells = [table.cells[row, metric, column] for column in table.columns]
            lines.append(_line([row, number_of(metric).title, *cells]))
    return lines


def _a_column_a_metric(table: Table) -> list[str]:
    lines = [
        _line(["variant", *(number_of(metric).title for metric in table.metrics)]),
        _line(["---"] + ["---:"] * len(table.metrics)),
    ]
    for row in table.rows:
        lines.append(_line([row, *(table.cells[row, metric, ""] for metric in table.metrics)]))
    return lines


def _of_transfers(records: Sequence[Record]) -> list[str]:
    """Names of the numbers that report.csv has of every transfer."""
    transfers = sorted({name for record in records for name in by_transfer(record.summary or {})})
    numbers = [number.name for number in TRANSFER_NUMBERS.values() if number.in_csv]
    return [f"transfer/{transfer}/{number}" for transfer in transfers for number in numbers]


def _of_attacks(records: Sequence[Record]) -> list[str]:
    """Names of the numbers that report.csv has of every attack."""
    attacks = sorted({name.rpartition("/")[0] for record in records for name in record.attacks})
    numbers = [number.name for number in ATTACK_NUMBERS.values() if number.in_csv]
    return [f"{attack}/{number}" for attack in attacks for number in numbers]


def _notes(records: Sequence[Record], table: Table) -> list[str]:
    """What a reader needs to judge the numbers."""
    summaries = [record.summary for record in records if record.summary is not None]
    notes = []
    accuracies = {
        metric
        for (_, metric, _), cell in table.cells.items()
        if cell.values and number_of(metric).is_accuracy
    }
    found = {s.get(images_behind(metric)) for s in summaries for metric in accuracies}
    sizes = sorted(size for size in found if size)
    if sizes:
        notes.append(f"Accuracy on {' or '.join(f'{n:,}' for n in sizes)} test images.")
    notes += _of_methods(records)
    if "knn_top1" in table.metrics and (at_init := _at_init(records)).values:
        notes.append(f"kNN at the start, top-1 %: {at_init}.")
    if any(cell.finished and not cell.values for cell in table.cells.values()):
        notes.append(
            "-: finished without this number, which needs labels, a command or another setting, or"
            " (images/s of version 0.1.0) counted padding."
        )
    return notes


def _of_methods(records: Sequence[Record]) -> list[str]:
    """What the methods say of their runs, once each, with the variants that it is about."""
    about: dict[str, list[str]] = {}
    for record in records:
        for note in (record.summary or {}).get("notes", ()):
            about.setdefault(note, []).append(record.variant or record.name)
    return [f"{', '.join(unique(names))}: {note}." for note, names in about.items()]


def _at_init(records: Sequence[Record]) -> Cell:
    return cell_of([r for r in records if r.summary is not None], "knn_top1_at_init")


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
