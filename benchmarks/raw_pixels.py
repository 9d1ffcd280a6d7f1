"""kNN and linear probe on raw pixels: the scale below a trained encoder.

    python -m benchmarks.raw_pixels --config configs/cifar10_cpu.py

Takes the data set, the number of neighbours and the probe's fields from the config, so that the
figures stand beside those of a run. Pixels are normalised per channel as the encoder's inputs are.
"""

import sys

import numpy as np
from absl import flags
from ml_collections import config_flags

from mocosfl_jax.build import data_options
from mocosfl_jax.config import Config, check_types
from mocosfl_jax.data.dataset import channel_stats
from mocosfl_jax.data.sources import inspect_dataset, load_dataset
from mocosfl_jax.evaluation.protocols import (
    Features,
    LabelledImages,
    Splits,
    evaluation_data,
    knn_monitor,
    probe,
)
from mocosfl_jax.resolve import resolve


def raw_splits(train: LabelledImages, test: LabelledImages) -> Splits:
    """Both splits as flat vectors of normalised pixels."""
    mean, std = channel_stats(train.images)

    def flat(split: LabelledImages) -> Features:
        pixels = ((split.images / np.float32(255) - mean) / std).astype(np.float32)
        rows = pixels.reshape(len(pixels), -1)
        return Features(features=rows, embedding=rows, labels=split.labels)

    return Splits(flat(train), flat(test))


def measure(config: Config) -> dict[str, float]:
    """Top-1 in percent of both protocols."""
    data = evaluation_data(load_dataset(config.dataset, **data_options(config)))
    if isinstance(data, str):
        raise SystemExit(f"config.dataset = {config.dataset!r}: {data}")
    splits = raw_splits(data.train, data.test)
    return {
        "knn_top1": knn_monitor(config, splits, data.num_classes),
        "linear_top1": probe(config, splits, data.num_classes).top1_last,
    }


def main() -> None:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", "configs/cifar10_cpu.py", flag_values=values)
    values(sys.argv)
    config = check_types(values.config)
    config = resolve(config, inspect_dataset(config.dataset, **data_options(config)))
    for name, value in measure(config).items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
