"""MocoSFL's state as checkpoints of version 0.1 hold it.

That version had one class for all: the clients' common model and what each keeps were the
population, and the shared queue stood beside the server. The names of these classes' fields are in
the checkpoints and in their digests.
"""

from typing import Any

import flax.struct

from mocosfl_jax.federated.state import TrainState
from mocosfl_jax.methods.mocosfl.client import ClientState
from mocosfl_jax.methods.mocosfl.messages import ClientModel
from mocosfl_jax.methods.mocosfl.method import Kept, MocoState, Participant
from mocosfl_jax.methods.mocosfl.server import ServerState


class FormerServer(flax.struct.PyTreeNode):
    """momentum: key encoders; buffers: optimizer state."""

    params: Any
    momentum: Any
    buffers: Any
    stats: Any
    momentum_stats: Any


class FormerClients(flax.struct.PyTreeNode):
    """Of the population: params is one copy, momentum has a leading N unless aligned."""

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
    aligned = common.key_params is not None
    return FormerState(
        step=state.step,
        server=FormerServer(
            server.params, server.key_params, server.opt_state, server.stats, server.key_stats
        ),
        population=FormerClients(
            common.params,
            common.key_params if aligned else kept.key_params,
            kept.opt_state,
            kept.queue,
        ),
        cohort_ids=state.cohort_ids,
        cohort=FormerClients(
            client.params, client.key_params, client.opt_state, state.cohort.queue
        ),
        queue=state.server.queue,
    )


def from_former(former: FormerState, like: TrainState) -> TrainState:
    """The same leaves in the places of today, those of `like`."""
    aligned = like.server.client.key_params is not None
    server, clients, cohort = former.server, former.population, former.cohort
    return TrainState(
        step=former.step,
        server=MocoState(
            server=ServerState(
                server.params,
                server.momentum,
                server.buffers,
                server.stats,
                server.momentum_stats,
            ),
            client=ClientModel(clients.params, clients.momentum if aligned else None),
            queue=former.queue,
        ),
        population=Kept(
            key_params=None if aligned else clients.momentum,
            opt_state=clients.buffers,
            extra=None,
            queue=clients.queue,
        ),
        cohort_ids=former.cohort_ids,
        cohort=Participant(
            ClientState(cohort.params, cohort.momentum, cohort.buffers), cohort.queue
        ),
    )
