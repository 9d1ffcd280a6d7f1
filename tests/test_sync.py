"""Averaging client models, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.federated.average import average, sync
from mocosfl_jax.federated.state import ClientState, begin_round, create_state, end_round
from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.learning.sgd import sgd

SLOTS = 3
SHAPES = {"conv": {"kernel": (2, 1, 4)}, "norm": {"scale": (4,), "scalar": ()}}


def tree(seed: int, *lead: int):
    rng = np.random.default_rng(seed)
    shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=(*lead, *s)), jnp.float32), SHAPES, is_leaf=shape
    )


def cohort() -> ClientState:
    queue = Queue(
        jnp.asarray(np.random.default_rng(9).normal(size=(SLOTS, 5, 2))), jnp.arange(SLOTS)
    )
    return ClientState(tree(0, SLOTS), tree(1, SLOTS), tree(2, SLOTS), queue)


def weighted(x: jax.Array, weights: list[float]) -> np.ndarray:
    """The mean over the first axis in float64, repeated."""
    x = np.asarray(x, np.float64)
    mean = sum(w * row for w, row in zip(weights, x, strict=True)) / sum(weights)
    return np.broadcast_to(mean, x.shape)


def assert_averaged(actual, start, weights) -> None:
    for a, s in zip(jax.tree.leaves(actual), jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(a, weighted(s, weights), rtol=1e-5, atol=1e-6)


def assert_untouched(actual, start) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, start)


@pytest.mark.parametrize("weights", [[1, 1, 1], [7, 1, 4], [0, 5, 0], [3, 2, 0]])
def test_average_weighs_by_size(weights):
    start = tree(0, SLOTS)
    averaged = jax.jit(average)(start, jnp.asarray(weights, jnp.float32))
    assert_averaged(averaged, start, weights)


@pytest.mark.parametrize("aligned", [False, True])
def test_sync_touches_online_models_and_momentum_models_only_when_aligned(aligned):
    start, weights = cohort(), [5.0, 1.0, 2.0]
    synced = sync(start, jnp.asarray(weights), aligned)
    assert_averaged(synced.params, start.params, weights)
    if aligned:
        assert_averaged(synced.momentum, start.momentum, weights)
    else:
        assert_untouched(synced.momentum, start.momentum)
    assert_untouched(synced.buffers, start.buffers)
    assert_untouched(synced.queue, start.queue)


def test_a_padding_slot_gets_the_average_and_does_not_enter_it():
    start, weights = tree(0, SLOTS), jnp.asarray([2.0, 1.0, 0.0])
    changed = jax.tree.map(lambda x: x.at[2].set(1e6), start)
    assert_untouched(average(changed, weights), average(start, weights))


def test_no_backend_may_average_in_fewer_bits():
    lowered = jax.jit(average).lower(tree(0, SLOTS), jnp.ones(SLOTS)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == len(jax.tree.leaves(tree(0)))
    assert all("HIGHEST" in line and "DEFAULT" not in line for line in products)


# ----------------------------------------------------------- the population, from round to round

CLIENTS, ROWS, WIDTH = 5, 4, 2


def population_state(aligned: bool, feature_sharing: bool):
    """A state in which no two clients have the same buffers, momentum models or queues."""
    rng = np.random.default_rng(0)
    lead = () if feature_sharing else (CLIENTS,)
    keys = jnp.asarray(rng.normal(size=(*lead, ROWS, WIDTH)), jnp.float32)
    state = create_state(
        tree(0),
        tree(1),
        {},
        Queue(keys, jnp.zeros(lead, jnp.int32)),
        optimizer=sgd(0.9, 0.0),
        num_clients=CLIENTS,
        cohort_size=SLOTS,
        feature_sharing=feature_sharing,
        align_momentum=aligned,
    )
    population = state.population.replace(
        buffers=different(state.population.buffers, 3),
        momentum=different(state.population.momentum, 4),
    )
    return state.replace(population=population)


def different(of, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), of)


def at(of, index: int):
    return jax.tree.map(lambda x: x[index], of)


def test_a_new_state_has_clients_alike_and_momentum_models_equal_to_online_ones():
    rng = np.random.default_rng(0)
    queue = Queue(jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32), jnp.int32(0))
    for aligned in (False, True):
        state = create_state(
            tree(0),
            tree(1),
            {},
            queue,
            optimizer=sgd(0.9, 0.0),
            num_clients=CLIENTS,
            cohort_size=SLOTS,
            feature_sharing=True,
            align_momentum=aligned,
        )
        assert state.step == 0
        assert_untouched(state.server.params, tree(1))
        assert_untouched(state.server.momentum, tree(1))
        for slot in range(SLOTS):
            assert_untouched(at(state.cohort.params, slot), tree(0))
            assert_untouched(at(state.cohort.momentum, slot), tree(0))
        assert not any(
            x.any() for x in jax.tree.leaves((state.server.buffers, state.cohort.buffers))
        )
        momentum = state.population.momentum
        assert_untouched(momentum if aligned else at(momentum, CLIENTS - 1), tree(0))


@pytest.mark.parametrize("feature_sharing", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ids", [[4, 0, 3], [2, 4, CLIENTS]])
def test_a_round_reads_and_writes_its_participants_only(aligned, feature_sharing, ids):
    before = population_state(aligned, feature_sharing)
    drawn = begin_round(before, jnp.asarray(ids, jnp.int32), aligned)
    assert_untouched(drawn.population, before.population)
    members = [(slot, i) for slot, i in enumerate(ids) if i < CLIENTS]
    for slot, i in members:
        assert_untouched(at(drawn.cohort.params, slot), before.population.params)
        own = before.population.momentum
        assert_untouched(at(drawn.cohort.momentum, slot), own if aligned else at(own, i))
        assert_untouched(at(drawn.cohort.buffers, slot), at(before.population.buffers, i))
        assert_untouched(at(drawn.cohort.queue, slot), at(before.population.queue, i))

    trained = different(drawn.cohort, 8)
    weight = jnp.asarray([1.0, 2.0, 3.0 if ids[2] < CLIENTS else 0.0])
    trained = sync(trained, weight, aligned)
    after = end_round(drawn.replace(cohort=trained), aligned).population
    assert_untouched(after.params, at(trained.params, 0))
    slots = {i: slot for slot, i in members}
    for i in range(CLIENTS):
        source, index = (trained, slots[i]) if i in slots else (before.population, i)
        assert_untouched(at(after.buffers, i), at(source.buffers, index))
        assert_untouched(at(after.queue, i), at(source.queue, index))
        if not aligned:
            assert_untouched(at(after.momentum, i), at(source.momentum, index))
    if aligned:
        assert_untouched(after.momentum, at(trained.momentum, 0))
