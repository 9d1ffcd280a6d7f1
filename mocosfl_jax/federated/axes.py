"""What devices exchange in a step, inside `shard_map`. Without a mesh nothing is exchanged."""

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax


@dataclass(frozen=True)
class Axes:
    """Names of mesh axes.

    rows: axes over which cohort slots, and with them server rows, are split, the major one first;
      empty without a mesh.
    server: the axis of `rows` over which the last dimension of server parameters is split as well,
      or None. A leaf is split if it varies over that axis.
    """

    rows: tuple[str, ...] = ()
    server: str | None = None

    def sum(self, tree: Any) -> Any:
        """Sums over all devices, the same everywhere."""
        return lax.psum(tree, self.rows) if self.rows else tree

    def all(self, passes: jax.Array) -> jax.Array:
        """Whether a () bool holds on every device."""
        return lax.pmin(passes.astype("int32"), self.rows) == 1 if self.rows else passes

    def gather_rows(self, x: jax.Array, axis: int) -> jax.Array:
        """The rows of all devices in cohort order, the same everywhere."""
        if not self.rows:
            return x
        return lax.all_gather(x, self.rows, axis=axis, tiled=True, to="invarying")

    def vary(self, tree: Any) -> Any:
        """The same values, of which every device has its own: a gradient with respect to them
        stays the one of this device's rows."""

        def leaf(x: jax.Array) -> jax.Array:
            missing = tuple(name for name in self.rows if name not in _varying(x))
            return lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(leaf, tree)

    def gather_server(self, params: Any) -> Any:
        """Whole server parameters, this device's own, from split ones."""

        def leaf(x: jax.Array) -> jax.Array:
            if not self._is_split(x):
                return x
            return lax.all_gather(x, self.server, axis=x.ndim - 1, tiled=True)

        return self.vary(jax.tree.map(leaf, params))

    def sum_server(self, grads: Any, params: Any) -> Any:
        """Sums gradients of whole parameters over all devices, split as `params` are."""

        def leaf(grad: jax.Array, param: jax.Array) -> jax.Array:
            if not self._is_split(param):
                return self.sum(grad)
            others = tuple(name for name in self.rows if name != self.server)
            own = lax.psum_scatter(grad, self.server, scatter_dimension=grad.ndim - 1, tiled=True)
            return lax.psum(own, others) if others else own

        return jax.tree.map(leaf, grads, params)

    def _is_split(self, x: jax.Array) -> bool:
        return self.server is not None and self.server in _varying(x)


NO_MESH = Axes()


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
