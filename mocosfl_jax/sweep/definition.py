"""The fields of a sweep's config, and the runs that follow from them.

A sweep config (`configs/sweeps/*.py`) starts from `default_sweep()` and changes fields. `expand`
turns it into runs, which `sweep.preflight` checks as `mocosfl_jax.main` would.
"""

import importlib.util
import itertools
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mocosfl_jax.attack import commandline as attack
from mocosfl_jax.config import default_config
from mocosfl_jax.config.stored import flat_fields
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluate import options as evaluate
from mocosfl_jax.evaluation.numbers import FAMILIES, NUMBERS, number_of

Fields = dict[str, Any]
"""Values of config fields by name; a field of a section is named `section.field`."""

METRICS = "metrics"
"""In place of a field, in `sweep.columns`: each number is a column."""


def default_sweep(method: str = "mocosfl") -> ConfigDict:
    """A locked ConfigDict with every field of a sweep; each field of a run is set in one place.

    Args: method: `config.method` of the runs, whose section `fixed` and `grid` then have:
      `sweep.grid.toy.rate = (0.1, 0.2)`.
    Raises: InputError: there is no such method.
    """
    run = default_config(method)
    sweep = ConfigDict()
    # Config file of every run, as for `mocosfl_jax.main`.
    sweep.base = placeholder(str)
    # Fields that have the same value in every run: `sweep.fixed.epochs = 1`. None: as in the base.
    sweep.fixed = _map_fields(run, lambda fields, name: placeholder(fields.get_type(name)))
    # Fields that are unset in every run, whatever the base has: `("classes_per_client",)`.
    sweep.unset = ()
    # Fields that vary, and their values: `sweep.grid.num_clients = (10, 100)`. All combinations
    # are run. The value None unsets a field.
    sweep.grid = _map_fields(run, lambda fields, name: placeholder(tuple))
    # Named variants, the fields of each: `{"MocoSFL-1": {"cut": 1}, "MocoSFL-3": {"cut": 2}}`; a
    # section is a dict in it: `{"fast": {"toy": {"rate": 0.2}}}`. Each variant is run on the whole
    # grid. A field that a variant leaves out has the base's value; one that it sets to None is
    # unset. `base` among them is a config file of its own, which may be one of another method.
    sweep.variants = {}
    # Former name of `variants`, which is refused.
    sweep.methods = placeholder(object)
    # Further fields of some cells: `({"num_clients": (20,), "fields": {"cohort_size": 5}},)`. A
    # cell gets them if its fields have the listed values. `variant` may be listed like a field:
    # `({"variant": ("MocoSFL-1",), "fields": {"batch_size": 4}},)`.
    sweep.more_fields = ()
    # Seeds of every cell of the grid.
    sweep.seeds = (0,)
    # Further seeds for some cells, chosen as for `more_fields`:
    # `({"num_clients": (10, 1000), "seeds": (1, 2)},)`.
    sweep.more_seeds = ()
    # Commands that follow each run, in their order: modules and their options, such as
    # `("mocosfl_jax.attack --name=N4C64",)`. Each is run as `python -m COMMAND --workdir RUN`.
    sweep.commands = ()
    # Further commands for some cells, chosen as for `more_fields`:
    # `({"variant": ("MocoSFL-1",), "commands": ("mocosfl_jax.attack --name=N8C64",)},)`.
    sweep.more_commands = ()
    # Field whose values are the columns of the report and the x axis of its plot; or `metrics`: a
    # column a number, a row a cell of the grid.
    sweep.columns = "num_clients"
    # Numbers in the report's table and plot, by their name in summary.json: `knn_top1`,
    # `transfer/svhn/knn_top1`; those of an attack by `attack/NAME/` and their name in attack.json:
    # `attack/N4C64/mse_ratio`.
    sweep.metrics = ("linear_top1", "knn_top1")
    # Two numbers, x and y of a further plot with a point for each row and column of the table:
    # `("attack/N4C64/mse_ratio", "linear_top1")`. Empty: no such plot.
    sweep.scatter = ()
    # What the engine `slurm` asks for, for each job: minutes before it is requeued, GPUs, CPUs,
    # memory in GB. Unset: the cluster's defaults.
    sweep.slurm = {
        "timeout_min": 24 * 60,
        "gpus_per_node": 1,
        "cpus_per_task": 8,
        "mem_gb": placeholder(float),
        "partition": placeholder(str),
        "account": placeholder(str),
        "qos": placeholder(str),
    }
    del sweep.fixed.seed, sweep.grid.seed
    sweep.lock()
    sweep.variants.unlock()
    return sweep


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    base: str  # its config file
    variant: str  # name of its variant; "" if the sweep has none
    cell: Fields  # its values of the grid's fields
    seed: int
    overrides: Fields  # all fields that it sets, the seed among them
    commands: tuple[str, ...] = ()  # that follow its training

    @property
    def name(self) -> str:
        """Name of its folder, made from what tells it from the others: `num_clients=50,seed=1`."""
        parts = [f"{name}={_text(value)}" for name, value in self.cell.items()]
        parts.append(f"seed={self.seed}")
        if self.variant:
            parts.insert(0, self.variant)
        return quote(",".join(parts), safe=":,=()[]+ ").replace(" ", "_")

    @property
    def arguments(self) -> list[str]:
        """Its command line for `mocosfl_jax.main`, without the folder."""
        settings = [f"--config.{name}={_text(value)}" for name, value in self.overrides.items()]
        return ["--config", self.base, *settings]


