"""MocoSFL's state from round to round: before the first step, and what participants take and keep.

Functions of one client have no client axis; the rest of a round is `MocoSFL.step`.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mocosfl_jax.learning.queue import Queue, init_queue
from mocosfl_jax.methods.mocosfl import client as client_side
from mocosfl_jax.methods.mocosfl import sizes
from mocosfl_jax.methods.mocosfl.client import ClientState
from mocosfl_jax.methods.mocosfl.messages import ClientModel
from mocosfl_jax.methods.mocosfl.saving import first_state
from mocosfl_jax.methods.mocosfl.server import ServerState
from mocosfl_jax.methods.mocosfl.state import Kept, Mixed, MocoState, Participant, latest
from mocosfl_jax.models.split import Variables

if TYPE_CHECKING:
    from mocosfl_jax.methods.mocosfl.method import MocoSFL


def init(method: "MocoSFL", params_key: jax.Array, state_key: jax.Array) -> MocoState:
    client, server, stats = method.model.init(params_key)
    opt_state = method.server.optimizer.init(server)
    return MocoState(
        server=ServerState(server, server, opt_state, stats, stats),
        client=ClientModel(client, client if method.align else None),
        queue=None if method.private_queues else _new_queue(method, state_key),
        syncs=jnp.zeros((), jnp.int32) if method.client.tau else None,
        saving=first_state() if method.saving else None,
    )


def start(method: "MocoSFL", server: MocoState, variables: Variables) -> MocoState:
    """Key encoders, the clients' own among them, start as equal to online models as in `init`;
    in the public code they keep their random parameters."""
    client, params, stats = variables
    models = ServerState(params, params, server.server.opt_state, stats, stats)
    common = ClientModel(client, client if method.align else None)
    return server.replace(server=models, client=common)


def own(method: "MocoSFL", server: MocoState, key: jax.Array) -> Kept:
    extra, params = method.client.extra_gradient, server.client.params
    return Kept(
        key_params=None if method.align else params,
        opt_state=method.client.optimizer.init(params) if method.persistent else None,
        extra=None if extra is None else extra.init(jax.random.fold_in(key, 1)),
        queue=_new_queue(method, key) if method.private_queues else None,
        mixed=_mixed(method, server.client, jnp.zeros(()), jnp.zeros((), jnp.int32)),
    )


def join(method: "MocoSFL", server: MocoState, own: Kept) -> Participant:
    start, opt_state, mixed = server.client, own.opt_state, own.mixed
    if not method.persistent:
        opt_state = method.client.optimizer.init(start.params)
    scale = synced = None
    if mixed is not None:
        scale, synced = mixed.scale, mixed.synced
        start = latest(server, mixed)
    key_params = start.key_params if method.align else own.key_params
    client = ClientState(start.params, key_params, opt_state, own.extra, scale)
    return Participant(client, own.queue, synced)


def leave(method: "MocoSFL", participant: Participant) -> Kept:
    client = participant.client
    sent = client_side.upload(client, method.align)
    return Kept(
        key_params=None if method.align else client.key_params,
        opt_state=client.opt_state if method.persistent else None,
        extra=client.extra,
        queue=participant.queue,
        mixed=_mixed(method, sent, client.scale, participant.synced),
    )


def carry(method: "MocoSFL", before: Participant | None, cohort: Participant) -> Participant:
    """The latents that are stored of each slot stay, whoever has it now."""
    if method.saving is None:
        return cohort
    if before is not None:
        return cohort.replace(stored_latents=before.stored_latents)
    shapes = sizes.stored_latents(method, slots=len(jax.tree.leaves(cohort)[0]))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return cohort.replace(stored_latents=nothing)


def _mixed(method: "MocoSFL", model: ClientModel, scale: Any, synced: Any) -> Mixed | None:
    return Mixed(model, scale, synced) if method.client.tau else None


def _new_queue(method: "MocoSFL", key: jax.Array) -> Queue:
    return init_queue(key, method.queue_rows, method.model.head.width, ages=method.server.ages > 0)
