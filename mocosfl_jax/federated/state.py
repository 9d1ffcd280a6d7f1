"""The training state of any method, and its rounds; one frozen pytree.

Leading axes: N registered clients (index = client id), C cohort slots (index = position in the
cohort). A slot with the id `PADDING` is gathered from an arbitrary client and scattered to none.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from mocosfl_jax.federated.contract import Method, Tree
from mocosfl_jax.federated.population import gather, scatter
from mocosfl_jax.models.split import Variables

PADDING = 2**31 - 1
"""Client id of a padding slot; no client has it, nor any row that pads the population."""


class TrainState(flax.struct.PyTreeNode):
    """The complete training state; `server`, `population` and `cohort` are the method's.

    step: () int32, steps taken. server: one copy. population: (N, ...). cohort_ids: (C,) int32,
    client id of each slot. cohort: (C, ...).
    """

    step: jax.Array
    server: Tree
    population: Tree
    cohort_ids: jax.Array
    cohort: Tree


def create_state(
    method: Method,
    params_key: jax.Array,
    state_key: jax.Array,
    num_clients: int,
    slots: int,
    loaded: Variables | None = None,
) -> TrainState:
    """The state before the first step; the cohort is a placeholder until `begin_round`.

    Args:
      params_key, state_key: see `Method.init`; each client's own key is split from `state_key`.
      num_clients: N.
      slots: C.
      loaded: see `create_server`.
    """
    server = create_server(method, params_key, state_key, loaded)
    population = populate(method, server, jax.random.split(state_key, num_clients))
    state = without_cohort(server, population, slots)
    return begin_round(method, state, state.cohort_ids)


def create_server(
    method: Method,
    params_key: jax.Array,
    state_key: jax.Array,
    loaded: Variables | None = None,
) -> Tree:
    """The server's state before the first step.

    Args: loaded: of a trained network, to start from; leaves that are None start at random.
    """
    server = method.init(params_key, state_key)
    if loaded is None:
        return server
    network = jax.tree.map(
        lambda old, new: old if new is None else new,
        method.network(server, None),
        loaded,
        is_leaf=lambda x: x is None,
    )
    return method.start(server, network)


def populate(method: Method, server: Tree, keys_N: jax.Array) -> Tree:
    """What clients keep before their first round, (N, ...), from the key of each."""
    return jax.vmap(method.own, in_axes=(None, 0))(server, keys_N)


def without_cohort(server: Tree, population: Tree, slots: int) -> TrainState:
    """A state at step 0 whose cohort has ids, those of the first clients, and nothing else."""
    ids_C = jnp.arange(slots, dtype=jnp.int32)
    return TrainState(jnp.zeros((), jnp.int32), server, population, ids_C, None)


def begin_round(
    method: Method, state: TrainState, ids_C: jax.Array, take: Callable[..., Tree] = gather
) -> TrainState:
    """The participants' state from the server's and what they kept.

    Args:
      ids_C: (C,) int32, distinct client ids, then `PADDING`; never only padding.
      take: `gather`, on a mesh inside `shard_map`.
    """
    join = jax.vmap(method.join, in_axes=(None, 0), axis_size=ids_C.shape[0])
    cohort = join(state.server, take(state.population, ids_C))
    return state.replace(cohort_ids=ids_C, cohort=method.carry(state.cohort, cohort))


def end_round(method: Method, state: TrainState, put: Callable[..., Tree] = scatter) -> TrainState:
    """What the participants keep goes back to the population. put: as `take`, of `scatter`."""
    kept = jax.vmap(method.leave, axis_size=state.cohort_ids.shape[0])(state.cohort)
    return state.replace(population=put(state.population, state.cohort_ids, kept))
