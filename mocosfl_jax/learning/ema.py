"""Exponential moving average of parameters (He et al. 2020, equation 2)."""

from typing import TypeVar

import jax

Tree = TypeVar("Tree")


def ema_update(average: Tree, params: Tree, decay: float) -> Tree:
    """decay * average + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
