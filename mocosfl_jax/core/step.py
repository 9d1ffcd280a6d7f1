"""One MocoSFL step: the composition, in the documented order (docs/method.md)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.core.client import client_forward
from mocosfl_jax.core.ema import ema_update
from mocosfl_jax.core.queue import enqueue
from mocosfl_jax.core.server import contrast, embed_views, split_groups
from mocosfl_jax.core.sgd import sgd_update
from mocosfl_jax.core.state import TrainState
from mocosfl_jax.core.sync import sync
from mocosfl_jax.models.split import SplitModel

LOSSES = ("one_way", "server", "client")


@dataclass(frozen=True)
class Method:
    """What a step computes, fixed for a run; hashable.

    model: the split network.
    optimizer: direction of the update, see `sgd`; used on both sides.
    loss: `one_way`: queries of one view against keys of the other. `server`: plus the swapped
      direction, whose gradient stops at the server (the public code). `client`: both views through
      both client models, so that both directions train the clients (MonAcoSFL).
    temperature: T of InfoNCE.
    ema: decay of all momentum models.
    align_momentum: a sync averages momentum client models too.
    frozen_clients: client models are not trained: no client backward pass is compiled.
    axis_name: mesh axis over which cohort and server rows are spread, or None.
    """

    model: SplitModel
    optimizer: optax.GradientTransformation
    loss: str
    temperature: float
    ema: float
    align_momentum: bool
    frozen_clients: bool = False
    axis_name: str | None = None


class Batch(NamedTuple):
    """Inputs of one step.

    query, key: (C, B, H, W, 3) float32, two augmented, normalised views of the same images.
    mask: (C, B) bool, False for padding rows.
    sync_weight: (C,) float32, weight of each slot in an average, 0 for padding slots.
    """

    query: jax.Array
    key: jax.Array
    mask: jax.Array
    sync_weight: jax.Array


class Rates(NamedTuple):
    """Learning rates of this step, () float32."""

    server: jax.Array
    client: jax.Array


class StepOutput(NamedTuple):
    """What a step tells.

    loss: () mean over rows (views added), before the update. accuracy: () percent of rows whose
    positive beats the whole queue (of the second direction for `server`). latent_grad:
    (C, B', h, w, c), d loss / d query latents, what the clients are sent; B' = 2B for `client`,
    else B.
    """

    loss: jax.Array
    accuracy: jax.Array
    latent_grad: jax.Array


def train_step(
    method: Method, state: TrainState, batch: Batch, rates: Rates, sync_now: jax.Array | bool
) -> tuple[TrainState, StepOutput]:
    """Takes one step with the current cohort; pure.

    Args:
      method: static.
      state: within a round, see `begin_round`.
      batch: this step's images.
      rates: of server and clients.
      sync_now: () bool, whether the step ends with a sync.
    """
    model, cohort, server = method.model, state.cohort, state.server
    both_views = method.loss == "client"

    # 1. Each client: query latents; its momentum model moves; key latents.
    clients = jax.vmap(
        lambda params, momentum, query, key: client_forward(
            model,
            params,
            momentum,
            query,
            key,
            ema=method.ema,
            both_views=both_views,
            frozen=method.frozen_clients,
        )
    )(cohort.params, cohort.momentum, batch.query, batch.key)
    query_R, key_R = _concatenate(clients.query), _concatenate(clients.key)
    mask_CB = jnp.concatenate([batch.mask] * 2, axis=1) if both_views else batch.mask
    mask_R = mask_CB.reshape(-1)

    # 2. The server's momentum model moves, then gives the keys.
    momentum = ema_update(server.momentum, server.params, method.ema)
    key_views = (key_R, query_R) if method.loss == "server" else (key_R,)
    keys = embed_views(model, momentum, server.momentum_stats, key_views, mask_R)

    # 3. The loss against the queue as it was, and its gradients.
    queue_GKD = state.queue_groups()
    weight = _sum_over_devices(jnp.sum(mask_R.astype(jnp.float32)), method.axis_name)
    key_R = jax.lax.stop_gradient(key_R)

    def mean_loss(params, query_R):
        query_views = (query_R, key_R) if method.loss == "server" else (query_R,)
        result = contrast(
            model,
            params,
            server.stats,
            query_views,
            keys.unit,
            queue_GKD,
            mask_R,
            method.temperature,
        )
        return result.loss / weight, result

    (_, result), (server_grad, latent_grad_R) = jax.value_and_grad(
        mean_loss, argnums=(0, 1), has_aux=True
    )(_of_this_device(server.params, method.axis_name), query_R)
    server_grad = _sum_over_devices(server_grad, method.axis_name)

    # 4. Enqueue, the second direction's keys first.
    state = _enqueue(state, keys.unit[::-1], mask_R, method.axis_name)

    # 5. Updates: the server with its gradient, each client with its slice.
    params, buffers = sgd_update(
        method.optimizer, server.params, server.buffers, server_grad, rates.server
    )
    latent_grad = latent_grad_R.reshape(clients.query.shape)
    cohort = state.cohort.replace(momentum=clients.momentum)
    if clients.backward is not None:
        (client_grad,) = jax.vmap(lambda backward, grad: backward(grad))(
            clients.backward, latent_grad
        )
        client_params, client_buffers = jax.vmap(
            lambda p, b, g: sgd_update(method.optimizer, p, b, g, rates.client)
        )(cohort.params, cohort.buffers, client_grad)
        cohort = cohort.replace(params=client_params, buffers=client_buffers)

    # 6. Sync. Frozen clients stay alike without one.
    if not method.frozen_clients:
        cohort = jax.lax.cond(
            sync_now,
            lambda c: sync(c, batch.sync_weight, method.align_momentum, method.axis_name),
            lambda c: c,
            cohort,
        )
    state = state.replace(
        step=state.step + 1,
        cohort=cohort,
        server=server.replace(
            params=params,
            momentum=momentum,
            buffers=buffers,
            stats=result.stats,
            momentum_stats=keys.stats,
        ),
    )
    loss, correct = _sum_over_devices((result.loss, result.correct), method.axis_name)
    return state, StepOutput(loss / weight, 100 * correct / weight, latent_grad)


def _concatenate(latents_CB: jax.Array) -> jax.Array:
    """(C, B, ...) to server rows (C * B, ...), in cohort order: a reshape."""
    return latents_CB.reshape(-1, *latents_CB.shape[2:])


def _sum_over_devices(tree, axis_name: str | None):
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _of_this_device(tree, axis_name: str | None):
    """The same values, but a gradient with respect to them stays the one of this device's rows."""
    return tree if axis_name is None else jax.lax.pcast(tree, axis_name, to="varying")


def _enqueue(
    state: TrainState, keys: tuple[jax.Array, ...], mask_R: jax.Array, axis_name: str | None
) -> TrainState:
    """Writes each view's keys in order: to the shared queue, or each client's rows to its own."""
    if state.queue is None:
        assert state.cohort.queue is not None, "one of the two queues exists"
        slots = state.cohort_ids.shape[0]
        keys_CMD = jnp.concatenate([split_groups(k, slots) for k in keys], axis=1)
        mask_CM = jnp.concatenate([split_groups(mask_R, slots)] * len(keys), axis=1)
        queues = jax.vmap(enqueue)(state.cohort.queue, keys_CMD, mask_CM)
        return state.replace(cohort=state.cohort.replace(queue=queues))
    keys_VRD, mask_VR = jnp.stack(keys), jnp.stack([mask_R] * len(keys))
    if axis_name is not None:
        keys_VRD, mask_VR = (
            jax.lax.all_gather(x, axis_name, axis=1, tiled=True, to="invarying")
            for x in (keys_VRD, mask_VR)
        )
    queue = enqueue(state.queue, keys_VRD.reshape(-1, keys_VRD.shape[-1]), mask_VR.reshape(-1))
    return state.replace(queue=queue)
