"""The fields of a sweep's config, and the runs that follow from them.

A sweep config (`configs/sweeps/*.py`) starts from `default_sweep()` and changes fields. `expand`
turns it into runs, which `sweep.preflight` checks as `mocosfl_jax.main` would.
"""

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mocosfl_jax.config import default_config
from mocosfl_jax.config.stored import flat_fields
from mocosfl_jax.errors import InputError
from mocosfl_jax.sweep.checks import (
    METRICS,
    Fields,
    check_columns,
    check_commands,
    check_made,
    check_more,
    check_places,
    check_unset,
    check_values,
    text_of,
)


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
    # Field whose values are the columns of the report and the x axis of its plot, `seed` or one
    # that varies; or `metrics`: a column a number, a row a cell of the grid. Rule: `num_clients`
    # where it varies, else the first field of the grid, else `metrics`.
    sweep.columns = placeholder(str)
    # Numbers in the report's table and plot, by their name in summary.json: `knn_top1`,
    # `transfer/svhn/knn_top1`; those of an attack by `attack/NAME/` and their name in attack.json:
    # `attack/N4C64/mse_ratio`. A command of the sweep must make those of an attack or a transfer.
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
        parts = [f"{name}={text_of(value)}" for name, value in self.cell.items()]
        parts.append(f"seed={self.seed}")
        if self.variant:
            parts.insert(0, self.variant)
        return quote(",".join(parts), safe=":,=()[]+ ").replace(" ", "_")

    @property
    def arguments(self) -> list[str]:
        """Its command line for `mocosfl_jax.main`, without the folder."""
        settings = [f"--config.{name}={text_of(value)}" for name, value in self.overrides.items()]
        return ["--config", self.base, *settings]


def counted(runs: int) -> str:
    """`1 run` or `2 runs`."""
    return "1 run" if runs == 1 else f"{runs} runs"


def expand(sweep: ConfigDict) -> dict[str, Run]:
    """The runs of a sweep by name, in their order: every cell's first seed before any second one.

    Args: sweep: from `default_sweep`.
    Raises: InputError: a field that does not exist, is set twice or lacks its value.
    """
    check_values(sweep)
    known = flat_fields(sweep.fixed.to_dict()).keys()
    fixed = _set_fields(sweep.fixed)
    grid = _set_fields(sweep.grid)
    variants = _variants(sweep, known)
    bases = {name: fields.pop("base", sweep.base) for name, fields in variants.items()}
    for name, base in bases.items():
        if base is None:
            where = f"config.variants[{name!r}].base" if name else "config.base"
            raise InputError(where, None, "the config file of the runs is needed")
    check_places(fixed, grid, variants)
    check_unset(sweep.unset, known, [("fixed", fixed), ("grid", grid), *variants.items()])
    for name in ("fields", "seeds", "commands"):
        check_more(sweep, name, grid)
    check_columns(sweep, grid, variants)
    ranked = []
    for variant, fields in variants.items():
        for cell in _cells(grid):
            chosen = {"variant": variant, **cell}
            seeds, commands = (_listed(sweep, name, chosen) for name in ("seeds", "commands"))
            check_commands(commands)
            more = _more_fields(sweep, chosen, {**fixed, **grid, **fields}, known)
            for rank, seed in enumerate(seeds):
                overrides = {**dict.fromkeys(sweep.unset), **fixed, **fields, **cell, **more}
                run = Run(bases[variant], variant, cell, seed, overrides | {"seed": seed}, commands)
                ranked.append((rank, run))
    if not ranked:
        raise InputError("config.seeds", sweep.seeds, "at least one seed is needed")
    check_made(sweep, [command for _, run in ranked for command in run.commands])
    return {run.name: run for _, run in sorted(ranked, key=lambda pair: pair[0])}


def columns_of(sweep: ConfigDict) -> str:
    """`sweep.columns`, by its rule where it is unset."""
    grid = list(_set_fields(sweep.grid))
    first = "num_clients" if "num_clients" in grid else next(iter(grid), METRICS)
    return first if sweep.columns is None else sweep.columns


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
