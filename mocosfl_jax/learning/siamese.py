"""Losses of two views of the same images without a queue, one number an image.

Rows of both views stand in the same order. Embeddings are normalised here.
"""

import jax
import jax.numpy as jnp

from mocosfl_jax.learning.infonce import normalize

Pair = tuple[jax.Array, jax.Array]
"""What a network makes of the two views, (B, D) float32 each."""

EXCLUDED = -1e30
"""Logit of what is no negative: finite, so that a row without any has a finite gradient."""


def nt_xent(embedded: Pair, mask_B: jax.Array, temperature: float) -> jax.Array:
    """SimCLR (Chen et al. 2020, equation 1): the other view among all embeddings of the batch.

    Args:
      embedded: gradients flow into both.
      mask_B: bool; rows that are padding are no negatives, and their own loss means nothing.
      temperature: T, divides every cosine similarity.
    Returns: (B,) float32, the mean of an image's two losses, in nats.
    """
    rows = mask_B.shape[0]
    unit_MD = normalize(jnp.concatenate(embedded))
    logits_MM = unit_MD @ unit_MD.T / temperature
    counts_M = jnp.concatenate([mask_B, mask_B])
    counts_MM = counts_M[None, :] & ~jnp.eye(2 * rows, dtype=bool)
    total_M = jax.nn.logsumexp(jnp.where(counts_MM, logits_MM, EXCLUDED), axis=1)
    positive_M = jnp.concatenate([jnp.diagonal(logits_MM, rows), jnp.diagonal(logits_MM, -rows)])
    return (total_M - positive_M).reshape(2, rows).mean(axis=0)


def byol(predicted: Pair, target: Pair) -> jax.Array:
    """BYOL (Grill et al. 2020, equation 2): squared distance of unit vectors, views added.

    Args:
      predicted: the predictor's output; gradients flow into both.
      target: embeddings of the target network; constant.
    Returns: (B,) float32, from 0 to 8.
    """
    return 4 - 2 * _cosines(predicted, target)


def simsiam(predicted: Pair, embedded: Pair) -> jax.Array:
    """SimSiam (Chen & He 2021, equation 2): the mean negative cosine of both views.

    Args:
      predicted: the predictor's output; gradients flow into both.
      embedded: the predictor's input; constant.
    Returns: (B,) float32, from -1 to 1.
    """
    return -_cosines(predicted, embedded) / 2


def _cosines(predicted: Pair, constant: Pair) -> jax.Array:
    """Cosines of each view's prediction and the other view's constant, added; (B,)."""
    first, second = jax.lax.stop_gradient(constant)

    def cosine(a_BD: jax.Array, b_BD: jax.Array) -> jax.Array:
        return jnp.sum(normalize(a_BD) * normalize(b_BD), axis=-1)

    return cosine(predicted[0], second) + cosine(predicted[1], first)
