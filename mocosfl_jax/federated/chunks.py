"""A method's per-client part, chunk by chunk: one chunk's activations exist at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.axes import Axes


def over_chunks(
    part: Callable[..., tuple[Any, Any]], chunks: int, axes: Axes, *slots: Any
) -> tuple[Any, Any]:
    """`part(*slots)` of all slots at once, or of equal chunks of them in turn.

    Args:
      part: from slots to (sums, rows): what adds up over slots, and what each slot or row has for
        itself, leading axis in slot order.
      chunks: a divisor of the number of slots.
      slots: pytrees with a leading axis C.
    Returns: (sums, rows) of all slots.
    """
    if chunks == 1:
        return part(*slots)

    def body(total: Any, chunk: tuple[Any, ...]) -> tuple[Any, Any]:
        sums, rows = part(*chunk)
        return jax.tree.map(jnp.add, total, sums), rows

    split = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), slots)
    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(lambda chunk: part(*chunk)[0], first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, rows = jax.lax.scan(body, axes.vary(zeros), split)
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
