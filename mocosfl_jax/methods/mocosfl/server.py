"""What the server computes on the clients' latents. No client model, no mesh.

A step is `move_key_encoder`, `learn` on the rows of all clients, `write_keys` and `update`
(docs/method.md, steps 2 to 5). Rows of several clients stand one after another: R = C * B'.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.learning.ema import ema_update
from mocosfl_jax.learning.infonce import infonce, normalize
from mocosfl_jax.learning.losses import Loss
from mocosfl_jax.learning.queue import Queue, enqueue
from mocosfl_jax.learning.sgd import sgd_update
from mocosfl_jax.methods.mocosfl.messages import Latents, Params


class ServerNet(Protocol):
    """The server's part of the network; `SplitModel` is one."""

    def features(self, server_params: Params, latents_RHWC: jax.Array) -> jax.Array:
        """Pooled features (R, F) of latents."""

    def embed(
        self,
        server_params: Params,
        stats: Params,
        features_RF: jax.Array,
        mask_R: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, Params]:
        """Embeddings (R, D) and the head's new running statistics."""


@dataclass(frozen=True)
class ServerSide:
    """What the server computes with, fixed for a run; hashable.

    net: its part of the network. optimizer: see `sgd`. loss: which way views are contrasted.
    temperature: T of InfoNCE. ema: decay of the key encoder.
    ages: of keys, at which their mean similarity to queries is measured; 0: it is not.
    """

    net: ServerNet
    optimizer: optax.GradientTransformation
    loss: Loss
    temperature: float
    ema: float
    ages: int = 0


class ServerState(flax.struct.PyTreeNode):
    """The server's models.

    params: the online model, head included. key_params: the key encoder. opt_state: of SGD.
    stats, key_stats: running statistics of a BatchNorm head, else empty.
    """

    params: Params
    key_params: Params
    opt_state: optax.OptState
    stats: Params
    key_stats: Params


class Embedded(NamedTuple):
    """unit: one (R, D) array of unit rows per view. stats: head statistics after all views."""

    unit: tuple[jax.Array, ...]
    stats: Params


class Contrast(NamedTuple):
    """Sums over rows; divide by the number of rows that count.

    loss: all views added. correct: rows of the last view whose positive has the largest logit.
    stats: head statistics of the online model. queries: unit queries of all views that meet each
    queue, (G, D); None unless similarity is measured.
    """

    loss: jax.Array
    correct: jax.Array
    stats: Params
    queries: jax.Array | None


class Learned(NamedTuple):
    """What the rows of some clients give.

    server_grad: of the server's parameters; gradients of chunks add up. loss,
    correct, queries: see `Contrast`. latent_grad: of the query latents, (R, h, w, c). keys: unit
    keys (R, D) of each view. stats, key_stats: of both heads.
    """

    server_grad: Params
    loss: jax.Array
    correct: jax.Array
    latent_grad: jax.Array
    keys: tuple[jax.Array, ...]
    stats: Params
    key_stats: Params
    queries: jax.Array | None


def move_key_encoder(side: ServerSide, state: ServerState) -> Params:
    """The key encoder after its move towards the online model as it is."""
    return ema_update(state.key_params, state.params, side.ema)


