"""From a typed config to one without gaps: the paper's rules for unset fields, and all checks.

A field that is set is never overridden; a set field with an impossible value raises `InputError`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mocosfl_jax.config.checks import check_clients, check_fields, check_resolved
from mocosfl_jax.config.fields import Config, Resolved
from mocosfl_jax.config.ranges import check_ranges
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.config.rich import all_blocks, blocks_of
from mocosfl_jax.data.dataset import HOLDOUT_FRACTION, DatasetInfo
from mocosfl_jax.data.partition import ClientImages
from mocosfl_jax.models.backbones import default_fields, default_width
from mocosfl_jax.models.heads import HEADS


def resolve(config: Config, info: DatasetInfo, partition: ClientImages | None = None) -> Resolved:
    """Fills every unset field and checks all of them together.

    Args:
      config: from `check_types`.
      info: of the data set that the config names.
      partition: who holds which images, from `partition_of`. None: every client is taken to have
        images, which holds but for Dirichlet clients.
    Raises: InputError: a value that is impossible, alone or together with the others.
    """
    check_fields(config)
    check_clients(config, info)
    holders = config.num_clients if partition is None else partition.num_holders
    recipe = find_recipe(config.method)
    shared = _filled(config, info, holders)
    rules = recipe.rules(shared)
    filled = _fill(shared, {name: value for name, value in rules.items() if name in recipe.reads})
    # These two also say how an encoder's file is divided into client and server.
    filled = _fill(filled, {"cut": 1, "bottleneck": "none"})
    resolved = Resolved.of(filled)
    check_resolved(resolved, config, holders)
    check_ranges(resolved)
    recipe.check(resolved, info)
    return resolved


def _fill(config: Config, rules: Mapping[str, Any]) -> Config:
    """The config with these values where it has none."""
    unset = {name: value for name, value in rules.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **unset)


def _filled(config: Config, info: DatasetInfo, holders: int) -> Config:
    """One rule for each unset field that methods share, in the order in which they depend on each
    other.

    Args: holders: clients that have images.
    """

    def fill(name: str, value: Any) -> None:
        nonlocal config
        config = _fill(config, {name: value})

    v1 = config.head == "V1"
    fill("image_size", info.image_size)
    fill("holdout_fraction", HOLDOUT_FRACTION if info.labelled else 0.0)
    fill("cohort_size", min(holders, 100))
    fill("batch_size", max(1, config.total_batch // blocks_of(config)))
    if config.mix_dataset is not None:
        fill("mix_batch_size", config.batch_size)
    rows = blocks_of(config) * config.batch_size
    if config.steps_per_round is None:
        visits = config.num_clients / (config.cohort_size * config.local_epochs)
        fill("rounds", math.ceil(config.epochs * visits))
        held = config.images_per_client or info.num_train / all_blocks(config)
        passes = config.local_epochs  # each is at least one step
        fill("steps_per_round", max(passes, int(passes * held / config.batch_size)))
    images_a_round = config.steps_per_round * rows
    fill("rounds", max(1, round(config.epochs * info.num_train / images_a_round)))
    fill("width", default_width(config.backbone))
    config = _fill(config, default_fields(config.backbone, config.image_size))
    fill("head_width", HEADS[config.head].width)
    fill("schedule", "step" if v1 else "cosine")
    fill("augmentation", "v1" if v1 else "v2")
    taps = max(9, config.image_size // 10 // 2 * 2 + 1)
    fill("blur_kernel_size", min(taps, 2 * config.image_size - 1))
    fill("knn_every", max(1, config.rounds // 10))
    fill("steps_per_dispatch", largest_divisor(config.steps_per_round, 10))
    fill("checkpoint_every", max(1, config.rounds // 20))
    return config


def largest_divisor(number: int, limit: int) -> int:
    """The largest one up to `limit`; 1 of anything that is not positive."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0) if number > 0 else 1
