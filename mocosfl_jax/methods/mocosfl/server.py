"""What the server computes on the concatenated latents of the cohort."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mocosfl_jax.learning.infonce import infonce, normalize
from mocosfl_jax.models.split import Params, SplitModel


class Embedded(NamedTuple):
    """unit: one (R, D) array of unit rows per view. stats: head statistics after all views."""

    unit: tuple[jax.Array, ...]
    stats: Params


class ServerLoss(NamedTuple):
    """Sums over this device's rows; divide by the weight of all devices.

    loss: sum over rows that count, all views added. correct: rows of the last view whose positive
    wins. stats: head statistics of the online model.
    """

    loss: jax.Array
    correct: jax.Array
    stats: Params


def embed_views(
    model: SplitModel,
    params: Params,
    stats: Params,
    views: tuple[jax.Array, ...],
    mask_R: jax.Array,
) -> Embedded:
    """Unit embeddings of each view's latents (R, h, w, c).

    All views pass the backbone in one batch (GroupNorm keeps rows apart) and the head one by one,
    as a BatchNorm head normalises each view by itself.
    """
    features = model.features(params, jnp.concatenate(views))
    unit = []
    for features_RF in jnp.split(features, len(views)):
        embedding, stats = model.embed(params, stats, features_RF, mask_R, train=True)
        unit.append(normalize(embedding))
    return Embedded(tuple(unit), stats)


def contrast(
    model: SplitModel,
    params: Params,
    stats: Params,
    query_views: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    queue_GKD: jax.Array,
    mask_R: jax.Array,
    temperature: float,
) -> ServerLoss:
    """InfoNCE of each view's queries against its keys and the queue.

    Args:
      query_views: latents (R, h, w, c) of each view.
      keys: unit keys (R, D) of each view.
      queue_GKD: G queues. Rows fall into G equal groups in order, and group g meets queue g only:
        G = 1 is the shared queue, G = C are private ones.
      mask_R: bool, rows that count.
    """
    embedded = embed_views(model, params, stats, query_views, mask_R)
    groups = queue_GKD.shape[0]
    grouped = jax.vmap(infonce, in_axes=(0, 0, 0, None))
    total = jnp.zeros(())
    correct = jnp.zeros(())
    for query_RD, key_RD in zip(embedded.unit, keys, strict=True):
        rows = grouped(
            split_groups(query_RD, groups), split_groups(key_RD, groups), queue_GKD, temperature
        )
        total += jnp.sum(jnp.where(mask_R, rows.loss.reshape(-1), 0.0))
        correct = jnp.sum(jnp.where(mask_R, rows.correct.reshape(-1), False).astype(jnp.float32))
    return ServerLoss(total, correct, embedded.stats)


def split_groups(x_R: jax.Array, groups: int) -> jax.Array:
    """(R, ...) to (G, R / G, ...)."""
    return x_R.reshape(groups, -1, *x_R.shape[1:])
