"""MocoSFL on a network of two blocks: settings, states and batches for tests of the step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.federated.contract import Batch, Normalisation
from mocosfl_jax.federated.state import TrainState, create_state
from mocosfl_jax.learning.losses import LOSSES
from mocosfl_jax.learning.sgd import sgd
from mocosfl_jax.methods.mocosfl.client import ClientSide
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from mocosfl_jax.methods.mocosfl.server import ServerSide
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.split import SplitModel, build_model

CLIENTS, BATCH, SIZE = 5, 2, 8
QUEUE = 16  # rows, of the shared queue or of each private one
MOMENTUM, DECAY, TEMPERATURE, EMA = 0.9, 5e-3, 0.2, 0.7
SERVER_RATE, CLIENT_RATE = 0.05, 0.02
SGD = sgd(MOMENTUM, DECAY)

EQUAL, SIZES = (1.0, 1.0, 1.0), (5.0, 1.0, 3.0)
FULL = [[True] * BATCH] * 3
MASK = [[True, True], [False, True], [True, True]]  # a row without an image


@functools.cache
def tiny_model(head: str = "V2", **changes) -> SplitModel:
    network = {"backbone": "resnet18", "width": 8, "blocks_per_stage": (1, 1), "stem": "3x3s1"}
    others = {"cut": 2, "bottleneck": None, "head_width": 8, "image_size": SIZE}
    for name, value in changes.items():
        (network if name in network else others)[name] = value
    return build_model(Network(**network), head=head, **others)


@functools.cache
def tiny_method(
    loss: str,
    shared: bool = True,
    aligned: bool = False,
    model: SplitModel | None = None,
    axes: Axes = NO_MESH,
) -> MocoSFL:
    model, form = model or tiny_model(), LOSSES[loss]
    return MocoSFL(
        model=model,
        client=ClientSide(model.client, SGD, EMA, both_views=form.both_views),
        server=ServerSide(model, SGD, form, TEMPERATURE, EMA),
        learning_rate=SERVER_RATE,
        client_learning_rate=CLIENT_RATE,
        queue_rows=QUEUE,
        private_queues=not shared,
        align=aligned,
        axes=axes,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def new_state(method: MocoSFL, clients: int, slots: int) -> TrainState:
    """The state before the first step."""
    return create_state(method, jax.random.key(0), jax.random.key(1), clients, slots)


def tiny_state(method: MocoSFL, clients: int = CLIENTS, slots: int = 3) -> TrainState:
    """A state in the middle of a run: models, optimizer states and queues of all clients differ."""
    state = new_state(method, clients, slots)
    server, kept = state.server, state.population
    models = server.server.replace(
        key_params=moved(server.server.key_params, 1), opt_state=moved(server.server.opt_state, 2)
    )
    kept = kept.replace(opt_state=moved(kept.opt_state, 4))
    if method.align:
        common = server.client._replace(key_params=moved(server.client.key_params, 3))
        server = server.replace(client=common)
    else:
        kept = kept.replace(key_params=moved(kept.key_params, 3))
    if method.private_queues:
        ptr = 11 * jnp.arange(1, clients + 1, dtype=jnp.int32) % QUEUE
        kept = kept.replace(queue=kept.queue.replace(ptr=ptr))
    else:
        server = server.replace(queue=server.queue.replace(ptr=jnp.int32(13)))
    return state.replace(server=server.replace(server=models), population=kept)


def moved(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), tree)


def different(tree: Any, seed: int) -> Any:
    """Random leaves of the same shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(10 * rng.normal(size=x.shape), x.dtype), tree)


def slots_of(*ids: int) -> jax.Array:
    """Client ids as `begin_round` takes them."""
    return jnp.asarray(ids, jnp.int32)


# ----------------------------------------------------------------------------------------- a step


def images(seed: int, *lead: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*lead, SIZE, SIZE, 3)).astype(np.float32)


def one_batch(
    seed: int, mask: list[list[bool]], weights: tuple[float, ...], sync: bool, factor: float = 1.0
) -> Batch:
    """Rows and slots that do not count hold images too, so that they show if they are counted."""
    mask_CB = np.array(mask)
    views = tuple(jnp.asarray(images(s, *mask_CB.shape)) for s in (seed, seed + 100))
    return Batch(
        views=views,
        labels=None,
        mask=jnp.asarray(mask_CB),
        weight=jnp.asarray(weights, jnp.float32),
        sync=jnp.asarray(sync),
        rate_factor=jnp.float32(factor),
        progress=jnp.float32(0),
        keys=jax.random.split(jax.random.key(seed), len(mask_CB)),
        normalisation=Normalisation(jnp.zeros(3), jnp.ones(3)),
    )


class StepOutput(NamedTuple):
    """loss, accuracy: () float32, over all devices. latent_grad: (C, B', h, w, c)."""

    loss: jax.Array
    accuracy: jax.Array
    latent_grad: jax.Array


def take_step(method: MocoSFL, state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
    """One step of a whole state, as a dispatch takes it, with the gradient that is sent."""
    result = method.step(state.server, state.cohort, batch, messages=True)
    metrics = method.axes.sum(result.metrics)
    loss, accuracy = (metrics[name].total / metrics[name].weight for name in ("loss", "accuracy"))
    state = state.replace(step=state.step + 1, server=result.server, cohort=result.cohort)
    return state, StepOutput(loss, accuracy, result.messages.gradient.query)


STEP = jax.jit(take_step, static_argnums=0)


# ------------------------------------------------------------------------------------ comparisons


def at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def assert_close(actual: Any, expected: Any, what: str, tolerance: float = 1e-4) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        atol = tolerance * max(np.abs(e).max(), 1e-2)
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=what)


def assert_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
