"""Commands that follow the runs of a sweep, and the numbers that they leave."""

import csv
import json
import math
import signal
import statistics
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mocosfl_jax.evaluation.numbers import number_of
from mocosfl_jax.sweep.command import main
from mocosfl_jax.sweep.definition import default_sweep, expand
from mocosfl_jax.sweep.engines import SlurmEngine, Task
from mocosfl_jax.sweep.folder import SweepFolder
from mocosfl_jax.sweep.runner import Board, StopRequest, Tally, carry_out
from tests import tiny

ROOT = Path(__file__).parent.parent
FAKE = (sys.executable, str(ROOT / "tests" / "fake_run.py"))
A, B, C = "fake_command --name=a", "fake_command --name=b --ratio 0.75", "fake_command --name=c"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No GPU, whatever the machine has; the fake command is a module that can be found."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    for name in ("FAKE_RUN", "FAKE_COMMAND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sweep(tmp_path):
    """Makes the command of a sweep of 2 and 4 clients in DIR/sweep, its fields as given."""
    npz = tiny.write_npz(tmp_path / "images.npz")

    def command(*options: str, **fields) -> list[str]:
        fixed = {"dataset": f"npz:{npz}", **tiny.FIELDS}
        del fixed["num_clients"]
        fields = {"grid.num_clients": (2, 4), **fields}
        lines = [f"sweep.{name} = {value!r}" for name, value in fields.items()]
        config = tmp_path / "sweep.py"
        config.write_text(
            "from mocosfl_jax.sweep.definition import default_sweep\n"
            f"def get_config():\n    sweep = default_sweep()\n"
            f"    sweep.base = {str(ROOT / 'configs' / 'cifar10.py')!r}\n"
            f"    sweep.fixed.update({fixed!r})\n    {'; '.join(lines)}\n    return sweep\n"
        )
        return ["sweep", "--config", str(config), "--workdir", str(tmp_path / "sweep"), *options]

    return command


def calls(tmp_path: Path) -> dict[int, list[str]]:
    """What was started for each number of clients, in order; the training has a blank line."""
    folders = {clients: f"num_clients={clients},seed=0" for clients in (2, 4)}
    runs = tmp_path / "sweep" / "runs"
    return {n: (runs / name / "calls").read_text().splitlines() for n, name in folders.items()}


# -------------------------------------------------------------------------------------- running


def test_commands_follow_each_run_in_their_order(sweep, tmp_path, capsys):
    more = ({"num_clients": (4,), "commands": (B,)},)
    assert main(sweep(commands=(C, A), more_commands=more), FAKE) == 0
    assert calls(tmp_path) == {2: ["", "c", "a"], 4: ["", "c", "a", "b"]}
    out = capsys.readouterr().out
    started = [line.removeprefix("started ") for line in out.splitlines() if "started" in line]
    assert [line.partition(" (")[0] for line in started] == [
        *("num_clients=2,seed=0", f"num_clients=2,seed=0: {C}", f"num_clients=2,seed=0: {A}"),
        *("num_clients=4,seed=0", f"num_clients=4,seed=0: {C}", f"num_clients=4,seed=0: {A}"),
        f"num_clients=4,seed=0: {B}",
    ]
    assert started[2].endswith("(0 of 2 runs done, 1 running, 1 left)")
    assert "2 runs: 2 finished." in out
    log = (tmp_path / "sweep" / "runs" / "num_clients=4,seed=0" / "log.txt").read_text()
    assert f"-m {B} --workdir {tmp_path}" in log


