"""The feature memory, against a Python list written row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.learning.queue import Queue, enqueue, init_queue

LENGTH, WIDTH = 7, 3


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, WIDTH)).astype(np.float32)


def write_one_by_one(keys: np.ndarray, ptr: int, new: np.ndarray, mask: list[bool]):
    keys = keys.copy()
    for row, kept in zip(new, mask, strict=True):
        if kept:
            keys[ptr] = row
            ptr = (ptr + 1) % len(keys)
    return keys, ptr


def assert_same(queue: Queue, keys: np.ndarray, ptr) -> None:
    np.testing.assert_array_equal(queue.keys, keys)
    np.testing.assert_array_equal(queue.ptr, ptr)


@pytest.mark.parametrize("ptr", [0, 4, 6])
@pytest.mark.parametrize(
    "mask",
    [
        [True],
        [True, True, True, True],
        [False, True, True, False, True],
        [True, False, False, True, True, False, True, True, True, True],  # exactly the length
        [False, False],
    ],
)
def test_enqueue_writes_in_order_and_wraps(ptr, mask):
    keys, new = rows(0, LENGTH), rows(1, len(mask))
    queue = enqueue(Queue(jnp.asarray(keys), jnp.int32(ptr)), jnp.asarray(new), jnp.asarray(mask))
    assert_same(queue, *write_one_by_one(keys, ptr, new, mask))
    assert queue.keys.dtype == jnp.float32 and queue.ptr.dtype == jnp.int32


def test_many_steps_keep_the_newest_rows():
    queue = Queue(jnp.asarray(rows(0, LENGTH)), jnp.int32(0))
    keys, ptr = rows(0, LENGTH), 0
    step = jax.jit(enqueue)
    for t in range(6):
        new, mask = rows(10 + t, 4), [True, t % 2 == 0, True, True]
        queue = step(queue, jnp.asarray(new), jnp.asarray(mask))
        keys, ptr = write_one_by_one(keys, ptr, new, mask)
        assert_same(queue, keys, ptr)
    assert ptr == (3 * 4 + 3 * 3) % LENGTH


def test_private_queues_advance_apart():
    clients, batch = 3, 4
    keys, ptrs, new = rows(0, clients, LENGTH), [5, 0, 2], rows(1, clients, batch)
    masks = [[True] * 4, [True, False, False, True], [False] * 4]
    queues = Queue(jnp.asarray(keys), jnp.asarray(ptrs, jnp.int32))
    queues = jax.vmap(enqueue)(queues, jnp.asarray(new), jnp.asarray(masks))
    for i in range(clients):
        expected = write_one_by_one(keys[i], ptrs[i], new[i], masks[i])
        assert_same(jax.tree.map(lambda x, i=i: x[i], queues), *expected)


def test_a_new_queue_holds_distinct_unit_rows():
    queue = init_queue(jax.random.key(3), LENGTH, WIDTH)
    assert queue.keys.shape == (LENGTH, WIDTH) and queue.ptr == 0
    np.testing.assert_allclose(np.linalg.norm(queue.keys, axis=-1), 1, rtol=1e-6)
    assert len(np.unique(np.asarray(queue.keys), axis=0)) == LENGTH
    other = init_queue(jax.random.key(4), LENGTH, WIDTH)
    assert np.abs(queue.keys - other.keys).max() > 0.1
