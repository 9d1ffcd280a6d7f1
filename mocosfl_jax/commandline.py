"""What the command lines of a run and of a sweep have in common."""

from absl import flags

from mocosfl_jax.errors import InputError


def parse(values: flags.FlagValues, argv: list[str]) -> None:
    """Fills flags, `config` and `help` among them, and loads the config file.

    Raises: InputError: a flag or field that does not exist, a value of another type, a config file
    that cannot be loaded, words that are no flags.
    """
    try:
        rest = values(argv)
        if values.config is not None:
            list(values.config)  # the file is loaded only now, and may fail
    except Exception as error:  # a config file is code, and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, AttributeError | KeyError):
            reason = f"no such field: {reason}"
        raise InputError("command line", " ".join(argv[1:]), reason) from None
    if len(rest) > 1 and not values.help:
        raise InputError("command line", rest[1], "options start with --")