def test_the_same_command_goes_on_where_a_command_failed(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_COMMAND", "b")
    fields = {"commands": (A, B, C), "metrics": ("linear_top1", "attack/b/mse_ratio")}
    fields["grid.num_clients"] = (2,)
    assert main(sweep(**fields), FAKE) == 1
    out, err = capsys.readouterr()
    name = "num_clients=2,seed=0"
    assert err == f"mocosfl_jax.sweep: {name} failed, {B}: exit status 3: why it failed\n"
    assert f"failed {name}: {B} (0 of 1 runs done" in out
    assert "1 run: 0 finished, 1 unfinished." in out
    assert "| linear probe, top-1 % | 59.80 (1) |" in out
    assert "| MSE over the trivial attacker's (b) | - (0 of 1) |" in out
    assert f"- {name}: why it failed" in out

    monkeypatch.delenv("FAKE_COMMAND")
    assert main(sweep(**fields), FAKE) == 0
    out, err = capsys.readouterr()
    assert (tmp_path / "sweep" / "runs" / name / "calls").read_text().split("\n") == [
        *("", "a", "b", "b", "c", ""),
    ]
    assert "| MSE over the trivial attacker's (b) | 0.750 (1) |" in out
    assert main(sweep(**fields), FAKE) == 0
    assert capsys.readouterr().out.startswith("1 of 1 runs are finished already\n1 run")


def test_a_run_that_came_out_otherwise_gets_its_commands_again(sweep, tmp_path, capsys):
    assert main(sweep(commands=(A,)), FAKE) == 0
    path = tmp_path / "sweep" / "runs" / "num_clients=4,seed=0" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder": "another"}))
    before = calls(tmp_path)
    assert main(sweep(commands=(A,)), FAKE) == 0
    assert calls(tmp_path) == {2: before[2], 4: [*before[4], before[4][-1]]}


def test_a_finished_run_gets_what_is_new_alone(sweep, tmp_path, capsys):
    assert main(sweep(commands=(A,)), FAKE) == 0
    assert main(sweep(commands=(B, A)), FAKE) == 0
    assert calls(tmp_path) == {2: ["", "a", "b"], 4: ["", "a", "b"]}
    assert main(sweep(commands=(B,)), FAKE) == 0
    assert main(sweep(), FAKE) == 0
    assert calls(tmp_path) == {2: ["", "a", "b"], 4: ["", "a", "b"]}
    capsys.readouterr()
    assert main(sweep(commands=(A,), **{"grid.num_clients": (4,)}), FAKE) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_a_trained_run_may_not_be_dropped_for_a_command_that_fails(sweep, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_COMMAND", "a")
    assert main(sweep(commands=(A,)), FAKE) == 1
    assert main(sweep(**{"grid.num_clients": (4,)}), FAKE) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_commands_of_a_cluster_follow_too(sweep, tmp_path, monkeypatch):
    engine = SlurmEngine(tmp_path / "slurm", None, {"timeout_min": 5}, "local")
    monkeypatch.setattr("mocosfl_jax.sweep.command._engine", lambda *_: engine)
    assert main(sweep(commands=(A,)), FAKE) == 0
    assert calls(tmp_path) == {2: ["", "a"], 4: ["", "a"]}


def test_a_list_of_commands_that_cannot_be_written(sweep, tmp_path, capsys):
    (tmp_path / "sweep" / "runs" / "num_clients=2,seed=0" / "commands.json.partial").mkdir(
        parents=True
    )
    assert main(sweep(commands=(A,)), FAKE) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "commands.json cannot be written" in line


class Ended:
    """A job that ended well at once."""

    def poll(self) -> int:
        return 0


class Instant:
    slots, seconds_between_polls = 2, 0.0

    def __init__(self):
        self.started: list[str] = []

    def start(self, tasks):
        self.started += map(str, tasks)
        return [Ended() for _ in tasks]


def test_what_follows_comes_before_other_runs_and_not_after_a_stop(tmp_path):
    def chain(run: str) -> Task:
        last = Task(run, (), tmp_path, "y")
        return Task(run, (), tmp_path, then=Task(run, (), tmp_path, "x", then=last))

    engine, stop, tally = Instant(), StopRequest(), Tally(total=3, slots=2)
    ended = []

    def ended_well(task: Task) -> None:
        ended.append(str(task))
        if str(task) == "c: x":
            stop(signal.SIGTERM, None)

    carry_out([chain(run) for run in "abc"], engine, tally, Board(tally), stop, ended_well)
    assert engine.started == ["a", "b", "a: x", "b: x", "a: y", "b: y", "c", "c: x"]
    assert ended == engine.started
    assert (tally.done, tally.failed, list(tally.running)) == (2, {}, ["c"])


# ----------------------------------------------------------------------------------- definition


def test_commands_of_variants():
    sweep = sweep_of(commands=(A, B), variants={"P": {"cut": 1}, "Q": {"cut": 2}}, seeds=(3, 5))
    sweep.more_commands = ({"variant": ("Q",), "commands": (C, A)},)
    found = {(run.variant, run.seed): run.commands for run in expand(sweep).values()}
    assert found == {
        **dict.fromkeys([("P", 3), ("P", 5)], (A, B)),
        **dict.fromkeys([("Q", 3), ("Q", 5)], (A, B, C)),
    }


def sweep_of(**fields) -> ConfigDict:
    sweep = default_sweep()
    sweep.base = "base.py"
    sweep.update(fields)
    return sweep


def test_a_dry_run_shows_them(sweep, capsys):
    more = ({"num_clients": (4,), "commands": (B,)},)
    assert main(sweep("--dry_run", more_commands=more), FAKE) == 0
    assert capsys.readouterr().out.splitlines() == [
        *("num_clients=2,seed=0", "num_clients=4,seed=0", f"  then {B}", "2 runs"),
    ]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("commands", ("no_such_module --name=a",), "config.commands = 'no_such_module --name=a'"),
        ("commands", ("no_such.module",), "a module that exists and its options"),
        ("commands", ("",), "config.commands = ''"),
        ("commands", (f"{A} 'open",), "config.commands"),
        ("commands", (f"{A} --workdir=x",), "without --workdir"),
        ("commands", (3,), "config.commands = 3"),
        ("commands", None, "config.commands = None: a value is needed"),
        (
            "commands",
            ("mocosfl_jax.attack --decoder=N4",),
            "'mocosfl_jax.attack --decoder=N4': --decoder",
        ),
        ("commands", ("mocosfl_jax.attack --decodr=x",), "--decodr = 'x': there is no such option"),
        (
            "commands",
            ("mocosfl_jax.evaluate --protocols=knm",),
            "--protocols = 'knm': one or more of knn",
        ),
        ("fixed.init_from", "nowhere", "config.init_from = 'nowhere': nowhere is missing: a run"),
        ("more_commands", ({"cut": (1,), "commands": (A,)},), "config.more_commands"),
        ("more_commands", ({"num_clients": (2,), "seeds": (1,)},), "and commands: "),
        ("scatter", ("linear_top1",), "config.scatter = ('linear_top1',): two numbers"),
        ("scatter", ("linear_top1", "attack/a/msee"), "'attack/a/msee': attack/NAME/one of mse"),
        ("metrics", ("attack/mse_ratio",), "config.metrics = 'attack/mse_ratio'"),
        ("metrics", ("attack/a/mse_ratio",), "'attack/a/mse_ratio': no command of the sweep makes"),
        ("scatter", ("steps", "transfer/svhn/knn_top1"), "no command of the sweep makes transfer/"),
        ("columns", "cut", "config.columns = 'cut': a field that varies"),
    ],
)
def test_wrong_fields_are_refused(sweep, capsys, field, value, words):
    assert main(sweep(**{field: value}), FAKE) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


