"""A base class for methods whose clients train and average the whole network."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.federated.contract import Message, Tree
from mocosfl_jax.models.split import SplitModel, Variables


@dataclass(frozen=True, kw_only=True)
class WholeNetwork:
    """The part of a `Method` that follows when clients train the whole network and average it.

    The server holds the network of the last sync, as `Variables`, and nothing else. `own`, `join`,
    `step` and `leave` remain to be written; the answers below may be overridden.
    """

    model: SplitModel
    axes: Axes = NO_MESH

    views: ClassVar[int] = 2
    labels: ClassVar[bool] = False
    chunks: ClassVar[int] = 1
    chance: ClassVar[float | None] = None

    def init(self, params_key: jax.Array, state_key: jax.Array) -> Any:
        return self.model.init(params_key)

    def start(self, server: Any, variables: Variables) -> Any:
        return variables

    def network(self, server: Any, cohort: Tree | None) -> Variables:
        """That of the last sync, also in the middle of a round."""
        return server

    def sharded(self, server: Any) -> Tree:
        """Nothing: every participant has the whole network anyway."""
        return False

    def traffic(self, images: jax.ShapeDtypeStruct) -> tuple[Message, ...]:
        network = self._shapes()
        return (
            Message("network", True, "sync", network),
            Message("average of networks", False, "sync", network),
        )

    def sent(self, participant: Tree, images: jax.Array, key: jax.Array) -> None:
        """Images are never sent, in whatever form."""

    def working_set(self, images: jax.ShapeDtypeStruct, slots: int) -> Tree:
        """What a backward pass through the views of each slot's images keeps, and two networks of
        each slot: the gradient and the new network."""

        def backward(network: Variables, images: jax.Array) -> Any:
            return jax.vjp(lambda network: self.model.encode(network, images), network)[1]

        network = self._shapes()
        rows = max(1, self.views) * images.shape[0]
        views = jax.ShapeDtypeStruct((rows, *images.shape[1:]), images.dtype)
        kept = jax.eval_shape(backward, network, views)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype), (kept, network, network)
        )

    def _shapes(self) -> Variables:
        return jax.eval_shape(self.model.init, jax.random.key(0))
