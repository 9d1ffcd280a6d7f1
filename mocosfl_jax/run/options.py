"""Commands on the folder of a run: their options are the fields of a dataclass."""

import os
import re
from pathlib import Path
from typing import TypeVar

from absl import flags

from mocosfl_jax.config.types import value_types
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.commandline import parse

Options = TypeVar("Options")


def define_options(kind: type) -> flags.FlagValues:
    """--workdir, --help, and a flag for each field of a dataclass, with its default."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this help.", flag_values=values)
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for name, held in value_types(kind).items():
        define[held.kind](name, getattr(kind, name), f"See {kind.__name__}.", flag_values=values)
    return values


def parse_options(values: flags.FlagValues, argv: list[str]) -> None:
    """Fills flags. Raises: InputError: as `parse`, or there is no --workdir."""
    parse(values, argv)
    if not values.workdir and not values.help:
        raise InputError("--workdir", values.workdir, "the folder of a run is needed")


def options_of(values: flags.FlagValues, kind: type[Options]) -> Options:
    """The dataclass, filled from its flags. Raises: InputError: by the dataclass."""
    fields: type = kind
    return kind(**{name: getattr(values, name) for name in value_types(fields)})


def workdir_of(values: flags.FlagValues) -> Path:
    return Path(os.path.expanduser(values.workdir)).absolute()


def check_name(name: str) -> None:
    """Raises: InputError: no plain name of a folder, for --name."""
    if not re.fullmatch(r"\w[\w.+=-]{0,99}", name, re.ASCII):
        allowed = "a name of at most 100 letters, digits and any of _.+=- is needed"
        raise InputError("--name", name, allowed)
