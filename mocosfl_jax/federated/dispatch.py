"""Several steps in one compiled program: augmentation, step and sync inside a scan."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mocosfl_jax.data.augment import AugmentConfig, two_views
from mocosfl_jax.federated.state import TrainState
from mocosfl_jax.methods.mocosfl.step import Batch, Method, Rates, train_step


class Images(NamedTuple):
    """Raw inputs of S steps.

    images: (S, C, B, H, W, 3) uint8. mask: (S, C, B) bool, False for padding. sync_now: (S,) bool,
    whether the step ends with a sync. sync_weight: (C,) float32, of each slot in an average.
    """

    images: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    sync_now: jax.Array | np.ndarray
    sync_weight: jax.Array | np.ndarray


class Normalisation(NamedTuple):
    """Mean and deviation of each channel, (3,) float32, of pixels in [0, 1]."""

    mean: jax.Array
    std: jax.Array


class DispatchOutput(NamedTuple):
    """What a dispatch of S steps reports.

    loss, accuracy: (S,) of each step, before its update. learning_rate: (S,) float32, the server's
    rate in each step. finite: () bool, whether every loss and every online parameter at the end is
    finite.
    """

    loss: jax.Array
    accuracy: jax.Array
    learning_rate: jax.Array
    finite: jax.Array


@dataclass(frozen=True)
class Program:
    """What a dispatch computes, fixed for a run; hashable.

    method: the step. augment: of both views. learning_rate, client_learning_rate: at the start.
    schedule: factor on both rates, a function of the step as a float.
    """

    method: Method
    augment: AugmentConfig
    learning_rate: float
    client_learning_rate: float
    schedule: optax.Schedule


def rate_schedule(name: str, total_steps: int) -> optax.Schedule:
    """Factor on both learning rates at each step.

    `cosine` falls to 0 over the run; `step` drops to 0.1 at 60 % and 0.01 at 80 %; `constant` is 1.
    """
    if name == "cosine":
        return optax.cosine_decay_schedule(1.0, total_steps)
    if name == "step":
        drops = {int(0.6 * total_steps): 0.1, int(0.8 * total_steps): 0.1}
        return optax.piecewise_constant_schedule(1.0, drops)
    return optax.constant_schedule(1.0)


def run_dispatch(
    program: Program,
    state: TrainState,
    inputs: Images,
    normalisation: Normalisation,
    augment_key: jax.Array,
) -> tuple[TrainState, DispatchOutput]:
    """Takes S steps of one round; pure.

    Args:
      program: static.
      state: within a round, see `begin_round`.
      augment_key: of the run; an image's key folds in step, client id and position in the batch, so
        that no generator is part of the state.
    """

    def one_step(state: TrainState, step: tuple[jax.Array, ...]):
        images_CBHWC, mask_CB, sync_now = step
        query, key = _augmented(program, state, images_CBHWC, normalisation, augment_key)
        factor = jnp.asarray(program.schedule(state.step.astype(jnp.float32)), jnp.float32)
        rates = Rates(program.learning_rate * factor, program.client_learning_rate * factor)
        batch = Batch(query, key, mask_CB, jnp.asarray(inputs.sync_weight))
        state, output = train_step(program.method, state, batch, rates, sync_now)
        return state, (output.loss, output.accuracy, rates.server)

    steps = tuple(jnp.asarray(x) for x in (inputs.images, inputs.mask, inputs.sync_now))
    state, (loss, accuracy, learning_rate) = jax.lax.scan(one_step, state, steps)
    finite = program.method.axes.all(_all_finite((loss, state.server, state.cohort)))
    return state, DispatchOutput(loss, accuracy, learning_rate, finite)


def _augmented(
    program: Program,
    state: TrainState,
    images_CBHWC: jax.Array,
    normalisation: Normalisation,
    augment_key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Two views of every image, (C, B, size, size, 3) each."""
    cohort_size, batch_size, *image_shape = images_CBHWC.shape
    step_key = jax.random.fold_in(augment_key, state.step)
    client_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, state.cohort_ids)
    keys_CB = jax.vmap(lambda key: jax.random.split(key, batch_size))(client_keys)
    views = two_views(
        keys_CB.reshape(-1),
        images_CBHWC.reshape(-1, *image_shape),
        program.augment,
        normalisation.mean,
        normalisation.std,
    )
    query, key = (v.reshape(cohort_size, batch_size, *v.shape[1:]) for v in views)
    return query, key


def _all_finite(tree) -> jax.Array:
    """Whether every float in the tree is finite, () bool."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]).all()
