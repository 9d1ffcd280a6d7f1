"""Command line: `python -m mocosfl_jax.sweep --config configs/sweeps/X.py --workdir DIR`.

Options:
  --config.FIELD=VALUE  overrides a field of the sweep, e.g. --config.seeds=0,1,2,
                        --config.grid.num_clients=10,50 or --config.fixed.epochs=4
  --engine local|slurm  processes on this machine (default), or jobs of a Slurm cluster
  --jobs N              runs at a time; default: local: one per GPU, one without GPUs; slurm: all
  --dry_run             checks and lists the runs, and stops
  --report              writes the report of what is finished, and stops; needs no --config

Exit status: 0 all runs and their commands are finished; 1 some failed, or a file could not be
written; 2 bad input, one line on stderr; 143 or 130 stopped by a signal. Run the same command to
continue a sweep that was stopped, and to repeat what failed.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from mocosfl_jax.errors import InputError
from mocosfl_jax.run.commandline import parse
from mocosfl_jax.run.console import FAILED, answered, end, say_line
from mocosfl_jax.sweep.definition import Run, columns_of, counted, expand
from mocosfl_jax.sweep.engines import Engine, LocalEngine, SlurmEngine, Task, visible_gpus
from mocosfl_jax.sweep.folder import SweepFolder
from mocosfl_jax.sweep.preflight import check
from mocosfl_jax.sweep.report import write_report
from mocosfl_jax.sweep.runner import Board, Tally, carry_out, stop_requests

COMMAND = "mocosfl_jax.sweep"
PROGRAM = (sys.executable, "-m", "mocosfl_jax.main")
"""Command that trains one run; its options are added."""


def main(argv: list[str], program: Sequence[str] = PROGRAM) -> int:
    """Runs one command; returns the exit status."""
    return answered(COMMAND, lambda: _command(argv, program))


def _command(argv: list[str], program: Sequence[str]) -> int:
    """Raises: InputError; StorageError."""
    values = _parse(argv)
    if values.help:
        print(__doc__)
        return 0
    if values.report:
        return _report(SweepFolder(values.workdir), values.config)
    runs = expand(values.config)
    if values.workdir is not None:
        SweepFolder(values.workdir).check_place()
    if values.dry_run:
        return _list(runs)
    folder = SweepFolder(values.workdir)
    finished = [name for name in runs if folder.is_finished(name)]
    configs = check(runs, finished, folder.stored_config)
    with folder.hold() as lock:
        engine = _engine(values, folder, lock.fileno())
        for name in folder.claim(values.config, runs, configs):
            print(f"{name} is left out from now on; its files stay")
        return _sweep(values.config, runs, folder, engine, program)


def _list(runs: dict[str, Run]) -> int:
    check(runs)
    for run in runs.values():
        print(run.name, *(f"  then {command}" for command in run.commands), sep="\n")
    print(counted(len(runs)))
    return 0


def _sweep(
    sweep: ConfigDict,
    runs: Mapping[str, Run],
    folder: SweepFolder,
    engine: Engine,
    program: Sequence[str],
) -> int:
    tasks = [task for run in runs.values() if (task := _task(run, folder, program))]
    tally = Tally(total=len(runs), slots=engine.slots, done=len(runs) - len(tasks))
    if tally.done:
        print(f"{tally.done} of {tally.total} runs are finished already")

    def ended_well(task: Task) -> None:
        if task.title:  # that a training did, its summary says
            folder.record_command(task.name, task.title)

    with stop_requests() as stop:
        carry_out(tasks, engine, tally, Board(tally), stop, ended_well)
        for name, reason in tally.failed.items():
            say_line(f"{COMMAND}: {name} failed, {reason}")
        print(write_report(folder, columns_of(sweep), sweep.metrics, sweep.scatter), end="")
    if stop.number is not None:
        return end(COMMAND, "stopped; run the same command to continue", 128 + stop.number)
    return FAILED if tally.failed else 0


def _task(run: Run, folder: SweepFolder, program: Sequence[str]) -> Task | None:
    """What is left of a run: its training, then its commands; None: it is finished."""
    log, place = folder.log_path(run.name), ("--workdir", str(folder.run_path(run.name)))
    task = None
    for command in reversed(folder.commands_left(run.name, run.commands)):
        line = (sys.executable, "-m", *shlex.split(command), *place)
        task = Task(run.name, line, log, title=command, then=task)
    if folder.is_finished(run.name):
        return task
    return Task(run.name, (*program, *run.arguments, *place), log, then=task)


def _engine(values: flags.FlagValues, folder: SweepFolder, lock: int) -> Engine:
    """Child processes inherit the lock, so the folder stays held until the last of them ends."""
    if values.engine == "slurm":
        return SlurmEngine(folder.slurm_path, values.jobs, values.config.slurm.to_dict())
    return LocalEngine(values.jobs, visible_gpus(), keep_open=(lock,))


def _report(folder: SweepFolder, sweep: ConfigDict | None) -> int:
    shown = folder.definition() if sweep is None else sweep
    columns = shown["columns"] or folder.definition()["columns"]
    scatter = shown.get("scatter") or ()  # older definitions have none
    print(write_report(folder, columns, shown["metrics"], scatter), end="")
    return 0


# ---------------------------------------------------------------------------------------- flags


def _define_flags(argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Sweep.", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "Folder of the sweep.", flag_values=values)
    flags.DEFINE_enum("engine", "local", ["local", "slurm"], "Where.", flag_values=values)
    flags.DEFINE_integer("jobs", None, "Runs at a time.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("dry_run", False, "List the runs, and stop.", flag_values=values)
    flags.DEFINE_bool("report", False, "Write the report, and stop.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this help.", flag_values=values)
    return values


def _parse(argv: list[str]) -> flags.FlagValues:
    """Raises: InputError: as `parse`, or a flag that is needed is missing."""
    values = _define_flags(argv)
    parse(values, argv, of_sweep=True)
    if values.help:
        return values
    if values.config is None and not values.report:
        allowed = "a sweep's config file is needed, e.g. configs/sweeps/client_count.py"
        raise InputError("--config", None, allowed)
    if values.config is not None and values.config.metrics is None:  # the report needs them
        raise InputError("config.metrics", None, "a value is needed")
    if values.workdir is None and not values.dry_run:
        raise InputError("--workdir", None, "a folder for the sweep is needed")
    return values
