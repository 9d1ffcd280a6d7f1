"""Images of a second data set beside the train split of the first."""

import dataclasses

from mocosfl_jax.data.dataset import Dataset, Prepared, Split
from mocosfl_jax.randomness import Stream, host_rng


def with_mixture(prepared: Prepared, second: Prepared, fraction: float, seed: int) -> Prepared:
    """The data set with training images of another one in `Dataset.mixed`.

    Args:
        prepared: the first data set; labels, test images and mean and std are its.
        second: of the same image size.
        fraction: of its training images, in (0, 1]: rounded, at least one, drawn at random.
        seed: of the run.
    """
    number = max(1, round(fraction * second.info.num_train))
    info = dataclasses.replace(
        prepared.info,
        num_mixed=number,
        fingerprint={**prepared.info.fingerprint, "mixed": second.info.fingerprint},
    )

    def load() -> Dataset:
        images = second.load().train.images
        drawn = host_rng(seed, Stream.MIXTURE).choice(len(images), number, replace=False)
        mixed = Split(images[drawn], None)
        return dataclasses.replace(prepared.load(), info=info, mixed=mixed)

    return prepared._replace(info=info, load=load)
