"""What noise on released latents guarantees an image: epsilon at delta (Dwork & Roth 2014).

Neighbours are data sets that differ in one image, which is replaced. A latent has an L2 norm of at
most S and gets Gaussian noise of deviation z S, so a release has the sensitivity 2 S, a noise
multiplier of z / 2. The server sees which rows are whose: nothing is gained by sampling.
"""

import math

import numpy as np


def epsilon_of(multiplier: float, releases: int, delta: float) -> float:
    """Epsilon of an image that is released so many times, each time with fresh noise.

    That many Gaussian mechanisms, composed, are one whose noise is the square root of their number
    times smaller, so the analytic Gaussian mechanism (Balle & Wang 2018, arXiv 1805.06530) gives
    the epsilon of `SelfComposedDpEvent(GaussianDpEvent(multiplier / 2), releases)` without the
    error of a discretised privacy loss.

    Args:
      multiplier: z, standard deviation of the noise over the largest norm, above 0.
      releases: T, at least 1.
      delta: in (0, 1).
    """
    from dp_accounting import get_epsilon_gaussian  # takes a second to import

    with np.errstate(divide="ignore"):  # of a loss that is 0
        return float(get_epsilon_gaussian(multiplier / 2 / math.sqrt(releases), delta))