def join(latents_C: Latents) -> Latents:
    """The rows of all clients, one after another: (C, B', ...) to (R, ...), which moves nothing."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), latents_C)


def learn(
    side: ServerSide,
    state: ServerState,
    latents_R: Latents,
    queue_GKD: jax.Array,
    count: jax.Array,
) -> Learned:
    """The loss against the queue as it was, and its gradients.

    Args:
      state: with the key encoder moved.
      latents_R: the rows of the clients, one after another.
      queue_GKD: G queues, see `contrast`.
      count: () float32, rows that count in the step, those of other devices or chunks included.
    """
    query_R, key_R, mask_R = latents_R
    key_views = (key_R, query_R) if side.loss.swapped else (key_R,)
    keys = embed_views(side.net, state.key_params, state.key_stats, key_views, mask_R)
    key_R = jax.lax.stop_gradient(key_R)

    def mean_loss(params: Params, query_R: jax.Array) -> tuple[jax.Array, Contrast]:
        query_views = (query_R, key_R) if side.loss.swapped else (query_R,)
        result = contrast(side, params, state.stats, query_views, keys.unit, queue_GKD, mask_R)
        return result.loss / count, result

    gradient = jax.grad(mean_loss, argnums=(0, 1), has_aux=True)
    (server_grad, latent_grad), result = gradient(state.params, query_R)
    return Learned(
        server_grad,
        result.loss,
        result.correct,
        latent_grad,
        keys.unit,
        result.stats,
        keys.stats,
        result.queries,
    )


def embed_views(
    net: ServerNet,
    params: Params,
    stats: Params,
    views: tuple[jax.Array, ...],
    mask_R: jax.Array,
) -> Embedded:
    """Unit embeddings of each view's latents (R, h, w, c).

    All views pass the backbone in one batch (GroupNorm keeps rows apart) and the head one by one,
    as a BatchNorm head normalises each view by itself.
    """
    features = net.features(params, jnp.concatenate(views))
    unit = []
    for features_RF in jnp.split(features, len(views)):
        embedding, stats = net.embed(params, stats, features_RF, mask_R, train=True)
        unit.append(normalize(embedding))
    return Embedded(tuple(unit), stats)


def contrast(
    side: ServerSide,
    params: Params,
    stats: Params,
    query_views: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    queue_GKD: jax.Array,
    mask_R: jax.Array,
) -> Contrast:
    """InfoNCE of each view's queries against its keys and the queue.

    Args:
      query_views: latents (R, h, w, c) of each view.
      keys: unit keys (R, D) of each view.
      queue_GKD: G queues. Rows fall into G equal groups in order, and group g meets queue g only:
        G = 1 is the shared queue, G = C are private ones.
      mask_R: bool, rows that count.
    """
    embedded = embed_views(side.net, params, stats, query_views, mask_R)
    groups = queue_GKD.shape[0]
    grouped = jax.vmap(infonce, in_axes=(0, 0, 0, None))
    total = jnp.zeros(())
    correct = jnp.zeros(())
    for query_RD, key_RD in zip(embedded.unit, keys, strict=True):
        query_GMD, key_GMD = split_groups(query_RD, groups), split_groups(key_RD, groups)
        rows = grouped(query_GMD, key_GMD, queue_GKD, side.temperature)
        total += jnp.sum(jnp.where(mask_R, rows.loss.reshape(-1), 0.0))
        correct = jnp.sum(jnp.where(mask_R, rows.correct.reshape(-1), False).astype(jnp.float32))
    queries = _sums(embedded.unit, mask_R, groups) if side.ages else None
    return Contrast(total, correct, embedded.stats, queries)


def _sums(views: tuple[jax.Array, ...], mask_R: jax.Array, groups: int) -> jax.Array:
    """Sums over the rows of each group that count, all views added, (G, D)."""
    rows_RD = jnp.where(mask_R[:, None], sum(views), 0.0)
    return split_groups(rows_RD, groups).sum(axis=1)


def split_groups(x_R: jax.Array, groups: int) -> jax.Array:
    """(R, ...) to (G, R / G, ...)."""
    return x_R.reshape(groups, -1, *x_R.shape[1:])


def write_keys(queue: Queue, keys: tuple[jax.Array, ...], mask_R: jax.Array) -> Queue:
    """The shared queue with the keys (R, D) of each view, the second view's first."""
    keys_VRD = jnp.stack(keys[::-1])
    mask_VR = jnp.stack([mask_R] * len(keys))
    return enqueue(queue, keys_VRD.reshape(-1, keys_VRD.shape[-1]), mask_VR.reshape(-1))


def write_private_keys(queues_C: Queue, keys: tuple[jax.Array, ...], mask_R: jax.Array) -> Queue:
    """The same for the private queues of C clients, each with the rows of its own client."""
    clients = queues_C.ptr.shape[0]
    keys_CMD = jnp.concatenate([split_groups(k, clients) for k in keys[::-1]], axis=1)
    mask_CM = jnp.concatenate([split_groups(mask_R, clients)] * len(keys), axis=1)
    return jax.vmap(enqueue)(queues_C, keys_CMD, mask_CM)


def update(
    side: ServerSide, state: ServerState, grad: Params, learned: Learned, rate: jax.Array
) -> ServerState:
    """One step of SGD.

    Args:
      state: with the key encoder moved.
      grad: of the parameters, summed over all rows.
      learned: its statistics are those after the step.
      rate: () float32, the server's learning rate.
    """
    params, opt_state = sgd_update(side.optimizer, state.params, state.opt_state, grad, rate)
    return ServerState(params, state.key_params, opt_state, learned.stats, learned.key_stats)
