"""Where a run's arrays live: the mesh of devices, and what of the state is sharded over it.

The mesh has two axes. Cohort slots, their images and latents are spread over both; server
parameters are replicated, or sharded over the second axis (`config.server_shards`). Large leaves of
the population are sharded over N, over both. Processes of a multi-host run each hold some devices.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.axes import Axes
from mocosfl_jax.federated.contract import Method, Tree
from mocosfl_jax.federated.dispatch import Constants, DispatchOutput, Images, Program, run_dispatch
from mocosfl_jax.federated.population import gather, scatter
from mocosfl_jax.federated.state import (
    TrainState,
    begin_round,
    create_server,
    end_round,
    populate,
    without_cohort,
)
from mocosfl_jax.models.split import Variables

ROWS = ("clients", "server")
"""Names of the mesh axes; `server` is the one over which server parameters may be sharded."""

SHARDED_FROM = 2**20
"""Bytes from which a leaf of the population is sharded over N; smaller ones are replicated."""


@dataclass(frozen=True)
class Placement:
    """The mesh of a run, and arrays on it."""

    mesh: Mesh

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def local_devices(self) -> int:
        """Those of this process."""
        return len(self.mesh.local_devices)

    @property
    def axes(self) -> Axes:
        """What a method needs to know of the mesh."""
        return Axes(ROWS, "server" if self.mesh.shape["server"] > 1 else None)

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, P())

    def rows(self, axis: int = 0) -> NamedSharding:
        """Sharded over all devices on one axis."""
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
        """NumPy copies on every process of arrays that may be sharded over all of them."""
        return jax.device_get(jax.jit(_identity, out_shardings=self.replicated)(tree))

    # -------------------------------------------------------------------------------- the state

    def population_rows(self, num_clients: int) -> int:
        """Rows of a sharded population leaf: N, padded to fill all devices."""
        return -(-num_clients // self.devices) * self.devices

    def is_sharded(self, leaf: Any) -> bool:
        """Whether a population leaf (an array or its shape) is sharded over N."""
        return self.devices > 1 and math.prod(leaf.shape) * leaf.dtype.itemsize >= SHARDED_FROM

    def state_shardings(self, method: Method, state: TrainState) -> TrainState:
        """The sharding of every leaf of a state (of arrays or shapes)."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            self._state_specs(method, state),
            is_leaf=lambda x: isinstance(x, P),
        )

    def _state_specs(self, method: Method, state: TrainState) -> TrainState:
        shards = self.mesh.shape["server"]

        def server(may_be: bool, x: Any) -> P:
            fits = may_be and shards > 1 and x.ndim > 0 and x.shape[-1] % shards == 0
            return P(*[None] * (x.ndim - 1), "server") if fits else P()

        once, slots = cast(Any, P()), cast(Any, P(ROWS))
        may_be = jax.tree.broadcast(method.sharded(state.server), state.server)
        return TrainState(
            step=once,
            server=jax.tree.map(server, may_be, state.server),
            population=self._population_specs(state),
            cohort_ids=slots,
            cohort=jax.tree.map(lambda _: P(ROWS), state.cohort),
        )

    def _population_specs(self, state: TrainState) -> Tree:
        return jax.tree.map(lambda sharded: P(ROWS) if sharded else P(), self._sharded(state))

    def _sharded(self, state: TrainState) -> Tree:
        return jax.tree.map(self.is_sharded, state.population)

    # ----------------------------------------------------------------------- programs on the mesh

    def create(
        self,
        method: Method,
        params_key: jax.Array,
        state_key: jax.Array,
        num_clients: int,
        slots: int,
        loaded: Variables | None = None,
    ) -> TrainState:
        """`create_state` on the mesh, to be jitted: sharded leaves have `population_rows`.

        Args: as `create_state`; slots: a multiple of the devices.
        """
        server = create_server(method, params_key, state_key, loaded)
        keys_N = jax.random.split(state_key, num_clients)
        state = without_cohort(server, self._populate(method, server, keys_N), slots)
        return self.begin(method, state)(state, state.cohort_ids)

    def _populate(self, method: Method, server: Tree, keys_N: jax.Array) -> Tree:
        """`populate`, where each device makes its own rows of sharded leaves."""
        shapes = jax.eval_shape(functools.partial(populate, method), server, keys_N)
        sharded = jax.tree.map(self.is_sharded, shapes)
        rows = self.population_rows(len(keys_N))
        padded = keys_N[jnp.minimum(jnp.arange(rows), len(keys_N) - 1)]

        def block(server: Tree, keys_N: jax.Array, own_keys: jax.Array) -> Tree:
            complete = populate(method, server, keys_N)
            own = Axes(ROWS).vary(populate(method, server, own_keys))
            return jax.tree.map(lambda s, x, y: y if s else x, sharded, complete, own)

        make = jax.shard_map(
            block,
            mesh=self.mesh,
            in_specs=(P(), P(), P(ROWS)),
            out_specs=jax.tree.map(lambda s: P(ROWS) if s else P(), sharded),
        )
        return make(server, keys_N, padded)

    def begin(self, method: Method, state: TrainState) -> Callable[..., TrainState]:
        """`begin_round` on the mesh, to be jitted: (state, ids) to the new state."""
        if self.devices == 1:
            return functools.partial(begin_round, method)
        take = jax.shard_map(
            functools.partial(gather, sharded=self._sharded(state), axes=Axes(ROWS)),
            mesh=self.mesh,
            in_specs=(self._population_specs(state), P(ROWS)),
            out_specs=P(ROWS),
        )
        return functools.partial(begin_round, method, take=take)

    def end(self, method: Method, state: TrainState) -> Callable[..., TrainState]:
        """`end_round` on the mesh, to be jitted: from the state to the new one."""
        if self.devices == 1:  # the cohort's rows are written without a copy
            return functools.partial(end_round, method)
        specs = self._population_specs(state)
        put = jax.shard_map(
            functools.partial(scatter, sharded=self._sharded(state), axes=Axes(ROWS)),
            mesh=self.mesh,
            in_specs=(specs, P(ROWS), P(ROWS)),
            out_specs=specs,
        )
        return functools.partial(end_round, method, put=put)

    def dispatch(self, program: Program, state: TrainState) -> Callable[..., Any]:
        """`run_dispatch` on the mesh, jitted: (state, inputs, constants) to the new state, whose
        buffers are those of the old one, and `DispatchOutput`. The population is
        passed through."""
        specs = self._state_specs(program.method, state)
        steps_and_rows = cast(Any, P(None, ROWS))
        inputs = Images(
            images=steps_and_rows,
            mask=steps_and_rows,
            sync=cast(Any, P()),
            weight=cast(Any, P(ROWS)),
            labels=steps_and_rows if program.method.labels else None,
        )

        def steps(
            state: TrainState, inputs: Images, constants: Constants
        ) -> tuple[TrainState, DispatchOutput]:
            return run_dispatch(program, state, inputs, constants)

        spread = jax.shard_map(
            steps, mesh=self.mesh, in_specs=(specs, inputs, P()), out_specs=(specs, P())
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
        raise InputError("config.devices", devices, f"at most {len(found)}, as many as there are")
    if jax.process_count() > 1 and count < len(found):
        raise InputError("config.devices", devices, "several processes use all: leave it unset")
    if count % server_shards:
        raise InputError(
            "config.server_shards", server_shards, f"a divisor of the {count} devices is needed"
        )
    grid = np.array(found[:count]).reshape(-1, server_shards)
    return Placement(Mesh(grid, ROWS))
