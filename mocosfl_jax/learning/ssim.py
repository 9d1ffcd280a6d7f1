"""Structural similarity of images (Wang et al., "Image quality assessment", IEEE TIP 2004)."""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
"""(K1 L)^2 and (K2 L)^2 of the paper, for a dynamic range L of 1."""


def ssim(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """SSIM of each pair of images, the mean over pixels and channels; differentiable.

    Local statistics are weighted by a Gaussian window of 11 x 11 pixels, sigma 1.5, and are those
    of the population. Beyond the border all pixels are 0.

    The window is separable: along each side it is a product with a banded matrix, which is as fast
    inside a scan as outside, backwards too.

    Args: a_BHWC, b_BHWC: float32, values in [0, 1].
    Returns: (B,) float32, at most 1.
    """
    a, b = (jnp.moveaxis(x, -1, 1) for x in (a_BHWC, b_BHWC))
    smoothed = _smooth(jnp.stack([a, b, a * a, b * b, a * b]))
    mean_a, mean_b, square_a, square_b, product = smoothed
    var_a, var_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return cast(jax.Array, (luminance * structure).mean(axis=(1, 2, 3)))


def _smooth(maps: jax.Array) -> jax.Array:
    """Maps (..., H, W) under the window, as (..., W, H)."""
    height, width = maps.shape[-2:]
    # Variances are small differences of these, which an accelerator's short products would lose.
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return product(product(maps, _band(width)).swapaxes(-1, -2), _band(height))


def _band(size: int) -> np.ndarray:
    """The window along one side: (size, size) float32, symmetric, 0 beyond the border."""
    offset = np.arange(size)[:, None] - np.arange(size)
    taps = np.exp(-(np.arange(-(WINDOW // 2), WINDOW // 2 + 1) ** 2) / (2 * SIGMA**2))
    weight = np.exp(-(offset**2) / (2 * SIGMA**2)) / taps.sum()
    return np.where(np.abs(offset) <= WINDOW // 2, weight, 0.0).astype(np.float32)
