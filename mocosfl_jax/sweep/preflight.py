"""The checks of a sweep's runs that `mocosfl_jax.main` would make, before any of them starts."""

import functools
from collections.abc import Callable, Collection
from typing import Any

from ml_collections import ConfigDict

from mocosfl_jax.config import Config, check_types
from mocosfl_jax.config.checks import check_fields
from mocosfl_jax.config.data import data_options, deal
from mocosfl_jax.config.data import prepare as prepare_data
from mocosfl_jax.data.dataset import Prepared
from mocosfl_jax.errors import InputError
from mocosfl_jax.run.commandline import define_flags, parse
from mocosfl_jax.run.source import with_init_digest
from mocosfl_jax.sweep.definition import Run


def check(
    runs: dict[str, Run],
    finished: Collection[str] = (),
    stored: Callable[[str], Config | None] = lambda name: None,
) -> dict[str, Config]:
    """The config of each run, unset fields left unset, after the checks that `main` makes before it
    builds the method.

    Args:
      finished: names of runs whose data need not be there any more.
      stored: the config of a run that has begun, by its name, else None.
    Raises: InputError: names the field, its value, what is allowed, and the run.
    """
    prepared: dict[Any, Prepared] = {}

    def prepare(config: Config) -> Prepared:
        """The data set of a run, read once for all runs that share it."""
        options = data_options(config)
        key = (config.dataset, *options.values(), config.mix_dataset, config.mix_fraction)
        if key not in prepared:
            data = prepare_data(config)
            prepared[key] = data._replace(train_labels=functools.cache(data.train_labels))
        return prepared[key]

    return {
        name: _checked(run, None if name in finished else prepare, stored(name))
        for name, run in runs.items()
    }


def _checked(
    run: Run, prepare: Callable[[Config], Prepared] | None, stored: Config | None
) -> Config:
    try:
        config = check_types(_load(run))
        if prepare is not None:
            check_fields(config)
            resolved, _ = deal(config, prepare(config))
            with_init_digest(resolved, stored)
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
