"""What one client computes. No client axis: `step` adds it with `jax.vmap`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mocosfl_jax.learning.ema import ema_update
from mocosfl_jax.models.split import Params, SplitModel


class ClientForward(NamedTuple):
    """One client's part of a step.

    query: latents (B', h, w, c) of its online model; B' = B, or 2B for the `client` loss.
    key: latents (B', h, w, c) of its momentum model, constant.
    momentum: its momentum model after the move.
    backward: from d loss / d query to the gradient of its online parameters; None if frozen.
    """

    query: jax.Array
    key: jax.Array
    momentum: Params
    backward: Callable[[jax.Array], tuple[Params]] | None


def client_forward(
    model: SplitModel,
    params: Params,
    momentum: Params,
    query_BHWC: jax.Array,
    key_BHWC: jax.Array,
    *,
    ema: float,
    both_views: bool,
    frozen: bool,
) -> ClientForward:
    """Latents of both views, in the reference's order (step 1 of docs/method.md).

    Args:
      query_BHWC, key_BHWC: two augmented views of the client's images, normalised float32.
      ema: decay of the momentum model, which moves towards `params` as they are before the update.
      both_views: each model sees both views, 2B rows (MonAcoSFL; the `client` loss).
      frozen: the client model is not trained, so nothing is kept for a backward pass.
    """
    if both_views:
        query_BHWC, key_BHWC = (
            jnp.concatenate([query_BHWC, key_BHWC]),
            jnp.concatenate([key_BHWC, query_BHWC]),
        )
    if frozen:
        query, backward = model.latents(params, query_BHWC), None
    else:
        query, backward = jax.vjp(lambda p: model.latents(p, query_BHWC), params)
    momentum = ema_update(momentum, params, ema)
    return ClientForward(query, model.latents(momentum, key_BHWC), momentum, backward)
