"""Which images the attacker has and which it is after; no image is both."""

from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from mocosfl_jax.attack.options import Options
from mocosfl_jax.data.dataset import Dataset, Split
from mocosfl_jax.data.partition import ClientImages
from mocosfl_jax.errors import InputError
from mocosfl_jax.randomness import Stream, host_rng

FEWEST = 10
"""Auxiliary images: a tenth of them, at least one, validates."""


class AttackImages(NamedTuple):
    """Ids, int64. train, validate: of the train split, which the attacker has; it learns from the
    former. targets: of `split`, the train or the test split."""

    train: NDArray[np.int64]
    validate: NDArray[np.int64]
    targets: NDArray[np.int64]
    split: Split


def choose_images(options: Options, dataset: Dataset, partition: ClientImages) -> AttackImages:
    """Chooses the targets, and auxiliary images at random among the others.

    No auxiliary image is a target or an image of the attacked client, and none has the same pixels
    as one: data sets hold duplicates, and splits may overlap.

    Args: dataset: of the run. partition: who holds its training images.
    Raises: InputError: a client that does not exist or holds nothing, no test images, too few
    auxiliary images, or so many that they would overlap the targets.
    """
    split, targets, taken = _targets(options, dataset, partition)
    number, free = round(options.auxiliary * len(taken)), np.flatnonzero(~taken)
    if number < FEWEST:
        allowed = f"{number} of {len(taken)} training images, at least {FEWEST} are needed"
        raise InputError("--auxiliary", options.auxiliary, allowed)
    if number > len(free):
        allowed = (
            f"{number} of {len(taken)} training images would overlap the targets "
            f"of {options.targets!r}: at most {len(free)} do not"
        )
        raise InputError("--auxiliary", options.auxiliary, allowed)
    drawn = host_rng(options.seed, Stream.ATTACK, 0).permutation(free)[:number]
    validate = number // 10
    targets = targets[: options.num_targets]
    return AttackImages(drawn[validate:], drawn[:validate], targets, split)


def _targets(
    options: Options, dataset: Dataset, partition: ClientImages
) -> tuple[Split, NDArray[np.int64], NDArray[np.bool_]]:
    """The split and ids of the targets and of what else their client holds, and which training
    images are, or equal, one of them."""
    images = dataset.train.images
    if options.client is None:
        if dataset.test is None:
            allowed = "the data set has no test images; client:ID takes training images"
            raise InputError("--targets", options.targets, allowed)
        targets = dataset.test.images[: options.num_targets]
        taken = np.isin(_hashes(images), _hashes(targets))
        return dataset.test, np.arange(len(targets)), taken
    if options.client >= partition.num_clients:
        allowed = f"the run has {partition.num_clients} clients, with ids from 0"
        raise InputError("--targets", options.targets, allowed)
    ids = np.sort(partition.client(options.client)).astype(np.int64)
    if not len(ids):
        raise InputError("--targets", options.targets, "this client holds no images")
    hashes = _hashes(images)
    return dataset.train, ids, np.isin(hashes, hashes[ids])


def _hashes(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Of the pixels of each image."""
    return np.array([xxhash.xxh3_64_intdigest(image.data) for image in images], np.uint64)
