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


def parse(
    values: flags.FlagValues,
    argv: list[str],
    config_name: str = "--config",
    of_sweep: bool = False,
) -> None:
    """Fills flags, `help` among them, and loads the config file if `config` is one of them.

    `--config.FIELD=None` unsets a field.

    Args:
      values: the flags, defined for `argv`.
      argv: command line, the program first.
      config_name: what the user calls the config file's place.
      of_sweep: whether the config file is that of a sweep, not of a run.
    Raises: InputError: a flag or field that does not exist, a value of another type, a config file
    that cannot be loaded, words that are no flags.
    """
    if "config" in values:
        values["config"].parser = _ConfigFile(config_name, of_sweep)
    kept, unset = _split_unset(argv)
    try:
        rest = values(kept)
        for field in unset:
            if values.config is not None:
                config_path.set_value(field, values.config, None)
    except Exception as error:
        if isinstance(error.__context__, InputError):  # absl turned it into an error of its own
            raise error.__context__ from None
        raise _refusal(values, _joined(argv)[1:], error) from None
    if len(rest) > 1 and not values.help:
        raise InputError("command line", rest[1], "options start with --")


class _ConfigFile(flags.ArgumentParser):
    """Makes the config of `PATH` or `PATH:ARGUMENT`; whatever fails is an `InputError`.

    method: that the config names; None: no config of a run has been made.
    """

    def __init__(self, name: str, of_sweep: bool):
        self._name, self._of_sweep = name, of_sweep
        self.method: str | None = None

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
        if self._of_sweep and "grid" not in config:
            allowed = "a sweep's config, made by default_sweep(), is needed; this one is of a run"
            raise InputError(self._name, argument, allowed)
        if not self._of_sweep and "grid" in config:
            allowed = (
                "a run's config is needed; this one is of a sweep (python -m mocosfl_jax.sweep)"
            )
            raise InputError(self._name, argument, allowed)
        self.method = config.get("method")
        return self._guard(argument, config.lock)

    def _guard(self, argument: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except KeyboardInterrupt:
            raise
        except InputError as error:  # which says what is wrong
            raise InputError(self._name, argument, str(error)) from None
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


# -------------------------------------------------------------------------------------- refusals

_NEEDED = {
    "int": "an integer is needed",
    "float": "a number is needed",
    "bool": "True or False is needed",
}
"""By the type of a flag."""


def _refusal(values: flags.FlagValues, arguments: Sequence[str], error: Exception) -> InputError:
    """What absl or ml_collections says of a command line, in our words."""
    text = str(error).replace("\\n", " ").replace("\\'", "'")  # ml_collections quotes twice
    reason = " ".join(text.split()) or type(error).__name__
    if isinstance(error, AttributeError | KeyError):
        return _no_such_field(values, arguments, reason)
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        if name.startswith("config.") and "config" in values:
            allowed = f"a config file is needed, as --{name} changes a field"
            return InputError("--config", None, allowed)
        return _no_such_flag(arguments, name, reason)
    if found := re.match(r"Missing value for flag --(\S+)", reason):
        return InputError(_place(found[1]), None, f"a value is needed: --{found[1]}=VALUE")
    if found := re.match(r'Override (\S+) can not be applied because field "(\S+)"', reason):
        name = f"config.{found[1]}"
        return InputError(name, _value_of(arguments, name), f"config.{found[2]} has no fields")
    if found := re.match(r"flag --([^=]+)=", reason):
        allowed = _allowed(values, found[1], reason)
        return InputError(_place(found[1]), _value_of(arguments, found[1]), allowed)
    if reason.startswith("Could not parse"):  # the name of a field
        reason = "fields are set by --config.FIELD=VALUE"
    return InputError("command line", " ".join(arguments), reason)


def _no_such_field(values: flags.FlagValues, arguments: Sequence[str], reason: str) -> InputError:
    """Args: reason: quotes the part of a field's name that does not exist, and a similar one."""
    quoted, similar = re.search(r"'(\w+)'", reason), re.search(r'Did you mean "(\w+)"', reason)
    hint = f"; did you mean {similar[1]}?" if similar else ""
    method = values["config"].parser.method
    for argument in arguments:
        name = argument.lstrip("-").split("=")[0]
        _, *parts = name.split(".")
        if quoted and quoted[1] in parts:
            missing = "there is no such field"
            if method and quoted[1] != parts[-1]:
                missing = f"method {method!r} has no section {quoted[1]!r}"
            return InputError(name, _value_of(arguments, name), missing + hint)
    return InputError("command line", " ".join(arguments), f"no such field: {reason}")


def _no_such_flag(arguments: Sequence[str], name: str, reason: str) -> InputError:
    _, _, similar = reason.partition("Did you mean: ")
    hint = f"; did you mean --{similar.split()[0].rstrip(',')}?" if similar else ""
    return InputError(f"--{name}", _value_of(arguments, name), f"there is no such option{hint}")


def _allowed(values: flags.FlagValues, name: str, reason: str) -> str:
    """What is allowed instead of a value that cannot be parsed."""
    if "as a ConfigDict" in reason:
        return f"this is a section: set a field of it, --{name}.FIELD=VALUE"
    if "as tuple" in reason:
        return "a tuple such as (1,2) is needed, words in it in quotes"
    return _NEEDED.get(values[name].flag_type(), reason)


def _place(flag: str) -> str:
    """What a message calls a flag: `config.cut` or `--jobs`."""
    return flag if flag.startswith("config.") else f"--{flag}"


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    """The last value that is given to a flag; None: it has none."""
    spaced = [b for a, b in itertools.pairwise(arguments) if a.lstrip("-") == flag]
    joined = [a.split("=", 1)[1] for a in arguments if a.lstrip("-").startswith(f"{flag}=")]
    return next(reversed(spaced + joined), None)
