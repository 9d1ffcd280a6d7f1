"""What is measured of steps with a sync, beside loss and accuracy; off by default."""

from dataclasses import dataclass

MOST_AGES = 512
"""Ages of keys that are logged at most: each is a metric of its own."""


@dataclass(frozen=True)
class Measure:
    """The fields `config.measure.NAME`."""

    # Whether the mean similarity of queries and the keys in the queue is measured by the age of the
    # key in steps, as `similarity_age_1`, `similarity_age_2`, ... (paper, equation 2).
    hardness: bool = False
    # Whether the mean distance of the client models from their average, before they receive it, is
    # measured as `divergence` (paper, equation 4).
    divergence: bool = False
