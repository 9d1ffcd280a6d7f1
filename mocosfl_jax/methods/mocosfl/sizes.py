"""What MocoSFL sends, holds within a step and has a client compute: shapes, for counting."""

from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.federated.contract import ClientWork, Message, Tree, Work
from mocosfl_jax.methods.mocosfl import client as client_side
from mocosfl_jax.methods.mocosfl import server as server_side
from mocosfl_jax.methods.mocosfl.client import ClientSide, ClientState, Pending
from mocosfl_jax.methods.mocosfl.messages import ClientModel, LatentGradient, Latents, Params
from mocosfl_jax.methods.mocosfl.saving import LATENTS_ONLY, SILENT, StoredLatents
from mocosfl_jax.models.split import Variables

if TYPE_CHECKING:
    from mocosfl_jax.methods.mocosfl.method import MocoSFL


def client_work(method: "MocoSFL", images: jax.ShapeDtypeStruct) -> ClientWork:
    """A client's work. images: of a step, (B, S, S, 3)."""

    def participant(key: jax.Array) -> ClientState:
        server = method.init(key, key)
        return method.join(server, method.own(server, key)).client

    side, state = method.client, jax.eval_shape(participant, jax.random.key(0))
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


def traffic(method: "MocoSFL", images: jax.ShapeDtypeStruct) -> tuple[Message, ...]:
    """Masks, one bit a row, are not counted."""
    if method.status == SILENT:
        return ()
    state, latents, _ = _one_client(method, images)
    sent = (
        Message("query latents", True, "step", _on_wire(method, latents.query), "latents"),
        Message("key latents", True, "step", _on_wire(method, latents.key), "latents"),
    )
    weights = client_side.upload(state, method.align)
    if method.status == LATENTS_ONLY:
        handed = method.saving is not None and method.saving.hands_out
        return *sent, *[Message("client model", False, "round", weights)] * handed
    if method.client.frozen:  # the key encoder is the same model
        return *sent, Message("client model", False, "once", ClientModel(state.params, None))
    return (
        *sent,
        Message("gradient of query latents", False, "step", latents.query, "gradients"),
        Message("client model", True, "sync", weights),
        Message("average of client models", False, "sync", weights),
    )


def _on_wire(method: "MocoSFL", latents: Any) -> Tree:
    release = method.client.release
    return latents if release is None else release.on_wire(latents)


def stored_latents(method: "MocoSFL", slots: int) -> StoredLatents:
    """Shapes of what is stored of a round, (C, steps, ...)."""
    saving = method.saving
    assert saving is not None, "nothing is stored without"
    images = jax.ShapeDtypeStruct(saving.images, jnp.float32)
    _, latents, _ = _one_client(method, images)
    mask = jax.ShapeDtypeStruct(images.shape[:1], bool)
    step = StoredLatents(latents.query, latents.key, cast(Any, mask))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((slots, saving.steps, *x.shape), x.dtype), step
    )


def working_set(method: "MocoSFL", images: jax.ShapeDtypeStruct, slots: int) -> Tree:
    _, latents, pending = _one_client(method, images)
    extra: Tree = ()
    if method.client.extra_gradient is not None:
        query: Any = latents.query
        pixels = jax.ShapeDtypeStruct((query.shape[0], *images.shape[1:]), images.dtype)
        extra = method.client.extra_gradient.working_set(pixels, query)
    variables = method.model.shapes()
    groups, width = slots if method.private_queues else 1, method.model.head.width
    rows, views = slots * latents.query.shape[0], 2 if method.server.loss.swapped else 1

    def backward(variables: Variables, latents_R: jax.Array, keys_RD: jax.Array, queue: Any):
        def loss(params: Params) -> jax.Array:
            queries, keys, mask = (latents_R,) * views, (keys_RD,) * views, jnp.ones(rows, bool)
            return server_side.contrast(
                method.server, params, variables.stats, queries, keys, queue, mask
            ).loss

        return jax.vjp(loss, variables.server)[1]

    kept = jax.eval_shape(
        backward,
        variables,
        jax.ShapeDtypeStruct((rows, *latents.query.shape[1:]), latents.query.dtype),
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((groups, method.queue_rows, width), jnp.float32),
    )
    of_clients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype),
        (pending.backward, variables.client, extra),
    )
    gradients = 2 if method.chunks > 1 else 1  # chunks add up theirs
    new_models = 2  # the online model and the key encoder, beside the old ones
    return of_clients, kept, [variables.server] * (gradients + new_models)


def _one_client(
    method: "MocoSFL", images: jax.ShapeDtypeStruct
) -> tuple[ClientState, Latents, Pending]:
    """Shapes of a client's state, of what it sends in a step, and of what it then holds."""

    def one_step(params: Params, images: jax.Array) -> tuple[ClientState, Latents, Pending]:
        state = ClientState(params, params, optax.EmptyState())
        mask = jnp.ones(images.shape[0], bool)
        rng = jax.random.key(0) if method.client.needs_key else None
        return client_side.forward(method.client, state, images, images, mask, rng)

    variables = method.model.shapes()
    return jax.eval_shape(one_step, variables.client, images)
