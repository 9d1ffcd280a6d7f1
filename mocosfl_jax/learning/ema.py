"""Exponential moving average of parameters (He et al. 2020, equation 2)."""

from typing import TypeVar

import jax

Tree = TypeVar("Tree")


def ema_update(momentum: Tree, online: Tree, decay: float) -> Tree:
    """decay * momentum + (1 - decay) * online, leaf by leaf."""
    return jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, momentum, online)
