"""The contract between the training loop and a method.

A method is a frozen, hashable dataclass of pure functions. This is all that the loop, the mesh,
checkpoints, the log and sweeps know of it. Its state has three parts, pytrees of numeric arrays (no
typed PRNG keys):

  server      one copy; what the server holds, and what all clients have in common
  population  what each registered client keeps between rounds, leading axis N; may have no leaves
  cohort      what each participant has within a round, leading axis C (slots)

A round is `join`, steps, `leave`. Functions of one client have no client axis; the caller maps
them.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.axes import Axes
from mocosfl_jax.models.split import SplitModel, Variables

Tree = Any
"""Pytree of arrays."""


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, (3,) float32, of pixels in [0, 1]."""

    mean: jax.Array
    std: jax.Array


class Batch(NamedTuple):
    """Inputs of one step; C slots (of this device, inside `shard_map`), B images a client.

    Where some clients take larger batches (`Method.batch_factor` F), these have the first slots,
    and each has F rows of views, labels and mask, one after another: these then have rF + C - r
    rows in place of C, for r such slots (`federated.slots`).

    views: `Method.views` arrays (C, B, S, S, 3) float32, augmented and normalised; a single
      unaugmented one if the method asks for none.
    labels: (C, B) int32, -1 where there is no label; None unless the method asks for them.
    mask: (C, B) bool, False for padding.
    weight: (C,) float32, of each slot in an average; 0 for padding slots.
    sync: () bool, whether the step ends with an average of the clients.
    rate_factor: () float32, of the schedule, on all learning rates.
    progress: () float32, the share of the training's steps that are done.
    keys: (C,) PRNG keys, functions of seed, step and client.
    normalisation: what the views were normalised with.
    """

    views: tuple[jax.Array, ...]
    labels: jax.Array | None
    mask: jax.Array
    weight: jax.Array
    sync: jax.Array
    rate_factor: jax.Array
    progress: jax.Array
    keys: jax.Array
    normalisation: Normalisation

    def to_pixels(self, view: jax.Array) -> jax.Array:
        """The pixels in [0, 1] of normalised images (..., 3)."""
        per_channel = (1,) * (view.ndim - 1) + (-1,)
        mean, std = (x.reshape(per_channel) for x in self.normalisation)
        return view * std + mean


class Metric(NamedTuple):
    """A mean in two parts, () float32 of this device: summed over the mesh, divided in the log.

    A weight of 0 says that this step has no such number: it is left out of the log.
    """

    total: jax.Array
    weight: jax.Array


Metrics = dict[str, Metric]
"""By name; the same names in every step, none of them in `RESERVED`."""

RESERVED = frozenset(
    {"step", "round", "learning_rate", "images_per_second", "status", "bytes_up", "bytes_down"}
)
"""Names of what the loop itself logs of a step."""


class StepResult(NamedTuple):
    """What a step gives. messages: what travelled, for tests and replays; None unless asked for."""

    server: Tree
    cohort: Tree
    metrics: Metrics
    messages: Any = None


class Message(NamedTuple):
    """What one client and the server exchange.

    name: for people. up: from the client to the server, else down. when: `step`, `sync` (each
    average), `round` (its start) or `once`, before a client's first round. content: pytree of
    `jax.ShapeDtypeStruct`, its size on the wire. kind: `latents`, `gradients` (of latents) or
    `weights`.
    """

    name: str
    up: bool
    when: str
    content: Tree
    kind: str = "weights"


class Status(NamedTuple):
    """One of several ways in which a round can be run. words: for people, beside its name."""

    name: str
    words: str


class Work(NamedTuple):
    """What one client computes, as a function that is traced and compiled by itself.

    function: pure. arguments: of it, pytrees of `jax.ShapeDtypeStruct`. replaces: whether the first
    of its results takes the place of its first argument, the client's state.
    """

    function: Callable[..., Any]
    arguments: tuple[Tree, ...]
    replaces: bool


class Parameters(NamedTuple):
    """client: those of one client. server: the server's own; empty where it only averages."""

    client: Tree
    server: Tree


class ClientWork(NamedTuple):
    """train: a whole step. infer: its part of the trained network, in evaluation."""

    train: Work
    infer: Work


