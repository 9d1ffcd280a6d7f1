"""One MocoSFL step: the composition, in the documented order (docs/method.md)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.federated.average import sync
from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.federated.state import ClientState, ServerState, TrainState
from mocosfl_jax.learning.ema import ema_update
from mocosfl_jax.learning.queue import enqueue
from mocosfl_jax.learning.sgd import sgd_update
from mocosfl_jax.methods.mocosfl.client import client_forward
from mocosfl_jax.methods.mocosfl.server import ServerLoss, contrast, embed_views, split_groups
from mocosfl_jax.models.split import Params, SplitModel

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
    cohort_chunks: equal parts of the cohort (of this device) that run one after the other, so that
      activations of one part exist at a time; 1 for a BatchNorm head, which sees all rows at once.
    axes: mesh axes over which cohort and server rows are spread.
    """

    model: SplitModel
    optimizer: optax.GradientTransformation
    loss: str
    temperature: float
    ema: float
    align_momentum: bool
    frozen_clients: bool = False
    cohort_chunks: int = 1
    axes: Axes = NO_MESH

    def __post_init__(self) -> None:
        """Raises: ValueError: parts of a cohort with a BatchNorm head."""
        if self.cohort_chunks > 1 and self.model.head.batch_norm:
            raise ValueError(
                f"cohort_chunks = {self.cohort_chunks}: a BatchNorm head needs all rows: 1"
            )


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


class _Sums(NamedTuple):
    """What adds up over parts of the cohort. loss: see `contrast`, over the weight of all rows."""

    server_grad: Params
    loss: jax.Array
    correct: jax.Array


class _Part(NamedTuple):
    """What each part of the cohort has for itself, leading axis by slot or row.

    keys: unit keys (R, D) of each view. stats, momentum_stats: of a BatchNorm head.
    """

    cohort: ClientState
    keys: tuple[jax.Array, ...]
    latent_grad: jax.Array
    stats: Params
    momentum_stats: Params


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
    axes, server = method.axes, state.server
    rows = batch.mask.astype(jnp.float32).sum() * (2 if method.loss == "client" else 1)
    weight = axes.sum(rows)
    momentum = ema_update(server.momentum, server.params, method.ema)
    encoders = axes.gather_server(server.params), axes.gather_server(momentum)

    # 1. to 3., and the clients' part of 5.: all that belongs to rows.
    def part(cohort: ClientState, batch: Batch) -> tuple[_Sums, _Part]:
        return _part(method, state, encoders, weight, rates.client, cohort, batch)

    sums, parts = _over_chunks(part, method, state.cohort, batch)

    # 4. Enqueue, the second direction's keys first.
    state = _enqueue(state.replace(cohort=parts.cohort), parts.keys[::-1], batch.mask, axes)

    # 5. The server's update; the clients' were made with their rows.
    server_grad = axes.sum_server(sums.server_grad, server.params)
    params, buffers = sgd_update(
        method.optimizer, server.params, server.buffers, server_grad, rates.server
    )

    # 6. Sync. Frozen clients stay alike without one.
    cohort = state.cohort
    if not method.frozen_clients:
        cohort = jax.lax.cond(
            sync_now,
            lambda c: sync(c, batch.sync_weight, method.align_momentum, axes),
            lambda c: c,
            cohort,
        )
    state = state.replace(
        step=state.step + 1,
        cohort=cohort,
        server=ServerState(params, momentum, buffers, parts.stats, parts.momentum_stats),
    )
    loss, correct = axes.sum((sums.loss, sums.correct))
    return state, StepOutput(loss, 100 * correct / weight, parts.latent_grad)


