"""What a sweep is: the fields of its config, and the runs that follow from them.

A sweep config (`configs/sweeps/*.py`) starts from `default_sweep()` and changes fields. `expand`
turns it into runs, each of which has been checked as `mocosfl_jax.main` would check it.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mocosfl_jax.config import Config, check_types, default_config
from mocosfl_jax.config.build import data_options, deal
from mocosfl_jax.config.resolve import check_fields
from mocosfl_jax.data.dataset import Prepared
from mocosfl_jax.data.sources import prepare_dataset
from mocosfl_jax.errors import InputError
from mocosfl_jax.main import define_flags
from mocosfl_jax.run.commandline import parse

Fields = dict[str, Any]
"""Values of config fields, by name."""

METRICS = (
    "steps",
    "linear_top1",
    "linear_top1_best_test_epoch",
    "knn_top1",
    "knn_top1_at_init",
    "knn_top1_raw_pixels",
    "images_per_second",
    "compile_seconds",
    "wall_seconds",
    "peak_memory_bytes",
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
)
"""Numbers of summary.json that a report can show."""


def default_sweep() -> ConfigDict:
    """A locked ConfigDict with every field of a sweep; each field of a run is set in one place."""
    sweep = ConfigDict()
    # Config file of every run, as for `mocosfl_jax.main`.
    sweep.base = placeholder(str)
    # Fields that have the same value in every run: `sweep.fixed.epochs = 1`. None: as in the base.
    sweep.fixed = _fields_of_a_run()
    # Fields that are unset in every run, whatever the base has: `("classes_per_client",)`.
    sweep.unset = ()
    # Fields that vary, and their values: `sweep.grid.num_clients = (10, 100)`. All combinations
    # are run. The value None unsets a field.
    sweep.grid = ConfigDict({name: placeholder(tuple) for name in sweep.fixed})
    # Named variants, the fields of each: `{"MocoSFL-1": {"cut": 1}, "MocoSFL-3": {"cut": 2}}`. Each
    # is run on the whole grid. A field that a variant leaves out has the base's value; one that it
    # sets to None is unset.
    sweep.methods = {}
    # Seeds of every cell of the grid.
    sweep.seeds = (0,)
    # Further seeds for some cells: `({"num_clients": (10, 1000), "seeds": (1, 2)},)`. A cell gets
    # them if its fields have the listed values; `method` is a field here too.
    sweep.more_seeds = ()
    # Field whose values are the columns of the report and the x axis of its plot.
    sweep.columns = "num_clients"
    # Numbers of summary.json in the report's table and plot.
    sweep.metrics = ("linear_top1", "knn_top1")
    # What the engine `slurm` asks for, each job: minutes before it is requeued, GPUs, CPUs, memory
    # in GB; unset: the cluster's defaults.
    sweep.slurm = {
        "timeout_min": 24 * 60,
        "gpus_per_node": 1,
        "cpus_per_task": 8,
        "mem_gb": placeholder(float),
        "partition": placeholder(str),
        "account": placeholder(str),
        "qos": placeholder(str),
    }
    sweep.lock()
    sweep.methods.unlock()
    return sweep


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    base: str  # its config file
    method: str  # name of its variant; "" where the sweep has none
    cell: Fields  # its values of the grid's fields
    seed: int
    overrides: Fields  # all fields that it sets, the seed among them

    @property
    def name(self) -> str:
        """Name of its folder, made from what tells it from the others: `num_clients=50,seed=1`."""
        cell = [f"{name}={_text(value)}" for name, value in self.cell.items()]
        parts = [self.method] * bool(self.method) + [*cell, f"seed={self.seed}"]
        return quote(",".join(parts), safe=":,=()[]+ ").replace(" ", "_")

    @property
    def arguments(self) -> list[str]:
        """Its command line for `mocosfl_jax.main`, but for the folder."""
        settings = [f"--config.{name}={_text(value)}" for name, value in self.overrides.items()]
        return ["--config", self.base, *settings]


def expand(sweep: ConfigDict) -> dict[str, Run]:
    """The runs of a sweep by name, in their order: every cell's first seed before any second one.

    Args: sweep: from `default_sweep`.
    Raises: InputError: a field that does not exist, is set twice or lacks its value.
    """
    _check_values(sweep)
    fixed = {name: value for name, value in sweep.fixed.items() if value is not None}
    grid = {name: values for name, values in sweep.grid.items() if values is not None}
    methods = sweep.methods.to_dict() or {"": {}}
    _check_metrics(sweep.metrics)
    _check_places(fixed, grid, methods)
    _check_unset(sweep.unset, {"fixed": fixed, "grid": grid, **methods})
    _check_more_seeds(sweep.more_seeds, grid)
    ranked = []
    for method, variant in methods.items():
        for cell in _cells(grid):
            for rank, seed in enumerate(_seeds(sweep, {"method": method, **cell})):
                overrides = {**dict.fromkeys(sweep.unset), **fixed, **variant, **cell, "seed": seed}
                ranked.append((rank, Run(sweep.base, method, cell, seed, overrides)))
    if not ranked:
        raise InputError("config.seeds", sweep.seeds, "at least one seed is needed")
    return {run.name: run for _, run in sorted(ranked, key=lambda pair: pair[0])}


def check(runs: dict[str, Run], finished: Collection[str] = ()) -> dict[str, Config]:
    """The config of each run, unset fields left unset, after all checks that `main` would make.

    Args: finished: names of runs whose data need not be there any more.
    Raises: InputError: names the field, its value, what is allowed, and the run.
    """
    prepared: dict[Any, Prepared] = {}

    def prepare(config: Config) -> Prepared:
        """The data set of a run, read once for all runs that share it."""
        options = data_options(config)
        key = (config.dataset, *options.values())
        if key not in prepared:
            data = prepare_dataset(config.dataset, **options)
            prepared[key] = data._replace(train_labels=functools.cache(data.train_labels))
        return prepared[key]

    return {
        name: _checked(run, None if name in finished else prepare) for name, run in runs.items()
    }


def _checked(run: Run, prepare: Callable[[Config], Prepared] | None) -> Config:
    try:
        config = check_types(_load(run))
        if prepare is not None:
            check_fields(config)
            deal(config, prepare(config))
    except InputError as error:
        error.args = (f"{error} (run {run.name})",)
        raise
    return config


def _load(run: Run) -> ConfigDict:
    """The run's config as `main` reads it from the command line."""
    argv = ["main", *run.arguments]
    values = define_flags(argv)
    parse(values, argv, config_name="config.base")
    return values.config