# --------------------------------------------------------------------------------------- report


def finished_sweep(folder: Path) -> SweepFolder:
    """Two variants, two seeds; the run B,seed=5 was attacked but is not trained yet, and A,seed=3
    was attacked at step 6 of 7, too."""
    accuracy = {("A", 3): 50.0, ("A", 5): 53.0, ("B", 3): 40.0, ("B", 5): None}
    ratio = {("A", 3): 0.25, ("A", 5): 0.125, ("B", 3): 1.0625, ("B", 5): 0.9}
    runs = {}
    for (variant, seed), top1 in accuracy.items():
        name = f"{variant},seed={seed}"
        runs[name] = {"variant": variant, "cell": {}, "config": {"seed": seed}, "commands": []}
        attack = folder / "runs" / name / "attack" / "N4C64"
        attack.mkdir(parents=True)
        report = {"step": 7, "mse_ratio": ratio[variant, seed], "psnr": {"mean": 12.5, "std": 3.0}}
        (attack / "attack.json").write_text(json.dumps({**report, "device": "cpu"}))
        if top1 is not None:
            summary = {"steps": 7, "linear_top1": top1, "bytes_up_per_client_round": 1234567 + seed}
            (folder / "runs" / name / "summary.json").write_text(json.dumps(summary))
    early = folder / "runs" / "A,seed=3" / "attack" / "early"
    early.mkdir()
    (early / "attack.json").write_text(json.dumps({"step": 6, "mse_ratio": 0.5}))
    definition = {
        "columns": "metrics",
        "metrics": ["linear_top1", "attack/N4C64/mse_ratio", "bytes_up_per_client_round"],
        "scatter": ["attack/N4C64/mse_ratio", "linear_top1"],
        "runs": runs,
    }
    (folder / "sweep.json").write_text(json.dumps(definition))
    return SweepFolder(folder)


