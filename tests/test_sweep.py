"""Sweeps: how their runs are started, fail, stop and go on."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mocosfl_jax.config.stored import to_json
from mocosfl_jax.errors import InputError
from mocosfl_jax.main import main as train_main
from mocosfl_jax.sweep.command import main
from mocosfl_jax.sweep.engines import LocalEngine, Task, visible_gpus
from mocosfl_jax.sweep.folder import SweepFolder, last_line
from mocosfl_jax.sweep.runner import Board, StopRequest, Tally, carry_out
from tests import tiny
from tests.tiny_sweep import (
    BASE,
    FAKE,
    ROOT,
    calls,
    command,
    refused,
    run_path,
)

pytestmark = pytest.mark.usefixtures("no_gpu")


def test_failed_and_new_runs_are_run_again_finished_ones_are_not(capsys, npz, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "2/0=fail")
    assert main(command(npz), FAKE) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "mocosfl_jax.sweep: num_clients=2,seed=0 failed, exit status 1: what went wrong"
    ]
    assert "failed num_clients=2,seed=0 (0 of 2 runs done, 0 running, 1 failed, 1 left)" in out
    assert "finished num_clients=4,seed=0 in 00:0" in out
    assert "2 runs: 1 finished, 1 unfinished." in out
    log = (run_path(npz, "num_clients=2,seed=0") / "log.txt").read_text()
    assert "--config.num_clients=2" in log.splitlines()[0]

    monkeypatch.delenv("FAKE_RUN")
    assert main(command(npz, seeds=(0, 3)), FAKE) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], err) == ("1 of 4 runs are finished already", "")
    assert "4 runs: 4 finished." in out
    assert calls(npz) == {
        "num_clients=2,seed=0": 2,
        "num_clients=2,seed=3": 1,
        "num_clients=4,seed=0": 1,
        "num_clients=4,seed=3": 1,
    }


def test_a_run_that_always_fails_may_be_left_out(capsys, npz, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "2/0=fail")
    assert main(command(npz), FAKE) == 1
    capsys.readouterr()
    assert main(command(npz, **{"grid.num_clients": (4,)}), FAKE) == 0
    out, _ = capsys.readouterr()
    assert "num_clients=2,seed=0 is left out from now on; its files stay" in out
    assert "1 run: 1 finished." in out
    assert calls(npz) == {"num_clients=2,seed=0": 1, "num_clients=4,seed=0": 1}


def test_finished_runs_do_not_need_their_data(capsys, npz):
    assert main(command(npz), FAKE) == 0
    npz.unlink()
    assert main(command(npz), FAKE) == 0
    capsys.readouterr()
    assert "images.npz" in refused(capsys, command(npz, seeds=(0, 1)))  # a new run needs them
    assert "temperature" in refused(capsys, command(npz, **{"fixed.temperature": 0.25}))


def test_another_sweep_in_the_same_folder_is_refused(capsys, npz):
    assert main(command(npz), FAKE) == 0
    capsys.readouterr()
    line = refused(capsys, command(npz, **{"grid.num_clients": (4, 5)}))
    assert "finished run" in line and "num_clients=2,seed=0" in line
    other = command(npz, **{"fixed.temperature": 0.25})
    assert "temperature None -> 0.25" in refused(capsys, other)
    assert main(command(npz, **{"fixed.knn_every": 2}), FAKE) == 0  # says only how it is run
    assert calls(npz) == {"num_clients=2,seed=0": 1, "num_clients=4,seed=0": 1}


def test_a_field_may_be_set_to_what_its_rule_gave(capsys, npz):
    assert main(command(npz), FAKE) == 0
    for name in calls(npz):
        config, _ = tiny.load(npz, num_clients=int(name[len("num_clients=")]))
        (run_path(npz, name) / "config.json").write_text(json.dumps(to_json(config)))
    capsys.readouterr()
    assert main(command(npz, **{"fixed.temperature": 0.1}), FAKE) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    line = refused(capsys, command(npz, **{"fixed.temperature": 0.1, "fixed.ema": 0.9}))
    assert "ema 0.99 -> 0.9" in line


def test_a_run_and_a_sweep_do_not_share_a_folder(capsys, npz, monkeypatch):
    folder = npz.parent / "sweep"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for more in ((), ("--dry_run",)):
        line = refused(capsys, command(npz, *more))
        assert line.endswith(f"--workdir = '{folder}': a run lies here: another folder is needed\n")
    (folder / "config.json").unlink()
    assert main(command(npz), FAKE) == 0
    capsys.readouterr()
    argv = ["main", "--config", BASE, "--workdir", str(folder), *tiny.flags(npz)]
    for more in ((), ("--dry_run",)):
        assert train_main([*argv, *more]) == 2
        assert f"--workdir = '{folder}': a sweep lies here" in capsys.readouterr().err


def test_a_folder_is_held_by_one_process_but_can_be_reported_on(capsys, npz):
    assert main(command(npz), FAKE) == 0
    capsys.readouterr()
    with SweepFolder(npz.parent / "sweep").hold():
        assert "in use" in refused(capsys, command(npz))
        assert main(["sweep", "--workdir", str(npz.parent / "sweep"), "--report"]) == 0
        assert "2 runs: 2 finished." in capsys.readouterr().out


def test_a_signal_lets_runs_save_and_the_same_command_goes_on(npz, tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(
        "import sys\nfrom mocosfl_jax.sweep.command import main\n"
        f"sys.exit(main(sys.argv, {FAKE!r}))\n"
    )
    argv = command(npz, "--jobs=2", seeds=(0, 1))
    environment = {**os.environ, "FAKE_RUN": "2/0=wait 4/0=wait", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(script), *argv[1:]]
    sweep = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    waiting = [run_path(npz, f"num_clients={clients},seed=0") for clients in (2, 4)]
    while not all((path / "ready").exists() for path in waiting):
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.05)
    sweep.terminate()
    assert "run the same command to continue" in sweep.communicate()[1]
    assert sweep.returncode == 143
    assert all((path / "saved").exists() for path in waiting)
    assert set(calls(npz)) == {path.name for path in waiting}  # no other run was started
    assert main(argv, FAKE) == 0
    assert list(calls(npz).values()) == [2, 1, 2, 1]


def test_a_folder_stays_held_while_runs_outlive_the_sweep(tmp_path):
    folder = SweepFolder(tmp_path / "sweep")
    with folder.hold() as lock:
        engine = LocalEngine(1, keep_open=(lock.fileno(),))
        (job,) = engine.start([Task("a", ("sleep", "120"), tmp_path / "log.txt")])
    with pytest.raises(InputError, match="in use"):
        folder.hold()
    job.kill()
    folder.hold().close()


class StubbornJob:
    """Does not end before it is killed."""

    killed = stopped = False

    def poll(self) -> int | None:
        return -9 if self.killed else None

    def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None:
        self.killed = True


class StubbornEngine:
    slots = 1
    seconds_between_polls = 0.01

    def __init__(self, stop: StopRequest):
        self.jobs, self._stop = [], stop

    def start(self, tasks):
        self.jobs += [StubbornJob() for _ in tasks]
        self._stop(signal.SIGTERM, None)
        return self.jobs


def test_a_run_that_does_not_end_is_killed_after_the_grace_period(monkeypatch, tmp_path):
    monkeypatch.setattr("mocosfl_jax.sweep.runner.GRACE_SECONDS", 0.05)
    stop, tally = StopRequest(), Tally(total=2, slots=1)
    engine = StubbornEngine(stop)
    tasks = [Task(name, (), tmp_path / name) for name in ("a", "b")]
    carry_out(tasks, engine, tally, Board(tally), stop)
    assert [(job.stopped, job.killed) for job in engine.jobs] == [(True, True)]


def test_gpus_are_divided_between_the_processes_of_this_machine(monkeypatch):
    gpus = ("0", "2", "5")

    def shares(slots):
        engine = LocalEngine(slots, gpus)
        return [engine.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(engine.slots)]

    assert shares(None) == ["0", "2", "5"]
    assert shares(2) == ["0,5", "2"]
    assert shares(5) == ["0", "2", "5", "0", "2"]
    assert LocalEngine(5, gpus).environment(3)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert LocalEngine(None).slots == 1
    assert LocalEngine(2).environment(1) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-aa")
    assert visible_gpus() == ["3", "GPU-aa"]


def test_gpus_are_counted_by_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    listing = "GPU 0: A (UUID: GPU-x)\\n  MIG 1g: B\\nGPU 1: A (UUID: GPU-y)\\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus() == ["0", "1"]


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    assert last_line(log) == "no output"
    log.write_text("first\n 10%\r 20%\r\n\n")
    assert last_line(log) == "20%"


def test_the_progress_line(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    tally = Tally(total=9, slots=2, done=3, failed={"x": "why"}, running={"a": 980.0, "b": 990.0})
    assert str(tally) == "3 of 9 runs done, 2 running, 1 failed, 3 left"
    tally.seconds += [50.0, 70.0]  # (5 runs * 60 s - 20 s - 10 s) / 2 at a time
    assert str(tally).endswith(", 3 left, 02:15 to go")


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_the_progress_line_is_rewritten_in_place_on_a_terminal():
    terminal, tally = Terminal(), Tally(total=1, slots=1)
    board = Board(tally, terminal)
    board.event("started a")
    tally.done = 1
    board.refresh()
    board.close()
    lines = "0 of 1 runs done, 0 running, 1 left", "1 of 1 runs done, 0 running, 0 left"
    clear = "\r\x1b[K"
    assert terminal.text == f"{clear}started a\n{clear}{lines[0]}{clear}{lines[1]}{clear}"


# ------------------------------------------------------------------------------- earlier versions


@pytest.fixture
def earlier(npz) -> list[str]:
    """The command that continues a sweep of version 0.1.0, one run of which is finished.

    Its sweep.json calls variants `method`, and stores the defaults of fields that are now unset.
    """
    folder = SweepFolder(npz.parent / "sweep")
    text = (Path(__file__).parent / "version_0_1" / "sweep.json").read_text()
    folder.path.mkdir()
    folder.definition_path.write_text(text.replace("DATA", str(npz)))
    for name, summary in (("shared", {"knn_top1": 50.0, "steps": 18}), ("private", None)):
        path = folder.run_path(f"{name},num_clients=4,seed=0")
        path.mkdir(parents=True)
        if summary:
            (path / "summary.json").write_text(json.dumps(summary))
    fields = {name: value for name, value in tiny.FIELDS.items() if name != "num_clients"}
    script = npz.with_name("earlier.py")
    script.write_text(
        "from mocosfl_jax.sweep.definition import default_sweep\n"
        f"def get_config():\n    sweep = default_sweep()\n    sweep.base = {BASE!r}\n"
        f"    sweep.fixed.update({ {'dataset': f'npz:{npz}', **fields}!r})\n"
        "    sweep.grid.num_clients = (4,)\n"
        "    sweep.variants = {'shared': {}, 'private': {'feature_sharing': False}}\n"
        "    return sweep\n"
    )
    return ["sweep", "--config", str(script), "--workdir", str(folder.path)]


def test_a_sweep_of_an_earlier_version_is_reported(earlier, npz, capsys):
    assert main(["sweep", "--workdir", str(npz.parent / "sweep"), "--report"]) == 0
    out = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 unfinished." in out
    assert "| shared | kNN, top-1 % | 50.00 (1) |" in out
    with (npz.parent / "sweep" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["status"]) for row in rows] == [
        *(("private", "unfinished"), ("shared", "finished")),
    ]


def test_a_sweep_of_an_earlier_version_goes_on(earlier, npz, capsys):
    assert main(earlier, FAKE) == 0
    assert capsys.readouterr().out.startswith("1 of 2 runs are finished already\n")
    assert (run_path(npz, "private,num_clients=4,seed=0") / "calls").exists()
    assert not (run_path(npz, "shared,num_clients=4,seed=0") / "calls").exists()
    assert main(earlier, FAKE) == 0  # the definition has been written anew
    assert capsys.readouterr().out.startswith("2 of 2 runs are finished already\n")


def test_a_definition_that_stores_the_former_default_width_goes_on(npz, capsys):
    """Versions with a field `method` stored it too, until the backbone filled it."""
    argv = command(npz, **{"fixed.width": None})
    assert main(argv, FAKE) == 0
    path = SweepFolder(npz.parent / "sweep").definition_path
    text = path.read_text()
    assert '"width": null' in text
    path.write_text(text.replace('"width": null', '"width": 64'))
    capsys.readouterr()
    assert main(argv, FAKE) == 0
    assert "are finished already" in capsys.readouterr().out
    path.write_text(text.replace('"width": null', '"width": 32'))
    assert "width 32 -> None" in refused(capsys, argv)


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.2), ("cut", 2), ("epochs", 3)])
def test_an_earlier_version_stored_what_the_rules_fill_now(earlier, capsys, field, value):
    line = refused(capsys, [*earlier, f"--config.fixed.{field}={value}"])
    assert re.search(rf"{field} [\d.]+ -> {value}", line)


# ----------------------------------------------------------------------------------- real runs


def test_a_sweep_of_a_real_run(npz, capsys):
    assert main(command(npz, **{"grid.num_clients": (4,), "fixed.rounds": 1})) == 0
    assert "1 run: 1 finished." in capsys.readouterr().out
    (record,) = SweepFolder(npz.parent / "sweep").records()
    assert (record.summary["num_clients"], record.summary["rounds"]) == (4, 1)
    assert 0 < record.summary["knn_top1"] <= 100
