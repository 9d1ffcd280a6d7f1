"""Frozen features of whole data sets: encoded once, then read by every evaluation."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.placement import Placement, single_device

PyTree = Any
ApplyFn = Callable[..., PyTree]
"""From parameters, images and, where they are asked for, positions to a pytree of rows."""

_FEW = (1, 8, 32, 128, 256)
"""Rows that a small number of images is padded to: each size is compiled once."""


def encode(
    apply_fn: ApplyFn,
    params: PyTree,
    images_nHWC: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    placement: Placement | None = None,
    before_batch: Callable[[], None] | None = None,
    first_row: int | None = None,
) -> PyTree:
    """Runs a frozen encoder over unaugmented images, in order.

    Images travel to the device as uint8 and are normalised there: (image / 255 - mean) / std. All
    batches have the same number of rows, the last one padded: `batch_size`, or the number of images
    where that is smaller; a number up to 256 counts as the next of 1, 8, 32, 128 and 256. So
    `apply_fn` is traced once for an image shape and batch size, and only a few times more for small
    numbers of images, however many calls there are. That holds while `apply_fn` is the same object:
    pass a module-level function or the `apply` of one model object, not a lambda made anew for each
    call.

    Args:
      apply_fn: (params, float32 images (rows, H, W, channels)) to a pytree of arrays (rows, ...).
        No row may influence another (a batch norm uses running statistics).
      params: the encoder's variables, any pytree of arrays.
      images_nHWC: uint8 (n, H, W, channels), n >= 1.
      mean: of each channel, for pixels in [0, 1].
      std: of each channel, positive.
      batch_size: most rows a call, >= 1; rounded up to fill all devices.
      placement: of the devices that share the rows of a batch; None: the first one.
      before_batch: called before each batch is launched; what it raises ends the work, and nothing
        more is launched.
      first_row: position of the first image in a larger set: `apply_fn` then has a third argument,
        the positions of its rows, (rows,) int32. What it draws may depend on them.

    Returns:
      The pytree of `apply_fn` with NumPy leaves (n, ...).

    Raises:
      InputError: images that are not a non-empty uint8 (n, H, W, channels), a mean or std of
        another length than channels, a std that is not positive, or a batch size below 1.
    """
    _check(images_nHWC, mean, std, batch_size)
    mean_C, std_C = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    placement = placement or single_device()
    params = jax.device_put(params) if placement.devices == 1 else params
    rows_a_call = _rows_a_call(len(images_nHWC), batch_size, placement.devices)
    chunks, running = [], None
    for images_BHWC in _padded_batches(images_nHWC, rows_a_call):
        if before_batch is not None:
            before_batch()
        rows: tuple[np.ndarray, ...] = (images_BHWC,)
        if first_row is not None:
            rows += (np.arange(first_row, first_row + rows_a_call, dtype=np.int32),)
            first_row += rows_a_call
        placed = tuple(placement.put_array(row, placement.rows()) for row in rows)
        launched = _encode_batch(apply_fn, placement, params, placed, mean_C, std_C)
        if running is not None:  # fetched only now, so that two batches at most are on the device
            chunks.append(jax.device_get(running))
        running = launched
    chunks.append(jax.device_get(running))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(images_nHWC)], *chunks)


def check_labelled(
    where: str, features_MD: np.ndarray, labels_M: np.ndarray, num_classes: int
) -> None:
    """Checks a labelled set of features; `where` (as in `train`) leads the names in the errors.

    Raises:
      InputError: features that are not a non-empty (M, D) of finite numbers, labels that are not M
        integers, or a label outside [0, num_classes).
    """
    if np.ndim(features_MD) != 2 or 0 in np.shape(features_MD):
        raise InputError(f"{where}_features.shape", np.shape(features_MD), "non-empty (M, D)")
    if not np.isfinite(features_MD).all():
        bad = int(np.sum(~np.isfinite(features_MD).all(axis=1)))
        raise InputError(f"{where}_features", f"{bad} rows with nan or inf", "finite numbers")
    if np.shape(labels_M) != (len(features_MD),):
        raise InputError(f"{where}_labels.shape", np.shape(labels_M), f"({len(features_MD)},)")
    if not np.issubdtype(labels_M.dtype, np.integer):
        raise InputError(f"{where}_labels.dtype", str(labels_M.dtype), "an integer type")
    low, high = int(np.min(labels_M)), int(np.max(labels_M))
    if low < 0 or high >= num_classes:
        raise InputError(f"{where}_labels range", (low, high), f"in [0, {num_classes})")


@partial(jax.jit, static_argnums=(0, 1))
def _encode_batch(apply_fn: ApplyFn, placement: Placement, params: PyTree, *arrays: Any) -> PyTree:
    """The rows of a batch on all devices, the outputs replicated."""

    def rows(params: PyTree, batch: Any, mean_C: jax.Array, std_C: jax.Array) -> PyTree:
        images, *positions = batch
        scaled = images.astype(jnp.float32) / 255.0
        normalised = (scaled - mean_C[None, None, None]) / std_C[None, None, None]
        return apply_fn(params, normalised, *positions)

    split, replicated = placement.rows().spec, placement.replicated.spec
    spread = jax.shard_map(
        rows,
        mesh=placement.mesh,
        in_specs=(replicated, split, replicated, replicated),
        out_specs=split,
    )
    return jax.lax.with_sharding_constraint(spread(params, *arrays), placement.replicated)


def _rows_a_call(number: int, batch_size: int, devices: int) -> int:
    """Rows of a batch: `batch_size`, fewer for few images, rounded up to fill all devices."""
    needed = next((few for few in _FEW if few >= number), number)
    return -(-min(batch_size, needed) // devices) * devices


def _padded_batches(images_nHWC: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images_nHWC), batch_size):
        batch_BHWC = images_nHWC[start : start + batch_size]
        missing = batch_size - len(batch_BHWC)
        yield np.pad(batch_BHWC, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch_BHWC


def _check(
    images_nHWC: np.ndarray, mean: Sequence[float], std: Sequence[float], batch_size: int
) -> None:
    if images_nHWC.dtype != np.uint8:
        raise InputError("images.dtype", str(images_nHWC.dtype), "uint8")
    if images_nHWC.ndim != 4 or len(images_nHWC) == 0:
        raise InputError("images.shape", images_nHWC.shape, "(n, H, W, channels), n >= 1")
    channels = images_nHWC.shape[3]
    for where, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise InputError(where, tuple(values), f"one number for each of {channels} channels")
    if min(std) <= 0:
        raise InputError("std", tuple(std), "positive numbers")
    if batch_size < 1:
        raise InputError("batch_size", batch_size, ">= 1")
