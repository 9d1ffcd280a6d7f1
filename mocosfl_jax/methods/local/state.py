"""What server and clients hold in local training."""

from typing import Any, NamedTuple

import flax.struct
import jax
import optax

from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.models.split import Params

NETWORK = ("client", "server")
"""The parts of a model's parameters that are the network; the rest is the predictor."""


class Model(flax.struct.PyTreeNode):
    """What is trained and averaged.

    params: by part, `client` and `server` of the network (see `SplitModel`), and `predictor` where
      the objective has one.
    stats: running statistics of BatchNorm, of the `head` and of the `predictor`; empty without it.
    """

    params: dict[str, Params]
    stats: dict[str, Params]

    @property
    def network(self) -> dict[str, Params]:
        """The parameters without the predictor: what key encoders and target networks have."""
        return {part: self.params[part] for part in NETWORK}


class Record(NamedTuple):
    """What a client remembers of its last round, () each.

    round: int32, its index, `NEVER` before the first one. divergence: float32, how far the client
    moved in it. scale: float32, lambda of FedEMA, 0 before the first round.
    """

    round: jax.Array
    divergence: jax.Array
    scale: jax.Array


NEVER = -1


class Server(flax.struct.PyTreeNode):
    """model: the average of the last round. round: () int32, index of the round under way."""

    model: Model
    round: jax.Array


class Participant(flax.struct.PyTreeNode):
    """One client within a round.

    target: parameters of its key encoder or target network. queue: of its own keys. start:
    convolutions of its model at the start of the round, where the merge rule measures how far it
    moved. target, queue, record and start are None where they are not needed.
    """

    model: Model
    opt_state: optax.OptState
    target: Params | None
    queue: Queue | None
    record: Record | None
    start: Any


class Kept(flax.struct.PyTreeNode):
    """What one client keeps between rounds, None where it does not: the parts of its model that its
    merge rule mixes in, its target network, its queue, and what it remembers of its last round."""

    model: Any
    target: Params | None
    queue: Queue | None
    record: Record | None
