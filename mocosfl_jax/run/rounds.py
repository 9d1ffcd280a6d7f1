"""What the loop puts on the devices: the state round by round, and the inputs of a dispatch."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.config import Config
from mocosfl_jax.config.build import initial_state
from mocosfl_jax.federated.dispatch import Images, Normalisation, Program
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.federated.state import TrainState, begin_round, end_round, with_slots
from mocosfl_jax.models.split import Variables
from mocosfl_jax.randomness import Stream, device_key
from mocosfl_jax.run.feed import Dispatch


def run_constants(config: Config, placement: Placement) -> tuple[Normalisation, jax.Array]:
    """Mean and deviation of the images, and the key of the augmentation, on every device."""

    def constants() -> tuple[Normalisation, jax.Array]:
        normalisation = Normalisation(jnp.asarray(config.mean), jnp.asarray(config.std))
        return normalisation, device_key(config.seed, Stream.AUGMENT)

    return jax.jit(constants, out_shardings=placement.whole)()


def place_inputs(
    placement: Placement, images: np.ndarray, dispatch: Dispatch
) -> tuple[Dispatch, jax.Array, Images]:
    """The dispatch with its cohort ids and inputs on the devices.

    Args: images: uint8 (n, H, W, 3); a process gathers those of its own devices' slots.
    """
    ids, slots, steps = dispatch.image_ids, placement.rows(0), placement.rows(1)
    inputs = Images(
        images=placement.put(
            (*ids.shape, *images.shape[1:]), steps, lambda index: images[ids[index[:3]]]
        ),
        mask=placement.put_array(dispatch.mask, steps),
        sync_now=placement.put_array(dispatch.sync_now, placement.whole),
        sync_weight=placement.put_array(dispatch.sync_weight, slots),
    )
    return dispatch, placement.put_array(dispatch.cohort, slots), inputs


class Cohort:
    """Rounds of the train state on the mesh, whose cohort slots are padded to fill all devices."""

    def __init__(self, config: Config, placement: Placement, program: Program):
        multiple = placement.devices * program.method.cohort_chunks
        self.slots = -(-config.cohort_size // multiple) * multiple
        self._config, self._placement = config, placement
        fields = dataclasses.replace(config, cohort_size=self.slots)
        self._initial = partial(initial_state, fields, program.method)
        align = config.align_momentum
        shardings = placement.state_shardings(jax.eval_shape(self._initial))
        jit = partial(jax.jit, donate_argnums=0, out_shardings=shardings)
        self.begin = jit(partial(begin_round, align_momentum=align))
        self.end = jit(partial(end_round, align_momentum=align))
        self.padded = jax.jit(self._with(self.slots), out_shardings=shardings)
        self._shardings = self._saved = shardings
        if self.slots != config.cohort_size:  # what is saved does not fill the devices
            whole = jax.tree.map(lambda _: placement.whole, shardings.cohort)
            self._saved = shardings.replace(cohort=whole, cohort_ids=placement.whole)
        self._cut = jax.jit(self._with(config.cohort_size), out_shardings=self._saved)

    def initial_state(self) -> TrainState:
        """State before the first step, from the seed."""
        state = jax.jit(self._initial, out_shardings=self._shardings)()
        return jax.tree.map(jnp.copy, state)  # equal parts share buffers, which donation forbids

    def unpadded(self, state: TrainState) -> TrainState:
        """A copy without padding, as it is saved: the same for every number of devices."""
        if self.slots == self._config.cohort_size:
            return jax.tree.map(jnp.copy, state)
        return self._cut(state)

    def abstract_unpadded(self) -> Any:
        """Shapes and shardings of what is saved."""
        shapes = jax.eval_shape(self._with(self._config.cohort_size), jax.eval_shape(self._initial))
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self._saved,
        )

    def network(self, state: TrainState, step: int) -> Variables:
        """The online network at a step: the server's half, and the clients' common model; within a
        round, when they differ, the mean of the cohort's."""
        client, cohort = state.population.params, slice(self._config.cohort_size)
        if step % self._config.steps_per_round:
            client = jax.tree.map(lambda x: x[cohort].mean(axis=0), state.cohort.params)
        return Variables(client, state.server.params, state.server.stats)

    def _with(self, slots: int) -> Callable[[TrainState], TrainState]:
        return partial(with_slots, slots=slots, num_clients=self._config.num_clients)

    def bytes_a_device(self) -> dict[str, int]:
        """Memory of the parts of the state on one device, by the name of the part."""
        shapes = jax.eval_shape(self._initial)

        def size(x: Any, sharding: Any) -> int:
            return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

        sizes = jax.tree.map(size, shapes, self._shardings)
        names = ("server", "population", "cohort", "queue")
        return {name: sum(jax.tree.leaves(getattr(sizes, name))) for name in names}
