"""SGD with momentum whose rate comes from the global step.

Only buffers are optimiser state. A step counter inside it would lag behind for clients that were
not drawn, so the rate is an argument.
"""

from typing import TypeVar

import jax
import optax

Tree = TypeVar("Tree")


def sgd(momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """PyTorch's SGD without the rate: decay joins the gradient, buffer = momentum * buffer + that.

    Weight decay acts on every parameter, biases and norms included.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum))


def sgd_update(
    transform: optax.GradientTransformation,
    params: Tree,
    buffers: optax.OptState,
    grads: Tree,
    rate: jax.Array,
) -> tuple[Tree, optax.OptState]:
    """New parameters (params - rate * direction) and new buffers."""
    direction, buffers = transform.update(grads, buffers, params)
    return jax.tree.map(lambda p, d: p - rate * d, params, direction), buffers
