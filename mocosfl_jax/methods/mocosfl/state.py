"""MocoSFL's state: of the server, of a participant, and what a client keeps between rounds."""

from typing import Any

import flax.struct
import jax

from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.methods.mocosfl.client import ClientState
from mocosfl_jax.methods.mocosfl.messages import ClientModel, Params
from mocosfl_jax.methods.mocosfl.server import ServerState


class MocoState(flax.struct.PyTreeNode):
    """One copy of each.

    server: the server's models. client: the average of the last sync, which all clients have in
    common but for those that keep some of their own models. queue: the shared queue; None where
    clients have private ones. syncs: () int32, how many there were; None unless clients keep some
    of their own models.
    """

    server: ServerState
    client: ClientModel
    queue: Queue | None
    syncs: jax.Array | None = None


class Participant(flax.struct.PyTreeNode):
    """One client within a round, and what the server keeps for it.

    queue: its private queue. synced: `MocoState.syncs` after its last sync, () int32; None as
    there.
    """

    client: ClientState
    queue: Queue | None
    synced: jax.Array | None = None


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
