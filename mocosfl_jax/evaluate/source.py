"""The data that a network is evaluated on: those of its run, or another data set."""

import re
from typing import Any, NamedTuple

from mocosfl_jax.config import Config
from mocosfl_jax.data.dataset import Prepared
from mocosfl_jax.data.sources import prepare_dataset
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluate.options import Options
from mocosfl_jax.evaluation.protocols import EvaluationData, evaluation_data
from mocosfl_jax.run.checkpoint import data_digest
from mocosfl_jax.run.workdir import Stored, prepare_again

_FLAGS = ("dataset", "data_dir", "train_split", "test_split", "holdout_fraction")


class Source(NamedTuple):
    """prepared: the data set. flag: field or flag that names it. transfer: what numbers on it are
    called; None: it is the run's own."""

    prepared: Prepared
    flag: str
    transfer: str | None

    @property
    def digest(self) -> str:
        """Of the images, as far as can be told without decoding them, and of how they are split."""
        info = self.prepared.info
        return data_digest({**info.fingerprint, "splits": [info.num_train, info.num_test]})

    def load(self) -> EvaluationData:
        """Raises: InputError: images that cannot be decoded, without labels, or no test images."""
        data = evaluation_data(self.prepared.load())
        if isinstance(data, str):
            needed = "training and test images with labels are needed"
            raise InputError(self.flag, self.prepared.info.name, f"{data}: {needed}")
        return data

    def named(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Numbers by their names in the results, beside what they were measured on.

        Args: numbers: by their names in `NUMBERS`.
        """
        info = self.prepared.info
        numbers = {"test_images": info.num_test, **numbers}
        if self.transfer is None:
            return numbers
        numbers = {"dataset": info.name, "data": self.digest, **numbers}
        return {f"transfer/{self.transfer}/{name}": value for name, value in numbers.items()}


def find_source(options: Options, stored: Stored) -> Source:
    """Checks what can be checked without decoding an image.

    Args: stored: of the run. Another data set is resized to its image size.
    Raises: InputError: data that cannot be read, or data of the run that have changed.
    """
    if options.dataset is None:
        return Source(prepare_again(stored, options.data_dir), "config.dataset", None)
    prepared = _prepare(options, options.dataset, stored.config)
    return Source(prepared, "--dataset", options.transfer)


def _prepare(options: Options, dataset: str, config: Config) -> Prepared:
    """Raises: InputError: as `prepare_dataset`, under the names of the flags."""
    try:
        return prepare_dataset(
            dataset,
            data_dir=options.data_dir or config.data_dir,
            train_split=options.train_split,
            test_split=options.test_split,
            image_size=config.image_size,
            holdout_fraction=options.holdout_fraction,
            seed=config.seed,
        )
    except InputError as error:
        error.args = (re.sub(rf"\bconfig\.({'|'.join(_FLAGS)})\b", r"--\1", str(error)),)
        raise
