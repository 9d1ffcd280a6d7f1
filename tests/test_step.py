"""The step, against a slow reference: lists of clients, a loop, plain autodiff and NumPy queues."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import subjaxprs

from mocosfl_jax.data.augment import AugmentConfig, two_views
from mocosfl_jax.federated.average import sync
from mocosfl_jax.federated.dispatch import (
    Images,
    Normalisation,
    Program,
    rate_schedule,
    run_dispatch,
)
from mocosfl_jax.federated.state import (
    TrainState,
    begin_round,
    create_state,
    end_round,
    with_slots,
)
from mocosfl_jax.learning.queue import Queue, init_private_queues, init_queue
from mocosfl_jax.learning.sgd import sgd
from mocosfl_jax.methods.mocosfl.step import Batch, Method, Rates, StepOutput, train_step
from mocosfl_jax.models.split import SplitModel, Variables, build_model

CLIENTS, BATCH, SIZE = 5, 2, 8
QUEUE = 16  # rows, of the shared queue or of each private one
MOMENTUM, DECAY, TEMPERATURE, EMA = 0.9, 5e-3, 0.2, 0.7
SGD = sgd(MOMENTUM, DECAY)
STEP = jax.jit(train_step, static_argnums=0)


# ---------------------------------------------------------------------------------------- settings


@functools.cache
def tiny_model(head: str = "V2", **changes) -> SplitModel:
    settings = {
        "backbone": "resnet18",
        "blocks_per_stage": (1, 1),
        "width": 8,
        "stem": "3x3s1",
        "cut": 2,
        "bottleneck": None,
        "head_width": 8,
        "image_size": SIZE,
    }
    return build_model(head=head, **settings | changes)


@functools.cache
def tiny_method(loss: str, aligned: bool = False, **changes) -> Method:
    settings = {"model": tiny_model(), "optimizer": SGD, "temperature": TEMPERATURE, "ema": EMA}
    return Method(loss=loss, align_momentum=aligned, **settings | changes)


@functools.cache
def variables(model: SplitModel) -> Variables:
    return jax.jit(model.init)(jax.random.key(0))


def tiny_state(method: Method, shared: bool, clients: int = CLIENTS, cohort: int = 3) -> TrainState:
    """A state in the middle of a run: models, buffers and queues of all clients differ."""
    width = method.model.head.width
    if shared:
        queue = init_queue(jax.random.key(1), QUEUE, width).replace(ptr=jnp.int32(13))
    else:
        queue = init_private_queues(jax.random.key(1), clients, clients * QUEUE, width)
        queue = queue.replace(ptr=11 * jnp.arange(1, clients + 1, dtype=jnp.int32) % QUEUE)
    state = create_state(
        *variables(method.model),
        queue,
        optimizer=method.optimizer,
        num_clients=clients,
        cohort_size=cohort,
        feature_sharing=shared,
        align_momentum=method.align_momentum,
    )
    server, population = state.server, state.population
    return state.replace(
        server=server.replace(momentum=moved(server.momentum, 1), buffers=moved(server.buffers, 2)),
        population=population.replace(
            momentum=moved(population.momentum, 3), buffers=moved(population.buffers, 4)
        ),
    )


def moved(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), tree)


def images(seed: int, *lead: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*lead, SIZE, SIZE, 3)).astype(np.float32)


def one_batch(seed: int, mask: list[list[bool]], weights: list[float]) -> Batch:
    """Rows and slots that do not count hold images too, so that they show if they are counted."""
    mask_CB = np.array(mask)
    query, key = images(seed, *mask_CB.shape), images(seed + 100, *mask_CB.shape)
    return Batch(*map(jnp.asarray, (query, key, mask_CB)), jnp.asarray(weights, jnp.float32))


def rates(server: float, client: float) -> Rates:
    return Rates(jnp.float32(server), jnp.float32(client))


# ----------------------------------------------------------------------------------- the reference


@dataclass
class World:
    """Every client by its id; one queue and pointer, or one for every client."""

    params: list[Any]
    momentum: list[Any]
    buffers: list[Any]
    server: Any
    server_momentum: Any
    server_buffers: Any
    stats: Any
    momentum_stats: Any
    queues: list[np.ndarray]
    ptrs: list[int]


def world_of(state: TrainState, aligned: bool) -> World:
    population, server = state.population, state.server
    queue = population.queue or jax.tree.map(lambda x: x[None], state.queue)
    return World(
        params=[population.params] * CLIENTS,
        momentum=[population.momentum if aligned else at(population.momentum, i) for i in range(5)],
        buffers=[buffers_of(at(population.buffers, i), population.params) for i in range(CLIENTS)],
        server=server.params,
        server_momentum=server.momentum,
        server_buffers=buffers_of(server.buffers, server.params),
        stats=server.stats,
        momentum_stats=server.momentum_stats,
        queues=[np.array(keys) for keys in queue.keys],
        ptrs=[int(ptr) for ptr in queue.ptr],
    )


def at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def buffers_of(optimizer_state: Any, params: Any) -> Any:
    """The buffers in the shape of the parameters: the only arrays in the optimizer's state."""
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(optimizer_state))


