"""kNN and linear probe on raw pixels: the scale below a trained encoder.

    python -m benchmarks.raw_pixels --config configs/cifar10_cpu.py

Takes the data set, the number of neighbours and the probe's fields from the config, so that the
figures stand beside those of a run. Pixels are normalised per channel as the encoder's inputs are,
and images reduced to at most 32x32.
"""

import sys

from absl import flags
from ml_collections import config_flags

from mocosfl_jax.config import Resolved, check_types
from mocosfl_jax.config.data import data_options
from mocosfl_jax.config.resolve import resolve
from mocosfl_jax.data.dataset import channel_stats
from mocosfl_jax.data.sources import inspect_dataset, load_dataset
from mocosfl_jax.evaluation.linear_probe import Labelled, linear_probe
from mocosfl_jax.evaluation.protocols import EvaluationData, LabelledImages, evaluation_data
from mocosfl_jax.evaluation.raw_pixels import raw_pixel_features, raw_pixel_top1


def measure(config: Resolved, data: EvaluationData) -> dict[str, float]:
    """Top-1 in percent of both protocols."""
    mean, std = (tuple(map(float, values)) for values in channel_stats(data.train.images))

    def flat(split: LabelledImages) -> Labelled:
        rows = raw_pixel_features(split.images, mean, std, config.eval_batch_size)
        return Labelled(rows, split.labels)

    knn_top1 = raw_pixel_top1(
        *data.test,
        *data.train,
        data.num_classes,
        mean=mean,
        std=std,
        k=config.knn_k,
        temperature=config.knn_temperature,
        batch_size=config.eval_batch_size,
    )
    result = linear_probe(
        flat(data.train),
        flat(data.test),
        data.num_classes,
        seed=config.seed,
        learning_rate=config.probe_learning_rate,
        batch_size=config.probe_batch_size,
        epochs=config.probe_epochs,
    )
    return {"knn_top1": knn_top1, "linear_top1": result.top1_last}


def main() -> None:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", "configs/cifar10_cpu.py", flag_values=values)
    values(sys.argv)
    config = check_types(values.config)
    config = resolve(config, inspect_dataset(config.dataset, **data_options(config)))
    data = evaluation_data(load_dataset(config.dataset, **data_options(config)))
    if isinstance(data, str):
        raise SystemExit(f"config.dataset = {config.dataset!r}: {data}")
    for name, value in measure(config, data).items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
