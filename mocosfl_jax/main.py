"""Command line: `python -m mocosfl_jax.main --config configs/X.py --workdir DIR`.

Options: --config.FIELD=VALUE overrides a field of the config file; --dry_run prints what would run.
On several hosts, one such command on each: --multihost takes their addresses from the environment
(Slurm, Kubernetes, TPU, Open MPI); else --coordinator=HOST:PORT --num_processes=N --process_id=I.
Exit status: 0 done; 1 the run failed; 2 bad input, one line on stderr; 143 stopped by a signal, the
state saved, and the same command resumes; 130 interrupted outside training, the same.
"""

import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from mocosfl_jax.commandline import parse
from mocosfl_jax.errors import InputError

if TYPE_CHECKING:
    from mocosfl_jax.config import Config

BAD_INPUT, INTERRUPTED, STOPPED = 2, 130, 143


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The flags; a field of the config file becomes one where the command line overrides it."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file.", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_bool("multihost", False, "Join the processes of the cluster.", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Of this process, from 0.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print what would run, and stop.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this help.", flag_values=values)
    return values


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    try:
        values = _parse(argv)
        if values.help:
            print(__doc__)
            return 0
        if not values.dry_run:
            _join_processes(values)
        return _run(values.config, values.workdir, values.dry_run)
    except InputError as error:
        print(f"mocosfl_jax: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:  # outside the loop, which saves first
        print("mocosfl_jax: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: list[str]) -> flags.FlagValues:
    """Raises: InputError: as `parse`, or a flag that is needed is missing."""
    values = define_flags(argv)
    parse(values, argv)
    if values.help:
        return values
    if values.config is None:
        raise InputError("--config", None, "a config file is needed, e.g. configs/quickstart.py")
    if not values.workdir and not values.dry_run:
        raise InputError("--workdir", values.workdir, "a folder for the run is needed")
    return values


def _join_processes(values: flags.FlagValues) -> None:
    from mocosfl_jax.processes import initialize

    initialize(values.multihost, values.coordinator, values.num_processes, values.process_id)


def _run(raw: ConfigDict, path: str, dry_run: bool) -> int:
    # Imported here so that a typing mistake on the command line is answered at once.
    from mocosfl_jax.build import data_options
    from mocosfl_jax.config import check_types
    from mocosfl_jax.data.sources import inspect_dataset, load_dataset
    from mocosfl_jax.resolve import resolve

    config = check_types(raw)
    options = data_options(config)
    config = resolve(config, inspect_dataset(config.dataset, **options))
    if dry_run:
        _print_plan(config)
        return 0

    from mocosfl_jax.processes import is_primary, use_compilation_cache
    from mocosfl_jax.train import Interrupted, NonFiniteError, train
    from mocosfl_jax.workdir import WorkDir

    use_compilation_cache(config.compilation_cache)
    workdir = WorkDir(path, is_primary())
    try:
        summary = train(config, load_dataset(config.dataset, **options), workdir)
    except Interrupted as stop:
        print(f"mocosfl_jax: {stop}; the same command resumes", file=sys.stderr)
        return STOPPED
    except NonFiniteError as error:
        print(f"mocosfl_jax: {error}; what was saved before stays", file=sys.stderr)
        return 1
    finally:
        workdir.close()
    if is_primary():
        for name, value in summary.items():
            print(f"{name}: {value}")
    return 0


def _print_plan(config: "Config") -> None:
    from mocosfl_jax.plan import plan

    for name, value in dataclasses.asdict(config).items():
        print(f"{name}: {value}")
    sizes = plan(config)
    sync_every = config.steps_per_round / config.syncs_per_round
    print(
        f"""
cohort C = {config.cohort_size}, images a client a step B = {config.batch_size}
{config.rounds} rounds of {config.steps_per_round} steps = {config.total_steps} steps
{config.syncs_per_round} syncs a round, one every {sync_every:g} steps
client parameters: {sizes.client_params:,}
server parameters: {sizes.server_params:,}
sent by a client in a round: {sizes.bytes_up_per_client_round / 1e6:.2f} MB
received by a client in a round: {sizes.bytes_down_per_client_round / 1e6:.2f} MB
estimated memory: {sizes.memory_bytes / 1e9:.2f} GB beside the images"""
    )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main(sys.argv))
