"""What travels between a MocoSFL client and the server: pytrees, without a client axis."""

from typing import Any, NamedTuple

import jax

Params = Any
"""Pytree of float32 arrays."""


class Latents(NamedTuple):
    """Up, each step. B' = B, or 2B where both views pass through both encoders.

    query: (B', h, w, c), of the online client model. key: (B', h, w, c), of its key encoder; no
    gradient comes back for it. mask: (B',) bool, rows that count.
    """

    query: jax.Array
    key: jax.Array
    mask: jax.Array


class LatentGradient(NamedTuple):
    """Down, each step, unless clients are frozen.

    query: (B', h, w, c), d loss / d query latents.
    """

    query: jax.Array


class ClientModel(NamedTuple):
    """Up and, averaged, down at a sync.

    params: the online client model. key_params: its key encoder where these are aligned, else None.
    """

    params: Params
    key_params: Params | None
