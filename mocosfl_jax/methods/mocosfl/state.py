"""MocoSFL's state: of the server, of a participant, and what a client keeps between rounds."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.methods.mocosfl.client import ClientState
from mocosfl_jax.methods.mocosfl.messages import ClientModel, Params
from mocosfl_jax.methods.mocosfl.saving import SavingState, StoredLatents
from mocosfl_jax.methods.mocosfl.server import ServerState


class MocoState(flax.struct.PyTreeNode):
    """One copy of each.

    server: the server's models. client: the average of the last sync, which all clients have in
    common but for those that keep some of their own models. queue: the shared queue; None where
    clients have private ones. syncs: () int32, how many there were; None unless clients keep some
    of their own models. saving: None without loss-based saving.
    """

    server: ServerState
    client: ClientModel
    queue: Queue | None
    syncs: jax.Array | None = None
    saving: SavingState | None = None


class Participant(flax.struct.PyTreeNode):
    """One client within a round, and what the server keeps for it.

    queue: its private queue. synced: `MocoState.syncs` after its last sync, () int32; None as
    there. stored_latents: what the server has stored of the client that had this slot in the last
    round with latents; None without loss-based saving.
    """

    client: ClientState
    queue: Queue | None
    synced: jax.Array | None = None
    stored_latents: StoredLatents | None = None


class Mixed(flax.struct.PyTreeNode):
    """What one client keeps for divergence-aware averaging.

    model: after its last sync, part its own. scale: see `ClientState`. synced: see `Participant`.
    """

    model: ClientModel
    scale: jax.Array
    synced: jax.Array


class Kept(flax.struct.PyTreeNode):
    """What one client keeps between rounds, None where it does not.

    key_params: an unaligned key encoder. opt_state, extra: see `ClientState`; kept by persistent
    clients. queue: a private queue. mixed: see there.
    """

    key_params: Params | None
    opt_state: Any
    extra: Any
    queue: Queue | None
    mixed: Mixed | None = None


def latest(server: MocoState, own: Mixed) -> ClientModel:
    """A client's own model if it took part in the last sync, else the average."""
    took_part = own.synced == server.syncs
    return jax.tree.map(lambda x, mean: jnp.where(took_part, x, mean), own.model, server.client)