def _check_values(sweep: ConfigDict) -> None:
    """Each field of the sweep by itself."""
    if sweep.base is None:
        raise InputError("config.base", None, "the config file of the runs is needed")
    for name in ("fixed", "unset", "grid", "methods", "seeds", "more_seeds", "metrics", "slurm"):
        if sweep[name] is None:
            raise InputError(f"config.{name}", None, "a value is needed")
    if sweep.columns not in default_config():
        raise InputError("config.columns", sweep.columns, "a field of the runs is needed")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise InputError("config.seeds", sweep.seeds, "each seed once")


def _check_metrics(metrics: Iterable[str]) -> None:
    for name in metrics:
        if name not in METRICS:
            raise InputError("config.metrics", name, f"one of {', '.join(METRICS)} is needed")


def _fields_of_a_run() -> ConfigDict:
    """Every field of a run but the seed, typed and unset."""
    run = default_config()
    return ConfigDict({name: placeholder(run.get_type(name)) for name in run if name != "seed"})


def _cells(grid: Fields) -> Iterator[Fields]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _seeds(sweep: ConfigDict, cell: Fields) -> tuple[int, ...]:
    """The seeds of a cell, whose method is among its fields."""
    seeds = list(sweep.seeds)
    for extra in sweep.more_seeds:
        if all(cell[name] in values for name, values in extra.items() if name != "seeds"):
            seeds += extra["seeds"]
    return tuple(dict.fromkeys(seeds))


def _text(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, tuple | list) else str(value)


# --------------------------------------------------------------------------------------- checks


def _check_places(fixed: Fields, grid: Fields, methods: dict[str, Fields]) -> None:
    """Each field of a run exists, has values and is set in one place."""
    known = _fields_of_a_run()
    for name, values in grid.items():
        if not values:
            raise InputError(f"config.grid.{name}", values, "at least one value is needed")
        if len(set(map(_text, values))) < len(values):
            raise InputError(f"config.grid.{name}", values, "each value once")
        if name in fixed:
            raise InputError(f"config.fixed.{name}", fixed[name], "set in config.grid too")
    for method, variant in methods.items():
        where = f"config.methods[{method!r}]"
        if not isinstance(variant, dict):
            raise InputError(where, variant, "fields and their values are needed")
        for name, value in variant.items():
            if name not in known:
                allowed = "seeds are in config.seeds" if name == "seed" else "no such field"
                raise InputError(f"{where}.{name}", value, allowed)
            for place, fields in (("fixed", fixed), ("grid", grid)):
                if name in fields:
                    raise InputError(f"{where}.{name}", value, f"set in config.{place} too")


def _check_unset(names: Iterable[str], places: dict[str, Fields]) -> None:
    """Args: places: the fields that each part of the sweep, or each method, sets."""
    known = _fields_of_a_run()
    for name in names:
        if name not in known:
            raise InputError("config.unset", name, "a field of the runs is needed")
        for place, fields in places.items():
            if name in fields:
                raise InputError("config.unset", name, f"set in {place} too")


def _check_more_seeds(more_seeds: tuple[Any, ...], grid: Fields) -> None:
    for extra in more_seeds:
        lists = isinstance(extra, dict) and all(isinstance(v, tuple | list) for v in extra.values())
        if not lists or "seeds" not in extra or extra.keys() - grid.keys() - {"seeds", "method"}:
            allowed = 'fields of config.grid, and seeds: {"num_clients": (10, 50), "seeds": (1,)}'
            raise InputError("config.more_seeds", extra, allowed)
