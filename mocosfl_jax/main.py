"""Command line: `python -m mocosfl_jax.main --config configs/X.py --workdir DIR`.

Options: --config.FIELD=VALUE overrides a field of the config file, --config.FIELD=None unsets it;
--dry_run prints what would run, after every check that needs no pixels.
On several hosts, one such command on each: --multihost takes their addresses from the environment
(Slurm, Kubernetes, TPU, Open MPI); else --coordinator=HOST:PORT --num_processes=N --process_id=I.
Exit status: 0 done; 1 the run failed, or a file could not be written; 2 bad input, one line on
stderr; 143 stopped by a signal, the state saved; 130 interrupted outside training. Run the same
command to continue either.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mocosfl_jax.errors import InputError
from mocosfl_jax.run.console import FAILED, answered, end, run_command

if TYPE_CHECKING:  # what takes time is imported where it is used, after `run_command` has begun
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

    from mocosfl_jax.config import Resolved
    from mocosfl_jax.data.dataset import Prepared
    from mocosfl_jax.run.processes import Startup
    from mocosfl_jax.run.workdir import Stored

COMMAND, STOPPED = "mocosfl_jax", 143


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    return answered(COMMAND, lambda: _alone_or_joined(argv))


def _alone_or_joined(argv: list[str]) -> int:
    if not _join_processes(argv):
        return _command(argv)
    from mocosfl_jax.run.processes import shared_refusals

    with shared_refusals() as startup:
        return _command(argv, startup)


def _join_processes(argv: list[str]) -> bool:
    """Joins before the rest of the command line is read, so that all learn what one refuses.

    Returns: whether there are other processes to join.
    Raises: InputError: as `initialize`, or a flag of another type.
    """
    from absl import flags

    from mocosfl_jax.run.commandline import define_common_flags

    values = flags.FlagValues()
    define_common_flags(values)
    try:
        values(argv, known_only=True)
    except (flags.Error, UnicodeDecodeError) as error:  # the latter of a --flagfile
        raise InputError("command line", " ".join(argv[1:]), str(error)) from None
    if _is_alone(values) or values.dry_run or values.help:
        return False  # without JAX, whose import takes a second: a typing mistake is answered soon
    from mocosfl_jax.run.processes import initialize

    initialize(values.multihost, *_place(values))
    return True


def _is_alone(values: "FlagValues") -> bool:
    return not values.multihost and _place(values) == (None, None, None)


def _place(values: "FlagValues") -> tuple[str | None, int | None, int | None]:
    return values.coordinator, values.num_processes, values.process_id


def _command(argv: list[str], startup: "Startup | None" = None) -> int:
    """Raises: InputError: as `parse`, a required flag is missing, or the run is refused."""
    from mocosfl_jax.run.commandline import define_flags, parse

    values = define_flags(argv)
    parse(values, argv)
    if values.help:
        print(__doc__)
        return 0
    if values.config is None:
        raise InputError("--config", None, "a config file is needed, e.g. configs/quickstart.py")
    if values.dry_run:
        return _dry_run(values.config, values.workdir, _is_alone(values))
    if not values.workdir:
        raise InputError("--workdir", values.workdir, "a folder for the run is needed")
    return _run(values.config, _folder(values.workdir), startup)


def _folder(path: str) -> Path:
    """Raises: InputError: a path that Orbax, which takes UTF-8, could not write to."""
    if not path.isprintable():
        raise InputError("--workdir", path, "a path of printable characters is needed")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise InputError("--workdir", path, "there is no such home directory")
    return Path(expanded).absolute()


def _settle(
    raw: "ConfigDict", folder: Path | None, stored: "Stored | None", alone: bool = True
) -> "tuple[Resolved, Prepared]":
    """The resolved config and its data set, no image of which has been decoded.

    Args: folder: of the run, if it is known. stored: the run in it that goes on, or None. alone:
      False in the dry run of one of several processes.
    Raises: InputError: a field, or data, that cannot be used.
    """
    # Imported here so that a typing mistake on the command line is answered at once.
    from mocosfl_jax.config import check_types
    from mocosfl_jax.config.checks import check_fields
    from mocosfl_jax.config.data import check_apart, deal, prepare
    from mocosfl_jax.run.program import check_labels, program_of
    from mocosfl_jax.run.source import with_init_digest
    from mocosfl_jax.run.virtual import offer_devices, with_devices

    config = check_types(raw)
    check_fields(config)
    offered = alone and offer_devices(config, stored)  # before a check of shapes starts JAX
    if folder is not None:
        check_apart(config, folder)
    if stored is not None and config.holdout_fraction is None:
        # Its rule has changed since version 0.1.0; a run keeps the images that it started with.
        config = dataclasses.replace(config, holdout_fraction=stored.config.holdout_fraction)
    prepared = prepare(config)
    config, _ = deal(config, prepared)
    if offered:
        config = with_devices(config, stored)
    check_labels(config, program_of(config), prepared.info)
    return with_init_digest(config, stored and stored.config), prepared


def _run(raw: "ConfigDict", path: Path, startup: "Startup | None") -> int:
    from mocosfl_jax.run.processes import Startup, is_primary, use_compilation_cache
    from mocosfl_jax.run.storage import StorageError
    from mocosfl_jax.run.summary import results_table
    from mocosfl_jax.run.workdir import WorkDir, read_stored
    from mocosfl_jax.train import CollapseError, Interrupted, NonFiniteError, finished, train

    config, prepared = _settle(raw, path, read_stored(path))
    use_compilation_cache(config.compilation_cache)
    workdir, startup = WorkDir(path, is_primary()), startup or Startup()
    try:
        summary = finished(config, prepared.info, workdir, startup)
        if summary is None:
            summary = train(config, prepared.load(), workdir, startup)
        elif is_primary():
            print("this run is complete")
    except Interrupted as stop:
        return end(COMMAND, f"{stop}; run the same command to continue", STOPPED)
    except NonFiniteError as error:
        return end(COMMAND, f"{error}; earlier checkpoints are kept", FAILED)
    except CollapseError as error:
        return end(COMMAND, error, FAILED)
    except StorageError as error:
        return end(COMMAND, workdir.explain(error), FAILED)
    finally:
        workdir.close()
    if is_primary():
        print(results_table(summary))
    return 0


# --------------------------------------------------------------------------------------- dry run


def _dry_run(raw: "ConfigDict", path: str | None, alone: bool) -> int:
    """Prints the plan, after every check that needs no pixels.

    Devices and memory may be those of another machine: what does not fit here is a line, no error.

    Args: alone: whether no other process is to take part in the run.
    """
    from mocosfl_jax.run.workdir import read_stored

    folder = _folder(path) if path else None
    config, prepared = _settle(raw, folder, read_stored(folder) if folder else None, alone)
    if folder is not None:
        _check_folder(folder, config, prepared)
    _print_plan(config, prepared, alone)
    for check in _machine_checks(config, prepared):
        try:
            check()
        except InputError as error:
            print(f"not on this machine: {error}")
    return 0


def _check_folder(folder: Path, config: "Resolved", prepared: "Prepared") -> None:
    """Raises: InputError: a run there would be refused."""
    from mocosfl_jax.run.metrics import read_metrics
    from mocosfl_jax.run.workdir import WorkDir, check_free, check_resumable

    check_free(folder)
    workdir = WorkDir(folder, primary=False)
    workdir.claim(config, prepared.info)
    check_resumable(workdir, config, read_metrics(workdir.metrics_path))


def _machine_checks(config: "Resolved", prepared: "Prepared") -> Iterator[Callable[[], None]]:
    from mocosfl_jax.data.sources import check_memory
    from mocosfl_jax.federated.placement import make_placement, single_device
    from mocosfl_jax.machine import device_memory_bytes, machine_memory_bytes
    from mocosfl_jax.run.plan import check_clients_fit, check_fits
    from mocosfl_jax.run.program import program_of
    from mocosfl_jax.run.rounds import Rounds

    def devices() -> None:
        make_placement(config.devices, config.server_shards)

    def state() -> None:
        try:
            placement = make_placement(config.devices, config.server_shards)
        except InputError:  # another machine's, of which nothing is known
            placement = single_device()
        program = program_of(config, placement)
        rounds = Rounds(config, placement, program)
        check_fits(config, rounds.bytes_a_device(), device_memory_bytes(placement.local_devices))

    yield devices
    yield lambda: check_memory(prepared.info)
    yield lambda: check_clients_fit(config, machine_memory_bytes())
    yield state


def _print_plan(config: "Resolved", prepared: "Prepared", alone: bool) -> None:
    import jax

    from mocosfl_jax.config.data import deal
    from mocosfl_jax.config.fields import METHOD_FIELDS
    from mocosfl_jax.config.recipe import find_recipe
    from mocosfl_jax.config.rich import draw_of, groups_of, rich_of
    from mocosfl_jax.config.stored import flat_fields, to_json
    from mocosfl_jax.costs.report import step_line
    from mocosfl_jax.federated.axes import NO_MESH
    from mocosfl_jax.federated.slots import Slots
    from mocosfl_jax.run.feed import most_draws
    from mocosfl_jax.run.plan import estimate_memory, plan
    from mocosfl_jax.run.progress import padding_line

    recipe = find_recipe(config.method)
    unread = METHOD_FIELDS - recipe.reads
    for name, value in flat_fields(to_json(config)).items():
        if name not in unread:
            print(f"{name}: {value}")
    sizes = plan(config)
    parameters = f"parameters: {sizes.client_params:,}"
    if sizes.server_params:
        parameters = f"client {parameters}\nserver parameters: {sizes.server_params:,}"
    memory = estimate_memory(config, prepared.info, sizes)
    on_device = (
        f"{memory.device / 1e9:.2f} GB on the device, {memory.host / 1e9:.2f} GB on the host"
    )
    one_memory = f"{memory.total / 1e9:.2f} GB"
    syncs = sum(config.sync_steps)
    mixed = f" + {config.mix_batch_size} of {config.mix_dataset}" if config.mix_dataset else ""
    once = ""
    if sizes.bytes_down_per_client_once:
        received = f"{sizes.bytes_down_per_client_once / 1e6:.2f} MB"
        once = f"\nreceived by a client once, before its first round: {received}"
    rich, drawn, of_rich = rich_of(config), draw_of(config), ""
    if rich is not None:
        images = rich.batch_factor * config.images_a_step
        of_rich = f"\nrich clients: {drawn.rich_ids} of {config.num_clients},"
        of_rich += f" {drawn.rich} a round, each {images} images a step"
    if sizes.bytes_up_per_rich_client_round and sizes.bytes_down_per_rich_client_round:
        up, down = sizes.bytes_up_per_rich_client_round, sizes.bytes_down_per_rich_client_round
        once += f"\nsent by a rich client in a round: {up / 1e6:.2f} MB"
        once += f"\nreceived by a rich client in a round: {down / 1e6:.2f} MB"
    facts = recipe.facts(
        config, lambda: most_draws(config, prepared.info, deal(config, prepared)[1])
    )
    print(
        f"""
cohort C = {config.cohort_size}, images a client a step B = {config.batch_size}{mixed}{of_rich}
rounds: {config.rounds}, steps a round: {config.steps_per_round}, steps: {config.total_steps}
syncs a round: {syncs}, {config.steps_per_round / syncs:.3g} steps apart
{parameters}
sent by a client in a round: {sizes.bytes_up_per_client_round / 1e6:.2f} MB
received by a client in a round: {sizes.bytes_down_per_client_round / 1e6:.2f} MB{once}
estimated memory: {one_memory if jax.default_backend() == "cpu" else on_device}"""
    )
    if devices := config.devices or (jax.device_count() if alone else None):
        chunks = recipe.build(config, NO_MESH, devices).chunks
        if line := padding_line(Slots(groups_of(config), devices * chunks), devices):
            print(line)
    for note in facts.notes:
        print(note)
    sys.stdout.flush()  # the next line takes its time
    print(f"{step_line(config)}; its memory: python -m mocosfl_jax.costs")


if __name__ == "__main__":
    run_command(main, "mocosfl_jax: interrupted; run the same command to continue")
