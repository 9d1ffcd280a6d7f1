"""What a MocoSFL step sends and keeps, from shapes alone."""

import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.federated.contract import Message, Tree
from mocosfl_jax.methods.mocosfl import client, server
from mocosfl_jax.methods.mocosfl.client import ClientSide, ClientState, Pending
from mocosfl_jax.methods.mocosfl.messages import Latents
from mocosfl_jax.methods.mocosfl.server import ServerSide
from mocosfl_jax.models.split import SplitModel, Variables


def traffic(
    model: SplitModel, side: ClientSide, aligned: bool, images: jax.ShapeDtypeStruct
) -> tuple[Message, ...]:
    """Messages of one client; see `Method.traffic`. Masks, one bit a row, are not counted."""
    state, latents, _ = _one_client(model, side, images)
    sent = (
        Message("query latents", True, "step", latents.query),
        Message("key latents", True, "step", latents.key),
    )
    if side.frozen:
        return sent
    weights = client.upload(state, aligned)
    return (
        *sent,
        Message("gradient of query latents", False, "step", latents.query),
        Message("client model", True, "sync", weights),
        Message("average of client models", False, "sync", weights),
    )


def working_set(
    model: SplitModel,
    client_side: ClientSide,
    server_side: ServerSide,
    images: jax.ShapeDtypeStruct,
    slots: int,
    queue_GKD: jax.ShapeDtypeStruct,
    server_gradients: int,
) -> Tree:
    """See `Method.working_set`. queue_GKD: see `server.contrast`."""
    _, latents, pending = _one_client(model, client_side, images)
    rows = slots * latents.query.shape[0]
    latents_R = jax.ShapeDtypeStruct((rows, *latents.query.shape[1:]), latents.query.dtype)
    keys_RD = jax.ShapeDtypeStruct((rows, model.head.width), jnp.float32)
    views = 2 if server_side.loss.swapped else 1

    def backward(variables: Variables, latents_R: jax.Array, keys_RD: jax.Array, queue: jax.Array):
        def loss(params: Tree) -> jax.Array:
            return server.contrast(
                model,
                params,
                variables.stats,
                (latents_R,) * views,
                (keys_RD,) * views,
                queue,
                jnp.ones(rows, bool),
                server_side.temperature,
            ).loss

        return jax.vjp(loss, variables.server)[1]

    kept = jax.eval_shape(backward, _variables(model), latents_R, keys_RD, queue_GKD)
    variables = _variables(model)
    of_clients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype),
        (pending.backward, variables.client),
    )
    new_models = [variables.server] * 2  # online model and key encoder, beside the old ones
    return of_clients, kept, [variables.server] * server_gradients, new_models


def _variables(model: SplitModel) -> Variables:
    return jax.eval_shape(model.init, jax.random.key(0))


def _one_client(
    model: SplitModel, side: ClientSide, images: jax.ShapeDtypeStruct
) -> tuple[ClientState, Latents, Pending]:
    """Shapes of a client's state, of what it sends in a step, and of what it then holds."""

    def one_step(params: Tree, images: jax.Array) -> tuple[ClientState, Latents, Pending]:
        state = ClientState(params, params, optax.EmptyState())
        mask = jnp.ones(images.shape[0], bool)
        rng = jax.random.key(0) if side.draws else None
        return client.forward(side, state, images, images, mask, rng)

    return jax.eval_shape(one_step, _variables(model).client, images)
