"""The protocols by name, for a run's end and for later, and what they need: encoded splits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mocosfl_jax.config import Resolved
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.evaluation.knn import knn_top1
from mocosfl_jax.evaluation.linear_probe import Labelled, linear_probe
from mocosfl_jax.evaluation.semi_supervised import FRACTIONS, semi_supervised_probe
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.models.split import Encoded, SplitModel, Variables
from mocosfl_jax.privacy.release import Release
from mocosfl_jax.randomness import Stream, device_key

Results = dict[str, float]
"""Accuracies in percent by their name in `NUMBERS`."""


class LabelledImages(NamedTuple):
    """images: (n, S, S, 3) uint8. labels: (n,) int32."""

    images: np.ndarray
    labels: np.ndarray


class EvaluationData(NamedTuple):
    """What is encoded for the protocols."""

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
    drawn: Release | None = None,
) -> Splits:
    """Encodes train and test images once, unaugmented, on the devices of the placement.

    Args:
      before_batch: called before each batch; may raise to end the work.
      drawn: what is done to latents in training, if it is to be done here too, each image with a
        draw of its own.
    """
    apply_fn = model.encode if drawn is None else DrawnEncoder(model, drawn, config.seed)

    def run(split: LabelledImages, first_row: int) -> Features:
        features, embedding = encode(
            apply_fn,
            variables,
            split.images,
            config.mean,
            config.std,
            config.eval_batch_size,
            placement,
            before_batch,
            None if drawn is None else first_row,
        )
        return Features(features, embedding, split.labels)

    return Splits(run(data.train, 0), run(data.test, len(data.train.images)))


@dataclass(frozen=True)
class DrawnEncoder:
    """The network with all that is done to latents in training. seed: of the run."""

    model: SplitModel
    release: Release
    seed: int

    def __call__(
        self, variables: Variables, images_BHWC: jax.Array, positions_B: jax.Array
    ) -> Encoded:
        key = device_key(self.seed, Stream.RELEASE)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, positions_B)
        latents = self.model.latents(variables.client, images_BHWC)
        sent = jax.vmap(lambda x, key: self.release(x[None], key)[0])(latents, keys_B)
        return self.model.encode_sent(variables, sent)


# ------------------------------------------------------------------------------------ protocols


class Evaluation(NamedTuple):
    """What a protocol judges, and how.

    config: of the run: the fields of its evaluation, and the seed. splits: encoded. num_classes: of
    both. placement: of the devices that share the queries of kNN; None: the first one. check_stop:
    called between the pieces of the work; may raise to end it.
    """

    config: Resolved
    splits: Splits
    num_classes: int
    placement: Placement | None = None
    check_stop: Callable[[], None] = lambda: None

    @property
    def probed(self) -> dict[str, Any]:
        """What all probes are told: pooled features of both splits, and how to train on them."""
        config, (train, test) = self.config, self.splits
        return {
            "train": Labelled(train.features, train.labels),
            "test": Labelled(test.features, test.labels),
            "num_classes": self.num_classes,
            "seed": config.seed,
            "learning_rate": config.probe_learning_rate,
            "batch_size": config.probe_batch_size,
            "epochs": config.probe_epochs,
            "before_epoch": self.check_stop,
        }


def knn(evaluation: Evaluation) -> Results:
    """Weighted kNN on normalised head outputs; the bank is the train split."""
    config, (train, test) = evaluation.config, evaluation.splits
    top1 = knn_top1(
        test.embedding,
        test.labels,
        train.embedding,
        train.labels,
        num_classes=evaluation.num_classes,
        k=config.knn_k,
        temperature=config.knn_temperature,
        placement=evaluation.placement,
        before_chunk=evaluation.check_stop,
    )
    return {"knn_top1": top1}


def linear(evaluation: Evaluation) -> Results:
    """Linear probe; `config.probe_epochs` is at least 1."""
    found = linear_probe(**evaluation.probed)
    return {
        "linear_top1": found.top1_last,
        "linear_top1_best_test_epoch": found.top1_best_test_epoch,
    }


def semi_supervised(evaluation: Evaluation) -> Results:
    """Semi-supervised probes, one for each share of the labels; `config.probe_epochs` is at
    least 1."""
    return {
        name: semi_supervised_probe(**evaluation.probed, fraction=fraction)
        for name, fraction in FRACTIONS.items()
    }


PROTOCOLS: dict[str, Callable[[Evaluation], Results]] = {
    "knn": knn,
    "linear": linear,
    "semi_supervised": semi_supervised,
}
"""By name, in the order in which they run."""