def ema(momentum: Any, online: Any) -> Any:
    return jax.tree.map(lambda m, p: EMA * m + (1 - EMA) * p, momentum, online)


def sgd_by_hand(params: Any, buffers: Any, grads: Any, rate: jax.Array) -> tuple[Any, Any]:
    buffers = jax.tree.map(lambda p, b, g: MOMENTUM * b + g + DECAY * p, params, buffers, grads)
    return jax.tree.map(lambda p, b: p - rate * b, params, buffers), buffers


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
    model: SplitModel, kind: str, trained, momentum, stats, queries, keys, queue_of_row
):
    """Loss and gradients by plain autodiff of the whole network, client by client.

    trained: (online client models, online server model); momentum: the same, already moved;
    queries, keys: lists of a client's images; queue_of_row: the queue that each row meets.
    """
    if kind == "client":
        queries, keys = (
            [jnp.concatenate(views) for views in zip(*both, strict=True)]
            for both in ((queries, keys), (keys, queries))
        )

    def latents(clients, images):
        return [model.latents(p, x) for p, x in zip(clients, images, strict=True)]

    key_latents = jnp.concatenate(latents(momentum[0], keys))
    k1, momentum_stats = embed(model, momentum[1], stats[1], key_latents)
    if kind == "server":
        query_latents = jnp.concatenate(latents(trained[0], queries))
        k2, momentum_stats = embed(model, momentum[1], momentum_stats, query_latents)

    def loss(trained, shift):
        clients, server = trained
        x = jnp.concatenate(latents(clients, queries)) + shift
        q, online_stats = embed(model, server, stats[0], x)
        value, accuracy = cross_entropy(q, k1, queue_of_row)
        if kind == "server":
            q, online_stats = embed(model, server, online_stats, key_latents)
            second, accuracy = cross_entropy(q, k2, queue_of_row)
            value += second
        return value, (accuracy, online_stats)

    shift = jnp.zeros_like(key_latents)
    (value, (accuracy, online_stats)), (grads, latent_grad) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(trained, shift)
    new_keys = (k2, k1) if kind == "server" else (k1,)
    return value, accuracy, latent_grad, grads, new_keys, (online_stats, momentum_stats)


