"""SGD with momentum whose rate comes from the global step.

A step counter inside the optimizer state would lag behind for clients that were not drawn, so the
rate is an argument of the update, and the state holds momentum alone.
"""

from typing import TypeVar

import jax
import optax

Tree = TypeVar("Tree")


def sgd(momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """PyTorch's SGD without the rate: the trace is momentum * trace + gradient + decay * parameter.

    Weight decay acts on every parameter, biases and norms included.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum))


def sgd_update(
    optimizer: optax.GradientTransformation,
    params: Tree,
    opt_state: optax.OptState,
    grads: Tree,
    rate: jax.Array,
) -> tuple[Tree, optax.OptState]:
    """New parameters (params - rate * direction) and the new optimizer state."""
    direction, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, d: p - rate * d, params, direction), opt_state
