"""What a client learns from its own images; a table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import optax

from mocosfl_jax.learning.infonce import infonce, normalize
from mocosfl_jax.learning.siamese import byol, nt_xent, simsiam


class Outputs(NamedTuple):
    """What the networks of one client make of the B images of a step.

    online: embeddings (B, D) of each view, before normalisation. predicted: those after the
      predictor. target: those of the key encoder or target network; constant. The latter two are
      empty without such a network.
    queue: (K, D) unit rows; None without a queue.
    labels: (B,) int32; None unless the objective takes them.
    mask: (B,) bool, False for padding.
    """

    online: tuple[jax.Array, ...]
    predicted: tuple[jax.Array, ...]
    target: tuple[jax.Array, ...]
    queue: jax.Array | None
    labels: jax.Array | None
    mask: jax.Array


@dataclass(frozen=True)
class Objective:
    """A row of the table.

    rows: the loss of each image, (B,) float32, from outputs and temperature; what it says of
      padding does not count.
    views: of each image that are taken. labels: whether it takes labels.
    predictor: whether a predictor follows the head.
    queue: whether the client has a queue of keys, which it keeps. A key encoder makes them: it
      starts each round as equal to the online network and moves towards it before each step.
    target: whether the client has a target network, which moves towards the online network after
      each step and is kept.
    temperature: the default; None: there is none.
    alike: loss of a network that gives all images the same embedding, from B and the rows of the
      queue; None: it has no such value, or one near which training ends.
    """

    rows: Callable[[Outputs, float], jax.Array]
    views: int = 2
    labels: bool = False
    predictor: bool = False
    queue: bool = False
    target: bool = False
    temperature: float | None = None
    alike: Callable[[int, int], float] | None = None

    @property
    def reads(self) -> frozenset[str]:
        """The fields of a config that only some objectives read."""
        read = {
            "temperature": self.temperature is not None,
            "ema": self.queue or self.target,
            "queue_length": self.queue,
        }
        return frozenset(name for name, reads in read.items() if reads)


def _supervised(outputs: Outputs, temperature: float) -> jax.Array:
    """Cross-entropy of the labels; the embedding holds one score a class."""
    (scores,), labels = outputs.online, outputs.labels
    assert labels is not None, "they were asked for"
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def _simclr(outputs: Outputs, temperature: float) -> jax.Array:
    first, second = outputs.online
    return nt_xent((first, second), outputs.mask, temperature)


def _simsiam(outputs: Outputs, temperature: float) -> jax.Array:
    (first, second), (p1, p2) = outputs.online, outputs.predicted
    return simsiam((p1, p2), (first, second))


def _moco(outputs: Outputs, temperature: float) -> jax.Array:
    """InfoNCE of either view against the other one's key, added as the public MocoSFL code does."""
    queries, keys = (tuple(map(normalize, x)) for x in (outputs.online, outputs.target))
    assert outputs.queue is not None, "the objective has one"
    first = infonce(queries[0], keys[1], outputs.queue, temperature).loss
    return first + infonce(queries[1], keys[0], outputs.queue, temperature).loss


def _byol(outputs: Outputs, temperature: float) -> jax.Array:
    (p1, p2), (first, second) = outputs.predicted, outputs.target
    return byol((p1, p2), (first, second))


OBJECTIVES = {
    "supervised": Objective(_supervised, views=1, labels=True),
    "simclr": Objective(
        _simclr, temperature=0.07, alike=lambda batch, queue: math.log(2 * batch - 1)
    ),
    "simsiam": Objective(_simsiam, predictor=True),
    "moco": Objective(
        _moco, queue=True, temperature=0.1, alike=lambda batch, queue: 2 * math.log(queue + 1)
    ),
    "byol": Objective(_byol, predictor=True, target=True),
}