def reference_step(
    method: Method, world: World, ids: list[int], batch: Batch, rates: Rates, sync_now: bool
):
    """Takes one step in place. Slots without a client and rows without an image do not exist."""
    slots = [slot for slot, i in enumerate(ids) if i < CLIENTS]
    ids = [ids[slot] for slot in slots]
    kept = [np.asarray(batch.mask[slot]) for slot in slots]
    queries, keys = (
        [np.asarray(view[slot])[rows] for slot, rows in zip(slots, kept, strict=True)]
        for view in (batch.query, batch.key)
    )
    views = 2 if method.loss == "client" else 1
    owner = [i for i, x in zip(ids, queries, strict=True) for _ in range(views * len(x))]
    shared = len(world.queues) == 1
    queue_of_row = np.stack([world.queues[0 if shared else i] for i in owner])

    for i in ids:
        world.momentum[i] = ema(world.momentum[i], world.params[i])
    world.server_momentum = ema(world.server_momentum, world.server)
    value, accuracy, latent_grad, grads, new_keys, stats = reference_gradients(
        method.model,
        method.loss,
        ([world.params[i] for i in ids], world.server),
        ([world.momentum[i] for i in ids], world.server_momentum),
        (world.stats, world.momentum_stats),
        queries,
        keys,
        queue_of_row,
    )
    world.stats, world.momentum_stats = stats
    for view in new_keys:
        for i, row in zip(owner, np.asarray(view), strict=True):
            q = 0 if shared else i
            world.queues[q][world.ptrs[q]] = row
            world.ptrs[q] = (world.ptrs[q] + 1) % len(world.queues[q])

    world.server, world.server_buffers = sgd_by_hand(
        world.server, world.server_buffers, grads[1], rates.server
    )
    for i, grad in zip(ids, grads[0], strict=True):
        world.params[i], world.buffers[i] = sgd_by_hand(
            world.params[i], world.buffers[i], grad, rates.client
        )
    if sync_now:
        weights = [float(batch.sync_weight[slot]) for slot in slots]
        world.params = [average([world.params[i] for i in ids], weights)] * CLIENTS
        if method.align_momentum:
            world.momentum = [average([world.momentum[i] for i in ids], weights)] * CLIENTS
    return value, accuracy, latent_grad


def average(trees: list[Any], weights: list[float]) -> Any:
    total = sum(weights)
    return jax.tree.map(
        lambda *xs: sum(w / total * x for w, x in zip(weights, xs, strict=True)), *trees
    )


def assert_close(actual: Any, expected: Any, what: str, tolerance: float = 1e-4) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        atol = tolerance * max(np.abs(e).max(), 1e-2)
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=what)


def assert_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_step_matches(state: TrainState, world: World, ids: list[int]) -> None:
    server, cohort = state.server, state.cohort
    assert_close(server.params, world.server, "server.params")
    assert_close(server.momentum, world.server_momentum, "server.momentum")
    assert_close(server.buffers, world.server_buffers, "server.buffers")
    assert_close(server.stats, world.stats, "server.stats")
    assert_close(server.momentum_stats, world.momentum_stats, "server.momentum_stats")
    for slot, i in enumerate(ids):
        if i == CLIENTS:
            continue
        assert_close(at(cohort.params, slot), world.params[i], f"client {i}: params")
        assert_close(at(cohort.momentum, slot), world.momentum[i], f"client {i}: momentum")
        assert_close(at(cohort.buffers, slot), world.buffers[i], f"client {i}: buffers")
        if state.queue is None:
            assert_queue(at(cohort.queue, slot), world, i)
    if state.queue is not None:
        assert_queue(state.queue, world, 0)


def assert_queue(queue: Queue, world: World, index: int) -> None:
    assert_close(queue.keys, world.queues[index], f"queue {index}")
    assert queue.ptr == world.ptrs[index]


def assert_round_matches(state: TrainState, world: World, aligned: bool) -> None:
    population = state.population
    for i in range(CLIENTS):
        assert_close(population.params, world.params[i], f"population {i}: params")
        momentum = population.momentum if aligned else at(population.momentum, i)
        assert_close(momentum, world.momentum[i], f"population {i}: momentum")
        assert_close(at(population.buffers, i), world.buffers[i], f"population {i}: buffers")
        if population.queue is not None:
            assert_queue(at(population.queue, i), world, i)


