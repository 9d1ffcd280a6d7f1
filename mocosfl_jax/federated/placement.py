"""Where a run's arrays live: the mesh of devices, and what of the state is split over it.

The mesh has two axes. Cohort slots, their images and latents are split over both; server parameters
are whole on every device, or split over the second axis (`config.server_shards`). Processes of a
multi-host run each hold some of the devices.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.axes import Axes
from mocosfl_jax.federated.dispatch import (
    DispatchOutput,
    Images,
    Normalisation,
    Program,
    run_dispatch,
)
from mocosfl_jax.federated.state import ServerState, TrainState

ROWS = ("clients", "server")
"""Names of the mesh axes; `server` is the one over which server parameters may be split."""


def axes_of(server_shards: int) -> Axes:
    """What the step needs to know of the mesh."""
    return Axes(ROWS, "server" if server_shards > 1 else None)


@dataclass(frozen=True)
class Placement:
    """The mesh of a run, and arrays on it."""

    mesh: Mesh

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def whole(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, P())

    def rows(self, axis: int = 0) -> NamedSharding:
        """Split over all devices on one axis."""
        return NamedSharding(self.mesh, P(*[None] * axis, ROWS))

    def put(
        self, shape: tuple[int, ...], sharding: NamedSharding, part: Callable[[Any], np.ndarray]
    ) -> jax.Array:
        """An array of which this process makes only what its devices hold.

        Args: part: from a tuple of slices to that part of the array.
        """
        return jax.make_array_from_callback(shape, sharding, part)

    def put_array(self, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """An array that every process has in memory."""
        return self.put(array.shape, sharding, lambda index: array[index])

    def fetch(self, tree: Any) -> Any:
        """NumPy copies on every process of arrays that may be split over all of them."""
        return jax.device_get(jax.jit(_identity, out_shardings=self.whole)(tree))

    def state_shardings(self, state: Any) -> Any:
        """The sharding of every leaf of a TrainState (of arrays or shapes)."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            self._state_specs(state),
            is_leaf=lambda x: isinstance(x, P),
        )

    def _state_specs(self, state: TrainState) -> TrainState:
        shards = self.mesh.shape["server"]

        def server(x: Any) -> P:
            split = shards > 1 and x.ndim > 0 and x.shape[-1] % shards == 0
            return P(*[None] * (x.ndim - 1), "server") if split else P()

        def everywhere(spec: P, tree: Any) -> Any:
            return jax.tree.map(lambda _: spec, tree)

        parts, once, slots = state.server, cast(Any, P()), cast(Any, P(ROWS))
        return TrainState(
            step=once,
            server=ServerState(
                *(jax.tree.map(server, x) for x in (parts.params, parts.momentum, parts.buffers)),
                *(everywhere(P(), x) for x in (parts.stats, parts.momentum_stats)),
            ),
            population=everywhere(P(), state.population),
            cohort_ids=slots,
            cohort=everywhere(P(ROWS), state.cohort),
            queue=everywhere(P(), state.queue),
        )

    def dispatch(self, program: Program, state: TrainState) -> Callable[..., Any]:
        """`run_dispatch` on the mesh, jitted: (state, inputs, normalisation, key) to the new state,
        whose buffers are those of the old one, and `DispatchOutput`."""
        specs = self._state_specs(state)
        steps_and_rows = cast(Any, P(None, ROWS))
        inputs = Images(steps_and_rows, steps_and_rows, cast(Any, P()), cast(Any, P(ROWS)))

        def steps(
            state: TrainState, inputs: Images, normalisation: Normalisation, key: jax.Array
        ) -> tuple[TrainState, DispatchOutput]:
            return run_dispatch(program, state, inputs, normalisation, key)

        spread = jax.shard_map(
            steps, mesh=self.mesh, in_specs=(specs, inputs, P(), P()), out_specs=(specs, P())
        )
        return jax.jit(spread, donate_argnums=0)


def _identity(tree: Any) -> Any:
    return tree


@functools.cache
def single_device() -> Placement:
    """The first device of this process alone."""
    return Placement(Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), ROWS))


def make_placement(devices: int | None, server_shards: int) -> Placement:
    """The mesh of a run.

    Args:
      devices: how many, None for all; several processes take all.
      server_shards: devices that share one copy of the server, a divisor.
    Raises: InputError: more devices than there are, no divisor, or not all with several processes.
    """
    found = jax.devices()
    count = len(found) if devices is None else devices
    if count > len(found):
        raise InputError("config.devices", devices, f"there are {len(found)}: 1 to {len(found)}")
    if jax.process_count() > 1 and count < len(found):
        raise InputError("config.devices", devices, "several processes use all: unset")
    if count % server_shards:
        raise InputError(
            "config.server_shards", server_shards, f"a divisor of the {count} devices is needed"
        )
    grid = np.array(found[:count]).reshape(-1, server_shards)
    return Placement(Mesh(grid, ROWS))
