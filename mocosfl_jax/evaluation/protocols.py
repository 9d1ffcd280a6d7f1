"""The data that the protocols of a run need: labelled splits, and their features."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mocosfl_jax.config import Resolved
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.models.split import SplitModel, Variables


class LabelledImages(NamedTuple):
    """images: (n, S, S, 3) uint8. labels: (n,) int32."""

    images: np.ndarray
    labels: np.ndarray


class EvaluationData(NamedTuple):
    """What both protocols need."""

    train: LabelledImages
    test: LabelledImages
    num_classes: int


class Features(NamedTuple):
    """An encoded split. features: (n, F) pooled backbone features; embedding: (n, D) head output;
    both float32. labels: (n,) int32."""

    features: np.ndarray
    embedding: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """The train and test images, encoded."""

    train: Features
    test: Features


def evaluation_data(dataset: Dataset) -> EvaluationData | str:
    """The labelled splits, or why there are none."""
    train, test, classes = dataset.train, dataset.test, dataset.info.num_classes
    if train.labels is None or classes is None:
        return "the images have no labels"
    if test is None:
        return "there is no test split"
    if test.labels is None:
        return "the test images have no labels"
    return EvaluationData(
        LabelledImages(train.images, train.labels),
        LabelledImages(test.images, test.labels),
        classes,
    )


def encode_splits(
    config: Resolved,
    model: SplitModel,
    variables: Variables,
    data: EvaluationData,
    placement: Placement | None = None,
    before_batch: Callable[[], None] | None = None,
) -> Splits:
    """Encodes train and test images once, unaugmented, on the devices of the placement.

    Args: before_batch: called before each batch; may raise to end the work.
    """

    def run(split: LabelledImages) -> Features:
        features, embedding = encode(
            model.encode,
            variables,
            split.images,
            config.mean,
            config.std,
            config.eval_batch_size,
            placement,
            before_batch,
        )
        return Features(features, embedding, split.labels)

    return Splits(run(data.train), run(data.test))
