"""The report of a sweep: table, long form and plot."""

import csv
import itertools
import json
import signal
from pathlib import Path

import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.sweep.checks import METRICS
from mocosfl_jax.sweep.command import main
from mocosfl_jax.sweep.folder import SweepFolder
from mocosfl_jax.sweep.plots import plot
from mocosfl_jax.sweep.report import Cell, tabulate, write_report
from mocosfl_jax.sweep.table import Table
from tests.tiny_sweep import (
    FAKE,
    SWEEP,
    command,
    refused,
)

pytestmark = pytest.mark.usefixtures("no_gpu")


def finished_sweep(folder: Path) -> SweepFolder:
    """Two variants, two client counts, two seeds; two runs unfinished."""
    results = {
        ("A", 9, 0): (50.0, 40.0),
        ("A", 9, 1): (53.0, None),
        ("A", 100, 0): (60.0, 44.0),
        ("A", 100, 1): None,
        ("B", 9, 0): (70.0, 41.0),
        ("B", 100, 0): None,
    }
    runs = {}
    for (variant, clients, seed), result in results.items():
        name = f"{variant},num_clients={clients},seed={seed}"
        config = {"num_clients": clients, "seed": seed, "cut": 1}
        runs[name] = {"variant": variant, "cell": {"num_clients": clients}, "config": config}
        (folder / "runs" / name).mkdir(parents=True)
        if result:
            summary = dict(zip(("linear_top1", "knn_top1"), result, strict=True), steps=7)
            summary |= {"knn_top1_at_init": 20.0 + seed, "test_images": 1234}
            (folder / "runs" / name / "summary.json").write_text(json.dumps(summary))
    (folder / "runs" / "B,num_clients=100,seed=0" / "log.txt").write_text("what went wrong\n")
    definition = {"columns": "num_clients", "metrics": ["linear_top1", "knn_top1"], "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(definition))
    return SweepFolder(folder)


def test_the_table_of_a_sweep_that_is_not_finished(tmp_path, capsys):
    finished_sweep(tmp_path)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    page = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out == page
    # 50 and 53: mean 51.5, each 1.5 away from it, variance 2 * 2.25 / 1 = 4.5
    assert page.splitlines() == [
        "6 runs: 4 finished, 2 unfinished.",
        "",
        "Mean ± standard deviation over seeds (number of seeds), by number of clients.",
        "",
        "| variant |  | 9 | 100 |",
        "| --- | --- | ---: | ---: |",
        "| A | linear probe, top-1 % | 51.50 ± 2.12 (2) | 60.00 (1 of 2) |",
        "| A | kNN, top-1 % | 40.00 (1 of 2) | 44.00 (1 of 2) |",
        "| B | linear probe, top-1 % | 70.00 (1) | - (0 of 1) |",
        "| B | kNN, top-1 % | 41.00 (1) | - (0 of 1) |",
        "",
        "Accuracy on 1,234 test images.",
        "kNN at the start, top-1 %: 20.25 ± 0.50 (4).",
        "",
        "Unfinished, with the last line of its log:",
        "",
        "- A,num_clients=100,seed=1: no output",
        "- B,num_clients=100,seed=0: what went wrong",
    ]


def test_a_report_that_cannot_be_written(tmp_path, capsys):
    finished_sweep(tmp_path)
    (tmp_path / "report.csv").mkdir()
    line = refused(capsys, ["sweep", "--workdir", str(tmp_path), "--report"])
    assert "report.csv" in line and "cannot be written" in line


def test_a_signal_does_not_break_the_report(capsys, npz, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)
        return "the report\n"

    monkeypatch.setattr("mocosfl_jax.sweep.command.write_report", interrupted)
    assert main(command(npz), FAKE) == 130
    out, err = capsys.readouterr()
    assert out.endswith("the report\n")
    assert err == "mocosfl_jax.sweep: stopped; run the same command to continue\n"


@pytest.mark.filterwarnings("error")
def test_a_report_before_any_run_is_finished(tmp_path, capsys):
    folder = finished_sweep(tmp_path)
    for name in folder.definition()["runs"]:
        (folder.run_path(name) / "summary.json").unlink(missing_ok=True)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    assert "6 runs: 0 finished, 6 unfinished." in capsys.readouterr().out
    assert (tmp_path / "report.png").exists()


def test_a_damaged_summary_is_told_beside_the_others(tmp_path, capsys):
    folder = finished_sweep(tmp_path)
    path = folder.run_path("B,num_clients=9,seed=0") / "summary.json"
    path.write_text(path.read_text()[:30])
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    out = capsys.readouterr().out
    assert "6 runs: 3 finished, 3 unfinished." in out
    assert "| A | linear probe, top-1 % | 51.50 ± 2.12 (2) | 60.00 (1 of 2) |" in out
    (line,) = (line for line in out.splitlines() if line.startswith("- B,num_clients=9,seed=0: "))
    assert f"{path} = 'unreadable': JSON is needed" in line
    assert line.endswith("; move it away, and the run's own command makes it again")


def test_the_long_form_has_a_row_a_run(tmp_path):
    finished_sweep(tmp_path)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    first, *_, last = rows
    assert len(rows) == 6
    assert list(first)[:7] == [
        *("run", "variant", "num_clients", "seed", "status", "linear_top1", "knn_top1")
    ]
    assert (first["variant"], first["num_clients"], first["status"]) == ("A", "9", "finished")
    assert (first["linear_top1"], first["steps"], first["wall_seconds"]) == ("50.0", "7", "")
    assert (last["run"], last["status"], last["linear_top1"]) == (
        *("B,num_clients=100,seed=0", "unfinished", ""),
    )


def test_speeds_that_counted_padding_are_not_shown_beside_others(tmp_path, capsys):
    """Version 0.1.0 did, and its summaries do not say so."""
    folder = finished_sweep(tmp_path)
    report = ["sweep", "--workdir", str(tmp_path), "--report"]
    paths = sorted(tmp_path.glob("runs/*/summary.json"))
    for path, speed in zip(paths, (400.0, 100.0, 200.0, 300.0), strict=True):
        path.write_text(json.dumps({"images_per_second": speed}))
    config = tmp_path / "config.py"
    config.write_text(
        "from mocosfl_jax.sweep.definition import default_sweep\n"
        "def get_config():\n    sweep = default_sweep()\n"
        "    sweep.metrics = ('images_per_second',)\n    return sweep\n"
    )
    report += ["--config", str(config)]
    assert main(report) == 0  # old ones among themselves
    assert (
        "| A | training speed, images/s | 150.00 ± 70.71 (2) | 400.00 (1 of 2) |"
        in capsys.readouterr().out
    )
    new = {"images_per_second": 300.0, "padding_counted": False}
    (folder.run_path("B,num_clients=9,seed=0") / "summary.json").write_text(json.dumps(new))
    assert main(report) == 0
    out = capsys.readouterr().out
    assert "| A | training speed, images/s | - (2) | - (1 of 2) |" in out
    assert "| B | training speed, images/s | 300.00 (1) |" in out
    assert "counted padding" in out


def test_the_plot_is_an_image(tmp_path):
    from PIL import Image

    finished_sweep(tmp_path)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    with Image.open(tmp_path / "report.png") as image:
        pixels = image.convert("RGB").getcolors(image.width * image.height)
    assert len(pixels) > 50


def test_rows_are_what_the_columns_leave(tmp_path):
    records = finished_sweep(tmp_path).records()
    table = tabulate(records, "seed", ["linear_top1"])
    assert (table.columns, table.rows) == (
        (0, 1),
        ("A, num_clients=9", "A, num_clients=100", "B, num_clients=9", "B, num_clients=100"),
    )
    assert table.cells["A, num_clients=9", "linear_top1", 1] == Cell((53.0,), 1, 1)
    assert str(table.cells["B, num_clients=9", "linear_top1", 1]) == ""


def test_other_columns_and_metrics_from_the_config(tmp_path, capsys):
    finished_sweep(tmp_path)
    report = ["sweep", "--workdir", str(tmp_path), "--report", "--config", SWEEP]
    assert main([*report, "--config.columns=seed", "--config.metrics=steps"]) == 0
    assert "| A, num_clients=9 | steps | 7.00 (1) | 7.00 (1) |" in capsys.readouterr().out
    assert main([*report, "--config.metrics=accuracy"]) == 2
    assert "config.metrics = 'accuracy'" in capsys.readouterr().err


def test_a_metric_that_no_run_has_is_refused_before_any_run(tmp_path, capsys):
    argv = ["sweep", "--workdir", str(tmp_path), "--dry_run", "--config", SWEEP]
    assert main([*argv, "--config.metrics=knn_top"]) == 2
    assert "config.metrics = 'knn_top': one of" in capsys.readouterr().err


def test_a_finished_run_without_a_metric_is_finished():
    assert str(Cell((), finished=2, runs=2)) == "- (2)"
    assert str(Cell((), finished=1, runs=2)) == "- (1 of 2)"


def test_numbers_that_a_summary_lacks_or_has_as_text(tmp_path, capsys):
    folder = finished_sweep(tmp_path)
    report = ["sweep", "--workdir", str(tmp_path), "--report", "--config", SWEEP]
    assert main([*report, "--config.metrics=knn_top1_raw_pixels"]) == 0  # older runs have no such
    assert "| B | kNN of raw pixels, at most 32x32, top-1 % | - (1) |" in capsys.readouterr().out
    path = folder.run_path("B,num_clients=9,seed=0") / "summary.json"
    path.write_text(json.dumps({"knn_top1": "high"}))
    assert main([*report, "--config.metrics=knn_top1"]) == 2
    assert "B,num_clients=9,seed=0 = \"knn_top1 'high'\"" in capsys.readouterr().err


def test_no_sweep_to_report_on(tmp_path, capsys):
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 2
    assert "no sweep lies here" in capsys.readouterr().err


def test_numbers_on_other_data_sets(tmp_path):
    """They are reported like any other, with the test images of their own data set."""
    folder = finished_sweep(tmp_path)
    name = "transfer/svhn/knn_top1"
    for seed, top1 in ((0, 30.0), (1, 33.0)):
        path = folder.run_path(f"A,num_clients=9,seed={seed}") / "summary.json"
        added = {name: top1, "transfer/svhn/test_images": 567, "transfer/svhn/dataset": "svhn"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **added}))
    page = write_report(folder, "num_clients", [name])
    assert "| A | kNN (transfer to svhn), top-1 % | 31.50 ± 2.12 (2) | - (1 of 2) |" in page
    assert "Accuracy on 567 test images." in page
    both = write_report(folder, "num_clients", ["knn_top1", name])
    assert "Accuracy on 567 or 1,234 test images." in both
    with (tmp_path / "report.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows["A,num_clients=9,seed=1"][name] == "33.0"
    assert rows["A,num_clients=9,seed=1"]["transfer/svhn/linear_top1"] == ""
    assert rows["B,num_clients=9,seed=0"][name] == ""
    with pytest.raises(InputError, match=r"'transfer/svhn/steps': transfer/NAME/one of linear_to"):
        write_report(folder, "num_clients", ["transfer/svhn/steps"])


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a table, and returns the figure."""
    from matplotlib.figure import Figure

    kept, savefig = [], Figure.savefig

    def keep(figure, path):
        savefig(figure, path)
        kept.append(figure)

    def draw(table: Table, at_start: float | None):
        plot(table, at_start, tmp_path / "plot.png")
        return kept.pop()

    monkeypatch.setattr(Figure, "savefig", keep)
    return draw


def table_of(rows, metrics, field="num_clients", columns=(9, 100)) -> Table:
    cells = itertools.product(rows, metrics, columns)
    return Table(field, columns, rows, metrics, {at: Cell((50.0, 53.0), 2, 2) for at in cells})


LONG = "transfer/the other data set/semi_10_top1"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [("A", "B" * 30 + " " + "b" * 80), tuple(map(str, range(30)))])
@pytest.mark.parametrize("metrics", [("knn_top1",), (LONG, "knn_top1")])
def test_names_fit_into_the_plot(drawn, rows, metrics):
    figure = drawn(table_of(rows, metrics), 20.0)
    (legend,) = figure.legends
    assert [text.get_text().replace("\n", " ") for text in legend.get_texts()] == [
        *rows,
        "at the start",
    ]
    labels = [axes.yaxis.label for axes in figure.axes]
    for text in (*legend.get_texts(), *labels):
        corners = text.get_window_extent().corners()
        assert figure.bbox.count_contains(corners) == 4, text.get_text()
    for axes in figure.axes:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert axes.get_window_extent().width > 0.5 * figure.bbox.width / (len(metrics) + 1)


def test_one_line_needs_no_legend(drawn):
    assert drawn(table_of(("A",), ("knn_top1",)), None).legends == []


@pytest.mark.filterwarnings("error")
def test_names_of_rows_stand_beside_the_points(drawn):
    rows = ("A", "B" * 30 + " " + "b" * 80)
    figure = drawn(table_of(rows, ("knn_top1", LONG), METRICS, ("",)), 20.0)
    first, second = figure.axes
    assert [text.get_text().replace("\n", " ") for text in first.get_yticklabels()] == list(rows)
    for text in (*first.get_yticklabels(), first.xaxis.label, second.xaxis.label):
        assert figure.bbox.count_contains(text.get_window_extent().corners()) == 4
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["at the start"]
    assert second.get_legend() is None  # no kNN
