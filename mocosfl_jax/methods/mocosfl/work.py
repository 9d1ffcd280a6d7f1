"""What a client of MocoSFL computes, for counting: its two parts of a step as one function."""

from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.federated.contract import ClientWork, Work
from mocosfl_jax.methods.mocosfl import client as client_side
from mocosfl_jax.methods.mocosfl.client import ClientSide, ClientState
from mocosfl_jax.methods.mocosfl.messages import LatentGradient, Params


def client_work(side: ClientSide, state: ClientState, images: jax.ShapeDtypeStruct) -> ClientWork:
    """A client's work.

    Args: state: shapes of a participant's state. images: of a step, (B, S, S, 3).
    """
    rng = jax.eval_shape(lambda: jax.random.key(0)) if side.needs_key else None
    train = _frozen(side, state, images, rng) if side.frozen else _trained(side, state, images, rng)

    def infer(params: Params, images: jax.Array) -> Any:
        return side.net.apply({"params": params}, images)

    return ClientWork(train, Work(infer, (state.params, images), replaces=False))


def _trained(side: ClientSide, state: ClientState, images: jax.ShapeDtypeStruct, rng: Any) -> Work:
    """`forward`, then `update` with the server's gradient."""

    def step(state: ClientState, query: Any, key: Any, gradient: Any, rng: Any) -> Any:
        mask, number = jnp.ones(images.shape[0], bool), jnp.float32(0.5)
        state, sent, pending = client_side.forward(side, state, query, key, mask, rng)
        state, metrics = client_side.update(
            side,
            state,
            pending,
            LatentGradient(gradient),
            rate=number,
            to_pixels=lambda view: view * number + number,
            rng=rng,
            progress=number,
        )
        return state, (sent.query, sent.key), metrics

    rows = images.shape[0] * (2 if side.both_views else 1)
    views = jax.ShapeDtypeStruct((rows, *images.shape[1:]), images.dtype)
    gradient = jax.eval_shape(
        lambda *args: client_side.latents(side, *args), state.params, views, rng
    )
    return Work(step, (state, images, images, gradient, rng), replaces=True)


def _frozen(side: ClientSide, state: ClientState, images: jax.ShapeDtypeStruct, rng: Any) -> Work:
    """Latents of both views by one model: the key encoder of a frozen client is the same."""

    def step(params: Params, query: Any, key: Any, rng: Any) -> Any:
        if side.both_views:
            query, key = jnp.concatenate([query, key]), jnp.concatenate([key, query])
        rngs = (None, None) if rng is None else jax.random.split(rng, 2)
        views = zip((query, key), rngs, strict=True)
        return [client_side.latents(side, params, view, own) for view, own in views]

    return Work(step, (state.params, images, images, rng), replaces=False)