class Method(Protocol):
    """What a training method consists of.

    model: the network; parameters of another form are the method's own business, but what it
      evaluates and exports are variables of this model.
    axes: mesh axes over which slots are spread; see `Axes`.
    views: augmented views of each image that a step takes: 0, 1 or 2.
    labels: whether a step takes labels.
    chunks: equal parts of a device's slots that a step takes one after another; the loop pads the
      cohort to a multiple of devices x chunks.
    batch_factor: F, by which the batches of rich clients are larger than those of others, an
      integer; 1: all batches have one size. See `Batch`.
    chance: the metric `loss` of a network that gives all images the same embedding; None: the loss
      has no such value. The loop stops a run that stays there for a round.
    statuses: the ways in which a round can be run, the usual one first; empty if there is one only.
    """

    @property
    def model(self) -> SplitModel: ...
    @property
    def axes(self) -> Axes: ...
    @property
    def views(self) -> int: ...
    @property
    def labels(self) -> bool: ...
    @property
    def chunks(self) -> int: ...
    @property
    def batch_factor(self) -> int: ...
    @property
    def chance(self) -> float | None: ...
    @property
    def statuses(self) -> tuple[Status, ...]: ...

    def init(self, params_key: jax.Array, state_key: jax.Array) -> Tree:
        """The server before the first step. state_key: for what is random but no parameter."""

    def start(self, server: Tree, variables: Variables) -> Tree:
        """The server of `init` with these parameters in every model; all else stays as it is."""

    def own(self, server: Tree, key: jax.Array) -> Tree:
        """What one client keeps before its first round. key: the client's own."""

    def join(self, server: Tree, own: Tree) -> Tree:
        """One participant at the start of a round, from what it kept and what the server sends."""

    def carry(self, before: Tree | None, cohort: Tree) -> Tree:
        """A round's new cohort, with what its slots keep of the cohort before, if anything.

        Args: before: as the last round ended, its slots in the same places; None: there was none.
        """

    def status_of(self, server: Tree) -> jax.Array:
        """Index of a round's status, () int32, from the server at its start or within it."""

    def in_status(self, status: int) -> "Method":
        """The method whose `step` and `traffic` are those of a round with this status; all else,
        and the form of the state, is the same."""

    def step(self, server: Tree, cohort: Tree, batch: Batch, messages: bool = False) -> StepResult:
        """One step of the whole cohort, on the slots of this device.

        A padding slot has a mask and a weight of zeros and an arbitrary client's state. It changes
        nothing. messages: static; without it what travelled is no output of the program.
        """

    def leave(self, participant: Tree) -> Tree:
        """What one participant keeps when its round ends; the form of `own`."""

    def network(self, server: Tree, cohort: Tree | None) -> Variables:
        """The network that is evaluated and exported.

        cohort: without padding, in the middle of a round, where participants may differ; else None.
        """

    def parameters(self, server: Tree) -> Parameters:
        """The parameters of one client and of the server, each once, including those that `network`
        leaves out, such as a predictor.

        Without key encoders, target networks, simulated attackers and running statistics.
        """

    def sharded(self, server: Tree) -> Tree:
        """Which leaves may be sharded over the mesh axis `server`, by their last dimension.

        Returns: a tree prefix of `server` with bools as leaves; the others are replicated.
        """

    def traffic(self, images: jax.ShapeDtypeStruct) -> tuple[Message, ...]:
        """What one client exchanges in a step and at a sync. images: of a step, (B, S, S, 3)."""

    def sent(self, participant: Tree, images: jax.Array, key: jax.Array) -> jax.Array | None:
        """The latents that a participant sends of its images in a step; None: it sends none.

        An attack calls it within `shard_map`, with part of its batch on each device.

        Args: images: normalised, (B, S, S, 3) float32. key: for what is random in them.
        """

    def client_work(self, images: jax.ShapeDtypeStruct) -> ClientWork:
        """What one client computes of a step's images, (B, S, S, 3), by itself and without a mesh.

        What the server sends it within the step is an argument.
        """

    def working_set(self, images: jax.ShapeDtypeStruct, slots: int) -> Tree:
        """Shapes of what exists beside the state within a step, for the estimate of memory.

        What backward passes keep, gradients, new parameters. It may be empty.

        Args: images: as above. slots: that are computed at once.
        """


class AlikeRounds:
    """The part of a `Method` that follows where all rounds are run the same way."""

    statuses: ClassVar[tuple[Status, ...]] = ()

    def carry(self, before: Tree | None, cohort: Tree) -> Tree:
        """Slots keep nothing."""
        return cohort

    def status_of(self, server: Tree) -> jax.Array:
        return jnp.zeros((), jnp.int32)

    def in_status(self, status: int) -> Any:
        return self
