"""MocoSFL's state as checkpoints of version 0.1 hold it.

That version had one class for all methods: the clients' common model and what each keeps were the
population, and the shared queue stood beside the server. Checkpoints, and their digests, have the
names of these classes' fields.
"""

from typing import Any

import flax.struct

from mocosfl_jax.federated.state import TrainState
from mocosfl_jax.methods.mocosfl.client import ClientState
from mocosfl_jax.methods.mocosfl.messages import ClientModel
from mocosfl_jax.methods.mocosfl.server import ServerState
from mocosfl_jax.methods.mocosfl.state import Kept, MocoState, Participant


class FormerServer(flax.struct.PyTreeNode):
    """momentum: the key encoder. buffers: the optimizer state. momentum_stats: of its head."""

    params: Any
    momentum: Any
    buffers: Any
    stats: Any
    momentum_stats: Any


class FormerClients(flax.struct.PyTreeNode):
    """Of the population, params is one copy, and so is momentum where key encoders are aligned."""

    params: Any
    momentum: Any
    buffers: Any
    queue: Any


class FormerState(flax.struct.PyTreeNode):
    """The complete state."""

    step: Any
    server: FormerServer
    population: FormerClients
    cohort_ids: Any
    cohort: FormerClients
    queue: Any


def to_former(state: TrainState) -> FormerState:
    """The same leaves in their former places."""
    server, common = state.server.server, state.server.client
    kept, client = state.population, state.cohort.client
    key_params = kept.key_params if common.key_params is None else common.key_params
    return FormerState(
        step=state.step,
        server=FormerServer(
            params=server.params,
            momentum=server.key_params,
            buffers=server.opt_state,
            stats=server.stats,
            momentum_stats=server.key_stats,
        ),
        population=FormerClients(common.params, key_params, kept.opt_state, kept.queue),
        cohort_ids=state.cohort_ids,
        cohort=FormerClients(
            client.params, client.key_params, client.opt_state, state.cohort.queue
        ),
        queue=state.server.queue,
    )


def from_former(former: FormerState, like: TrainState) -> TrainState:
    """The same leaves in the places of today, those of `like`."""
    server, clients, cohort = former.server, former.population, former.cohort
    aligned = like.server.client.key_params is not None
    own_keys, common_keys = (None, clients.momentum) if aligned else (clients.momentum, None)
    client = ClientState(cohort.params, cohort.momentum, cohort.buffers)
    return TrainState(
        step=former.step,
        server=MocoState(
            server=ServerState(
                params=server.params,
                key_params=server.momentum,
                opt_state=server.buffers,
                stats=server.stats,
                key_stats=server.momentum_stats,
            ),
            client=ClientModel(clients.params, common_keys),
            queue=former.queue,
        ),
        population=Kept(own_keys, clients.buffers, extra=None, queue=clients.queue),
        cohort_ids=former.cohort_ids,
        cohort=Participant(client, cohort.queue),
    )
