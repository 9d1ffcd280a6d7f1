"""Rounds that send less once the loss hardly falls; off by default."""

from dataclasses import dataclass
from typing import Annotated

from mocosfl_jax.config.ranges import AT_LEAST_0, FROM_0


@dataclass(frozen=True)
class Saving:
    """The fields `config.saving.NAME`: loss-based saving.

    A round has a status. A: a full round. B: clients send latents and get no gradient, so that
    their models stay as they are. C: nothing is sent; the server trains on the latents of the last
    round in A or B, which stay on the device and in checkpoints.
    """

    # Fall of a round's mean loss, from that of the round before, below which the next round goes
    # from A to B, from B to C, or stays in C; otherwise it is in A. 0: off, all rounds are in A.
    threshold: Annotated[float, AT_LEAST_0] = 0.0
    # Rounds at the start whose loss changes no status. The first one that can be in B is the second
    # after them.
    warmup_rounds: Annotated[int, FROM_0] = 10
