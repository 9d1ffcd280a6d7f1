"""The data that the protocols of a run need: labelled splits, and their features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from mocosfl_jax.config import Resolved
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.models.split import Encoded, SplitModel, Variables
from mocosfl_jax.privacy.release import Release
from mocosfl_jax.randomness import Stream, device_key


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
