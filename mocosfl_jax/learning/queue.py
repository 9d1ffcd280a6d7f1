"""The feature memory: a ring buffer of keys in the train state (MocoSFL, section 3.1)."""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from mocosfl_jax.learning.infonce import normalize


class Queue(flax.struct.PyTreeNode):
    """Keys of earlier steps, the oldest overwritten first.

    keys: (K, D) float32, unit rows. ptr: () int32 in [0, K), the row written next.
    age: (K,) int32, calls of `enqueue` since a row was written, that one included; 0 of the rows
      that a queue starts with. None: not kept.
    Private queues carry a leading client axis on all of them.
    """

    keys: jax.Array
    ptr: jax.Array
    age: jax.Array | None = None


def init_queue(key: jax.Array, length: int, width: int, ages: bool = False) -> Queue:
    """Random unit rows (length, width), pointer 0. ages: whether those of rows are kept."""
    rows = normalize(jax.random.normal(key, (length, width)))
    age = jnp.zeros(length, jnp.int32) if ages else None
    return Queue(rows, jnp.zeros((), jnp.int32), age)


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
    age = None
    if queue.age is not None:
        older = jnp.where(queue.age > 0, queue.age + 1, 0)
        age = older.at[slot_M].set(1, mode="drop")
    return Queue(keys, (queue.ptr + count_M[-1]) % length, age)
