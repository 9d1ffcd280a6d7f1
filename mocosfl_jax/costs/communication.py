"""Bytes that a client sends and receives in a run."""

from collections.abc import Iterable
from dataclasses import dataclass

import jax

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.rich import draw_of
from mocosfl_jax.data.partition import ClientImages
from mocosfl_jax.federated.contract import Method
from mocosfl_jax.models.split import bytes_of

KINDS = ("latents", "gradients", "weights")


@dataclass(frozen=True)
class Participation:
    """How often a client does what, in the whole run and on average over clients.

    rounds: that it takes part in. steps, syncs: within them.
    """

    rounds: float
    steps: float
    syncs: float

    def times(self, when: str) -> float:
        """Args: when: `Message.when`."""
        times = {"step": self.steps, "sync": self.syncs, "round": self.rounds, "once": 1.0}
        return times[when]


@dataclass(frozen=True)
class Sent:
    """A message. size: bytes. times: in the run, on average. The rest: see `Message`."""

    name: str
    kind: str
    up: bool
    when: str
    size: int
    times: float

    @property
    def total(self) -> float:
        """Bytes in the run."""
        return self.size * self.times


def holders_of(config: Resolved, partition: ClientImages, rich: bool) -> int:
    """Clients that have images, of the rich ones or of the others.

    Args: config: of the partition; where all clients are alike, none is rich.
    """
    first = draw_of(config).rich_ids
    sizes = partition.sizes[:first] if rich else partition.sizes[first:]
    return int((sizes > 0).sum())


def participation(config: Resolved, holders: int, rich: bool = False) -> Participation:
    """Args: holders: clients of the kind that have images. rich: whether they are the rich ones."""
    draw = draw_of(config)
    drawn = draw.rich if rich else draw.clients - draw.rich
    rounds = config.rounds * drawn / holders
    return Participation(rounds, rounds * config.steps_per_round, rounds * sum(config.sync_steps))


def messages_of(
    method: Method, images: jax.ShapeDtypeStruct, often: Participation
) -> tuple[Sent, ...]:
    """Args: images: of a step of one client, (B, S, S, 3)."""
    return tuple(
        Sent(m.name, m.kind, m.up, m.when, bytes_of(m.content), often.times(m.when))
        for m in method.traffic(images)
    )


def total(messages: Iterable[Sent], kind: str, up: bool) -> float:
    """Bytes of one kind in one direction, in the run."""
    return sum(m.total for m in messages if (m.kind, m.up) == (kind, up))
