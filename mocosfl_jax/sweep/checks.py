"""What must hold of the fields of a sweep, alone and together."""

import importlib.util
import itertools
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mocosfl_jax.attack.commandline import attack_of
from mocosfl_jax.config.stored import flat_fields
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluate.options import transfer_of
from mocosfl_jax.evaluation.numbers import FAMILIES, NUMBERS, number_of

Fields = dict[str, Any]
"""Values of config fields by name; a field of a section is named `section.field`."""

METRICS = "metrics"
"""In place of a field, in `sweep.columns`: each number is a column."""


def text_of(value: Any) -> str:
    """A value as a command line has it."""
    return str(value).replace(" ", "") if isinstance(value, tuple | list) else str(value)


def check_metrics(metrics: Iterable[str], where: str = "config.metrics") -> None:
    """Raises: InputError: a name that is no number of a run, of a transfer or of an attack."""
    for name in metrics:
        try:
            number_of(name)
        except KeyError:
            family = name.split("/")[0]
            prefix = f"{family}/NAME/" if family in FAMILIES else ""
            one = ", ".join(FAMILIES.get(family, NUMBERS))
            of_sets = "" if prefix else "".join(f", or {kind}/NAME/NUMBER" for kind in FAMILIES)
            allowed = f"{prefix}one of {one}{of_sets} is needed"
            raise InputError(where, name, allowed) from None


def check_scatter(scatter: Sequence[str]) -> None:
    """Raises: InputError: neither nothing nor two numbers."""
    if len(scatter) not in (0, 2):
        raise InputError("config.scatter", scatter, "two numbers, x and y, are needed, or none")
    check_metrics(scatter, "config.scatter")


def check_values(sweep: ConfigDict) -> None:
    """Each field of the sweep by itself."""
    if sweep.methods is not None:
        allowed = "a sweep names its variants in config.variants"
        raise InputError("config.methods", sweep.methods, allowed)
    for name in sweep:
        if sweep[name] is None and name not in ("base", "methods", "columns"):
            raise InputError(f"config.{name}", None, "a value is needed")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise InputError("config.seeds", sweep.seeds, "each seed once")
    check_metrics(sweep.metrics)
    check_scatter(sweep.scatter)


def check_places(fixed: Fields, grid: Fields, variants: dict[str, Fields]) -> None:
    """Each field of a run has values and is set in one place."""
    for name, values in grid.items():
        if not values:
            raise InputError(f"config.grid.{name}", values, "at least one value is needed")
        if len(set(map(text_of, values))) < len(values):
            raise InputError(f"config.grid.{name}", values, "each value once")
        if name in fixed:
            raise InputError(f"config.fixed.{name}", fixed[name], "set in config.grid too")
    for variant, fields in variants.items():
        for name, value in fields.items():
            for place, others in (("fixed", fixed), ("grid", grid)):
                if name in others:
                    where = f"config.variants[{variant!r}].{name}"
                    raise InputError(where, value, f"set in config.{place} too")


def check_columns(sweep: ConfigDict, grid: Fields, variants: Mapping[str, Fields]) -> None:
    """Raises: InputError: a field that does not vary."""
    more = (flat_fields(extra["fields"]) for extra in sweep.more_fields)
    able = dict.fromkeys([*grid, *itertools.chain(*variants.values(), *more), "seed", METRICS])
    if sweep.columns is not None and sweep.columns not in able:
        allowed = f"a field that varies in this sweep is needed: one of {', '.join(able)}"
        raise InputError("config.columns", sweep.columns, allowed)


def check_unset(
    names: Iterable[str], known: Collection[str], places: Sequence[tuple[str, Fields]]
) -> None:
    """Args: places: parts of the sweep and variants, each with the fields that it sets."""
    for name in names:
        if name not in known:
            raise InputError("config.unset", name, "a field of the runs is needed")
        for place, fields in places:
            if name in fields:
                raise InputError("config.unset", name, f"set in {place} too")


def check_more(sweep: ConfigDict, name: str, grid: Fields) -> None:
    """`more_fields`, `more_seeds` or `more_commands`. Args: name: without `more_`."""
    example_of = {"fields": {"cohort_size": 5}, "seeds": (1,), "commands": ("...",)}
    for extra in sweep[f"more_{name}"]:
        kinds = {name: dict if name == "fields" else tuple | list}
        typed = isinstance(extra, dict) and all(
            isinstance(value, kinds.get(field, tuple | list)) for field, value in extra.items()
        )
        if not typed or name not in extra or extra.keys() - grid.keys() - {name, "variant"}:
            example = {"num_clients": (10, 50), name: example_of[name]}
            allowed = f"fields of config.grid, or variant, and {name}: {example}"
            raise InputError(f"config.more_{name}", extra, allowed)


_MAKERS: Mapping[str, Callable[[Sequence[str]], str | None]] = {
    "mocosfl_jax.attack": attack_of,
    "mocosfl_jax.evaluate": transfer_of,
}
"""By a command of the package: what the numbers are called that it makes with these arguments."""


def check_commands(commands: Iterable[Any]) -> None:
    for command in commands:
        if not _can_follow(command):
            allowed = "a module that exists and its options, without --workdir, are needed"
            raise InputError("config.commands", command, allowed)
        module, *options = shlex.split(command)
        if module in _MAKERS:
            try:
                _MAKERS[module](options)
            except InputError as error:
                raise InputError("config.commands", command, str(error)) from None


def check_made(sweep: ConfigDict, commands: Iterable[str]) -> None:
    """Whether the commands make the numbers of attacks and transfers that are reported. A command
    of one's own may make any.

    Args: commands: of all runs; they pass `check_commands`.
    Raises: InputError: a number that none makes.
    """
    makers = [shlex.split(command) for command in dict.fromkeys(commands)]
    if any(module not in _MAKERS for module, *_ in makers):
        return
    made = [place for module, *options in makers if (place := _MAKERS[module](options))]
    for field in ("metrics", "scatter"):
        for name in sweep[field]:
            place = name.rpartition("/")[0]
            if place and place not in made:
                allowed = f"no command of the sweep makes {place}"
                found = f"; they make {', '.join(made)}" if made else ": set config.commands"
                raise InputError(f"config.{field}", name, allowed + found)


def _can_follow(command: Any) -> bool:
    """Whether it names a module, and leaves the folder of the run open."""
    try:
        module, *options = shlex.split(command)
        found = importlib.util.find_spec(module) is not None
    except (AttributeError, ImportError, TypeError, ValueError):  # whatever is no such text
        return False
    return found and not any(option.split("=")[0] == "--workdir" for option in options)
