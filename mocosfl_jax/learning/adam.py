"""A step of Adam (Kingma & Ba 2015, arXiv 1412.6980)."""

from typing import Any

import jax
import optax


def adam_update(
    optimizer: optax.GradientTransformation, params: Any, opt_state: optax.OptState, grads: Any
) -> tuple[Any, optax.OptState]:
    """Parameters and optimizer state after one step. Args: optimizer: `optax.adam` of any rate."""
    # Its bias correction raises a float to an int32: not allowed where promotion is strict.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state
