"""The flags of a run's command line, and how all command lines are read."""

import itertools
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from mocosfl_jax.errors import InputError


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The flags of a run.

    Args: argv: command line, the program first; a field of the config file becomes a flag where the
      command line overrides it.
    """
    values = define_config_flags(argv)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    define_common_flags(values)
    return values


def define_config_flags(argv: list[str]) -> flags.FlagValues:
    """--config with its overrides. Args: argv: see `define_flags`."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file.", flag_values=values, sys_argv=argv
    )
    return values


def define_common_flags(values: flags.FlagValues) -> None:
    """Those that are read before the config file is loaded."""
    flags.DEFINE_bool("multihost", False, "Join the processes of the cluster.", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Of this process, from 0.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print what would run, and stop.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this help.", flag_values=values)


def parse(values: flags.FlagValues, argv: list[str], config_name: str = "--config") -> None:
    """Fills flags, `help` among them, and loads the config file if `config` is one of them.

    `--config.FIELD=None` unsets a field.

    Args:
      values: the flags, defined for `argv`.
      argv: command line, the program first.
      config_name: what the user calls the config file's place.
    Raises: InputError: a flag or field that does not exist, a value of another type, a config file
    that cannot be loaded, words that are no flags.
    """
    if "config" in values:
        values["config"].parser = _ConfigFile(config_name)
    kept, unset = _split_unset(argv)
    try:
        rest = values(kept)
        for field in unset:
            if values.config is not None:
                config_path.set_value(field, values.config, None)
    except Exception as error:
        if isinstance(error.__context__, InputError):  # absl turned it into an error of its own
            raise error.__context__ from None
        text = str(error).replace("\\n", " ").replace("\\'", "'")  # ml_collections quotes twice
        reason = " ".join(text.split()) or type(error).__name__
        if isinstance(error, AttributeError | KeyError):
            reason = f"no such field: {reason}"
        raise InputError("command line", _blamed(argv[1:], reason), reason) from None
    if len(rest) > 1 and not values.help:
        raise InputError("command line", rest[1], "options start with --")


class _ConfigFile(flags.ArgumentParser):
    """Makes the config of `PATH` or `PATH:ARGUMENT`; whatever fails is an `InputError`."""

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> ConfigDict:
        path, *arguments = argument.split(":", 1)
        if not Path(path).is_file():
            raise InputError(self._name, argument, "an existing config file is needed")
        names = self._guard(argument, lambda: runpy.run_path(path))
        if "get_config" not in names:
            raise InputError(self._name, argument, "the file must define get_config()")
        config = self._guard(argument, lambda: names["get_config"](*arguments))
        if not isinstance(config, ConfigDict):
            found = type(config).__name__
            allowed = f"get_config() must return a ConfigDict, but returns {found}"
            raise InputError(self._name, argument, allowed)
        return self._guard(argument, config.lock)

    def _guard(self, argument: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a config file is code, and may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
            raise InputError(self._name, argument, f"the file fails with {reason}") from None


def _split_unset(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes out `--config.FIELD=None` and `--config.FIELD None`: no type of flag can parse None.

    Returns: the other arguments, and the fields whose last value is None.
    """
    kept: list[str] = []
    is_unset: dict[str, bool] = {}
    for argument in _joined(argv):
        override = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        is_none = override is not None and argument == f"{override[0]}=None"
        if override is not None:
            is_unset[override[1]] = is_none
        if not is_none:
            kept.append(argument)
    return kept, [field for field, last_is_none in is_unset.items() if last_is_none]


def _joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config.FIELD None` as one, `--config.FIELD=None`."""
    joined: list[str] = []
    for argument in argv:
        if argument == "None" and joined and re.fullmatch(r"--?config\.[^=]+", joined[-1]):
            joined[-1] += "=None"
        else:
            joined.append(argument)
    return joined


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
