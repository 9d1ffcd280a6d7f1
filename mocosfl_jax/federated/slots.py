"""Where the clients of a cohort have their slots, and their images, on the devices.

Clients that take batches of one size are a group. A client has one block of B images a step, or
several. Slots come in equal parts, as many as there are devices and chunks on each, and a part has
slots of every group, those of the first group first: so all parts are computed alike, and only
slots that fill up a group are padding, whatever the batches are.

A group of n clients has ceil(n / parts) slots in each part. What that is more than n in all is
computed for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


class Group(NamedTuple):
    """clients: of the cohort. blocks: of B images each, that one of them takes a step."""

    clients: int
    blocks: int = 1


@dataclass(frozen=True)
class Slots:
    """The slots of a cohort, whose clients come group by group.

    groups: in the order of the cohort. parts: devices x chunks.
    """

    groups: tuple[Group, ...]
    parts: int = 1

    @property
    def number(self) -> int:
        """Slots of all parts, padding included."""
        return len(self.clients)

    @cached_property
    def clients(self) -> np.ndarray:
        """(slots,) int, which member of the cohort has each slot; -1: padding."""
        return self._places([1] * len(self.groups))

    @cached_property
    def blocks(self) -> np.ndarray:
        """(blocks of all slots,) int, the same of the cohort's blocks; those of a client are
        together."""
        return self._places([group.blocks for group in self.groups])

    @cached_property
    def of_cohort(self) -> np.ndarray:
        """(C,) int, the slot of each member of the cohort."""
        (taken,) = np.nonzero(self.clients >= 0)
        return taken[np.argsort(self.clients[taken])]

    @property
    def computed_blocks(self) -> int:
        """Blocks of all slots."""
        return self.parts * sum(-(-g.clients // self.parts) * g.blocks for g in self.groups)

    @property
    def true_blocks(self) -> int:
        """Those that are a client's; the rest is padding."""
        return sum(group.clients * group.blocks for group in self.groups)

    @property
    def in_order(self) -> bool:
        """Whether member i has slot i, so that padding comes last."""
        return bool(np.all(self.of_cohort == np.arange(len(self.of_cohort))))

    def _places(self, sizes: list[int]) -> np.ndarray:
        """What each place has, if a client of a group has so many places."""
        columns, first = [], 0
        for group, size in zip(self.groups, sizes, strict=True):
            slots = -(-group.clients // self.parts) * self.parts
            places = np.full(slots * size, -1)
            places[: group.clients * size] = first + np.arange(group.clients * size)
            columns.append(places.reshape(self.parts, -1))
            first += group.clients * size
        return np.concatenate(columns, axis=1).reshape(-1)


def spread(array: np.ndarray, places: np.ndarray, axis: int = 0, fill: Any = 0) -> np.ndarray:
    """What belongs to clients, or to blocks, on the devices; `fill` in padding.

    Args: array: in the order of the cohort on that axis. places: `Slots.clients`, or `.blocks`.
    """
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, 1)
    return np.take(np.pad(array, padding, constant_values=fill), places, axis=axis)


# ---------------------------------------------------------------------------------- in one part


def rich_slots(slots: int, blocks: int, factor: int) -> int:
    """How many of a part's slots, the first ones, have `factor` blocks; the others have one.

    Args: slots, blocks: of the part. factor: see `Method.batch_factor`.
    """
    return (blocks - slots) // (factor - 1) if factor > 1 else 0


def by_group(tree: Tree, rich: int, factor: int = 1) -> tuple[Tree, ...]:
    """A part by group: the first `rich` slots, if there are such, and the others.

    Args: tree: leaves (C, ...); with a factor leaves (blocks, B, ...) of the slots, which become
      (rich, factor * B, ...) and (others, B, ...).
    """
    if not rich:
        return (tree,)

    def joined(x: jax.Array) -> jax.Array:
        first = x[: rich * factor]
        return first if factor == 1 else first.reshape(rich, factor * x.shape[1], *x.shape[2:])

    return jax.tree.map(joined, tree), jax.tree.map(lambda x: x[rich * factor :], tree)


def in_one(groups: Sequence[Tree]) -> Tree:
    """What slots, or rows, of all groups have, one group after another."""
    if len(groups) == 1:
        return groups[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *groups)


# --------------------------------------------------------------------------------- of all parts


def rows_by_group(x_R: jax.Array, sizes: Sequence[int], parts: int) -> tuple[jax.Array, ...]:
    """Rows by group, in the order of the cohort.

    Args: x_R: rows of all slots, part by part. sizes: rows of each group, all parts together.
    """
    if len(sizes) == 1:
        return (x_R,)
    by_part = x_R.reshape(parts, -1, *x_R.shape[1:])
    ends = [sum(sizes[: i + 1]) // parts for i in range(len(sizes) - 1)]
    return tuple(x.reshape(-1, *x_R.shape[1:]) for x in jnp.split(by_part, ends, axis=1))
