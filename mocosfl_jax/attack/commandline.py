"""The command line of an attack: its flags, and the options among them."""

from collections.abc import Sequence

from absl import flags

from mocosfl_jax.attack.options import Options
from mocosfl_jax.config.types import value_types
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.commandline import parse


def parse_command(argv: list[str]) -> flags.FlagValues:
    """Raises: InputError: as `parse`, or there is no --workdir."""
    values = _define_flags()
    parse(values, argv)
    if not values.workdir and not values.help:
        raise InputError("--workdir", values.workdir, "the folder of a run is needed")
    return values


def options_of(values: flags.FlagValues) -> Options:
    """Raises: InputError: a value that is not allowed."""
    return Options(**{name: getattr(values, name) for name in value_types(Options)})


def check_arguments(arguments: Sequence[str]) -> None:
    """Checks a command line that lacks --workdir.

    Raises: InputError: it would be refused, whatever the run is.
    """
    options_of(parse_command(["attack", "--workdir=.", *arguments]))


def _define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string("name", None, "Folder under DIR/attack.", flag_values=values)
    flags.DEFINE_integer("step", None, "Step of the checkpoint to attack.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Folder of TFDS data sets.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this help.", flag_values=values)
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for name, held in value_types(Options).items():
        text = "An option of the attacker."
        define[held.kind](name, getattr(Options, name), text, flag_values=values)
    return values