def test_the_table_with_a_column_a_number(tmp_path, capsys):
    """Ratios 0.25 and 0.125: mean 0.1875, each 0.0625 away from it; bytes 1 to each side."""
    finished_sweep(tmp_path)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "4 runs: 3 finished, 1 unfinished.",
        "",
        "Mean ± standard deviation over seeds (number of seeds).",
        "",
        "| variant | linear probe, top-1 % | MSE over the trivial attacker's (N4C64) |"
        " sent by a client in a round, bytes |",
        "| --- | ---: | ---: | ---: |",
        "| A | 51.50 ± 2.12 (2) | 0.188 ± 0.088 (2) | 1,234,571 ± 1 (2) |",
        "| B | 40.00 (1 of 2) | 1.062 (1 of 2) | 1,234,570 (1 of 2) |",
        "",
        "Unfinished, with the last line of its log:",
        "",
        "- B,seed=5: no output",
    ]
    assert {path.name for path in tmp_path.glob("*.png")} == {"report.png", "scatter.png"}


def test_notes_of_the_runs_stand_below_the_table(tmp_path, capsys):
    """So does what an epsilon covers, which the long form has beside it."""
    finished_sweep(tmp_path)
    ledger, note = "epsilon 9 at delta 1e-05: latents only", "accuracies are without noise"
    for name, notes in (("A,seed=3", [ledger, note]), ("A,seed=5", [ledger]), ("B,seed=3", [note])):
        path = tmp_path / "runs" / name / "summary.json"
        scope = {"epsilon": 9.0, "epsilon_scope": "latents only"} if ledger in notes else {}
        path.write_text(json.dumps({**json.loads(path.read_text()), **scope, "notes": notes}))
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"A: {ledger}." in said and f"A, B: {note}." in said
    with (tmp_path / "report.csv").open() as file:
        rows = {row["run"]: (row["epsilon"], row["epsilon_scope"]) for row in csv.DictReader(file)}
    assert rows["A,seed=3"] == ("9.0", "latents only") and rows["B,seed=3"] == ("", "")


def test_the_long_form_has_the_numbers_of_all_attacks(tmp_path):
    finished_sweep(tmp_path)
    other = tmp_path / "runs" / "A,seed=5" / "attack" / "other"
    other.mkdir()
    (other / "attack.json").write_text(json.dumps({"step": 7, "ssim": {"mean": 0.5, "std": 0.25}}))
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    with (tmp_path / "report.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    names = ("attack/N4C64/mse_ratio", "attack/N4C64/psnr.mean", "attack/other/ssim.mean")
    assert {run: [row[name] for name in names] for run, row in rows.items()} == {
        "A,seed=3": ["0.25", "12.5", ""],
        "A,seed=5": ["0.125", "12.5", "0.5"],
        "B,seed=3": ["1.0625", "12.5", ""],
        "B,seed=5": ["", "", ""],
    }
    assert not {"attack/N4C64/device", "attack/early/mse_ratio"} & rows["A,seed=3"].keys()


def test_a_point_of_the_scatter_plot_is_a_variant(tmp_path, monkeypatch, capsys):
    from matplotlib.axes import Axes

    drawn, errorbar = {}, Axes.errorbar

    def record(axes, x, y, yerr=None, xerr=None, **style):
        if axes.get_figure().axes == [axes]:  # report.png has one for each number
            drawn[style["label"]] = (x, y, *(0.0 if math.isnan(e) else e for e in (xerr, yerr)))
        return errorbar(axes, x, y, yerr, xerr, **style)

    monkeypatch.setattr(Axes, "errorbar", record)
    finished_sweep(tmp_path)
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 0
    both = statistics.stdev([0.25, 0.125]), statistics.stdev([50.0, 53.0])
    assert drawn == {"A": (0.1875, 51.5, *both), "B": (1.0625, 40.0, 0.0, 0.0)}


def test_a_number_of_an_attack_that_is_none(tmp_path, capsys):
    finished_sweep(tmp_path)
    path = tmp_path / "runs" / "A,seed=3" / "attack" / "N4C64" / "attack.json"
    path.write_text(json.dumps({"step": 7, "mse_ratio": "small"}))
    assert main(["sweep", "--workdir", str(tmp_path), "--report"]) == 2
    assert "attack.json of run A,seed=3" in capsys.readouterr().err


def test_numbers_are_found_by_their_names():
    assert number_of("knn_top1").title == "kNN, top-1 %"
    number = number_of("attack/N4C64/psnr.mean")
    assert (number.name, number.title) == ("attack/N4C64/psnr.mean", "PSNR (N4C64), dB")
    for name in ("psnr.mean", "attack//psnr.mean", "attack/a/knn_top1", "other/a/mse_ratio", "a/b"):
        with pytest.raises(KeyError):
            number_of(name)
