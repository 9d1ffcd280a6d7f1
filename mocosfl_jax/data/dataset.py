"""What a data set is, whatever its source, and what all sources share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mocosfl_jax.errors import InputError
from mocosfl_jax.randomness import Stream, host_rng

Integer = TypeVar("Integer", bound=np.integer)

HOLDOUT_FRACTION = 0.1  # of labelled images, where no fraction is set


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before any image is decoded.

    name: the `dataset` string. num_train, num_test: images; num_test is 0 without a test split.
    image_size: side S of the stored square, pixels. num_classes: None if the train split has no
    labels. class_names: one a class, or None where there are no names. fingerprint: what tells
    this data set from another or a changed one (`fingerprint.difference`), ready for JSON; it
    takes no part in comparisons. held_out: whether the test images were split off from the others.
    num_mixed: training images of a second data set, which are not among num_train.
    """

    name: str
    num_train: int
    num_test: int
    image_size: int
    num_classes: int | None
    class_names: tuple[str, ...] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    held_out: bool = False
    num_mixed: int = 0

    @property
    def labelled(self) -> bool:
        """Whether the train split has labels."""
        return self.num_classes is not None


@dataclass(frozen=True)
class Split:
    """images: uint8 (n, S, S, 3). labels: int32 (n,) in [0, num_classes), or None."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32] | None


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    class_names: one a class, or None where there are no names. mixed: training images of a second
    data set, in random order and without labels (`mixture.with_mixture`); None: there is none.
    """

    train: Split
    test: Split | None
    class_names: tuple[str, ...] | None
    info: DatasetInfo
    mixed: Split | None = None


@dataclass(frozen=True)
class Request:
    """The arguments of `prepare_dataset`; `location` is the `dataset` string without its scheme."""

    dataset: str
    location: str
    data_dir: str | None
    train_split: str | None
    test_split: str | None
    image_size: int | None
    holdout_fraction: float | None
    seed: int

    def fraction_held_out(self, labelled: bool) -> float:
        """`holdout_fraction` if set, else 0 without labels, as nothing reads that test set."""
        if self.holdout_fraction is not None:
            return self.holdout_fraction
        return HOLDOUT_FRACTION if labelled else 0.0


class Prepared(NamedTuple):
    """A data set that passed every check that needs no pixels.

    load: decodes the images. train_labels: the labels that `load` gives the train split, int32
    (num_train,) or None, without decoding any image. Both raise `InputError` for broken files.
    """

    info: DatasetInfo
    load: Callable[[], Dataset]
    train_labels: Callable[[], NDArray[np.int32] | None]


class Labels(NamedTuple):
    """Labels of both splits on a common scale; all None if the train split has none."""

    train: NDArray[np.int32] | None
    test: NDArray[np.int32] | None
    num_classes: int | None
    class_names: tuple[str, ...] | None


def contiguous_labels(
    train: NDArray[np.integer] | None, test: NDArray[np.integer] | None, where: str
) -> Labels:
    """Maps the integers that occur in `train` to 0, 1, ... in their order.

    Args:
        train: (n,) labels; None, or all negative: there are none.
        test: (m,) labels or None, the same.
        where: file or field that errors name.

    Returns: the mapped labels; `class_names` are the integers, or None where nothing changed.

    Raises:
        InputError: some labels are negative, or a test label does not occur in `train`.
    """
    train, test = (
        known_labels(train, f"{where} train labels"),
        known_labels(test, f"{where} test labels"),
    )
    if train is None:
        return Labels(None, None, None, None)
    classes = np.unique(train)
    if test is not None and not np.isin(test, classes).all():
        stray = int(test[~np.isin(test, classes)][0])
        raise InputError(f"{where} test labels", stray, "a label of the train split is needed")
    same = classes[0] == 0 and classes[-1] == len(classes) - 1
    return Labels(
        np.searchsorted(classes, train).astype(np.int32),
        None if test is None else np.searchsorted(classes, test).astype(np.int32),
        len(classes),
        None if same else tuple(str(label) for label in classes),
    )


def known_labels(labels: NDArray[Integer] | None, where: str) -> NDArray[Integer] | None:
    """The labels, or None if all are negative, as TFDS marks images without a label.

    Raises: InputError: some are negative.
    """
    if labels is None or (labels < 0).all():
        return None
    if (labels < 0).any():
        raise InputError(where, int(labels.min()), "labels from 0 are needed, or -1 for all")
    return labels


def hold_out(
    num_images: int,
    labels: NDArray[np.integer] | None,
    fraction: float,
    seed: int,
    where: str,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits off a test set at random, class by class if there are labels.

    Args:
        num_images: n.
        labels: (n,) integers or None.
        fraction: of each class that is held out, in [0, 1): rounded, at least one image and not
            all; 0 holds out nothing.
        seed: of the run.
        where: file or field that errors name.

    Returns: ascending image ids of the train and of the test split.

    Raises:
        InputError: a class has only one image.
    """
    ids = np.arange(num_images)
    if fraction == 0:
        return ids, ids[:0]
    classes = np.zeros(num_images, np.int64) if labels is None else labels
    values, counts = np.unique(classes, return_counts=True)
    if counts.min() < 2:
        raise InputError(
            where,
            f"1 image of class {values[counts.argmin()]}" if labels is not None else "1 image",
            "at least 2 are needed to hold out a test set, or config.holdout_fraction = 0",
        )
    held_out = np.clip(np.rint(counts * fraction).astype(np.int64), 1, counts - 1)
    in_test = drawn_by_class(classes, held_out, host_rng(seed, Stream.SPLIT))
    return ids[~in_test], ids[in_test]


def drawn_by_class(
    classes: NDArray[np.integer], numbers: NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draws so many images of each class, each equally likely.

    Args:
        classes: (n,) class of each image.
        numbers: how many of each class, in the order of `np.unique(classes)`; at most all of them.
            Where they grow, the images that were drawn before stay.
        rng: it is used for one permutation of the images.

    Returns: (n,) whether an image is drawn.
    """
    _, counts = np.unique(classes, return_counts=True)
    shuffled = rng.permutation(len(classes))
    shuffled = shuffled[np.argsort(classes[shuffled], kind="stable")]
    starts = np.cumsum(counts) - counts
    rank_in_class = np.arange(len(classes)) - np.repeat(starts, counts)
    drawn = np.empty(len(classes), bool)
    drawn[shuffled] = rank_in_class < np.repeat(numbers, counts)
    return drawn


def channel_stats(
    images: NDArray[np.uint8],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (of the population) of each channel, of pixels in [0, 1].

    Exact up to float64 rounding: pixels are counted by value, a chunk of images at a time.

    Args: images: uint8 (n, S, S, 3).

    Returns: mean (3,) and standard deviation (3,), float64.
    """
    counts = np.zeros((3, 256), np.int64)
    chunk = max(1, 2**22 // images[0].size)
    for start in range(0, len(images), chunk):
        for channel in range(3):
            values = images[start : start + chunk, ..., channel].ravel()
            counts[channel] += np.bincount(values, minlength=256)
    share = counts / counts[0].sum()
    pixel = np.arange(256) / 255
    mean = share @ pixel
    variance = np.sum(share * (pixel - mean[:, None]) ** 2, axis=1)
    return mean, np.sqrt(variance)
