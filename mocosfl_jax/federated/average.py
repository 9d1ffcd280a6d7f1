"""Averaging the client models of the cohort (FedAvg, McMahan et al. 2017)."""

from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.federated.state import ClientState


def average(tree_C: Any, weight_C: jax.Array, axes: Axes = NO_MESH) -> Any:
    """Weighted mean over the cohort, given back to every slot.

    Args:
      tree_C: leaves (C, ...), this device's slots.
      weight_C: (C,) float32, non-negative, 0 for padding; need not sum to 1.
      axes: mesh axes over which the cohort is spread.
    """
    share_C = weight_C / axes.sum(jnp.sum(weight_C))

    def mean(x: jax.Array) -> jax.Array:
        # Full float32: parameters must not lose bits to a backend's short matrix products.
        summed = jnp.tensordot(share_C, x, axes=1, precision=jax.lax.Precision.HIGHEST)
        summed = axes.vary(axes.sum(summed))
        return jnp.broadcast_to(summed, x.shape)

    return jax.tree.map(mean, tree_C)


def sync(
    cohort: ClientState, weight_C: jax.Array, align_momentum: bool, axes: Axes = NO_MESH
) -> ClientState:
    """Online models become their average; momentum models as well when aligned (MonAcoSFL).

    SGD buffers, private queues and unaligned momentum models stay as they are.
    """
    cohort = cohort.replace(params=average(cohort.params, weight_C, axes))
    if align_momentum:
        cohort = cohort.replace(momentum=average(cohort.momentum, weight_C, axes))
    return cohort
