"""What the command lines of a run and of a sweep have in common."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mocosfl_jax.errors import InputError


def parse(values: flags.FlagValues, argv: list[str], config_name: str = "--config") -> None:
    """Fills flags, `config` and `help` among them, and loads the config file.

    Args:
      values: the flags, defined.
      argv: command line, the program first.
      config_name: what the user calls the config file's place.
    Raises: InputError: a flag or field that does not exist, a value of another type, a config file
    that cannot be loaded, words that are no flags.
    """
    try:
        rest = values(argv)
        if values.config is not None:
            list(values.config)  # the file is loaded only now, and may fail
    except Exception as error:  # a config file is code, and may raise anything
        path = config_file(argv)
        if path is not None and not Path(path.split(":")[0]).is_file():
            raise InputError(config_name, path, "an existing config file is needed") from None
        text = str(error).replace("\\n", " ").replace("\\'", "'")  # ml_collections quotes twice
        reason = " ".join(text.split()) or type(error).__name__
        if isinstance(error, AttributeError | KeyError):
            reason = f"no such field: {reason}"
        raise InputError("command line", _blamed(argv[1:], reason), reason) from None
    if len(rest) > 1 and not values.help:
        raise InputError("command line", rest[1], "options start with --")


def config_file(argv: Sequence[str]) -> str | None:
    """What stands behind --config, None where it does not occur."""
    spaced = [after for word, after in itertools.pairwise(argv) if word == "--config"]
    joined = [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    return next(iter(spaced + joined), None)


def _blamed(arguments: Sequence[str], reason: str) -> str:
    """The arguments whose flag or last field the reason names, else all of them."""
    found = [a for a in arguments if "=" in a and re.search(_named(a), reason)]
    return " ".join(found or arguments)


def _named(argument: str) -> str:
    """Pattern of the last part of its name, behind a dot or a quotation mark."""
    return rf"[.'\"]{re.escape(argument.split('=')[0].split('.')[-1])}\b"