def counted(runs: int) -> str:
    """`1 run` or `2 runs`."""
    return "1 run" if runs == 1 else f"{runs} runs"


def expand(sweep: ConfigDict) -> dict[str, Run]:
    """The runs of a sweep by name, in their order: every cell's first seed before any second one.

    Args: sweep: from `default_sweep`.
    Raises: InputError: a field that does not exist, is set twice or lacks its value.
    """
    _check_values(sweep)
    known = flat_fields(sweep.fixed.to_dict()).keys()
    fixed = _set_fields(sweep.fixed)
    grid = _set_fields(sweep.grid)
    variants = _variants(sweep, known)
    bases = {name: fields.pop("base", sweep.base) for name, fields in variants.items()}
    for name, base in bases.items():
        if base is None:
            where = f"config.variants[{name!r}].base" if name else "config.base"
            raise InputError(where, None, "the config file of the runs is needed")
    _check_places(fixed, grid, variants)
    _check_unset(sweep.unset, known, [("fixed", fixed), ("grid", grid), *variants.items()])
    for name in ("fields", "seeds", "commands"):
        _check_more(sweep, name, grid)
    ranked = []
    for variant, fields in variants.items():
        for cell in _cells(grid):
            chosen = {"variant": variant, **cell}
            seeds, commands = (_listed(sweep, name, chosen) for name in ("seeds", "commands"))
            _check_commands(commands)
            more = _more_fields(sweep, chosen, {**fixed, **grid, **fields}, known)
            for rank, seed in enumerate(seeds):
                overrides = {**dict.fromkeys(sweep.unset), **fixed, **fields, **cell, **more}
                run = Run(bases[variant], variant, cell, seed, overrides | {"seed": seed}, commands)
                ranked.append((rank, run))
    if not ranked:
        raise InputError("config.seeds", sweep.seeds, "at least one seed is needed")
    return {run.name: run for _, run in sorted(ranked, key=lambda pair: pair[0])}


# --------------------------------------------------------------------------------------- fields


def _set_fields(fields: ConfigDict) -> Fields:
    flat = flat_fields(fields.to_dict())
    return {name: value for name, value in flat.items() if value is not None}


def _map_fields(fields: ConfigDict, make: Callable[[ConfigDict, str], Any]) -> ConfigDict:
    """What `make(holder, name)` gives for each field; sections stay sections."""
    return ConfigDict(
        {
            name: _map_fields(fields[name], make)
            if isinstance(fields[name], ConfigDict)
            else make(fields, name)
            for name in fields
        }
    )


def _variants(sweep: ConfigDict, known: Collection[str]) -> dict[str, Fields]:
    """The fields of each variant by its name; one without name or fields if the sweep has none.

    Raises: InputError: a variant that is no dict, or a field that does not exist.
    """
    variants = {}
    for variant, fields in sweep.variants.to_dict().items():
        where = f"config.variants[{variant!r}]"
        if not isinstance(fields, dict):
            raise InputError(where, fields, "fields and their values are needed")
        variants[variant] = flat_fields(fields)
        for name, value in variants[variant].items():
            if name != "base":
                _check_known(f"{where}.{name}", name, value, known)
    return variants or {"": {}}


def _check_known(where: str, name: str, value: Any, known: Collection[str]) -> None:
    if name not in known:
        allowed = "seeds are in config.seeds" if name == "seed" else "no such field"
        raise InputError(where, value, allowed)


def _cells(grid: Fields) -> Iterator[Fields]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _listed(sweep: ConfigDict, name: str, cell: Fields) -> tuple[Any, ...]:
    """The `seeds` or `commands` of a cell, whose variant is among its fields."""
    found = [*sweep[name], *itertools.chain.from_iterable(_extras(sweep, name, cell))]
    return tuple(dict.fromkeys(found))


