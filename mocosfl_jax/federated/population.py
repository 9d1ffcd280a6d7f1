"""Moves rows between the population and the cohort's slots; no device holds all of either.

On a mesh, slots are spread over all devices. A population leaf is replicated if it is small, else
sharded over N, each device with an equal block of clients, rows of no client at the end. Sharded
rows travel in a ring: each device passes its slots on, and the device that has the client of a slot
fills it, or reads it. So a device holds its own block of clients, its own slots, and those of one
neighbour at a time, leaf by leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mocosfl_jax.federated.axes import NO_MESH, Axes

Tree = Any


def gather(population: Tree, ids_C: jax.Array, sharded: Tree = False, axes: Axes = NO_MESH) -> Tree:
    """The rows of this device's slots; padding slots get the last row, which may be out of date.

    Args:
      population: leaves (N, ...), or this device's block of them where sharded.
      ids_C: (C,) int32 of this device's slots.
      sharded: whether leaves are, a tree of bools like the population or like its upper part.
      axes: mesh axes over which slots and sharded leaves are spread.
    """

    def leaf(rows_N: jax.Array, is_sharded: bool) -> jax.Array:
        if is_sharded and axes.rows:
            return _gather_ring(rows_N, ids_C, axes)
        return axes.vary(jnp.take(rows_N, ids_C, axis=0, mode="clip"))

    return jax.tree.map(leaf, population, jax.tree.broadcast(sharded, population))


def scatter(
    population: Tree, ids_C: jax.Array, rows_C: Tree, sharded: Tree = False, axes: Axes = NO_MESH
) -> Tree:
    """The population with the rows of the slots written back; padding slots are dropped.

    Args: rows_C: leaves (C, ...) of this device's slots. Others: as `gather`.
    """

    def leaf(rows_N: jax.Array, new_C: jax.Array, is_sharded: bool) -> jax.Array:
        if is_sharded and axes.rows:
            return _scatter_ring(rows_N, ids_C, new_C, axes)
        everyone, rows = axes.gather_rows(ids_C, axis=0), axes.gather_rows(new_C, axis=0)
        return rows_N.at[everyone].set(rows, mode="drop")

    return jax.tree.map(leaf, population, rows_C, jax.tree.broadcast(sharded, population))


def _gather_ring(block: jax.Array, ids_C: jax.Array, axes: Axes) -> jax.Array:
    def turn(_: jax.Array, passing: tuple[jax.Array, jax.Array]) -> Any:
        ids, rows = passing
        local, owned = _in_block(ids, block, axes)
        taken = jnp.take(block, local, axis=0, mode="clip")
        owned = owned.reshape(-1, *[1] * (block.ndim - 1))
        return axes.pass_on((ids, jnp.where(owned, taken, rows)))

    last = axes.size() * block.shape[0] - 1
    empty = jnp.zeros((ids_C.shape[0], *block.shape[1:]), block.dtype)
    passing = axes.vary((jnp.minimum(ids_C, last), empty))
    return lax.fori_loop(0, axes.size(), turn, passing)[1]


def _scatter_ring(block: jax.Array, ids_C: jax.Array, new_C: jax.Array, axes: Axes) -> jax.Array:
    def turn(_: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        block, (ids, rows) = carry
        local, owned = _in_block(ids, block, axes)
        index = jnp.where(owned, local, block.shape[0])  # out of range: dropped
        return block.at[index].set(rows, mode="drop"), axes.pass_on((ids, rows))

    passing = axes.vary((ids_C, new_C))
    return lax.fori_loop(0, axes.size(), turn, (block, passing))[0]


def _in_block(ids: jax.Array, block: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Rows of this device's block that hold these clients, and whether it holds them at all."""
    local = ids - axes.index() * block.shape[0]
    return local, (local >= 0) & (local < block.shape[0])
