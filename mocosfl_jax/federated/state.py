"""Everything that training changes, as one frozen pytree.

Leading axes: N registered clients (index = client id), C cohort slots (index = position in the
cohort). A cohort slot with id N is padding: it is gathered from nowhere and scattered to nowhere.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.models.split import Params


class ClientState(flax.struct.PyTreeNode):
    """One client in training; the cohort's has a leading C on every leaf.

    params: online model. momentum: momentum model (the key encoder). buffers: SGD buffers.
    queue: its private queue, or None where the queue is shared.
    Changed by the step.
    """

    params: Params
    momentum: Params
    buffers: optax.OptState
    queue: Queue | None


class Population(flax.struct.PyTreeNode):
    """What is kept between rounds.

    params: the online model of every client (one copy: a round ends with a sync).
    momentum: one copy where momentum models are aligned, else a leading N.
    buffers: SGD buffers, leading N; None if clients are stateless: zero at a round's start.
    queue: private queues, leading N, or None.
    Changed by `end_round`.
    """

    params: Params
    momentum: Params
    buffers: optax.OptState | None
    queue: Queue | None


class ServerState(flax.struct.PyTreeNode):
    """The server's half; no client axis. Changed by the step.

    params, momentum: online model and momentum model, head included. buffers: SGD buffers.
    stats, momentum_stats: running statistics of a BatchNorm head, else empty.
    """

    params: Params
    momentum: Params
    buffers: optax.OptState
    stats: Params
    momentum_stats: Params


class TrainState(flax.struct.PyTreeNode):
    """All of it.

    step: () int32, steps taken. cohort_ids: (C,) int32, client id of each slot. cohort: (C, ...).
    queue: the shared queue, or None where clients have private ones.
    """

    step: jax.Array
    server: ServerState
    population: Population
    cohort_ids: jax.Array
    cohort: ClientState
    queue: Queue | None

    def queue_groups(self, cohort: ClientState) -> jax.Array:
        """Negatives by group of the server rows of these clients: (1, K, D) shared, or
        (C, K / N, D) private."""
        if self.queue is not None:
            return self.queue.keys[None]
        assert cohort.queue is not None, "one of the two queues exists"
        return cohort.queue.keys


def repeat(tree: Any, times: int) -> Any:
    """Adds a leading axis on which every entry is the same."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), tree)


def create_state(
    client: Params,
    server: Params,
    stats: Params,
    queue: Queue,
    *,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    cohort_size: int,
    feature_sharing: bool,
    align_momentum: bool,
    stateless: bool = False,
) -> TrainState:
    """State before the first step: all clients alike, momentum models equal to online ones.

    Args:
      client, server, stats: as `SplitModel.init` gives them.
      queue: the shared queue, or with `feature_sharing=False` private ones with a leading N.
      optimizer: see `sgd`.
      align_momentum: momentum client models are averaged at a sync as well.
      stateless: clients keep nothing between rounds, so that nothing has a leading N; it takes a
        shared queue and aligned momentum models.
    Raises: ValueError: stateless clients with private queues or unaligned momentum models.
    """
    if stateless and not (feature_sharing and align_momentum):
        raise ValueError("stateless clients take a shared queue and aligned momentum models")
    buffers = optimizer.init(client)
    population = Population(
        params=client,
        momentum=client if align_momentum else repeat(client, num_clients),
        buffers=None if stateless else repeat(buffers, num_clients),
        queue=None if feature_sharing else queue,
    )
    ids = jnp.arange(cohort_size, dtype=jnp.int32)
    fresh = repeat(buffers, cohort_size)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        server=ServerState(server, server, optimizer.init(server), stats, stats),
        population=population,
        cohort_ids=ids,
        cohort=_gather(population, ids, fresh, align_momentum),
        queue=queue if feature_sharing else None,
    )


def _gather(
    population: Population, ids_C: jax.Array, fresh: optax.OptState, align_momentum: bool
) -> ClientState:
    """The cohort's state at a round's start; padding slots get some client's, for nothing.

    fresh: SGD buffers (C, ...) for clients that keep none.
    """

    def take(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.take(x, ids_C, axis=0, mode="clip"), tree)

    size = ids_C.shape[0]
    return ClientState(
        params=repeat(population.params, size),
        momentum=repeat(population.momentum, size) if align_momentum else take(population.momentum),
        buffers=fresh if population.buffers is None else take(population.buffers),
        queue=take(population.queue),
    )


def begin_round(state: TrainState, ids_C: jax.Array, align_momentum: bool) -> TrainState:
    """Draws the cohort's state from the population.

    Args: ids_C: (C,) int32, distinct client ids; N marks a padding slot (never the first).
    """
    fresh = jax.tree.map(jnp.zeros_like, state.cohort.buffers)
    cohort = _gather(state.population, ids_C, fresh, align_momentum)
    return state.replace(cohort_ids=ids_C, cohort=cohort)


def end_round(state: TrainState, align_momentum: bool) -> TrainState:
    """Writes the cohort back to the population; the round's last step must have synced."""
    population, cohort, ids_C = state.population, state.cohort, state.cohort_ids

    def put(rows: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, y: x.at[ids_C].set(y, mode="drop"), rows, new)

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[0], tree)

    momentum = (
        first(cohort.momentum) if align_momentum else put(population.momentum, cohort.momentum)
    )
    return state.replace(
        population=Population(
            params=first(cohort.params),
            momentum=momentum,
            buffers=None if population.buffers is None else put(population.buffers, cohort.buffers),
            queue=put(population.queue, cohort.queue),
        )
    )


def with_slots(state: TrainState, slots: int, num_clients: int) -> TrainState:
    """The same state with so many cohort slots: padding at the end is added or cut off.

    Args: slots: at least the clients of the cohort, whose slots come first.
    """
    have = state.cohort_ids.shape[0]

    def leaf(x: jax.Array) -> jax.Array:
        padding = [(0, max(0, slots - have)), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x, padding, mode="edge")[:slots]

    ids = jnp.where(jnp.arange(slots) < have, leaf(state.cohort_ids), num_clients)
    return state.replace(cohort_ids=ids, cohort=jax.tree.map(leaf, state.cohort))
