"""What the loop puts on the devices: the state round by round, and the inputs of a dispatch."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.rich import groups_of
from mocosfl_jax.data.dataset import Dataset, Split
from mocosfl_jax.federated.contract import Normalisation, Tree
from mocosfl_jax.federated.dispatch import Constants, Images, Program
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.federated.slots import Slots, spread
from mocosfl_jax.federated.state import PADDING, TrainState, create_state
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
    placement: Placement, dataset: Dataset, labels: bool, dispatch: Dispatch
) -> tuple[Dispatch, jax.Array, Images]:
    """The dispatch with its cohort ids and inputs on the devices.

    Args:
      dataset: its training images; a process gathers those of its own devices' slots.
      labels: whether the method takes labels.
    """
    slots, steps = placement.rows(0), placement.rows(1)
    shape = (*dispatch.mask.shape, *dataset.train.images.shape[1:])
    inputs = Images(
        images=placement.put(shape, steps, lambda index: _images(dataset, dispatch, index[:2])),
        mask=placement.put_array(dispatch.mask, steps),
        sync=placement.put_array(dispatch.sync, placement.replicated),
        weight=placement.put_array(dispatch.weight, slots),
        labels=placement.put_array(_labels(dataset.train, dispatch.image_ids), steps)
        if labels
        else None,
    )
    return dispatch, placement.put_array(dispatch.cohort, slots), inputs


def _images(dataset: Dataset, dispatch: Dispatch, place: tuple[slice, ...]) -> np.ndarray:
    """The images of some steps and slots, those of the second data set last."""
    images = dataset.train.images[dispatch.image_ids[place]]
    if dataset.mixed is None:
        return images
    return np.concatenate([images, dataset.mixed.images[dispatch.mixed_ids[place]]], axis=2)


def _labels(split: Split, ids: np.ndarray) -> np.ndarray:
    """int32 labels of these images, -1 where there are none."""
    return np.full(ids.shape, -1, np.int32) if split.labels is None else split.labels[ids]


class Rounds:
    """The training state on the mesh, from round to round.

    On the devices the cohort's slots are padded to fill all devices, and so are the rows of a
    population leaf that is sharded over N. What is saved has no padding, and the cohort's order.

    slots: of the cohort on the devices.

    begin: (state, ids of the slots) to the state at a round's start. end: from the state after the
    last step to that between rounds. Both are jitted, and both donate the state.
    """

    def __init__(self, config: Resolved, placement: Placement, program: Program):
        method = program.method
        self.slots = Slots(groups_of(config), placement.devices * method.chunks)
        self._config, self._placement, self._method = config, placement, method
        self._shapes = jax.eval_shape(self._initial)
        self._unpadded_shapes = jax.eval_shape(self._unpadded_initial)
        self._shardings = placement.state_shardings(method, self._shapes)
        jit = partial(jax.jit, donate_argnums=0, out_shardings=self._shardings)
        self.begin = jit(placement.begin(method, self._shapes))
        self.end = jit(placement.end(method, self._shapes))
        self._network_in_round = jax.jit(self._mean_network)

    # ---------------------------------------------------------------------- start, save, restore

    def initial_state(self, loaded: Variables | None = None) -> TrainState:
        """The state before the first step, from the seed and what is loaded (`create_server`)."""
        put = partial(self._placement.put_array, sharding=self._placement.replicated)
        loaded = jax.tree.map(put, loaded)
        state = jax.jit(self._initial, out_shardings=self._shardings)(loaded)
        return jax.tree.map(jnp.copy, state)  # equal parts share buffers, which donation forbids

    def unpadded(self, state: TrainState) -> TrainState:
        """A copy without padding, as it is saved: the same for every number of devices.

        Leaves that have padding come as NumPy arrays: on the devices such a number of rows could
        only be replicated.
        """
        shapes = self._unpadded_shapes
        order = None if self.slots.in_order else self.slots.of_cohort
        cohort = jax.tree.map(
            partial(_without_padding, order=order), _of_slots(state), _of_slots(shapes)
        )
        others = jax.tree.map(_without_padding, _of_all(state), _of_all(shapes))
        return others.replace(**cohort)

    def abstract_unpadded(self) -> TrainState:
        """Shapes of what is saved, with shardings; leaves that need padding are NumPy arrays."""

        def leaf(x: Any, padded: Any, sharding: Any) -> Any:
            if x.shape != padded.shape:
                return np.empty(x.shape, x.dtype)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        shapes = jax.tree.map(leaf, self._unpadded_shapes, self._shapes, self._shardings)
        if self.slots.in_order:
            return shapes
        moved = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), _of_slots(shapes))
        return shapes.replace(**moved)

    def padded(self, state: TrainState) -> TrainState:
        """A restored state on the devices, with padding."""
        if not isinstance(state.cohort_ids, jax.Array):
            ids = spread(state.cohort_ids, self.slots.clients, fill=PADDING)
            # Padding slots have what the last participant has.
            cohort = jax.tree.map(lambda x: np.take(x, self.slots.clients, axis=0), state.cohort)
            state = state.replace(cohort_ids=ids, cohort=cohort)
        return jax.tree.map(self._with_padding, state, self._shapes, self._shardings)

    # ------------------------------------------------------------------------ what the loop asks

    def network(self, state: TrainState, step: int) -> Variables:
        """The network that is evaluated and exported at a step."""
        if step % self._config.steps_per_round == 0:
            return self._method.network(state.server, None)
        return self._network_in_round(state.server, state.cohort)

    def status(self, state: TrainState) -> int:
        """Index of the status of the round at hand; with several, it waits for the state."""
        return int(self._method.status_of(state.server)) if self._method.statuses else 0

    def _mean_network(self, server: Tree, cohort: Tree) -> Variables:
        slots = self.slots
        participants = slice(self._config.cohort_size) if slots.in_order else slots.of_cohort
        return self._method.network(server, jax.tree.map(lambda x: x[participants], cohort))

    def bytes_a_device(self) -> dict[str, int]:
        """Memory of the parts of the state on one device, by their names: `population`, and those
        of the server's state and of the cohort's: `server.queue`, `cohort.client`."""

        def size(x: Any, sharding: Any) -> int:
            return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

        sizes = jax.tree.map(size, self._shapes, self._shardings)
        total = {"population": sum(jax.tree.leaves(sizes.population))}
        for name in ("server", "cohort"):
            for path, leaf in jax.tree.leaves_with_path(getattr(sizes, name)):
                part = f"{name}.{jax.tree_util.keystr(path[:1], simple=True)}"
                total[part] = total.get(part, 0) + leaf
        return total

    # ----------------------------------------------------------------------------------- padding

    def _initial(self, loaded: Variables | None = None) -> TrainState:
        """With padding; pure."""
        return self._placement.create(
            self._method, *self._keys(), self._config.num_clients, self.slots.number, loaded
        )

    def _unpadded_initial(self) -> TrainState:
        config = self._config
        return create_state(self._method, *self._keys(), config.num_clients, config.cohort_size)

    def _keys(self) -> tuple[jax.Array, jax.Array]:
        """For parameters, and for the rest of the state."""
        seed = self._config.seed
        return device_key(seed, Stream.INIT), device_key(seed, Stream.STATE)

    def _with_padding(self, leaf: Any, shape: Any, sharding: Any) -> jax.Array:
        """A restored leaf on the devices; further rows repeat the last one."""
        if isinstance(leaf, jax.Array):
            return leaf
        missing = shape.shape[0] - leaf.shape[0]
        rows = np.pad(leaf, [(0, missing), *[(0, 0)] * (leaf.ndim - 1)], mode="edge")
        return self._placement.put_array(rows, sharding)


def _of_slots(state: TrainState) -> dict[str, Tree]:
    """What has a row for each slot, by its field."""
    return {"cohort_ids": state.cohort_ids, "cohort": state.cohort}


def _of_all(state: TrainState) -> TrainState:
    """The rest of a state."""
    return state.replace(cohort_ids=None, cohort=None)


def _without_padding(leaf: jax.Array, unpadded: Any, order: np.ndarray | None = None) -> Any:
    """A copy of a leaf's first rows, or of those in `order`; on the host, unless these are all, in
    the order that they have.

    On one device of a CPU it is a view, and JAX does not let a program write to what has one. With
    several processes such leaves pass through every device, one at a time.
    """
    if leaf.shape == unpadded.shape and order is None:
        return jnp.copy(leaf)
    if leaf.is_fully_addressable:
        rows = np.asarray(leaf)
    else:
        rows = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return rows[: unpadded.shape[0]] if order is None else rows[order]
