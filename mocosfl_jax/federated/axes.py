"""What devices exchange, inside `shard_map`. Without a mesh nothing is exchanged."""

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax


@dataclass(frozen=True)
class Axes:
    """Names of mesh axes.

    rows: axes over which cohort slots, and with them server rows, are spread, the major one first;
      empty without a mesh.
    server: the axis of `rows` over which the last dimension of server parameters is sharded as
      well, or None. A leaf is sharded if it varies over that axis.
    """

    rows: tuple[str, ...] = ()
    server: str | None = None

    def size(self) -> int:
        """Devices over which rows are spread."""
        return lax.axis_size(self.rows) if self.rows else 1

    def index(self) -> jax.Array:
        """() int32, position of this device among them."""
        return lax.axis_index(self.rows)

    def pass_on(self, tree: Any) -> Any:
        """Gives this device's values to the next device, and gets those of the one before."""
        size = self.size()
        ring = [(device, (device + 1) % size) for device in range(size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.rows, ring), tree)

    def sum(self, tree: Any) -> Any:
        """Sums over all devices, replicated."""
        return lax.psum(tree, self.rows) if self.rows else tree

    def all(self, passes: jax.Array) -> jax.Array:
        """Whether a () bool holds on every device."""
        return lax.pmin(passes.astype("int32"), self.rows) == 1 if self.rows else passes

    def gather_rows(self, x: jax.Array, axis: int) -> jax.Array:
        """The rows of all devices in cohort order, replicated."""
        if not self.rows:
            return x
        return lax.all_gather(x, self.rows, axis=axis, tiled=True, to="invarying")

    def vary(self, tree: Any) -> Any:
        """Marks replicated values as device-varying, so that gradients with respect to them are
        not summed over devices."""

        def leaf(x: jax.Array) -> jax.Array:
            missing = tuple(name for name in self.rows if name not in _varying(x))
            return lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(leaf, tree)

    def gather_server(self, params: Any) -> Any:
        """Complete server parameters, device-varying, from sharded ones."""

        def leaf(x: jax.Array) -> jax.Array:
            if not self._is_sharded(x):
                return x
            return lax.all_gather(x, self.server, axis=x.ndim - 1, tiled=True)

        return self.vary(jax.tree.map(leaf, params))

    def sum_server(self, grads: Any, params: Any) -> Any:
        """Sums gradients of complete parameters over all devices, sharded as `params` are."""

        def leaf(grad: jax.Array, param: jax.Array) -> jax.Array:
            if not self._is_sharded(param):
                return self.sum(grad)
            others = tuple(name for name in self.rows if name != self.server)
            own = lax.psum_scatter(grad, self.server, scatter_dimension=grad.ndim - 1, tiled=True)
            return lax.psum(own, others) if others else own

        return jax.tree.map(leaf, grads, params)

    def _is_sharded(self, x: jax.Array) -> bool:
        return self.server is not None and self.server in _varying(x)


NO_MESH = Axes()


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
