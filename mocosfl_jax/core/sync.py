"""Averaging the client models of the cohort (FedAvg, McMahan et al. 2017)."""

from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.core.state import ClientState


def average(tree_C: Any, weight_C: jax.Array, axis_name: str | None = None) -> Any:
    """Weighted mean over the cohort, given back to every slot.

    Args:
      tree_C: leaves (C, ...), this device's slots.
      weight_C: (C,) float32, non-negative, 0 for padding; need not sum to 1.
      axis_name: mesh axis over which the cohort is spread, or None.
    """
    total = jnp.sum(weight_C)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    share_C = weight_C / total

    def mean(x: jax.Array) -> jax.Array:
        summed = jnp.tensordot(share_C, x, axes=1)
        if axis_name is not None:
            summed = jax.lax.pcast(jax.lax.psum(summed, axis_name), axis_name, to="varying")
        return jnp.broadcast_to(summed, x.shape)

    return jax.tree.map(mean, tree_C)


def sync(
    cohort: ClientState, weight_C: jax.Array, align_momentum: bool, axis_name: str | None = None
) -> ClientState:
    """Online models become their average; momentum models as well when aligned (MonAcoSFL).

    SGD buffers, private queues and unaligned momentum models stay as they are.
    """
    cohort = cohort.replace(params=average(cohort.params, weight_C, axis_name))
    if align_momentum:
        cohort = cohort.replace(momentum=average(cohort.momentum, weight_C, axis_name))
    return cohort
