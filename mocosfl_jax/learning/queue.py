"""The feature memory: a ring buffer of keys in the train state (MocoSFL, section 3.1)."""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from mocosfl_jax.learning.infonce import normalize


class Queue(flax.struct.PyTreeNode):
    """Keys of earlier steps, the oldest overwritten first.

    keys: (K, D) float32, unit rows. ptr: () int32 in [0, K), the row written next.
    Private queues carry a leading client axis on both.
    """

    keys: jax.Array
    ptr: jax.Array


def init_queue(key: jax.Array, length: int, width: int) -> Queue:
    """Random unit rows (length, width), pointer 0."""
    return Queue(normalize(jax.random.normal(key, (length, width))), jnp.zeros((), jnp.int32))


def enqueue(queue: Queue, keys_MD: jax.Array, mask_M: jax.Array) -> Queue:
    """Writes the rows that the mask keeps at the pointer, in order, wrapping at the end.

    Args:
      queue: one queue, (K, D).
      keys_MD: unit rows; at most K of them may be kept, or rows overwrite each other.
      mask_M: bool; rows that are padding are neither written nor counted.
    Raises: AssertionError: arrays of other shapes, or a mask that is not bool.
    """
    chex.assert_rank(mask_M, 1)
    chex.assert_shape(keys_MD, (mask_M.shape[0], queue.keys.shape[1]))
    chex.assert_type(mask_M, bool)
    length = queue.keys.shape[0]
    count_M = jnp.cumsum(mask_M.astype(jnp.int32))
    slot_M = (queue.ptr + count_M - 1) % length
    slot_M = jnp.where(mask_M, slot_M, length)  # out of range: dropped
    keys = queue.keys.at[slot_M].set(keys_MD, mode="drop")
    return Queue(keys, (queue.ptr + count_M[-1]) % length)
