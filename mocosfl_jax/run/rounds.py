"""What the loop puts on the devices: the state round by round, and the inputs of a dispatch."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mocosfl_jax.config import Resolved
from mocosfl_jax.data.dataset import Split
from mocosfl_jax.federated.contract import Normalisation, Tree
from mocosfl_jax.federated.dispatch import Constants, Images, Program
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.federated.state import TrainState, create_state, resize, with_slots
from mocosfl_jax.models.split import Variables
from mocosfl_jax.randomness import Stream, device_key
from mocosfl_jax.run.feed import Dispatch


def run_constants(config: Resolved, placement: Placement) -> Constants:
    """What is the same in every dispatch, on every device."""

    def constants() -> Constants:
        return Constants(
            normalisation=Normalisation(jnp.asarray(config.mean), jnp.asarray(config.std)),
            augment_key=device_key(config.seed, Stream.AUGMENT),
            method_key=device_key(config.seed, Stream.METHOD),
        )

    return jax.jit(constants, out_shardings=placement.replicated)()


def place_inputs(
    placement: Placement, split: Split, labels: bool, dispatch: Dispatch
) -> tuple[Dispatch, jax.Array, Images]:
    """The dispatch with its cohort ids and inputs on the devices.

    Args:
      split: the training images; a process gathers those of its own devices' slots.
      labels: whether the method takes labels.
    """
    ids, slots, steps = dispatch.image_ids, placement.rows(0), placement.rows(1)
    images = split.images
    inputs = Images(
        images=placement.put(
            (*ids.shape, *images.shape[1:]), steps, lambda index: images[ids[index[:3]]]
        ),
        mask=placement.put_array(dispatch.mask, steps),
        sync=placement.put_array(dispatch.sync, placement.replicated),
        weight=placement.put_array(dispatch.weight, slots),
        labels=placement.put_array(_labels(split, ids), steps) if labels else None,
    )
    return dispatch, placement.put_array(dispatch.cohort, slots), inputs


def _labels(split: Split, ids: np.ndarray) -> np.ndarray:
    """int32 labels of these images, -1 where there are none."""
    return np.full(ids.shape, -1, np.int32) if split.labels is None else split.labels[ids]


class Rounds:
    """The training state on the mesh, from round to round.

    On the devices the cohort's slots are padded to fill all devices, and so are the rows of a
    population leaf that is sharded over N. What is saved has no padding.
    """

    def __init__(self, config: Resolved, placement: Placement, program: Program):
        method = program.method
        multiple = placement.devices * method.chunks
        self.slots = -(-config.cohort_size // multiple) * multiple
        self._config, self._placement, self._method = config, placement, method
        self._shapes = jax.eval_shape(self._padded_initial)
        self._shardings = placement.state_shardings(method, self._shapes)
        jit = partial(jax.jit, donate_argnums=0, out_shardings=self._shardings)
        self.begin = jit(placement.begin(method, self._shapes))
        self.end = jit(placement.end(method, self._shapes))
        # What has rows of the cohort is saved without padding; the population is treated apart.
        on_devices = self._shardings.replace(population=None)
        self._saved = on_devices
        if self.slots != config.cohort_size:  # what is saved does not fill the devices
            replicated = jax.tree.map(lambda _: placement.replicated, on_devices.cohort)
            self._saved = on_devices.replace(cohort=replicated, cohort_ids=placement.replicated)
        cut, pad = (
            partial(with_slots, slots=config.cohort_size),
            partial(with_slots, slots=self.slots),
        )
        self._cut = jax.jit(cut, out_shardings=self._saved)
        self._pad = jax.jit(pad, out_shardings=on_devices)

    # ---------------------------------------------------------------------- start, save, restore

    def initial_state(self) -> TrainState:
        """The state before the first step, from the seed."""
        state = jax.jit(self._padded_initial, out_shardings=self._shardings)()
        return jax.tree.map(jnp.copy, state)  # equal parts share buffers, which donation forbids

    def unpadded(self, state: TrainState) -> TrainState:
        """A copy without padding, as it is saved: the same for every number of devices.

        Population leaves that need padding come as NumPy arrays, so that no device holds all rows.
        """
        population = jax.tree.map(self._without_padding, state.population)
        others = state.replace(population=None)
        fits = self.slots == self._config.cohort_size
        others = jax.tree.map(jnp.copy, others) if fits else self._cut(others)
        return others.replace(population=population)

    def abstract_unpadded(self) -> TrainState:
        """Shapes of what is saved, with shardings; leaves that need padding are NumPy arrays."""

        def leaf(x: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        others = jax.eval_shape(self._cut, self._shapes.replace(population=None))
        population = jax.tree.map(
            lambda x, sharding: self._host_leaf(x) if self._needs_padding(x) else leaf(x, sharding),
            self._shapes.population,
            self._shardings.population,
        )
        return jax.tree.map(leaf, others, self._saved).replace(population=population)

    def padded(self, state: TrainState) -> TrainState:
        """A restored state on the devices, with padding."""
        population = jax.tree.map(
            self._with_padding,
            state.population,
            self._shapes.population,
            self._shardings.population,
        )
        return self._pad(state.replace(population=None)).replace(population=population)

    # --------------------------------------------------------------------------------- questions

    def network(self, state: TrainState, step: int) -> Variables:
        """The network that is evaluated and exported at a step."""
        if step % self._config.steps_per_round == 0:
            return self._method.network(state.server, None)
        participants = slice(self._config.cohort_size)
        cohort = jax.tree.map(lambda x: x[participants], state.cohort)
        return self._method.network(state.server, cohort)

    def bytes_a_device(self) -> dict[str, int]:
        """Memory of the parts of the state on one device, by their names: `population`, `cohort`,
        and those of the server's state: `server.queue`."""

        def size(x: Any, sharding: Any) -> int:
            return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

        sizes = jax.tree.map(size, self._shapes, self._shardings)
        total: dict[str, int] = {"population": 0, "cohort": 0}
        for path, leaf in jax.tree.leaves_with_path((sizes.population, sizes.cohort)):
            total[("population", "cohort")[path[0].idx]] += leaf
        for path, leaf in jax.tree.leaves_with_path(sizes.server):
            part = jax.tree_util.keystr(path[:1], simple=True)
            total[f"server.{part}"] = total.get(f"server.{part}", 0) + leaf
        return total

    # ----------------------------------------------------------------------------------- padding

    def _padded_initial(self) -> TrainState:
        """With rows for all devices; pure."""
        config, clients = self._config, self._config.num_clients
        state = create_state(
            self._method,
            device_key(config.seed, Stream.INIT),
            device_key(config.seed, Stream.STATE),
            clients,
            self.slots,
        )
        rows = self._placement.population_rows(clients)
        population = jax.tree.map(
            lambda x: resize(x, rows) if self._placement.is_sharded(x) else x, state.population
        )
        return state.replace(population=population)

    def _needs_padding(self, leaf: Any) -> bool:
        """Whether a population leaf, as it is on the devices, has rows of no client."""
        return leaf.shape[0] != self._config.num_clients

    def _host_leaf(self, leaf: Any) -> np.ndarray:
        return np.empty((self._config.num_clients, *leaf.shape[1:]), leaf.dtype)

    def _without_padding(self, leaf: jax.Array) -> Tree:
        if not self._needs_padding(leaf):
            return jnp.copy(leaf)
        if leaf.is_fully_addressable:
            rows = np.asarray(leaf)
        else:
            rows = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return rows[: self._config.num_clients]

    def _with_padding(self, leaf: Any, shape: Any, sharding: Any) -> jax.Array:
        if not self._needs_padding(shape):
            return leaf
        missing = shape.shape[0] - self._config.num_clients
        rows = np.pad(np.asarray(leaf), [(0, missing), *[(0, 0)] * (leaf.ndim - 1)], mode="edge")
        return self._placement.put_array(rows, sharding)
