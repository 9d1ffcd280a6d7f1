"""A base class for methods whose clients train and average the whole network."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.federated.contract import (
    AlikeRounds,
    Batch,
    ClientWork,
    Message,
    Method,
    Normalisation,
    Parameters,
    Tree,
    Work,
)
from mocosfl_jax.models.split import SplitModel, Variables


@dataclass(frozen=True, kw_only=True)
class WholeNetwork(AlikeRounds):
    """The part of a `Method` that follows when clients train the whole network and average it.

    The server holds the network of the last sync, as `Variables`, and nothing else. `own`, `join`,
    `step` and `leave` remain to be written; the answers below may be overridden.
    """

    model: SplitModel
    axes: Axes = NO_MESH

    views: ClassVar[int] = 2
    labels: ClassVar[bool] = False
    chunks: ClassVar[int] = 1
    batch_factor: ClassVar[int] = 1
    chance: ClassVar[float | None] = None

    def init(self, params_key: jax.Array, state_key: jax.Array) -> Any:
        return self.model.init(params_key)

    def start(self, server: Any, variables: Variables) -> Any:
        return variables

    def network(self, server: Any, cohort: Tree | None) -> Variables:
        """That of the last sync, also in the middle of a round."""
        return server

    def parameters(self, server: Any) -> Parameters:
        """Clients have the whole network."""
        client, params, _ = cast(Method, self).network(server, None)
        return Parameters((client, params), ())

    def sharded(self, server: Any) -> Tree:
        """Nothing: every participant has the whole network anyway."""
        return False

    def traffic(self, images: jax.ShapeDtypeStruct) -> tuple[Message, ...]:
        network = self.model.shapes()
        return (
            Message("network", True, "sync", network),
            Message("average of networks", False, "sync", network),
        )

    def sent(self, participant: Tree, images: jax.Array, key: jax.Array) -> None:
        """Images are never sent, in whatever form."""

    def client_work(self, images: jax.ShapeDtypeStruct) -> ClientWork:
        """`step` of a cohort of one, without a sync, and `encode` of the whole network.

        The server's state is taken to matter at syncs alone: no client holds it.
        """
        step = cast(Method, self).step
        server, participant = jax.eval_shape(self._first_participant, jax.random.key(0))
        cohort = _with_axis(participant, 1)

        def one_step(cohort: Tree, views: tuple[jax.Array, ...], labels: jax.Array | None) -> Any:
            unused = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), server)
            batch = Batch(
                views=views,
                labels=labels,
                mask=jnp.ones((1, images.shape[0]), bool),
                weight=jnp.ones(1),
                sync=jnp.bool_(False),
                rate_factor=jnp.float32(1),
                progress=jnp.float32(0),
                keys=jax.random.split(jax.random.key(0), 1),
                normalisation=Normalisation(jnp.full(3, 0.5), jnp.full(3, 0.25)),
            )
            result = step(unused, cohort, batch)
            return result.cohort, result.metrics

        labels = jax.ShapeDtypeStruct((1, images.shape[0]), jnp.int32) if self.labels else None
        views = (_with_axis(images, 1),) * max(1, self.views)
        return ClientWork(
            train=Work(one_step, (cohort, views, labels), replaces=True),
            infer=Work(self.model.encode, (self.model.shapes(), images), replaces=False),
        )

    def working_set(self, images: jax.ShapeDtypeStruct, slots: int) -> Tree:
        """What a backward pass through the views of each slot's images keeps, and two networks of
        each slot: the gradient and the new network."""

        def backward(network: Variables, images: jax.Array) -> Any:
            return jax.vjp(lambda network: self.model.encode(network, images), network)[1]

        network = self.model.shapes()
        rows = max(1, self.views) * images.shape[0]
        views = jax.ShapeDtypeStruct((rows, *images.shape[1:]), images.dtype)
        kept = jax.eval_shape(backward, network, views)
        return _with_axis((kept, network, network), slots)

    def _first_participant(self, key: jax.Array) -> tuple[Any, Tree]:
        """The first server and a participant of the first round."""
        method = cast(Method, self)
        server = self.init(key, key)
        return server, method.join(server, method.own(server, key))


def _with_axis(tree: Tree, size: int) -> Tree:
    """Shapes with a leading axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), tree)
