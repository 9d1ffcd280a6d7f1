"""kNN on raw pixels: what neighbours say without an encoder, beside what they say with one.

Pixels are as wide as features get (3,072 numbers for 32x32 images), so the bank is not kept as
features: blocks of it are made from the images again and again, which costs far less than comparing
them, and memory does not grow with the data set.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mocosfl_jax.evaluation.features import encode
from mocosfl_jax.evaluation.knn import check_voting, unit_rows, votes

SIDE = 32
"""Largest side of the images that are compared, pixels."""

BLOCK = 2500
"""Queries, and images of the bank, whose features exist at once."""


class _Nearest(NamedTuple):
    """Neighbours found so far, the nearest first. similarity: (M, k) float32, -inf where there is
    none yet. label: (M, k) int32."""

    similarity: jax.Array
    label: jax.Array


def raw_pixel_features(
    images_nHWC: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    before_batch: Callable[[], None] | None = None,
) -> np.ndarray:
    """Normalised pixels of each image, reduced to at most 32x32: float32 (n, h * w * channels).

    A side that is longer is reduced with antialiasing; smaller images stay as they are.

    Args, Raises: those of `encode`.
    """
    return encode(_pixels, {}, images_nHWC, mean, std, batch_size, before_batch=before_batch)


def raw_pixel_top1(
    images_MHWC: np.ndarray,
    labels_M: np.ndarray,
    bank_NHWC: np.ndarray,
    bank_labels_N: np.ndarray,
    num_classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    k: int = 200,
    temperature: float = 0.1,
    batch_size: int = 500,
    before_batch: Callable[[], None] | None = None,
) -> float:
    """Top-1 accuracy in percent of `knn_top1` on `raw_pixel_features`, in bounded memory.

    It is computed on the first device, by every process for itself.

    Args:
      images_MHWC: queries, uint8.
      labels_M: their classes, integers in [0, num_classes).
      bank_NHWC: the labelled set, uint8, of the same size.
      bank_labels_N: its classes.
      num_classes: number of classes.
      mean, std, batch_size, before_batch: as in `encode`.
      k, temperature: as in `knn_scores`.

    Raises: InputError: what `encode` and `knn_scores` refuse.
    """
    check_voting(k, temperature)
    features = partial(
        raw_pixel_features, mean=mean, std=std, batch_size=batch_size, before_batch=before_batch
    )
    correct = 0
    for queries, labels in _blocks(images_MHWC, labels_M):
        query_MD = features(queries)
        none = (len(query_MD), k)
        best = _Nearest(jnp.full(none, -jnp.inf), jnp.zeros(none, jnp.int32))
        for images, bank_labels in _blocks(bank_NHWC, bank_labels_N):
            best = _nearer(best, query_MD, features(images), bank_labels.astype(np.int32))
            jax.block_until_ready(best)  # else a CPU would encode blocks faster than it uses them
        scores_MC = votes(*best, num_classes, temperature)
        correct += int(np.sum(np.argmax(jax.device_get(scores_MC), axis=1) == labels))
    return 100.0 * correct / len(labels_M)


def _pixels(_: Any, images_BHWC: jax.Array) -> jax.Array:
    rows, height, width, channels = images_BHWC.shape
    shape = (rows, min(height, SIDE), min(width, SIDE), channels)
    if shape != images_BHWC.shape:
        images_BHWC = jax.image.resize(
            images_BHWC, shape, "linear", antialias=True, precision=lax.Precision.HIGHEST
        )
    return images_BHWC.reshape(rows, -1)


def _blocks(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(images), BLOCK):
        yield images[start : start + BLOCK], labels[start : start + BLOCK]


@jax.jit
def _nearer(
    best: _Nearest, query_MD: jax.Array, bank_ND: jax.Array, labels_N: jax.Array
) -> _Nearest:
    """The nearest of those found so far and of one more block of the bank."""
    # Full float32, as in knn.py: neighbours must not depend on a backend's short products.
    similarity_MN = jnp.matmul(
        unit_rows(query_MD), unit_rows(bank_ND).T, precision=lax.Precision.HIGHEST
    )
    nearest, index = lax.top_k(similarity_MN, min(best.label.shape[1], len(labels_N)))
    similarity = jnp.concatenate([best.similarity, nearest], axis=1)
    label = jnp.concatenate([best.label, labels_N[index]], axis=1)
    nearest, index = lax.top_k(similarity, best.label.shape[1])
    return _Nearest(nearest, jnp.take_along_axis(label, index, axis=1))
