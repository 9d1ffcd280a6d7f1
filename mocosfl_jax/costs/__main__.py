"""Command line: `python -m mocosfl_jax.costs --config configs/X.py`.

Options: --config.FIELD=VALUE overrides a field of the config file, --config.FIELD=None unsets it;
--json FILE also writes the numbers there.

Prints what one client of such a run computes, holds and sends. Nothing is trained, and no pixel is
read; what a client runs is compiled for this machine, for its memory.
Exit status: 0 done; 1 a file could not be written; 2 bad input, one line on stderr; 130
interrupted.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mocosfl_jax.errors import InputError
from mocosfl_jax.run.console import answered, run_command
from mocosfl_jax.run.storage import write_json

if TYPE_CHECKING:  # what takes time is imported where it is used, after `run_command` has begun
    from ml_collections import ConfigDict

COMMAND = "mocosfl_jax.costs"


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    return answered(COMMAND, lambda: _command(argv))


def _command(argv: list[str]) -> int:
    """Raises: InputError; StorageError."""
    from absl import flags

    from mocosfl_jax.run.commandline import define_config_flags, parse

    values = define_config_flags(argv)
    flags.DEFINE_bool("help", False, "Print this help.", flag_values=values)
    flags.DEFINE_string("json", None, "File for the numbers.", flag_values=values)
    parse(values, argv)
    if values.help:
        print(__doc__)
        return 0
    if values.config is None:
        raise InputError("--config", None, "a config file is needed, e.g. configs/quickstart.py")
    path = None if values.json is None else Path(values.json)
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError("--json", values.json, "a file in an existing folder is needed")
    _print(values.config, values.json)
    return 0


def _print(raw: "ConfigDict", json: str | None) -> None:
    # Imported here so that a typing mistake on the command line is answered at once.
    from mocosfl_jax.config import check_types
    from mocosfl_jax.config.checks import check_fields
    from mocosfl_jax.config.data import deal, prepare
    from mocosfl_jax.config.rich import rich_of
    from mocosfl_jax.costs.communication import holders_of
    from mocosfl_jax.costs.report import as_json, costs_of, notes, table
    from mocosfl_jax.run.processes import use_compilation_cache
    from mocosfl_jax.run.program import check_labels, program_of

    unresolved = check_types(raw)
    check_fields(unresolved)
    prepared = prepare(unresolved)
    config, partition = deal(unresolved, prepared)
    check_labels(config, program_of(config), prepared.info)
    use_compilation_cache(config.compilation_cache)
    costs = costs_of(config, holders_of(config, partition, rich=False))
    values = as_json(config, costs)
    if rich_of(config) is None:
        print(table(costs))
    else:
        rich = costs_of(config, holders_of(config, partition, rich=True), rich=True)
        print(table(rich, "rich "), table(costs, "other "), sep="\n\n")
        values["rich"] = as_json(config, rich)
    for note in notes(config, partition.num_holders):
        print(f"\n{note}")
    if json is not None:
        write_json(Path(json), values)


if __name__ == "__main__":
    run_command(main, "mocosfl_jax.costs: interrupted")
