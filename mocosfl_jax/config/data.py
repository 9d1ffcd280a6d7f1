"""From a config to its data: how the data set is read, and which client holds which images."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mocosfl_jax.config.fields import Config, Resolved
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.config.resolve import resolve
from mocosfl_jax.config.rich import draw_of, rich_share
from mocosfl_jax.data.cohort import CohortSampler
from mocosfl_jax.data.dataset import DatasetInfo, Prepared
from mocosfl_jax.data.mixture import with_mixture
from mocosfl_jax.data.partition import (
    ClientImages,
    Partition,
    SharedImages,
    by_classes,
    dirichlet,
    iid,
    in_order,
)
from mocosfl_jax.data.sources import Options, prepare_dataset
from mocosfl_jax.errors import InputError


def data_options(config: Config) -> Options:
    """How the data set of a config, resolved or not, is read."""
    return {
        "data_dir": config.data_dir,
        "train_split": config.train_split,
        "test_split": config.test_split,
        "image_size": config.image_size,
        "holdout_fraction": config.holdout_fraction,
        "seed": config.seed,
    }


def check_apart(config: Config, workdir: Path) -> None:
    """Raises: InputError: the folder of a run lies among the pictures that the run reads."""
    for name in ("dataset", "mix_dataset"):
        kind, _, path = (getattr(config, name) or "").partition(":")
        root = Path(os.path.expanduser(path)).resolve()
        if kind == "folder" and workdir.resolve().is_relative_to(root):
            allowed = f"a folder outside {root}, the pictures of config.{name}, is needed"
            raise InputError("--workdir", str(workdir), allowed)


def prepare(config: Config) -> Prepared:
    """The data set of a config, resolved or not, and what is mixed in; no pixel is decoded.

    Raises: InputError: as `prepare_dataset`, for either of the two.
    """
    options = data_options(config)
    first = prepare_dataset(config.dataset, **options)
    if config.mix_dataset is None:
        return first
    # A split's name, and a share of images to test on, are the first data set's.
    own = Options(
        data_dir=config.data_dir,
        train_split=None,
        test_split=None,
        image_size=first.info.image_size,
        holdout_fraction=None,
        seed=config.seed,
    )
    try:
        second = prepare_dataset(config.mix_dataset, **own)
    except InputError as error:
        error.args = (str(error).replace("config.dataset", "config.mix_dataset"),)
        raise
    return with_mixture(first, second, config.mix_fraction, config.seed)


def deal(config: Config, prepared: Prepared) -> tuple[Resolved, ClientImages]:
    """Deals the images to the clients and fills the config, after all checks that need no pixels.

    Args:
      config: passes `check_fields`; its unset fields are not filled.
      prepared: the data set that it names.
    Returns: the resolved config, and who holds which images.
    Raises: InputError: as `partition_of` and `resolve`, or a client holds too few images.
    """
    iid_only = config.classes_per_client is None and config.dirichlet_alpha is None
    labels = None if iid_only else prepared.train_labels()
    partition = partition_of(config, prepared.info.num_train, labels)
    resolved = resolve(config, prepared.info, partition)
    sampler_of(resolved, partition)
    find_recipe(config.method).check_holdings(resolved, partition)
    return resolved, partition


def partition_of(
    config: Config, num_images: int, labels: NDArray[np.integer] | None
) -> ClientImages:
    """Which client holds which training images; fields that a rule fills may be unset.

    Args:
      config: passes `check_fields`.
      num_images: of the train split.
      labels: (num_images,) integers of the train split, or None.
    Raises: InputError: the data set cannot be dealt to the clients in this way.
    """
    if config.images_per_client is not None:
        return SharedImages(
            num_images=num_images,
            labels=labels,
            num_clients=config.num_clients,
            images_per_client=config.images_per_client,
            classes_per_client=config.classes_per_client,
            alpha=config.dirichlet_alpha,
            seed=config.seed,
        )
    clients, seed, rich = config.num_clients, config.seed, rich_share(config)
    if config.classes_per_client is not None:
        return by_classes(labels, clients, config.classes_per_client, seed, rich)
    if config.dirichlet_alpha is not None:
        return dirichlet(labels, clients, config.dirichlet_alpha, seed, rich)
    return iid(num_images, clients, seed, rich)


def sampler_of(config: Resolved, partition: ClientImages) -> CohortSampler:
    """Who takes part in each round.

    Raises: InputError: fewer clients have images than a round draws.
    """
    return CohortSampler(partition, draw_of(config), config.seed)


def mixed_partition_of(config: Config, info: DatasetInfo) -> Partition | None:
    """Which client holds which images of the second data set; None: there is none.

    Args: info: of the data set, from `prepare`.
    """
    return in_order(info.num_mixed, config.num_clients) if info.num_mixed else None
