"""Averaging models over the cohort (FedAvg, McMahan et al. 2017)."""

from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.axes import NO_MESH, Axes


def average(tree_C: Any, weight_C: jax.Array, axes: Axes = NO_MESH) -> Any:
    """Weighted mean over the cohort, without the leading axis; the same on every device.

    Args:
      tree_C: leaves (C, ...), this device's slots.
      weight_C: (C,) float32, non-negative, 0 for padding; need not sum to 1.
      axes: mesh axes over which the cohort is spread.
    """
    share_C = weight_C / axes.sum(jnp.sum(weight_C))

    def mean(x: jax.Array) -> jax.Array:
        # Full float32: parameters must not lose bits to a backend's short matrix products.
        return axes.sum(jnp.tensordot(share_C, x, axes=1, precision=jax.lax.Precision.HIGHEST))

    return jax.tree.map(mean, tree_C)


def hand_out(tree: Any, like_C: Any, axes: Axes = NO_MESH) -> Any:
    """A common model for each slot: leaves (C, ...) as in `like_C`, device-varying."""
    return jax.tree.map(lambda x, y: jnp.broadcast_to(axes.vary(x), y.shape), tree, like_C)
