"""The command line of an attack: its flags, and the options among them."""

from collections.abc import Sequence

from absl import flags

from mocosfl_jax.attack.options import Options
from mocosfl_jax.run.options import define_options, options_of, parse_options


def parse_command(argv: list[str]) -> flags.FlagValues:
    """Raises: InputError: as `parse_options`."""
    values = define_options(Options)
    flags.DEFINE_string("name", None, "Folder under DIR/attack.", flag_values=values)
    flags.DEFINE_integer("step", None, "Step of the checkpoint to attack.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Folder of TFDS data sets.", flag_values=values)
    parse_options(values, argv)
    return values


def check_arguments(arguments: Sequence[str]) -> None:
    """Checks a command line that lacks --workdir.

    Raises: InputError: it would be refused, whatever the run is.
    """
    options_of(parse_command(["attack", "--workdir=.", *arguments]), Options)
