"""Several steps in one compiled program: augmentation and steps inside a scan."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.data.augment import AugmentConfig, augment, normalise, two_views
from mocosfl_jax.federated.contract import RESERVED, Batch, Method, Metrics, Normalisation
from mocosfl_jax.federated.slots import by_group, in_one, rich_slots
from mocosfl_jax.federated.state import TrainState


class Images(NamedTuple):
    """Raw inputs of S steps.

    Where some clients take larger batches, images, mask and labels have their rows as `Batch` has.

    images: (S, C, B, H, W, 3) uint8. mask: (S, C, B) bool, False for padding. sync: (S,) bool,
    whether the step ends with a sync. weight: (C,) float32, of each slot in an average. labels:
    (S, C, B) int32, -1 where there is none; None where the method takes none.
    """

    images: jax.Array
    mask: jax.Array
    sync: jax.Array
    weight: jax.Array
    labels: jax.Array | None = None


class Constants(NamedTuple):
    """What is the same in every dispatch of a run.

    normalisation: of the views. augment_key: of the views; an image's key folds in step, client id
    and position in the batch. method_key: of what a method draws; a slot's key folds in step and
    client id. No generator is part of the state.
    """

    normalisation: Normalisation
    augment_key: jax.Array
    method_key: jax.Array


class DispatchOutput(NamedTuple):
    """What a dispatch of S steps reports.

    metrics: those of the method, (S,) each, summed over devices. learning_rate: (S,) float32.
    finite: () bool, whether metrics, server and cohort at the end are finite.
    """

    metrics: Metrics
    learning_rate: jax.Array
    finite: jax.Array


@dataclass(frozen=True)
class Program:
    """What a dispatch computes, fixed for a run; hashable.

    method: the step. augment: of the views. learning_rate: at the start, as it is logged.
    schedule: factor on all rates, a function of the step as a float. total_steps: of the training.
    """

    method: Method
    augment: AugmentConfig
    learning_rate: float
    schedule: optax.Schedule
    total_steps: int

    def in_status(self, status: int) -> "Program":
        """That of a round with this status, an index of `Method.statuses`."""
        if not self.method.statuses:
            return self
        return dataclasses.replace(self, method=self.method.in_status(status))


def run_dispatch(
    program: Program, state: TrainState, inputs: Images, constants: Constants
) -> tuple[TrainState, DispatchOutput]:
    """Takes S steps of one round; pure.

    Args:
      program: static.
      state: within a round, see `begin_round`.
    """
    method = program.method

    def one_step(state: TrainState, step: Images) -> tuple[TrainState, tuple[Metrics, jax.Array]]:
        factor = jnp.asarray(program.schedule(state.step.astype(jnp.float32)), jnp.float32)
        batch = _batch(program, state, step, factor, constants)
        result = method.step(state.server, state.cohort, batch)
        state = state.replace(step=state.step + 1, server=result.server, cohort=result.cohort)
        if taken := RESERVED & result.metrics.keys():
            raise ValueError(f"metrics {sorted(taken)} have names that the log needs")
        metrics = method.axes.sum(result.metrics)
        return state, (metrics, program.learning_rate * factor)

    steps = jax.tree.map(jnp.asarray, inputs)
    weight = steps.weight
    state, (metrics, learning_rate) = jax.lax.scan(
        lambda state, step: one_step(state, step._replace(weight=weight)),
        state,
        steps._replace(weight=None),
    )
    counted = [jnp.where(m.weight > 0, m.total, 0.0) for m in metrics.values()]
    finite = method.axes.all(_all_finite((counted, state.server, state.cohort)))
    return state, DispatchOutput(metrics, learning_rate, finite)


def _batch(
    program: Program, state: TrainState, step: Images, factor: jax.Array, constants: Constants
) -> Batch:
    return Batch(
        views=_views(program, state, step.images, constants),
        labels=step.labels,
        mask=step.mask,
        weight=step.weight,
        sync=step.sync,
        rate_factor=factor,
        progress=state.step.astype(jnp.float32) / program.total_steps,
        keys=_client_keys(constants.method_key, state),
        normalisation=constants.normalisation,
    )


def _client_keys(key: jax.Array, state: TrainState) -> jax.Array:
    """A key for each slot, (C,)."""
    step_key = jax.random.fold_in(key, state.step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, state.cohort_ids)


def _views(
    program: Program, state: TrainState, images_CBHWC: jax.Array, constants: Constants
) -> tuple[jax.Array, ...]:
    """The views of every image that the method takes, (C, B, size, size, 3) each."""
    blocks, batch_size, *image_shape = images_CBHWC.shape
    images = images_CBHWC.reshape(-1, *image_shape)
    mean, std = constants.normalisation
    views: tuple[jax.Array, ...]
    if program.method.views == 0:
        views = (normalise(images.astype(jnp.float32) / 255, mean, std),)
    else:
        client_keys = _client_keys(constants.augment_key, state)
        keys = _image_keys(program.method, client_keys, blocks, batch_size)
        if program.method.views == 2:
            views = two_views(keys, images, program.augment, mean, std)
        else:
            one_view = jax.vmap(lambda key, x: augment(key, x, program.augment, mean, std))
            views = (one_view(keys, images),)
    return tuple(v.reshape(blocks, batch_size, *v.shape[1:]) for v in views)


def _image_keys(method: Method, keys_C: jax.Array, blocks: int, batch_size: int) -> jax.Array:
    """A key for each image, (blocks * B,), from that of its client and its place in the batch."""

    def of_clients(keys: jax.Array, images: int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.split(key, images))(keys).reshape(-1)

    if method.batch_factor == 1:
        return of_clients(keys_C, batch_size)

    def of_part(keys: jax.Array) -> jax.Array:
        rich = rich_slots(len(keys), blocks // method.chunks, method.batch_factor)
        large, small = by_group(keys, rich)
        return in_one(
            [of_clients(large, method.batch_factor * batch_size), of_clients(small, batch_size)]
        )

    return jax.vmap(of_part)(keys_C.reshape(method.chunks, -1)).reshape(-1)


def _all_finite(tree) -> jax.Array:
    """Whether every float in the tree is finite, () bool."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]).all()
