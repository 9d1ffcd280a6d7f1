"""The protocols that a run reports: kNN monitor and linear probe (docs/method.md)."""

from typing import NamedTuple

from mocosfl_jax.config import Config
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.evaluation.knn import knn_top1
from mocosfl_jax.evaluation.linear_probe import Labelled, ProbeResult, linear_probe
from mocosfl_jax.models.split import Encoded, SplitModel, Variables


class Splits(NamedTuple):
    """The train and test images, encoded."""

    train: Encoded
    test: Encoded


def can_evaluate(dataset: Dataset) -> str | None:
    """None, or why neither protocol is possible."""
    if dataset.test is None:
        return "there is no test split"
    if dataset.train.labels is None or dataset.test.labels is None:
        return "the images have no labels"
    return None


def encode_splits(
    config: Config, model: SplitModel, variables: Variables, dataset: Dataset
) -> Splits:
    """Encodes train and test images once, unaugmented."""

    def run(images):
        return encode(
            model.encode, variables, images, config.mean, config.std, config.eval_batch_size
        )

    return Splits(run(dataset.train.images), run(dataset.test.images))


def knn_monitor(config: Config, splits: Splits, dataset: Dataset) -> float:
    """Weighted kNN top-1 in percent on normalised head outputs; the bank is the train split."""
    return knn_top1(
        splits.test.embedding,
        dataset.test.labels,
        splits.train.embedding,
        dataset.train.labels,
        num_classes=dataset.info.num_classes,
        k=config.knn_k,
        temperature=config.knn_temperature,
    )


def probe(config: Config, splits: Splits, dataset: Dataset) -> ProbeResult:
    """Linear probe on pooled backbone features."""
    return linear_probe(
        Labelled(splits.train.features, dataset.train.labels),
        Labelled(splits.test.features, dataset.test.labels),
        dataset.info.num_classes,
        seed=config.seed,
        learning_rate=config.probe_learning_rate,
        batch_size=config.probe_batch_size,
        epochs=config.probe_epochs,
    )