# ----------------------------------------------------------------------------- step = reference


@dataclass(frozen=True)
class Case:
    loss: str
    shared: bool
    aligned: bool
    weights: tuple[float, ...]
    padded: bool  # one slot has no client
    head: str = "V2"

    def __str__(self) -> str:
        words = [self.loss, "shared" if self.shared else "private", self.head]
        return "-".join(words + [word for word in ("aligned", "padded") if getattr(self, word)])


EQUAL, SIZES = (1.0, 1.0, 1.0), (5.0, 1.0, 3.0)
MASK = [[True, True], [False, True], [True, True]]  # a row without an image
CASES = [
    Case("one_way", shared=True, aligned=False, weights=SIZES, padded=False),
    Case("one_way", shared=False, aligned=True, weights=EQUAL, padded=True),
    Case("server", shared=True, aligned=True, weights=SIZES, padded=True),
    Case("server", shared=False, aligned=False, weights=EQUAL, padded=False),
    Case("client", shared=True, aligned=False, weights=EQUAL, padded=False),
    Case("client", shared=False, aligned=True, weights=SIZES, padded=True),
    Case("server", shared=True, aligned=False, weights=EQUAL, padded=False, head="largeV2"),
]
ROUNDS = [  # clients, and whether each step syncs
    ([4, 1, 3], [False, True]),
    ([0, 4, 2], [True, True]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_the_reference(case):
    method = tiny_method(case.loss, case.aligned, model=tiny_model(case.head))
    mask, weights = MASK, list(case.weights)
    if case.padded:
        mask, weights = [*mask[:1], [False] * BATCH, *mask[1:]], [weights[0], 0.0, *weights[1:]]
    state = tiny_state(method, case.shared, cohort=len(mask))
    world = world_of(state, case.aligned)
    step = 0
    for ids, syncs in ROUNDS:
        ids = [ids[0], CLIENTS, *ids[1:]] if case.padded else ids
        state = begin_round(state, jnp.asarray(ids, jnp.int32), case.aligned)
        for sync_now in syncs:
            batch = one_batch(step, mask, weights)
            step_rates = rates(0.05 / (1 + step), 0.02 * (1 + step))
            state, output = STEP(method, state, batch, step_rates, sync_now)
            expected = reference_step(method, world, ids, batch, step_rates, sync_now)
            assert_output(output, expected, batch.mask)
            assert_step_matches(state, world, ids)
            step += 1
        assert state.step == step
        state = end_round(state, case.aligned)
        assert_round_matches(state, world, case.aligned)


def assert_output(output: StepOutput, expected, mask: jax.Array) -> None:
    loss, accuracy, latent_grad = expected
    np.testing.assert_allclose(output.loss, loss, rtol=1e-4)
    np.testing.assert_allclose(output.accuracy, accuracy, rtol=1e-5)
    mask = np.asarray(mask)
    both = np.concatenate([mask] * (output.latent_grad.shape[1] // BATCH), axis=1)
    actual = np.asarray(output.latent_grad)
    assert_close(actual[both], latent_grad, "latent_grad")
    np.testing.assert_array_equal(actual[~both], 0)


# ------------------------------------------------------------------------------- who is touched


def test_participants_train_and_absent_clients_keep_what_is_theirs():
    method, ids = tiny_method("one_way"), [4, 1, 3]
    start = tiny_state(method, shared=True)
    state = begin_round(start, jnp.asarray(ids, jnp.int32), False)
    assert_equal(state.population, start.population)
    for step, sync_now in enumerate([False, True]):
        batch = one_batch(step, [[True] * BATCH] * 3, [1.0, 2.0, 3.0])
        state, _ = STEP(method, state, batch, rates(0.05, 0.05), sync_now)
        assert_equal(state.population, start.population)
    after = end_round(state, False).population
    for i in range(CLIENTS):
        for name in ("momentum", "buffers"):
            now, before = (at(getattr(p, name), i) for p in (after, start.population))
            if i not in ids:
                assert_equal(now, before)
            else:
                for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(before), strict=True):
                    assert np.abs(a - b).max() > 1e-5
    for slot in range(3):
        assert_equal(after.params, at(state.cohort.params, slot))


def test_without_a_sync_clients_part_and_with_one_they_agree():
    method = tiny_method("one_way")
    state = begin_round(tiny_state(method, shared=True), jnp.asarray([4, 1, 3], jnp.int32), False)
    batch = one_batch(0, [[True] * BATCH] * 3, [1.0, 1.0, 1.0])
    for sync_now in (False, True):
        after, _ = STEP(method, state, batch, rates(0.05, 0.05), sync_now)
        for x in jax.tree.leaves(after.cohort.params):
            assert (np.abs(x[0] - x[2]).max() == 0) == sync_now
        for x in jax.tree.leaves(after.cohort.momentum):
            assert np.abs(x[0] - x[2]).max() > 0


# --------------------------------------------------------------------------------- frozen clients


def products(jaxpr) -> int:
    """Convolutions and matrix products in a program, those of inner programs included."""
    inner = (products(sub) for sub in subjaxprs(jaxpr))
    names = [equation.primitive.name for equation in jaxpr.eqns]
    return sum(name in ("conv_general_dilated", "dot_general") for name in names) + sum(inner)


def test_frozen_clients_have_no_backward_pass_and_stay():
    method = tiny_method("server", aligned=True)
    frozen = replace(method, frozen_clients=True)
    state = begin_round(tiny_state(method, shared=True), jnp.asarray([4, 1, 3], jnp.int32), True)
    batch = one_batch(0, [[True] * BATCH] * 3, [1.0, 1.0, 1.0])
    cohort, latents = state.cohort, jax.vmap(method.model.latents)

    def count(function, *arguments):
        return products(jax.make_jaxpr(function)(*arguments).jaxpr)

    def forward_and_backward(params, images):
        value, pull = jax.vjp(lambda p: latents(p, images), params)
        return pull(value)

    forward = count(latents, cohort.params, batch.query)
    backward = count(forward_and_backward, cohort.params, batch.query) - forward
    averages = count(lambda c: sync(c, batch.sync_weight, True), cohort)
    trained, untrained = (
        count(lambda s, m=m: train_step(m, s, batch, rates(0.05, 0.0), True), state)
        for m in (method, frozen)
    )
    assert forward == 3 and backward == 6  # a kernel's and an input's gradient for each forward one
    assert trained - untrained == backward + averages

    after, _ = STEP(frozen, state, batch, rates(0.05, 0.0), True)
    expected, _ = STEP(method, state, batch, rates(0.05, 0.0), True)
    assert_equal(after.cohort.params, state.cohort.params)
    assert_equal(after.cohort.buffers, state.cohort.buffers)
    assert_close(after.cohort.momentum, expected.cohort.momentum, "momentum", 1e-6)
    assert_close(after.server, expected.server, "server", 1e-5)
    assert_close(after.queue, expected.queue, "queue", 1e-5)


# ------------------------------------------------------------------------ the same, run otherwise


def test_jit_equals_eager():
    model = tiny_model("V1", blocks_per_stage=(), width=4, cut=1)
    method = tiny_method("one_way", True, model=model)
    state = begin_round(tiny_state(method, shared=True), jnp.asarray([4, 1, 3], jnp.int32), True)
    batch = one_batch(0, MASK, [1.0, 2.0, 3.0])
    arguments = (method, state, batch, rates(0.05, 0.02), True)
    assert_close(STEP(*arguments), train_step(*arguments), "jit", 1e-5)


@pytest.mark.parametrize("poison", [False, True])
def test_a_dispatch_equals_its_steps_one_by_one(poison):
    method, ids = tiny_method("one_way"), [4, 1, 3]
    augment = AugmentConfig(size=SIZE, blur_prob=0.0)
    schedule = rate_schedule("cosine", total_steps=5)
    program = Program(method, augment, 0.05, 0.02, schedule)
    rng = np.random.default_rng(0)
    raw = jnp.asarray(rng.integers(0, 256, (3, 3, BATCH, 10, 9, 3)), jnp.uint8)
    mask = jnp.asarray(rng.random((3, 3, BATCH)) < 0.8).at[:, :, 0].set(True)
    inputs = Images(raw, mask, jnp.asarray([False, True, True]), jnp.asarray([1.0, 2.0, 3.0]))
    normalisation = Normalisation(jnp.asarray([0.4, 0.5, 0.6]), jnp.asarray([0.2, 0.3, 0.4]))
    key = jax.random.key(9)
    state = begin_round(tiny_state(method, shared=True), jnp.asarray(ids, jnp.int32), False)
    state = state.replace(step=jnp.int32(2))
    if poison:
        state = jax.tree.map(lambda x: x, state)  # its dicts are shared with other tests
        bias = state.server.params["head"]["dense2"]["bias"]
        state.server.params["head"]["dense2"]["bias"] = bias.at[0].set(np.nan)
    run = jax.jit(run_dispatch, static_argnums=0)
    after, output = run(program, state, inputs, normalisation, key)
    assert bool(output.finite) != poison
    if poison:
        return

    view = jax.jit(lambda keys, x: two_views(keys, x, augment, *normalisation))
    for s in range(3):
        step_key = jax.random.fold_in(key, 2 + s)
        views = [
            view(jax.random.split(jax.random.fold_in(step_key, i), BATCH), raw[s, slot])
            for slot, i in enumerate(ids)
        ]
        query, other = (jnp.stack(view) for view in zip(*views, strict=True))
        factor = (1 + np.cos(np.pi * (2 + s) / 5)) / 2
        batch = Batch(query, other, mask[s], inputs.sync_weight)
        sync_now = inputs.sync_now[s]
        state, expected = STEP(method, state, batch, rates(0.05 * factor, 0.02 * factor), sync_now)
        np.testing.assert_allclose(output.loss[s], expected.loss, rtol=1e-4)
        np.testing.assert_allclose(output.accuracy[s], expected.accuracy, rtol=1e-5)
        np.testing.assert_allclose(output.learning_rate[s], 0.05 * factor, rtol=1e-5)
    assert output.learning_rate.shape == (3,) and output.learning_rate.dtype == jnp.float32
    assert after.step == state.step == 5
    assert_close(after.replace(step=0), state.replace(step=0), "dispatch")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("step", [1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [(1 + np.cos(np.pi * t / 10)) / 2 for t in range(10)]),
    ],
)
def test_rate_schedules(name, expected):
    schedule = rate_schedule(name, total_steps=10)
    actual = [float(schedule(jnp.float32(t))) for t in range(10)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_sgd_is_pytorchs():
    """Buffer = momentum * buffer + gradient + decay * parameter; parameter -= rate * buffer."""
    params, grads = {"a": jnp.asarray([1.0, -2.0])}, {"a": jnp.asarray([0.5, 4.0])}
    transform = sgd(0.9, 0.1)
    buffers = transform.init(params)
    buffer, value = np.zeros(2), np.array([1.0, -2.0])
    for rate in (0.1, 0.02, 0.3):
        updates, buffers = transform.update(grads, buffers, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u, r=rate: -r * u, updates))
        buffer = 0.9 * buffer + np.array([0.5, 4.0]) + 0.1 * value
        value = value - rate * buffer
        np.testing.assert_allclose(params["a"], value, rtol=1e-6)


# ------------------------------------------------------------------------------------ policies


@pytest.mark.parametrize(
    ("loss", "shared", "aligned"),
    [("server", True, True), ("client", False, False), ("one_way", True, False)],
)
def test_chunks_of_the_cohort_give_the_whole_step(loss, shared, aligned):
    ids, mask = [4, 1, 3, CLIENTS], [*MASK, [False, False]]
    whole = tiny_method(loss, aligned)
    state = begin_round(tiny_state(whole, shared, cohort=4), jnp.asarray(ids, jnp.int32), aligned)
    expected = state
    for step, sync_now in enumerate([False, True]):
        arguments = (one_batch(step, mask, [*SIZES, 0.0]), rates(0.05, 0.02), sync_now)
        state, output = STEP(tiny_method(loss, aligned, cohort_chunks=2), state, *arguments)
        expected, wanted = STEP(whole, expected, *arguments)
        assert_close(output, wanted, "output", 3e-5)
        assert_close(state, expected, "state", 3e-5)


def test_a_batch_norm_head_allows_no_chunks():
    normed = tiny_model("largeV2")
    assert tiny_method("server", model=normed).cohort_chunks == 1
    with pytest.raises(ValueError, match=r"cohort_chunks = 2.*BatchNorm"):
        tiny_method("server", model=normed, cohort_chunks=2)


def test_stateless_clients_are_persistent_ones_with_zeroed_buffers():
    """Aligned, as only then nothing else of a client outlives a round."""
    method = tiny_method("server", aligned=True)
    settings = {
        "optimizer": method.optimizer,
        "num_clients": CLIENTS,
        "cohort_size": 3,
        "feature_sharing": True,
        "align_momentum": True,
    }
    queue = init_queue(jax.random.key(1), QUEUE, method.model.head.width)
    start = functools.partial(create_state, *variables(method.model), queue, **settings)
    kept, dropped = start(), start(stateless=True)
    assert dropped.population.buffers is None
    step = 0
    for ids, syncs in ROUNDS:
        zeroed = jax.tree.map(jnp.zeros_like, kept.population.buffers)
        kept = kept.replace(population=kept.population.replace(buffers=zeroed))
        kept, dropped = (begin_round(s, jnp.asarray(ids, jnp.int32), True) for s in (kept, dropped))
        for sync_now in syncs:
            arguments = (one_batch(step, MASK, list(SIZES)), rates(0.05, 0.02), sync_now)
            kept, dropped = (STEP(method, s, *arguments)[0] for s in (kept, dropped))
            step += 1
        kept, dropped = end_round(kept, True), end_round(dropped, True)
        assert_equal(dropped.server, kept.server)
        assert_equal(dropped.cohort, kept.cohort)
        assert_equal(dropped.queue, kept.queue)
        assert_equal(dropped.population.params, kept.population.params)
        assert_equal(dropped.population.momentum, kept.population.momentum)


def test_no_leaf_of_stateless_clients_grows_with_their_number():
    method = tiny_method("server", aligned=True)

    def state(clients: int) -> TrainState:
        queue = init_queue(jax.random.key(1), QUEUE, method.model.head.width)
        return create_state(
            *variables(method.model),
            queue,
            optimizer=method.optimizer,
            num_clients=clients,
            cohort_size=3,
            feature_sharing=True,
            align_momentum=True,
            stateless=True,
        )

    few, many = (jax.eval_shape(functools.partial(state, n)) for n in (5, 1_000_000))
    assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)


def test_slots_are_added_and_cut_off():
    method, ids = tiny_method("one_way"), [4, 1, 3]
    state = begin_round(tiny_state(method, False), jnp.asarray(ids, jnp.int32), False)
    wider = with_slots(state, 5, CLIENTS)
    assert wider.cohort_ids.tolist() == [*ids, CLIENTS, CLIENTS]
    assert all(len(x) == 5 for x in jax.tree.leaves(wider.cohort))
    assert_equal(with_slots(wider, 3, CLIENTS), state)
