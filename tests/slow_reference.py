"""MocoSFL, slowly: lists of clients, a loop, plain autodiff and NumPy queues; no code is shared
with the step but the network's forward passes."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.federated.contract import Batch
from mocosfl_jax.federated.state import TrainState
from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.models.split import SplitModel
from tests.tiny_method import (
    CLIENT_RATE,
    CLIENTS,
    DECAY,
    EMA,
    MOMENTUM,
    SERVER_RATE,
    TEMPERATURE,
    assert_close,
    at,
)


@dataclass
class World:
    """Every client by its id; one queue and pointer, or one for every client.

    common, common_key: the online model and, where these are aligned, the key encoder that all
    clients had after the last sync.
    """

    params: list[Any]
    key_params: list[Any]
    traces: list[Any]
    common: Any
    common_key: Any
    server: Any
    server_key: Any
    server_trace: Any
    stats: Any
    key_stats: Any
    queues: list[np.ndarray]
    ptrs: list[int]


def world_of(state: TrainState) -> World:
    """Every client of a state between two rounds."""
    kept, common, server = state.population, state.server.client, state.server.server
    aligned = common.key_params is not None
    queue = kept.queue or jax.tree.map(lambda x: x[None], state.server.queue)
    keys = [common.key_params if aligned else at(kept.key_params, i) for i in range(CLIENTS)]
    return World(
        params=[common.params] * CLIENTS,
        key_params=keys,
        traces=[trace_of(at(kept.opt_state, i), common.params) for i in range(CLIENTS)],
        common=common.params,
        common_key=common.key_params,
        server=server.params,
        server_key=server.key_params,
        server_trace=trace_of(server.opt_state, server.params),
        stats=server.stats,
        key_stats=server.key_stats,
        queues=[np.array(keys) for keys in queue.keys],
        ptrs=[int(ptr) for ptr in queue.ptr],
    )


def trace_of(opt_state: Any, params: Any) -> Any:
    """The trace in the shape of the parameters: the only arrays in the optimizer state."""
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(opt_state))


def ema(average: Any, online: Any) -> Any:
    return jax.tree.map(lambda m, p: EMA * m + (1 - EMA) * p, average, online)


def sgd_by_hand(params: Any, trace: Any, grads: Any, rate: float) -> tuple[Any, Any]:
    trace = jax.tree.map(lambda p, b, g: MOMENTUM * b + g + DECAY * p, params, trace, grads)
    return jax.tree.map(lambda p, b: p - rate * b, params, trace), trace


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt((x**2).sum(axis=1, keepdims=True))


def embed(model: SplitModel, params: Any, stats: Any, latents: jax.Array):
    rows = jnp.ones(len(latents), bool)
    out, stats = model.embed(params, stats, model.features(params, latents), rows, train=True)
    return unit(out), stats


def cross_entropy(query: jax.Array, key: jax.Array, queue_of_row: jax.Array):
    """Mean loss and percentage of rows won, from the logits of a 1 + K way classification."""
    positive = (query * key).sum(axis=1, keepdims=True)
    negative = (query[:, None] * queue_of_row).sum(axis=2)
    logits = jnp.concatenate([positive, negative], axis=1) / TEMPERATURE
    accuracy = 100 * jnp.mean(logits.argmax(axis=1) == 0)
    return -jax.nn.log_softmax(logits)[:, 0].mean(), accuracy


@functools.partial(jax.jit, static_argnums=(0, 1))
def reference_gradients(
    model: SplitModel, loss: str, trained, key_params, stats, queries, keys, queue_of_row
):
    """Loss and gradients by plain autodiff of the whole network, client by client.

    trained: (online client models, online server model); key_params: the same, already moved;
    queries, keys: lists of a client's images; queue_of_row: the queue that each row meets.
    """
    if loss == "client":
        queries, keys = (
            [jnp.concatenate(views) for views in zip(*both, strict=True)]
            for both in ((queries, keys), (keys, queries))
        )

    def latents(clients, images):
        return [model.latents(p, x) for p, x in zip(clients, images, strict=True)]

    key_latents = jnp.concatenate(latents(key_params[0], keys))
    k1, key_stats = embed(model, key_params[1], stats[1], key_latents)
    if loss == "server":
        query_latents = jnp.concatenate(latents(trained[0], queries))
        k2, key_stats = embed(model, key_params[1], key_stats, query_latents)

    def mean_loss(trained, shift):
        clients, server = trained
        x = jnp.concatenate(latents(clients, queries)) + shift
        q, online_stats = embed(model, server, stats[0], x)
        value, accuracy = cross_entropy(q, k1, queue_of_row)
        if loss == "server":
            q, online_stats = embed(model, server, online_stats, key_latents)
            second, accuracy = cross_entropy(q, k2, queue_of_row)
            value += second
        return value, (accuracy, online_stats)

    shift = jnp.zeros_like(key_latents)
    (value, (accuracy, online_stats)), (grads, latent_grad) = jax.value_and_grad(
        mean_loss, argnums=(0, 1), has_aux=True
    )(trained, shift)
    new_keys = (k2, k1) if loss == "server" else (k1,)
    return value, accuracy, latent_grad, grads, new_keys, (online_stats, key_stats)


def reference_step(
    model: SplitModel, loss: str, aligned: bool, world: World, ids: list[int], batch: Batch
):
    """Takes one step in place. Slots without a client and rows without an image do not exist.

    Returns: mean loss, accuracy in percent, gradient of the query latents of all rows.
    """
    slots = [slot for slot, i in enumerate(ids) if i < CLIENTS]
    ids = [ids[slot] for slot in slots]
    kept = [np.asarray(batch.mask[slot]) for slot in slots]
    queries, keys = (
        [np.asarray(view[slot])[rows] for slot, rows in zip(slots, kept, strict=True)]
        for view in batch.views
    )
    views = 2 if loss == "client" else 1
    owner = [i for i, x in zip(ids, queries, strict=True) for _ in range(views * len(x))]
    shared = len(world.queues) == 1
    queue_of_row = np.stack([world.queues[0 if shared else i] for i in owner])

    for i in ids:
        world.key_params[i] = ema(world.key_params[i], world.params[i])
    world.server_key = ema(world.server_key, world.server)
    value, accuracy, latent_grad, grads, new_keys, stats = reference_gradients(
        model,
        loss,
        ([world.params[i] for i in ids], world.server),
        ([world.key_params[i] for i in ids], world.server_key),
        (world.stats, world.key_stats),
        queries,
        keys,
        queue_of_row,
    )
    world.stats, world.key_stats = stats
    for view in new_keys:
        for i, row in zip(owner, np.asarray(view), strict=True):
            q = 0 if shared else i
            world.queues[q][world.ptrs[q]] = row
            world.ptrs[q] = (world.ptrs[q] + 1) % len(world.queues[q])

    factor = float(batch.rate_factor)
    world.server, world.server_trace = sgd_by_hand(
        world.server, world.server_trace, grads[1], SERVER_RATE * factor
    )
    for i, grad in zip(ids, grads[0], strict=True):
        world.params[i], world.traces[i] = sgd_by_hand(
            world.params[i], world.traces[i], grad, CLIENT_RATE * factor
        )
    if batch.sync:
        weights = [float(batch.weight[slot]) for slot in slots]
        world.common = average([world.params[i] for i in ids], weights)
        world.params = [world.common] * CLIENTS
        if aligned:
            world.common_key = average([world.key_params[i] for i in ids], weights)
            world.key_params = [world.common_key] * CLIENTS
    return value, accuracy, latent_grad


def average(trees: list[Any], weights: list[float]) -> Any:
    total = sum(weights)
    return jax.tree.map(
        lambda *xs: sum(w / total * x for w, x in zip(weights, xs, strict=True)), *trees
    )


# ------------------------------------------------------------------------------------ comparisons


def assert_step_matches(state: TrainState, world: World, ids: list[int]) -> None:
    server, cohort, common = state.server.server, state.cohort, state.server.client
    assert_close(server.params, world.server, "server.params")
    assert_close(server.key_params, world.server_key, "server.key_params")
    assert_close(server.opt_state, world.server_trace, "server.opt_state")
    assert_close(server.stats, world.stats, "server.stats")
    assert_close(server.key_stats, world.key_stats, "server.key_stats")
    assert_close(common.params, world.common, "common params")
    assert_close(common.key_params, world.common_key, "common key_params")
    for slot, i in enumerate(ids):
        if i >= CLIENTS:
            continue
        client = at(cohort.client, slot)
        assert_close(client.params, world.params[i], f"client {i}: params")
        assert_close(client.key_params, world.key_params[i], f"client {i}: key_params")
        assert_close(client.opt_state, world.traces[i], f"client {i}: opt_state")
        if state.server.queue is None:
            assert_queue(at(cohort.queue, slot), world, i)
    if state.server.queue is not None:
        assert_queue(state.server.queue, world, 0)


def assert_queue(queue: Queue, world: World, index: int) -> None:
    assert_close(queue.keys, world.queues[index], f"queue {index}")
    assert queue.ptr == world.ptrs[index]


def assert_round_matches(state: TrainState, world: World) -> None:
    """After a round whose last step was a sync."""
    kept, common = state.population, state.server.client
    aligned = common.key_params is not None
    for i in range(CLIENTS):
        key_params = common.key_params if aligned else at(kept.key_params, i)
        assert_close(common.params, world.params[i], f"population {i}: params")
        assert_close(key_params, world.key_params[i], f"population {i}: key_params")
        assert_close(at(kept.opt_state, i), world.traces[i], f"population {i}: opt_state")
        if kept.queue is not None:
            assert_queue(at(kept.queue, i), world, i)