def _more_fields(sweep: ConfigDict, cell: Fields, elsewhere: Fields, known: Any) -> Fields:
    """Those of `more_fields` of a cell.

    Args: elsewhere: fields that are set in another place. known: names of all fields.
    Raises: InputError: a field that does not exist or is set twice.
    """
    found: Fields = {}
    for fields in map(flat_fields, _extras(sweep, "fields", cell)):
        for name, value in fields.items():
            _check_known(f"config.more_fields.{name}", name, value, known)
            if name in {**elsewhere, **found}:
                raise InputError(f"config.more_fields.{name}", value, "set in another place too")
        found |= fields
    return found


def _extras(sweep: ConfigDict, name: str, cell: Fields) -> Iterator[Any]:
    """What `more_fields`, `more_seeds` or `more_commands` give to a cell."""
    for extra in sweep[f"more_{name}"]:
        if all(cell[field] in values for field, values in extra.items() if field != name):
            yield extra[name]


def _text(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, tuple | list) else str(value)


# --------------------------------------------------------------------------------------- checks


def check_metrics(metrics: Iterable[str], where: str = "config.metrics") -> None:
    """Raises: InputError: a name that is no number of a run, of a transfer or of an attack."""
    for name in metrics:
        try:
            number_of(name)
        except KeyError:
            family = name.split("/")[0]
            prefix = f"{family}/NAME/" if family in FAMILIES else ""
            one = ", ".join(FAMILIES.get(family, NUMBERS))
            raise InputError(where, name, f"{prefix}one of {one} is needed") from None


def check_scatter(scatter: Sequence[str]) -> None:
    """Raises: InputError: neither nothing nor two numbers."""
    if len(scatter) not in (0, 2):
        raise InputError("config.scatter", scatter, "two numbers, x and y, are needed, or none")
    check_metrics(scatter, "config.scatter")


def _check_values(sweep: ConfigDict) -> None:
    """Each field of the sweep by itself."""
    if sweep.methods is not None:
        allowed = "a sweep names its variants in config.variants"
        raise InputError("config.methods", sweep.methods, allowed)
    for name in sweep:
        if sweep[name] is None and name not in ("base", "methods", "columns"):
            raise InputError(f"config.{name}", None, "a value is needed")
    if sweep.columns not in {"seed", METRICS, *flat_fields(sweep.fixed.to_dict())}:
        allowed = f"a field of the runs, or {METRICS}, is needed"
        raise InputError("config.columns", sweep.columns, allowed)
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise InputError("config.seeds", sweep.seeds, "each seed once")
    check_metrics(sweep.metrics)
    check_scatter(sweep.scatter)


def _check_places(fixed: Fields, grid: Fields, variants: dict[str, Fields]) -> None:
    """Each field of a run has values and is set in one place."""
    for name, values in grid.items():
        if not values:
            raise InputError(f"config.grid.{name}", values, "at least one value is needed")
        if len(set(map(_text, values))) < len(values):
            raise InputError(f"config.grid.{name}", values, "each value once")
        if name in fixed:
            raise InputError(f"config.fixed.{name}", fixed[name], "set in config.grid too")
    for variant, fields in variants.items():
        for name, value in fields.items():
            for place, others in (("fixed", fixed), ("grid", grid)):
                if name in others:
                    where = f"config.variants[{variant!r}].{name}"
                    raise InputError(where, value, f"set in config.{place} too")


def _check_unset(
    names: Iterable[str], known: Collection[str], places: Sequence[tuple[str, Fields]]
) -> None:
    """Args: places: parts of the sweep and variants, each with the fields that it sets."""
    for name in names:
        if name not in known:
            raise InputError("config.unset", name, "a field of the runs is needed")
        for place, fields in places:
            if name in fields:
                raise InputError("config.unset", name, f"set in {place} too")


def _check_more(sweep: ConfigDict, name: str, grid: Fields) -> None:
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


_ARGUMENTS = {
    "mocosfl_jax.attack": attack.check_arguments,
    "mocosfl_jax.evaluate": evaluate.check_arguments,
}
"""Checks of the arguments of the package's own commands."""


def _check_commands(commands: Iterable[Any]) -> None:
    for command in commands:
        if not _can_follow(command):
            allowed = "a module that exists and its options, without --workdir, are needed"
            raise InputError("config.commands", command, allowed)
        module, *options = shlex.split(command)
        if module in _ARGUMENTS:
            try:
                _ARGUMENTS[module](options)
            except InputError as error:
                raise InputError("config.commands", command, str(error)) from None


def _can_follow(command: Any) -> bool:
    """Whether it names a module, and leaves the folder of the run open."""
    try:
        module, *options = shlex.split(command)
        found = importlib.util.find_spec(module) is not None
    except (AttributeError, ImportError, TypeError, ValueError):  # whatever is no such text
        return False
    return found and not any(option.split("=")[0] == "--workdir" for option in options)
