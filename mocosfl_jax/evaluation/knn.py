"""Weighted k-nearest-neighbour classification of frozen features: the monitor during training.

Reference: Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018, section 3.4.
"""

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.features import check_labelled
from mocosfl_jax.federated.placement import Placement, single_device

CHUNK = 500
"""Queries that meet the bank at once on each device."""

# exp(1 / temperature), summed over any number of neighbours, must stay finite in float32.
_SMALLEST_TEMPERATURE = 0.02


def knn_scores(
    features_MD: jax.Array,
    bank_ND: jax.Array,
    bank_labels_N: jax.Array,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> jax.Array:
    """Class scores of each query: the summed weights of its nearest neighbours of that class.

    Both sets are L2-normalised here; the nearest are the k of largest cosine similarity, found
    exactly, and a neighbour's weight is exp(similarity / temperature). Jittable with
    `num_classes`, `k` and `temperature` static.

    Args:
      features_MD: queries, float.
      bank_ND: the labelled set, float. N is the bank's size here.
      bank_labels_N: integers in [0, num_classes).
      num_classes: width of the scores.
      k: neighbours that vote, >= 1; the whole bank where it is smaller.
      temperature: >= 0.02, so that the scores are finite.

    Returns:
      float32 (M, num_classes). The prediction is the argmax (the lowest class of a tie).

    Raises:
      InputError: k or temperature below its smallest value.
    """
    check_voting(k, temperature)
    unit_MD, unit_bank_ND = unit_rows(features_MD), unit_rows(bank_ND)
    return _vote(unit_MD, unit_bank_ND, bank_labels_N, num_classes, k, temperature)


def knn_top1(
    features_MD: np.ndarray,
    labels_M: np.ndarray,
    bank_ND: np.ndarray,
    bank_labels_N: np.ndarray,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    chunk_size: int = CHUNK,
    placement: Placement | None = None,
    before_chunk: Callable[[], None] | None = None,
) -> float:
    """Top-1 accuracy in percent of the `knn_scores` prediction.

    Queries go through in chunks, so that at most (chunk_size, N) similarities exist at once.

    Args:
      features_MD: queries, float.
      labels_M: their classes, integers in [0, num_classes).
      bank_ND: the labelled set, as in `knn_scores`.
      bank_labels_N: as in `knn_scores`.
      num_classes: number of classes.
      k: as in `knn_scores`.
      temperature: as in `knn_scores`.
      chunk_size: queries at a time on each device, >= 1; no effect on the result.
      placement: of the devices that share the queries; None: the first one.
      before_chunk: called before each chunk; may raise to end the work.

    Raises:
      InputError: what `check_labelled` and `knn_scores` refuse, sets of two widths, or a
        chunk size below 1.
    """
    check_labelled("query", features_MD, labels_M, num_classes)
    check_labelled("bank", bank_ND, bank_labels_N, num_classes)
    check_voting(k, temperature)
    if features_MD.shape[1] != bank_ND.shape[1]:
        raise InputError("query_features width", features_MD.shape[1], f"bank's {bank_ND.shape[1]}")
    if chunk_size < 1:
        raise InputError("chunk_size", chunk_size, ">= 1")

    placement = placement or single_device()
    replicated, rows = placement.replicated, placement.rows()
    vote = _spread_vote(placement, num_classes, k, temperature)
    bank = unit_rows(placement.put_array(bank_ND, replicated))
    bank_labels = placement.put_array(bank_labels_N, replicated)
    at_once = chunk_size * placement.devices
    correct = 0
    for start in range(0, len(features_MD), at_once):
        if before_chunk is not None:
            before_chunk()
        labels_Q = labels_M[start : start + at_once]
        padding = [(0, -len(labels_Q) % placement.devices), (0, 0)]
        queries_QD = np.pad(features_MD[start : start + at_once], padding)
        scores_QC = vote(unit_rows(placement.put_array(queries_QD, rows)), bank, bank_labels)
        predicted_Q = np.argmax(jax.device_get(scores_QC), axis=1)
        correct += int(np.sum(predicted_Q[: len(labels_Q)] == labels_Q))
    return 100.0 * correct / len(labels_M)


@functools.cache
def _spread_vote(
    placement: Placement, num_classes: int, k: int, temperature: float
) -> Callable[..., jax.Array]:
    """`_vote` with the queries sharded over the devices, the scores replicated."""
    replicated, rows = placement.replicated, placement.rows()
    spread = jax.shard_map(
        partial(_vote, num_classes=num_classes, k=k, temperature=temperature),
        mesh=placement.mesh,
        in_specs=(rows.spec, replicated.spec, replicated.spec),
        out_specs=rows.spec,
    )
    return jax.jit(lambda *arrays: jax.lax.with_sharding_constraint(spread(*arrays), replicated))


@jax.jit
def unit_rows(rows_MD: jax.Array) -> jax.Array:
    rows_MD = rows_MD.astype(jnp.float32)
    return rows_MD / jnp.maximum(jnp.linalg.norm(rows_MD, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames=("num_classes", "k", "temperature"))
def _vote(
    unit_MD: jax.Array,
    unit_bank_ND: jax.Array,
    bank_labels_N: jax.Array,
    num_classes: int,
    k: int,
    temperature: float,
) -> jax.Array:
    # Full float32: neighbours must not depend on a backend's short matrix products.
    similarity_MN = jnp.matmul(unit_MD, unit_bank_ND.T, precision=lax.Precision.HIGHEST)
    nearest_MK, index_MK = lax.top_k(similarity_MN, min(k, unit_bank_ND.shape[0]))
    label_MK = bank_labels_N[index_MK].astype(jnp.int32)
    return votes(nearest_MK, label_MK, num_classes, temperature)


@partial(jax.jit, static_argnames=("num_classes", "temperature"))
def votes(
    similarity_MK: jax.Array, label_MK: jax.Array, num_classes: int, temperature: float
) -> jax.Array:
    """The scores of `knn_scores` from the neighbours; one at -inf has no vote."""
    weight_MK = jnp.exp(similarity_MK / temperature)
    # Compare and sum, not scatter: XLA fuses it, and no backend changes the order between runs.
    votes_MKC = label_MK[:, :, None] == jnp.arange(num_classes, dtype=jnp.int32)[None, None]
    return jnp.sum(jnp.where(votes_MKC, weight_MK[:, :, None], 0.0), axis=1)


def check_voting(k: int, temperature: float) -> None:
    if k < 1:
        raise InputError("k", k, ">= 1")
    if temperature < _SMALLEST_TEMPERATURE:
        raise InputError("temperature", temperature, f">= {_SMALLEST_TEMPERATURE}")