def _part(
    method: Method,
    state: TrainState,
    encoders: tuple[Params, Params],
    weight: jax.Array,
    client_rate: jax.Array,
    cohort: ClientState,
    batch: Batch,
) -> tuple[_Sums, _Part]:
    """Forward and backward pass of some slots, and the updates of their clients.

    Args:
      state: as the step began; its queue is the one that all parts meet.
      encoders: whole server parameters, online ones and momentum ones after their move.
      weight: () rows that count in the step.
      cohort, batch: of these slots.
    """
    model, server = method.model, state.server
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

    # 2. The server's momentum model gives the keys.
    key_views = (key_R, query_R) if method.loss == "server" else (key_R,)
    keys = embed_views(model, encoders[1], server.momentum_stats, key_views, mask_R)

    # 3. The loss against the queue as it was, and its gradients.
    queue_GKD = state.queue_groups(cohort)
    key_R = jax.lax.stop_gradient(key_R)

    def mean_loss(params: Params, query_R: jax.Array) -> tuple[jax.Array, ServerLoss]:
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

    (loss, result), (server_grad, latent_grad_R) = jax.value_and_grad(
        mean_loss, argnums=(0, 1), has_aux=True
    )(encoders[0], query_R)
    latent_grad = latent_grad_R.reshape(clients.query.shape)

    # 5. Each client's update with its slice of the gradient.
    cohort = cohort.replace(momentum=clients.momentum)
    if clients.backward is not None:
        (client_grad,) = jax.vmap(lambda backward, grad: backward(grad))(
            clients.backward, latent_grad
        )
        params, buffers = jax.vmap(
            lambda p, b, g: sgd_update(method.optimizer, p, b, g, client_rate)
        )(cohort.params, cohort.buffers, client_grad)
        cohort = cohort.replace(params=params, buffers=buffers)
    sums = _Sums(server_grad, loss, result.correct)
    return sums, _Part(cohort, keys.unit, latent_grad, result.stats, keys.stats)


def _over_chunks(
    part: Callable[[ClientState, Batch], tuple[_Sums, _Part]],
    method: Method,
    cohort: ClientState,
    batch: Batch,
) -> tuple[_Sums, _Part]:
    """`part` of the whole cohort: at once, or chunk by chunk with summed gradients."""
    if method.cohort_chunks == 1:
        return part(cohort, batch)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(method.cohort_chunks, -1, *x.shape[1:])

    def body(total: _Sums, chunk: tuple[ClientState, Batch]) -> tuple[_Sums, _Part]:
        sums, own = part(*chunk)
        return jax.tree.map(jnp.add, total, sums), own

    chunks = jax.tree.map(split, (cohort, batch))
    shapes = jax.eval_shape(lambda c: part(*c)[0], jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, parts = jax.lax.scan(body, method.axes.vary(zeros), chunks)
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


def _concatenate(latents_CB: jax.Array) -> jax.Array:
    """(C, B, ...) to server rows (C * B, ...), in cohort order: a reshape."""
    return latents_CB.reshape(-1, *latents_CB.shape[2:])


def _enqueue(
    state: TrainState, keys: tuple[jax.Array, ...], mask_CB: jax.Array, axes: Axes
) -> TrainState:
    """Writes each view's keys in order: to the shared queue, or each client's rows to its own."""
    slots = mask_CB.shape[0]
    views = keys[0].shape[0] // mask_CB.size  # in one array: 2 for the `client` loss
    mask_CM = jnp.concatenate([mask_CB] * views, axis=1)
    if state.queue is None:
        assert state.cohort.queue is not None, "one of the two queues exists"
        keys_CMD = jnp.concatenate([split_groups(k, slots) for k in keys], axis=1)
        mask_CM = jnp.concatenate([mask_CM] * len(keys), axis=1)
        queues = jax.vmap(enqueue)(state.cohort.queue, keys_CMD, mask_CM)
        return state.replace(cohort=state.cohort.replace(queue=queues))
    keys_VRD = axes.gather_rows(jnp.stack(keys), axis=1)
    mask_VR = axes.gather_rows(jnp.stack([mask_CM.reshape(-1)] * len(keys)), axis=1)
    queue = enqueue(state.queue, keys_VRD.reshape(-1, keys_VRD.shape[-1]), mask_VR.reshape(-1))
    return state.replace(queue=queue)
