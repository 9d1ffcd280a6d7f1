"""The protocols that a run reports: kNN monitor and linear probe (docs/method.md)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mocosfl_jax.config import Resolved
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.evaluation.knn import knn_top1
from mocosfl_jax.evaluation.linear_probe import Labelled, ProbeResult, linear_probe
from mocosfl_jax.evaluation.raw_pixels import raw_pixel_top1
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


def knn_monitor(
    config: Resolved,
    splits: Splits,
    num_classes: int,
    placement: Placement | None = None,
    before_chunk: Callable[[], None] | None = None,
) -> float:
    """Weighted kNN top-1 in percent on normalised head outputs; the bank is the train split.

    Args: before_chunk: called before each chunk of queries; may raise to end the work.
    """
    return knn_top1(
        splits.test.embedding,
        splits.test.labels,
        splits.train.embedding,
        splits.train.labels,
        num_classes=num_classes,
        k=config.knn_k,
        temperature=config.knn_temperature,
        placement=placement,
        before_chunk=before_chunk,
    )


def raw_pixel_knn(
    config: Resolved, data: EvaluationData, before_batch: Callable[[], None] | None = None
) -> float:
    """kNN top-1 in percent on the images themselves: what any encoder has to beat.

    Args: before_batch: called before each batch; may raise to end the work.
    """
    return raw_pixel_top1(
        data.test.images,
        data.test.labels,
        data.train.images,
        data.train.labels,
        data.num_classes,
        mean=config.mean,
        std=config.std,
        k=config.knn_k,
        temperature=config.knn_temperature,
        before_batch=before_batch,
    )


def probe(
    config: Resolved,
    splits: Splits,
    num_classes: int,
    before_epoch: Callable[[], None] | None = None,
) -> ProbeResult:
    """Linear probe on pooled backbone features.

    Args: before_epoch: called before each epoch; may raise to end the work.
    """
    return linear_probe(
        Labelled(splits.train.features, splits.train.labels),
        Labelled(splits.test.features, splits.test.labels),
        num_classes,
        seed=config.seed,
        learning_rate=config.probe_learning_rate,
        batch_size=config.probe_batch_size,
        epochs=config.probe_epochs,
        before_epoch=before_epoch,
    )
