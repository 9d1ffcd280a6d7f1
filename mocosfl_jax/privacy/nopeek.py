"""NoPeek: latents that depend less on the images (Vepakomma et al. 2020, arXiv 2008.09161)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LEAST_IMAGES = 4
"""Images of a client from which their distance correlation says something."""


@dataclass(frozen=True)
class NoPeek:
    """Adds weight * distance correlation of a client's images and latents to its loss.

    An `ExtraGradient` of MocoSFL's client, without a state. Metric: `distance_correlation`, the
    mean over clients.
    """

    weight: float

    def init(self, key: jax.Array) -> tuple[()]:
        return ()

    def working_set(self, pixels: jax.ShapeDtypeStruct, latents: jax.ShapeDtypeStruct) -> tuple[()]:
        """Nothing that counts: a few numbers for each pair of rows; see `ExtraGradient`."""
        return ()

    def __call__(
        self,
        state: tuple[()],
        pixels: jax.Array,
        latents: jax.Array,
        mask: jax.Array,
        key: jax.Array,
        progress: jax.Array,
    ) -> tuple[jax.Array, tuple[()], dict[str, tuple[jax.Array, jax.Array]]]:
        """The gradient by the latents; see `ExtraGradient`."""

        def correlation(latents: jax.Array) -> jax.Array:
            return distance_correlation(_rows(pixels), _rows(latents), mask)

        value, gradient = jax.value_and_grad(correlation)(latents)
        counts = (mask.sum() >= 2).astype(jnp.float32)
        return self.weight * gradient, state, {"distance_correlation": (counts * value, counts)}


def distance_correlation(x_BF: jax.Array, y_BG: jax.Array, mask_B: jax.Array) -> jax.Array:
    """The distance correlation of paired rows, the biased estimate, in [0, 1] (Szekely et al. 2007,
    "Measuring and testing dependence by correlation of distances", where it is R_n).

    Args:
      x_BF, y_BG: float32 rows, observed together.
      mask_B: bool, rows that count.
    Returns: () float32; 0 where all rows of one are alike, or one row counts at most. There the
      gradient is 0 too.
    """
    a_BB, b_BB = (_centred_distances(rows, mask_B) for rows in (x_BF, y_BG))
    # Means over all pairs, but for the same factor, which divides out.
    covariance, var_x, var_y = (
        (u * v).sum() for u, v in ((a_BB, b_BB), (a_BB, a_BB), (b_BB, b_BB))
    )
    vary = (var_x > 0) & (var_y > 0)
    scale = [jax.lax.rsqrt(jnp.where(vary, variance, 1.0)) for variance in (var_x, var_y)]
    return _root(jnp.where(vary, covariance * scale[0] * scale[1], 0.0))


def _centred_distances(x_BF: jax.Array, mask_B: jax.Array) -> jax.Array:
    """Euclidean distances of rows less the means of row and column, plus that of all; 0 where a
    row does not count."""
    pairs_BB = mask_B[:, None] & mask_B[None, :]
    counted = jnp.maximum(mask_B.sum(), 1).astype(jnp.float32)
    mean_1F = jnp.sum(x_BF, axis=0, keepdims=True, where=mask_B[:, None]) / counted
    x_BF = jnp.where(mask_B[:, None], x_BF - mean_1F, 0.0)  # fewer digits cancel in what follows
    squares_B = jnp.square(x_BF).sum(axis=1)
    product_BB = jnp.matmul(x_BF, x_BF.T, precision=jax.lax.Precision.HIGHEST)
    apart_BB = pairs_BB & ~jnp.eye(len(x_BF), dtype=bool)
    squared_BB = squares_B[:, None] + squares_B[None, :] - 2 * product_BB
    distance_BB = _root(jnp.where(apart_BB, squared_BB, 0.0))
    mean_B = distance_BB.sum(axis=1) / counted
    mean = mean_B.sum() / counted
    return jnp.where(pairs_BB, distance_BB - mean_B[:, None] - mean_B[None, :] + mean, 0.0)


def _root(x: jax.Array) -> jax.Array:
    """The square root; 0, with the gradient 0, of what is not above 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def _rows(x: jax.Array) -> jax.Array:
    """(B, ...) as float32 (B, F)."""
    return x.reshape(len(x), -1).astype(jnp.float32)
