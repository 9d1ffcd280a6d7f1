"""How far a client's model is from the average, and what it keeps of its own for that."""

from typing import Any

import jax
import jax.numpy as jnp


def divergence(params: Any, average: Any) -> jax.Array:
    """Sum over parameter arrays of the L2 norm of their difference (MocoSFL, equation 4).

    Args: params, average: pytrees of float32 arrays, of the same form; one client's.
    Returns: () float32.
    """
    differences = jax.tree.leaves(jax.tree.map(jnp.subtract, params, average))
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(x))) for x in differences]).sum()


def own_share(tau: float, scale: jax.Array, distance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What share of its own model a client keeps (Zhuang et al. 2022, equation 4): mu = min(1,
    lambda * distance). lambda is set at the client's first sync so that mu = tau there.

    Args:
      tau: in [0, 1).
      scale: lambda, () float32; 0 before the first sync.
      distance: the client's divergence, () float32. Of a client that equals the average, lambda
        stays unset.
    Returns: (mu, lambda), () float32 each.
    """
    apart = distance > 0
    first = jnp.where(apart, tau / jnp.where(apart, distance, 1.0), 0.0)
    scale = jnp.where(scale > 0, scale, first)
    return jnp.minimum(1.0, scale * distance), scale
