"""InfoNCE against a queue of negatives (van den Oord et al. 2018; MocoSFL, section 2)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class RowLoss(NamedTuple):
    """What one row of queries gives; both (M,).

    loss: cross-entropy in nats, float32.
    correct: whether the positive has the largest logit, bool.
    """

    loss: jax.Array
    correct: jax.Array


def normalize(x_MD: jax.Array) -> jax.Array:
    """Rows divided by their L2 norm (at least 1e-12)."""
    squared = jnp.sum(jnp.square(x_MD), axis=-1, keepdims=True)
    return x_MD * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def infonce(
    query_MD: jax.Array, key_MD: jax.Array, queue_KD: jax.Array, temperature: float
) -> RowLoss:
    """-log of the softmax probability of a query's own key among it and the whole queue.

    Args:
      query_MD: unit rows; gradients flow into these.
      key_MD: positive of each query, unit rows; constant.
      queue_KD: negatives, unit rows; constant.
      temperature: T, divides every cosine similarity.
    Raises: AssertionError: arrays of other ranks, or of widths that differ.
    """
    chex.assert_rank([query_MD, key_MD, queue_KD], 2)
    chex.assert_equal_shape([query_MD, key_MD])
    chex.assert_axis_dimension(queue_KD, 1, query_MD.shape[1])
    key_MD, queue_KD = jax.lax.stop_gradient((key_MD, queue_KD))
    positive_M = jnp.sum(query_MD * key_MD, axis=-1) / temperature
    negative_MK = query_MD @ queue_KD.T / temperature
    largest_M = jnp.maximum(positive_M, negative_MK.max(axis=-1))
    negatives_M = jax.nn.logsumexp(negative_MK, axis=-1)
    return RowLoss(
        loss=jnp.logaddexp(positive_M, negatives_M) - positive_M,
        correct=positive_M >= largest_M,
    )
