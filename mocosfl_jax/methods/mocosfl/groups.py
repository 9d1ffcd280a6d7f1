"""What clients and server exchange, by group of slots, where clients take batches of two sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from mocosfl_jax.federated.axes import Axes
from mocosfl_jax.federated.slots import in_one, rows_by_group
from mocosfl_jax.methods.mocosfl.messages import LatentGradient, Latents


class Messages(NamedTuple):
    """What travelled in a step, leading axis C; where batches differ, a tuple of such by group."""

    latents: Any
    gradient: Any


def messages_of(latents: Any, latent_grad_R: jax.Array, parts: int) -> Messages:
    """Args: latents: as in `Messages`. parts: see `by_client`."""
    if isinstance(latents, Latents):
        return Messages(latents, *by_client(latent_grad_R, (latents,)))
    return Messages(latents, tuple(by_client(latent_grad_R, latents, parts)))


def by_client(
    latent_grad_R: jax.Array, latents: Sequence[Latents], parts: int = 1
) -> list[LatentGradient]:
    """The gradient of each client's query latents, (C, B', h, w, c), by group.

    Args:
      latent_grad_R: of the server's rows.
      latents: what the clients of each group sent.
      parts: equal ones, in each of which the rows of all groups come one after another.
    """
    shapes = [sent.query.shape for sent in latents]
    sizes = [shape[0] * shape[1] for shape in shapes]
    rows = rows_by_group(latent_grad_R, sizes, parts)
    return [LatentGradient(x.reshape(shape)) for x, shape in zip(rows, shapes, strict=True)]


def gather_keys(
    keys: tuple[jax.Array, ...], latents: Sequence[Latents], parts: int, axes: Axes
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Keys of all devices and their mask, in the order of the cohort, whatever the devices are.

    Args: keys: of each view, (R, D) of this device. Others: as above.
    """
    masks = [sent.mask.reshape(-1) for sent in latents]
    sizes = [len(mask) for mask in masks]

    def gather(groups: Sequence[jax.Array]) -> jax.Array:
        return in_one([axes.gather_rows(rows, axis=0) for rows in groups])

    return tuple(gather(rows_by_group(key, sizes, parts)) for key in keys), gather(masks)
