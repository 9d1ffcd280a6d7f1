"""The command line of an attack: its flags, and the options among them."""

from collections.abc import Sequence

from absl import flags

from mocosfl_jax.attack.options import Options
from mocosfl_jax.run.options import check_name, define_options, options_of, parse_options


def parse_command(argv: list[str]) -> flags.FlagValues:
    """Raises: InputError: as `parse_options`."""
    values = define_options(Options)
    flags.DEFINE_string("name", None, "Folder under DIR/attack.", flag_values=values)
    flags.DEFINE_integer("step", None, "Step of the checkpoint to attack.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Folder of TFDS data sets.", flag_values=values)
    parse_options(values, argv)
    return values


def attack_of(arguments: Sequence[str]) -> str:
    """What the numbers of an attack are called in a sweep: `attack/NAME`.

    Args: arguments: of the command, without --workdir.
    Raises: InputError: it would be refused, whatever the run is.
    """
    values = parse_command(["attack", "--workdir=.", *arguments])
    options = options_of(values, Options)
    name = values.name or options.default_name
    check_name(name)
    return f"attack/{name}"
